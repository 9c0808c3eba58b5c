"""Weights that nobody has to tune: every term is scaled so that it moves the student as much as the labels do."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from fofa_deploy.distill.parallel import averaged

_HORIZON = 90.0
"""Steps after which a measurement counts for a third of what it did, however often there is one."""
_LARGEST = 100.0
"""A term that hardly moves the student is scaled up, but not to noise."""
_SURPRISE = 10.0
"""What is remembered is at most this times what is found: where a student's answers are constant at first, as those of a
head that starts at zero, a correlation's gradient is a millionfold, and would be remembered for a thousand steps."""


_ABOVE_UNDERFLOW = 2.0**10
"""In fp16 a mean over a map passes back less than the smallest number there is; elsewhere a power of two changes nothing."""


class GradientBalance(nn.Module):
    """Scales of the terms: the norm of cross-entropy's gradient at the student's weights over that of the term's.

    In the spirit of GradNorm (Chen et al., arXiv 1711.02257), without its training of the scales: norms are measured now and
    then, remembered as a moving average, and part of the checkpoint.

    Args:
        names: of the terms to be scaled; ``ce`` is what they are scaled to.
        every: steps from one measurement to the next: one costs a backward pass through the student per term.
        passes: forward passes that share a step, as in `TrainPlan.accumulate`; the first of them is measured.
    """

    norms: Tensor
    steps: Tensor

    def __init__(self, names: Sequence[str], every: int, passes: int = 1) -> None:
        super().__init__()
        self._names, self._interval, self._memory = ("ce", *names), every * passes, math.exp(-every / _HORIZON)
        self.register_buffer("norms", torch.zeros(len(self._names)))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def forward(self, terms: Mapping[str, Tensor], parameters: Iterable[nn.Parameter]) -> dict[str, Tensor]:
        """Named scalar losses -> a factor (no gradient) for each of the balanced ones; those that teach no more may be missing."""
        if self.training and torch.is_grad_enabled():
            if int(self.steps) % self._interval == 0:
                self._measure(terms, [parameter for parameter in parameters if parameter.requires_grad])
            self.steps += 1
        scales = (self.norms[0] / self.norms[1:].clamp_min(1e-12)).clamp(1 / _LARGEST, _LARGEST)
        known = (self.norms[0] > 0) & (self.norms[1:] > 0)
        return dict(zip(self._names[1:], torch.where(known, scales, torch.ones_like(scales)), strict=True))

    def _measure(self, terms: Mapping[str, Tensor], parameters: Sequence[nn.Parameter]) -> None:
        known = zip(self._names, self.norms, strict=True)
        found = torch.stack([_gradient_norm(terms[name], parameters) if name in terms else norm for name, norm in known])
        if found.isfinite().all():
            # Zero is a term that says nothing of this batch, such as a correlation between its images where there is one.
            found = torch.where(found > 0, found, self.norms)
            weight = torch.where(self.norms > 0, 1 - self._memory, 1.0)
            self.norms.clamp_(max=_SURPRISE * found).lerp_(found, weight)


def _gradient_norm(term: Tensor, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Of the whole batch, wherever its parts are: averaged over processes first, whose parts differ by one image at most.

    Zero of a term that does not reach the parameters; of several processes, it may in some.
    """
    term = term if term.requires_grad else term + 0 * parameters[0].sum()
    for scale in (_ABOVE_UNDERFLOW, 1.0):
        gradients = torch.autograd.grad(scale * term, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
        norm: Tensor = averaged(torch.cat([gradient.float().flatten() for gradient in gradients])).norm()
        if norm.isfinite():
            break
    return norm / scale
