"""How alike two networks see the same images: linear CKA of their features, pooled over regions.

Centred kernel alignment (Kornblith et al., arXiv 1905.00414) with the linear kernel: 1 for features that are alike up to rotation
and scale, 0 for features that share nothing. It needs no common width, so that any two families can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fofa_deploy.data import Split, eval_batches
from fofa_deploy.distill.grids import pool
from fofa_deploy.distill.tapped import TappedModel
from fofa_deploy.distill.taps import evenly
from fofa_deploy.inference import Normalize

IMAGES = 256
"""Images that features are compared on: each gives as many rows as there are regions."""

BATCH = 64


@torch.no_grad()
def affinity(
    student: TappedModel, teacher: TappedModel, images: Split, shown: Split, normalize: Normalize, regions: int
) -> float | None:
    """Mean over stages of the linear CKA between student and teacher, on the first `IMAGES` of a split; in eval mode.

    Args:
        shown: the same images at the teacher's size.
        regions: per map, a square number.

    Returns:
        Between 0 and 1; None where the features of one do not vary.
    """
    pairs = min(len(student.stages), len(teacher.stages))
    views = (student, images), (teacher, shown)
    ours, theirs = (_features(model, pairs, seen, normalize, round(regions**0.5)) for model, seen in views)
    return _mean([linear_cka(one, other) for one, other in zip(ours, theirs, strict=True)])


def _features(model: TappedModel, count: int, images: Split, normalize: Normalize, side: int) -> list[Tensor]:
    """Of ``count`` stages: (images * side * side, C)."""
    model.eval()
    rows: list[list[Tensor]] = [[] for _ in range(count)]
    for pixels, _ in eval_batches(images.head(IMAGES), BATCH):
        maps = model(normalize(torch.from_numpy(pixels))).maps
        for kept, stage in zip(rows, evenly(len(maps), count), strict=True):
            kept.append(_pooled(maps[stage], side))
    return [torch.cat(kept) for kept in rows]


def linear_cka(one: Tensor, other: Tensor) -> float | None:
    """Features (N, D1) and (N, D2) of the same N inputs -> 0 to 1; None where one of them is constant or not finite."""
    raw = one.double(), other.double()
    one, other = (features - features.mean(0) for features in raw)
    if any(spread.norm() <= 1e-9 * features.norm() for spread, features in zip((one, other), raw, strict=True)):
        return None
    cross, own, their = ((a.T @ b).square().sum() for a, b in ((one, other), (one, one), (other, other)))
    scale = float((own * their).sqrt())
    if not 0 < scale < float("inf"):
        return None
    return min(1.0, float(cross) / scale)


def _pooled(grid: Tensor, side: int) -> Tensor:
    """(B, C, H, W) -> (B * side * side, C)"""
    return pool(grid.float(), [side]).transpose(1, 2).flatten(0, 1)


def _mean(found: Sequence[float | None]) -> float | None:
    known = [value for value in found if value is not None]
    return sum(known) / len(known) if known and len(known) == len(found) else None
