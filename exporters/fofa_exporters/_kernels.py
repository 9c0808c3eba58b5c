"""What ONNX Runtime really runs: its optimized graph names the kernels, its own profile says where and in what type each ran."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from fofa_deploy.errors import BackendError
from fofa_deploy.types import Feeds, Layer, LayerTime, Precision
from fofa_exporters import _onnx

_WEIGHT_INPUT = {
    "Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvTranspose": 1, "Gemm": 1, "FusedGemm": 1, "MatMul": 1, "FusedMatMul": 1,
    "MatMulNBits": 1, "Attention": 1, "ConvInteger": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1,
    "QAttention": 1, "QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3,
}  # fmt: skip
_INTEGER = frozenset(
    ("ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QuantizeLinear", "QGemm", "QAttention")
)
_SPELLED = {
    "float": Precision.FP32, "float32": Precision.FP32, "float16": Precision.FP16, "bfloat16": Precision.BF16,
    "int8": Precision.INT8, "uint8": Precision.INT8,
}  # fmt: skip
_IMAGES = frozenset({onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16, onnx.TensorProto.UINT8})
_SUFFIX = "_kernel_time"

Event = Mapping[str, Any]


def events(profile: Path) -> list[Event]:
    """The kernels' own lines of a profile, in the order in which they ran."""
    return [e for e in json.loads(profile.read_bytes()) if e.get("cat") == "Node" and e["name"].endswith(_SUFFIX)]


def blank(model: onnx.ModelProto) -> Feeds | None:
    """Zeros for one run, of batch 1; nothing where a file of others leaves more than its batch open, or takes more than images."""
    weights, feeds = {tensor.name for tensor in model.graph.initializer}, {}
    for value in (value for value in model.graph.input if value.name not in weights):
        kind = value.type.tensor_type
        sides = [side.dim_value for side in kind.shape.dim]
        if kind.elem_type not in _IMAGES or not all(side > 0 for side in sides[1:]):
            return None
        shape = [*(max(side, 1) for side in sides[:1]), *sides[1:]]
        feeds[value.name] = np.zeros(shape, helper.tensor_dtype_to_np_dtype(kind.elem_type))
    return feeds


def layers(model: onnx.ModelProto, ran: Iterable[Event], provider: str) -> tuple[Layer, ...]:
    """One row per kernel of an optimized graph, typed by the profile, and by the graph where the profile is silent.

    Raises:
        BackendError: kernels with weights ran elsewhere than on ``provider``.
    """
    seen = {event["name"].removesuffix(_SUFFIX): event["args"] for event in ran}
    known, stated = _onnx.constants(model.graph), _stated(model)
    nodes = [node for node in model.graph.node if not known.issuperset(node.output)]
    rows = tuple(_layer(node, known, seen.get(node.name, {}), stated) for node in nodes)
    places = Counter(seen[row.name]["provider"] for row in rows if row.weighted and row.name in seen)
    if astray := places.keys() - {provider}:
        found = ", ".join(f"{places[name]} on {name}" for name in sorted(astray))
        raise BackendError(
            f"{found} instead of {provider} ran layers with weights", "take a recipe that the device has kernels for"
        )
    return rows


def _layer(node: onnx.NodeProto, known: set[str], ran: Event, stated: Mapping[str, str]) -> Layer:
    place = _WEIGHT_INPUT.get(node.op_type)
    weighted = place is not None and node.input[place] in known
    integer = node.op_type.startswith("QLinear") or node.op_type in _INTEGER
    kinds = [kind for value in ran.get("output_type_shape", ()) for kind in value]
    # What neither the profile nor the graph states is the float that it all began with, and so never proves another one.
    kind = kinds[0] if kinds else stated.get(node.output[0], "float")
    return Layer(
        name=node.name, operator=node.op_type, precision=Precision.INT8 if integer else _SPELLED.get(kind, kind), weighted=weighted
    )


def _stated(model: onnx.ModelProto) -> dict[str, str]:
    """Element types by tensor name, as far as the optimized graph states them."""
    return {v.name: helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type).name for v in model.graph.value_info}


def times(ran: Iterable[Event], table: Sequence[Layer], runs: int) -> tuple[LayerTime, ...]:
    """Means per kernel; each kernel's first event belongs to the run that warmed up."""
    known = {layer.name: layer.precision for layer in table}
    found: dict[tuple[str, str], list[float]] = {}
    for event in ran:
        found.setdefault((event["name"].removesuffix(_SUFFIX), event["args"]["op_name"]), []).append(event["dur"] / 1e3)
    return tuple(
        LayerTime(name=name, operator=operator, precision=known.get(name, "unknown"), ms=sum(each[1:]) / runs)
        for (name, operator), each in found.items()
    )
