"""What ONNX Runtime's own tools make of the model: onnxruntime.ai/docs/performance/model-optimizations/quantization.html."""

from __future__ import annotations

from pathlib import Path

from make import Job, images
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.quantization.shape_inference import quant_pre_process


class Reader(CalibrationDataReader):
    """The calibration images, one by one."""

    def __init__(self, job: Job) -> None:
        self._feeds = images(job)

    def get_next(self) -> dict | None:
        return next(self._feeds, None)


def as_is(job: Job, out: Path) -> Path:
    """The float model, optimized by the runtime itself when it is loaded."""
    main = out / "model.onnx"
    main.write_bytes(Path(job["graph"]).read_bytes())
    return main


def static_default(job: Job, out: Path) -> Path:
    quantize_static(job["graph"], out / "model.onnx", Reader(job))
    return out / "model.onnx"


def static_best(job: Job, out: Path) -> Path:
    return _static(job, out, CalibrationMethod.MinMax)


def static_percentile(job: Job, out: Path) -> Path:
    return _static(job, out, CalibrationMethod.Percentile)


def static_entropy(job: Job, out: Path) -> Path:
    return _static(job, out, CalibrationMethod.Entropy)


def static_u8u8(job: Job, out: Path) -> Path:
    """The page's other advice where u8 x s8 products saturate: unsigned weights."""
    return _static(job, out, CalibrationMethod.MinMax, weights=QuantType.QUInt8)


def _static(job: Job, out: Path, method: CalibrationMethod, weights: QuantType = QuantType.QInt8) -> Path:
    """Pre-processed, Q/DQ, unsigned activations, weights per channel, in seven bits where products saturate."""
    quantize_static(
        _prepared(job, out),
        out / "model.onnx",
        Reader(job),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        reduce_range=job["saturating"] and weights is QuantType.QInt8,
        activation_type=QuantType.QUInt8,
        weight_type=weights,
        calibrate_method=method,
    )
    return _without_source(out)


def dynamic_default(job: Job, out: Path) -> Path:
    quantize_dynamic(job["graph"], out / "model.onnx")
    return out / "model.onnx"


def dynamic_matmul(job: Job, out: Path) -> Path:
    """Matrix products alone, per channel, in seven bits where products saturate."""
    return _dynamic(_prepared(job, out), job, out)


def transformers_fp32(job: Job, out: Path) -> Path:
    """The fused operators of onnxruntime.transformers."""
    _optimized(job).save_model_to_file(str(out / "model.onnx"))
    return out / "model.onnx"


def transformers_dynamic(job: Job, out: Path) -> Path:
    """The same, then quantized dynamically: attention is an operator of its own, and becomes QAttention."""
    _optimized(job).save_model_to_file(str(out / "prepared.onnx"))
    return _dynamic(out / "prepared.onnx", job, out, "Attention")


def _dynamic(source: Path, job: Job, out: Path, *more: str) -> Path:
    kinds = ["MatMul", *more]
    quantize_dynamic(source, out / "model.onnx", kinds, per_channel=not more, reduce_range=job["saturating"])
    return _without_source(out)


def _optimized(job: Job) -> object:
    from onnxruntime.transformers.optimizer import optimize_model

    return optimize_model(job["graph"], "vit", num_heads=job["heads"], hidden_size=job["width"])


def _prepared(job: Job, out: Path) -> Path:
    prepared = out / "prepared.onnx"
    # Shapes of transformers are inferred by ONNX's own pass: the symbolic one is documented to fail on some of them.
    quant_pre_process(job["graph"], prepared, skip_symbolic_shape=job["transformer"])
    return prepared


def _without_source(out: Path) -> Path:
    (out / "prepared.onnx").unlink()
    return out / "model.onnx"
