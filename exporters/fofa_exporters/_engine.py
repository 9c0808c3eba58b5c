"""TensorRT's layer tables: of a parsed network, of a built engine, and of a typed ONNX file that a device will build."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx

from fofa_deploy.errors import BackendError
from fofa_deploy.types import Layer, LayerTime, Precision, TensorSpec
from fofa_exporters import _onnx

_PRECISIONS = {
    "FLOAT": Precision.FP32,
    "HALF": Precision.FP16,
    "INT8": Precision.INT8,
    "BF16": Precision.BF16,
    "BFLOAT16": Precision.BF16,
}
_PRODUCTS = frozenset({"CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY"})
_TRANSPARENT = frozenset({"SHUFFLE", "CAST", "IDENTITY", "QUANTIZE", "DEQUANTIZE"})


def network_layers(network: Any) -> tuple[Layer, ...]:  # noqa: ANN401
    """Types of each layer's first output; a product of dequantized operands counts as int8, for that is what it compiles to."""
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    producers = {layer.get_output(i).name: layer for layer in layers for i in range(layer.num_outputs)}
    # What ends a loop (an LSTM is one) has no output.
    return tuple(_network_layer(layer, producers) for layer in layers if _kind(layer) != "CONSTANT" and layer.num_outputs)


def _network_layer(layer: Any, producers: dict[str, Any]) -> Layer:  # noqa: ANN401
    product = _kind(layer) in _PRODUCTS
    integer = product and all(_is_dequantized(layer.get_input(place), producers) for place in (0, 1))
    weighted = product and (_kind(layer) != "MATRIX_MULTIPLY" or _is_constant(layer, producers))
    precision = Precision.INT8 if integer else _precision(layer.get_output(0))
    return Layer(name=layer.name, operator=_kind(layer), precision=precision, weighted=weighted)


def _kind(layer: Any) -> str:  # noqa: ANN401
    return str(layer.type.name)


def _precision(tensor: Any) -> str:  # noqa: ANN401
    name = str(tensor.dtype.name)
    return _PRECISIONS.get(name, name.lower())


def _is_dequantized(tensor: Any, producers: dict[str, Any]) -> bool:  # noqa: ANN401
    """Whether a tensor comes from int8 through nothing but a change of shape."""
    layer = producers.get(tensor.name) if tensor is not None else None
    while layer is not None and _kind(layer) == "SHUFFLE":
        layer = producers.get(layer.get_input(0).name)
    return layer is not None and _kind(layer) == "DEQUANTIZE" and _precision(layer.get_input(0)) == Precision.INT8


def _is_constant(layer: Any, producers: dict[str, Any]) -> bool:  # noqa: ANN401
    """Whether the second operand of a matrix product is a weight, stored as it is or quantized."""
    source = producers.get(layer.get_input(1).name)
    while source is not None and _kind(source) in _TRANSPARENT:
        source = producers.get(source.get_input(0).name)
    return source is not None and _kind(source) == "CONSTANT"


def inspector_layers(text: str) -> tuple[Layer, ...]:
    """Rows of the engine inspector's DETAILED JSON; a layer is weighted when it lists the weights it holds."""
    rows = [row for row in json.loads(text).get("Layers", []) if isinstance(row, dict)]
    return tuple(_inspected(row) for row in rows)


def _inspected(row: dict[str, Any]) -> Layer:
    weights = row.get("Weights") or {}
    spelled = str(weights.get("Type", "")) if weights.get("Count") else _output_format(row)
    precision = _PRECISIONS.get(spelled.upper(), spelled.lower() or "unknown")
    kind = str(row.get("LayerType", "unknown"))
    return Layer(name=str(row.get("Name", "")), operator=kind, precision=precision, weighted=bool(weights.get("Count")))


def _output_format(row: dict[str, Any]) -> str:
    """The inspector writes either ``Half`` or a phrase such as ``Channel major FP16 format where ...``."""
    outputs = row.get("Outputs") or [{}]
    phrase = str(outputs[0].get("Format/Datatype", ""))
    # bfloat16 first, which has float in it.
    words = {"BFLOAT16": "BF16", "BF16": "BF16", "FP32": "FLOAT", "FLOAT": "FLOAT", "FP16": "HALF", "HALF": "HALF", "INT8": "INT8"}
    return next((name for word, name in words.items() if word in phrase.upper()), phrase)


def layer_time(name: str, layer: Layer | None, ms: float) -> LayerTime:
    operator, precision = (layer.operator, layer.precision) if layer else ("unknown", "unknown")
    return LayerTime(name=name, operator=operator, precision=precision, ms=ms)


def input_spec(name: str, shape: Sequence[int], dtype: np.dtype[Any]) -> TensorSpec:
    """An engine's input; -1 is its dynamic side.

    Raises:
        BackendError: another axis than the batch is dynamic, for which the session here has no buffers.
    """
    sides = tuple(side if side > 0 else None for side in shape)
    if None in sides[1:]:
        raise BackendError(f"the engine's input {name} is {sides}: more than its batch is dynamic", "build it with fixed sides")
    return TensorSpec(name=name, shape=sides, dtype=dtype.name)


_STORED: dict[int, Precision] = {onnx.TensorProto.FLOAT16: Precision.FP16, onnx.TensorProto.BFLOAT16: Precision.BF16}


def typed_layers(model: onnx.ModelProto) -> tuple[Layer, ...]:
    """Of a typed graph that no TensorRT has parsed yet: a product of dequantized operands is int8, others are what they hold."""
    constant = _onnx.constants(model.graph)
    makers = {name: node for node in model.graph.node for name in node.output}
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    return tuple(_typed_layer(node, constant, makers, stored) for node in model.graph.node if not constant.issuperset(node.output))


def _root(name: str, makers: dict[str, onnx.NodeProto]) -> str:
    """The stored constant that another one is made of, turned or reshaped."""
    while name in makers and makers[name].input:
        name = makers[name].input[0]
    return name


def _typed_layer(node: onnx.NodeProto, constant: set[str], makers: dict[str, onnx.NodeProto], stored: dict[str, int]) -> Layer:
    product = node.op_type in _onnx.WEIGHTED
    weighted = product and node.input[1] in constant
    integer = product and all(name in makers and makers[name].op_type == "DequantizeLinear" for name in node.input[:2])
    roots = (_root(name, makers) for name in node.input if name in constant)
    held = next((stored[name] for name in roots if name in stored), int(onnx.TensorProto.FLOAT))
    precision = Precision.INT8 if integer else _STORED.get(held, Precision.FP32)
    return Layer(name=node.name, operator=node.op_type, precision=precision, weighted=weighted)
