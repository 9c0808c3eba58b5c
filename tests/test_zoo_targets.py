"""The benchmark of all families on all targets: its weights tell images apart, its judgements can fail, its record resumes."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import timm
import torch

FOLDER = Path(__file__).parent.parent / "benchmarks"
sys.path[:0] = [str(FOLDER / name) for name in ("zoo", "zoo-distill", "suites")]
import efficientnet_lite0  # noqa: E402 - from the benchmarks' folders
import lively  # noqa: E402
import specimens  # noqa: E402
from trial import Rules  # noqa: E402


@pytest.fixture(scope="module")
def run():
    specification = importlib.util.spec_from_file_location("zoo_targets_run", FOLDER / "zoo" / "run.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


# --- weights


def _images(count: int) -> torch.Tensor:
    """Smooth and different: float32 (count,3,64,64)."""
    coarse = torch.randn(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return torch.nn.functional.interpolate(coarse, size=(64, 64), mode="bicubic")


def _model(name: str, **arguments: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, num_classes=5, **arguments).eval()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("gmlp_ti16_224", {"img_size": 64}),
        ("sequencer2d_s", {"layers": (1, 1, 1, 1), "img_size": 64}),
        ("resnet10t", {}),
        ("vit_tiny_patch16_224", {"img_size": 64, "depth": 2}),
        ("tiny_vit_5m_224", {}),  # at 64 px nine of ten tokens of its windows are padding
    ],
)
@torch.no_grad()
def test_lively_weights_tell_images_apart(name, arguments):
    model = _model(name, **arguments)
    images = _images(16)
    fresh = model(images)
    spread = lively.enliven(model, images)
    logits = model(images)
    assert logits.std(0).mean() > 100 * fresh.std(0).mean() or fresh.std(0).mean() > 1e-3
    assert spread == pytest.approx(1, abs=0.2)
    rounding = float((model.double()(images.double()) - logits).norm() / logits.norm())
    assert spread > 1000 * rounding
    assert sum(parameter.std() == 0 for parameter in model.parameters() if parameter.numel() > 1) == 0


@torch.no_grad()
def test_lively_weights_are_seeded_and_normalization_knows_the_images():
    models = [_model("resnet10t"), _model("resnet10t")]
    torch.manual_seed(1)  # drawn from a generator of their own
    for model in models:
        lively.enliven(model, _images(16))
    for left, right in zip(*(model.state_dict().values() for model in models), strict=True):
        assert torch.equal(left, right)
    inside = []
    models[0].layer1[0].conv1.register_forward_hook(lambda module, inputs, outputs: inside.append(outputs))
    models[0](_images(16))
    mean, norm = inside[0].mean((0, 2, 3)), models[0].layer1[0].bn1
    assert torch.allclose(mean, norm.running_mean, atol=1e-2)  # variances are unbiased there
    assert not any(module.training for module in models[0].modules())


def test_a_network_that_ignores_its_images_is_refused():
    class Deaf(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.answer = torch.nn.Parameter(torch.zeros(5))

        def forward(self, images):
            return self.answer.expand(len(images), 5)

    with pytest.raises(lively.ModelError, match="spread"):
        lively.enliven(Deaf(), _images(4))


# --- trials


@pytest.fixture(scope="module")
def zoo():
    return specimens.Specimens(Rules(ignored_prefix="test_"))


@pytest.fixture(scope="module")
def graph(zoo, tmp_path_factory):
    """Folder of a captured lcnet_035, and what its capture told."""
    folder = tmp_path_factory.mktemp("zoo")
    with pytest.MonkeyPatch.context() as fewer:
        fewer.setattr(efficientnet_lite0, "CROPS", 12)
        efficientnet_lite0.write_photographs(folder / "photographs")
    candidate = zoo.candidate("lcnet_035", {}).model_dump()
    return folder / "lcnet_035", zoo.capture(candidate, str(folder / "photographs"), str(folder / "lcnet_035"))


def _attempts(zoo, folder, target, precision):
    offered = zoo.offer(str(folder), target)
    told = {"folder": str(folder), "target": target, "can_run": offered.probe.can_run, "reason": offered.probe.reason}
    return [zoo.attempt(recipe=r.model_dump(), **told) for r in offered.recipes if r.precision == precision]


@pytest.mark.parametrize(
    ("target", "precision"), [("cpu-onnxruntime", "fp32"), ("cpu-openvino", "fp32"), ("cpu-onnxruntime", "int8")]
)
def test_a_family_passes(zoo, graph, target, precision):
    folder, captured = graph
    assert captured.spread > lively.LEAST_SPREAD
    assert captured.relative_error < 1e-4
    for row in _attempts(zoo, folder, target, precision):
        assert row.status in ("verified", "rejected") if precision == "int8" else row.status == "verified", row.reason
        assert row.precision[precision] > 0.5 * sum(row.precision.values())
        assert row.validation.samples == 15  # a quarter of the photographs


def test_an_artifact_that_says_something_else_is_rejected(zoo, graph):
    golden = graph[0] / "golden.npz"
    kept = golden.read_bytes()
    arrays = dict(np.load(golden))
    np.savez(golden, images=arrays["images"], logits=arrays["logits"] * 1.01)
    try:
        (row,) = _attempts(zoo, graph[0], "cpu-onnxruntime", "fp32")
    finally:
        golden.write_bytes(kept)
    assert row.status == "rejected"
    assert "relative error" in row.reason


def test_what_cannot_be_built_is_a_row_with_its_reason(zoo, graph, tmp_path):
    for name in ("sidecar.json", "model.onnx"):
        (tmp_path / name).write_bytes((graph[0] / name).read_bytes())
    recipe = next(r for r in zoo.offer(str(tmp_path), "cpu-onnxruntime").recipes if r.needs_calibration)
    np.save(tmp_path / "images.npy", np.zeros((8, 3, 64, 64), np.uint8))
    (tmp_path / "calibration").mkdir()
    (tmp_path / "images.npy").rename(tmp_path / "calibration" / "images.npy")
    row = zoo.attempt(str(tmp_path), "cpu-onnxruntime", recipe.model_dump(), can_run=True, reason="")
    assert row.status == "failed"
    assert "of one colour" in row.reason


def test_a_capture_that_was_killed_is_done_anew(zoo, graph, tmp_path):
    photographs, left = graph[0].parent / "photographs", tmp_path / "lcnet_035"
    shutil.copytree(graph[0], left)
    (left / "validation.npy").unlink()
    captured = zoo.capture(zoo.candidate("lcnet_035", {}).model_dump(), str(photographs), str(left))
    assert captured == graph[1]
    assert (left / "validation.npy").is_file()


# --- record


def test_a_run_that_was_killed_goes_on_where_it_was(run, graph):
    folder, captured = graph
    entry = {"smallest": {"name": folder.name}, "capture": captured.model_dump()}
    with run.Keeper("specimens:Specimens", run.FOLDERS, 120.0, 4 * 2**30) as keeper:

        def steps(entry: dict) -> Iterator[str]:
            return (step.partition(":")[0] for step in run._Trial(keeper, entry, folder.parent, {"fp32"}, 120.0).steps())

        assert next(steps(entry)) == "cpu-onnxruntime fp32"
        recorded = json.loads(json.dumps(entry))
        assert list(steps(recorded)) == ["cpu-openvino fp32", "rtx-desktop fp32", "done"]
        assert list(steps(recorded)) == []
        recorded["rows"]["cpu-openvino fp32"]["status"] = "failed"
        assert list(steps(recorded)) == ["cpu-openvino fp32", "done"]
    assert {row["status"] for row in recorded["rows"].values()} <= {"verified", "built-not-run"}


def test_the_page_is_the_record(run):
    assert run.page(json.loads(run.RESULTS.read_text())) == (FOLDER / "zoo" / "README.md").read_text()
