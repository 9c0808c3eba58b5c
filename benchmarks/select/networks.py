"""Plain convolutional students of several widths, from the family of benchmarks/distillation; images (B,1,16,16) -> (B,classes)."""

from __future__ import annotations

from models import Convolutional
from torch import nn


def plain_cnn(num_classes: int, in_chans: int, channels: list[int], depth: int) -> nn.Module:
    """Three stages of (convolution, batch norm, ReLU) x ``depth``, at 16, 8 and 4 pixels."""
    return Convolutional(tuple(channels), depth, in_chans, num_classes)
