"""Fused operators say the same as what they stand for, and stand for nothing else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import helper, numpy_helper

from fofa_exporters._fused import fused, written_out
from fofa_exporters._quantization import prepare

from .conftest import Captured

TOKENS, HEADS, DEPTH = 5, 2, 5  # as many tokens as channels: keys fit turned and unturned
WIDTH = HEADS * DEPTH
Lines = Sequence[tuple[str, Sequence[str], str, dict[str, object]]]


def model(lines: Lines, constants: dict[str, object], width: int, rank: int = 3) -> onnx.ModelProto:
    """Operators from ``x`` (batch,TOKENS,width) to ``y``."""
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    nodes = [helper.make_node(kind, inputs, [output], name=output, **options) for kind, inputs, output, options in lines]
    source = helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", TOKENS, width])
    target = helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * rank)
    graph = helper.make_graph(nodes, "pattern", [source], [target], tensors)
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(made, full_check=True)
    return made


def kinds(graph: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in graph.graph.node)


def same(one: onnx.ModelProto, other: onnx.ModelProto, width: int, batch: int) -> bool:
    x = 3 * np.random.default_rng(0).standard_normal((batch, TOKENS, width)).astype(np.float32)
    left, right = (
        ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
        for graph in (one, other)
    )
    return np.allclose(left, right, rtol=1e-5, atol=1e-5)


# --- GELU


def gelu(*products: tuple[list[str], str], half: float = 0.5, one: float = 1.0, root: float = 2**0.5) -> onnx.ModelProto:
    lines = [
        ("Div", ["x", "root"], "scaled", {}),
        ("Erf", ["scaled"], "erf", {}),
        ("Add", ["erf", "one"], "sum", {}),
        *(("Mul", inputs, output, {}) for inputs, output in products),
    ]
    return model(lines, {"root": np.float32(root), "one": np.float32(one), "half": np.float32(half)}, WIDTH)


ORDERS = {
    "half of the sum": ((["half", "sum"], "m"), (["x", "m"], "y")),
    "half of the product": ((["x", "sum"], "m"), (["m", "half"], "y")),
    "half of x": ((["x", "half"], "m"), (["m", "sum"], "y")),
}


@pytest.mark.parametrize("order", ORDERS)
def test_gelu_is_found_in_any_order(order):
    written = gelu(*ORDERS[order])
    assert kinds(fused(written)) == {"Gelu": 1}
    assert same(written, fused(written), WIDTH, 2)


def test_types_are_told_as_nobody_can_infer_them_any_more():
    written = gelu((["half", "sum"], "m"), (["x", "m"], "gelu"), (["gelu", "half"], "y"))
    assert kinds(fused(written)) == {"Gelu": 1, "Mul": 1}
    assert [value.name for value in fused(written).graph.value_info] == ["gelu"]


@pytest.mark.parametrize("wrong", [{"half": 0.4}, {"one": 1.5}, {"root": 1.0}], ids=str)
def test_what_is_nearly_gelu_stays(wrong):
    written = gelu(*ORDERS["half of the sum"], **wrong)
    assert fused(written) is written


def test_gelu_of_another_tensor_stays():
    written = gelu((["half", "sum"], "m"), (["erf", "m"], "y"))
    assert fused(written) is written


def test_the_parts_of_a_gelu_are_named_and_nothing_beside_them():
    written = gelu(*ORDERS["half of the sum"])
    written.graph.node[-1].output[0] = "gelu"
    written.graph.node.append(helper.make_node("Add", ["gelu", "shift"], ["y"], name="shifted"))
    written.graph.initializer.append(numpy_helper.from_array(np.ones(WIDTH, np.float32), "shift"))
    assert written_out(written) == ["y", "m", "sum", "erf", "scaled"]
    assert not written_out(attention())


# --- attention


def attention(places: Sequence[int] = (0, 1, 2), tokens: int = TOKENS, axis: int = -1, keys: str = "turned") -> onnx.ModelProto:
    """Queries, keys and values as exporters cut them.

    Args:
        places: which of the three each is.
        tokens: how many see each other.
        keys: "as they are" is no attention.
    """
    constants: dict[str, object] = {"heads": np.array([-1, tokens, 3, HEADS, DEPTH]), "rows": np.array([-1, TOKENS, WIDTH])}
    constants |= {f"{place}": np.array(place) for place in range(3)} | {"scale": np.float32(DEPTH**-0.5)}
    lines = [
        ("Reshape", ["x", "heads"], "split", {}),
        ("Transpose", ["split"], "turned", {"perm": [2, 0, 3, 1, 4]}),
        *(("Gather", ["turned", f"{place}"], name, {"axis": 0}) for name, place in zip("qkv", places, strict=True)),
        ("Mul", ["q", "scale"], "scaled", {}),
        ("Transpose", ["k"], "keys", {"perm": [0, 1, 3, 2]}),
        ("MatMul", ["scaled", "keys" if keys == "turned" else "k"], "scores", {}),
        ("Softmax", ["scores"], "weights", {"axis": axis}),
        ("MatMul", ["weights", "v"], "mixed", {}),
        ("Transpose", ["mixed"], "back", {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["back", "rows"], "y", {}),
    ]
    return model(lines, constants, 3 * WIDTH)


@pytest.mark.parametrize("places", [(0, 1, 2), (2, 0, 1)], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_attention_is_one_operator(batch, places):
    written = attention(places)
    assert kinds(fused(written)) == {"Split": 1, "MultiHeadAttention": 1}
    assert same(written, fused(written), 3 * WIDTH, batch)


def test_attention_on_tensors_of_their_own_is_one_operator():
    """Queries of one tensor, keys turned at once and values of another."""
    constants = {"heads": np.array([-1, TOKENS, HEADS, DEPTH]), "rows": np.array([-1, TOKENS, WIDTH]), "two": np.float32(2)}
    lines = [
        ("Mul", ["x", "two"], "other", {}),
        *(("Reshape", [source, "heads"], f"{name}h", {}) for source, name in zip(("x", "x", "other"), "qkv", strict=True)),
        ("Transpose", ["qh"], "q", {"perm": [0, 2, 1, 3]}),
        ("Transpose", ["kh"], "k", {"perm": [0, 2, 3, 1]}),
        ("Transpose", ["vh"], "v", {"perm": [0, 2, 1, 3]}),
        ("MatMul", ["q", "k"], "scores", {}),
        ("Softmax", ["scores"], "weights", {"axis": -1}),
        ("MatMul", ["weights", "v"], "mixed", {}),
        ("Transpose", ["mixed"], "back", {"perm": [0, 2, 1, 3]}),
        ("Reshape", ["back", "rows"], "y", {}),
    ]
    written = model(lines, constants, WIDTH)
    assert kinds(fused(written)) == {"Mul": 1, "MultiHeadAttention": 1}
    assert same(written, fused(written), WIDTH, 2)


@pytest.mark.parametrize("wrong", [{"tokens": 1}, {"axis": 2}, {"keys": "as they are"}], ids=str)
def test_what_is_nearly_attention_stays(wrong):
    written = attention(**wrong)
    assert fused(written) is written


@pytest.mark.parametrize("rows", [[-1, 1, WIDTH], [1, -1, WIDTH]], ids=str)
def test_tokens_that_are_regrouped_afterwards_stay(rows):
    written = attention()
    written.graph.initializer[1].CopyFrom(numpy_helper.from_array(np.array(rows), "rows"))
    assert fused(written) is written


def test_keys_that_change_heads_on_their_way_stay():
    """As many numbers in other places: (B,H,N,D) by way of (B*N,H,D)."""
    written = attention(keys="as they are")
    steps = [("Reshape", ["k", "mixed up"], "k1", {}), ("Transpose", ["k1"], "k2", {"perm": [0, 2, 1]})]
    steps += [("Reshape", ["k2", "apart"], "keys", {})]
    places = {"mixed up": np.array([-1, HEADS, DEPTH]), "apart": np.array([-1, HEADS, DEPTH, TOKENS])}
    written.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in places.items())
    at = next(place for place, node in enumerate(written.graph.node) if node.name == "scores")
    written.graph.node[at].input[1] = "keys"
    for kind, inputs, output, options in reversed(steps):
        written.graph.node.insert(at, helper.make_node(kind, inputs, [output], name=output, **options))
    assert fused(written) is written


def test_what_was_written_for_other_operators_stays():
    for written in (attention(), gelu(*ORDERS["half of the sum"])):
        written.opset_import[0].version = 12
        assert fused(written) is written


def test_what_branches_may_read_stays():
    written = gelu(*ORDERS["half of the sum"])
    branches = {}
    for name in ("then_branch", "else_branch"):
        end = helper.make_tensor_value_info(f"{name}.out", onnx.TensorProto.FLOAT, None)
        nodes = [helper.make_node("Identity", ["sum"], [f"{name}.out"])]
        branches[name] = helper.make_graph(nodes, name, [], [end])
    written.graph.initializer.append(numpy_helper.from_array(np.array(True), "which"))
    written.graph.node.append(helper.make_node("If", ["which"], ["either"], name="choice", **branches))
    assert fused(written) is written
    assert written_out(written) == []


def test_half_in_an_array_of_more_axes_is_not_half():
    written = gelu(*ORDERS["half of x"])
    written.graph.initializer[2].CopyFrom(numpy_helper.from_array(np.full((1, 1, 1, 1), 0.5, np.float32), "half"))
    assert fused(written) is written


def test_a_captured_transformer_is_fused_as_it_is_and_as_it_is_prepared(captured: dict[str, Captured]):
    graph = captured["vit"].graph
    written = onnx.load(graph.path)
    blocks = kinds(written)["Softmax"]
    assert blocks
    for form in (written, prepare(written)):
        found = fused(form)
        assert (kinds(found)["MultiHeadAttention"], kinds(found)["Gelu"]) == (blocks, blocks)
        assert not kinds(found)["Softmax"] + kinds(found)["Erf"]
        assert len(found.graph.initializer) <= len(form.graph.initializer) + blocks
        session = ort.InferenceSession(found.SerializeToString(), providers=["CPUExecutionProvider"])
        logits = session.run(None, {session.get_inputs()[0].name: captured["vit"].inputs})[0]
        np.testing.assert_allclose(logits, captured["vit"].logits, rtol=1e-4, atol=1e-4)


def test_a_graph_without_either_is_left_alone(captured: dict[str, Captured]):
    written = onnx.load(captured["cnn"].graph.path)
    assert fused(written) is written
