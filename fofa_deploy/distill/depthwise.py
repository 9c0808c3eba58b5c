"""Depthwise 5x5 convolution whose backward pass on the CPU is made of what oneDNN is fast at."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

_SIDE = 5


class Depthwise5x5(nn.Conv2d):
    """A filter of its own for each channel: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, _SIDE, padding=_SIDE // 2, groups=channels)

    def forward(self, grid: Tensor) -> Tensor:
        plain = grid.device.type != "cpu" or grid.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
        if plain or torch.compiler.is_compiling() or grid.shape[-1] % 2:
            return super().forward(grid)
        return _Split.apply(grid, self.weight, self.bias)  # type: ignore[no-any-return, no-untyped-call]


class _Split(torch.autograd.Function):
    """The same sums in another order.

    oneDNN has a depthwise kernel for the gradient of filters at most three columns wide; wider ones are taken for dense
    and cost many times as much. Columns -1, 0, 1 are such a filter. So are columns -2, 0, 2 where two neighbouring columns
    of the grid count as channels, which with channels last is the same memory. The gradient of the input is an
    ordinary convolution with the filter turned round, and the forward kernels are the faster ones.
    """

    @staticmethod
    def forward(ctx: Any, grid: Tensor, weight: Tensor, bias: Tensor) -> Tensor:  # noqa: ANN401
        grid = grid.contiguous(memory_format=torch.channels_last)
        ctx.save_for_backward(grid, weight)
        return _convolve(grid, weight, bias)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:  # noqa: ANN401
        grid, weight = ctx.saved_tensors
        gradient = gradient.contiguous(memory_format=torch.channels_last)
        inner, bias = _narrow(grid, gradient)
        outer = _narrow(_paired(grid), _paired(gradient))[0].unflatten(0, (2, -1)).sum(dim=0)
        filters = torch.cat([outer[..., :1], inner, outer[..., 2:]], dim=3)
        return _convolve(gradient, weight.flip(2, 3)) if ctx.needs_input_grad[0] else None, filters, bias


def _convolve(grid: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.conv2d(grid, weight, bias, padding=_SIDE // 2, groups=len(weight))


def _paired(grid: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 2 C, H, W / 2), a view where channels are last: even columns first, then odd ones."""
    pairs: Tensor = grid.permute(0, 2, 3, 1).unflatten(2, (-1, 2)).flatten(3).permute(0, 3, 1, 2)
    return pairs


def _narrow(grid: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of a filter of three columns and of the bias: (C, 1, 5, 3) and (C)."""
    channels = grid.shape[1]
    weight = grid.new_empty(channels, 1, _SIDE, 3)
    _, filters, bias = torch.ops.aten.convolution_backward(
        gradient, grid, weight, [channels], [1, 1], [_SIDE // 2, 1], [1, 1], False, [0, 0], channels, [False, True, True]
    )
    return filters, bias
