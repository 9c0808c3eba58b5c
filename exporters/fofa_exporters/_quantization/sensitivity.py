"""What quantizing each layer alone does to the logits.

One session holds every layer twice, in float and with its operands quantized, and a mask says which of the two runs: as many
passes as there are layers, at the speed of the float graph, and no graph is built or loaded but this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, get_args

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from fofa_deploy.types import Calibration
from fofa_exporters import _onnx
from fofa_exporters._quantization.ranges import ranges
from fofa_exporters._quantization.scheme import Method, Scheme
from fofa_exporters._quantization.statistics import Floats, Statistics

MASK = "fofa_quantized"
IMAGES = 8
"""Enough to rank layers: their errors differ by orders of magnitude."""


def sensitivity(prepared: onnx.ModelProto, statistics: Statistics, calibration: Calibration, scheme: Scheme) -> dict[str, float]:
    """Squared error of the logits, relative to their own square, by weighted layer: (name -> error), in the order of the graph."""
    simulator = Simulator(prepared, statistics, scheme)
    batches = list(islice(calibration.batches(4), IMAGES // 4))
    plain = [simulator.logits(feeds, ()) for feeds in batches]
    power = sum(float(np.square(logits).sum()) for logits in plain)
    errors = {}
    for index, name in enumerate(simulator.layers):
        found = [simulator.logits(feeds, (index,)) for feeds in batches]
        error = sum(float(np.square(a - b).sum()) for a, b in zip(found, plain, strict=True))
        errors[name] = error / max(power, 1e-30)
    return errors


def best_ranges(prepared: onnx.ModelProto, statistics: Statistics, calibration: Calibration, scheme: Scheme) -> Method:
    """The method whose ranges change the logits least when every layer is quantized."""
    batches = list(islice(calibration.batches(4), IMAGES // 4))
    errors: dict[Method, float] = {}
    for method in get_args(Method):
        simulator = Simulator(prepared, statistics, replace(scheme, ranges=method))
        every = range(len(simulator.layers))
        pairs = [(simulator.logits(feeds, every), simulator.logits(feeds, ())) for feeds in batches]
        errors[method] = sum(float(np.square(found - plain).sum()) for found, plain in pairs)
    return min(errors, key=lambda method: errors[method])


def most_sensitive(errors: dict[str, float], share: float) -> list[str]:
    """The fewest layers that together carry ``share`` of the summed error."""
    order = sorted(errors, key=lambda name: -errors[name])
    carried = np.cumsum([errors[name] for name in order])
    if share <= 0 or not len(order) or carried[-1] <= 0:
        return []
    return order[: int(np.searchsorted(carried, share * carried[-1])) + 1]


class Simulator:
    """A graph whose weighted layers run quantized where a mask says so."""

    def __init__(self, prepared: onnx.ModelProto, statistics: Statistics, scheme: Scheme) -> None:
        model = onnx.ModelProto()
        model.CopyFrom(prepared)
        self.layers = [node.name for node in _onnx.weighted(prepared)]
        self._outputs = [value.name for value in model.graph.output]
        _install(model, self.layers, statistics, scheme)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_quant_qdq", "1")  # the pairs are the point, and are not to be fused
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        self._session: Any = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def logits(self, feeds: Any, quantized: Sequence[int]) -> Floats:  # noqa: ANN401 - feeds by name
        """Logits (B,K) with the layers of these numbers quantized."""
        mask = np.zeros(len(self.layers), np.bool_)
        mask[list(quantized)] = True
        found: Floats = self._session.run(self._outputs, {**feeds, MASK: mask})[0]
        return found


@dataclass(frozen=True)
class _Activation:
    """What an input is quantized with."""

    scale: np.float32
    zero: np.generic


def _install(model: onnx.ModelProto, layers: Sequence[str], statistics: Statistics, scheme: Scheme) -> None:
    """Every layer becomes an ``If`` over its bit of the mask."""
    graph = model.graph
    assert scheme.ranges != "best"
    low, high = ranges(statistics, scheme.ranges, scheme.signed_activations)
    activations = {n: _activation(float(a), float(b), scheme) for n, a, b in zip(statistics.names, low, high, strict=True)}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    graph.input.append(helper.make_tensor_value_info(MASK, onnx.TensorProto.BOOL, [len(layers)]))
    number = {name: index for index, name in enumerate(layers)}
    nodes = []
    for node in graph.node:
        weight = weights.get(node.input[1]) if node.name in number else None
        if weight is None or node.input[0] not in activations:
            nodes.append(node)
            continue
        bit, place = f"{node.name}/bit", f"{node.name}/number"
        graph.initializer.append(numpy_helper.from_array(np.array(number[node.name]), place))
        nodes.append(helper.make_node("Gather", [MASK, place], [bit]))
        branches = {"then_branch": _quantized(node, weight, activations[node.input[0]], scheme), "else_branch": _plain(node)}
        nodes.append(helper.make_node("If", [bit], list(node.output), **branches))
    del graph.node[:]
    graph.node.extend(nodes)


def _activation(low: float, high: float, scheme: Scheme) -> _Activation:
    if scheme.signed_activations:
        return _Activation(np.float32(max(-low, high, 1e-12) / 127), np.int8(0))
    scale = max(high - low, 1e-12) / 255
    return _Activation(np.float32(scale), np.uint8(np.clip(round(-low / scale), 0, 255)))


def _plain(node: onnx.NodeProto) -> onnx.GraphProto:
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    inner.output[0] = f"{node.output[0]}/float"
    return helper.make_graph([inner], "float", [], [_value(inner.output[0])])


def _quantized(node: onnx.NodeProto, weight: onnx.TensorProto, activation: _Activation, scheme: Scheme) -> onnx.GraphProto:
    prefix = f"{node.name}/quantized"
    constants = {
        "scale": np.asarray(activation.scale),
        "zero": np.asarray(activation.zero),
        "weight": fake_quantized(numpy_helper.to_array(weight), output_axis(node), 64 if scheme.seven_bit_weights else 127),
    }
    names = {key: f"{prefix}/{key}" for key in constants}
    inner = onnx.NodeProto()
    inner.CopyFrom(node)
    inner.input[0], inner.input[1], inner.output[0] = f"{prefix}/x", names["weight"], f"{prefix}/y"
    nodes = [
        helper.make_node("QuantizeLinear", [node.input[0], names["scale"], names["zero"]], [f"{prefix}/q"]),
        helper.make_node("DequantizeLinear", [f"{prefix}/q", names["scale"], names["zero"]], [f"{prefix}/x"]),
        inner,
    ]
    stored = [numpy_helper.from_array(value, names[key]) for key, value in constants.items()]
    return helper.make_graph(nodes, "quantized", [], [_value(f"{prefix}/y")], stored)


def _value(name: str) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None)


def output_axis(node: onnx.NodeProto) -> int:
    """The axis of a weight along which its layer's output channels lie."""
    if node.op_type == "ConvTranspose":
        return 1
    if node.op_type == "Gemm":
        return 0 if any(a.name == "transB" and a.i for a in node.attribute) else 1
    return 0 if node.op_type == "Conv" else -1


def fake_quantized(weight: Floats, axis: int, top: int) -> Floats:
    """Rounded to ``top`` levels either side of zero, a scale per output channel."""
    others = tuple(a for a in range(weight.ndim) if a != axis % weight.ndim)
    scale: NDArray[np.float32] = np.maximum(np.abs(weight).max(axis=others, keepdims=True), 1e-12) / np.float32(top)
    return np.asarray(np.round(weight / scale) * scale, np.float32)
