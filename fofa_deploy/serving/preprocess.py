"""A photograph as the network was trained to see it: take this file and sidecar.json, which has the numbers, into your service."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""Of images that are decoded. Pillow knows more, and for one of them, PostScript, starts another program."""


def read_sidecar(folder: Path) -> dict[str, Any]:
    """Names of input, output and classes, and the preprocessing."""
    found: dict[str, Any] = json.loads((folder / "sidecar.json").read_text())
    return found


def prepare(file: str | Path, sidecar: dict[str, Any]) -> np.ndarray:
    """The model's input, one image: fitted, cropped, and, where the model takes no pixels, normalized per channel.

    Raises:
        OSError: it is no image of ``FORMATS``.
        ValueError: as `eight_bits`.
    """
    told = sidecar["preprocessing"]
    height, width = told["image_size"]
    with Image.open(file, formats=FORMATS) as opened:
        image = eight_bits(opened).convert("L" if told["channels"] == 1 else "RGB")
    method = Image.Resampling[told["interpolation"].upper()]
    image = ImageOps.fit(image, (width, height), method, (1 - told["crop_fraction"]) / 2)
    pixels = np.asarray(image).reshape(1, height, width, -1)
    if sidecar["input"]["dtype"] != "uint8":
        pixels = ((pixels / np.float32(255) - told["mean"]) / told["std"]).astype(np.float32)
    return np.ascontiguousarray(pixels if sidecar.get("layout") == "NHWC" else pixels.transpose(0, 3, 1, 2))


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale 16-bit grayscale down: Pillow's own conversion clips it to white.

    Raises:
        ValueError: its numbers are floats, or of more than 16 bits, and nothing tells which of them is white.
    """
    if image.mode == "F":
        raise ValueError("it holds floats, and nothing tells which of them is white: save it as 8 or 16 bits")
    if not image.mode.startswith("I"):
        return image
    pixels = np.asarray(image)
    if pixels.min(initial=0) < 0 or pixels.max(initial=0) > 65535:
        raise ValueError("it holds numbers beyond 16 bits, and nothing tells which of them is white: save it as 8 or 16 bits")
    return Image.fromarray((pixels // 257).astype(np.uint8))
