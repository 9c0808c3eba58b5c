"""The moving average of a student's weights: smoother than the weights themselves, and often the better student."""

from __future__ import annotations

import copy
from collections.abc import Collection

import torch
from torch import nn


def twin(model: nn.Module) -> nn.Module:
    """A copy that is not trained."""
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def follow(average: nn.Module, model: nn.Module, decay: float, step: int, fixed: Collection[str] = ()) -> None:
    """average <- d average + (1 - d) weights, in place, with d = min(decay, (1 + step) / (10 + step)).

    The second keeps the random weights of the start from staying in the average of a short training. Counters and other integers
    are copied; tied weights, which a state has twice, count once.

    Args:
        step: of the optimizer, from 0.
        fixed: buffers that are copied, too: between two infinities there is no mean.
    """
    weight = 1 - min(decay, (1 + step) / (10 + step))
    followed: set[int] = set()
    for (name, mean), value in zip(average.state_dict().items(), model.state_dict().values(), strict=True):
        if not mean.is_floating_point() or name in fixed:
            mean.copy_(value)
        elif mean.data_ptr() not in followed:
            mean.lerp_(value, weight)
            followed.add(mean.data_ptr())
