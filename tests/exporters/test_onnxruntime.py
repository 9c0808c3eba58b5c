"""ONNX Runtime's traps: another provider than the one asked for, int8 in name only, and products that saturate."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from fofa_deploy.backend import get_backend
from fofa_deploy.errors import BackendError, BuildError
from fofa_deploy.types import Device, Graph, HardwareProfile, Precision, Recipe
from fofa_exporters import _device, onnxruntime
from fofa_exporters import _onnxruntime_recipes as recipes
from fofa_exporters._device import Products

from .conftest import CLASSES, SIZE, Built, Captured, profile_for, run_in_batches, write_sidecar

STATIC = "int8-u8s8-per-channel"


def _profile(**device: object) -> HardwareProfile:
    return profile_for("onnxruntime").model_copy(update={"device": Device.model_validate(device)})


def _names(profile: HardwareProfile, captured: Captured) -> list[str]:
    """The first of every family without layers in float."""
    recipes = get_backend("onnxruntime").recipes(profile, captured.graph)
    return [recipe.name for recipe in recipes if recipe.name == recipe.kin and not recipe.options.get("float_share")]


def _hybrid(folder: Path) -> Graph:
    """Three convolutions with an activation that is not fused into them, then attention without weights, and a classifier."""
    make, rng = onnx.helper, np.random.default_rng(0)
    shapes = {"w0": (16, 3, 4, 4), "w1": (16, 16, 1, 1), "w2": (16, 16, 1, 1), "head": (16, CLASSES)}
    values = {name: rng.normal(0, np.prod(shape[1:]) ** -0.5, shape) for name, shape in shapes.items()}
    maps = [("images", "w0", "a", 4), ("a/on", "w1", "b", 1), ("b/on", "w2", "c", 1)]
    nodes = [make.make_node("Conv", [x, w], [y], f"conv {y}", strides=[step, step]) for x, w, y, step in maps]
    nodes += [make.make_node("HardSwish", [y], [f"{y}/on"], f"act {y}") for _, _, y, _ in maps]
    nodes += [
        make.make_node("Reshape", ["c/on", "rows"], ["flat"]),
        make.make_node("Transpose", ["flat"], ["tokens"], perm=[0, 2, 1]),
        make.make_node("MatMul", ["flat", "tokens"], ["affinity"], "attention"),
        make.make_node("ReduceMean", ["affinity", "last"], ["pooled"], keepdims=0),
        make.make_node("MatMul", ["pooled", "head"], ["logits"], "classifier"),
    ]
    nodes = [nodes[place] for place in (0, 3, 1, 4, 2, 5, 6, 7, 8, 9, 10)]
    tensors = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()]
    tensors += [onnx.numpy_helper.from_array(np.array(value), name) for name, value in {"last": [2], "rows": [0, 16, -1]}.items()]
    images = make.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["N", 3, SIZE, SIZE])
    logits = make.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["N", CLASSES])
    model = make.make_model(make.make_graph(nodes, "g", [images], [logits], tensors), opset_imports=[make.make_opsetid("", 18)])
    onnx.save(model, folder / "model.onnx")
    write_sidecar(folder, "hybrid")
    return Graph.load(folder)


def test_a_network_of_convolutions_that_attends_runs_them_in_int8(captured: dict[str, Captured], tmp_path: Path):
    (tmp_path / "graph").mkdir()
    backend, graph, profile = get_backend("onnxruntime"), _hybrid(tmp_path / "graph"), profile_for("onnxruntime")
    recipe = next(recipe for recipe in backend.recipes(profile, graph) if recipe.precision is Precision.INT8)
    assert recipe.options["weighted_only"]
    artifact = backend.build(graph, recipe, captured["cnn"].calibration, tmp_path)
    assert Counter(layer.precision for layer in artifact.layers if layer.weighted) == {Precision.INT8: 4}


def _stacked(folder: Path) -> Graph:
    """Three matrices, one per channel, as position tables are; then two products of plain ones."""
    make, rng = onnx.helper, np.random.default_rng(0)
    shapes = {"stack": (3, SIZE, 4), "hidden": (12 * SIZE, 16), "head": (16, CLASSES)}
    tensors = [
        onnx.numpy_helper.from_array(rng.normal(0, shape[-2] ** -0.5, shape).astype(np.float32), name)
        for name, shape in shapes.items()
    ]
    tensors.append(onnx.numpy_helper.from_array(np.array([0, 12 * SIZE]), "row"))
    nodes = [
        make.make_node("MatMul", ["images", "stack"], ["looked up"], "stacked"),
        make.make_node("Reshape", ["looked up", "row"], ["rows"], "flatten"),
        make.make_node("MatMul", ["rows", "hidden"], ["tokens"], "hidden"),
        make.make_node("Relu", ["tokens"], ["on"], "act"),
        make.make_node("MatMul", ["on", "head"], ["logits"], "head"),
    ]
    ends = [
        make.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", *shape])
        for name, shape in (("images", (3, SIZE, SIZE)), ("logits", (CLASSES,)))
    ]
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 18)]), folder / "model.onnx")
    write_sidecar(folder, "stacked")
    return Graph.load(folder)


@pytest.mark.parametrize("recipe", [recipes._seven_bit(recipes.DYNAMIC[1]), recipes._weighted_only(recipes.SEVEN, False)])
def test_stacks_of_matrices_stay_in_float(recipe: Recipe, captured: dict[str, Captured], tmp_path: Path):
    (tmp_path / "graph").mkdir()
    backend, graph, found = get_backend("onnxruntime"), _stacked(tmp_path / "graph"), captured["cnn"]
    artifact = backend.build(graph, recipe, found.calibration, tmp_path)
    assert Counter(layer.precision for layer in artifact.layers if layer.weighted) == {Precision.INT8: 2, Precision.FP32: 1}
    with backend.load(artifact, profile_for("onnxruntime")) as session:
        answered = session.run({"images": found.inputs})["logits"]
    expected = ort.InferenceSession(graph.path).run(None, {"images": found.inputs})[0]
    assert np.linalg.norm(answered - expected) < 0.1 * np.linalg.norm(expected)


def test_missing_provider_is_refused(build: Callable[[str, str, str], Built]):
    built = build("onnxruntime", "cnn", "fp32")
    gpu = _profile(kind="gpu", name="cuda:0")
    if built.backend.probe(gpu).can_run:
        pytest.skip("this onnxruntime drives CUDA")
    with pytest.raises(BackendError, match="CUDAExecutionProvider"):
        built.backend.load(built.artifact, gpu)


def test_another_provider_than_asked_for_is_refused(build: Callable[[str, str, str], Built], monkeypatch: pytest.MonkeyPatch):
    built = build("onnxruntime", "cnn", "fp32")
    monkeypatch.setattr(onnxruntime.ort, "get_available_providers", lambda: ["AzureExecutionProvider", "Misspelt"])
    monkeypatch.setattr(onnxruntime.ort, "InferenceSession", lambda *_, **__: _BoundToCpu())
    with pytest.raises(BackendError, match="bound CPUExecutionProvider and not Misspelt"):
        onnxruntime.open_session(built.artifact.path, None, "Misspelt")


class _BoundToCpu:
    def get_providers(self) -> list[str]:
        return ["CPUExecutionProvider"]


def test_binds_threads_and_spinning_of_the_profile(build: Callable[[str, str, str], Built]):
    built = build("onnxruntime", "cnn", "fp32")
    session = built.backend.load(built.artifact, built.profile)
    options = session._session.get_session_options()
    assert options.intra_op_num_threads == 2
    assert options.inter_op_num_threads == 1
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_cpu_flags_decide_the_recipes(captured: dict[str, Captured]):
    vnni = _names(_profile(architecture="x86_64", features=["avx512_vnni"]), captured["cnn"])
    avx2 = _names(_profile(architecture="x86_64", features=["avx2"]), captured["cnn"])
    arm = _names(_profile(architecture="aarch64", features=["asimddp"]), captured["cnn"])
    unknown = _names(_profile(architecture="x86_64", host="me@board"), captured["cnn"])
    assert vnni == arm == [STATIC, "fp32"]
    assert avx2 == ["int8-u8s7-per-channel", f"{STATIC}-exact", "fp32"]
    assert unknown == ["int8-u8s7-per-channel", f"{STATIC}-exact", STATIC, "fp32"]


def test_reads_this_machines_flags():
    profile = _profile(architecture="any")
    assert _device.products(profile) is not Products.UNKNOWN


def test_int8_artifact_runs_int8_kernels(build: Callable[[str, str, str], Built]):
    built = next(_static(build, "cnn"))
    operators = Counter(layer.operator for layer in built.artifact.layers if layer.weighted)
    assert operators["QLinearConv"] == sum(n.op_type == "Conv" for n in onnx.load(built.captured.graph.path).graph.node)
    assert "Conv" not in operators


def test_transformer_keeps_attention_in_float(build: Callable[[str, str, str], Built]):
    built = next(_static(build, "vit"))
    attention = [layer for layer in built.artifact.layers if layer.operator == "MultiHeadAttention"]
    assert [(layer.precision, layer.weighted) for layer in attention] == [(Precision.FP32, False)] * 2
    assert not any("MatMul" in layer.operator and layer.precision == Precision.FP32 for layer in built.artifact.layers)


def _static(build: Callable[[str, str, str], Built], kind: str) -> Iterator[Built]:
    profile = profile_for("onnxruntime")
    graph = build("onnxruntime", kind, "fp32").captured.graph
    for recipe in get_backend("onnxruntime").recipes(profile, graph):
        if recipe.needs_calibration and recipe.name == recipe.kin:
            yield build("onnxruntime", kind, recipe.name)


def test_float_kernels_behind_a_dequantize_count_as_float_and_weighted(tmp_path: Path):
    """A weight stored in int8 does not make a layer int8: it is the kernel that counts."""
    tensor = onnx.numpy_helper.from_array
    weights = [
        tensor(np.ones((8, 4), np.int8), "stored"),
        tensor(np.float32(0.1), "scale"),
    ]
    nodes = [
        onnx.helper.make_node("DequantizeLinear", ["stored", "scale"], ["weight"], name="dq"),
        onnx.helper.make_node("MatMul", ["images", "weight"], ["logits"], name="product"),
    ]
    ends = [onnx.helper.make_tensor_value_info(n, 1, ["batch", s]) for n, s in (("images", 8), ("logits", 4))]
    graph = onnx.helper.make_graph(nodes, "weight-only", ends[:1], ends[1:], weights)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10), tmp_path / "m.onnx")
    rows = onnxruntime.layer_table(tmp_path / "m.onnx", onnxruntime.FP32)
    assert [(row.precision, row.weighted) for row in rows] == [(Precision.FP32, True)]


def test_saturation_is_real_or_absent(build: Callable[[str, str, str], Built], captured: dict[str, Captured]):
    """The recipes that a CPU without VNNI is offered are closer to PyTorch than full width on its fast kernels."""
    profile = profile_for("onnxruntime")
    if _device.products(profile) is not Products.SATURATING:
        pytest.skip("this CPU adds products in 32 bits")
    exact = build("onnxruntime", "cnn", f"{STATIC}-exact")
    fast_recipe = exact.artifact.recipe.model_copy(update={"options": {**exact.artifact.recipe.options, "exact_kernels": False}})
    fast = exact.artifact.model_copy(update={"recipe": fast_recipe})
    assert _error(exact, exact.artifact) < _error(exact, fast)


def _error(built: Built, artifact: object) -> float:
    with built.backend.load(artifact, built.profile) as session:
        found = run_in_batches(session, built.captured.inputs, 8)
    return float(np.linalg.norm(found - built.captured.logits))


def test_wrong_input_is_named(build: Callable[[str, str, str], Built]):
    built = build("onnxruntime", "cnn", "fp32")
    with built.backend.load(built.artifact, built.profile) as session, pytest.raises(BuildError, match="while running"):
        session.run({"images": np.zeros((1, 3, 5), np.float32)})


def test_unknown_method_is_refused(captured: dict[str, Captured], tmp_path: Path):
    recipe = onnxruntime.FP32.model_copy(update={"options": {"method": "magic"}})
    with pytest.raises(BuildError, match="magic"):
        get_backend("onnxruntime").build(captured["cnn"].graph, recipe, None, tmp_path)
