"""An image, as a file has it, at the size of a plan: uint8 (C,H,W)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from fofa_deploy.config import DataPlan
from fofa_deploy.serving.preprocess import FORMATS, eight_bits

Pixels = NDArray[np.uint8]

SUFFIXES = frozenset({"bmp", "gif", "jpeg", "jpg", "png", "ppm", "tif", "tiff", "webp"})
"""Of their files."""

_RESAMPLING = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC, "nearest": Image.Resampling.NEAREST}
WHOLE = (0.0, 0.0, 1.0, 1.0)


def open_image(stream: BinaryIO) -> Image.Image:
    """Raises: PIL.UnidentifiedImageError: it is of none of `FORMATS`."""
    return Image.open(stream, formats=FORMATS)


def to_pixels(image: Image.Image, plan: DataPlan, box: Sequence[float] = WHOLE) -> Pixels:
    """Crop, resize to the plan's size keeping the aspect ratio, centre-crop: uint8 (C,H,W).

    Args:
        box: left, top, right and bottom of a crop, as fractions of the largest part of the image that has the plan's aspect
            ratio; what there is beside that part widens the range of places.
    """
    height, width = plan.image_size
    image = eight_bits(image).convert("L" if plan.channels == 1 else "RGB")
    if tuple(box) != WHOLE:
        scale = min(image.width / width, image.height / height)
        (left, right), (top, bottom) = (
            _placed(box[axis], box[axis + 2], scale * side, whole)
            for axis, (side, whole) in enumerate(((width, image.width), (height, image.height)))
        )
        image = image.crop((left, top, right, bottom)).resize((width, height), _RESAMPLING[plan.interpolation])
    else:
        bleed = (1.0 - plan.crop_fraction) / 2
        image = ImageOps.fit(image, (width, height), _RESAMPLING[plan.interpolation], bleed=bleed)
    pixels = np.asarray(image, np.uint8)
    return pixels[None] if plan.channels == 1 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def png(pixels: Pixels) -> bytes:
    """Encoded again, losslessly."""
    stream = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0).squeeze()).save(stream, "png")
    return stream.getvalue()


def _placed(start: float, end: float, part: float, whole: int) -> tuple[int, int]:
    """The same share of the way that there is, in pixels of a side of which ``part`` is counted in."""
    length, free = (end - start) * part, 1 - (end - start)
    first = (start / free if free > 0 else 0.5) * (whole - length)
    return round(first), max(round(first) + 1, round(first + length))
