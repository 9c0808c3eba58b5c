"""Several processes, one training: what they tell each other. In one process, every function here is the identity.

Processes are started by torchrun or accelerate launch, which tell each its rank through the environment. Small words (flags,
counts, orders) travel by gloo over the CPU, so that nobody waits for a GPU to hear them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fofa_deploy.errors import TrainingError

SILENCE = timedelta(minutes=10)
"""A process that keeps the others waiting this long in a training counts as dead."""

_PATIENCE = timedelta(days=30)  # of those that wait while rank 0 does the stages that are not training

Something = TypeVar("Something")


def launched() -> bool:
    """Whether a launcher started several processes."""
    return "RANK" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def rank() -> int:
    """Of this process; 0 alone writes files."""
    return dist.get_rank() if dist.is_initialized() else int(os.environ.get("RANK", "0")) if launched() else 0


def neighbours() -> int:
    """Number of processes on this machine, this one included."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if launched() else 1


def size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


# --- who does what


def join() -> None:
    """Meet the other processes, if there are any; returns when all are there."""
    if launched() and not dist.is_initialized():
        os.environ.setdefault("OMP_NUM_THREADS", "1")  # Accelerate guesses, and warns that it did, where there is none
        dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=SILENCE)
        _line()


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
        _line.cache_clear()


@cache
def _line() -> Any:  # noqa: ANN401 - torch's own type says that it may be a number
    """The line that orders travel on."""
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


@contextmanager
def leading() -> Iterator[None]:
    """Rank 0's whole run: the others follow its `announce`d orders, and are sent home at its end.

    After an error nobody is told anything: the closed connection tells them.
    """
    join()
    yield
    announce(None)
    leave()


def announce(order: object) -> None:
    """Tell the followers what to do next; None sends them home.

    Raises:
        TrainingError: as `unbroken`.
    """
    if rank() == 0 and size() > 1:
        with unbroken():
            dist.broadcast_object_list([order], src=0, group=_line())


def orders() -> Iterator[Any]:
    """What rank 0 announces, as it announces it."""
    join()
    while True:
        order = [None]
        with unbroken():
            dist.broadcast_object_list(order, src=0, group=_line())
        if order[0] is None:
            leave()
            return
        yield order[0]


@contextmanager
def unbroken() -> Iterator[None]:
    """Turn the death of another process, which collectives tell in many words, into one error.

    Raises:
        TrainingError: another process is gone, or has been silent for `SILENCE`.
    """
    try:
        yield
    except RuntimeError as error:
        if size() == 1 or (not isinstance(error, dist.DistError) and "gloo" not in str(error)):
            raise
        action = "see what that process said; run the same command again to go on from the last checkpoint"
        raise TrainingError("another process of this training failed or is gone", action) from error


# --- words


def any_rank(*flags: bool) -> tuple[bool, ...]:
    """Each flag, True where it is True in any process."""
    if size() == 1:
        return flags
    votes = torch.tensor(flags, dtype=torch.uint8)
    dist.all_reduce(votes, dist.ReduceOp.MAX)
    return tuple(bool(vote) for vote in votes)


def every(mine: Something) -> list[Something]:
    """Everybody's value, by rank."""
    if size() == 1:
        return [mine]
    found: list[Any] = [None] * size()
    dist.all_gather_object(found, mine)
    return found


def from_first(value: Something) -> Something:
    """Rank 0's value, whatever the others have."""
    if size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def share(items: Any) -> Any:  # noqa: ANN401 - an array of any kind
    """This process's consecutive part of an array; parts differ by one element at most."""
    quotient, rest = divmod(len(items), size())
    start = rank() * quotient + min(rank(), rest)
    return items[start : start + quotient + (rank() < rest)]


# --- tensors


@torch.no_grad()
def copy_from_first(module: nn.Module) -> None:
    """Give every process rank 0's weights and buffers."""
    if size() > 1:
        for tensor in module.state_dict().values():
            dist.broadcast(tensor, src=0)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mine: Tensor, counts: list[int]) -> Tensor:  # noqa: ANN401
        ctx.counts = counts
        most = max(counts)
        padded = torch.cat([mine, mine.new_zeros(most - len(mine), *mine.shape[1:])])
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:  # noqa: ANN401
        total = gradients[0].contiguous().clone()
        dist.all_reduce(total)
        return total.split(ctx.counts)[rank()], None


def gathered(tensor: Tensor) -> Tensor:
    """(B, ...) of every process, one after another, (sum of B, ...); the gradient comes back to the process it belongs to.

    What is computed from it is the same in every process, and each contributes its gradient: exactly right under gradients
    that are averaged over processes when each process weights its loss by its share of the batch times their number.
    """
    if size() == 1:
        return tensor
    counts = every(len(tensor))
    result: Tensor = _Gathered.apply(tensor, counts)
    return result


@torch.no_grad()
def var_mean(tensor: Tensor, dim: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Population variance and mean over ``dim`` and over all processes, as if their batches were one. No gradient."""
    if size() == 1:
        return torch.var_mean(tensor, dim=dim, correction=0)
    count = tensor.new_tensor([tensor.numel() / max(tensor.sum(dim).numel(), 1)]).double()
    total = torch.cat([count, tensor.double().sum(dim)])
    dist.all_reduce(total)
    mean = total[1:] / total[0]
    shape = [1 if axis in dim else length for axis, length in enumerate(tensor.shape)]
    squares = (tensor.double() - mean.view(shape)).square().sum(dim)
    dist.all_reduce(squares)
    return (squares / total[0]).to(tensor.dtype), mean.to(tensor.dtype)


@torch.no_grad()
def extremes(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest element of everybody's tensor, ()."""
    low, high = tensor.aminmax()
    if size() > 1:
        both = torch.stack([-low, high])
        dist.all_reduce(both, dist.ReduceOp.MAX)
        low, high = -both[0], both[1]
    return low, high


@torch.no_grad()
def averaged(tensor: Tensor) -> Tensor:
    """The mean of everybody's tensor, in place."""
    if size() > 1:
        dist.all_reduce(tensor)
        tensor /= size()
    return tensor
