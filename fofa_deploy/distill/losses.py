"""The loss terms, all in float32 whatever autocast says, and the statistics that put teacher features on one scale."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

_POOLS = ((4, 1 / 2), (2, 1 / 4), (1, 1 / 8))


def hierarchical_context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """HCL: [MSE + 1/2 MSE(pool4) + 1/4 MSE(pool2) + 1/8 MSE(pool1)] / weights used. arXiv 2501.08885, equation 5.

    Both (B, C, H, W) -> scalar. A pooling is used where it makes both sides smaller. Pooling is linear, so the
    difference is pooled once instead of either map.
    """
    gap = student.float() - teacher.float()
    loss, total = gap.square().mean(), 1.0
    for size, weight in _POOLS:
        if size < min(gap.shape[-2:]):
            loss = loss + weight * functional.adaptive_avg_pool2d(gap, size).square().mean()
            total += weight
    return loss / total


def divergence(teacher: Tensor, student: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 KL(teacher || student), nats per sample, of logits (B, K). Hinton et al., arXiv 1503.02531; 2501.08885, equation 6."""
    target = functional.log_softmax(teacher.float() / temperature, dim=1)
    guess = functional.log_softmax(student.float() / temperature, dim=1)
    return functional.kl_div(guess, target, reduction="batchmean", log_target=True) * temperature**2


def _standardize(embedding: Tensor) -> Tensor:
    """(B, D) -> (B, D) with mean 0 and variance 1 over the batch."""
    centred = embedding - embedding.mean(dim=0)
    return centred * torch.rsqrt(centred.square().mean(dim=0) + 1e-6)


def redundancy_loss(student: Tensor, teacher: Tensor, off_diagonal: float) -> Tensor:
    """RSD of projected student and teacher embeddings, both (B, d). arXiv 2507.21844.

    C = Z_s^T Z_t / B;  L = (1/d) [sum_i (1 - C_ii)^2 + lambda sum_{i != j} C_ij^2].
    """
    with torch.autocast(student.device.type, enabled=False):
        correlation = _standardize(student.float()).T @ _standardize(teacher.float()) / len(student)
        diagonal = correlation.diagonal()
        others = correlation.square().sum() - diagonal.square().sum()
        return ((1 - diagonal).square().sum() + off_diagonal * others) / len(diagonal)


class Projector(nn.Sequential):
    """Two-layer MLP with BatchNorm between: (B, D_s) -> (B, D_t). It keeps RSD off the student's own embedding."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(nn.Linear(inputs, outputs, bias=False), nn.BatchNorm1d(outputs), nn.ReLU(), nn.Linear(outputs, outputs))


class Standardizer(nn.Module):
    """Teacher features (B, C, H, W) per channel by running statistics of the *plain* teacher.

    Prompted features go through the same statistics, so that prompts cannot win by shrinking what is compared.
    The statistics are the exact average of all batches at first, then an exponential one; they are in the checkpoint.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, channels: int, momentum: float = 0.01) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("variance", torch.ones(channels))
        self.register_buffer("batches", torch.zeros(()))

    @torch.no_grad()
    def update(self, plain: Tensor) -> None:
        """Merge a batch of plain-teacher features (B, C, H, W) into the statistics."""
        variance, mean = torch.var_mean(plain.float(), dim=(0, 2, 3), correction=0)
        self.batches += 1
        share = (1 / self.batches).clamp_min(self.momentum)
        shift = mean - self.mean
        self.mean += share * shift
        # Variance of a mixture: it includes what lies between the two means.
        self.variance.lerp_(variance, share).add_(share * (1 - share) * shift.square())

    def forward(self, features: Tensor) -> Tensor:
        # The floor is relative: dead channels stay small whatever the stage's scale.
        floor = 1e-4 * self.variance.mean() + 1e-12
        scale = torch.rsqrt(self.variance + floor)
        return (features.float() - self.mean[:, None, None]) * scale[:, None, None]
