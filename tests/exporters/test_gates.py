"""Networks whose activations gate themselves (SiLU, hard swish), and whose channels are gated: int8 without floats in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

from exporters.conftest import Captured, _capture, profile_for, recipe_named, run_in_batches
from fofa_deploy.backend import get_backend
from fofa_deploy.types import Artifact, Precision


class _Normalized(nn.Module):
    """Its channels are gated by the means of maps whose mean is nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, stride=4, padding=1), nn.InstanceNorm2d(16))
        self.gate = nn.Sequential(nn.Conv2d(16, 16, 1), nn.Sigmoid())
        self.head = nn.Linear(16, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.stem(images)
        gated = (maps * self.gate(maps.mean((2, 3), keepdim=True))).relu()
        return self.head(gated.mean((2, 3)))


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "hard": lambda: timm.create_model("mobilenetv3_small_050", num_classes=10),
    "silu": lambda: timm.create_model("test_efficientnet", num_classes=10),
    "flat": lambda: timm.create_model("test_resnet", num_classes=10, global_pool="fast"),  # pooled without keeping axes
    "normalized": _Normalized,
}
GATED = ["hard", "silu"]


@pytest.fixture(scope="module")
def networks(tmp_path_factory) -> dict[str, Captured]:
    root = tmp_path_factory.mktemp("gated")
    for name in NETWORKS:
        (root / name).mkdir()
    return {name: _capture(make, root / name) for name, make in NETWORKS.items()}


def _built(backend_name: str, found: Captured, recipe_name: str, out: Path) -> Artifact:
    backend, profile = get_backend(backend_name), profile_for(backend_name)
    artifact = backend.build(found.graph, recipe_named(backend, profile, found.graph, recipe_name), found.calibration, out)
    with backend.load(artifact, profile) as session:
        logits = run_in_batches(session, found.inputs, 8)
    error = np.abs(logits - found.logits).mean() / np.abs(found.logits).mean()
    assert error < 0.35, f"{recipe_name}: {error}"
    return artifact


def _first(backend_name: str, found: Captured, start: str) -> str:
    recipes = get_backend(backend_name).recipes(profile_for(backend_name), found.graph)
    return next(recipe.name for recipe in recipes if recipe.name.startswith(start))


@pytest.mark.parametrize("name", NETWORKS)
def test_onnxruntime_pools_and_gates_in_int8(networks, name, tmp_path):
    found = networks[name]
    artifact = _built("onnxruntime", found, _first("onnxruntime", found, "int8-"), tmp_path)
    kernels = {layer.operator for layer in artifact.layers}
    assert "QLinearGlobalAveragePool" in kernels
    assert not kernels & {"HardSigmoid", "ReduceMean", "Sigmoid"}


@pytest.mark.parametrize("name", GATED)
def test_openvino_does_an_activation_with_its_convolution(networks, name, tmp_path):
    """In the placement that leaves the outputs of convolutions in float; in the other most of them are layers by themselves."""
    found = networks[name]
    artifact = _built("openvino", found, _first("openvino", found, "int8-qdq"), tmp_path)
    assert "-weighted-only" in artifact.recipe.name
    assert {layer.precision for layer in artifact.layers if layer.weighted} == {Precision.INT8}
    (tmp_path / "other").mkdir()
    other = _built("openvino", found, artifact.recipe.name.replace("-weighted-only", ""), tmp_path / "other")
    activations = sum(isinstance(module, nn.Hardswish | nn.SiLU) for module in NETWORKS[name]().modules())
    assert len(artifact.layers) < len(other.layers) - activations // 2


def test_placements_are_offered_where_they_differ(networks, captured):
    assert _placements(networks["hard"]) == _placements(networks["silu"]) == {True, False}
    assert _placements(captured["cnn"]) == {False}
    assert _placements(captured["vit"]) == {True}


def test_layers_go_back_to_float_in_the_first_placement_alone(networks):
    """Where both lose too much accuracy, one ladder of mixed precision is enough."""
    assert _placements(networks["silu"], mixed=True) == {True}


def _placements(found: Captured, *, mixed: bool = False) -> set[bool]:
    """Which of them OpenVINO's own pairs have: whether they are around weighted layers alone."""
    recipes = get_backend("openvino").recipes(profile_for("openvino"), found.graph)
    pairs = [recipe.options for recipe in recipes if recipe.options.get("method") == "qdq"]
    return {bool(options.get("weighted_only")) for options in pairs if not mixed or options.get("float_share")}
