"""The families of this benchmark, at a size that two CPU cores can train many times; images (B, 1, 16, 16) -> (B, classes).

A plain convolutional network with batch norm, a vision transformer (arXiv 2010.11929), an MLP-Mixer (2105.01601), and a
hybrid of a convolutional stem and a transformer.
"""

from __future__ import annotations

import timm
import torch
from timm.models.mlp_mixer import MlpMixer
from torch import Tensor, nn

SIDE = 16


class Convolutional(nn.Module):
    """Stages of (convolution, batch norm, ReLU), a pooling between them; (B, C, H, W) -> (B, classes)."""

    def __init__(self, channels: tuple[int, ...], depth: int, in_chans: int, num_classes: int) -> None:
        super().__init__()
        widths = (in_chans, *channels)
        self.stages = nn.ModuleList(_convolutions(*pair, depth) for pair in zip(widths, channels, strict=False))
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Linear(channels[-1], num_classes)

    def get_classifier(self) -> nn.Linear:
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        grid = images
        for number, stage in enumerate(self.stages):
            grid = stage(self.pool(grid) if number else grid)
        logits: Tensor = self.head(grid.mean(dim=(2, 3)))
        return logits


def _convolutions(inputs: int, outputs: int, depth: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
        inputs = outputs
    return nn.Sequential(*layers)


class Hybrid(nn.Module):
    """Two convolutional stages at 16 and 8 pixels, then transformer blocks over the 4 x 4 grid."""

    def __init__(self, width: int, depth: int, in_chans: int, num_classes: int) -> None:
        super().__init__()
        self.stem = nn.ModuleList([_convolutions(in_chans, width // 4, 2), _convolutions(width // 4, width // 2, 2)])
        self.merge = nn.Conv2d(width // 2, width, 2, stride=2)
        self.pool = nn.MaxPool2d(2)
        self.positions = nn.Parameter(torch.randn(1, (SIDE // 4) ** 2, width) * 0.02)
        layer = {"dim_feedforward": 3 * width, "dropout": 0.0, "batch_first": True, "norm_first": True, "activation": "gelu"}
        self.blocks = nn.ModuleList(nn.TransformerEncoderLayer(width, 4, **layer) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, num_classes)

    def get_classifier(self) -> nn.Linear:
        return self.head

    def forward(self, images: Tensor) -> Tensor:
        grid = self.merge(self.stem[1](self.pool(self.stem[0](images))))
        tokens = grid.flatten(2).transpose(1, 2) + self.positions
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.head(self.norm(tokens).mean(dim=1))
        return logits


def cnn_teacher(num_classes: int, in_chans: int) -> nn.Module:
    return Convolutional((24, 48, 96), 2, in_chans, num_classes)


def cnn_student(num_classes: int, in_chans: int) -> nn.Module:
    return Convolutional((8, 12, 16), 1, in_chans, num_classes)


def hybrid_teacher(num_classes: int, in_chans: int) -> nn.Module:
    return Hybrid(64, 3, in_chans, num_classes)


def mixer_teacher(num_classes: int, in_chans: int) -> nn.Module:
    return MlpMixer(num_classes, SIDE, in_chans, patch_size=4, num_blocks=3, embed_dim=96)


def mixer_student(num_classes: int, in_chans: int) -> nn.Module:
    return MlpMixer(num_classes, SIDE, in_chans, patch_size=4, num_blocks=3, embed_dim=48)


def vit_student(num_classes: int, in_chans: int) -> nn.Module:
    arguments = {"img_size": SIDE, "patch_size": 4, "embed_dim": 48, "depth": 3, "num_heads": 3}
    return timm.create_model("vit_tiny_patch16_224", num_classes=num_classes, in_chans=in_chans, **arguments)
