"""A student that loses its accuracy in int8 gets it back by training, through the ordinary pipeline and its back ends."""

from __future__ import annotations

import json

import narrow
import numpy as np
import pytest
import torch
from narrow import TAPS
from tiny import run_cli

from fofa_deploy.config import RunPlan
from fofa_deploy.data import load_data
from fofa_deploy.distill.job import WEIGHTS, Workshop, read_summary
from fofa_deploy.models import save_weights
from fofa_deploy.pipeline import compress_and_export, opened
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.recovery import PREFIX
from fofa_deploy.schema import validate
from fofa_deploy.types import Artifact, Status

STUDENT = {"model": "narrow:Narrow", "taps": TAPS}
PLAN = {
    "name": "narrow",
    "threads": 1,
    "targets": ["cpu-onnxruntime", "cpu-openvino"],
    "data": {"name": "digits", "image_size": 16, "channels": 1, "shift": 1, "validation_fraction": 0.2},
    "accuracy": {"max_top1_drop": 0.03},
    "measure": {"seconds": 0.2, "max_seconds": 0.5},
}
OCTAVES = 8


def plan(student=STUDENT, **tables) -> RunPlan:
    return validate({**PLAN, "student": student, **tables}, RunPlan, "test")


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> RunPlan:
    """The plan of a trained network that int8 ruins: its channels share one scale per tensor, and none suits them all."""
    folder = tmp_path_factory.mktemp("float")
    alone = plan(distill={"method": "none", "epochs": 8, "batch_size": 32, "lr": 3e-3})
    workshop = Workshop(load_data(alone.data, 0), 0, 1, Quiet())
    workshop.distill(alone.student, alone.distill, folder, None)
    model = workshop.load(alone.student, folder)
    narrow.spread(model, OCTAVES)
    save_weights(model, folder / "spread.safetensors")
    return plan({**STUDENT, "checkpoint": str(folder / "spread.safetensors")}, qat={"epochs": 10, "lr": 5e-4})


@pytest.fixture(scope="module")
def finished(spread, tmp_path_factory):
    out = tmp_path_factory.mktemp("recovery") / "run"
    return out, compress_and_export(spread, out, Quiet())


@pytest.mark.parametrize("target", PLAN["targets"])
def test_training_recovers_what_quantization_lost(finished, target):
    out, report = finished
    rows = [row for row in report.targets if row.target == target]
    for row in rows: print(row.recipe, row.status, row.validation.top1, row.validation.agreement)
