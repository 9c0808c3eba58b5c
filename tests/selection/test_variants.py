"""Narrower, wider, shallower and deeper networks of any family, or a refusal that names it."""

from __future__ import annotations

import pytest
import torch

from fofa_deploy.config import ModelPlan
from fofa_deploy.errors import ModelError
from fofa_deploy.models import build_model, parameter_count
from fofa_deploy.select.variants import grid, pruned, scaled

torch.set_num_threads(1)
SIDE = 64
FAMILIES = [
    "resnet18",
    "resnext50_32x4d",
    "convnext_atto",
    "vit_tiny_patch16_224",
    "swin_tiny_patch4_window7_224",
    "pvt_v2_b0",
    "mixer_s32_224",
    "poolformer_s12",
    "regnetx_002",
    "edgenext_xx_small",
    "mobilenetv3_small_100",
    "efficientnet_b0",
    "densenet121",
    "ghostnet_100",
]
FIXED_DEPTH = {"efficientnet_b0": "depth_multiplier", "ghostnet_100": "depth"}
"""What no argument makes shallower, and what the refusal says of it."""
SHALLOW = {"regnetx_002": 0.8}
"""With half its blocks it has fewer than four stages."""
ARGUMENTS = {"swin_tiny_patch4_window7_224": {"window_size": 4, "patch_size": 2}, "densenet121": {"block_config": [2, 2, 2, 2]}}


def plan(name: str, **options) -> ModelPlan:
    return ModelPlan(model=f"timm:{name}", arguments=ARGUMENTS.get(name, {}), **options)


def made(found: ModelPlan) -> torch.nn.Module:
    torch.manual_seed(0)
    return build_model(found, classes=7, channels=3, image_size=(SIDE, SIDE)).eval()


def size(found: ModelPlan) -> int:
    return parameter_count(made(found))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_scales_in_width(name):
    half = scaled(plan(name), width=0.5)
    model = made(half)
    assert parameter_count(model) < 0.85 * size(plan(name))
    with torch.no_grad():
        assert model(torch.randn(2, 3, SIDE, SIDE)).shape == (2, 7)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in FIXED_DEPTH])
def test_a_family_scales_in_depth(name):
    assert size(scaled(plan(name), depth=SHALLOW.get(name, 0.5))) < size(plan(name))


def test_a_factor_that_the_family_cannot_take_is_refused_by_name():
    with pytest.raises(ModelError, match=r"timm:regnetx_002 cannot be scaled to {'depth': 6}") as caught:
        scaled(plan("regnetx_002"), depth=0.5)
    assert "nearer to 1" in caught.value.action


@pytest.mark.parametrize(("name", "reason"), FIXED_DEPTH.items())
def test_a_family_without_such_an_argument_is_named_with_what_to_do(name, reason):
    with pytest.raises(ModelError, match=f"timm:{name} cannot be scaled.*{reason}") as caught:
        scaled(plan(name), depth=0.5)
    assert caught.value.action


def test_a_family_that_is_written_out_is_refused():
    with pytest.raises(ModelError, match="timm:vgg11 cannot be scaled in width") as caught:
        scaled(plan("vgg11"), width=0.5)
    assert "prune" in caught.value.action


def test_widths_are_multiples_of_eight_and_of_the_heads():
    for factor in (0.3, 0.55, 0.8, 1.3):
        arguments = scaled(plan("vit_tiny_patch16_224"), width=factor).arguments
        assert arguments["embed_dim"] % 24 == 0
        widths = scaled(plan("pvt_v2_b0"), width=factor).arguments["embed_dims"]
        assert all(width % 8 == 0 and width % heads == 0 for width, heads in zip(widths, (1, 2, 5, 8), strict=True))
        assert all(width % 8 == 0 for width in scaled(plan("convnext_atto"), width=factor).arguments["dims"])


def test_arguments_that_the_plan_gives_are_what_is_scaled():
    found = scaled(ModelPlan(model="timm:resnet18", arguments={"channels": [32, 32, 64, 64]}), width=0.5)
    assert found.arguments == {"channels": [16, 16, 32, 32]}


def test_the_plan_itself_and_one_without_a_change_stay():
    found = plan("resnet18")
    assert scaled(found) is found
    assert scaled(found, width=0.5).arguments == {"channels": [32, 64, 128, 256]}
    assert found.arguments == {}


def test_a_grid_spans_widths_and_depths_once_each():
    found = grid(plan("vit_tiny_patch16_224"), widths=(0.5, 0.51, 1.0), depths=(0.5, 1.0))
    given = [(p.arguments.get("embed_dim"), p.arguments.get("depth")) for p in found]
    assert given == [(96, 6), (96, None), (None, 6), (None, None)]
    sizes = [size(p) for p in found]
    assert sizes[0] < sizes[1] < sizes[3]
    assert sizes[0] < sizes[2] < sizes[3]


def test_pruned_gives_each_share():
    found = pruned(plan("resnet18"), (0.0, 0.25, 0.5, 0.5))
    assert [p.prune for p in found] == [0.0, 0.25, 0.5]
    with pytest.raises(ValueError, match="prune"):
        pruned(plan("resnet18"), (1.5,))


@pytest.mark.parametrize(("options", "reason"), [({"pretrained": True}, "weights"), ({"model": "json:loads"}, "not timm's")])
def test_what_cannot_be_scaled_is_refused(options, reason):
    with pytest.raises(ModelError, match=f"cannot be scaled|comes with {reason}") as caught:
        scaled(ModelPlan(**{"model": "timm:resnet18", **options}), width=0.5)
    assert reason in caught.value.message


def test_arguments_win_over_an_entry_point_that_fixes_them():
    """timm itself: multiple values for keyword argument 'embed_dim'."""
    mixer = made(ModelPlan(model="timm:mixer_s32_224", arguments={"embed_dim": 64, "num_blocks": 2}))
    assert mixer.head.in_features == 64
    assert len(mixer.blocks) == 2
    with pytest.raises(ModelError, match="efficientnet_b0 cannot be made"):
        made(ModelPlan(model="timm:efficientnet_b0", arguments={"depth_multiplier": 0.5}))
