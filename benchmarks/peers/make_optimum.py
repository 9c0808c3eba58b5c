"""What Optimum makes of the model, as the first examples of its quantization pages do it."""

from __future__ import annotations

import shutil
from pathlib import Path

from make import Job


def onnxruntime_dynamic(job: Job, out: Path) -> Path:
    """huggingface.co/docs/optimum-onnx, quickstart: a dynamic configuration for this instruction set."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoQuantizationConfig

    quantizer = ORTQuantizer.from_pretrained(_folder(job, out))
    quantizer.quantize(save_dir=out, quantization_config=AutoQuantizationConfig.avx2(is_static=False, per_channel=False))
    return _only(out, "model_quantized.onnx")


def onnxruntime_static(job: Job, out: Path) -> Path:
    """The same page's static quantization, calibrated by the range seen."""
    from optimum.onnxruntime import ORTQuantizer
    from optimum.onnxruntime.configuration import AutoCalibrationConfig, AutoQuantizationConfig

    dataset = _dataset(job)
    quantizer = ORTQuantizer.from_pretrained(_folder(job, out))
    calibration, chosen = AutoCalibrationConfig.minmax(dataset), AutoQuantizationConfig.avx2(is_static=True, per_channel=False)
    ranges = quantizer.fit(dataset, calibration, operators_to_quantize=chosen.operators_to_quantize)
    quantizer.quantize(chosen, save_dir=out, calibration_tensors_range=ranges)
    return _only(out, "model_quantized.onnx")


def openvino_static(job: Job, out: Path) -> Path:
    """huggingface.co/docs/optimum-intel, static quantization by OVQuantizer with its default configuration."""
    import nncf
    import openvino as ov
    from make import images
    from optimum.intel import OVConfig, OVModelForImageClassification, OVQuantizationConfig, OVQuantizer
    from transformers import PretrainedConfig

    model = OVModelForImageClassification(ov.convert_model(job["graph"]), config=PretrainedConfig(), compile=False)
    quantizer = OVQuantizer.from_pretrained(model)
    config = OVConfig(quantization_config=OVQuantizationConfig(bits=8))
    quantizer.quantize(calibration_dataset=nncf.Dataset(list(images(job))), save_directory=out, ov_config=config)
    return next(out.glob("*.xml"))


def _dataset(job: Job) -> object:
    import numpy as np
    from datasets import Dataset

    calibration = np.load(job["calibration"], mmap_mode="r")
    rows = ({job["input"]: image.tolist()} for image in calibration)
    return Dataset.from_list(list(rows)).with_format("numpy")


def _folder(job: Job, out: Path) -> Path:
    """A model folder as Optimum wants it: the graph, and a configuration that only names the model's kind."""
    folder = out / "source"
    folder.mkdir()
    shutil.copyfile(job["graph"], folder / "model.onnx")
    kind = '{"model_type": "vit"}' if job["transformer"] else '{"model_type": "resnet"}'
    (folder / "config.json").write_text(kind)
    return folder


def _only(out: Path, name: str) -> Path:
    """Optimum leaves the graph that it calibrated with beside its result."""
    shutil.rmtree(out / "source")
    for other in set(out.glob("*.onnx")) - {out / name}:
        other.unlink()
    return out / name
