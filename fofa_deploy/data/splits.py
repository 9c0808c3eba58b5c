"""Train, validation and test images kept apart, and the files that children read them from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fofa_deploy.config import DataPlan, VerifyPlan
from fofa_deploy.data.decode import Pixels
from fofa_deploy.data.layouts import open_sources
from fofa_deploy.data.sources import FileSource, Indices, Source, array_digest
from fofa_deploy.errors import DataError
from fofa_deploy.progress import Progress
from fofa_deploy.store import digest

ORIGIN = "origin.txt"


@dataclass(frozen=True)
class Split:
    """Some images of a source."""

    source: Source
    indices: Indices

    @property
    def labels(self) -> Indices:
        return self.source.labels[self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def head(self, count: int) -> Split:
        return Split(self.source, self.indices[:count])

    def at(self, plan: DataPlan) -> Split:
        return Split(self.source.at(plan), self.indices)


@dataclass(frozen=True)
class Data:
    """Train, validation and test images. Choices are made on validation; test is read once, at the end."""

    plan: DataPlan
    train: Split
    validation: Split
    test: Split

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.train.source.class_names

    def at(self, size: tuple[int, int] | None) -> Data:
        """The same images in the same splits, resized from the originals to another height and width. None: as they are."""
        plan = self.plan.at(size)
        return self if plan is self.plan else Data(plan, *(part.at(plan) for part in (self.train, self.validation, self.test)))

    @cached_property
    def digest(self) -> str:
        """Of all images, labels and splits, wherever they lie. Reads every file once.

        Raises:
            DataError: the test images are copies of training images.
        """
        parts = (self.train, self.validation, self.test)
        if self.plan.labelled:  # others train nothing
            _refuse_copies(self.train.source, self.test.source)
        return digest([self.plan.model_copy(update={"root": None}), *([p.source.digest, array_digest(p.indices)] for p in parts)])


def _refuse_copies(train: Source, test: Source) -> None:
    """Where every test file is a training file under another name; a few that are the same are usual."""
    if not (isinstance(train, FileSource) and isinstance(test, FileSource) and test.files):
        return
    if {*test.file_digests} <= {*train.file_digests}:
        problem = f"all {len(test.files)} test images are training images, too: {test.files[0]} for one"
        raise DataError(problem, "hold images out that are not trained on, and name them with data.test_split")


def stratified(labels: Indices, fraction: float, seed: int) -> tuple[Indices, Indices]:
    """Seeded (rest, held-out) indices, both shuffled and class-balanced; of one image alone, nothing rests."""
    rng = np.random.default_rng((seed, 0x5EED))
    order = rng.permutation(len(labels))
    rank = np.empty(len(labels), np.float64)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        rank[members] = (np.arange(len(members)) + 0.5) / len(members)
    spread = order[np.argsort(rank[order], kind="stable")]
    count = min(max(1, round(fraction * len(labels))), max(1, len(labels) - 1))
    return spread[count:], spread[:count]


def load_data(plan: DataPlan, seed: int) -> Data:
    """Open the sources and split them; every prefix of every split is class-balanced.

    Raises:
        DataError: as `open_sources`.
    """
    train, test = open_sources(plan)
    rest, held_out = stratified(train.labels, plan.validation_fraction, seed)
    if not len(rest):
        raise DataError("one training image leaves none to train on beside the validation image", "give more")
    if plan.limit:
        rest = rest[: plan.limit]
    shuffled, first = stratified(test.labels, 0.0, seed)
    return Data(plan, Split(train, rest), Split(train, held_out), Split(test, np.concatenate([first, shuffled])))


def write_splits(data: Data, sizes: VerifyPlan, folder: Path, progress: Progress, scanned: bool = False) -> None:
    """``validation/``, ``test/`` and ``calibration/``, by `write_split`. Every image is read first, unless ``scanned``."""
    for name, split in (("training", data.train), ("validation", data.validation), ("test", data.test)):
        if not scanned:
            scan(split, progress, name)
    write_split(data.validation.head(sizes.samples), folder / "validation", progress, "validation")
    write_split(data.test.head(sizes.samples), folder / "test", progress, "test")
    write_split(data.train.head(sizes.calibration), folder / "calibration", progress, "calibration")


def write_split(split: Split, folder: Path, progress: Progress, name: str) -> None:
    """``images.npy`` uint8 (N,C,H,W) and ``labels.npy`` int64 (N,), in bounded memory; names every broken file at once.

    `ORIGIN` tells which images they are, whatever their size.
    """
    folder.mkdir(parents=True)
    np.save(folder / "labels.npy", split.labels)
    (folder / ORIGIN).write_text(digest([split.source.digest, array_digest(split.indices)]))
    broken: list[str] = []
    writer: NDArray[np.uint8] | None = None
    with progress.task(f"read {name}", len(split)) as task:
        for start in range(0, len(split), 64):
            chunk = split.indices[start : start + 64]
            pixels, bad = _decode_all(split.source, chunk)
            broken += bad
            if writer is None and len(pixels):
                shape = (len(split), *pixels.shape[1:])
                writer = np.lib.format.open_memmap(folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape)
            if writer is not None and not broken:
                writer[start : start + len(pixels)] = pixels
            task.advance(len(chunk))
    _refuse(broken)


def _decode_all(source: Source, indices: Indices) -> tuple[Pixels, list[str]]:
    """Decode a chunk at once; only when that fails, one by one, to name every culprit."""
    try:
        return source.images(indices), []
    except DataError:
        bad = []
        for i in indices:
            try:
                source.images(np.asarray([i]))
            except DataError as error:
                bad.append(error.message)
        return np.empty((0,), np.uint8), bad


def scan(split: Split, progress: Progress, name: str) -> None:
    """Decode every image once before training on it; names every broken file at once."""
    broken: list[str] = []
    with progress.task(f"check {name} images", len(split)) as task:
        for start in range(0, len(split), 64):
            chunk = split.indices[start : start + 64]
            broken += _decode_all(split.source, chunk)[1]
            task.advance(len(chunk))
    _refuse(broken)


def _refuse(broken: Sequence[str]) -> None:
    if broken:
        more = f"\n  and {len(broken) - 20} more" if len(broken) > 20 else ""
        raise DataError(f"{len(broken)} broken images:\n  " + "\n  ".join(broken[:20]) + more, "replace or remove them")
