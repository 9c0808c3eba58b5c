"""Graphs that take uint8 pixels: the same function, with as little in front as is exact, from the plan to the example beside it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import torch
from sklearn.datasets import load_sample_image
from torch import Tensor, nn

from fofa_deploy.backend import get_backend
from fofa_deploy.capture import capture
from fofa_deploy.config import DataPlan
from fofa_deploy.data import Split
from fofa_deploy.data.sources import ArraySource
from fofa_deploy.profile import find_profile
from fofa_deploy.types import Artifact, Graph, Preprocessing
from fofa_deploy.verify import GraphCheck, check_graph

SIDE, CLASSES = 32, ("a", "b", "c")
PREPROCESSING = Preprocessing(image_size=(SIDE, SIDE), channels=3, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
TOLERANCE = 1e-5
"""Largest error of a logit, relative to the largest logit: float32 rounds at 6e-8, and some hundred products are added up."""


def photographs(count: int = 32) -> np.ndarray:
    """uint8 (B,32,32,3): crops of a real photograph."""
    whole, rng = load_sample_image("flower.jpg"), np.random.default_rng(0)
    tops, lefts = rng.integers(0, whole.shape[0] - SIDE, count), rng.integers(0, whole.shape[1] - SIDE, count)
    return np.stack([whole[top : top + SIDE, left : left + SIDE] for top, left in zip(tops, lefts, strict=True)])


class Twice(nn.Module):
    """Two layers read the image: neither weights nor bias of one of them can take what both need."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 3, 4, 4), nn.Conv2d(3, 3, 8, 4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return (self.left(images) + self.right(images)).mean((2, 3))


class Sized(nn.Module):
    """Beside the convolution, the batch size is asked of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.token, self.head = nn.Conv2d(3, 8, 8, 8), nn.Parameter(torch.randn(1, 1, 8)), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        return self.head(torch.cat([self.token.expand(images.shape[0], -1, -1), tokens], 1).relu().mean(1))


def headed(first: nn.Module) -> nn.Module:
    return nn.Sequential(first, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.LazyLinear(3))


MODELS = {
    "padded convolution": (lambda: headed(nn.Conv2d(3, 8, 3, 2, 1)), ["Sub"]),
    "padded convolution without bias": (lambda: headed(nn.Conv2d(3, 8, 3, 2, 1, bias=False)), ["Sub"]),
    "patches": (lambda: headed(nn.Conv2d(3, 8, 4, 4)), []),
    "patches without bias": (lambda: headed(nn.Conv2d(3, 8, 4, 4, bias=False)), []),
    "a group for each channel": (lambda: headed(nn.Conv2d(3, 6, 3, groups=3)), []),
    "padded groups": (lambda: headed(nn.Conv2d(3, 6, 3, padding=1, groups=3)), ["Sub"]),
    "shape asked for": (Sized, []),
    "two readers": (Twice, ["Sub", "Div"]),
    "matrix product": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 3)), ["Sub", "Div"]),
}


def captured(model: nn.Module, folder, preprocessing: Preprocessing = PREPROCESSING) -> Graph:
    folder.mkdir(exist_ok=True)
    source = ArraySource(photographs(), np.zeros(32, np.int64), CLASSES, DataPlan(name="images", image_size=SIDE), "crops")
    capture(model.eval(), "tiny", preprocessing, CLASSES, Split(source, np.arange(32)), folder, "uint8-nhwc")
    return Graph.load(folder)


def logits(graph: Graph, images: np.ndarray, folder, profile_name: str) -> np.ndarray:
    """Of uint8 (B,H,W,C), fed as they are."""
    profile = find_profile(profile_name)
    backend = get_backend(profile.runtime)
    recipe = next(recipe for recipe in backend.recipes(profile, graph) if recipe.name == "fp32")
    folder.mkdir()
    artifact = backend.build(graph, recipe, None, folder)
    with backend.load(Artifact.load(artifact.folder), profile) as session:
        return session.run({"pixels": images})["logits"]


@pytest.mark.parametrize("name", MODELS)
def test_pixels_give_what_normalized_images_gave(name, tmp_path):
    torch.manual_seed(0)
    make, left = MODELS[name]
    model, images = make(), photographs()
    normalized = torch.from_numpy(PREPROCESSING.apply(images.transpose(0, 3, 1, 2)))
    with torch.no_grad():
        expected = model(normalized).numpy()
    graph = captured(model, tmp_path)
    operators = [node.op_type for node in onnx.load(graph.path).graph.node]
    assert operators[: 2 + len(left)] == ["Cast", "Transpose", *left]
    assert not {"Sub", "Div"} & set(operators[2 + len(left) :])
    for profile_name in ("reference", "cpu-onnxruntime", "cpu-openvino"):
        found = logits(graph, images, tmp_path / profile_name, profile_name)
        assert np.abs(found - expected).max() <= TOLERANCE * np.abs(expected).max(), profile_name
    assert check_graph(GraphCheck(folder=tmp_path, profile=find_profile("cpu-onnxruntime"))).relative_error < TOLERANCE
