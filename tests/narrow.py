"""A user's own network: four narrow layers, whose channels can be given very different scales without a change of its answers."""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 16
TAPS = ("first", "second", "third")


def block(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


class Narrow(nn.Module):
    """Images (B,C,16,16) -> logits (B,K)."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.first, self.second, self.third = block(in_chans, WIDTH), block(WIDTH, WIDTH), block(WIDTH, 2 * WIDTH)
        self.head = nn.Linear(2 * WIDTH, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.third(self.second(self.first(images))).mean((2, 3)))


@torch.no_grad()
def spread(model: Narrow, octaves: int) -> None:
    """Multiply channels by up to 2**octaves, and divide by it after ReLU, which hands scales on (Nagel et al. 2019)."""
    for (_, norm, _), (conv, *_) in ((model.first, model.second), (model.second, model.third)):
        factors = 2.0 ** torch.linspace(0, octaves, WIDTH).round()
        norm.weight *= factors
        norm.bias *= factors
        conv.weight /= factors.view(1, -1, 1, 1)
