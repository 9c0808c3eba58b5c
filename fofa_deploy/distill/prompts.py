"""Adaptive feedback prompts (AFP): small trainable blocks inside the frozen teacher. arXiv 2501.08885, equation 1."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from fofa_deploy.distill.grids import resize

Fusion = Literal["dense", "depthwise"]


def _pointwise(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    # Grouped only where the channels divide: gcd(4, 6) = 2 groups, gcd(4, 7) = 1.
    return nn.Conv2d(inputs, outputs, 1, groups=math.gcd(groups, inputs, outputs))


def _five_by_five(channels: int, groups: int) -> nn.Conv2d:
    return nn.Conv2d(channels, channels, 5, padding=2, groups=groups)


class SqueezeExcite(nn.Module):
    """SE(z) = z * sigmoid(W2 relu(W1 GAP z)): (B, C, H, W) -> (B, C, H, W), the gated map and not the gate."""

    def __init__(self, channels: int, reduction: int = 16) -> None:
        super().__init__()
        hidden = max(1, channels // reduction)
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)

    def forward(self, grid: Tensor) -> Tensor:
        pooled = grid.mean(dim=(2, 3), keepdim=True)
        gate: Tensor = self.excite(self.squeeze(pooled).relu()).sigmoid()
        return grid * gate


class Fusion2d(nn.Module):
    """U = Conv1x1(SE(Conv1x1(Conv5x5(Conv1x1[X; G])))), G a projection of the gap to X's shape (equation 1, first line).

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
            _five_by_five(channels, 1 if fusion == "dense" else channels),
            _pointwise(channels, channels),
            SqueezeExcite(channels),
            _pointwise(channels, channels),
        )

    def forward(self, grid: Tensor, gap: Tensor) -> Tensor:
        """X (B, C', H', W') and gap (B, C, H, W) -> U (B, C', H', W')."""
        size = (grid.shape[-2], grid.shape[-1])
        feedback = self.project(self.norm(resize(gap, size)))
        fused: Tensor = self.blocks(torch.cat([grid, feedback], dim=1))
        return fused


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
            _five_by_five(channels, channels),
            _pointwise(channels, channels),
            SqueezeExcite(channels),
            _pointwise(channels, channels, groups=4),
        )
        self.b = nn.Parameter(torch.zeros(()))

    def forward(self, grid: Tensor, gap: Tensor | None = None) -> Tensor:
        """X (B, C', H', W'), gap (B, C, H, W) -> X' (B, C', H', W'); the gap passes no gradient back."""
        # A teacher may be stored in bf16; the prompt's own weights are not.
        inner = grid.to(self.b.dtype)
        if self.fuse is not None and gap is not None:
            inner = self.fuse(inner, gap.detach().to(self.b.dtype))
        prompt: Tensor = self.b * self.blocks(inner)
        return grid + prompt.to(grid.dtype)
