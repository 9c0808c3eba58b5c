"""Run one peer in its own environment: python make.py MODULE:FUNCTION job.json out. Needs nothing of this project.

A peer is a function (job, out) that writes its model into the empty folder ``out`` and returns the file to load. What it took
is written beside it as ``build.json``.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
"""``graph`` (ONNX file), ``input``, ``calibration`` and ``validation`` (.npy, float32 (N,C,H,W), normalized), ``labels``
(.npy), ``weights`` and ``model`` (for timm), ``transformer``, ``saturating`` (u8 x s8 products overflow in 16 bits here)."""

TOLD = ("onnxruntime", "openvino", "nncf", "torch", "torchao", "olive-ai", "optimum", "optimum-onnx", "optimum-intel")


def images(job: Job, name: str = "calibration") -> Iterator[dict[str, np.ndarray]]:
    """One normalized image at a time, as feeds."""
    for image in np.load(job[name], mmap_mode="r"):
        yield {job["input"]: np.array(image[None])}


def main(function: str, job: Path, out: Path) -> None:
    """Import the peer, run it, record how long it took."""
    module, _, name = function.partition(":")
    sys.path.insert(0, str(Path(__file__).parent))
    make = getattr(importlib.import_module(module), name)
    started = time.monotonic()
    main_file = make(json.loads(job.read_bytes()), out)
    record = {"file": Path(main_file).relative_to(out).as_posix(), "seconds": time.monotonic() - started, "versions": versions()}
    (out / "build.json").write_text(json.dumps(record, indent=1))


def versions() -> dict[str, str]:
    """Of the packages that are there."""
    found = {}
    for package in TOLD:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
