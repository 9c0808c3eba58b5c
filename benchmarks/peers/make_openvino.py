"""What OpenVINO and NNCF make of the model: docs.openvino.ai, "Basic Quantization Flow" and "Quantizing with Accuracy Control"."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
from make import Job, images


def convert(job: Job, out: Path) -> Path:
    """The float model; saving rounds weights to f16, as it does by default."""
    return _saved(ov.convert_model(job["graph"]), out)


def nncf_default(job: Job, out: Path) -> Path:
    return _nncf(job, out)


def nncf_transformer(job: Job, out: Path) -> Path:
    import nncf

    return _nncf(job, out, model_type=nncf.ModelType.TRANSFORMER)


def nncf_mixed(job: Job, out: Path) -> Path:
    """Asymmetric activations and the slower, better bias correction: the options that the page offers for accuracy."""
    import nncf

    return _nncf(job, out, preset=nncf.QuantizationPreset.MIXED, fast_bias_correction=False, **_kind(job))


def nncf_accuracy_control(job: Job, out: Path) -> Path:
    """Back to float, layer by layer, until accuracy (without labels: agreement with the float model) drops by at most 0.01."""
    import nncf

    labels = np.load(job["labels"])
    items = [(feeds[job["input"]], int(label)) for feeds, label in zip(images(job, "validation"), labels, strict=True)]

    def accuracy(model: Any, data: Any) -> tuple[float, list[float]]:  # noqa: ANN401 - NNCF's callback
        """Of the images that it is called with, and each one's part in it, for which NNCF would call again otherwise."""
        hits = [float(int(model(image)[0].argmax()) == label) for image, label in data]
        return float(np.mean(hits)), hits

    model = nncf.quantize_with_accuracy_control(
        ov.convert_model(job["graph"]),
        calibration_dataset=_calibration(job),
        validation_dataset=nncf.Dataset(items, lambda item: {job["input"]: item[0]}),
        validation_fn=accuracy,
        max_drop=0.01,
        subset_size=_count(job),
        **_kind(job),
    )
    return _saved(model, out)


def _nncf(job: Job, out: Path, **options: Any) -> Path:  # noqa: ANN401 - NNCF's options
    import nncf

    return _saved(nncf.quantize(ov.convert_model(job["graph"]), _calibration(job), subset_size=_count(job), **options), out)


def _kind(job: Job) -> dict[str, Any]:
    import nncf

    return {"model_type": nncf.ModelType.TRANSFORMER} if job["transformer"] else {}


def _calibration(job: Job) -> Any:  # noqa: ANN401 - nncf.Dataset
    import nncf

    return nncf.Dataset(list(images(job)))


def _count(job: Job) -> int:
    return len(np.load(job["calibration"], mmap_mode="r"))


def _saved(model: Any, out: Path) -> Path:  # noqa: ANN401 - ov.Model
    ov.save_model(model, out / "model.xml")
    return out / "model.xml"
