"""One way to write a graph, so that nobody has to look for the others: the same function, as every back end reads it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

_NUMBERS = {
    "value_float": np.float32, "value_floats": np.float32, "value_int": np.int64, "value_ints": np.int64,
}  # fmt: skip


def normalized(model: onnx.ModelProto) -> onnx.ModelProto:
    """In place: constants are initializers, products of matrices have no factors and biases of one axis, every node has a name of
    its own."""
    _store_constants(model.graph)
    _absorb_factors(model.graph)
    _spread_biases(model.graph)
    name_nodes(model.graph)
    return model


def name_nodes(graph: onnx.GraphProto) -> None:
    """Nodes are picked and told by name, and exporters leave names out or give one twice."""
    taken = Counter(node.name for node in graph.node)
    for node in graph.node:
        if node.name and taken[node.name] == 1:
            continue
        taken[node.name] -= 1
        name = f"{node.op_type}.{node.output[0]}"
        while name in taken:
            name += "_"
        taken[name] += 1
        node.name = name


def _store_constants(graph: onnx.GraphProto) -> None:
    kept = []
    for node in graph.node:
        stored = _stored(node)
        if stored is None:
            kept.append(node)
        else:
            graph.initializer.append(stored)
    if len(kept) < len(graph.node):
        copied = [onnx.NodeProto.FromString(node.SerializeToString()) for node in kept]
        del graph.node[:]
        graph.node.extend(copied)


def _stored(node: onnx.NodeProto) -> TensorProto | None:
    """What a ``Constant`` holds; not where it is sparse or words."""
    if node.op_type != "Constant" or len(node.attribute) != 1:
        return None
    attribute = node.attribute[0]
    if attribute.name == "value":
        tensor = TensorProto()
        tensor.CopyFrom(attribute.t)
        tensor.name = node.output[0]
        return tensor
    if attribute.name not in _NUMBERS:
        return None
    return numpy_helper.from_array(np.array(helper.get_attribute_value(attribute), _NUMBERS[attribute.name]), node.output[0])


def _absorb_factors(graph: onnx.GraphProto) -> None:
    """alpha and beta of ``Gemm`` into its constants: quantizers forget them."""
    known = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        for attribute, place in _factors(node):
            if node.input[place] in known:
                values = numpy_helper.to_array(known[node.input[place]])
                name = f"{node.output[0]}.{attribute.name}"
                graph.initializer.append(numpy_helper.from_array((values * attribute.f).astype(values.dtype), name))
                node.input[place] = name
                attribute.f = 1.0


def _spread_biases(graph: onnx.GraphProto) -> None:
    """C of ``Gemm`` to one number per output, (O,): it may be a scalar or a row, which quantizers do not take."""
    known = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "Gemm" or len(node.input) < 3 or node.input[1] not in known or node.input[2] not in known:
            continue
        transposed = any(attribute.name == "transB" and attribute.i for attribute in node.attribute)
        outputs = known[node.input[1]].dims[0 if transposed else 1]
        values = numpy_helper.to_array(known[node.input[2]])
        row = values.shape[-1:] == (outputs,) and values.size == outputs
        if values.shape != (outputs,) and (row or values.size == 1):
            name = f"{node.output[0]}.bias"
            graph.initializer.append(numpy_helper.from_array(np.broadcast_to(values.reshape(-1), (outputs,)).copy(), name))
            node.input[2] = name


def _factors(node: onnx.NodeProto) -> Iterator[tuple[onnx.AttributeProto, int]]:
    """With the input that each is a factor of."""
    places = {"alpha": 1, "beta": 2} if node.op_type == "Gemm" else {}
    for attribute in node.attribute:
        place = places.get(attribute.name, 0)
        if 0 < place < len(node.input) and attribute.f != 1.0:
            yield attribute, place
