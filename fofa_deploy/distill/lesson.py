"""One batch as every method sees it, and what a method is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from fofa_deploy.distill.tapped import Features, Prompt

Teach = Callable[[Tensor, Mapping[int, Prompt]], Features]
"""The frozen teacher on images (B, C, H, W), bent by prompts: with gradients to the prompts."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A batch with both models' answers.

    Args:
        images: (B, C, H, W) at the teacher's size.
        labels: (B,).
        student: with gradients.
        teacher: the plain teacher's, without.
        teach: runs the teacher again: on these images, some of them or others, bent or not.
    """

    images: Tensor
    labels: Tensor
    student: Features
    teacher: Features
    teach: Teach


class Term(nn.Module):
    """A method: a lesson in, named scalar losses out. What it trains beside the student are its parameters."""

    notices: tuple[str, ...] = ()

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """A batch -> scalars with gradients, by name; each before its weight."""
        raise NotImplementedError
