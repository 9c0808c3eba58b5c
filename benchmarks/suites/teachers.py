"""The teacher of the Fashion-MNIST suite: convolutions at high resolution, most parameters in one wide dense layer."""

from __future__ import annotations

from torch import Tensor, nn


class WideCNN(nn.Module):
    """Three convolutional blocks and a dense layer of ``width``; images (B,C,28,28) -> logits (B,classes)."""

    def __init__(self, in_chans: int, num_classes: int, width: int = 1280, dropout: float = 0.4) -> None:
        super().__init__()
        self.block1 = _block(in_chans, 32, pool=True)
        self.block2 = _block(32, 64, pool=True)
        self.block3 = _block(64, 64, pool=False)
        self.dense = nn.Sequential(nn.Flatten(), nn.Linear(64 * 7 * 7, width), nn.ReLU(), nn.Dropout(dropout))
        self.classifier = nn.Linear(width, num_classes)

    def get_classifier(self) -> nn.Linear:
        return self.classifier

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.classifier(self.dense(self.block3(self.block2(self.block1(images)))))
        return logits


def _block(inputs: int, outputs: int, pool: bool) -> nn.Sequential:
    layers = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.MaxPool2d(2) if pool else nn.Identity())


def wide_cnn(num_classes: int, in_chans: int, width: int = 1280) -> nn.Module:
    return WideCNN(in_chans, num_classes, width)
