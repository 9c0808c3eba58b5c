"""Batches. Those for training depend on (seed, epoch, index) alone, so that a resumed run sees what it would have seen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fofa_deploy.config import DataPlan
from fofa_deploy.data.decode import Pixels
from fofa_deploy.data.sources import Boxes, Indices
from fofa_deploy.data.splits import Split


def uniform(seed: int, epoch: int, indices: Indices, count: int) -> NDArray[np.float64]:
    """Numbers in [0,1), (B,count), that depend on (seed, epoch, index) alone: SplitMix64 (Steele et al. 2014) as a hash.

    Order of visit, batch size, workers and resumption cannot change them, which a global generator does not offer.
    """
    state = _mix(_mix(np.uint64(seed)) ^ np.uint64(epoch))
    rows = _mix(state ^ indices.astype(np.uint64))[:, None] ^ np.arange(1, count + 1, dtype=np.uint64)
    bits: NDArray[np.uint64] = _mix(rows) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def _mix(value: Any) -> Any:  # noqa: ANN401 - uint64 scalars and arrays alike
    with np.errstate(over="ignore"):
        z = value + np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return z ^ (z >> np.uint64(31))


def _crop_boxes(plan: DataPlan, chance: NDArray[np.float64]) -> Boxes:
    """Random resized crops (Szegedy et al. 2015): area in [scale,1], aspect ratio in [3/4,4/3], as fractions."""
    area = plan.scale + (1 - plan.scale) * chance[:, 0]
    ratio = np.exp((2 * chance[:, 1] - 1) * np.log(4 / 3))
    width, height = np.minimum(np.sqrt(area * ratio), 1), np.minimum(np.sqrt(area / ratio), 1)
    left, top = chance[:, 2] * (1 - width), chance[:, 3] * (1 - height)
    return np.stack([left, top, left + width, top + height], axis=1)


def augmented(split: Split, positions: Indices, plan: DataPlan, seed: int, epoch: int) -> Pixels:
    """Training images uint8 (B,C,H,W): random resized crop, shift (edges replicated), horizontal flip."""
    indices = split.indices[positions]
    chance = uniform(seed, epoch, indices, 7)
    images = split.source.images(indices, _crop_boxes(plan, chance) if plan.scale < 1 else None)
    if plan.shift:
        images = _shifted(images, plan.shift, chance[:, 4:6])
    if plan.flip:
        images = np.where((chance[:, 6] < 0.5)[:, None, None, None], images[..., ::-1], images)
    return images


def _shifted(images: Pixels, most: int, chance: NDArray[np.float64]) -> Pixels:
    count, _, height, width = images.shape
    padded = np.pad(images, ((0, 0), (0, 0), (most, most), (most, most)), mode="edge")
    offsets = (chance * (2 * most + 1)).astype(np.int64)
    rows = offsets[:, :1] + np.arange(height)
    columns = offsets[:, 1:] + np.arange(width)
    picked: Pixels = padded[np.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    return picked.transpose(0, 3, 1, 2)


def epoch_batches(count: int, batch_size: int, seed: int, epoch: int, least: int = 2) -> list[Indices]:
    """The epoch's batches as positions in the split, shuffled by (seed, epoch); the last one may be smaller.

    A last batch of fewer than ``least`` images joins the one before it: batch statistics need two, in every process.
    """
    order = np.random.default_rng((seed, epoch)).permutation(count)
    batches = [order[i : i + batch_size] for i in range(0, count, batch_size)]
    if len(batches) > 1 and len(batches[-1]) < least:
        batches[-2:] = [np.concatenate(batches[-2:])]
    return batches


def eval_batches(split: Split, batch_size: int) -> Iterator[tuple[Pixels, Indices]]:
    """Images and labels in order, without augmentation."""
    for start in range(0, len(split), batch_size):
        chosen = split.indices[start : start + batch_size]
        yield split.source.images(chosen), split.source.labels[chosen]
