"""The small modules that losses are taken through: trained beside the student, and thrown away with the teacher."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fofa_deploy.distill import parallel
from fofa_deploy.distill.grids import resize


class Projector(nn.Sequential):
    """Two-layer MLP with BatchNorm between: (B, D_s) -> (B, D_t). It keeps RSD off the student's own embedding."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(), nn.Linear(outputs, outputs))


class Sketch(nn.Module):
    """A fixed orthonormal projection, (B, D) -> (B, d): it keeps angles and distances as well as d dimensions can.

    Drawn from a seed of its own, and part of the state.
    """

    basis: Tensor

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        drawn = torch.randn(inputs, outputs, generator=torch.Generator().manual_seed(0))
        self.register_buffer("basis", torch.linalg.qr(drawn).Q)

    def forward(self, embedding: Tensor) -> Tensor:
        """(B, D) -> (B, d), in float32."""
        with torch.autocast(embedding.device.type, enabled=False):
            return embedding.float() @ self.basis


SETTLED = 100
"""Batches of which teacher features are known well enough: what comes later would move the target and cost a pass over it."""


class Standardizer(nn.Module):
    """Teacher features (B, C, H, W) per channel by statistics of the *plain* teacher.

    Prompted features go through the same statistics, so that prompts cannot win by shrinking what is compared.
    The statistics are those of the first `SETTLED` batches, each of which counts alike, and fixed from then on; they are in the
    checkpoint.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def update(self, plain: Tensor) -> None:
        """Merge a batch of plain-teacher features (B, C, H, W), of all processes, into the statistics."""
        if int(self.batches) >= SETTLED:
            return
        variance, mean = parallel.var_mean(plain.float(), dim=(0, 2, 3))
        self.batches += 1
        share = 1 / self.batches
        shift = mean - self.mean
        self.mean += share * shift
        # Variance of a mixture: it includes what lies between the two means.
        self.variance.lerp_(variance, share).add_(share * (1 - share) * shift.square())

    def forward(self, features: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape, in float32, mean 0 and variance 1 by the plain teacher's statistics."""
        # The floor is relative: dead channels stay small whatever the stage's scale.
        floor = 1e-4 * self.variance.mean() + 1e-12
        scale = torch.rsqrt(self.variance + floor)
        shift = -self.mean * scale
        return torch.addcmul(shift[:, None, None], features.float(), scale[:, None, None])


class Regressor(nn.Module):
    """A 1x1 convolution to the teacher's channels, at the teacher's size: (B, c, h, w) -> (B, C, H, W). arXiv 1412.6550."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(inputs, outputs, 1)

    def forward(self, grid: Tensor, size: tuple[int, int]) -> Tensor:
        return resize(self.project(grid), size)


class ExitBranch(nn.Sequential):
    """An early exit: (B, c, h, w) -> logits (B, K). arXiv 2310.19444, section 3.2.

    Depthwise-separable convolutions halve the grid to at most 4 x 4, then pooling and a classifier. The paper has
    attention blocks here for transformers; a grid is a grid, and one kind of branch serves every family.
    """

    def __init__(self, shape: tuple[int, int, int], classes: int) -> None:
        channels, height, width = shape
        halvings = max(0, (max(height, width) - 1).bit_length() - 2)
        blocks = [layer for _ in range(halvings) for layer in _separable(channels)]
        super().__init__(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LayerNorm(channels), nn.Linear(channels, classes))


def _separable(channels: int) -> tuple[nn.Module, ...]:
    spatial = nn.Conv2d(channels, channels, 3, stride=2, padding=1, groups=channels, bias=False)
    return spatial, nn.Conv2d(channels, channels, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()
