"""Graphs as others write them: legal, ordinary, and unlike what our own capture makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
from onnx import TensorProto, helper, numpy_helper

from fofa_deploy.backend import get_backend
from fofa_deploy.errors import BuildError
from fofa_deploy.types import Graph, Precision

from .conftest import CLASSES, SIZE, Captured, profile_for, write_sidecar

Nodes = list[onnx.NodeProto]
Weights = dict[str, tuple[int, ...]]
node: Callable[..., onnx.NodeProto] = helper.make_node

STEM = [node("Conv", ["images", "w0", "b0"], ["a"], "stem", strides=[4, 4]), node("Relu", ["a"], ["b"], "act")]
POOLED = [*STEM, node("GlobalAveragePool", ["b"], ["c"], "pool"), node("Flatten", ["c"], ["d"], "flatten")]
KNOWN: Weights = {"w0": (8, 3, 4, 4), "b0": (8,), "w1": (8, CLASSES)}


def _gemm(*bias: int) -> tuple[Nodes, Weights]:
    return [*POOLED, node("Gemm", ["d", "w1", "b1"], ["logits"], "head")], {**KNOWN, "b1": bias}


FORMS: dict[str, tuple[Nodes, Weights]] = {
    "an output that is passed on": (
        [*POOLED, node("Gemm", ["d", "w1"], ["l"], "head"), node("Identity", ["l"], ["logits"], "end")], KNOWN,
    ),
    "a row as bias": _gemm(1, CLASSES),
    "a scalar as bias": _gemm(),
    "one number as bias": _gemm(1),
    "a row that is added": (
        [*POOLED, node("MatMul", ["d", "w1"], ["l"], "head"), node("Add", ["l", "b1"], ["logits"], "bias")],
        {**KNOWN, "b1": (1, CLASSES)},
    ),
    "a constant on the left": (
        [
            *STEM,
            node("Reshape", ["b", "rows"], ["c"], "flatten"),
            node("MatMul", ["left", "c"], ["m"], "mixed"),
            node("ReduceMean", ["m", "last"], ["d"], "mean", keepdims=0),
            node("Gemm", ["d", "wm"], ["logits"], "head"),
        ],
        {**KNOWN, "left": (12, 8), "wm": (12, CLASSES)},
    ),
    "transposed convolution in groups": (
        [
            node("Conv", ["images", "w0", "b0"], ["a"], "stem", strides=[4, 4]),
            node("Relu", ["a"], ["b"], "act"),
            node("ConvTranspose", ["b", "wt", "bt"], ["t"], "up", group=2, strides=[2, 2]),
            node("GlobalAveragePool", ["t"], ["c"], "pool"),
            node("Flatten", ["c"], ["d"], "flatten"),
            node("Gemm", ["d", "wm"], ["logits"], "head"),
        ],
        {**KNOWN, "wt": (8, 6, 2, 2), "bt": (12,), "wm": (12, CLASSES)},
    ),
}  # fmt: skip


def _model(form: str) -> onnx.ModelProto:
    nodes, weights = FORMS[form]
    rng = np.random.default_rng(0)
    values: dict[str, Any] = {
        name: rng.normal(0, max(1, int(np.prod(shape[1:]))) ** -0.5, shape).astype(np.float32) for name, shape in weights.items()
    }
    values |= {"rows": np.array([0, 8, -1]), "last": np.array([2])}
    used = {name for one in nodes for name in one.input}
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items() if name in used]
    ends = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N", *shape])
        for name, shape in (("images", (3, SIZE, SIZE)), ("logits", (CLASSES,)))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def _saved(model: onnx.ModelProto, folder: Path) -> Graph:
    folder.mkdir()
    onnx.save(model, folder / "model.onnx")
    write_sidecar(folder, "form")
    return Graph.load(folder)


def _error(backend_name: str, graph: Graph, precision: Precision, found: Captured, out: Path) -> float:
    """Relative to the file itself on ONNX Runtime."""
    backend, profile = get_backend(backend_name), profile_for(backend_name)
    offered = [recipe for recipe in backend.recipes(profile, graph) if recipe.precision is precision]
    ours = (recipe for recipe in offered if backend_name != "openvino" or recipe.options.get("method") == "qdq")
    recipe = next(ours, offered[0])
    out.mkdir()
    artifact = backend.build(graph, recipe, found.calibration, out)
    with backend.load(artifact, profile) as session:
        answered = session.run({"images": found.inputs})["logits"]
    expected = ort.InferenceSession(graph.path).run(["logits"], {"images": found.inputs})[0]
    return float(np.linalg.norm(answered - expected) / np.linalg.norm(expected))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_it_is_built_in_float_and_in_int8(backend: str, form: str, captured: dict[str, Captured], tmp_path: Path):
    graph = _saved(_model(form), tmp_path / "graph")
    assert _error(backend, graph, Precision.FP32, captured["cnn"], tmp_path / "fp32") < 1e-4
    assert _error(backend, graph, Precision.INT8, captured["cnn"], tmp_path / "int8") < 0.1


@pytest.mark.parametrize("backend", ["reference", "onnxruntime", "openvino"])
def test_weights_among_the_inputs_are_no_inputs(backend: str, captured: dict[str, Captured], tmp_path: Path):
    """As IR 3 has them, and torch with ``keep_initializers_as_inputs``."""
    model = _model("a row as bias")
    for tensor in model.graph.initializer:
        model.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    model.ir_version = 3
    graph = _saved(model, tmp_path / "graph")
    for precision in {Precision.FP32, *([] if backend == "reference" else [Precision.INT8])}:
        assert _error(backend, graph, precision, captured["cnn"], tmp_path / precision) < 0.05


def test_weights_in_sixteen_bits_are_told(captured: dict[str, Captured], tmp_path: Path):
    model = _model("a row as bias")
    for tensor in model.graph.initializer:
        if tensor.name == "w1":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float16), "w1/half"))
    model.graph.node.insert(0, node("Cast", ["w1/half"], ["w1"], "widen", to=TensorProto.FLOAT))
    graph = _saved(model, tmp_path / "graph")
    assert _error("onnxruntime", graph, Precision.FP32, captured["cnn"], tmp_path / "fp32") < 1e-4
    with pytest.raises(BuildError, match="stored in 16 bits"):
        _error("onnxruntime", graph, Precision.INT8, captured["cnn"], tmp_path / "int8")


def test_what_numpy_cannot_evaluate_is_told(tmp_path: Path):
    model = _model("a row as bias")
    model.opset_import[0].version = 10
    last = model.graph.node[-1].output
    last[0] = "l"
    for name, value in (("s", np.float32(0.1)), ("z", np.uint8(0))):
        model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    model.graph.node.append(node("QuantizeLinear", ["l", "s", "z"], ["q"], "q"))
    model.graph.node.append(node("DequantizeLinear", ["q", "s", "z"], ["logits"], "dq"))
    graph, profile, backend = _saved(model, tmp_path / "graph"), profile_for("reference"), get_backend("reference")
    (tmp_path / "out").mkdir()
    (recipe,) = backend.recipes(profile, graph)
    with pytest.raises(BuildError, match="numpy cannot evaluate"):
        backend.load(backend.build(graph, recipe, None, tmp_path / "out"), profile)


@pytest.mark.filterwarnings("ignore:.*jit.trace")
def test_a_converted_module_without_names_is_measured_in_the_precision_that_runs(tmp_path: Path):
    """OpenVINO's own way from PyTorch names no output, and stores weights in fp16 that a CPU without it computes in f32."""
    import torch

    layers = torch.nn.Conv2d(3, 8, 4, 4), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(8 * (SIZE // 4) ** 2, 5)
    module = torch.nn.Sequential(*layers)
    images = torch.randn(2, 3, SIZE, SIZE)
    ov.save_model(ov.convert_model(module, example_input=images), tmp_path / "m.xml")
    backend, profile = get_backend("openvino"), profile_for("openvino")
    found = backend.describe_file(tmp_path / "m.xml", profile)
    hint = ov.Core().compile_model(tmp_path / "m.xml", "CPU").get_property("INFERENCE_PRECISION_HINT").to_string()
    if hint == "f32":
        assert {layer.precision for layer in found.layers if layer.weighted} == {Precision.FP32}
    with backend.open_file(found, profile) as session:
        (answered,) = session.run({found.inputs[0].name: images.numpy()}).values()
    with torch.no_grad():
        assert np.abs(answered - module(images).numpy()).max() < 5e-2
