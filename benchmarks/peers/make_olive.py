"""What Olive makes of the model: microsoft.github.io/Olive, "How to quantize": a workflow of one pass."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from make import Job

SCRIPT = """
import numpy as np
import torch
from olive.data.registry import Registry


class Images(torch.utils.data.Dataset):
    def __init__(self):
        self.images = np.load({calibration!r}, mmap_mode="r")

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {{{name!r}: np.array(self.images[index])}}, 0


@Registry.register_dataset()
def calibration_images(**_):
    return Images()
"""


def dynamic(job: Job, out: Path) -> Path:
    return _workflow(job, out, {"type": "OnnxDynamicQuantization"}, {})


def static(job: Job, out: Path) -> Path:
    """Calibrated by the images, through a data configuration, as every static pass of Olive wants it."""
    script = out / "user_script.py"
    script.write_text(SCRIPT.format(calibration=job["calibration"], name=job["input"]))
    data = {
        "name": "calibration",
        "type": "DummyDataContainer",
        "user_script": str(script),
        "load_dataset_config": {"type": "calibration_images"},
        "pre_process_data_config": {"type": "skip_pre_process"},
        "post_process_data_config": {"type": "skip_post_process"},
        "dataloader_config": {"type": "default_dataloader", "params": {"batch_size": 1}},
    }
    chosen = {"type": "OnnxStaticQuantization", "data_config": "calibration"}
    main = _workflow(job, out, chosen, {"data_configs": [data]})
    script.unlink()
    return main


def _workflow(job: Job, out: Path, chosen: dict[str, Any], more: dict[str, Any]) -> Path:
    import olive

    scratch = out / "olive"
    olive.run(
        {
            "input_model": {"type": "ONNXModel", "model_path": job["graph"]},
            "passes": {"quantize": chosen},
            "output_dir": str(scratch / "out"),
            "cache_dir": str(scratch / "cache"),
            "log_severity_level": 3,
            **more,
        }
    )
    found = next((scratch / "out").rglob("*.onnx"), None)
    if found is None:
        raise RuntimeError("Olive wrote no model; its log above says why")
    main = out / "model.onnx"
    shutil.move(found, main)
    shutil.rmtree(scratch)
    return main
