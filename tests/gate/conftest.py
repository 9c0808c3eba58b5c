"""A real run to compare with, and copies of it that are worse in one way each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from fofa_deploy.backend import get_backend
from fofa_deploy.config import load_plan
from fofa_deploy.pipeline import compress_and_export
from fofa_deploy.progress import Quiet
from fofa_deploy.types import Artifact, Graph

PLAN = """
name = "gated"
targets = ["./one-thread.toml"]
threads = 1

[data]
name = "digits"
image_size = 16
channels = 1

[student]
model = "timm:vit_tiny_patch16_224"
arguments = { patch_size = 4, embed_dim = 32, depth = 2, num_heads = 2 }

[distill]
method = "none"
epochs = 6
batch_size = 32
lr = 3e-3
warmup_epochs = 0.5

[measure]
seconds = 0.1
max_seconds = 0.3

# So wide that no busy machine makes an alarm, nor a second look: what is worse here is worse by a factor.
[gate]
launches = 5
margin = 0.3
max_slowdown = 1.0
tail_margin = 9.0
"""
PROFILE = """
name = "one-thread"
description = "this machine, one thread"
runtime = "onnxruntime"
precisions = ["fp32"]

[execution]
threads = 1
"""


@pytest.fixture(scope="package")
def baseline_run(tmp_path_factory) -> Path:
    """A run directory: digits, a small transformer, one target, floats."""
    root = tmp_path_factory.mktemp("gate")
    (root / "plan.toml").write_text(PLAN)
    (root / "one-thread.toml").write_text(PROFILE)
    report = compress_and_export(load_plan(str(root / "plan.toml")), root / "run", Quiet())
    row = next(row for row in report.targets if row.chosen)
    assert row.top1 > 0.6, "a student that learned too little has nothing to lose"
    return root / "run"


@pytest.fixture
def copy(baseline_run, tmp_path) -> Path:
    return Path(shutil.copytree(baseline_run, tmp_path / "candidate"))


@contextmanager
def edited(run: Path) -> Iterator[tuple[dict, dict]]:
    """The run's report and its row of the chosen recipe, whichever that is on this machine, to be changed in place."""
    path = run / "report.json"
    report = json.loads(path.read_text())
    yield report, chosen_row(report)
    path.write_text(json.dumps(report))


def chosen_row(report: dict) -> dict:
    (row,) = (row for row in report["targets"] if row["chosen"])
    return row


def chosen(run: Path) -> Path:
    """The folder of the run's chosen artifact."""
    return run / chosen_row(json.loads((run / "report.json").read_text()))["artifact"]


def slow_down(run: Path) -> None:
    """Build the artifact again from the same graph with needless work in front: convolutions that leave images as they are."""
    scratch = run / "slower"
    shutil.copytree(run / "graph", scratch)
    model = onnx.load(run / "graph" / "model.onnx")
    name, last = model.graph.input[0].name, model.graph.input[0].name
    nodes = []
    for number, (into, out) in enumerate([(1, 32), *[(32, 32)] * 6, (32, 1)]):
        weights = np.zeros((out, into, 3, 3), np.float32)
        weights[0, 0, 1, 1] = 1.0
        model.graph.initializer.append(numpy_helper.from_array(weights, f"idle{number}"))
        nodes.append(helper.make_node("Conv", [last, f"idle{number}"], [f"idled{number}"], pads=[1, 1, 1, 1]))
        last = f"idled{number}"
    for node in model.graph.node:
        node.input[:] = [last if source == name else source for source in node.input]
    for node in reversed(nodes):
        model.graph.node.insert(0, node)
    onnx.save(model, scratch / "model.onnx")
    before = Artifact.load(chosen(run))
    shutil.rmtree(before.folder)
    before.folder.mkdir()
    built = get_backend("onnxruntime").build(Graph.load(scratch), before.recipe, None, before.folder)
    record(run, built.sha256)


def spoil_preprocessing(run: Path) -> None:
    """Normalize by other figures than the student was trained with."""
    path = chosen(run) / "artifact.json"
    fields = json.loads(path.read_text())
    fields["sidecar"]["preprocessing"] |= {"mean": [-1.5], "std": [3.0]}
    path.write_text(json.dumps(fields))


def lose_target(run: Path) -> None:
    """As if the only recipe had failed."""
    with edited(run) as (_, row):
        row |= {"chosen": False, "status": "failed", "reason": "it broke"}


def record(run: Path, sha256: str) -> None:
    """What the run itself would have reported of another artifact."""
    with edited(run) as (_, row):
        row["sha256"] = sha256
