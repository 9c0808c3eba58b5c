"""The fixture in somebody else's tests, in a pytest of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

from .conftest import lose_target

ROOT = Path(__file__).parents[2]
PLUGIN = "fofa_deploy.gate.pytest_plugin"
TESTS = """
import pytest
from fofa_deploy.gate.verdicts import Verdict

def test_same(fofa_gate):
    assert fofa_gate.check({good!r}, baseline={base!r}, quick=True).verdict is Verdict.PASS

def test_worse(fofa_gate):
    fofa_gate.check({bad!r}, baseline={base!r}, quick=True)

def test_noise(fofa_gate, monkeypatch):
    from fofa_deploy.gate.verdicts import GateReport
    report = fofa_gate.check({good!r}, baseline={base!r})
    doubtful = report.model_copy(update={{"verdict": Verdict.INCONCLUSIVE}})
    monkeypatch.setattr("fofa_deploy.gate.check.check", lambda *arguments: (doubtful, {{}}))
    with pytest.raises(pytest.fail.Exception):
        fofa_gate.check("any", inconclusive="fail")
    fofa_gate.check("any")
"""


def pytest_in(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-p", PLUGIN, "-p", "no:cacheprovider", "--rootdir", str(folder), *arguments]
    # Named on the command line and found by its entry point, a plug-in would be registered twice.
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment, timeout=300, check=False)


def test_a_regression_fails_the_test_and_doubt_skips_it(baseline_run, copy, tmp_path):
    lose_target(copy)
    text = TESTS.format(good=str(baseline_run), bad=str(copy), base=str(baseline_run))
    (tmp_path / "test_gate.py").write_text(text)
    done = pytest_in(tmp_path, "-rfs", "--junitxml=junit.xml", "test_gate.py")
    assert "1 failed, 1 passed, 1 skipped" in done.stdout, done.stdout + done.stderr
    assert "FAILED test_gate.py::test_worse - Failed: gate: fail (" in done.stdout
    assert "SKIPPED" in done.stdout
    assert '<property name="fofa_gate" value="gate: pass (' in (tmp_path / "junit.xml").read_text()


def test_the_plugin_changes_nothing_and_imports_no_framework(tmp_path):
    (tmp_path / "test_plain.py").write_text(
        "import sys\n\ndef test_plain():\n"
        f"    assert {PLUGIN!r} in sys.modules\n"
        "    assert not {'torch', 'numpy', 'scipy', 'onnx', 'onnxruntime', 'pydantic'} & set(sys.modules)\n"
    )
    done = pytest_in(tmp_path, "test_plain.py")
    assert "1 passed" in done.stdout, done.stdout + done.stderr
    assert "fofa_gate" in pytest_in(tmp_path, "--fixtures").stdout


def test_the_project_declares_it():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["entry-points"]["pytest11"] == {"fofa_gate": PLUGIN}
