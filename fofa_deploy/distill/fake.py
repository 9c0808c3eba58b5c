"""Fake quantization: a student computes in float what its int8 artifact will compute (Jacob et al. 2018, arXiv 1712.05877).

Imitated is what every back end does alike: the operands of convolutions and linear layers are rounded, weights to a signed
symmetric grid per output channel, inputs to an unsigned one with a zero point per tensor. Gradients pass rounding as if it
were not there (straight-through estimator, Bengio et al. 2013, arXiv 1308.3432), and stop where an input is clipped.

BatchNorm keeps its statistics and is not folded: it scales whole output channels, so what lies on a channel's symmetric grid
lies on one after a runtime has folded it, too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from fofa_deploy.distill import parallel
from fofa_deploy.distill.probe import frozen_in_eval

LEVELS = {7: 64, 8: 127}
"""Largest integer of a weight, by width. It occurs in every channel, so that a back end's quantizer finds the same integers
again: ONNX Runtime's seven bits are these, NNCF's reach 63.5, which rounds alike."""

LEAST = 1e-30
"""Of scales: its inverse is finite."""

DECAY = 0.01
"""How far a range shrinks per step towards a batch that does not fill it."""


class WeightGrid(nn.Module):
    """A parametrization: weights (O, ...) -> the nearest of each output channel's ``2 * LEVELS[bits] + 1`` values."""

    def __init__(self, bits: int) -> None:
        super().__init__()
        self._largest = LEVELS[bits]

    def forward(self, weight: Tensor) -> Tensor:
        scale = (weight.detach().flatten(1).abs().amax(1) / self._largest).clamp(min=LEAST)
        origin = torch.zeros_like(scale, dtype=torch.int32)
        return torch.fake_quantize_per_channel_affine(weight, scale, origin, 0, -self._largest, self._largest)


class InputRange(nn.Module):
    """The range of what enters a layer, and that input rounded to 256 values in it.

    The range is what a calibration finds, the extremes; in training it grows at once and shrinks slowly, and after
    ``updates`` batches it stays.
    """

    low: Tensor
    high: Tensor
    seen: Tensor

    def __init__(self, updates: int) -> None:
        super().__init__()
        self._updates = updates
        self.calibrating = False
        for name, value in (("low", torch.zeros(())), ("high", torch.zeros(())), ("seen", torch.zeros((), dtype=torch.int64))):
            self.register_buffer(name, value)  # so that a resumed training goes on with them

    def forward(self, inputs: Tensor) -> Tensor:
        """Of any shape; the type is kept."""
        if self.calibrating:
            low, high = inputs.aminmax()
            self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
            return inputs
        if self.training:
            self._follow(inputs.detach().float())
        scale = ((self.high - self.low) / 255).clamp(min=LEAST)
        origin = (-self.low / scale).round().to(torch.int32)
        return torch.fake_quantize_per_tensor_affine(inputs.float(), scale, origin, 0, 255).to(inputs.dtype)

    def _follow(self, inputs: Tensor) -> None:
        low, high = parallel.extremes(inputs)
        moves = self.seen < self._updates  # a tensor: asking for its value would wait for the device
        self.low.copy_(torch.where(moves, torch.minimum(low, self.low.lerp(low, DECAY)).clamp(max=0), self.low))
        self.high.copy_(torch.where(moves, torch.maximum(high, self.high.lerp(high, DECAY)).clamp(min=0), self.high))
        self.seen += 1

    def hook(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """A forward pre-hook of the layer."""
        return (self(inputs[0]), *inputs[1:])


@contextmanager
def fake_quantized(model: nn.Module, bits: int, updates: int, batches: Iterable[Tensor]) -> Iterator[None]:
    """Inside, the model computes as if in int8; afterwards it is a plain float model whose weights lie on their grids.

    Args:
        bits: of the weights, 7 or 8.
        updates: number of training batches that ranges follow.
        batches: normalized images (B, C, H, W), that ranges begin with.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    with ExitStack() as hooks:
        hooks.enter_context(model.register_forward_pre_hook(_hold_statistics))
        for layer in layers:
            layer.input_range = InputRange(updates).train(layer.training)
            hooks.enter_context(layer.register_forward_pre_hook(layer.input_range.hook))
        _calibrate(model, batches)
        for layer in layers:
            parametrize.register_parametrization(layer, "weight", WeightGrid(bits))
        yield
    for layer in layers:
        del layer.input_range
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def _hold_statistics(model: nn.Module, _: tuple[Any, ...]) -> None:
    """BatchNorm uses the statistics that inference uses, whatever mode a training loop sets."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def _calibrate(model: nn.Module, batches: Iterable[Tensor]) -> None:
    ranges = [module for module in model.modules() if isinstance(module, InputRange)]
    with frozen_in_eval(model):
        for found in ranges:
            found.calibrating = True
        for batch in batches:
            model(batch)
        for found in ranges:
            found.calibrating = False
