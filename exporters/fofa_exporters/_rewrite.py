"""Operators that a runtime lacks, written with operators that it has; the results are the same, rounding included."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference


def expand_col2im(model: onnx.ModelProto) -> onnx.ModelProto:
    """``Col2Im`` as a transposed convolution whose kernels each move one value to its place.

    Nodes whose image or block shape is computed while running stay as they are.
    """
    nodes = [node for node in model.graph.node if node.op_type == "Col2Im"]
    if not nodes:
        return model
    inferred = shape_inference.infer_shapes(model)
    out = onnx.ModelProto()
    out.CopyFrom(model)
    widths = {value.name: value.type.tensor_type.shape.dim[1].dim_value for value in inferred.graph.value_info if _rank(value) == 3}
    known = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for index, node in reversed(list(enumerate(model.graph.node))):
        width = widths.get(node.input[0], 0) if node.op_type == "Col2Im" else 0
        if width and known.keys() >= {node.input[1], node.input[2]}:
            tensors, replacement = _moved(node, width, known[node.input[1]], known[node.input[2]])
            del out.graph.node[index]
            for new in reversed(replacement):
                out.graph.node.insert(index, new)
            out.graph.initializer.extend(tensors)
    return out


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _moved(
    node: onnx.NodeProto, width: int, image: np.ndarray, block: np.ndarray
) -> tuple[list[onnx.TensorProto], list[onnx.NodeProto]]:
    """Columns (B,width,L) -> (B,width,*places), then one group of one-hot kernels per channel of the image."""
    attributes = {attribute.name: list(helper.get_attribute_value(attribute)) for attribute in node.attribute}
    ones, taps = [1] * len(block), int(block.prod())
    strides, dilations = attributes.get("strides", ones), attributes.get("dilations", ones)
    pads = np.reshape(attributes.get("pads", [0] * 2 * len(block)), (2, -1))
    reach = np.multiply(dilations, block - 1) + 1
    places = (image + pads.sum(0) - reach) // strides + 1
    # What a transposed convolution would cut off or lack at the far end, where the image is no whole number of strides.
    excess = (places - 1) * strides + reach - pads[0] - image
    kernels = np.tile(np.eye(taps, dtype=np.float32), (width // taps, 1)).reshape(width, 1, *block)
    shape = np.array([0, 0, *places], np.int64)
    name = node.output[0]
    tensors = [numpy_helper.from_array(shape, f"{name}.shape"), numpy_helper.from_array(kernels, f"{name}.kernels")]
    moved = helper.make_node(
        "ConvTranspose",
        [f"{name}.columns", f"{name}.kernels"],
        [name],
        name=node.name,
        group=width // taps,
        strides=strides,
        dilations=dilations,
        pads=[*map(int, pads[0]), *map(int, np.maximum(excess, 0))],
        output_padding=list(map(int, np.maximum(-excess, 0))),
    )
    reshaped = helper.make_node("Reshape", [node.input[0], f"{name}.shape"], [f"{name}.columns"], name=f"{node.name}.reshape")
    return tensors, [reshaped, moved]
