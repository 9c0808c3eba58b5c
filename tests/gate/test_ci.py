"""The workflows that people copy: they parse, and their commands run, word for word, on a small real run."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
import yaml

from fofa_deploy.cli import cli

CI = Path(__file__).parents[2] / "docs" / "ci"


def github() -> list[str]:
    """The commands of the workflow, line by line."""
    workflow = yaml.safe_load((CI / "github.yml").read_text())
    # YAML 1.1 reads the key "on" as true.
    assert workflow[True] == {"pull_request": None}
    (job,) = workflow["jobs"].values()
    assert all("run" in step or "uses" in step for step in job["steps"])
    return [line for step in job["steps"] for line in step.get("run", "").splitlines()]


def gitlab() -> list[str]:
    jobs = yaml.safe_load((CI / "gitlab.yml").read_text())
    assert jobs["gate"]["allow_failure"] == {"exit_codes": 4}
    return [line for name in ("gate", "trend") for line in jobs[name]["script"]]


LINES = [*github(), *gitlab()]


def test_both_run_the_gate():
    assert sum(line.startswith("fofa-deploy check ") for line in github()) == 1
    assert sum(line.startswith("fofa-deploy check ") for line in gitlab()) == 2


@pytest.mark.parametrize("line", [line for line in LINES if line.startswith("fofa-deploy ")])
def test_every_command_parses(line, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/base", "runs/candidate", "runs/main"):
        (tmp_path / folder).mkdir(parents=True)
    words = shlex.split(line.partition(" > ")[0])[1:]
    command = cli.get_command(None, words[0])
    parent = click.Context(cli, info_name="fofa-deploy", **cli.context_settings)
    assert not command.make_context(words[0], words[1:], parent=parent).args


def test_the_commands_of_the_gate_run_as_they_stand(baseline_run, tmp_path):
    """Training took its time elsewhere: what the two trainings leave behind is put in their place."""
    for name in ("base", "candidate", "main"):
        shutil.copytree(baseline_run, tmp_path / "runs" / name)
    tool = tmp_path / "bin" / "fofa-deploy"
    tool.parent.mkdir()
    tool.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fofa_deploy "$@"\n')
    tool.chmod(0o755)
    summary = tmp_path / "summary.md"
    environment = {
        **os.environ,
        "PATH": f"{tool.parent}:{os.environ['PATH']}",
        "GITHUB_STEP_SUMMARY": str(summary),
        "GITHUB_SHA": "c0ffee",
    }
    for line in (line for line in LINES if line.startswith("fofa-deploy check ")):
        done = subprocess.run(
            ["sh", "-ec", line], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
    for name in ("gate.xml", "gate.json", "gate.md", "history.jsonl", "trend.svg"):
        assert (tmp_path / name).stat().st_size > 0, name
    assert summary.read_text().count("## ✅ fofa-deploy check: pass") == 3
    assert "c0ffee" in (tmp_path / "gate.json").read_text()
