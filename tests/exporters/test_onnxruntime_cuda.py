"""ONNX Runtime on CUDA: half precision that is proved to be that, on the GPU and nowhere else; the rest of it needs no GPU."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_sample_images

from fofa_deploy.backend import get_backend
from fofa_deploy.errors import BackendError
from fofa_deploy.judge import FLOAT_TOLERANCE, precision_problem
from fofa_deploy.types import Device, Precision, Recipe
from fofa_exporters import _kernels, _onnx, onnxruntime
from fofa_exporters import _onnxruntime_recipes as recipes

from .conftest import PREPROCESSING, SIZE, Built, Captured, profile_for, run_in_batches

CUDA = "cuda-onnxruntime"
HALF = (recipes.FP16, recipes.BF16)


def _photographs(count: int = 24) -> np.ndarray:
    """Normalized crops (B,3,32,32) of scikit-learn's two photographs, at an eighth of their size."""
    photos = [photo[::8, ::8].transpose(2, 0, 1) for photo in load_sample_images().images]
    places = np.random.default_rng(0).integers(0, [len(photos), 53 - SIZE, 80 - SIZE], (count, 3))
    return PREPROCESSING.apply(np.stack([photos[which][:, y : y + SIZE, x : x + SIZE] for which, y, x in places]))


def _written(captured: Captured, recipe: Recipe, folder: Path) -> Path:
    path = folder / f"{recipe.name}.onnx"
    onnxruntime._write_typed(captured.graph, _onnx.read(captured.graph), recipe, None, path)
    return path


def _float_logits(captured: Captured, images: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(captured.graph.path, providers=["CPUExecutionProvider"]).run(None, {"images": images})[0]


def test_half_precision_is_offered_for_cuda_alone(captured: dict[str, Captured]):
    """Whatever a profile allows: CPU kernels are float, and would only be wrapped in casts."""
    backend = get_backend("onnxruntime")
    offered = backend.recipes(profile_for(CUDA), captured["vit"].graph)
    assert [recipe.name for recipe in offered] == ["fp16", "bf16", "fp32"]
    assert {(recipe.options["provider"], recipe.options["device"]) for recipe in offered} == {("CUDAExecutionProvider", "cuda:0")}
    second = profile_for(CUDA).model_copy(update={"device": Device(kind="gpu", name="cuda:1")})
    assert {recipe.options["device"] for recipe in backend.recipes(second, captured["cnn"].graph)} == {"cuda:1"}
    allowed = profile_for("onnxruntime")
    assert set(allowed.precisions) > {Precision.FP16, Precision.BF16}
    found = {recipe.precision for recipe in backend.recipes(allowed, captured["cnn"].graph)}
    assert found == {Precision.FP32, Precision.INT8}


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_the_fp16_graph_agrees_with_the_float_one_on_photographs(kind: str, captured: dict[str, Captured], tmp_path: Path):
    """On the CPU, which computes it in float between roundings to half precision."""
    images = _photographs()
    session = ort.InferenceSession(_written(captured[kind], recipes.FP16, tmp_path), providers=["CPUExecutionProvider"])
    found, expected = session.run(None, {"images": images})[0], _float_logits(captured[kind], images)
    assert found.dtype == np.float32
    assert np.linalg.norm(found - expected) < 2e-3 * np.linalg.norm(expected)
    np.testing.assert_array_equal(found.argmax(1), expected.argmax(1))


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_the_bf16_graph_agrees_with_the_float_one_on_photographs(kind: str, captured: dict[str, Captured], tmp_path: Path):
    """By onnx's own evaluator: ONNX Runtime has no CPU kernels for it."""
    images = _photographs(8)
    evaluator = ReferenceEvaluator(onnx.load(_written(captured[kind], recipes.BF16, tmp_path)))
    found, expected = evaluator.run(None, {"images": images})[0], _float_logits(captured[kind], images)
    assert found.dtype == np.float32
    assert np.linalg.norm(found - expected) < 2e-2 * np.linalg.norm(expected)


def test_what_cuda_has_no_bf16_kernels_for_stays_float(captured: dict[str, Captured], tmp_path: Path):
    model = onnx.load(_written(captured["cnn"], recipes.BF16, tmp_path))
    assert next(opset.version for opset in model.opset_import if not opset.domain) == 22, "earlier convolutions cannot be in bf16"
    onnx.checker.check_model(model, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    types = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    found = {
        node.op_type: types[node.output[0]] for node in model.graph.node if node.op_type in ("Conv", "Relu", "MaxPool", "Gemm")
    }
    bf16, fp32 = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT
    assert found == {"Conv": bf16, "Relu": bf16, "MaxPool": fp32, "Gemm": bf16}


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_half_precision_that_runs_in_float_is_refused(kind: str, captured: dict[str, Captured], tmp_path: Path):
    """The CPU provider wraps every product in casts: the file is fp16, the kernels are not."""
    options = {**recipes.FP16.options, "provider": "CPUExecutionProvider"}
    recipe = recipes.FP16.model_copy(update={"options": options})
    artifact = get_backend("onnxruntime").build(captured[kind].graph, recipe, None, tmp_path)
    weighted = {layer.precision for layer in artifact.layers if layer.weighted}
    assert weighted == {Precision.FP32}
    assert precision_problem(artifact).startswith("asked for fp16, but the layers with weights run in ")


def test_what_the_profile_says_is_what_counts(captured: dict[str, Captured], tmp_path: Path):
    """Events as onnxruntime-gpu 1.31 writes them."""
    model = onnx.load(_written(captured["vit"], recipes.FP16, tmp_path))
    weighted = _onnx.weighted(model)
    silent = _kernels.layers(model, [], "CUDAExecutionProvider")
    assert {row.precision for row in silent if row.weighted} == {Precision.FP32}, "nothing said, nothing proved"
    rows = _kernels.layers(model, [_event(node, "CUDAExecutionProvider") for node in weighted], "CUDAExecutionProvider")
    assert [row.precision for row in rows if row.weighted] == [Precision.FP16] * len(weighted)
    astray = [_event(weighted[0], "CPUExecutionProvider"), *(_event(node, "CUDAExecutionProvider") for node in weighted[1:])]
    with pytest.raises(BackendError, match="1 on CPUExecutionProvider instead of CUDAExecutionProvider"):
        _kernels.layers(model, astray, "CUDAExecutionProvider")


def _event(node: onnx.NodeProto, provider: str) -> dict[str, object]:
    args = {"op_name": node.op_type, "provider": provider, "output_type_shape": [{"float16": [1, 17, 64]}]}
    return {"cat": "Node", "name": f"{node.name}_kernel_time", "dur": 9, "args": args}


def test_the_cpus_own_profile_proves_nothing_about_cuda(captured: dict[str, Captured], tmp_path: Path):
    """A whole run, really profiled, on another provider than the one that is asked about."""
    options = ort.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = ort.InferenceSession(captured["vit"].graph.path, options, providers=["CPUExecutionProvider"])
    session.run(None, {"images": captured["vit"].inputs[:1]})
    events = _kernels.events(Path(session.end_profiling()))
    model = onnx.load(captured["vit"].graph.path)
    with pytest.raises(BackendError, match="on CPUExecutionProvider instead of CUDAExecutionProvider"):
        _kernels.layers(model, events, "CUDAExecutionProvider")


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        (onnx.TensorProto.FLOAT, ["batch", 3], (1, 3)),
        (onnx.TensorProto.FLOAT16, [4, 3], (4, 3)),
        (onnx.TensorProto.UINT8, ["batch", 8, 8, 3], (1, 8, 8, 3)),
        (onnx.TensorProto.FLOAT, [], ()),
        (onnx.TensorProto.FLOAT, ["batch", "width"], None),
        (onnx.TensorProto.INT64, ["batch", 3], None),
    ],
)
def test_only_what_takes_images_of_known_sizes_is_run_to_find_out(kind: int, shape: list, expected: tuple | None):
    ends = [onnx.helper.make_tensor_value_info(name, kind, shape) for name in ("images", "logits")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["images"], ["logits"])], "file", ends[:1], ends[1:])
    feeds = _kernels.blank(onnx.helper.make_model(graph))
    assert (feeds and feeds["images"].shape) == expected


def test_without_cuda_the_probe_says_how_to_get_it():
    probe = get_backend("onnxruntime").probe(profile_for(CUDA))
    if probe.can_run:
        pytest.skip("there is a CUDA device")
    assert not probe.can_build
    if "CUDAExecutionProvider" in onnxruntime.ort.get_available_providers():
        assert re.search("does not start|bound CPUExecutionProvider and not CUDAExecutionProvider", probe.reason)
    else:
        assert "this onnxruntime has no 'CUDAExecutionProvider'" in probe.reason
        assert "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'" in probe.reason


def test_two_packages_in_one_folder_are_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(onnxruntime.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(onnxruntime, "version", lambda package: "1.31.1")
    assert "both installed and overwrite each other" in get_backend("onnxruntime").probe(profile_for(CUDA)).reason


@pytest.mark.parametrize("recipe", HALF, ids=lambda recipe: recipe.name)
@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_on_cuda_every_layer_with_weights_is_half_precision(kind: str, recipe: Recipe, build: Callable[[str, str, str], Built]):
    """Skips without a CUDA device, with the probe's reason."""
    built = build(CUDA, kind, recipe.name)
    assert {layer.precision for layer in built.artifact.layers if layer.weighted} == {recipe.precision}
    with built.backend.load(built.artifact, built.profile) as session:
        found = run_in_batches(session, built.captured.inputs, 8)
        assert session.device == "CUDAExecutionProvider"
    assert np.linalg.norm(found - built.captured.logits) < FLOAT_TOLERANCE[recipe.precision] * np.linalg.norm(built.captured.logits)
