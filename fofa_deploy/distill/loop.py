"""One training loop for all of it: a teacher on its own, a student alone, or a student that is distilled.

On one machine, one build and one thread count a resumed run is bit-identical to one that was never interrupted: batches
and augmentation depend on (seed, epoch, index) alone, and the checkpoint holds everything else that moves.
"""

from __future__ import annotations

import math
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from fofa_deploy.config import TrainPlan
from fofa_deploy.data import Data, augmented, epoch_batches, eval_batches
from fofa_deploy.data.sources import Indices, Pixels
from fofa_deploy.distill import checkpoint
from fofa_deploy.distill.objective import Losses, Objective
from fofa_deploy.errors import InterruptedRunError, TrainingError
from fofa_deploy.inference import Normalize, predict
from fofa_deploy.metrics import topk
from fofa_deploy.progress import Progress, Task
from fofa_deploy.results import Epoch
from fofa_deploy.types import Preprocessing

DIAGNOSED = 512
"""Validation images that per-epoch diagnostics look at."""

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
Batch = tuple[Pixels, Indices]


class _Batches(Dataset[Batch]):
    """The epoch's remaining batches, made wherever the data loader asks for them."""

    def __init__(self, data: Data, batches: list[Indices], seed: int, epoch: int) -> None:
        self._data, self._batches, self._seed, self._epoch = data, batches, seed, epoch

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> Batch:
        positions = self._batches[number]
        images = augmented(self._data.train, positions, self._data.plan, self._seed, self._epoch)
        # A copy in C order: ascontiguousarray keeps odd strides of a single channel, which make torch pick another kernel.
        return images.copy(order="C"), self._data.train.labels[positions]


class Trainer:
    """Trains ``objective.student`` and leaves its best weights, by validation accuracy, in it.

    Args:
        objective: student, teacher and loss; one call is one forward pass.
        preprocessing: turns uint8 images into the network's input.
        seed: of everything random.
        folder: checkpoints and ``curve.json``; given again, training goes on where it stopped.

    Raises:
        TrainingError: loss, gradients or statistics left the finite numbers; the last checkpoint is good.
        InterruptedRunError: Ctrl-C or SIGTERM, after a checkpoint.
    """

    def __init__(
        self,
        objective: Objective,
        data: Data,
        preprocessing: Preprocessing,
        plan: TrainPlan,
        seed: int,
        folder: Path,
        progress: Progress,
        name: str = "train",
    ) -> None:
        self._plan, self._data, self._seed, self._folder, self._progress, self._name = plan, data, seed, folder, progress, name
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._objective = objective.to(self._device)
        self._preprocessing = preprocessing
        self._normalize = Normalize(preprocessing).to(self._device)
        if plan.channels_last:
            self._objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self._optimizer = torch.optim.AdamW(objective.parameter_groups(plan.lr, plan.weight_decay))
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=plan.precision == "fp16")
        self._average = _copy(self._student) if plan.ema else None
        self._step = 0
        self._offset = 0  # batches of the current epoch that are done
        self._sums: dict[str, float] = {}
        self._seconds = 0.0
        self._curve: list[Epoch] = []
        self._best: dict[str, Tensor] | None = None
        self._best_top1 = -1.0

    @property
    def _student(self) -> nn.Module:
        return self._objective.student.model

    @cached_property
    def _epoch_length(self) -> int:
        return len(epoch_batches(len(self._data.train), self._plan.batch_size, self._seed, 0))

    def run(self) -> tuple[Epoch, ...]:
        """Train to the end of the plan; returns one record per epoch."""
        torch.manual_seed(self._seed)
        self._restore()
        total = self._plan.epochs * self._epoch_length
        with _interruptible() as interrupted, self._progress.task(self._name, total, self._step) as task:
            while len(self._curve) < self._plan.epochs:
                self._run_epoch(task, interrupted)
            self._heed(interrupted)  # Ctrl-C while the last epoch was being validated
        if self._best is not None:
            self._student.load_state_dict(self._best)
        return tuple(self._curve)

    def _run_epoch(self, task: Task, interrupted: threading.Event) -> None:
        self._objective.train()
        started = saved = time.monotonic()
        elapsed_before = self._seconds
        for images, labels in self._batches():
            self._train_step(images, labels)
            now = time.monotonic()
            self._seconds = elapsed_before + now - started
            task.advance(note=self._note())
            self._heed(interrupted)
            if now - saved > self._plan.checkpoint_seconds:
                self._save()
                saved = now
        self._finish_epoch()

    def _heed(self, interrupted: threading.Event) -> None:
        if interrupted.is_set():
            self._save()
            action = "run the same command again to go on from there"
            raise InterruptedRunError(f"interrupted at step {self._step}, checkpoint written", action)

    def _batches(self) -> Iterator[Batch]:
        epoch = len(self._curve)
        batches = epoch_batches(len(self._data.train), self._plan.batch_size, self._seed, epoch)[self._offset :]
        dataset = _Batches(self._data, batches, self._seed, epoch)
        if not self._plan.workers:
            return (dataset[i] for i in range(len(dataset)))
        # An own generator: the loader would draw its base seed from the global one, and a resumed run would see another stream.
        generator = torch.Generator().manual_seed(self._seed)
        return iter(DataLoader(dataset, batch_size=None, num_workers=self._plan.workers, collate_fn=_as_is, generator=generator))

    def _train_step(self, images: Pixels, labels: Indices) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate() * group.get("lr_scale", 1.0)
        losses = self._forward(images, labels)
        if not losses.total.isfinite():
            self._diverged("the loss is not finite", losses)
        self._optimizer.zero_grad(set_to_none=True)
        self._scaler.scale(losses.total).backward()
        self._scaler.unscale_(self._optimizer)
        norm = nn.utils.clip_grad_norm_((p for p in self._objective.parameters() if p.requires_grad), self._plan.clip_norm)
        if not self._scaler.is_enabled() and not norm.isfinite():
            self._diverged("the gradient is not finite", losses)
        self._scaler.step(self._optimizer)
        self._scaler.update()
        if self._average is not None:
            _average(self._average, self._student, self._plan.ema)
        self._step += 1
        self._offset += 1
        self._count(losses, len(labels))

    def _forward(self, images: Pixels, labels: Indices) -> Losses:
        batch = self._normalize(torch.from_numpy(images).to(self._device, non_blocking=True))
        if self._plan.channels_last:
            batch = batch.contiguous(memory_format=torch.channels_last)
        target = torch.from_numpy(labels).to(self._device, non_blocking=True)
        dtype = _AUTOCAST.get(self._plan.precision)
        with torch.autocast(self._device.type, dtype=dtype, enabled=dtype is not None):
            losses: Losses = self._objective(batch, target)
        return losses

    def _rate(self) -> float:
        """Learning rate of the next step: linear warm-up, then half a cosine down to zero."""
        length = self._epoch_length
        warm, total = self._plan.warmup_epochs * length, self._plan.epochs * length
        if self._step < warm:
            return self._plan.lr * (self._step + 1) / (warm + 1)
        return self._plan.lr * 0.5 * (1 + math.cos(math.pi * (self._step - warm) / max(total - warm, 1)))

    def _count(self, losses: Losses, images: int) -> None:
        for name, value in {"total": losses.total.detach(), **losses.terms}.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value) * images
        self._sums["images"] = self._sums.get("images", 0.0) + images

    def _means(self) -> dict[str, float]:
        images = max(self._sums.get("images", 0.0), 1.0)
        return {name: value / images for name, value in self._sums.items() if name != "images"}

    def _note(self) -> str:
        last = f" top1 {self._curve[-1].top1:.4f}" if self._curve and self._curve[-1].top1 is not None else ""
        return f"epoch {len(self._curve) + 1}/{self._plan.epochs} loss {self._means()['total']:.4f}{last}"

    def _finish_epoch(self) -> None:
        model = self._average if self._average is not None else self._student
        top1 = topk(predict(model, self._data.validation, self._preprocessing), self._data.validation.labels, 1)
        means = self._means()
        loss = means.pop("total")
        self._curve.append(
            Epoch(
                epoch=len(self._curve) + 1,
                step=self._step,
                lr=self._rate(),
                loss=loss,
                losses=means,
                top1=top1,
                diagnostics=self._diagnose(),
                seconds=round(self._seconds, 3),
            )
        )
        if top1 > self._best_top1:
            self._best_top1, self._best = top1, {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        self._offset, self._sums, self._seconds = 0, {}, 0.0
        self._save()

    def _diagnose(self) -> dict[str, float]:
        """The teacher's and the prompted teacher's accuracy and KL(z_T || z_T'), on validation images."""
        sums: Counter[str] = Counter()
        for images, labels in eval_batches(self._data.validation.head(DIAGNOSED), self._plan.batch_size):
            batch = self._normalize(torch.from_numpy(images).to(self._device))
            sums.update(self._objective.diagnostics(batch, torch.from_numpy(labels).to(self._device)))
        if not sums:
            return {}
        names = {"teacher_correct": "teacher_top1", "prompted_correct": "prompted_top1", "drift_nats": "drift_nats"}
        return {name: sums[key] / sums["samples"] for key, name in names.items()}

    def _diverged(self, what: str, losses: Losses) -> None:
        terms = ", ".join(f"{name} {float(value):.4g}" for name, value in losses.terms.items())
        action = f"lower {self._name}'s lr or train in fp32; the last checkpoint in {self._folder} is from before"
        raise TrainingError(f"{what} at step {self._step} ({terms})", action)

    def _save(self) -> None:
        checkpoint.save(self._folder / "checkpoints", self._step, self._state())

    def _state(self) -> dict[str, Any]:
        return {
            "objective": self._objective.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "best": self._best,
            "best_top1": self._best_top1,
            "step": self._step,
            "offset": self._offset,
            "sums": dict(self._sums),
            "seconds": self._seconds,
            "curve": [epoch.model_dump(mode="json") for epoch in self._curve],
            "rng": _random_state(),
            "made_with": _made_with(),
        }

    def _restore(self) -> None:
        state, notices = checkpoint.load_newest(self._folder / "checkpoints")
        for notice in notices:
            self._progress.say(notice)
        if state is None:
            return
        self._objective.load_state_dict(state["objective"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._best, self._best_top1 = state["best"], state["best_top1"]
        self._step, self._offset, self._sums, self._seconds = state["step"], state["offset"], state["sums"], state["seconds"]
        self._curve = [Epoch.model_validate(epoch) for epoch in state["curve"]]
        _set_random_state(state["rng"])
        self._progress.say(f"{self._name}: going on from step {self._step}")
        if state["made_with"] != _made_with():
            self._progress.say(f"notice: it was begun with {state['made_with']}, now it is {_made_with()}: not bit-identical")


def _made_with() -> dict[str, Any]:
    """What a bit-identical resumption needs to be the same."""
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads()}


def _as_is(batch: Any) -> Any:  # noqa: ANN401 - batches are made whole by the data set
    return batch


def _copy(model: nn.Module) -> nn.Module:
    import copy

    twin = copy.deepcopy(model)
    return twin.requires_grad_(False)


@torch.no_grad()
def _average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Exponential moving average of the weights; counters and other integers are copied."""
    for mean, value in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if mean.is_floating_point():
            mean.lerp_(value, 1 - decay)
        else:
            mean.copy_(value)


def _random_state() -> dict[str, Any]:
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))


@contextmanager
def _interruptible() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C or SIGTERM into an event, so that a checkpoint can be written; the second one acts at once."""
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: object) -> None:
        event.set()
        signal.signal(number, before[signal.Signals(number)])

    for number in before:
        signal.signal(number, handle)
    try:
        yield event
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
