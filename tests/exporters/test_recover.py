"""What recovery promises: the same function where it must be exact, and less error where it may choose."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper
from torch.nn import functional

from fofa_deploy.types import Calibration
from fofa_exporters import _onnx
from fofa_exporters._quantization import Scheme, prepare, quantized
from fofa_exporters._quantization.recover import _Folded, _strides, learned, smoothed
from fofa_exporters._quantization.statistics import Channels, observe

from .conftest import SIZE, Captured


def _run(model: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.x64quantprecision", "1")
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, {"images": inputs}
    )[0]


def test_smoothing_changes_no_output_and_calms_activations(captured: dict[str, Captured]):
    vit = captured["vit"]
    prepared = prepare(_onnx.read(vit.graph))
    before = observe(prepared, vit.calibration)
    calm, expected = smoothed(prepared, before, 0.5)
    assert np.abs(_run(calm, vit.inputs) - vit.logits).max() < 1e-3
    after = observe(calm, vit.calibration)
    changed = [n for n in before.channels if not np.allclose(before.channels[n].high, after.channels[n].high, rtol=1e-3)]
    assert len(changed) == 4, "two blocks, each with a norm before attention and one before the MLP"
    for name in changed:
        assert after.channels[name].high == pytest.approx(expected.channels[name].high, rel=1e-2, abs=1e-4)
        assert after.high[after.names.index(name)] == pytest.approx(expected.high[expected.names.index(name)], rel=1e-2)


@pytest.mark.parametrize("groups", [1, 8])
def test_learned_rounding_loses_less_than_rounding_to_nearest(groups: int):
    """On correlated inputs, where the error of one column can be made good by the next."""
    rng = np.random.default_rng(0)
    inputs = 16
    mix = rng.normal(size=(groups, inputs, inputs))
    x = (rng.normal(size=(groups, 500, inputs)) @ mix).astype(np.float32)
    weight = rng.normal(size=(groups, 12, inputs)).astype(np.float32)
    scale = np.abs(weight).max(-1) / 7  # few levels, so that there is something to learn
    chosen = learned(weight, np.swapaxes(x, 1, 2) @ x, scale, 7)
    nearest = np.clip(np.round(weight / scale[..., None]), -7, 7)
    assert np.array_equal(chosen, np.round(chosen))
    assert np.abs(chosen).max() <= 7

    def lost(whole: np.ndarray) -> float:
        return float(np.square(x @ np.swapaxes(weight - whole * scale[..., None], 1, 2)).sum())

    assert lost(chosen) < 0.9 * lost(nearest)


def test_learned_rounding_survives_inputs_that_are_always_zero():
    gram = np.zeros((1, 4, 4), np.float32)
    gram[0, 0, 0] = 5.0
    weight = np.array([[[0.4, 0.6, -0.2, 0.9]]], np.float32)
    found = learned(weight, gram, np.array([[0.1]], np.float32), 127)
    assert found == pytest.approx(np.array([[[4, 6, -2, 9]]]), abs=1)


@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("operator", ["Conv", "ConvTranspose"])
def test_a_folded_weight_times_the_mean_input_is_the_mean_output(operator: str, stride: int, groups: int):
    """On maps that are constant, away from their edges, where every tap of a kernel sees the same."""
    rng = np.random.default_rng(0)
    channels, per_group = 8, 3
    shape = (per_group * groups, channels // groups, 3, 3) if operator == "Conv" else (channels, per_group, 3, 3)
    weight, mean = rng.normal(size=shape).astype(np.float32), rng.normal(size=channels).astype(np.float32)
    node = helper.make_node(operator, ["x", "w"], ["y"], group=groups, strides=[stride, stride])
    folded = _Folded.of(node, shape)
    found = np.einsum("gok,gk->go", folded.fold(weight), folded.inputs(Channels(mean, mean, mean))).ravel() / _strides(node)
    layer = functional.conv2d if operator == "Conv" else functional.conv_transpose2d
    maps = torch.from_numpy(mean)[None, :, None, None].expand(1, -1, 15, 15)
    period = slice(4, 4 + stride)  # a transposed convolution's outputs see other taps in turns
    outputs = layer(maps, torch.from_numpy(weight), padding=1, stride=stride, groups=groups)
    expected = outputs[0, :, period, period].mean((1, 2)).numpy()
    assert found == pytest.approx(expected, abs=1e-4)
    assert np.array_equal(folded.unfold(folded.fold(weight)), weight)
    steps = np.arange(shape[0] if operator == "Conv" else per_group, dtype=np.float32)
    per_output = np.broadcast_to(steps.reshape(-1, *[1] * 3) if operator == "Conv" else steps[:, None, None], shape)
    assert np.array_equal(folded.fold(per_output)[..., 0], folded.scales(steps))
    assert np.array_equal(folded.scales(np.float32([2.0])), np.full(folded.outputs, 2.0))


@pytest.mark.parametrize("kind", ["cnn", "vit"])
def test_recovery_comes_nearer_to_the_float_graph_or_stays_there(kind: str, captured: dict[str, Captured]):
    found = captured[kind]
    model, placed = _onnx.read(found.graph), {"weighted_only": kind == "vit", "float_outputs": kind == "vit"}

    def error(**options: object) -> float:
        scheme = Scheme(seven_bit_weights=True, **placed, **options)
        return float(np.linalg.norm(_run(quantized(model, found.calibration, scheme), found.inputs) - found.logits))

    # The weights of the transformer are random and its activations calm: there is little to recover, and nothing to break.
    plain, slack = error(bias_correction=False), 1.0 if kind == "cnn" else 1.2
    assert error(learned_rounding=True, bias_correction=False) < slack * plain
    assert error() < 1.05 * plain
    assert error(learned_rounding=True) < slack * plain


def test_recovered_integers_stay_in_their_range(captured: dict[str, Captured]):
    scheme = Scheme(seven_bit_weights=True, learned_rounding=True)
    written = quantized(_onnx.read(captured["cnn"].graph), captured["cnn"].calibration, scheme)
    stored = [onnx.numpy_helper.to_array(t) for t in written.graph.initializer if t.data_type == onnx.TensorProto.INT8]
    weights = [w for w in stored if w.ndim > 1]
    assert weights
    assert max(int(np.abs(w.astype(np.int32)).max()) for w in weights) <= 64


def test_a_share_of_the_error_stays_in_float(captured: dict[str, Captured]):
    cnn = captured["cnn"]
    model = _onnx.read(cnn.graph)
    mixed = quantized(model, cnn.calibration, Scheme(float_share=0.5))
    makers = {name: node for node in mixed.graph.node for name in node.output}
    products = [node for node in mixed.graph.node if node.op_type in _onnx.WEIGHTED]
    in_float = [n for n in products if n.input[1] not in makers or makers[n.input[1]].op_type != "DequantizeLinear"]
    assert 0 < len(in_float) < len(products) / 2
    whole = quantized(model, cnn.calibration, Scheme())
    assert np.linalg.norm(_run(mixed, cnn.inputs) - cnn.logits) < np.linalg.norm(_run(whole, cnn.inputs) - cnn.logits)


def _convolutions(calibration: Calibration, readers: int, bias: str = "b") -> onnx.ModelProto:
    """As many convolutions with one weight and one bias, one after the other; a layer norm with the same bias at the end."""
    rng = np.random.default_rng(0)
    values = {"w0": rng.normal(size=(8, 3, 3, 3)), "w": rng.normal(size=(8, 8, 3, 3)) / 9, "b": rng.normal(size=8)}
    tensors = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()]
    names = ["first", *(f"c{index}" for index in range(readers))]
    sources = [calibration.sidecar.input.name, *names[:-1]]
    nodes = [
        helper.make_node("Conv", [source, "w" if index else "w0", bias], [name], name=name, pads=[1] * 4)
        for index, (source, name) in enumerate(zip(sources, names, strict=True))
    ]
    nodes.append(helper.make_node("Transpose", [names[-1]], ["last"], name="turn", perm=[0, 2, 3, 1]))
    nodes.append(helper.make_node("LayerNormalization", ["last", "b"], ["y"], name="norm"))
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["batch", *sides])
        for name, sides in ((sources[0], (3, 32, 32)), ("y", (32, 32, 8)))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


@pytest.mark.parametrize("quantize_bias", [True, False])
def test_what_a_bias_makes_good_is_its_own_layers_alone(quantize_bias: bool, captured: dict[str, Captured]):
    calibration = captured["cnn"].calibration
    model = _convolutions(calibration, 1)
    written = quantized(model, calibration, Scheme(weighted_only=True, float_outputs=True, quantize_bias=quantize_bias))
    stored = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in written.graph.initializer}
    pairs = {node.output[0]: node.input for node in written.graph.node if node.op_type == "DequantizeLinear"}

    def value(name: str) -> np.ndarray:
        return stored[name] if name in stored else stored[pairs[name][0]] * stored[pairs[name][1]]

    before = onnx.numpy_helper.to_array(model.graph.initializer[2])
    shifts = {
        node.name: np.abs(value(node.input[2 if node.op_type == "Conv" else 1]) - before).max()
        for node in written.graph.node
        if node.op_type in ("Conv", "LayerNormalization")
    }
    onnx.checker.check_model(written, full_check=True)
    read = next(node.input[1] for node in written.graph.node if node.op_type == "LayerNormalization")
    rounding = stored[pairs[read][1]].max() / 2 if read in pairs else 0.0
    assert shifts["norm"] <= 1.01 * rounding
    assert min(shifts["first"], shifts["c0"]) > 1.01 * rounding
    assert not np.array_equal(*(value(node.input[2]) for node in written.graph.node if node.op_type == "Conv"))


def test_a_weight_that_layers_share_is_rounded_for_all_of_them(captured: dict[str, Captured]):
    calibration = captured["cnn"].calibration
    model = _convolutions(calibration, 3)
    floats = _run_all(model, captured["cnn"].inputs)

    def error(**options: bool) -> float:
        scheme = Scheme(weighted_only=True, float_outputs=True, seven_bit_weights=True, **options)
        return float(np.linalg.norm(_run_all(quantized(model, calibration, scheme), captured["cnn"].inputs) - floats))

    assert error(learned_rounding=True) < error(learned_rounding=False)


def test_convolutions_of_sequences_are_rounded_to_nearest(captured: dict[str, Captured]):
    """Whose windows nobody samples."""
    calibration, rng = captured["cnn"].calibration, np.random.default_rng(0)
    name, kernel = calibration.sidecar.input.name, rng.normal(size=(4, 3, 5)).astype(np.float32)
    nodes = [
        helper.make_node("Reshape", [name, "sides"], ["row"], name="flatten"),
        helper.make_node("Conv", ["row", "kernel"], ["y"], name="sequence"),
    ]
    tensors = [onnx.numpy_helper.from_array(kernel, "kernel"), onnx.numpy_helper.from_array(np.array([0, 3, -1]), "sides")]
    ends = [
        helper.make_tensor_value_info(end, onnx.TensorProto.FLOAT, ["batch", *sides])
        for end, sides in ((name, (3, 32, 32)), ("y", (4, 1020)))
    ]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    plain, learnt = (quantized(model, calibration, Scheme(learned_rounding=way)) for way in (False, True))
    assert {n.op_type for n in learnt.graph.node} >= {"QuantizeLinear", "DequantizeLinear"}
    assert [t.raw_data for t in learnt.graph.initializer] == [t.raw_data for t in plain.graph.initializer]


def _run_all(model: onnx.ModelProto, inputs: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"images": inputs})[0]


def _clipped(low: float, high: float) -> onnx.ModelProto:
    """A convolution behind a clip, its maps averaged into logits."""
    rng = np.random.default_rng(0)
    tensors = {
        "weight": rng.normal(size=(32, 3, 3, 3)) * 0.5,
        "head": rng.normal(size=(10, 32)) * 0.2,
        "low": np.array(low),
        "high": np.array(high),
    }
    nodes = [
        helper.make_node("Conv", ["images", "weight"], ["maps"], "conv", pads=[1, 1, 1, 1]),
        helper.make_node("Clip", ["maps", "low", "high"], ["clipped"], "clip"),
        helper.make_node("GlobalAveragePool", ["clipped"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "head"], ["logits"], "head", transB=1),
    ]
    ends = [
        helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", *shape])
        for name, shape in (("images", (3, SIZE, SIZE)), ("logits", (10,)))
    ]
    kept = [onnx.numpy_helper.from_array(value.astype(np.float32), name) for name, value in tensors.items()]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)])


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("bounds", [(0.5, 2.0), (-2.0, -0.2), (0.0, 2.0), (-1.0, 1.0)])
def test_a_clip_stays_where_no_range_does_what_it_does(captured: dict[str, Captured], bounds: tuple[float, float], signed: bool):
    """Ranges hold zero: behind a clip to 0.5..2 they are 0..2, and what is dropped was not that."""
    model, found = _clipped(*bounds), captured["cnn"]
    scheme = Scheme(seven_bit_weights=True, signed_activations=signed)
    expected = _run(model, found.inputs)
    answered = _run(quantized(model, found.calibration, scheme), found.inputs)
    assert np.linalg.norm(answered - expected) < 0.05 * np.linalg.norm(expected)
