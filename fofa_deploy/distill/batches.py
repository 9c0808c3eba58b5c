"""What a training step sees: this process's part of each batch, made here or in the data loader's workers."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from fofa_deploy.data import Data, augmented
from fofa_deploy.data.decode import Pixels
from fofa_deploy.data.sources import Indices
from fofa_deploy.distill import parallel
from fofa_deploy.errors import DataError

Batch = tuple[Pixels, Indices, Pixels | None, int]
"""Images and labels of this process, the images as the teacher sees them if otherwise, and how many the whole batch has."""


class Batches(Dataset[Batch | DataError]):
    """This process's part of the epoch's remaining batches, made wherever the data loader asks for it.

    An image that cannot be read comes as the error: raised in a worker, it would reach this process as another.
    """

    def __init__(self, data: Data, shown: Data | None, batches: list[Indices], seed: int, epoch: int) -> None:
        self._data, self._shown, self._seed, self._epoch = data, shown, seed, epoch
        self._batches = [(parallel.share(batch), len(batch)) for batch in batches]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Batch | DataError:
        try:
            return self._made(*self._batches[number])
        except DataError as error:
            return error

    def _made(self, positions: Indices, total: int) -> Batch:
        shown = None if self._shown is None else self._images(self._shown, positions)
        return self._images(self._data, positions), self._data.train.labels[positions], shown, total

    def _images(self, data: Data, positions: Indices) -> Pixels:
        # A copy in C order: ascontiguousarray keeps odd strides of a single channel, which make torch pick another kernel.
        return augmented(data.train, positions, data.plan, self._seed, self._epoch).copy(order="C")


def read(batches: Batches, workers: int, seed: int) -> Iterator[Batch]:
    """One after the other, made by ``workers`` processes, or by this one where there are none.

    Raises:
        DataError: an image cannot be read.
    """
    if not workers:
        return _raised(batches[number] for number in range(len(batches)))
    # An own generator: the loader would draw its base seed from the global one, and a resumed run would see another stream.
    generator = torch.Generator().manual_seed(seed)
    return _raised(
        DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=_as_is, worker_init_fn=_steadfast, generator=generator)
    )


def _raised(batches: Iterable[Batch | DataError]) -> Iterator[Batch]:
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _steadfast(number: int) -> None:
    """Leave signals to the process that trains: who stops a whole group would take its batches away before it can write."""
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)


def _as_is(batch: Any) -> Any:  # noqa: ANN401 - batches are made whole by the data set
    return batch
