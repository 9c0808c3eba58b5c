"""PyTorch's own answers on evaluation images: what every artifact is held to."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fofa_deploy.data import Split, eval_batches
from fofa_deploy.data.decode import Pixels
from fofa_deploy.data.sources import Indices
from fofa_deploy.types import Preprocessing

BATCH, CPU_BATCH, CPU_VALUES = 256, 32, 2**20
"""Images at once; on a CPU as many as have so many values, between those two.

Large images are no faster there by more, and attention in windows takes much memory for every one of them; of small ones,
calls cost more than arithmetic.
"""

Reader = Callable[[Split, int], Iterable[tuple[Pixels, Indices]]]
"""Images and labels of a split, so many at a time, in its order."""


class Normalize(nn.Module):
    """uint8 (B,C,H,W) -> float32, with the arithmetic of `Preprocessing.apply`."""

    scale: Tensor
    shift: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        std = torch.tensor(preprocessing.std, dtype=torch.float64)
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64)
        self.register_buffer("scale", (1.0 / (255.0 * std)).float().view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", (mean / std).float().view(1, -1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return images.float() * self.scale - self.shift


@torch.no_grad()
def predict(model: nn.Module, split: Split, preprocessing: Preprocessing, read: Reader = eval_batches) -> NDArray[np.float32]:
    """Logits float32 (N,K) of ``model`` in eval mode, in the split's order; the mode it was in is restored."""
    device = next(model.parameters()).device
    normalize = Normalize(preprocessing).to(device)
    values = preprocessing.channels * math.prod(preprocessing.image_size)
    size = min(BATCH, max(CPU_BATCH, CPU_VALUES // values)) if device.type == "cpu" else BATCH
    training = model.training
    model.eval()
    try:
        batches = [model(normalize(torch.from_numpy(images).to(device))) for images, _ in read(split, size)]
    finally:
        model.train(training)
    return torch.cat(batches).float().cpu().numpy()
