"""Rewritten operators give the same results as those they stand for."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import openvino as ov
import pytest
import torch
from onnx import helper, numpy_helper

from fofa_exporters._rewrite import (
    absorb_endless_pads,
    drop_endless_clips,
    expand_col2im,
    flatten_gathers,
    flatten_scales,
    join_hard_swish,
    pool_globally,
    saturate_gates,
)

CHANNELS = 3


def _col2im(image: list[int], block: list[int], columns: int, **attributes: list[int]) -> onnx.ModelProto:
    """Columns (batch,CHANNELS*block,columns) -> images."""
    shapes = [numpy_helper.from_array(np.array(shape, np.int64), name) for name, shape in (("image", image), ("block", block))]
    make = helper.make_tensor_value_info
    source = make("columns", onnx.TensorProto.FLOAT, ["batch", CHANNELS * int(np.prod(block)), columns])
    target = make("images", onnx.TensorProto.FLOAT, ["batch", CHANNELS, *image])
    nodes = [
        helper.make_node("Relu", ["columns"], ["positive"], name="first"),
        helper.make_node("Col2Im", ["positive", "image", "block"], ["folded"], name="fold", **attributes),
        helper.make_node("Identity", ["folded"], ["images"], name="last"),
    ]
    graph = helper.make_graph(nodes, "fold", [source], [target], shapes)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize(
    ("image", "block", "options"),
    [
        ([14, 14], [3, 3], {"stride": 2, "padding": 1}),
        ([8, 8], [2, 2], {"stride": 2}),
        ([7, 9], [3, 2], {"padding": (1, 0)}),
        ([11, 12], [3, 3], {"stride": 3, "padding": 1, "dilation": 2}),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_col2im_becomes_a_transposed_convolution(image, block, options, batch):
    unfolded = torch.nn.functional.unfold(torch.rand(batch, CHANNELS, *image), block, **options)
    columns = torch.rand(unfolded.shape, generator=torch.Generator().manual_seed(0))
    pair = {name: list(value) if isinstance(value, tuple) else [value] * 2 for name, value in options.items()}
    attributes = {f"{name}s": pair[name] for name in ("stride", "dilation") if name in pair}
    attributes |= {"pads": pair["padding"] * 2} if "padding" in pair else {}
    model = expand_col2im(_col2im(image, block, columns.shape[2], **attributes))
    onnx.checker.check_model(model, full_check=True)
    assert [node.op_type for node in model.graph.node] == ["Relu", "Reshape", "ConvTranspose", "Identity"]
    # onnx's own evaluator cuts the kernels of grouped transposed convolutions wrongly.
    (found,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(
        None, {"columns": columns.numpy()}
    )
    expected = torch.nn.functional.fold(columns, image, block, **options).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


def test_a_graph_without_it_is_left_alone():
    model = _col2im([4, 4], [2, 2], 4, strides=[2, 2])
    del model.graph.node[1]
    assert expand_col2im(model) is model


def _scaled(operator: str, factors: tuple[int, ...], kernel: int) -> onnx.ModelProto:
    """Maps (batch,2,7,7) scaled by constants and convolved."""
    rng = np.random.default_rng(0)
    weights = [
        numpy_helper.from_array(rng.uniform(1, 4, factors).astype(np.float32), "factors"),
        numpy_helper.from_array(rng.standard_normal((1, 2, kernel, kernel)).astype(np.float32), "kernel"),
    ]
    make = helper.make_tensor_value_info
    values = [make("maps", onnx.TensorProto.FLOAT, ["batch", 2, 7, 7]), make("out", onnx.TensorProto.FLOAT, ["batch", 1, 7, 7])]
    nodes = [
        helper.make_node(operator, ["maps", "factors"], ["scaled"], name="scale"),
        helper.make_node("Conv", ["scaled", "kernel"], ["out"], name="convolve", pads=[kernel // 2] * 4),
    ]
    graph = helper.make_graph(nodes, "scale", values[:1], values[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize("factors", [(7, 7), (1, 2, 7, 7), ()])
@pytest.mark.parametrize("operator", ["Mul", "Div"])
@pytest.mark.parametrize("kernel", [7, 3])
def test_openvino_keeps_a_scale_out_of_a_kernel_of_its_size(operator, factors, kernel):
    model = _scaled(operator, factors, kernel)
    maps = np.random.default_rng(1).standard_normal((2, 2, 7, 7)).astype(np.float32)
    (expected,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"maps": maps})
    rewritten = flatten_scales(model)
    onnx.checker.check_model(rewritten, full_check=True)
    assert (rewritten is not model) == (factors != () and kernel == 7)
    compiled = ov.Core().compile_model(
        ov.Core().read_model(rewritten.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    np.testing.assert_allclose(compiled({"maps": maps})[0], expected, rtol=1e-4, atol=1e-4)


def test_a_scale_may_be_the_first_factor():
    model = _scaled("Mul", (7, 7), 7)
    model.graph.node[0].input[:] = ["factors", "maps"]
    maps = np.random.default_rng(1).standard_normal((2, 2, 7, 7)).astype(np.float32)
    (expected,) = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"maps": maps})
    rewritten = flatten_scales(model)
    assert [node.op_type for node in rewritten.graph.node] == ["Reshape", "Mul", "Reshape", "Conv"]
    compiled = ov.Core().compile_model(
        ov.Core().read_model(rewritten.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
    )
    np.testing.assert_allclose(compiled({"maps": maps})[0], expected, rtol=1e-4, atol=1e-4)


def test_a_row_of_factors_is_no_map():
    """A kernel of its shape, on maps of another."""
    model = _scaled("Mul", (2, 1, 7), 7)
    kernel = np.ones((1, 2, 1, 7), np.float32)
    model.graph.initializer[1].CopyFrom(numpy_helper.from_array(kernel, "kernel"))
    model.graph.node[1].attribute[0].CopyFrom(helper.make_attribute("pads", [0, 3, 0, 3]))
    assert flatten_scales(model) is model


def test_a_map_that_is_stretched_by_its_factors_is_left_alone():
    model = _scaled("Mul", (1, 2, 7, 7), 7)
    model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 1
    assert flatten_scales(model) is model


def test_products_of_tensors_and_other_scales_are_left_alone():
    model = _scaled("Mul", (7, 7), 7)
    model.graph.node.extend(
        [helper.make_node("Mul", ["out", "out"], ["square"]), helper.make_node("Div", ["square", "factors"], ["end"])]
    )
    assert [node.op_type for node in flatten_scales(model).graph.node] == ["Reshape", "Mul", "Reshape", "Conv", "Mul", "Div"]


@pytest.mark.parametrize("axis", [1, 2, -1])
def test_a_table_of_places_becomes_a_list(axis):
    table, make = np.array([[0, 1, 2], [1, 2, 3]], np.int64), helper.make_tensor_value_info
    node = helper.make_node("Gather", ["maps", "table"], ["windows"], name="unfold", axis=axis)
    sides = [4, 5, 6]
    taken = np.take(np.empty((2, *sides)), table, axis).shape
    values = [
        make(name, onnx.TensorProto.FLOAT, ["batch", *shape[1:]]) for name, shape in (("maps", (0, *sides)), ("windows", taken))
    ]
    graph = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(table, "table")])
    rewritten = flatten_gathers(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9))
    onnx.checker.check_model(rewritten, full_check=True)
    assert [node.op_type for node in rewritten.graph.node] == ["Gather", "Reshape"]
    maps = np.random.default_rng(0).standard_normal((2, *sides)).astype(np.float32)
    session = ort.InferenceSession(rewritten.SerializeToString(), providers=["CPUExecutionProvider"])
    assert np.array_equal(session.run(None, {"maps": maps})[0], np.take(maps, table, axis))


def test_a_result_of_unknown_shape_is_left_alone():
    nodes = [helper.make_node("Reshape", ["maps", "shape"], ["any"]), helper.make_node("Gather", ["any", "table"], ["out"])]
    model = _graph(nodes, {"table": np.array([[0, 1]])}, [])
    model.graph.input.append(helper.make_tensor_value_info("shape", onnx.TensorProto.INT64, [None]))
    model.graph.output[0].type.tensor_type.ClearField("shape")
    assert flatten_gathers(model) is model


def test_lists_of_places_and_computed_tables_are_left_alone():
    make, nodes = helper.make_tensor_value_info, [helper.make_node("Gather", ["maps", "places"], ["some"], axis=1)]
    ends = [make("maps", onnx.TensorProto.FLOAT, ["batch", 4]), make("some", onnx.TensorProto.FLOAT, ["batch", 2])]
    stored = [numpy_helper.from_array(np.array([0, 3]), "places")]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], stored))
    assert flatten_gathers(model) is model


def _padded(value: float, sides: list[int], **pool: object) -> onnx.ModelProto:
    """Maps (2,3,9,9) -> padded -> pooled by 3 x 3."""
    make = helper.make_tensor_value_info
    tensors = [numpy_helper.from_array(np.array(sides, np.int64), "sides"), numpy_helper.from_array(np.float32(value), "value")]
    nodes = [
        helper.make_node("Pad", ["maps", "sides", "value"], ["padded"], name="pad"),
        helper.make_node("MaxPool", ["padded"], ["pooled"], name="pool", kernel_shape=[3, 3], strides=[2, 2], **pool),
    ]
    source, target = make("maps", onnx.TensorProto.FLOAT, [2, 3, 9, 9]), make("pooled", onnx.TensorProto.FLOAT, [2, 3, None, None])
    graph = helper.make_graph(nodes, "padded", [source], [target], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


AROUND = [0, 0, 0, 1, 0, 0, 1, 1]


@pytest.mark.parametrize("pool", [{}, {"pads": [1, 0, 0, 0]}, {"dilations": [2, 2]}], ids=["plain", "padded", "dilated"])
def test_padding_with_minus_infinity_becomes_the_pool_s_own(pool):
    model = _padded(-np.inf, AROUND, **pool)
    rewritten = absorb_endless_pads(model)
    onnx.checker.check_model(rewritten, full_check=True)
    assert [node.op_type for node in rewritten.graph.node] == ["MaxPool"]
    maps = -1 - np.random.default_rng(0).random((2, 3, 9, 9), np.float32)  # all of them below the zeros of another padding
    expected, found = (
        ort.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"maps": maps})[0]
        for graph in (model, rewritten)
    )
    np.testing.assert_array_equal(found, expected)


def test_of_several_padded_pools_none_is_forgotten():
    """Whatever stands between a padding and its pool."""
    model = _padded(-np.inf, AROUND)
    pad, pool = model.graph.node
    other, second = helper.make_node("Pad", [*pad.input], ["padded2"], name="pad2"), onnx.NodeProto()
    second.CopyFrom(pool)
    second.input[0], second.output[0], second.name = "padded2", "pooled2", "pool2"
    del model.graph.node[:]
    model.graph.node.extend([pad, other, pool, second])
    model.graph.output.append(helper.make_tensor_value_info("pooled2", onnx.TensorProto.FLOAT, [2, 3, None, None]))
    assert [node.op_type for node in absorb_endless_pads(model).graph.node] == ["MaxPool", "MaxPool"]


@pytest.mark.parametrize(
    ("value", "sides", "pool"),
    [
        pytest.param(0.0, AROUND, {}, id="zeros"),
        pytest.param(-np.inf, [0, 1, 0, 0, 0, 0, 0, 0], {}, id="channels"),
        pytest.param(-np.inf, [0, 0, 0, 3, 0, 0, 0, 0], {}, id="as far as the kernel"),
        pytest.param(-np.inf, AROUND, {"ceil_mode": 1}, id="ceil"),
    ],
)
def test_other_paddings_stay(value, sides, pool):
    assert [node.op_type for node in absorb_endless_pads(_padded(value, sides, **pool)).graph.node] == ["Pad", "MaxPool"]


@pytest.mark.parametrize(
    ("bounds", "operator"),
    [((-np.inf, np.inf), "Identity"), ((np.inf, -np.inf), "Clip"), ((0, np.inf), "Clip"), ((-np.inf,), "Clip"), ((), "Clip")],
)
def test_only_a_clip_that_lets_all_pass_is_dropped(bounds, operator):
    named = dict(zip(("low", "high"), map(np.float32, bounds), strict=False))
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch"]) for name in ("x", "y")]
    node = helper.make_node("Clip", ["x", *named], ["y"], name="clip")
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in named.items()]
    model = helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], stored))
    rewritten = drop_endless_clips(model)
    onnx.checker.check_model(rewritten, full_check=True)
    assert [node.op_type for node in rewritten.graph.node] == [operator]


def _graph(nodes: list[onnx.NodeProto], stored: dict[str, np.ndarray], target: list[object], opset: int = 18) -> onnx.ModelProto:
    """Maps (2,3,6,4) -> out."""
    make = helper.make_tensor_value_info
    ends = make("maps", onnx.TensorProto.FLOAT, [2, 3, 6, 4]), make("out", onnx.TensorProto.FLOAT, target)
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)


MAPS = 6 * np.random.default_rng(0).standard_normal((2, 3, 6, 4)).astype(np.float32)


def _run(model: onnx.ModelProto) -> np.ndarray:
    onnx.checker.check_model(model, full_check=True)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(None, {"maps": MAPS})[0]


def _mean(axes: list[int], opset: int, keepdims: int) -> onnx.ModelProto:
    """The mean of positive maps."""
    told = {"axes": axes} if opset < 18 else {}
    nodes = [
        helper.make_node("Abs", ["maps"], ["positive"], name="first"),
        helper.make_node("ReduceMean", ["positive", *([] if told else ["axes"])], ["out"], "mean", keepdims=keepdims, **told),
    ]
    kept = [side for axis, side in enumerate([2, 3, 6, 4]) if axis not in [a % 4 for a in axes]]
    target = [1 if axis in [a % 4 for a in axes] else side for axis, side in enumerate([2, 3, 6, 4])] if keepdims else kept
    return _graph(nodes, {} if told else {"axes": np.array(axes, np.int64)}, target, opset)


@pytest.mark.parametrize("axes", [[2, 3], [-1, -2], [3, 2]])
@pytest.mark.parametrize("opset", [13, 18])
@pytest.mark.parametrize("keepdims", [1, 0])
def test_a_mean_of_all_places_becomes_a_pool(axes, opset, keepdims):
    model = _mean(axes, opset, keepdims)
    rewritten = pool_globally(model)
    assert [node.op_type for node in rewritten.graph.node][1] == "GlobalAveragePool"
    np.testing.assert_allclose(_run(rewritten), _run(model), rtol=1e-6)


@pytest.mark.parametrize("axes", [[1], [1, 2], [3], [2]])
def test_means_of_other_axes_stay(axes):
    model = _mean(axes, 18, 1)
    assert pool_globally(model) is model


def test_a_mean_in_double_stays():
    """For which no runtime has the pool."""
    model = _mean([2, 3], 18, 1)
    for value in (*model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    assert pool_globally(model) is model


def test_a_mean_of_something_else_than_maps_stays():
    nodes = [
        helper.make_node("Reshape", ["maps", "shape"], ["volume"], name="first"),
        helper.make_node("ReduceMean", ["volume", "axes"], ["out"], name="mean"),
    ]
    model = _graph(nodes, {"shape": np.array([2, 3, 6, 2, 2]), "axes": np.array([2, 3])}, [2, 3, 1, 1, 2])
    assert pool_globally(model) is model


def _gate(zero: np.generic, **slope: float) -> onnx.ModelProto:
    """HardSigmoid between two pairs."""
    nodes = [
        helper.make_node("QuantizeLinear", ["maps", "step", "middle"], ["stored"], "q"),
        helper.make_node("DequantizeLinear", ["stored", "step", "middle"], ["read"], "dq"),
        helper.make_node("HardSigmoid", ["read"], ["gate"], "gate", **slope),
        helper.make_node("QuantizeLinear", ["gate", "small", "zero"], ["gate.stored"], "gate.q"),
        helper.make_node("DequantizeLinear", ["gate.stored", "small", "zero"], ["out"], "gate.dq"),
    ]
    steps = {"step": np.float32(0.1), "middle": np.uint8(128), "small": np.float32(1 / 127), "zero": zero}
    return _graph(nodes, steps, [2, 3, 6, 4])


@pytest.mark.parametrize("slope", [{}, {"alpha": 1 / 6, "beta": 0.5}, {"alpha": 0.5, "beta": 0.1}])
def test_a_gate_between_pairs_becomes_an_addition_in_int8(slope, tmp_path):
    model = _gate(np.uint8(0), **slope)
    rewritten = saturate_gates(model)
    assert "HardSigmoid" not in {node.op_type for node in rewritten.graph.node}
    read = 0.1 * np.clip(np.round(MAPS / 0.1), -128, 127)
    exact = np.clip(slope.get("alpha", 0.2) * read + slope.get("beta", 0.5), 0, 1)
    np.testing.assert_allclose(_run(rewritten), exact, atol=0.5 / 255 + 1e-5)  # half a step, and the steps are finer than before
    assert 0 < (exact == 0).mean() < 1
    assert 0 < (exact == 1).mean() < 1
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(rewritten.SerializeToString(), options, providers=["CPUExecutionProvider"])
    assert "QLinearAdd" in {node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node}


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda nodes: nodes[2].input.__setitem__(0, "maps"), id="of a float"),
        pytest.param(lambda nodes: nodes.append(helper.make_node("Relu", ["gate"], ["other"])), id="read in float, too"),
        pytest.param(lambda nodes: nodes.append(helper.make_node("Cast", ["gate.stored"], ["other"], to=6)), id="read as integers"),
        pytest.param(lambda nodes: nodes[2].attribute.append(helper.make_attribute("beta", -0.5)), id="of a negative offset"),
    ],
)
def test_other_gates_stay(change):
    model = _gate(np.uint8(0))
    change(model.graph.node)
    assert saturate_gates(model) is model


def test_a_signed_gate_stays():
    model = _gate(np.int8(0))
    assert saturate_gates(model) is model


def _swish(first: int, **slope: float) -> onnx.ModelProto:
    nodes = [
        helper.make_node("HardSigmoid", ["maps"], ["gate"], "gate", **slope),
        helper.make_node("Mul", ["maps", "gate"] if first == 0 else ["gate", "maps"], ["out"], "product"),
    ]
    return _graph(nodes, {}, [2, 3, 6, 4])


@pytest.mark.parametrize("first", [0, 1])
def test_a_hard_swish_is_put_together_again(first):
    model = _swish(first, alpha=1 / 6, beta=0.5)
    rewritten = join_hard_swish(model)
    assert [node.op_type for node in rewritten.graph.node] == ["HardSwish"]
    np.testing.assert_allclose(_run(rewritten), _run(model), atol=1e-5)


def test_a_gate_that_others_read_is_kept():
    model = _swish(0, alpha=1 / 6, beta=0.5)
    model.graph.node.append(helper.make_node("Relu", ["gate"], ["other"], "other"))
    assert [node.op_type for node in join_hard_swish(model).graph.node] == ["HardSigmoid", "HardSwish", "Relu"]


@pytest.mark.parametrize(
    ("rewrite", "model", "inner"),
    [
        (saturate_gates, _gate(np.uint8(0)), "gate"),
        (join_hard_swish, _swish(0, alpha=1 / 6, beta=0.5), "gate"),
        (absorb_endless_pads, _padded(-np.inf, AROUND), "padded"),
    ],
    ids=["gate", "swish", "pad"],
)
def test_what_a_branch_may_read_stays(rewrite, model, inner):
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in ("one", "other")]
    branches = [helper.make_graph([helper.make_node("Identity", [inner], [end.name])], end.name, [], [end]) for end in ends]
    model.graph.initializer.append(numpy_helper.from_array(np.array(True), "which"))
    model.graph.node.append(helper.make_node("If", ["which"], ["seen"], then_branch=branches[0], else_branch=branches[1]))
    assert rewrite(model) is model


def test_other_slopes_and_old_graphs_are_no_hard_swish():
    slow, old = _swish(0), _swish(0, alpha=1 / 6, beta=0.5)
    old.opset_import[0].version = 13
    assert join_hard_swish(slow) is slow
    assert join_hard_swish(old) is old
