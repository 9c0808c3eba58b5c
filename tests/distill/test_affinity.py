"""Linear CKA: what it must not care about, what it must, and real networks on real digits."""

import pytest
import torch
from torch import nn

from fofa_deploy.config import ModelPlan, load_plan
from fofa_deploy.data import load_data, preprocessing
from fofa_deploy.distill.affinity import affinity, linear_cka
from fofa_deploy.distill.taps import tap
from fofa_deploy.inference import Normalize
from fofa_deploy.models import build_model


def features(seed: int, width: int, rows: int = 2000) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def test_rotation_scale_and_shift_do_not_matter():
    one = features(0, 8)
    rotation = torch.linalg.qr(features(1, 8, 8)).Q
    assert linear_cka(one, one) == pytest.approx(1)
    assert linear_cka(one, 3 * one @ rotation + 5) == pytest.approx(1)


def test_features_that_share_nothing_have_none_and_those_that_share_a_part_have_a_part():
    one, other = features(0, 8), features(2, 6)
    assert linear_cka(one, other) < 0.02
    assert 0.3 < linear_cka(one, torch.cat([one, features(3, 8)], 1)) < 0.9
    assert linear_cka(one, other) == pytest.approx(linear_cka(other, one))


def test_it_is_the_definition_by_kernels():
    one, other = features(0, 5, 40).double(), features(1, 3, 40).double()
    centre = torch.eye(40).double() - 1 / 40
    first, second = (centre @ f @ f.T @ centre for f in (one, other))
    wanted = (first * second).sum() / (first.norm() * second.norm())
    assert linear_cka(one, other) == pytest.approx(float(wanted))


@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_constant_and_broken_features_have_no_affinity(value):
    assert linear_cka(torch.full((10, 3), value), features(0, 4, 10)) is None


def tapped(model: str, seed: int, **arguments):
    torch.manual_seed(seed)
    made: nn.Module = build_model(ModelPlan(model=model, arguments=arguments), classes=10, channels=1, image_size=(16, 16))
    return tap(made.eval(), (1, 16, 16), stages=2)


def test_a_network_is_like_itself_and_less_like_one_of_another_family():
    plan = load_plan("demo", ["data.image_size=16", "data.limit=64"])
    data = load_data(plan.data, 0)
    told = data.validation, data.validation, Normalize(preprocessing(plan.data)), 16
    vit = tapped("timm:vit_tiny_patch16_224", 0, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    cnn = tapped("timm:resnet10t", 1, channels=[8, 16, 16, 32], stem_width=8)
    assert affinity(vit, vit, *told) == pytest.approx(1)
    assert 0 < affinity(vit, cnn, *told) < 0.99
    assert affinity(vit, cnn, *told) == pytest.approx(affinity(cnn, vit, *told))


@pytest.mark.parametrize("value", [0.1, 1.0, 1e6 + 0.1])
def test_constant_features_have_no_affinity_whatever_their_rounding(value):
    constant = torch.full((2000, 3), value)
    assert linear_cka(constant, features(0, 8)) is None
    assert linear_cka(features(0, 8), constant) is None
