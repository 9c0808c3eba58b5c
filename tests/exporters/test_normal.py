"""However a graph is written, it is read one way, and computes the same."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from fofa_exporters._normal import normalized


def _model(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], sides: int = 4) -> onnx.ModelProto:
    """From ``x`` (batch,4) to ``y`` (batch,sides)."""
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", side]) for name, side in (("x", 4), ("y", sides))]
    stored = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def _answers(model: onnx.ModelProto) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": np.arange(8, dtype=np.float32).reshape(2, 4)})[0]


@pytest.mark.parametrize(
    "attribute",
    [{"value": numpy_helper.from_array(np.float32([1, 2, 3, 4]))}, {"value_floats": [1.0, 2.0, 3.0, 4.0]}, {"value_float": 2.5}],
    ids=lambda told: next(iter(told)),
)
def test_constants_are_stored(attribute):
    nodes = [helper.make_node("Constant", [], ["c"], **attribute), helper.make_node("Mul", ["x", "c"], ["y"], name="times")]
    model = _model(nodes, {})
    before = _answers(model)
    assert [node.op_type for node in normalized(model).graph.node] == ["Mul"]
    onnx.checker.check_model(model, full_check=True)
    assert np.array_equal(_answers(model), before)


def test_whole_numbers_are_stored_as_such():
    nodes = [helper.make_node("Constant", [], ["sides"], value_ints=[-1, 4]), helper.make_node("Reshape", ["x", "sides"], ["y"])]
    model = normalized(_model(nodes, {}))
    onnx.checker.check_model(model, full_check=True)
    assert numpy_helper.to_array(model.graph.initializer[0]).tolist() == [-1, 4]


@pytest.mark.parametrize("factors", [{"alpha": 0.25}, {"beta": 4.0}, {"alpha": 0.5, "beta": 0.0}])
def test_products_have_no_factors(factors):
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(4, 3)).astype(np.float32), "b": rng.normal(size=3).astype(np.float32)}
    model = _model([helper.make_node("Gemm", ["x", "w", "b"], ["y"], **factors)], weights, 3)
    before = _answers(model)
    told = {attribute.name: attribute.f for attribute in normalized(model).graph.node[0].attribute}
    assert set(told.values()) == {1.0}
    assert _answers(model) == pytest.approx(before, rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 2), (2, 1), (2, 2)])
def test_a_bias_per_output_is_a_list_and_one_per_row_stays(shape):
    """Of as many rows as outputs."""
    rng = np.random.default_rng(0)
    weights = {"w": rng.normal(size=(4, 2)).astype(np.float32), "b": rng.normal(size=shape).astype(np.float32)}
    model = _model([helper.make_node("Gemm", ["x", "w", "b"], ["y"])], weights, 2)
    before = _answers(model)
    bias = normalized(model).graph.node[0].input[2]
    assert _answers(model) == pytest.approx(before, rel=1e-6)
    stored = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    assert stored[bias] == (shape if shape[:1] == (2,) else (2,))


def test_a_factor_of_a_shared_weight_is_one_layers_alone():
    weight = np.eye(4, dtype=np.float32)
    nodes = [
        helper.make_node("Gemm", ["x", "w"], ["half"], alpha=0.5),
        helper.make_node("Gemm", ["half", "w"], ["y"]),
    ]
    assert np.array_equal(_answers(normalized(_model(nodes, {"w": weight}))), np.arange(8).reshape(2, 4) / 2)


def test_every_node_has_a_name_of_its_own_and_keeps_the_one_it_has():
    names, ends = ["Relu.b", "", "twice", "twice", "kept"], ["a", "b", "c", "d", "y"]
    nodes = [
        helper.make_node("Relu", [source], [end], name=name)
        for source, end, name in zip(["x", *ends[:-1]], ends, names, strict=True)
    ]
    found = [node.name for node in normalized(_model(nodes, {})).graph.node]
    assert len(set(found)) == len(found)
    assert all(found)
    assert (found[0], found[-1]) == ("Relu.b", "kept")
