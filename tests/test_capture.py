"""Capturing: what the first exporter cannot write, or writes wrong, goes to the second; what branches on data, to none."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

from fofa_deploy.capture import EXPORTERS, capture
from fofa_deploy.config import DataPlan
from fofa_deploy.data import Split
from fofa_deploy.data.sources import ArraySource
from fofa_deploy.distill.job import read_notices
from fofa_deploy.errors import GraphError
from fofa_deploy.inference import predict
from fofa_deploy.profile import find_profile
from fofa_deploy.types import Preprocessing
from fofa_deploy.verify import CHECKED_BATCHES, GraphCheck, check_graph

SIDE = 8
PREPROCESSING = Preprocessing(image_size=(SIDE, SIDE), channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)


class Windows(nn.Module):
    """Attention inside windows of 4 x 4 pixels, over tensors of five dimensions: torch.export takes it, its ONNX side not."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.qkv, self.head = nn.Conv2d(3, 16, 1), nn.Linear(16, 48), nn.Linear(16, 3)
        self.bias = nn.Parameter(torch.randn(1, 1, 2, 16, 16))

    def forward(self, images: Tensor) -> Tensor:
        pixels = self.stem(images).permute(0, 2, 3, 1)
        batch, height, width, channels = pixels.shape
        tokens = (
            pixels.view(batch, height // 4, 4, width // 4, 4, channels).permute(0, 1, 3, 2, 4, 5).reshape(batch, -1, 16, channels)
        )
        query, key, value = self.qkv(tokens).reshape(batch, -1, 16, 3, 2, 8).permute(3, 0, 1, 4, 2, 5).unbind(0)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=self.bias)
        return self.head(mixed.transpose(2, 3).flatten(3).mean((1, 2)))


class Moody(nn.Module):
    """Its answer depends on a branch on the data, of which a trace would keep one side."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIDE * SIDE, 3)

    def forward(self, images: Tensor) -> Tensor:
        logits = self.head(images.flatten(1))
        return logits if images.mean() > 0 else -logits


class Clamped(nn.Module):
    """One tensor between two pairs of bounds, each of tensors: the exporter gives both pairs the same names."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * SIDE * SIDE, 3)
        for name, value in {"low": -1.0, "high": 1.0, "lower": -0.5, "higher": 0.25}.items():
            self.register_buffer(name, torch.tensor(value))

    def forward(self, images: Tensor) -> Tensor:
        pixels = 2 * images.flatten(1)
        return self.head(pixels.clamp(self.low, self.high) - pixels.clamp(self.lower, self.higher))


class Restless(nn.Module):
    """Every layer turns rounding into a hundred times as much."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, 32) for width in (3 * SIDE * SIDE, *[32] * 5))
        self.head = nn.Linear(32, 3)

    def forward(self, images: Tensor) -> Tensor:
        features = images.flatten(1)
        for layer in self.layers:
            features = torch.sin(200 * layer(features))
        return self.head(features)


def _capture(model: nn.Module, folder: Path) -> None:
    capture(model.eval(), "tiny", PREPROCESSING, ("a", "b", "c"), _images(16), folder)


def _images(count: int) -> Split:
    pixels = np.random.default_rng(0).integers(0, 256, (count, SIDE, SIDE, 3), np.uint8)
    source = ArraySource(pixels, np.zeros(count, np.int64), ("a", "b", "c"), DataPlan(name="images", image_size=SIDE), "noise")
    return Split(source, np.arange(count))


def _exporter(folder: Path) -> str:
    return {prop.key: prop.value for prop in onnx.load(folder / "model.onnx").metadata_props}["fofa_deploy.exporter"]


def test_what_torch_export_cannot_write_is_traced_with_a_notice(tmp_path):
    torch.manual_seed(0)
    _capture(Windows(), tmp_path)
    assert _exporter(tmp_path) == "TorchScript"
    (notice,) = read_notices(tmp_path)
    assert notice.startswith("tiny was exported by TorchScript; torch.export: <class 'AssertionError'>: only 4D")
    assert json.loads((tmp_path / "notices.json").read_text()) == [notice]
    found = check_graph(GraphCheck(folder=tmp_path, profile=find_profile("cpu-onnxruntime")))
    assert found.samples == sum(CHECKED_BATCHES)
    assert found.relative_error < 1e-5


def test_a_forward_that_branches_on_its_data_is_refused_by_both(tmp_path):
    with pytest.raises(GraphError, match=r"tiny cannot be exported.*torch.export: .*TorchScript: ") as refused:
        _capture(Moody(), tmp_path)
    assert "data-dependent" in refused.value.message
    assert not (tmp_path / "model.onnx").exists()


def test_an_ordinary_model_is_exported_by_torch_export_without_a_notice(tmp_path):
    torch.manual_seed(0)
    _capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)), tmp_path)
    assert _exporter(tmp_path) == "torch.export"
    assert read_notices(tmp_path) == ()
    check_graph(GraphCheck(folder=tmp_path, profile=find_profile("cpu-onnxruntime")))


def test_bounds_of_one_tensor_keep_their_values(tmp_path):
    torch.manual_seed(0)
    _capture(Clamped(), tmp_path)
    assert _exporter(tmp_path) == "torch.export"
    found = check_graph(GraphCheck(folder=tmp_path, profile=find_profile("cpu-onnxruntime")))
    assert found.relative_error < 1e-5


def test_an_invalid_graph_is_a_refusal(tmp_path, monkeypatch):
    export = EXPORTERS["torch.export"]

    def without_weights(model: nn.Module, example: Tensor) -> onnx.ModelProto:
        proto = export(model, example)
        del proto.graph.initializer[:]
        return proto

    monkeypatch.setitem(EXPORTERS, "torch.export", without_weights)
    _capture(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 3)), tmp_path)
    assert _exporter(tmp_path) == "TorchScript"
    (notice,) = read_notices(tmp_path)
    assert "torch.export: Nodes in a graph must be topologically sorted" in notice


def test_a_model_that_lives_on_rounding_is_told_from_a_wrong_graph(tmp_path):
    torch.manual_seed(0)
    check = GraphCheck(folder=tmp_path, profile=find_profile("cpu-onnxruntime"))
    _capture(Restless(), tmp_path)
    with pytest.raises(GraphError, match=r"relative error .*but so do its own answers, by [\d.]+, where its inputs change"):
        check_graph(check)
    _capture(nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 3)), tmp_path)
    with np.load(tmp_path / "golden.npz") as golden:
        np.savez(tmp_path / "golden.npz", images=golden["images"], logits=2 * golden["logits"])
    with pytest.raises(GraphError, match=r"relative error 0\.5") as refused:
        check_graph(check)
    assert "its own answers" not in refused.value.message
    assert "mistranslated" in refused.value.action


@pytest.mark.parametrize(("values", "expected"), [(40 * 3 * SIDE * SIDE, [40, 30]), (1, [32, 32, 6]), (2**40, [70])])
def test_answers_are_computed_in_batches_that_fit(values, expected, monkeypatch):
    monkeypatch.setattr("fofa_deploy.inference.CPU_VALUES", values)
    sizes = []
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 3))
    model.register_forward_hook(lambda module, inputs, outputs: sizes.append(len(outputs)))
    split = _images(70)
    logits = predict(model, split, PREPROCESSING)
    assert sizes == expected
    inputs = torch.from_numpy(PREPROCESSING.apply(split.source.images(split.indices)))
    assert np.allclose(logits, model(inputs).detach().numpy(), atol=1e-5)
