"""A float32 graph in another float type, with float32 inputs and outputs: what strongly typed runtimes take as precision."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fofa_deploy.errors import BuildError
from fofa_deploy.types import Precision
from fofa_exporters import _onnx

_CODES = {Precision.FP16: TensorProto.FLOAT16, Precision.BF16: TensorProto.BFLOAT16}
_LARGEST: dict[int, float] = {TensorProto.FLOAT16: 65504.0, TensorProto.BFLOAT16: 3.3895e38}
_SMALLEST = 2.0**-24
"""In fp16; bf16 has the range of float32."""
Places = Mapping[str, tuple[int, ...]]
"""Of a node's inputs, by operator. A node whose first input is among them works in that type, and its first output has it, too."""

FLOAT32_INPUTS: Places = {"Resize": (1, 2), "Range": (0, 1, 2)}
"""Inputs that the ONNX standard wants in float32 whatever the rest is in, where they are no whole numbers."""

SMALLEST_SCALE = 2.0**-20
"""Of a Q/DQ pair in fp16: below it four bits or more of the scale are lost."""


def typed(model: onnx.ModelProto, precision: Precision, float32: Places = FLOAT32_INPUTS) -> onnx.ModelProto:
    """The graph with weights and activations in ``precision``; values beyond its range are clipped to its largest.

    Q/DQ pairs stay where they are: then ``precision`` is that of the rest.

    Args:
        float32: inputs that stay in float32, with casts on the way there and back.

    Raises:
        BuildError: the graph branches, or quantizes by steps too small for ``precision``.
    """
    code = _CODES[precision]
    found = onnx.ModelProto()
    found.CopyFrom(model)
    graph = found.graph
    del graph.value_info[:]
    if _onnx.has_branches(model):
        raise BuildError(f"a graph with branches is not written in {precision}", "try another recipe")
    if precision is Precision.FP16:
        _check_scales(graph)
    for tensor in graph.initializer:
        _convert(tensor, code)
    for node in graph.node:
        _retype(node, code)
    _keep_float32(graph, model, float32, code)
    _cast_ends(graph, code)
    return found


def _check_scales(graph: onnx.GraphProto) -> None:
    scales = {node.input[1] for node in graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")}
    for tensor in graph.initializer:
        if tensor.name in scales and numpy_helper.to_array(tensor).min() < SMALLEST_SCALE:
            raise BuildError(f"{tensor.name} quantizes by steps that fp16 cannot hold", "take a recipe whose rest is fp32")


def _keep_float32(graph: onnx.GraphProto, model: onnx.ModelProto, float32: Places, code: int) -> None:
    """Unrounded copies of the constants, and casts of the activations, that some nodes of ``model`` want in float32."""
    weights = {tensor.name: tensor for tensor in model.graph.initializer}
    others = _of_other_types(model) if any(node.op_type in float32 for node in graph.node) else frozenset[str]()
    nodes: list[onnx.NodeProto] = []
    made: set[str] = set()
    for node in graph.node:
        named = [place for place in float32.get(node.op_type, ()) if place < len(node.input) and node.input[place]]
        places = [place for place in named if node.input[place] not in others]
        for place in places:
            source, wide = node.input[place], f"{node.input[place]}/wide"
            node.input[place] = wide
            if wide in made:
                continue
            made.add(wide)
            if source in weights:
                graph.initializer.append(numpy_helper.from_array(numpy_helper.to_array(weights[source]), wide))
            else:
                nodes.append(helper.make_node("Cast", [source], [wide], name=wide, to=TensorProto.FLOAT))
        nodes.append(node)
        if 0 in places:
            result, wide = node.output[0], f"{node.output[0]}/unrounded"
            node.output[0] = wide
            nodes.append(helper.make_node("Cast", [wide], [result], name=f"{result}/rounded", to=code))
    del graph.node[:]
    graph.node.extend(nodes)


def _of_other_types(model: onnx.ModelProto) -> frozenset[str]:
    """Names of tensors that are known to hold something else than float32."""
    stored = {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = stored | {value.name: value.type.tensor_type.elem_type for value in (*inferred.value_info, *inferred.input)}
    return frozenset(name for name, kind in kinds.items() if kind not in (TensorProto.FLOAT, TensorProto.UNDEFINED))


def _convert(tensor: TensorProto, code: int) -> None:
    if tensor.data_type == TensorProto.FLOAT:
        tensor.CopyFrom(numpy_helper.from_array(_clipped(numpy_helper.to_array(tensor), code), tensor.name))


def _clipped(values: NDArray[np.float32], code: int) -> NDArray[np.generic]:
    largest, kind = _LARGEST[code], helper.tensor_dtype_to_np_dtype(code)
    found = np.clip(values, -largest, largest).astype(kind)
    if values.size == 1 and values.any() and not found.any():  # an epsilon, say: it is there to be divided by
        return np.copysign(np.full_like(values, _SMALLEST), values).astype(kind)
    return found


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
