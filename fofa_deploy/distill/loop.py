"""One training loop for all of it: a teacher on its own, a student alone, or a student that is distilled.

On one machine, one build and one thread count a resumed run is bit-identical to one that was never interrupted: batches
and augmentation depend on (seed, epoch, index) alone, and the checkpoint holds everything else that moves.

Several processes share each batch, so that what is learned does not depend on their number: each takes its part of the same
images, weighted by its size. All of them run this loop in step; rank 0 alone writes and reports.
"""

from __future__ import annotations

import math
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fofa_deploy.config import TrainPlan
from fofa_deploy.data import Data, Split, epoch_batches, eval_batches, preprocessing
from fofa_deploy.data.decode import Pixels
from fofa_deploy.data.sources import Indices
from fofa_deploy.distill import average, checkpoint, engine, parallel
from fofa_deploy.distill.batches import Batch, Batches, evaluated, read
from fofa_deploy.distill.interrupt import interruptible
from fofa_deploy.distill.objective import Losses, Objective
from fofa_deploy.errors import IntegrityError, InterruptedRunError, PlanError, TrainingError
from fofa_deploy.inference import Normalize, predict
from fofa_deploy.metrics import topk
from fofa_deploy.models import is_sound
from fofa_deploy.progress import Progress, Task
from fofa_deploy.results import Epoch

DIAGNOSED = 512
"""Validation images that per-epoch diagnostics look at."""

SKIPPED = 50
"""Steps in a row that an fp16 training may lose: halved so often, no scale is too large."""

TRACKED = 50
"""Steps between two entries in the trackers."""


class Trainer:
    """Trains ``objective.student`` and leaves its best weights, by validation accuracy, in it.

    Args:
        objective: student, teacher and loss; one call is one forward pass.
        data: the student's images.
        seed: of everything random.
        folder: of checkpoints; given again, training goes on where it stopped.
        shown: the same images as the teacher sees them, where its size is another.

    Raises:
        TrainingError: loss, gradients or statistics left the finite numbers; checkpoints, if there are any yet, are good.
        PlanError: a batch is too small to be shared by the processes.
        BackendError: this machine lacks what the plan asks for.
        DataError: an image cannot be read.
        IntegrityError: checkpoints are damaged, or of another version.
        InterruptedRunError: Ctrl-C or SIGTERM, after a checkpoint.
    """

    def __init__(
        self,
        objective: Objective,
        data: Data,
        plan: TrainPlan,
        seed: int,
        folder: Path,
        progress: Progress,
        name: str = "train",
        shown: Data | None = None,
    ) -> None:
        self._plan, self._data, self._seed, self._folder, self._progress, self._name = plan, data, seed, folder, progress, name
        self._engine = engine.accelerator(plan, folder)
        self._device = self._engine.device
        self._objective, self._shown = objective, shown
        self._preprocessing = preprocessing(data.plan)
        self._normalize = Normalize(self._preprocessing).to(self._device)
        self._transform()
        self._objective.to(self._device)
        self._made = {name: buffer.cpu() for name, buffer in self._student.named_buffers() if not is_sound(buffer)}
        self._average = average.twin(self._student) if plan.ema else None
        optimizer = torch.optim.AdamW(objective.parameter_groups(plan.lr, plan.weight_decay), fused=True)
        self._wrapped, self._optimizer = self._engine.prepare(objective, optimizer)
        self._step = 0
        self._skipped = 0  # steps in a row
        self._offset = 0  # batches of the current epoch that are done
        self._sums: dict[str, float] = {}  # of this process, over the images of the epoch that a term has seen
        self._seen: dict[str, int] = {}
        self._last: dict[str, float] = {}
        self._seconds = 0.0
        self._curve: list[Epoch] = []
        self._best: dict[str, Tensor] | None = None
        self._best_top1 = -1.0

    @property
    def _student(self) -> nn.Module:
        return self._objective.student.model

    def _transform(self) -> None:
        """Before anything is moved: a teacher that is to be shared by several devices may not fit on one."""
        teacher = self._objective.teacher
        if self._plan.channels_last:
            self._objective.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if self._plan.compile:
            for tapped in filter(None, (self._objective.student, teacher)):
                engine.compiled(tapped)
        if self._plan.shard_teacher and teacher is not None:
            engine.sharded(teacher)

    def _epoch_batches(self, epoch: int) -> list[Indices]:
        count = len(self._data.train)
        return epoch_batches(count, self._plan.batch_size, self._seed, epoch, least_batch(self._plan, count, self._name))

    @cached_property
    def _epoch_length(self) -> int:
        return len(self._epoch_batches(0))

    def run(self) -> tuple[Epoch, ...]:
        """Train to the end of the plan; returns one record per epoch."""
        torch.manual_seed(self._seed + parallel.rank())  # every process drops paths of its own
        self._restore()
        total = self._plan.epochs * self._epoch_length
        tracking = engine.tracking(self._engine, self._name, self._plan, self._folder)
        with interruptible() as interrupted, tracking, self._progress.task(self._name, total, self._step) as task:
            while len(self._curve) < self._plan.epochs:
                self._run_epoch(task, interrupted)
                self._heed(interrupted)
        if self._best is not None:
            self._student.load_state_dict(self._best)
        return tuple(self._curve)

    def _run_epoch(self, task: Task, interrupted: threading.Event) -> None:
        self._objective.train().progress = len(self._curve) / self._plan.epochs
        started = saved = time.monotonic()
        elapsed_before = self._seconds
        for batch in self._batches():
            self._train_step(*batch)
            now = time.monotonic()
            self._seconds = elapsed_before + now - started
            task.advance(note=self._note())
            self._track()
            if self._heed(interrupted, due=now - saved > self._plan.checkpoint_seconds):
                saved = now
        self._heed(interrupted)  # a validation may take longer than whoever stops processes is willing to wait
        self._finish_epoch()

    def _heed(self, interrupted: threading.Event, due: bool = False) -> bool:
        """Whether a checkpoint was written: all processes stop, or save, after the same step."""
        stop, save = parallel.any_rank(interrupted.is_set(), due and parallel.rank() == 0)
        if stop or save:
            self._save()
        if stop:
            action = "run the same command again to go on from there"
            raise InterruptedRunError(f"interrupted at step {self._step}, checkpoint written", action)
        return save

    def _batches(self) -> Iterator[Batch]:
        epoch = len(self._curve)
        left = self._epoch_batches(epoch)[self._offset :]
        return read(Batches(self._data, self._shown, left, self._seed, epoch), self._plan.workers, self._seed)

    def _train_step(self, images: Pixels, labels: Indices, shown: Pixels | None, total: int) -> None:
        """One step of the optimizer, by this process's images of a batch of ``total``."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._rate()
        self._optimizer.zero_grad(set_to_none=True)
        pieces = np.array_split(np.arange(len(labels)), self._plan.accumulate)
        for number, piece in enumerate(pieces, 1):
            # Gradients are averaged over the processes; of a loss that is a mean over images, the mean of the batch is wanted.
            weight = parallel.size() * len(piece) / total
            with nullcontext() if number == len(pieces) else self._engine.no_sync(self._wrapped):
                part = slice(piece[0], piece[-1] + 1)
                self._backward(images[part], labels[part], None if shown is None else shown[part], weight)
        parameters = [p for p in self._objective.parameters() if p.requires_grad]
        norm = self._engine.clip_grad_norm_(parameters, self._plan.clip_norm)
        # With a scaler, which looks for the largest scale that fp16 holds, a step is skipped now and then.
        self._skipped = 0 if norm.isfinite() else self._skipped + 1
        if self._skipped > (SKIPPED if self._engine.scaler is not None else 0):
            self._diverged("the gradient is not finite")
        self._optimizer.step()
        if self._average is not None:
            average.follow(self._average, self._student, self._plan.ema, self._step, self._made)
        self._step += 1
        self._offset += 1

    def _backward(self, images: Pixels, labels: Indices, shown: Pixels | None, weight: float) -> None:
        losses = self._forward(images, labels, shown)
        self._last = _values(losses)
        (bad,) = parallel.any_rank(not math.isfinite(self._last["total"]))
        if bad:
            self._diverged("the loss is not finite")
        self._engine.backward(losses.total * weight)
        for name, value in self._last.items():
            self._sums[name] = self._sums.get(name, 0.0) + value * len(labels)
            self._seen[name] = self._seen.get(name, 0) + len(labels)

    def _forward(self, images: Pixels, labels: Indices, shown: Pixels | None) -> Losses:
        target = torch.from_numpy(labels).to(self._device, non_blocking=True)
        losses: Losses = self._wrapped(self._input(images), target, None if shown is None else self._input(shown))
        return losses

    def _input(self, images: Pixels) -> Tensor:
        batch: Tensor = self._normalize(torch.from_numpy(images).to(self._device, non_blocking=True))
        return batch.contiguous(memory_format=torch.channels_last) if self._plan.channels_last else batch

    def _rate(self) -> float:
        """Learning rate of the next step: linear warm-up, then half a cosine down to zero."""
        length = self._epoch_length
        warm, total = self._plan.warmup_epochs * length, self._plan.epochs * length
        if self._step < warm:
            return self._plan.lr * (self._step + 1) / (warm + 1)
        # Resumed with other processes, an epoch may have other batches than were counted.
        done = min((self._step - warm) / max(total - warm, 1), 1.0)
        return self._plan.lr * 0.5 * (1 + math.cos(math.pi * done))

    def _note(self) -> str:
        last = f" top1 {self._curve[-1].top1:.4f}" if self._curve and self._curve[-1].top1 is not None else ""
        speed = parallel.size() * self._seen["total"] / max(self._seconds, 1e-9)
        loss = self._sums["total"] / self._seen["total"]
        return f"epoch {len(self._curve) + 1}/{self._plan.epochs} loss {loss:.4f}{last} {speed:.0f} images/s"

    def _track(self) -> None:
        if self._plan.trackers and self._step % TRACKED == 0:
            self._engine.log({**engine.flat(self._last, "step"), "step/lr": self._rate()}, self._step)

    def _finish_epoch(self) -> None:
        model = self._average if self._average is not None else self._student
        top1 = self._validate(model)
        sums, seen = (_added(each) for each in zip(*parallel.every((self._sums, self._seen)), strict=True))
        means = {name: value / seen[name] for name, value in sums.items()}
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
        if self._plan.trackers:
            shown = {"loss": loss, "top1": top1, "seconds": self._seconds, **means, **self._curve[-1].diagnostics}
            self._engine.log(engine.flat(shown, "epoch"), self._step)
        if top1 > self._best_top1:
            self._best_top1, self._best = top1, {k: v.detach().cpu().clone() for k, v in model.state_dict().items()}
        self._offset, self._sums, self._seen, self._seconds = 0, {}, {}, 0.0
        self._save()

    def _validate(self, model: nn.Module) -> float:
        """Top-1 on the validation split, which the processes share; counting makes it exact for any number of them."""
        parallel.copy_from_first(model)  # statistics of batches, which differ between processes
        split = self._data.validation
        part = Split(split.source, parallel.share(split.indices))
        reader = partial(evaluated, workers=self._plan.workers, seed=self._seed)
        logits = predict(model, part, self._preprocessing, reader) if len(part) else None
        hits = 0.0 if logits is None else topk(logits, part.labels, 1) * len(part)
        return sum(parallel.every(round(hits))) / len(split)

    def _diagnose(self) -> dict[str, float]:
        """The teacher's and the prompted teacher's accuracy and KL(z_T || z_T'), on validation images."""
        sums: Counter[str] = Counter()
        size = max(1, self._plan.batch_size // (parallel.size() * self._plan.accumulate))  # what memory is known to hold
        views = [eval_batches(one.validation.head(DIAGNOSED), size) for one in (self._data, self._shown) if one]
        for (images, labels), *other in zip(*views, strict=True):
            shown = [self._input(pixels) for pixels, _ in other]
            sums.update(self._objective.diagnostics(self._input(images), torch.from_numpy(labels).to(self._device), *shown))
        if not sums:
            return {}
        names = {"teacher_correct": "teacher_top1", "prompted_correct": "prompted_top1", "drift_nats": "drift_nats"}
        return {name: sums[key] / sums["samples"] for key, name in names.items()}

    def _diverged(self, what: str) -> None:
        terms = ", ".join(f"{name} {value:.4g}" for name, value in self._last.items() if name != "total")
        action = f"lower its lr or train in fp32, with another --out or --force: {self._name} then starts anew"
        raise TrainingError(f"{what} at step {self._step} ({terms})", action)

    def _save(self) -> None:
        """By rank 0; nobody goes on, or away, before it is done."""
        mine = {"sums": dict(self._sums), "seen": dict(self._seen), "rng": checkpoint.random_state()}
        ranks = parallel.every(mine)
        if parallel.rank() == 0:
            checkpoint.save(self._folder / "checkpoints", self._step, {**self._state(), "ranks": ranks}, self._made)
        parallel.any_rank(False)  # rank 0 answers when it has written

    def _state(self) -> dict[str, Any]:
        return {
            "objective": self._objective.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "scaler": {} if self._engine.scaler is None else self._engine.scaler.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "best": self._best,
            "best_top1": self._best_top1,
            "step": self._step,
            "offset": self._offset,
            "seconds": self._seconds,
            "curve": [epoch.model_dump(mode="json") for epoch in self._curve],
            "made_with": _made_with(),
        }

    def _restore(self) -> None:
        found = checkpoint.load_newest(self._folder / "checkpoints") if parallel.rank() == 0 else (None, [])
        state, notices = parallel.from_first(found)
        for notice in notices:
            self._progress.say(notice)
        if state is None:
            return
        try:
            self._objective.load_state_dict(state["objective"])
            self._resume_as(parallel.rank(), state["ranks"])
        except (RuntimeError, KeyError) as error:  # the plan cannot be another one: the run directory sees to that
            problem = f"the checkpoints in {self._folder} are of another version of fofa-deploy"
            raise IntegrityError(problem, "go on with that version, or remove that folder to train from the start") from error
        self._optimizer.load_state_dict(state["optimizer"])
        if self._engine.scaler is not None:
            self._engine.scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            self._average.load_state_dict(state["average"])
        self._best, self._best_top1 = state["best"], state["best_top1"]
        self._step, self._offset, self._seconds = state["step"], state["offset"], state["seconds"]
        self._curve = [Epoch.model_validate(epoch) for epoch in state["curve"]]
        self._progress.say(f"{self._name}: going on from step {self._step}")
        if state["made_with"] != _made_with():
            self._progress.say(f"notice: it was begun with {state['made_with']}, now it is {_made_with()}: not bit-identical")

    def _resume_as(self, rank: int, ranks: list[dict[str, Any]]) -> None:
        """Take up one process's own state, or, where their number has changed, share out what counts."""
        if len(ranks) == parallel.size():
            self._sums, self._seen = ranks[rank]["sums"], ranks[rank]["seen"]
            checkpoint.set_random_state(ranks[rank]["rng"])
        elif rank == 0:
            self._sums, self._seen = (_added([each[name] for each in ranks]) for name in ("sums", "seen"))


def least_batch(plan: TrainPlan, count: int, name: str) -> int:
    """Images that a batch has at least, out of ``count``: two for each of the passes that share it, for batch statistics.

    Raises:
        PlanError: there are fewer.
    """
    passes = parallel.size() * plan.accumulate
    if (found := min(count, plan.batch_size)) < 2 * passes:
        more = f"make batch_size at least {2 * passes}" if found == plan.batch_size else f"train on at least {2 * passes} images"
        fewer = {"accumulate": plan.accumulate, "the number of processes": parallel.size()}
        lower = "".join(f", or lower {what}" for what, number in fewer.items() if number > 1)
        problem = (
            f"{found} images cannot be shared by {passes} passes, each of two or more" if passes > 1 else "a batch has one image"
        )
        raise PlanError(f"{name}: {problem}", more + lower)
    return 2 * passes


def _values(losses: Losses) -> dict[str, float]:
    """All terms as numbers, fetched from the device at once."""
    named = {"total": losses.total.detach(), **losses.terms}
    return dict(zip(named, torch.stack([value.double() for value in named.values()]).tolist(), strict=True))


def _added(sums: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {name: sum(each.get(name, 0) for each in sums) for name in sums[0]}


def _made_with() -> dict[str, Any]:
    """What a bit-identical resumption needs to be the same."""
    return {"torch": str(torch.__version__), "threads": torch.get_num_threads(), "processes": parallel.size()}
