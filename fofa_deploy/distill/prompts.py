"""Adaptive feedback prompts (AFP): small trainable blocks inside the frozen teacher. arXiv 2501.08885, equation 1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from fofa_deploy.distill.depthwise import Depthwise5x5
from fofa_deploy.distill.grids import resize

Fusion = Literal["dense", "depthwise"]


def _pointwise(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    # Grouped only where the channels divide: gcd(4, 6) = 2 groups, gcd(4, 7) = 1.
    return nn.Conv2d(inputs, outputs, 1, groups=math.gcd(groups, inputs, outputs))


def _matrix(convolution: nn.Conv2d) -> Tensor:
    """(outputs, inputs) of a 1x1 convolution, groups on the diagonal."""
    weight = convolution.weight.flatten(1)
    return weight if convolution.groups == 1 else torch.block_diag(*weight.chunk(convolution.groups))


def _folded(convolutions: Sequence[nn.Conv2d]) -> tuple[Tensor, Tensor]:
    """1x1 convolutions one after the other as one: (outputs, inputs) and (outputs)."""
    first, *others = convolutions
    weight, bias = _matrix(first), _biased(first)
    for convolution in others:
        matrix = _matrix(convolution)
        weight, bias = matrix @ weight, matrix @ bias + _biased(convolution)
    return weight, bias


def _biased(convolution: nn.Conv2d) -> Tensor:
    assert convolution.bias is not None
    return convolution.bias


class SqueezeExcite(nn.Module):
    """SE(z) = z * sigmoid(W2 relu(W1 GAP z)): (B, C, H, W) -> (B, C, H, W), the gated map and not the gate."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def gate(self, pooled: Tensor) -> Tensor:
        """GAP z (B, C, 1, 1) -> (B, C, 1, 1)."""
        return self.excite(self.squeeze(pooled).relu()).sigmoid()  # type: ignore[no-any-return]

    def forward(self, grid: Tensor) -> Tensor:
        return grid * self.gate(grid.mean(dim=(2, 3), keepdim=True))


def _gated(
    grid: Tensor, before: nn.Conv2d, excite: SqueezeExcite, after: Sequence[nn.Conv2d], factor: Tensor | None = None
) -> Tensor:
    """factor * after(SE(before(z))), all of them 1x1 convolutions: (B, C, H, W) -> (B, C, H, W), channels last.

    The gate is one number per sample and channel, and averaging commutes with ``before``: so the gate is known before any
    map is made, and where a map has more cells than channels, all of it is multiplied out to one matrix per sample.
    """
    gate = excite.gate(before(grid.mean(dim=(2, 3), keepdim=True))).flatten(1)
    weight, bias = _folded(after)
    if factor is not None:
        weight, bias = factor * weight, factor * bias
    tokens = grid.permute(0, 2, 3, 1).flatten(1, 2)
    first = _matrix(before)
    if tokens.shape[1] > tokens.shape[2]:
        weights = weight * gate[:, None]
        offsets = weights @ _biased(before) + bias
        mixed = torch.baddbmm(offsets[:, None], tokens, (weights @ first).mT)
    else:
        mixed = functional.linear(functional.linear(tokens, first, before.bias) * gate[:, None], weight, bias)
    found: Tensor = mixed.unflatten(1, grid.shape[-2:]).permute(0, 3, 1, 2)
    return found


def _parts(blocks: nn.Sequential) -> tuple[nn.Conv2d, nn.Module, nn.Conv2d, SqueezeExcite, nn.Conv2d]:
    """A 1x1 convolution, a spatial one, a 1x1 one, a gate, a 1x1 one."""
    return tuple(blocks)  # type: ignore[return-value]


class Fusion2d(nn.Module):
    """U = Conv1x1(SE(Conv1x1(Conv5x5(Conv1x1[X; G])))), G a projection of the gap to X's shape (equation 1, first line).

    The gap is normalized and projected at its own size or X's, whichever is smaller: resizing and 1x1 convolutions commute, and
    the statistics of the normalization are those of the gap rather than of the enlarged one.

    Args:
        channels: C' of X.
        gap_channels: C of the gap between student and plain teacher.
        fusion: the paper's 5x5 convolution is dense; depthwise costs 1/C' of it.
    """

    def __init__(self, channels: int, gap_channels: int, fusion: Fusion = "dense") -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(gap_channels)
        self.project = _pointwise(gap_channels, channels)
        self.blocks = nn.Sequential(
            _pointwise(2 * channels, channels),
            nn.Conv2d(channels, channels, 5, padding=2) if fusion == "dense" else Depthwise5x5(channels),
            _pointwise(channels, channels),
            SqueezeExcite(channels),
            _pointwise(channels, channels),
        )

    def forward(self, grid: Tensor, gap: Tensor, after: Sequence[nn.Conv2d] = ()) -> Tensor:
        """X (B, C', H', W') and gap (B, C, H, W) -> U (B, C', H', W'), through the 1x1 convolutions that come after it."""
        joint, spatial, before, excite, last = _parts(self.blocks)
        return _gated(spatial(self._joined(joint, grid, gap)), before, excite, (last, *after))

    def _joined(self, joint: nn.Conv2d, grid: Tensor, gap: Tensor) -> Tensor:
        """Conv1x1[X; G] as the sum of its two halves."""
        size = (grid.shape[-2], grid.shape[-1])
        if gap.shape[-2] * gap.shape[-1] > size[0] * size[1]:
            gap = resize(gap, size)
        own, theirs = joint.weight.chunk(2, dim=1)
        feedback = self.project(self._normalized(gap.contiguous(memory_format=torch.channels_last)))
        return functional.conv2d(grid, own, joint.bias) + resize(functional.conv2d(feedback, theirs), size)

    def _normalized(self, gap: Tensor) -> Tensor:
        """A single value per channel, of one image and one cell, has no variance: it goes by those that came before."""
        norm = self.norm
        if gap.numel() > gap.shape[1]:
            return norm(gap)  # type: ignore[no-any-return]
        return functional.batch_norm(gap, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)


class PromptBlock(nn.Module):
    """X' = X + b * P, P = Conv1x1_g4(SE(Conv1x1(DWConv5x5(Conv1x1_g4(U))))), b = 0 at the start (equation 1).

    Args:
        channels: C' of the grid that enters the teacher stage.
        gap_channels: channels of the gap; None = a prompt without feedback, U = X.
    """

    def __init__(self, channels: int, gap_channels: int | None = None, fusion: Fusion = "dense") -> None:
        super().__init__()
        self.fuse = Fusion2d(channels, gap_channels, fusion) if gap_channels else None
        self.blocks = nn.Sequential(
            _pointwise(channels, channels, groups=4),
            Depthwise5x5(channels),
            _pointwise(channels, channels),
            SqueezeExcite(channels),
            _pointwise(channels, channels, groups=4),
        )
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, grid: Tensor, gap: Tensor | None = None) -> Tensor:
        """X (B, C', H', W'), gap (B, C, H, W) -> X' (B, C', H', W'); the gap passes no gradient back."""
        # A teacher may be stored in bf16; the prompt's own weights are not.
        inner = grid.to(self.b.dtype).contiguous(memory_format=torch.channels_last)
        first, spatial, before, excite, last = _parts(self.blocks)
        if self.fuse is not None and gap is not None:
            inner = self.fuse(inner, gap.detach().to(self.b.dtype), after=(first,))
        else:
            inner = first(inner)
        return grid + _gated(spatial(inner), before, excite, (last,), self.b).to(grid.dtype)
