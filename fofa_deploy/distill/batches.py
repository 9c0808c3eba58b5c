"""What training steps and validation see: this process's part of each batch, made here or in the data loader's workers."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset

from fofa_deploy.data import Data, Split, augmented, eval_batches
from fofa_deploy.data.decode import Pixels
from fofa_deploy.data.sources import Indices
from fofa_deploy.distill import parallel
from fofa_deploy.errors import DataError

Made = TypeVar("Made")

Batch = tuple[Pixels, Indices, Pixels | None, int]
"""Images and labels of this process, the images as the teacher sees them if otherwise, and how many the whole batch has."""


class _Batches(Dataset[Made | DataError]):
    """What is made wherever the data loader asks for it.

    An image that cannot be read comes as the error: raised in a worker, it would reach this process as another.
    """

    def __getitem__(self, number: int) -> Made | DataError:
        try:
            return self._made(number)
        except DataError as error:
            return error

    def __len__(self) -> int:
        raise NotImplementedError

    def _made(self, number: int) -> Made:
        raise NotImplementedError


class Batches(_Batches[Batch]):
    """This process's part of the epoch's remaining batches."""

    def __init__(self, data: Data, shown: Data | None, batches: list[Indices], seed: int, epoch: int) -> None:
        self._data, self._shown, self._seed, self._epoch = data, shown, seed, epoch
        self._batches = [(parallel.share(batch), len(batch)) for batch in batches]

    def __len__(self) -> int:
        return len(self._batches)

    def _made(self, number: int) -> Batch:
        positions, total = self._batches[number]
        shown = None if self._shown is None else self._images(self._shown, positions)
        return self._images(self._data, positions), self._data.train.labels[positions], shown, total

    def _images(self, data: Data, positions: Indices) -> Pixels:
        # A copy in C order: ascontiguousarray keeps odd strides of a single channel, which make torch pick another kernel.
        return augmented(data.train, positions, data.plan, self._seed, self._epoch).copy(order="C")


class _Evaluated(_Batches[tuple[Pixels, Indices]]):
    """What `fofa_deploy.data.eval_batches` gives."""

    def __init__(self, split: Split, size: int) -> None:
        self._split, self._size = split, size

    def __len__(self) -> int:
        return -(-len(self._split) // self._size)

    def _made(self, number: int) -> tuple[Pixels, Indices]:
        chosen = self._split.indices[number * self._size : (number + 1) * self._size]
        (batch,) = eval_batches(Split(self._split.source, chosen), self._size)
        return batch


def evaluated(split: Split, size: int, workers: int, seed: int) -> Iterator[tuple[Pixels, Indices]]:
    """Images and labels in order, without augmentation, as `read` has them made.

    Raises:
        DataError: an image cannot be read.
    """
    return read(_Evaluated(split, size), workers, seed)


def read(batches: _Batches[Made], workers: int, seed: int) -> Iterator[Made]:
    """One after the other, made by ``workers`` processes, or by this one where there are none.

    Raises:
        DataError: an image cannot be read.
    """
    if not workers:
        return _raised(batches[number] for number in range(len(batches)))
    # An own generator: the loader would draw its base seed from the global one, and a resumed run would see another stream.
    generator = torch.Generator().manual_seed(seed)
    workers = min(workers, len(batches))
    return _raised(
        DataLoader(batches, batch_size=None, num_workers=workers, collate_fn=_as_is, worker_init_fn=_steadfast, generator=generator)
    )


def _raised(batches: Iterable[Made | DataError]) -> Iterator[Made]:
    for batch in batches:
        if isinstance(batch, DataError):
            raise batch
        yield batch


def _steadfast(number: int) -> None:
    """Leave signals to the process that trains: who stops a whole group would take its batches away before it can write.

    And go when that process is gone: one that is killed takes nobody along, and a worker with a batch to deliver would wait
    for ever, with its memory and with the connections by which other processes see that one of them died.
    """
    for stop in (signal.SIGINT, signal.SIGTERM):
        signal.signal(stop, signal.SIG_IGN)
    threading.Thread(target=_go_with_parent, daemon=True).start()


def _go_with_parent() -> None:
    if parent := multiprocessing.parent_process():  # not getppid(): that may be a server which forks for others
        parent.join()
        os._exit(1)


def _as_is(batch: Any) -> Any:  # noqa: ANN401 - batches are made whole by the data set
    return batch
