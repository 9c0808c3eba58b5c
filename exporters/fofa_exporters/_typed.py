"""A float32 graph in another float type, with float32 inputs and outputs: what a strongly typed compiler takes as precision."""

from __future__ import annotations

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fofa_deploy.errors import BuildError
from fofa_deploy.types import Precision

_CODES = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
_LARGEST: dict[int, float] = {TensorProto.FLOAT16: 65504.0, TensorProto.BFLOAT16: 3.3895e38}
_FLOAT32_INPUTS = {"Resize": (1, 2)}
"""Inputs that the ONNX standard wants in float32 whatever the rest is in."""

_SMALLEST_SCALE = 2.0**-20
"""Of a Q/DQ pair in fp16: below it four bits or more of the scale are lost."""


def typed(model: onnx.ModelProto, precision: Precision) -> onnx.ModelProto:
    """The graph with weights and activations in ``precision``; values beyond its range are clipped to its largest.

    Q/DQ pairs stay where they are: then ``precision`` is that of the rest.

    Raises:
        BuildError: the graph branches, or quantizes by steps too small for ``precision``.
    """
    code = _CODES[precision]
    found = onnx.ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    del graph.value_info[:]
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        raise BuildError(f"a graph with branches is not written in {precision}", "try another recipe")
    if precision is Precision.FP16:
        _check_scales(graph)
    kept = _keep_float32(graph)
    for tensor in graph.initializer:
        if tensor.name not in kept:
            _convert(tensor, code)
    for node in graph.node:
        _retype(node, code)
    _cast_ends(graph, code)
    return found


def _check_scales(graph: onnx.GraphProto) -> None:
    scales = {node.input[1] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for tensor in graph.initializer:
        if tensor.name in scales and numpy_helper.to_array(tensor).min() < _SMALLEST_SCALE:
            raise BuildError(f"{tensor.name} quantizes by steps that fp16 cannot hold", "take a recipe whose rest is fp32")


def _keep_float32(graph: onnx.GraphProto) -> set[str]:
    """Names that stay float32: copies of the constants, and casts of the activations, that some nodes want so."""
    weights = {tensor.name: tensor for tensor in graph.initializer if tensor.data_type == TensorProto.FLOAT}
    kept: set[str] = set()
    for node in graph.node:
        for place in _FLOAT32_INPUTS.get(node.op_type, ()):
            if place < len(node.input) and node.input[place] in weights:
                copy = numpy_helper.from_array(numpy_helper.to_array(weights[node.input[place]]), f"{node.input[place]}/float32")
                if copy.name not in kept:
                    graph.initializer.append(copy)
                    kept.add(copy.name)
                node.input[place] = copy.name
    return kept


def _convert(tensor: TensorProto, code: int) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(_clipped(numpy_helper.to_array(tensor), code), tensor.name))


def _clipped(values: NDArray[np.float32], code: int) -> NDArray[np.generic]:
    largest = _LARGEST[code]
    return np.clip(values, -largest, largest).astype(helper.tensor_dtype_to_np_dtype(code))


def _retype(node: onnx.NodeProto, code: int) -> None:
    """What a node's attributes say about types."""
    for attribute in node.attribute:
        if attribute.HasField("t"):
            _convert(attribute.t, code)
        elif attribute.name in ("to", "dtype", "output_dtype", "stash_type") and attribute.i == TensorProto.FLOAT:
            attribute.i = attribute.i if attribute.name == "stash_type" else code  # norms go on summing in float32
    if node.op_type == "Constant" and any(a.name in ("value_float", "value_floats") for a in node.attribute):
        attribute = node.attribute[0]
        values = np.float32(attribute.f) if attribute.name == "value_float" else np.array(attribute.floats, np.float32)
        node.attribute[0].CopyFrom(helper.make_attribute("value", numpy_helper.from_array(_clipped(np.asarray(values), code))))


def _cast_ends(graph: onnx.GraphProto, code: int) -> None:
    """The caller keeps float32 at both ends; pixels are cast by the graph itself."""
    first, last = [], []
    for value in (value for value in graph.input if value.type.tensor_type.elem_type == TensorProto.FLOAT):
        inner = f"{value.name}/typed"
        _rename(graph, value.name, inner)
        first.append(helper.make_node("Cast", [value.name], [inner], name=inner, to=code))
    for value in graph.output:
        inner = f"{value.name}/typed"
        _rename(graph, value.name, inner)
        last.append(helper.make_node("Cast", [inner], [value.name], name=f"{value.name}/float32", to=TensorProto.FLOAT))
    nodes = [*first, *graph.node, *last]
    del graph.node[:]
    graph.node.extend(nodes)


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    for node in graph.node:
        for names in (node.input, node.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new
