"""A prepared graph and a scheme -> a Q/DQ graph. onnxruntime's writer places the pairs; ranges and what stays in float are ours."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnxruntime.capi import onnxruntime_pybind11_state as state

from fofa_deploy.errors import BuildError
from fofa_deploy.types import Calibration
from fofa_exporters import _onnx
from fofa_exporters._fused import written_out
from fofa_exporters._quantization import recover
from fofa_exporters._quantization.observed import Observed
from fofa_exporters._quantization.ranges import ranges
from fofa_exporters._quantization.scheme import BEST, Scheme
from fofa_exporters._quantization.sensitivity import best_ranges, most_sensitive
from fofa_exporters._quantization.statistics import Statistics
from fofa_exporters._rewrite import sides_of

_OPERATORS = (
    "Add", "AveragePool", "Clip", "Concat", "Conv", "ConvTranspose", "Flatten", "Gemm", "GlobalAveragePool", "LeakyRelu", "MatMul",
    "MaxPool", "Mul", "Pad", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze",
)  # fmt: skip
"""What runs in int8 somewhere. Norms and softmax do not, and lose most by it."""

_LEAST_MEAN = 128
"""How often the range of a mean goes into that of one of its terms at most, over their number; what refuses has 256."""

_FAULTS: tuple[type[Exception], ...] = (
    *(ValueError, LookupError, RuntimeError, onnx.version_converter.ConvertError, onnx.shape_inference.InferenceError),
    *(state.Fail, state.InvalidGraph, state.InvalidArgument, state.NotImplemented, state.RuntimeException),
)
"""What onnx and onnxruntime raise on graphs that they do not take, when they rewrite or when they run them."""


def quantized(model: onnx.ModelProto, calibration: Calibration, scheme: Scheme) -> onnx.ModelProto:
    """The Q/DQ graph of a captured float graph.

    Raises:
        DataError: an activation is NaN or infinite on a calibration image.
        BuildError: it has something that cannot be quantized.
    """
    if _onnx.stores_half(model):
        raise BuildError("the graph's weights are stored in 16 bits", "export it in float32 to have it in int8")
    try:
        return _quantized(model, calibration, scheme)
    except _FAULTS as error:
        raise BuildError(f"the graph cannot be quantized: {type(error).__name__}: {error}", "try another recipe") from error


def _quantized(model: onnx.ModelProto, calibration: Calibration, scheme: Scheme) -> onnx.ModelProto:
    seen = Observed.of(model, calibration, scheme)
    prepared, statistics = seen.prepared, seen.statistics
    if scheme.smoothing:
        prepared, statistics = recover.smoothed(prepared, statistics, scheme.smoothing)
    if scheme.ranges == BEST:
        scheme = replace(scheme, ranges=best_ranges(prepared, statistics, calibration, scheme))
    whole = [*written_out(prepared), *_onnx.stacked(prepared), *_onnx.grouped_transposed(prepared)]
    whole += [*_idle_concats(prepared), *_clips_off_zero(prepared)]
    in_float = [*most_sensitive(seen.errors, scheme.float_share), *whole]
    written = _write(prepared, statistics, scheme, in_float)
    if scheme.learned_rounding or scheme.bias_correction:
        recover.refine(written, prepared, statistics, calibration, scheme)
    return written


def _write(prepared: onnx.ModelProto, statistics: Statistics, scheme: Scheme, in_float: list[str]) -> onnx.ModelProto:
    from onnxruntime.quantization import CalibrationMethod, QDQQuantizer, QuantType, TensorData, TensorsData

    assert scheme.ranges != "best"
    low, high = ranges(statistics, scheme.ranges, scheme.signed_activations)
    least = _least_means(prepared, dict(zip(statistics.names, map(float, high - low), strict=True)))
    high = np.maximum(high, [least.get(name, 0.0) for name in statistics.names]).astype(np.float32)
    found = {
        n: TensorData(lowest=np.asarray(a), highest=np.asarray(b)) for n, a, b in zip(statistics.names, low, high, strict=True)
    }
    copied = onnx.ModelProto()
    copied.CopyFrom(prepared)
    options = {
        "ActivationSymmetric": scheme.signed_activations,
        "WeightSymmetric": True,
        "MinimumRealRange": scheme.smallest_scale * 256 or None,
        "QuantizeBias": scheme.quantize_bias,
        "OpTypesToExcludeOutputQuantization": _float_outputs(scheme),
    }
    with TemporaryDirectory() as scratch, _onnx.quiet():
        quantizer = QDQQuantizer(
            copied,
            True,  # per channel
            scheme.seven_bit_weights,
            QuantType.QInt8,
            QuantType.QInt8 if scheme.signed_activations else QuantType.QUInt8,
            TensorsData(CalibrationMethod.MinMax, found),
            [node.name for node in _onnx.weighted(prepared)] if scheme.weighted_only else [],
            in_float,
            list(_OPERATORS),
            options,
        )
        quantizer.quantize_model()
        path = Path(scratch) / "written.onnx"
        quantizer.model.save_model_to_file(path, False)
        return onnx.load(path)


def _idle_concats(model: onnx.ModelProto) -> list[str]:
    """Names of the concatenations that nothing in int8 reads: rounding again buys nothing.

    OpenVINO 2026.4 also dies of it where a batch norm and a ReLU follow (it moves their pair before a Concat that has its own).
    """
    read_in_int8 = {name for node in model.graph.node if node.op_type in _OPERATORS for name in node.input}
    return [node.name for node in model.graph.node if node.op_type == "Concat" and node.output[0] not in read_in_int8]


def _clips_off_zero(model: onnx.ModelProto) -> list[str]:
    """Names of the clips whose bounds leave zero out, or are computed: ranges hold zero, so no range does what they do, and
    onnxruntime's writer would drop them, as it drops those that the range of their output stands for."""
    known = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    return [node.name for node in model.graph.node if node.op_type == "Clip" and not _holds_zero(node, known)]


def _holds_zero(clip: onnx.NodeProto, known: Mapping[str, np.ndarray]) -> bool:
    low, high = (*clip.input[1:], "", "")[:2]
    return all(not name or (name in known and sign * known[name].item() <= 0) for name, sign in ((low, 1), (high, -1)))


def _least_means(model: onnx.ModelProto, extents: Mapping[str, float]) -> dict[str, float]:
    """How far the ranges of global pools have to reach at least, where they do not: means over normalized maps are as good as
    nothing beside what they are of, and onnxruntime 1.32 refuses such a pair of scales, but only when it runs."""
    pools = [n for n in model.graph.node if n.op_type == "GlobalAveragePool" and {n.input[0], n.output[0]} <= extents.keys()]
    suspects = {n.output[0]: n.input[0] for n in pools if extents[n.input[0]] > _LEAST_MEAN * extents[n.output[0]]}
    sides = sides_of(model) if suspects else {}
    least = {y: extents[x] / _LEAST_MEAN / math.prod(side or 1 for side in sides.get(x, [])[2:]) for y, x in suspects.items()}
    return {y: extent for y, extent in least.items() if extent > extents[y]}


def _float_outputs(scheme: Scheme) -> list[str]:
    if not scheme.float_outputs:
        return []
    return [operator for operator in _onnx.WEIGHTED if not (scheme.conv_outputs and operator in _onnx.CONVOLUTIONS)]
