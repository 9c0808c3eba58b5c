"""Fake quantization: gradients pass straight through, weights end on their grids, and the student computes what int8 will."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from fofa_deploy.backend import get_backend
from fofa_deploy.capture import capture
from fofa_deploy.config import DataPlan
from fofa_deploy.data import load_data, preprocessing
from fofa_deploy.distill.fake import LEVELS, InputRange, WeightGrid, fake_quantized
from fofa_deploy.inference import predict
from fofa_deploy.profile import find_profile
from fofa_deploy.types import Calibration, Graph, Precision
from fofa_deploy.verify import run_all

DIGITS = DataPlan(name="digits", image_size=(16, 16), channels=1)
ARGUMENTS = {"channels": (8, 8, 16, 16), "stem_width": 8}


def convolutional() -> nn.Module:
    """With BatchNorm statistics that are not those of an untouched layer."""
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", num_classes=10, in_chans=1, **ARGUMENTS)
    for norm in (module for module in model.modules() if isinstance(module, nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.1)
        norm.running_var.uniform_(0.5, 2.0)
        nn.init.uniform_(norm.weight, 0.5, 1.5)
    return model.eval()


def transformer() -> nn.Module:
    torch.manual_seed(0)
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=10, in_chans=1, **sizes).eval()


def images(count=8, seed=0) -> torch.Tensor:
    return torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))


def steps_off_grid(weight: torch.Tensor, bits: int) -> float:
    """Largest distance to the channel's grid, in steps."""
    steps = weight.detach().flatten(1) / (weight.detach().flatten(1).abs().amax(1, keepdim=True) / LEVELS[bits])
    return float((steps - steps.round()).abs().max())


# --- rounding and its gradients


@pytest.mark.parametrize("bits", LEVELS)
def test_weights_are_rounded_per_channel_and_their_gradient_is_the_identity(bits):
    weight = (torch.randn(6, 4, 3, 3) * torch.logspace(-4, 4, 6).view(-1, 1, 1, 1)).requires_grad_()
    rounded, upstream = WeightGrid(bits)(weight), torch.randn(6, 4, 3, 3)
    rounded.backward(upstream)
    assert torch.equal(weight.grad, upstream)
    step = weight.detach().flatten(1).abs().amax(1) / LEVELS[bits]
    errors = (rounded - weight).detach().flatten(1).abs().amax(1)
    assert (errors > 0.1 * step).all()
    assert (errors <= 0.5001 * step).all()
    assert steps_off_grid(rounded, bits) < 1e-4
    assert torch.allclose(WeightGrid(bits)(rounded), rounded, rtol=1e-6), "what lies on the grid stays"


def test_a_channel_of_zeros_stays_zero():
    assert WeightGrid(8)(torch.zeros(2, 3)).equal(torch.zeros(2, 3))


def ranged(low: float, high: float, updates: int = 0) -> InputRange:
    found = InputRange(updates)
    found.low.fill_(low), found.high.fill_(high)
    return found


def test_inputs_are_rounded_in_their_range_and_gradients_stop_at_its_ends():
    inputs = torch.tensor([-3.0, -1.0, -0.3, 0.0, 1.234, 2.0, 5.0], requires_grad=True)
    rounded = ranged(-1.0, 2.0)(inputs)
    rounded.sum().backward()
    assert inputs.grad.tolist() == [0, 1, 1, 1, 1, 1, 0]
    step = 3 / 255
    assert rounded.detach()[[0, 3, 6]].tolist() == pytest.approx([-1.0, 0.0, 2.0])
    assert (rounded - inputs).detach()[1:6].abs().max() <= 0.5001 * step


def test_a_range_grows_at_once_shrinks_slowly_and_then_stays():
    found = ranged(-1.0, 1.0, updates=2).train()
    found(torch.tensor([0.0, 4.0]))
    assert float(found.high) == 4.0
    assert float(found.low) == pytest.approx(-0.99)
    found(torch.tensor([-0.5, 0.5]))
    assert 3.9 < float(found.high) < 4.0
    before = found.state_dict()["high"].clone()
    found(torch.tensor([9.0]))
    assert found.high.equal(before)
    moving = ranged(-1.0, 1.0, updates=9).eval()
    moving(torch.tensor([9.0]))
    assert float(moving.high) == 1.0


# --- in a model


@pytest.mark.parametrize("make", [convolutional, transformer])
def test_a_model_comes_back_as_it_was_but_on_the_grid(make):
    model = make()
    before = copy.deepcopy(model)
    with fake_quantized(model, 7, 4, [images()]):
        assert not torch.equal(model(images()), before(images()))
        twin = copy.deepcopy(model)  # as a moving average keeps
        assert torch.equal(twin(images()), model(images()))
        model.train()
        model(3 * images(seed=1)).square().sum().backward()
        twin_ranges, ranges = ([m for m in each.modules() if isinstance(m, InputRange)] for each in (twin, model))
        assert any(float(a.high) < float(b.high) for a, b in zip(twin_ranges, ranges, strict=True))
    model.eval()
    state, old = model.state_dict(), before.state_dict()
    assert state.keys() == old.keys()
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks
        if isinstance(module, nn.Conv2d | nn.Linear):
            assert type(module) is type(before.get_submodule(name))
            assert isinstance(module.weight, nn.Parameter)
            assert steps_off_grid(module.weight, 7) < 1e-4
    moved = [key for key in state if "running" in key and not torch.equal(state[key], old[key])]
    assert moved == [], "BatchNorm's statistics are those of inference"


def test_weights_stay_on_their_grids_when_batch_norm_is_folded():
    model = convolutional()
    before = copy.deepcopy(model)
    with fake_quantized(model, 7, 0, [images()]):
        pass
    block, plain = model.layer1[0], before.layer1[0]
    shown = torch.randn(2, 16, 8, 8)
    folded = fuse_conv_bn_eval(block.conv1, block.bn1)
    assert torch.allclose(folded(shown), _normalized(block, shown), atol=1e-5)
    assert steps_off_grid(folded.weight, 7) < 1e-4
    assert steps_off_grid(fuse_conv_bn_eval(plain.conv1, plain.bn1).weight, 7) > 0.1


def _normalized(block: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    norm = block.bn1
    statistics = norm.running_mean, norm.running_var, norm.weight, norm.bias
    return nn.functional.batch_norm(block.conv1(inputs), *statistics, eps=norm.eps)


@pytest.mark.parametrize("make", [convolutional, transformer])
def test_the_student_computes_what_its_artifact_will(tmp_path, make):
    model, data, known = make(), load_data(DIGITS, 0), preprocessing(DIGITS)
    np.save(tmp_path / "images.npy", data.train.source.images(data.train.indices[:64]))
    capture(model, "student", known, data.class_names, data.validation, tmp_path)
    graph, profile = Graph.load(tmp_path), find_profile("cpu-onnxruntime")
    backend = get_backend("onnxruntime")
    recipe = next(r for r in backend.recipes(profile, graph) if r.precision is Precision.INT8 and r.needs_calibration)
    # Training imitates rounding; what is corrected after it is not its to imitate.
    recipe = recipe.model_copy(update={"options": {**recipe.options, "bias_correction": False}})
    bits = 7 if recipe.options.get("seven_bit_weights") else 8
    (tmp_path / "out").mkdir()
    calibration = Calibration(images=tmp_path / "images.npy", sidecar=graph.sidecar)
    artifact = backend.build(graph, recipe, calibration, tmp_path / "out")
    shown = data.validation.source.images(data.validation.indices)
    with backend.load(artifact, profile) as session:
        real = run_all(session, artifact, shown, 32)
    plain = predict(model, data.validation, known)
    batch = torch.from_numpy(known.apply(np.load(tmp_path / "images.npy")))
    with fake_quantized(model, bits, 0, [batch]):
        imitated = predict(model, data.validation, known)
    assert np.linalg.norm(imitated - real) < 0.8 * np.linalg.norm(plain - real)
