"""The benchmark of the gate: its models differ in what it says, its rates are exact, and it goes on where it stopped."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from fofa_deploy.backend import get_backend
from fofa_deploy.profile import find_profile
from fofa_deploy.types import Artifact

FOLDER = Path(__file__).parents[2] / "benchmarks" / "gate"


def load(name):
    spec = importlib.util.spec_from_file_location(f"gate_benchmark_{name}", FOLDER / f"{name}.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_models_that_are_to_be_equal_are_two_files_with_the_same_answers(tmp_path):
    models, profile = load("models"), find_profile("cpu-onnxruntime")
    folders = [models.write_artifact(tmp_path, profile, *which) for which in ((0, "baseline"), (0, "same"), (3, "slow"))]
    artifacts = [Artifact.load(folder) for folder in folders]
    assert len({artifact.sha256 for artifact in artifacts}) == 3
    assert [len(artifact.layers) - len(artifacts[0].layers) for artifact in artifacts] == [0, 0, 3]
    images = np.load(folders[0] / "golden.npz")["images"]
    logits = []
    for artifact in artifacts:
        with get_backend("onnxruntime").load(artifact, profile) as session:
            logits.append(session.run({"images": images})["logits"])
    assert np.array_equal(logits[0], logits[1])
    assert np.isfinite(logits[2]).all()


def trial(kind, verdict, **changes):
    line = {"phase": "idle", "kind": kind, "runtime": "onnxruntime", "verdict": verdict, "seconds": 12.0, "load": 0}
    machine = {"load_average": [0.1, 0.3], "cpu": "A CPU", "cores": 2, "rivals": {"7 % threshold": kind == "+10%"}}
    return {**line, **machine, **changes}


@pytest.fixture
def results(tmp_path) -> Path:
    lines = [trial("same", "pass")] * 100 + [trial("+3%", "fail")] * 9 + [trial("+3%", "inconclusive")] + [trial("+10%", "fail")]
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = {"layers": 0, "ratio": 1.0, "lower": 0.999, "upper": 1.001, "baseline": 1.0, "candidate": 1.0}
    (tmp_path / "models-onnxruntime.json").write_text(json.dumps({"same": found}))
    accuracy = {"trials": 10, "images": 10_000, "strong": 0.9, "weak": 0.8, "drop": 10, "equal": 0}
    (tmp_path / "accuracy.json").write_text(json.dumps(accuracy))
    return tmp_path


def test_the_page_has_exact_rates_held_to_the_goals(results):
    load("summary").write_readme(results, results / "README.md")
    page = (results / "README.md").read_text()
    assert (
        "| **fofa-deploy check** | 0 of 100: 0.0 % (0.0-3.6) | 9 of 10: 90.0 % (55.5-99.7) | 1 of 1: 100.0 % (2.5-100.0) |" in page
    )
    assert "| upper 95 % bound of false alarms, one-sided | < 3 % | 3.0 % | yes |" in page
    assert "| 7 % threshold | 0 of 100" in page
    assert "| +3% found | >= 85 % | 9 of 10: 90.0 % (55.5-99.7) | yes |" in page
    assert "| one point found | >= 99 % | 10 of 10" in page


def test_what_is_recorded_is_not_done_again(results, monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    schedule = load("run").schedule
    left = list(schedule(results, "idle", ("onnxruntime",), {"same": 101, "+3%": 12, "+10%": 1}))
    assert left == [("+3%", "onnxruntime")] * 2 + [("same", "onnxruntime")]
    assert len(list(schedule(results, "loaded", ("onnxruntime",), {"same": 3}))) == 3


def test_real_answers_differ_by_more_than_the_point_that_is_taken_from_them():
    strong, weak = load("run").digit_answers()
    assert len(strong) == len(weak) == 1797
    assert strong.mean() - weak.mean() > 0.02
    assert load("run").accuracy_verdict(strong, strong) == "pass"
    assert load("run").accuracy_verdict(strong, weak) == "fail"
