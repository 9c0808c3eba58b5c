"""A captured graph that takes images as cameras and decoders give them, uint8 (B,H,W,C), and normalizes them itself.

What is added in front is as little as is exact. (x/255 - mean)/std is (x - 255 mean) scaled by 1/(255 std), and a convolution
of scaled channels is a convolution with scaled weights, padding or not: zeros stay zeros. The shift goes into its bias only
where it pads nothing, as in the patches of a transformer, because padding would be zeros before the shift and not behind it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fofa_deploy.errors import GraphError
from fofa_deploy.types import Preprocessing, Sidecar, TensorSpec

INPUT = "pixels"

Doubles = NDArray[np.float64]


def take_pixels(model: onnx.ModelProto, sidecar: Sidecar) -> tuple[onnx.ModelProto, Sidecar]:
    """The same function of unnormalized pixels: a graph with an input ``pixels``, uint8 (B,H,W,C), and its sidecar.

    A graph that has a tensor of that name already gets an input ``pixels_``.

    Args:
        model: of one float32 input (B,C,H,W), that of the sidecar; it is not changed.

    Raises:
        GraphError: its input is another one.
    """
    if (sidecar.input.dtype, sidecar.layout) != ("float32", "NCHW"):
        problem = f"{sidecar.model} takes images in {sidecar.input.dtype}, {sidecar.layout}"
        raise GraphError(problem, "leave it as it is: pixels are put in front of float32, NCHW alone")
    out = onnx.ModelProto()
    out.CopyFrom(model)
    name = _unused(INPUT, out.graph)
    nodes = _front(out.graph, name, sidecar.input.name, sidecar.preprocessing)
    nodes.extend(out.graph.node)
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    (value,) = (value for value in out.graph.input if value.name == sidecar.input.name)
    batch, channels, *sides = value.type.tensor_type.shape.dim
    taken = helper.make_tensor_value_info(name, TensorProto.UINT8, ["", "", "", ""])
    for dim, known in zip(taken.type.tensor_type.shape.dim, (batch, *sides, channels), strict=True):
        dim.CopyFrom(known)
    value.CopyFrom(taken)
    shape = tuple(sidecar.input.shape[place] for place in (0, 2, 3, 1))
    spec = TensorSpec(name=name, shape=shape, dtype="uint8")
    return out, sidecar.model_copy(update={"input": spec, "layout": "NHWC"})


def _unused(name: str, graph: onnx.GraphProto) -> str:
    """The name, lengthened until no tensor of the graph has it: a file of others may call its own input so."""
    taken = {value.name for value in (*graph.input, *graph.initializer)} | {output for node in graph.node for output in node.output}
    while name in taken:
        name += "_"
    return name


def _front(graph: onnx.GraphProto, pixels: str, images: str, preprocessing: Preprocessing) -> list[onnx.NodeProto]:
    """Nodes from ``pixels`` to ``images``; what their reader can do is folded into it."""
    nodes = [
        helper.make_node("Cast", [pixels], [f"{pixels}/float"], f"{pixels}/cast", to=TensorProto.FLOAT),
        helper.make_node("Transpose", [f"{pixels}/float"], [f"{pixels}/channels"], f"{pixels}/transpose", perm=[0, 3, 1, 2]),
    ]
    for operator, values in _left(graph, images, preprocessing):
        name = f"{pixels}/{operator.lower()}"
        # A row as wide as the image: ONNX Runtime may transpose last, and three numbers are dear to broadcast by themselves.
        rows = np.repeat(values.astype(np.float32).reshape(-1, 1, 1), preprocessing.image_size[1], axis=2)
        graph.initializer.append(numpy_helper.from_array(rows, f"{name}/constant"))
        nodes.append(helper.make_node(operator, [nodes[-1].output[0], f"{name}/constant"], [name], name))
    nodes[-1].output[0] = images
    return nodes


def _left(graph: onnx.GraphProto, images: str, preprocessing: Preprocessing) -> list[tuple[str, Doubles]]:
    """The operators, each with its constant (C,), that remain when the reader of the images has taken what it can."""
    mean = 255 * np.asarray(preprocessing.mean, np.float64)
    std = 255 * np.asarray(preprocessing.std, np.float64)
    weights = {tensor.name: tensor for tensor in graph.initializer}
    reader = _only_convolution(graph, images, weights)
    if reader is None:
        return [("Sub", mean), ("Div", std)]  # a quotient, not a product: quantizers leave it in float
    kernels = _scaled(numpy_helper.to_array(weights[reader.input[1]]), 1 / std)
    bias = _shifted(reader, kernels, mean, weights)
    _own(graph, reader, 1, kernels)
    if bias is not None:
        _own(graph, reader, 2, bias)
    return [("Sub", mean)] if bias is None and mean.any() else []


def _only_convolution(graph: onnx.GraphProto, images: str, weights: dict[str, onnx.TensorProto]) -> onnx.NodeProto | None:
    """The one convolution with known weights that alone reads the images; their shape may be asked for beside it."""
    if any(attribute.HasField("g") or attribute.graphs for node in graph.node for attribute in node.attribute):
        return None  # a branch may read what its surroundings hold
    readers = [node for node in graph.node if images in node.input and node.op_type != "Shape"]
    alone = len(readers) == 1 and readers[0].op_type == "Conv" and images not in readers[0].input[1:]
    return readers[0] if alone and readers[0].input[1] in weights else None


def _scaled(kernels: NDArray[np.floating[Any]], scale: Doubles) -> Doubles:
    """Kernels (O,C/groups,...) for inputs whose channels (C,) are yet to be multiplied by ``scale``."""
    outputs, depth = kernels.shape[:2]
    per_output = np.repeat(scale.reshape(-1, depth), outputs * depth // len(scale), axis=0)
    return np.asarray(kernels * per_output.reshape(outputs, depth, *[1] * (kernels.ndim - 2)), np.float64)


def _shifted(node: onnx.NodeProto, kernels: Doubles, mean: Doubles, weights: dict[str, onnx.TensorProto]) -> Doubles | None:
    """The bias (O,) for inputs from which ``mean`` (C,) is yet to be taken; None where no bias can do that."""
    told = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    pads = any(told.get("pads", ())) or told.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    stored = node.input[2] if len(node.input) > 2 else ""
    if pads or (stored and stored not in weights):
        return None
    bias = numpy_helper.to_array(weights[stored]) if stored else np.zeros(len(kernels))
    return np.asarray(bias - _scaled(kernels, mean).reshape(len(kernels), -1).sum(1), np.float64)


def _own(graph: onnx.GraphProto, node: onnx.NodeProto, place: int, values: Doubles) -> None:
    """Give a node a constant of its own; the old one goes where nobody else reads it."""
    old = node.input[place] if place < len(node.input) else ""
    name = f"{old or node.output[0]}/{INPUT}"
    if place < len(node.input):
        node.input[place] = name
    else:
        node.input.append(name)
    graph.initializer.append(numpy_helper.from_array(values.astype(np.float32), name))
    if old and not any(old in other.input for other in graph.node):
        kept = [tensor for tensor in graph.initializer if tensor.name != old]
        del graph.initializer[:]
        graph.initializer.extend(kept)
