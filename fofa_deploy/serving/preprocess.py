"""A photograph as the network was trained to see it: take this file and sidecar.json, which has the numbers, into your service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Names of input, output and classes, and the preprocessing."""
    found: dict[str, Any] = json.loads((folder / "sidecar.json").read_text())
    return found


def prepare(file: str | Path, sidecar: dict[str, Any]) -> np.ndarray:
    """The model's input, one image: fitted, cropped, and, where the model takes no pixels, normalized per channel."""
    told = sidecar["preprocessing"]
    height, width = told["image_size"]
    image: Image.Image = Image.open(file)
    if image.mode.startswith("I"):  # 16 bits, which Pillow itself would clip to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    image = image.convert("L" if told["channels"] == 1 else "RGB")
    method = Image.Resampling[told["interpolation"].upper()]
    image = ImageOps.fit(image, (width, height), method, (1 - told["crop_fraction"]) / 2)
    pixels = np.asarray(image).reshape(1, height, width, -1)
    if sidecar["input"]["dtype"] != "uint8":
        pixels = ((pixels / np.float32(255) - told["mean"]) / told["std"]).astype(np.float32)
    return np.ascontiguousarray(pixels if sidecar.get("layout") == "NHWC" else pixels.transpose(0, 3, 1, 2))
