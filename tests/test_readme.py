"""What the README tells people to type is what the tool takes."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path

import click
import pytest

from fofa_deploy.cli import VERBS, cli
from fofa_deploy.config import RunPlan
from fofa_deploy.profile import find_profile
from fofa_deploy.schema import validate

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [line for block in blocks("sh") for line in block.splitlines() if line.startswith("fofa-deploy ")]


def test_the_readme_has_commands_and_shows_every_verb():
    assert {shlex.split(line)[1] for line in COMMANDS} == set(VERBS)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_parses(line, tmp_path, monkeypatch):
    """The real parser of the real verb, in a folder where the files exist that the README speaks of."""
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/flowers", "photos"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("plan.toml", "model.onnx", "model.xml", "model.engine", "weights.safetensors", "results.json"):
        (tmp_path / file).touch()
    verb, *arguments = shlex.split(line)[1:]
    command = cli.get_command(None, verb)
    # As a child of the group: on its own, click would settle the verb's help flags for the whole process, without -h.
    parent = click.Context(cli, info_name="fofa-deploy", **cli.context_settings)
    context = command.make_context(verb, arguments, parent=parent)
    assert not context.args


def test_the_plan_in_the_readme_is_a_plan():
    (text,) = blocks("toml")
    plan = validate(tomllib.loads(text), RunPlan, "README.md")
    assert [find_profile(name).runtime for name in plan.targets] == ["onnxruntime", "openvino", "tensorrt"]


@pytest.mark.parametrize("target", ["demo", "test"])
def test_make_knows_the_two_commands(target):
    assert f"make {target}\n" in README
    assert re.search(rf"^{target}: ", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(([^)#:]+)\)", README))))
def test_every_link_leads_somewhere(path):
    assert (ROOT / path).exists()


def test_ci_runs_the_readmes_test_command():
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
