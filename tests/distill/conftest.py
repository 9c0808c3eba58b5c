"""Small models of every kind of layout, random weights, tapped once per session and copied per test."""

import copy
import functools

import pytest
import timm
import torch

from fofa_deploy.config import DistillPlan
from fofa_deploy.distill.objective import Objective
from fofa_deploy.distill.taps import tap

torch.set_num_threads(1)  # tiny models on shared cores
CLASSES = 5
MODELS = {
    "cnn": ("resnet10t", 32, {}),
    "vit": ("vit_tiny_patch16_224", 32, {"img_size": 32, "patch_size": 8, "depth": 4}),
    "distilled": ("deit_tiny_distilled_patch16_224", 32, {"img_size": 32, "patch_size": 8, "depth": 4}),
    "swin": ("swin_tiny_patch4_window7_224", 32, {"img_size": 32, "window_size": 4, "patch_size": 2, "depths": (1, 1, 1, 1)}),
    "mixer": ("gmixer_12_224", 32, {"img_size": 32}),
    "mobilevit": ("mobilevit_xxs", 64, {}),
    "levit": ("levit_128s", 64, {"img_size": 64}),
    "coat": ("coat_lite_tiny", 64, {"img_size": 64}),
    "hiera": ("hiera_tiny_224", 64, {"img_size": 64, "stages": (1, 1, 2, 1)}),
    "pit": ("pit_ti_224", 64, {"img_size": 64, "depth": (1, 1, 1)}),
    "pvt": ("pvt_v2_b0", 32, {}),
}
FOFA = {"width": 16, "heads": 2, "regions": 4, "prompted_stages": (1, 2, 3, 4), "feedback": True}
"""Prompts as published, but for their fusion: all parts are there."""


def _made(kind, height, width):
    torch.manual_seed(0)
    name, _, arguments = MODELS[kind]
    sized = {"img_size": (height, width)} if "img_size" in arguments else {}
    model = timm.create_model(name, num_classes=CLASSES, **(arguments | sized))
    with torch.no_grad():  # no zero heads, no residual branch without weight
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return tap(model, (3, height, width))


@functools.cache
def _built(kind):
    side = MODELS[kind][1]
    return _made(kind, side, side), side


@pytest.fixture
def tapped():
    """kind -> a fresh copy of a tapped model."""
    return lambda kind: copy.deepcopy(_built(kind)[0])


@pytest.fixture
def wide():
    """kind -> a tapped model for images twice as wide as high, in eval mode, and two of them."""

    def make(kind):
        side = MODELS[kind][1]
        return _made(kind, side, 2 * side).eval(), torch.randn(2, 3, side, 2 * side, generator=torch.Generator().manual_seed(0))

    return make


@pytest.fixture
def batch():
    """(images, labels) for a kind."""

    def make(kind="cnn", count=4, seed=0):
        generator = torch.Generator().manual_seed(seed)
        side = MODELS[kind][1]
        return torch.randn(count, 3, side, side, generator=generator), torch.arange(count) % CLASSES

    return make


@pytest.fixture
def objective(tapped):
    """An objective over two kinds, with a tiny region-aware attention."""

    def make(student="cnn", teacher="vit", method="fofa", **settings):
        torch.manual_seed(1)
        fofa = {**FOFA, **settings.pop("fofa", {})}
        plan = DistillPlan(method=method, fofa=fofa, balance=settings.pop("balance", "fixed"), **settings)
        return Objective(tapped(student), None if teacher is None else tapped(teacher), plan)

    return make
