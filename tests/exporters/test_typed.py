"""A graph in half precision is half precision everywhere but at its ends, and says where that cannot be."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from fofa_deploy.errors import BuildError
from fofa_deploy.types import Precision
from fofa_exporters import _onnx
from fofa_exporters._typed import typed

from .conftest import Captured


def _graph(nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], shape: list[int]) -> onnx.ModelProto:
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("images", "logits")]
    stored = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    graph = helper.make_graph(nodes, "graph", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_half_precision_is_near_and_takes_and_gives_float32(kind: str, captured: dict[str, Captured]):
    half = typed(_onnx.read(captured[kind].graph), Precision.FP16)
    session = ort.InferenceSession(half.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": captured[kind].inputs})[0]
    assert found.dtype == np.float32
    assert np.linalg.norm(found - captured[kind].logits) < 2e-2 * np.linalg.norm(captured[kind].logits)


@pytest.mark.parametrize(("precision", "code"), [(Precision.FP16, TensorProto.FLOAT16), (Precision.BF16, TensorProto.BFLOAT16)])
def test_no_weight_stays_in_float32(precision: Precision, code: int, captured: dict[str, Captured]):
    found = typed(_onnx.read(captured["vit"].graph), precision)
    kinds = {tensor.data_type for tensor in found.graph.initializer}
    assert code in kinds
    assert TensorProto.FLOAT not in kinds


def test_the_given_graph_is_left_alone(captured: dict[str, Captured]):
    model = _onnx.read(captured["cnn"].graph)
    before = model.SerializeToString()
    typed(model, Precision.FP16)
    assert model.SerializeToString() == before


def test_resize_keeps_its_scales():
    scales = np.float32([1, 1, 1, 1])
    nodes = [
        helper.make_node("Resize", ["images", "", "scales"], ["larger"]),
        helper.make_node("Mul", ["larger", "scales"], ["logits"]),
    ]
    found = typed(_graph(nodes, {"scales": scales}, [1, 1, 4, 4]), Precision.FP16)
    stored = {tensor.name: tensor.data_type for tensor in found.graph.initializer}
    assert stored[found.graph.node[1].input[2]] == TensorProto.FLOAT
    assert stored["scales"] == TensorProto.FLOAT16, "what the product reads is half precision all the same"


def test_ranges_stay_in_float32_or_whole():
    weights = {"zero": np.float32(0), "one": np.float32(1), "none": np.int64(0), "step": np.int64(1), "four": np.int64(4)}
    nodes = [
        helper.make_node("Cast", ["four"], ["end"], to=TensorProto.FLOAT),
        helper.make_node("Range", ["zero", "end", "one"], ["places"]),
        helper.make_node("Range", ["none", "four", "step"], ["indices"]),
        helper.make_node("Gather", ["places", "indices"], ["picked"]),
        helper.make_node("Add", ["images", "picked"], ["logits"]),
    ]
    found = typed(_graph(nodes, weights, [1, 4]), Precision.FP16)
    onnx.checker.check_model(found, full_check=True)
    answered = ort.InferenceSession(found.SerializeToString()).run(None, {"images": np.zeros((1, 4), np.float32)})[0]
    assert answered.tolist() == [[0, 1, 2, 3]]


def test_values_beyond_the_range_become_the_largest():
    nodes = [helper.make_node("Add", ["images", "mask"], ["logits"])]
    found = typed(_graph(nodes, {"mask": np.float32([-1e9, 1.0])}, [2]), Precision.FP16)
    assert numpy_helper.to_array(found.graph.initializer[0]).tolist() == [-65504.0, 1.0]


def test_an_epsilon_does_not_become_nothing():
    """As in x / max(|x|, 1e-12)."""
    nodes = [helper.make_node("Abs", ["images"], ["size"]), helper.make_node("Max", ["size", "epsilon"], ["norm"])]
    nodes.append(helper.make_node("Div", ["images", "norm"], ["logits"]))
    found = typed(_graph(nodes, {"epsilon": np.float32([1e-12])}, [1, 2]), Precision.FP16)
    answered = ort.InferenceSession(found.SerializeToString()).run(None, {"images": np.float32([[0, 3]])})[0]
    assert answered.tolist() == [[0, 1]]


def test_steps_that_fp16_cannot_hold_are_refused():
    pair = ["q", "dq"]
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale"], [pair[0]]),
        helper.make_node("DequantizeLinear", [pair[0], "scale"], ["logits"]),
    ]
    with pytest.raises(BuildError, match="steps that fp16 cannot hold"):
        typed(_graph(nodes, {"scale": np.float32(1e-8)}, [4]), Precision.FP16)


def test_a_branching_graph_is_refused():
    branch = helper.make_graph(
        [helper.make_node("Identity", ["images"], ["out"])], "b", [], [helper.make_tensor_value_info("out", TensorProto.FLOAT, [2])]
    )
    nodes = [helper.make_node("If", ["which"], ["logits"], then_branch=branch, else_branch=branch)]
    with pytest.raises(BuildError, match="branches"):
        typed(_graph(nodes, {"which": np.array(True)}, [2]), Precision.BF16)
