"""What makes a quantized graph better without training.

Smoothing moves what is hard about activations into weights (Xiao et al., SmoothQuant, ICML 2023, arXiv 2211.10438). Learned
rounding chooses up or down for every weight by what its layer's output loses on real inputs, in closed form, column by column
(Frantar et al., OPTQ, ICLR 2023, arXiv 2210.17323). Bias correction takes out the mean that rounding has shifted (Nagel et al.,
Data-free quantization, ICCV 2019, arXiv 1906.04721).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from fofa_deploy.types import Calibration
from fofa_exporters import _onnx
from fofa_exporters._quantization.scheme import Scheme
from fofa_exporters._quantization.sensitivity import output_axis
from fofa_exporters._quantization.statistics import Channels, Floats, Statistics, exposed

Tensors = dict[str, TensorProto]

IMAGES, POSITIONS = 32, 48
"""Images, and positions per image, whose inputs decide the rounding of a layer."""

DAMPING = 0.01
"""Of the mean diagonal of the Gram matrix, added to it: directions that the images do not show must not be rounded wildly."""

BLOCK = 64


# --- smoothing ----------------------------------------------------------------------------------------------------


def smoothed(model: onnx.ModelProto, statistics: Statistics, strength: float) -> tuple[onnx.ModelProto, Statistics]:
    """The same function with calmer activations, and its statistics.

    Every LayerNorm that only matrix products read is divided per channel by max|x|^strength / max|w|^(1-strength), and their
    weights are multiplied by it. Of a smoothed tensor only the extremes are known: clipping criteria keep all of it.
    """
    calm = onnx.ModelProto()
    calm.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in calm.graph.initializer}
    for norm, readers in _smoothable(calm, tensors):
        weights = [numpy_helper.to_array(tensors[reader.input[1]]) for reader in readers]
        largest = np.max([np.abs(w).max(axis=output_axis(r)) for w, r in zip(weights, readers, strict=True)], axis=0)
        before = statistics.channels[norm.output[0]].largest
        factor = np.maximum(before, 1e-5) ** strength / np.maximum(largest, 1e-5) ** (1 - strength)
        factor = np.clip(factor, 1e-3, 1e3).astype(np.float32)
        for place in range(1, len(norm.input)):
            _own(calm, norm, place, numpy_helper.to_array(tensors[norm.input[place]]) / factor)
        for reader, weight in zip(readers, weights, strict=True):
            # A matrix product's weight is (in,out), a Gemm's may lie the other way round.
            _own(calm, reader, 1, weight * (factor if output_axis(reader) == 0 else factor[:, None]))
        statistics = statistics.divided(norm.output[0], factor)
    return calm, statistics


def _smoothable(
    model: onnx.ModelProto, tensors: dict[str, onnx.TensorProto]
) -> Iterator[tuple[onnx.NodeProto, list[onnx.NodeProto]]]:
    """LayerNorms with constant weights whose every reader multiplies by constant weights."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    weighted = {node.name for node in _onnx.weighted(model)}
    for norm in model.graph.node:
        behind = readers.get(norm.output[0], [])
        if norm.op_type != "LayerNormalization" or not behind:
            continue
        own = [*norm.input[1:], *(node.input[1] for node in behind if len(node.input) > 1)]
        products = all(n.name in weighted and n.op_type in ("MatMul", "Gemm") and n.input[0] == norm.output[0] for n in behind)
        if products and all(name in tensors for name in own) and all(len(tensors[n.input[1]].dims) == 2 for n in behind):
            yield norm, behind


def _own(model: onnx.ModelProto, node: onnx.NodeProto, place: int, values: NDArray[Any]) -> None:
    """Give a node a constant of its own: exporters let nodes share equal ones."""
    name = f"{node.input[place]}/{node.name}"
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(values, np.float32), name))
    node.input[place] = name


def _replace(tensor: onnx.TensorProto, values: NDArray[Any]) -> None:
    stored = numpy_helper.to_array(tensor)
    tensor.CopyFrom(numpy_helper.from_array(np.ascontiguousarray(values, stored.dtype), tensor.name))


# --- rounding and bias --------------------------------------------------------------------------------------------


def refine(
    written: onnx.ModelProto, prepared: onnx.ModelProto, statistics: Statistics, calibration: Calibration, scheme: Scheme
) -> None:
    """Choose the integers of a Q/DQ graph's weights anew, and correct its biases, in place."""
    tensors = {tensor.name: tensor for tensor in written.graph.initializer}
    makers = {name: node for node in written.graph.node for name in node.output}
    floats = {tensor.name: tensor for tensor in prepared.graph.initializer}
    nodes = {node.name: node for node in _onnx.weighted(prepared)}
    quantized = {n.name: n for n in written.graph.node if n.name in nodes and _is_dequantized(n.input[1], makers)}
    layers = [_Layer.of(nodes[name], node, makers[node.input[1]], floats, tensors) for name, node in quantized.items()]
    if scheme.learned_rounding:
        _round(layers, _grams(prepared, [nodes[name] for name in quantized], floats, calibration), scheme)
    if scheme.bias_correction:
        for layer in layers:
            if (channels := statistics.channels.get(nodes[layer.node.name].input[0])) is not None and len(layer.node.input) > 2:
                _shift(written, layer.node, layer.lost(channels), tensors, makers)


@dataclass(frozen=True)
class _Layer:
    """A node with quantized weights, and these before and after."""

    node: onnx.NodeProto
    folded: _Folded
    scale: Floats
    plain: TensorProto
    stored: TensorProto

    @classmethod
    def of(cls, plain: onnx.NodeProto, node: onnx.NodeProto, pair: onnx.NodeProto, floats: Tensors, tensors: Tensors) -> _Layer:
        before, (stored, scale) = floats[plain.input[1]], (tensors[name] for name in pair.input[:2])
        folded = _Folded.of(plain, tuple(before.dims))
        return cls(node, folded, folded.scales(numpy_helper.to_array(scale)), before, stored)

    @property
    def before(self) -> Floats:
        return self.folded.fold(numpy_helper.to_array(self.plain))

    def lost(self, channels: Channels) -> Floats:
        """What rounding took from the mean of every output."""
        whole = self.folded.fold(numpy_helper.to_array(self.stored)).astype(np.float32)
        change = np.einsum("gok,gk->go", self.before - whole * self.scale[..., None], self.folded.inputs(channels))
        return np.asarray(change.ravel() / _strides(self.node), np.float32)


def _strides(node: onnx.NodeProto) -> int:
    """Of a transposed convolution's taps, an output sees one in so many, on average."""
    found = next((attribute.ints for attribute in node.attribute if attribute.name == "strides"), ())
    return math.prod(found) if node.op_type == "ConvTranspose" else 1


def _round(layers: list[_Layer], grams: dict[str, Floats], scheme: Scheme) -> None:
    """Weights that several layers share are rounded once, for the inputs of all of them."""
    sharing: dict[str, list[_Layer]] = defaultdict(list)
    for layer in layers:
        sharing[layer.stored.name].append(layer)
    for first, *others in sharing.values():
        known = [grams[layer.node.name] for layer in (first, *others) if layer.node.name in grams]
        if len(known) == 1 + len(others) and all(other.folded == first.folded for other in others):
            whole = learned(first.before, np.sum(known, axis=0), first.scale, 64 if scheme.seven_bit_weights else 127)
            _replace(first.stored, first.folded.unfold(whole))


def _is_dequantized(name: str, makers: dict[str, onnx.NodeProto]) -> bool:
    return name in makers and makers[name].op_type == "DequantizeLinear"


def _shift(
    written: onnx.ModelProto, node: onnx.NodeProto, change: Floats, tensors: Tensors, makers: dict[str, onnx.NodeProto]
) -> None:
    """Add to a bias, be it stored in float or in 32 bits behind a DequantizeLinear; of one that others read, to a copy."""
    bias = node.input[2]
    shared = sum(name == bias for other in written.graph.node for name in other.input) > 1
    if bias in tensors:
        shifted = numpy_helper.to_array(tensors[bias]) + change
        if shared:
            _own(written, node, 2, shifted)
        else:
            _replace(tensors[bias], shifted)
    elif _is_dequantized(bias, makers):
        stored, scale = (tensors[part] for part in makers[bias].input[:2])
        whole = numpy_helper.to_array(stored) + np.round(change / numpy_helper.to_array(scale)).astype(np.int32)
        if shared:
            _own_pair(written, node, makers[bias], whole)
        else:
            _replace(stored, whole)


def _own_pair(written: onnx.ModelProto, node: onnx.NodeProto, pair: onnx.NodeProto, whole: NDArray[np.int32]) -> None:
    """Give a node a quantized bias of its own, in the steps of the one that it shared."""
    name = f"{pair.input[0]}/{node.name}"
    written.graph.initializer.append(numpy_helper.from_array(whole, name))
    own = helper.make_node("DequantizeLinear", [name, *pair.input[1:]], [f"{name}/dequantized"], f"{name}/dequantize")
    own.attribute.extend(pair.attribute)
    written.graph.node.insert(0, own)
    node.input[2] = own.output[0]


@dataclass(frozen=True)
class _Folded:
    """A layer's weight as (G,O,K): groups, output channels of each, inputs of each output."""

    axis: int
    """Of the output channels, in ``grouped``."""
    grouped: tuple[int, ...]
    """The weight's shape with its first axis, whatever lies along it, split into groups."""

    @classmethod
    def of(cls, node: onnx.NodeProto, shape: tuple[int, ...]) -> _Folded:
        groups = next((a.i for a in node.attribute if a.name == "group"), 1)
        return cls(output_axis(node) % len(shape) + 1, (groups, shape[0] // groups, *shape[1:]))

    @property
    def outputs(self) -> tuple[int, int]:
        return self.grouped[0], self.grouped[self.axis]

    def fold(self, weight: NDArray[Any]) -> NDArray[Any]:
        return np.moveaxis(weight.reshape(self.grouped), self.axis, 1).reshape(*self.outputs, -1)

    def unfold(self, weight: NDArray[Any]) -> NDArray[Any]:
        others = tuple(size for axis, size in enumerate(self.grouped) if axis not in (0, self.axis))
        parted = np.moveaxis(weight.reshape(*self.outputs, *others), 1, self.axis)
        return parted.reshape(-1, *self.grouped[2:])

    def scales(self, scale: Floats) -> Floats:
        """(G,O); the groups of a transposed convolution share theirs."""
        each = scale.reshape(-1, self.outputs[1]) if scale.size > 1 else scale
        return np.broadcast_to(each, self.outputs)

    def inputs(self, channels: Channels) -> Floats:
        """Mean of every input (G,K), padding not counted."""
        inner = int(np.prod(self.grouped) // np.prod(self.outputs))
        per_group = channels.mean.reshape(self.grouped[0], -1)
        return np.repeat(per_group, inner // per_group.shape[1], axis=1)


def learned(weight: Floats, gram: Floats, scale: Floats, top: int) -> Floats:
    """Whole numbers (G,O,K) that keep ``weight @ x`` for the x behind a Gram matrix (OPTQ: each column's error goes to the next).

    Args:
        weight: (G,O,K).
        gram: (G,K,K), the sum of x xT.
        scale: (G,O), of one step.
        top: largest magnitude.
    """
    left, found = weight.astype(np.float32), np.empty(weight.shape, np.float32)
    diagonal = np.einsum("gkk->gk", gram)
    damped = gram + np.eye(gram.shape[-1], dtype=np.float32) * np.maximum(DAMPING * diagonal.mean(1), 1e-8)[:, None, None]
    # Upper triangular U with U.T @ U = inverse: row i says where the error of column i goes.
    upper = np.swapaxes(np.linalg.cholesky(np.linalg.inv(damped.astype(np.float64))), 1, 2).astype(np.float32)
    step = scale[..., None]
    for start in range(0, weight.shape[2], BLOCK):
        end = min(start + BLOCK, weight.shape[2])
        errors = np.empty((*weight.shape[:2], end - start), np.float32)
        for column in range(start, end):
            here = left[..., column : column + 1]
            found[..., column : column + 1] = np.clip(np.round(here / step), -top, top)
            error = (here - found[..., column : column + 1] * step) / upper[:, column, column][:, None, None]
            errors[..., column - start : column - start + 1] = error
            left[..., column:end] -= error * upper[:, None, column, column:end]
        left[..., end:] -= errors @ upper[:, start:end, end:]
    return found


def _grams(
    prepared: onnx.ModelProto, nodes: list[onnx.NodeProto], weights: dict[str, onnx.TensorProto], calibration: Calibration
) -> dict[str, Floats]:
    """Sum of x xT (G,K,K) over sampled inputs of each layer; a layer whose inputs are laid out unusually is left out."""
    nodes = [node for node in nodes if _samples(node, len(weights[node.input[1]].dims))]
    if not nodes:
        return {}
    names = list(dict.fromkeys(node.input[0] for node in nodes))
    session, rng = exposed(prepared, names), np.random.default_rng(0)
    found: dict[str, Floats] = {}
    for feeds in islice(calibration.batches(4), IMAGES // 4):
        values = dict(zip(names, session.run(names, feeds), strict=True))
        for node in nodes:
            shape = tuple(weights[node.input[1]].dims)
            x = _samples(node, len(shape))(values[node.input[0]], node, shape, rng)
            gram = np.swapaxes(x, 1, 2) @ x
            found[node.name] = found[node.name] + gram if node.name in found else gram
    return found


def _samples(node: onnx.NodeProto, rank: int) -> Any:  # noqa: ANN401 - a function of inputs, node, shape of the weight, generator
    """How to read (G,N,K) inputs of a layer's dot products off its input; None where it is not known."""
    told = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if rank == 2 and (node.op_type == "MatMul" or (node.op_type == "Gemm" and not told.get("transA"))):
        return _rows
    padded = told.get("auto_pad", b"NOTSET") not in (b"", b"NOTSET")
    return _patches if rank == 4 and node.op_type == "Conv" and not padded else None


def _rows(values: Floats, node: onnx.NodeProto, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    rows = values.reshape(-1, values.shape[-1])
    count = POSITIONS * len(values)
    return rows[rng.choice(len(rows), count, replace=False) if len(rows) > count else slice(None)][None]


def _patches(values: Floats, node: onnx.NodeProto, shape: tuple[int, ...], rng: np.random.Generator) -> Floats:
    """The windows of a convolution under sampled positions."""
    attributes = {a.name: list(a.ints) or [a.i] for a in node.attribute}
    kernel = shape[2:]
    pads, strides = attributes.get("pads", [0, 0, 0, 0]), attributes.get("strides", [1, 1])
    dilations, groups = attributes.get("dilations", [1, 1]), attributes.get("group", [1])[0]
    padded = np.pad(values, ((0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])))
    reach = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    windows = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=(2, 3))
    windows = windows[:, :, :: strides[0], :: strides[1], :: dilations[0], :: dilations[1]]
    _, channels, height, width = windows.shape[:4]
    count = min(POSITIONS, height * width)
    places = rng.choice(height * width, count, replace=False)
    picked = windows[:, :, places // width, places % width]  # (B,C,P,kh,kw)
    batch = np.moveaxis(picked, 2, 1).reshape(len(values) * count, groups, channels // groups * kernel[0] * kernel[1])
    return np.ascontiguousarray(np.moveaxis(batch, 1, 0))
