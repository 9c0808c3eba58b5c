"""Where students are trained, tuned and kept: one run directory of the pipeline per student, schedule and seed.

Both benchmarks of this question work here, so that a training that both need happens once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import contenders
from contenders import Scale

from fofa_deploy.config import ModelPlan, RunPlan
from fofa_deploy.data import load_data
from fofa_deploy.distill.job import WEIGHTS, Workshop, read_curve, read_summary
from fofa_deploy.pipeline import Run, opened
from fofa_deploy.progress import Progress, Quiet
from fofa_deploy.roofline import work as products
from fofa_deploy.types import Fraction, Frozen

DATA_SEED = TEACHER_SEED = 0


class Task(Frozen):
    """One student to be trained, by one of `contenders.METHODS`."""

    contender: str
    method: str
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.contender}-{self.method}-{self.seed}"


class Training(Frozen):
    """What came of a task. ``test`` is written down beside ``validation``, and decides nothing."""

    task: Task
    validation: Fraction
    test: Fraction
    parameters: int
    macs: int
    images: int
    """Seen in all epochs together."""
    seconds_per_image: float
    """Of the median epoch, its validation included; one thread."""

    @property
    def seconds(self) -> float:
        return self.images * self.seconds_per_image


class Taught(Frozen):
    """The teacher, and what it took."""

    model: str
    parameters: int
    validation: Fraction
    test: Fraction
    seconds: float


@dataclass(frozen=True)
class Workroom:
    root: str
    """Folder of Fashion-MNIST's four IDX files."""
    folder: Path
    scale: Scale
    progress: Progress

    def taught(self) -> Taught:
        """The teacher, fitted once."""
        out, plan = self.folder / "teacher", contenders.teacher(self.scale)
        if not (out / "summary.json").is_file():
            out.mkdir(parents=True, exist_ok=True)
            data = load_data(contenders.data(self.root, self.scale.teacher_images), DATA_SEED)
            Workshop(data, TEACHER_SEED, 1, self.progress).fit(plan, out)
        found = read_summary(out)
        seconds = sum(epoch.seconds for epoch in read_curve(out))
        assert found.top1 is not None
        assert found.top1_validation is not None
        accuracy = {"validation": found.top1_validation, "test": found.top1}
        return Taught(model=plan.model, parameters=found.params, seconds=seconds, **accuracy)

    @property
    def teacher_weights(self) -> Path:
        return (self.folder / "teacher" / WEIGHTS).absolute()

    def plan(self, student: ModelPlan, method: str | None, seed: int, name: str) -> RunPlan:
        return contenders.run_plan(self.root, self.scale, student, method, self.teacher_weights, seed, name)

    @contextmanager
    def run(self, task: Task) -> Iterator[Run]:
        """The pipeline's run of a task, where the stages that were finished are."""
        plan = self.plan(contenders.contender(task.contender).plan, task.method, task.seed, task.name)
        with opened(plan, self.folder / "runs" / task.name, self.progress) as run:
            yield run

    @contextmanager
    def teacher_run(self) -> Iterator[Run]:
        """The teacher as if it were a student that needs no training."""
        plan = ModelPlan(model=contenders.teacher(self.scale).model, checkpoint=self.teacher_weights)
        with opened(self.plan(plan, None, DATA_SEED, "teacher"), self.folder / "runs" / "teacher", self.progress) as run:
            yield run

    def train(self, task: Task) -> Training:
        """Train a student and capture its graph; at once where that has been done."""
        with self.run(task) as run:
            summary, curve = read_summary(run.student), read_curve(run.student)
            macs, count = macs_of(run.graph), len(run.data.train)
            _ = run.expected
        assert summary.top1 is not None
        assert summary.top1_validation is not None
        return Training(
            task=task,
            validation=summary.top1_validation,
            test=summary.top1,
            parameters=summary.params,
            macs=macs,
            images=count * len(curve),
            seconds_per_image=median(epoch.seconds for epoch in curve) / count,
        )

    def train_all(self, tasks: Sequence[Task], jobs: int) -> Iterator[Training]:
        """Each as soon as it is done, in ``jobs`` processes of one thread each."""
        if jobs == 1:
            yield from map(self.train, tasks)
            return
        with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
            quiet = replace(self, progress=Quiet())
            for done in as_completed([pool.submit(quiet.train, task) for task in tasks]):
                self.progress.say(f"trained {done.result().task.name}: {done.result().validation:.2%} on validation")
                yield done.result()


def macs_of(graph: Path) -> int:
    """Multiply-accumulates for one image, of all convolutions and matrix products of a captured graph."""
    return sum(product.macs for product in products(graph / "model.onnx").values())
