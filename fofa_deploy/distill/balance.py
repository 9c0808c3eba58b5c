"""Weights that nobody has to tune: every term is scaled so that it moves the student as much as the labels do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fofa_deploy.distill.parallel import averaged

INTERVAL = 20
"""Steps from one measurement to the next: one costs a backward pass through the student per term."""

_MEMORY = 0.8
_LARGEST = 100.0
"""A term that hardly moves the student is scaled up, but not to noise."""


class GradientBalance(nn.Module):
    """Scales of the terms: the norm of cross-entropy's gradient at the student's weights over that of the term's.

    In the spirit of GradNorm (Chen et al., arXiv 1711.02257), without its training of the scales: norms are measured on
    every 20th step, remembered as a moving average, and part of the checkpoint. So is the cosine of the two gradients, by
    which Du et al. (arXiv 1812.02224) judge an auxiliary loss: it is told, and changes nothing.

    Args:
        names: of the terms to be scaled; ``ce`` is what they are scaled to.
    """

    norms: Tensor
    cosines: Tensor
    steps: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = ("ce", *names)
        self.register_buffer("norms", torch.zeros(len(self._names)))
        self.register_buffer("cosines", torch.zeros(len(self._names)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def agreement(self) -> dict[str, float]:
        """Term -> the cosine between its gradient and the labels', a moving average."""
        return dict(zip(self._names[1:], self.cosines[1:].tolist(), strict=True))

    def forward(self, terms: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
        """Named scalar losses -> a factor (no gradient) for each of the balanced ones."""
        if self.training and torch.is_grad_enabled():
            if int(self.steps) % INTERVAL == 0:
                self._measure(terms, [parameter for parameter in parameters if parameter.requires_grad])
            self.steps += 1
        scales = (self.norms[0] / self.norms[1:].clamp_min(1e-12)).clamp(1 / _LARGEST, _LARGEST)
        known = (self.norms > 0).all()
        return dict(zip(self._names[1:], torch.where(known, scales, torch.ones_like(scales)), strict=True))

    def _measure(self, terms: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> None:
        labels = _gradient(terms["ce"], parameters)
        others = (_compared(labels, _gradient(terms[name], parameters)) for name in self._names[1:])
        found = torch.stack([_compared(labels, labels), *others], dim=1)
        if found.isfinite().all():
            memory = _MEMORY if int(self.steps) else 0.0
            self.norms.lerp_(found[0], 1 - memory)
            self.cosines.lerp_(found[1], 1 - memory)


def _compared(labels: Tensor, gradient: Tensor) -> Tensor:
    """(2,): the norm of a gradient (P,), and the cosine between it and the labels'; 0 where there is none."""
    norm = gradient.norm()
    return torch.stack([norm, labels @ gradient / (labels.norm() * norm).clamp_min(1e-12)])


def _gradient(term: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """(P,), of the whole batch, wherever its parts are: averaged over processes first, as the optimizer's gradient is."""
    found = torch.autograd.grad(term, parameters, retain_graph=True, materialize_grads=True)
    gradient: Tensor = averaged(torch.cat([part.float().flatten() for part in found]))
    return gradient
