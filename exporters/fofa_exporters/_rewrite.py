"""Operators that a runtime or a quantizer cannot take, written with others; the results are the same, rounding included."""

from __future__ import annotations

import math
from collections import Counter, defaultdict

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from fofa_exporters import _onnx

_HARD_SWISH = 14
"""The first opset that has it."""


def expand_col2im(model: onnx.ModelProto) -> onnx.ModelProto:
    """``Col2Im`` as a transposed convolution whose kernels each move one value to its place.

    Nodes whose image or block shape is computed while running stay as they are.
    """
    nodes = [node for node in model.graph.node if node.op_type == "Col2Im"]
    if not nodes:
        return model
    inferred = shape_inference.infer_shapes(model)
    widths = {value.name: value.type.tensor_type.shape.dim[1].dim_value for value in inferred.graph.value_info if _rank(value) == 3}
    known = _constants(model)
    found = {
        node.output[0]: _moved(node, widths[node.input[0]], known[node.input[1]], known[node.input[2]])
        for node in nodes
        if widths.get(node.input[0]) and known.keys() >= {node.input[1], node.input[2]}
    }
    return _replaced(model, found)


def flatten_scales(model: onnx.ModelProto) -> onnx.ModelProto:
    """``Mul`` and ``Div`` by a constant map before a convolution whose kernel is as large as the map, done on flattened maps.

    OpenVINO 2026.4 takes such a map for a factor of the kernel, and folds it in there.
    """
    known = _constants(model)
    kernels = {node.input[0]: known[node.input[1]].shape[2:] for node in model.graph.node if _convolves(node, known)}
    products = [node for node in model.graph.node if node.op_type in ("Mul", "Div") and node.output[0] in kernels]
    places = [(node, place) for node in products for place in ((1, 0) if node.op_type == "Mul" else (1,))]
    found = [(node, place) for node, place in places if _map(node, place, known) == kernels[node.output[0]]]
    if not found:
        return model
    sides = sides_of(model)
    scales = [(node, place) for node, place in found if _is_map(sides.get(node.input[1 - place], []), kernels[node.output[0]])]
    return _replaced(model, {node.output[0]: _flattened(node, place, known[node.input[place]]) for node, place in scales})


def _is_map(sides: list[int], kernel: tuple[int, ...]) -> bool:
    """Of that size, and not yet to be stretched to it."""
    return len(sides) == 4 and tuple(sides[2:]) == kernel


def flatten_gathers(model: onnx.ModelProto) -> onnx.ModelProto:
    """``Gather`` by a constant table of places done by a list of them.

    OpenVINO 2026.4 moves a scale per channel behind it without a thought for the axes that a table adds. Nodes whose result
    has an axis of unknown size, but for the first, stay as they are.
    """
    known = _constants(model)
    gathers = [n for n in model.graph.node if n.op_type == "Gather" and n.input[1] in known and known[n.input[1]].ndim > 1]
    if not gathers:
        return model
    sides = sides_of(model)
    sized = [gather for gather in gathers if all(sides.get(gather.output[0], [0, 0])[1:])]
    return _replaced(model, {n.output[0]: _listed(n, known[n.input[1]], sides[n.output[0]]) for n in sized})


def pool_globally(model: onnx.ModelProto) -> onnx.ModelProto:
    """``ReduceMean`` over height and width as ``GlobalAveragePool``, which onnxruntime 1.32 has in int8; of a mean it has a float
    kernel alone, and copies to it and from it."""
    means = [node for node in model.graph.node if node.op_type == "ReduceMean"]
    if not means:
        return model
    known, kinds = _constants(model), _shaped(model)
    maps = {name for name, kind in kinds.items() if len(kind.shape.dim) == 4 and kind.elem_type == onnx.TensorProto.FLOAT}
    found = {node.output[0]: _pooled(node) for node in means if node.input[0] in maps and _axes(node, known) in ([2, 3], [-2, -1])}
    return _replaced(model, found)


def _axes(node: onnx.NodeProto, known: dict[str, np.ndarray]) -> list[int]:
    """An attribute of old, an input since opset 18; none where it is not constant."""
    if len(node.input) > 1:
        return sorted(map(int, known.get(node.input[1], np.zeros(0)).ravel()))
    return sorted(next((attribute.ints for attribute in node.attribute if attribute.name == "axes"), []))


def _pooled(node: onnx.NodeProto) -> Replacement:
    name, kept = node.output[0], next((attribute.i for attribute in node.attribute if attribute.name == "keepdims"), 1)
    pooled = helper.make_node("GlobalAveragePool", node.input[:1], [name if kept else f"{name}.map"], node.name)
    flat = helper.make_node("Flatten", [f"{name}.map"], [name], f"{node.name}.flatten")
    return [], [pooled] if kept else [pooled, flat]


def saturate_gates(model: onnx.ModelProto) -> onnx.ModelProto:
    """``HardSigmoid`` between Q/DQ pairs as an addition: ``QuantizeLinear`` clips it for nothing.

    clip(a x + b, 0, 1) is a clip(x + b/a, 0, 1/a): a sum stored in steps of 1/(255 a) and read in steps of 1/255. onnxruntime 1.32
    has no ``HardSigmoid`` in int8, and adds in it. Graphs with branches, which may read the gate, stay as they are.
    """
    if _onnx.has_branches(model):
        return model
    readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            readers[name].append(node)
    dequantized = {node.output[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    unsigned = {tensor.name for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.UINT8}
    outputs = {value.name for value in model.graph.output}
    found: dict[str, Replacement] = {}
    for gate in model.graph.node:
        if gate.op_type != "HardSigmoid" or gate.input[0] not in dequantized or gate.output[0] in outputs:
            continue
        behind = readers[gate.output[0]]
        if [node.op_type for node in behind] == ["QuantizeLinear"] and behind[0].input[-1] in unsigned:
            found |= _saturated(gate, behind[0], readers[behind[0].output[0]])
    return _replaced(model, found)


def _saturated(gate: onnx.NodeProto, pair: onnx.NodeProto, behind: list[onnx.NodeProto]) -> dict[str, Replacement]:
    (slope, offset), name = _slope(gate), gate.output[0]
    if slope <= 0 or offset <= 0 or any(node.op_type != "DequantizeLinear" for node in behind):
        return {}
    scales = {"term.scale": offset / slope / 255, "sum.scale": 1 / slope / 255, "scale": 1 / 255}
    stored = {part: np.array(value, np.float32) for part, value in scales.items()}
    stored |= {"term": np.array(255, np.uint8), "zero": np.array(0, np.uint8)}
    term, term_scale, sum_scale, scale, zero, real = (
        f"{name}.{part}" for part in ("term", "term.scale", "sum.scale", "scale", "zero", "term.real")
    )
    added = [
        helper.make_node("DequantizeLinear", [term, term_scale, zero], [real], f"{gate.name}.term"),
        helper.make_node("Add", [gate.input[0], real], [name], gate.name),
    ]
    tensors = [numpy_helper.from_array(value, f"{name}.{part}") for part, value in stored.items()]
    written = helper.make_node("QuantizeLinear", [name, sum_scale, zero], pair.output, pair.name)
    read: dict[str, Replacement] = {
        node.output[0]: ([], [helper.make_node("DequantizeLinear", [pair.output[0], scale, zero], node.output, node.name)])
        for node in behind
    }
    return {name: (tensors, added), pair.output[0]: ([], [written]), **read}


def join_hard_swish(model: onnx.ModelProto) -> onnx.ModelProto:
    """x * HardSigmoid(x) as ``HardSwish``: onnxruntime's optimizer takes it apart, and OpenVINO does a whole one with the
    convolution before it. Not in graphs with branches, which may read the gate."""
    if _onnx.is_older(model, _HARD_SWISH) or _onnx.has_branches(model):
        return model
    gates = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "HardSigmoid" and _is_sixth(node)}
    readers = Counter(name for node in model.graph.node for name in node.input)
    found: dict[str, Replacement] = {}
    for node in model.graph.node:
        for x, gate in (node.input, [*node.input][::-1]) if node.op_type == "Mul" else ():
            if gates.get(gate) == x:
                found[node.output[0]] = [], [helper.make_node("HardSwish", [x], node.output, node.name)]
                readers[gate] -= 1
    outputs = {value.name for value in model.graph.output}
    idle: dict[str, Replacement] = {gate: ([], []) for gate in gates if not readers[gate] and gate not in outputs}
    return _replaced(model, found | idle)


def _is_sixth(gate: onnx.NodeProto) -> bool:
    slope, offset = _slope(gate)
    return math.isclose(slope, 1 / 6, rel_tol=1e-5) and math.isclose(offset, 0.5, rel_tol=1e-5)


def _slope(gate: onnx.NodeProto) -> tuple[float, float]:
    """a and b of clip(a x + b, 0, 1)."""
    told = {"alpha": 0.2, "beta": 0.5} | {attribute.name: attribute.f for attribute in gate.attribute}
    return told["alpha"], told["beta"]


def absorb_endless_pads(model: onnx.ModelProto) -> onnx.ModelProto:
    """``Pad`` with minus infinity before a ``MaxPool`` as that one's own padding: no range holds what it writes.

    Not in graphs with branches, which may read what was padded.
    """
    if _onnx.has_branches(model):
        return model
    known = _constants(model)
    readers = Counter(name for node in model.graph.node for name in node.input)
    outputs = {value.name for value in model.graph.output}
    if not any(_is_endless(node, known) for node in model.graph.node):
        return model
    out = onnx.ModelProto()
    out.CopyFrom(model)
    pads = {node.output[0]: node for node in out.graph.node if _is_endless(node, known)}
    for pool in list(out.graph.node):
        pad = pads.get(pool.input[0]) if pool.op_type == "MaxPool" else None
        if pad is None or readers[pad.output[0]] > 1 or pad.output[0] in outputs:
            continue
        if (sides := _joint_pads(pool, known[pad.input[1]])) is not None:
            kept = [attribute for attribute in pool.attribute if attribute.name != "pads"]
            del pool.attribute[:]
            pool.attribute.extend([*kept, helper.make_attribute("pads", sides)])
            pool.input[0] = pad.input[0]
            out.graph.node.remove(pad)
    return out


def _is_endless(node: onnx.NodeProto, known: dict[str, np.ndarray]) -> bool:
    if node.op_type != "Pad" or len(node.input) != 3 or not known.keys() >= set(node.input[1:]):
        return False
    mode = next((helper.get_attribute_value(attribute) for attribute in node.attribute if attribute.name == "mode"), b"constant")
    return mode == b"constant" and bool(np.isneginf(known[node.input[2]]))


def _joint_pads(pool: onnx.NodeProto, added: np.ndarray) -> list[int] | None:
    """Of both, begins then ends; None where the pool cannot have them."""
    told = {attribute.name: helper.get_attribute_value(attribute) for attribute in pool.attribute}
    kernel, sides = np.array(told["kernel_shape"]), added.reshape(2, -1)
    own = np.reshape(told.get("pads", [0] * 2 * len(kernel)), (2, -1))
    joint = own + sides[:, 2:]
    plain = told.get("auto_pad", b"NOTSET") == b"NOTSET" and not told.get("ceil_mode", 0) and len(pool.output) == 1
    return (
        [*map(int, joint.flatten())] if plain and not sides[:, :2].any() and (joint < kernel).all() and (sides >= 0).all() else None
    )


def drop_endless_clips(model: onnx.ModelProto) -> onnx.ModelProto:
    """``Clip`` between infinities as ``Identity``: onnxruntime 1.32 leaves a product before a ``Clip`` in float."""
    clips = [node for node in model.graph.node if node.op_type == "Clip"]
    known = _constants(model) if clips else {}
    endless = [clip for clip in clips if [_number(known.get(name)) for name in clip.input[1:]] == [-np.inf, np.inf]]
    made = {clip.output[0]: helper.make_node("Identity", clip.input[:1], clip.output, clip.name) for clip in endless}
    return _replaced(model, {name: ([], [node]) for name, node in made.items()})


def _number(value: np.ndarray | None) -> float | None:
    return float(value.item()) if value is not None and value.size == 1 else None


Replacement = tuple[list[onnx.TensorProto], list[onnx.NodeProto]]
"""Constants, and the nodes that read them."""


def _constants(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def _replaced(model: onnx.ModelProto, found: dict[str, Replacement]) -> onnx.ModelProto:
    """With other nodes for those that write these tensors; the model itself is left alone."""
    if not found:
        return model
    out = onnx.ModelProto()
    out.CopyFrom(model)
    nodes = [new for node in model.graph.node for new in (found[node.output[0]][1] if node.output[0] in found else [node])]
    del out.graph.node[:]
    out.graph.node.extend(nodes)
    out.graph.initializer.extend(tensor for tensors, _ in found.values() for tensor in tensors)
    return out


def _convolves(node: onnx.NodeProto, known: dict[str, np.ndarray]) -> bool:
    return node.op_type == "Conv" and node.input[1] in known and known[node.input[1]].ndim == 4


def _shaped(model: onnx.ModelProto) -> dict[str, onnx.TypeProto.Tensor]:
    """Inputs and computed tensors whose number of axes is known or can be inferred."""
    inferred = shape_inference.infer_shapes(model).graph
    kinds = {value.name: value.type.tensor_type for value in (*inferred.input, *inferred.value_info, *inferred.output)}
    return {name: kind for name, kind in kinds.items() if kind.HasField("shape")}


def sides_of(model: onnx.ModelProto) -> dict[str, list[int]]:
    """Lengths of the axes of tensors as far as they can be inferred, 0 where they cannot."""
    return {name: [side.dim_value for side in kind.shape.dim] for name, kind in _shaped(model).items()}


def _map(node: onnx.NodeProto, place: int, known: dict[str, np.ndarray]) -> tuple[int, ...] | None:
    """Height and width of a node's constant operand, where it has any extent."""
    value = known.get(node.input[place])
    return value.shape[-2:] if value is not None and value.ndim in (2, 3, 4) and value.shape[-2:] != (1, 1) else None


def _flattened(node: onnx.NodeProto, place: int, value: np.ndarray) -> Replacement:
    name = node.output[0]
    operands = [f"{name}.flat", f"{name}.factors"][:: 1 if place else -1]
    shapes = {"rows": np.array([0, 0, -1], np.int64), "map": np.array([0, 0, *value.shape[-2:]], np.int64)}
    shapes["factors"] = value.reshape(*value.shape[:-2], -1)
    nodes = [
        helper.make_node("Reshape", [node.input[1 - place], f"{name}.rows"], [f"{name}.flat"], name=f"{node.name}.flatten"),
        helper.make_node(node.op_type, operands, [f"{name}.scaled"], name=node.name),
        helper.make_node("Reshape", [f"{name}.scaled", f"{name}.map"], [name], name=f"{node.name}.unflatten"),
    ]
    return [numpy_helper.from_array(array, f"{name}.{kind}") for kind, array in shapes.items()], nodes


def _listed(node: onnx.NodeProto, table: np.ndarray, sides: list[int]) -> Replacement:
    name, axis = node.output[0], [attribute for attribute in node.attribute if attribute.name == "axis"]
    stored = {"places": table.ravel(), "shape": np.array([-1, *sides[1:]], np.int64)}
    gathered = helper.make_node("Gather", [node.input[0], f"{name}.places"], [f"{name}.listed"], name=node.name)
    gathered.attribute.extend(axis)
    shaped = helper.make_node("Reshape", [f"{name}.listed", f"{name}.shape"], [name], name=f"{node.name}.unflatten")
    return [numpy_helper.from_array(array, f"{name}.{kind}") for kind, array in stored.items()], [gathered, shaped]


def _rank(value: onnx.ValueInfoProto) -> int:
    return len(value.type.tensor_type.shape.dim)


def _moved(node: onnx.NodeProto, width: int, image: np.ndarray, block: np.ndarray) -> Replacement:
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
