"""onnxruntime's own operators in place of what exporters write out in many: GELU and attention.

They compute the same without the copies in between. A pattern is replaced where it is whole; what nobody reads any more goes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper, shape_inference

from fofa_exporters import _onnx

DOMAIN = "com.microsoft"
_SPLIT_BY_INPUT = 13
"""The first opset whose ``Split`` takes lengths as an input, and whose ``Softmax`` is of one axis."""
_SWAPPED = [0, 2, 1, 3]
"""(B,N,H,D) -> (B,H,N,D), and back."""
_BY_HEADS = [2, 0, 3, 1, 4]
"""(B,N,3,H,D) -> (3,B,H,N,D)."""


def fused(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with those operators; the same graph where there is nothing to fuse, or what is there cannot be told for sure."""
    if not _is_plain(model):
        return model
    graph = _Graph(model)
    for rule in _RULES:
        for node in list(graph.nodes):
            if found := rule(graph, node):
                graph.replace(*found)
    return graph.model() if graph.changed else model


def written_out(model: onnx.ModelProto) -> list[str]:
    """Names of the operators that make up GELUs: in int8 one by one they are slower, and round four times where one would do."""
    if not _is_plain(model):
        return []
    graph, found = _Graph(model), []
    for node in graph.nodes:
        if replacement := _gelu(graph, node):
            found += graph.between(replacement.new[0].input[0], node)
    return [node.name for node in found]


def _is_plain(model: onnx.ModelProto) -> bool:
    """No branches, which read what nobody sees, and operators as the rules know them."""
    return not _onnx.has_branches(model) and not _onnx.is_older(model, _SPLIT_BY_INPUT)


class _Graph:
    """A copy of a model that knows who writes a tensor, what is constant, and shapes as far as they can be inferred."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = onnx.ModelProto()
        self._model.CopyFrom(model)
        self.nodes = list(self._model.graph.node)
        self.changed = False
        self._known = {tensor.name: tensor for tensor in self._model.graph.initializer}
        self._writers = {name: node for node in self.nodes for name in node.output}
        inferred = shape_inference.infer_shapes(model).graph
        self._inferred = {value.name: value for value in inferred.value_info}
        self.shapes = {value.name: _shape(value) for value in (*inferred.value_info, *inferred.input)}

    def before(self, name: str, kind: str) -> onnx.NodeProto | None:
        """Who writes a tensor, where that is an operator of this kind."""
        node = self._writers.get(name)
        return node if node is not None and node.op_type == kind else None

    def value(self, name: str) -> np.ndarray | None:
        """Of a constant."""
        return numpy_helper.to_array(self._known[name]) if name in self._known else None

    def number(self, name: str) -> float | None:
        """Of a constant of one element, and no more than one axis: what it is multiplied with keeps its shape."""
        value = self.value(name)
        return float(value.item()) if value is not None and value.size == 1 and value.ndim < 2 else None

    def between(self, start: str, end: onnx.NodeProto) -> list[onnx.NodeProto]:
        """The nodes that lead from a tensor to a node, that one included."""
        found, ahead = [], [end]
        while ahead:
            found.append(node := ahead.pop())
            ahead += [self._writers[name] for name in node.input if name in self._writers and name != start]
        return found

    def replace(self, old: list[onnx.NodeProto], new: list[onnx.NodeProto], tensors: Iterable[onnx.TensorProto] = ()) -> None:
        """Put the new nodes where the first of the old ones was."""
        place = next(place for place, node in enumerate(self.nodes) if node is old[0])
        self.nodes[place:place] = new
        self.nodes = [node for node in self.nodes if not any(node is gone for gone in old)]
        self._writers |= {name: node for node in new for name in node.output}
        self._known |= {tensor.name: tensor for tensor in tensors}
        self.changed = True

    def model(self) -> onnx.ModelProto:
        """The nodes and constants that an output needs; with all shapes, as nobody can infer them through these operators."""
        graph, needed, kept = self._model.graph, {value.name for value in self._model.graph.output}, []
        for node in reversed(self.nodes):
            if needed & set(node.output):
                needed |= set(node.input)
                kept.append(node)
        nodes, tensors = kept[::-1], [tensor for name, tensor in self._known.items() if name in needed]
        shapes = [value for name, value in self._inferred.items() if name in needed]
        for field, found in ((graph.node, nodes), (graph.initializer, tensors), (graph.value_info, shapes)):
            copied = [type(one).FromString(one.SerializeToString()) for one in found]
            del field[:]
            field.extend(copied)
        if DOMAIN not in {opset.domain for opset in self._model.opset_import}:
            self._model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
        return self._model


def _shape(value: onnx.ValueInfoProto) -> tuple[int | str, ...]:
    return tuple(side.dim_value or side.dim_param for side in value.type.tensor_type.shape.dim)


def _attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}


class _Replacement(NamedTuple):
    old: list[onnx.NodeProto]
    new: list[onnx.NodeProto]
    tensors: tuple[onnx.TensorProto, ...] = ()


# --- rules --------------------------------------------------------------------------------------------------------


def _gelu(graph: _Graph, node: onnx.NodeProto) -> _Replacement | None:
    """x * 0.5 * (1 + erf(x / sqrt 2)), in any order of the factors."""
    if node.op_type != "Mul":
        return None
    factors = [part for name in node.input for part in _factors(graph, name)]
    halves = [name for name in factors if graph.number(name) == 0.5]
    rest = [name for name in factors if name not in halves]
    for name, other in (rest, rest[::-1]) if (len(halves), len(rest)) == (1, 2) else ():
        if _erf_of(graph, other) == name:
            gelu = helper.make_node("Gelu", [name], [node.output[0]], name=f"{node.output[0]}.gelu", domain=DOMAIN)
            return _Replacement([node], [gelu])
    return None


def _factors(graph: _Graph, name: str) -> list[str]:
    product = graph.before(name, "Mul")
    return list(product.input) if product is not None else [name]


def _erf_of(graph: _Graph, name: str) -> str | None:
    """x, of 1 + erf(x / sqrt 2)."""
    added = graph.before(name, "Add")
    erf = next(filter(None, (graph.before(part, "Erf") for part in added.input)), None) if added is not None else None
    if added is None or erf is None or 1.0 not in map(graph.number, added.input):
        return None
    for kind, factor in (("Div", math.sqrt(2)), ("Mul", math.sqrt(0.5))):
        scaled = graph.before(erf.input[0], kind)
        if scaled is not None and math.isclose(graph.number(scaled.input[1]) or 0.0, factor, rel_tol=1e-6):
            return str(scaled.input[0])
    return None


def _attention(graph: _Graph, node: onnx.NodeProto) -> _Replacement | None:
    """softmax(q k^T * scale) v, brought back from (B,H,N,D) to (B,N,C)."""
    turned = graph.before(node.input[0], "Transpose") if node.op_type == "Reshape" else None
    context = graph.before(turned.input[0], "MatMul") if turned is not None and _turns(turned, _SWAPPED) else None
    softmax = graph.before(context.input[0], "Softmax") if context is not None else None
    if context is None or softmax is None or _attributes(softmax).get("axis", -1) not in (-1, 3):
        return None
    scores, outer = _scaled(graph, softmax.input[0])
    product = graph.before(scores, "MatMul")
    if product is None:
        return None
    (query, one), (key, two) = (_scaled(graph, name) for name in product.input)
    parts = [_part(graph, query), _keys(graph, key), _part(graph, context.input[1])]
    known = [part for part in parts if part is not None]
    if len(known) < 3 or len({(part.heads, part.depth, graph.shapes[part.source][0]) for part in known}) > 1:
        return None
    return _joined(graph, node, known, outer * one * two)


def _joined(graph: _Graph, node: onnx.NodeProto, parts: Sequence[_Part], scale: float) -> _Replacement | None:
    """One operator on three tensors (B,N,C), cut from wider ones where they lie side by side."""
    name, heads, width = node.output[0], parts[0].heads, parts[0].heads * parts[0].depth
    shape, tokens = graph.value(node.input[1]), graph.shapes[parts[0].source][1]
    if shape is None or len(shape) != 3 or int(shape[2]) not in (width, -1):
        return None
    if int(shape[1]) not in (0, tokens) and [*shape[:2]] != [0, -1]:
        return None
    cuts: dict[str, onnx.NodeProto] = {}
    tensors = []
    for part in parts:
        if part.parts > 1 and part.source not in cuts:
            outputs = [f"{name}.{len(cuts)}.{place}" for place in range(part.parts)]
            tensors.append(numpy_helper.from_array(np.array([width] * part.parts), f"{name}.{len(cuts)}.widths"))
            cuts[part.source] = helper.make_node("Split", [part.source, tensors[-1].name], outputs, axis=2)
    inputs = [cuts[part.source].output[part.place] if part.parts > 1 else part.source for part in parts]
    joined = helper.make_node(
        "MultiHeadAttention", inputs, [name], f"{name}.attention", domain=DOMAIN, num_heads=heads, scale=scale
    )
    return _Replacement([node], [*cuts.values(), joined], tuple(tensors))


class _Part(NamedTuple):
    """Queries, keys or values: the tensor (B,N,parts*heads*depth) that they lie in, and which part of it they are."""

    source: str
    place: int
    parts: int
    heads: int
    depth: int


def _part(graph: _Graph, name: str) -> _Part | None:
    """Cut before the axes are turned or after it: exporters write the one, onnxruntime's optimizer makes the other of it."""
    if (alone := _reshaped(graph, _unturned(graph, name, _SWAPPED), 2)) is not None:
        return _Part(alone[0], 0, 1, *alone[1])
    gathered, squeezed = graph.before(name, "Gather"), graph.before(name, "Squeeze")
    inner = squeezed.input[0] if squeezed is not None and len(squeezed.input) > 1 and graph.number(squeezed.input[1]) == 0 else ""
    if whole := _unturned(graph, inner, _BY_HEADS):
        found = _entry(graph, whole, 2)
    else:
        found = _gathered(graph, gathered) if gathered is not None else _entry(graph, inner, 0)
        found = found and (_unturned(graph, found[0], _BY_HEADS), found[1])
    reshaped = _reshaped(graph, found[0], 3) if found else None
    return _Part(reshaped[0], found[1], *reshaped[1]) if found and reshaped else None


def _keys(graph: _Graph, name: str) -> _Part | None:
    """Keys with the last two axes swapped."""
    if (alone := _reshaped(graph, _unturned(graph, name, [0, 2, 3, 1]), 2)) is not None:
        return _Part(alone[0], 0, 1, *alone[1])
    return _part(graph, _untransposed(graph, name))


def _reshaped(graph: _Graph, name: str, axes: int) -> tuple[str, list[int]] | None:
    """The tensor (B,N,C) whose last axis was split into this many, and their lengths."""
    node = graph.before(name, "Reshape")
    shape = graph.value(node.input[1]) if node is not None else None
    before = graph.shapes.get(node.input[0], ()) if node is not None else ()
    if node is None or shape is None or len(shape) != 2 + axes or len(before) != 3 or shape[1] != before[1]:
        return None
    split = [int(side) for side in shape[2:]]
    return (str(node.input[0]), split) if math.prod(split) == before[2] and min(split) > 0 else None


def _unturned(graph: _Graph, name: str, order: list[int]) -> str:
    turned = graph.before(name, "Transpose")
    return str(turned.input[0]) if turned is not None and _turns(turned, order) else ""


def _gathered(graph: _Graph, node: onnx.NodeProto) -> tuple[str, int] | None:
    place = graph.number(node.input[1])
    return (node.input[0], int(place)) if place is not None and not _attributes(node).get("axis", 0) else None


def _entry(graph: _Graph, name: str, axis: int) -> tuple[str, int] | None:
    """The tensor of which this is one entry along an axis, and which one."""
    if (split := graph.before(name, "Split")) is not None:
        lengths = graph.value(split.input[1]) if len(split.input) > 1 else np.ones(1)
        single = lengths is not None and (lengths == 1).all() and _attributes(split).get("axis", 0) == axis
        return (split.input[0], list(split.output).index(name)) if single else None
    sliced = graph.before(name, "Slice")
    bounds = [graph.number(bound) for bound in sliced.input[1:4]] if sliced is not None else []
    if sliced is None or len(bounds) < 3 or bounds[0] is None or bounds[1:] != [bounds[0] + 1, axis]:
        return None
    return sliced.input[0], int(bounds[0])


def _untransposed(graph: _Graph, name: str) -> str:
    """Keys, of what has their last two axes swapped: directly, or by PyTorch's exporter, on three axes between two reshapes."""
    if (turned := graph.before(name, "Transpose")) is not None and _turns(turned, [0, 1, 3, 2]):
        return str(turned.input[0])
    last = graph.before(name, "Reshape")
    turned = graph.before(last.input[0], "Transpose") if last is not None else None
    first = graph.before(turned.input[0], "Reshape") if turned is not None and _turns(turned, [0, 2, 1]) else None
    if last is None or first is None:
        return ""
    before, joined, after = (graph.shapes.get(name, ()) for name in (first.input[0], first.output[0], last.output[0]))
    kept = len(before) == 4 and _agree(joined[1:], before[2:]) and _agree(after[1:], (before[1], before[3], before[2]))
    return str(first.input[0]) if kept else ""


def _agree(one: Sequence[int | str], other: Sequence[int | str]) -> bool:
    """As far as is known: exporters compute some shapes while running."""
    both = [pair for pair in zip(one, other, strict=False) if all(isinstance(side, int) for side in pair)]
    return len(one) == len(other) and all(left == right for left, right in both)


def _turns(node: onnx.NodeProto, order: list[int]) -> bool:
    return _attributes(node).get("perm") == order


def _scaled(graph: _Graph, name: str) -> tuple[str, float]:
    """A tensor and the number that it is multiplied by."""
    product = graph.before(name, "Mul")
    number = graph.number(product.input[1]) if product is not None else None
    return (product.input[0], number) if product is not None and number is not None else (name, 1.0)


_RULES: tuple[Callable[[_Graph, onnx.NodeProto], _Replacement | None], ...] = (_gelu, _attention)
