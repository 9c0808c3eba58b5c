"""The graph that quantization starts from: constants and BatchNorm folded, tensors typed and shaped, nodes named."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

import onnx

from fofa_exporters import _onnx
from fofa_exporters._normal import normalized
from fofa_exporters._rewrite import absorb_endless_pads, drop_endless_clips, pool_globally

PER_CHANNEL = 13
"""The first opset whose Q/DQ pairs have an axis."""


def prepare(model: onnx.ModelProto) -> onnx.ModelProto:
    """A float graph with the same outputs, up to rounding."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with TemporaryDirectory() as scratch, _onnx.quiet():
        source, target = Path(scratch) / "source.onnx", Path(scratch) / "prepared.onnx"
        # A model given in memory is cut into external files, which onnxruntime then cannot read.
        onnx.save(pool_globally(_recent(model)), source)
        # Symbolic inference needs sympy and gives up on some ViTs; plain inference annotates every tensor of both kinds here.
        quant_pre_process(source, target, skip_symbolic_shape=True)
        return normalized(drop_endless_clips(absorb_endless_pads(onnx.load(target))))


def _recent(model: onnx.ModelProto) -> onnx.ModelProto:
    """With operators that know scales per channel."""
    return onnx.version_converter.convert_version(model, PER_CHANNEL) if _onnx.is_older(model, PER_CHANNEL) else model
