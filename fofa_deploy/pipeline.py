"""A plan and hardware profiles go in; a verified, measured deployment comes out. The only file that strings stages together.

Each stage is a function from frozen inputs to a folder of the run directory, and the store decides whether it has to run:
running the same command again resumes, and a finished run redoes nothing but measurements.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

import torch

from fofa_deploy import __version__, environment
from fofa_deploy.capture import capture, write_expected
from fofa_deploy.config import ModelPlan, RunPlan, TeacherPlan, load_plan
from fofa_deploy.data import Data, load_data, preprocessing, scan, write_split
from fofa_deploy.distill.job import WEIGHTS, Workshop, read_curve, read_notices, read_summary
from fofa_deploy.errors import BackendError, PlanError
from fofa_deploy.isolate import run_isolated
from fofa_deploy.measure import Candidate
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Progress
from fofa_deploy.report import write_report
from fofa_deploy.results import Comparison, DataSummary, RunReport, TargetRow
from fofa_deploy.store import Store, write_atomic
from fofa_deploy.tune import Evidence, Settings, Tuner
from fofa_deploy.types import Execution, Graph, Status
from fofa_deploy.verify import GraphCheck

PLAN = "plan.json"
"""The resolved plan, in the run directory; it is a plan like any other."""

REFERENCE = "cpu-onnxruntime"
"""The profile that graphs are checked and the model to beat is timed under; the latter with each target's own threads."""


class Run:
    """One run directory being filled. Every stage is a property: its folder, made at most once.

    Raises (on any access):
        FofaError: what the stage raises; nothing half-done is left.
    """

    def __init__(self, plan: RunPlan, store: Store, progress: Progress) -> None:
        self.plan, self.store, self.progress = plan, store, progress
        self.profiles = [find_profile(name) for name in plan.targets]
        if len({profile.name for profile in self.profiles}) < len(self.profiles):
            raise PlanError("two targets have the same name", "list each profile once, and give copies a name of their own")
        torch.set_num_threads(plan.threads or Execution().thread_count)

    @cached_property
    def data(self) -> Data:
        self.progress.say(f"read {self.plan.data.name}")
        return load_data(self.plan.data, self.plan.seed)

    @cached_property
    def workshop(self) -> Workshop:
        return Workshop(self.data, self.plan.seed, self.progress)

    @cached_property
    def splits(self) -> Path:
        """validation/, test/ and calibration/: what children read. Every image has been decoded once by then."""
        data, sizes = self.data, self.plan.verify
        parts = {
            "validation": data.validation.head(sizes.samples),
            "test": data.test.head(sizes.samples),
            "calibration": data.train.head(sizes.calibration),
        }

        def work(out: Path) -> None:
            scan(data.train, self.progress)
            for name, split in parts.items():
                write_split(split, out / name, self.progress, name)

        return self.store.run("data", {"data": data.digest, "sizes": sizes}, work)

    @cached_property
    def teacher(self) -> tuple[TeacherPlan, Path] | None:
        """The teacher's plan, and the folder with its weights, training curve and accuracy."""
        plan = self.plan.teacher
        if plan is None:
            return None
        inputs = {"teacher": plan, "data": self.data.digest, "seed": self.plan.seed, "splits": self.splits}
        return plan, self.store.run("teacher", inputs, lambda out: self.workshop.fit(plan, out), resumable=True)

    @cached_property
    def student(self) -> Path:
        """The folder with the student's weights, training curve and accuracy."""
        plan, teacher = self.plan, self.teacher
        inputs = {
            "student": plan.student,
            "distill": plan.distill,
            "data": self.data.digest,
            "seed": plan.seed,
            "splits": self.splits,
            "teacher": (teacher[0], teacher[1] / WEIGHTS) if teacher else None,
        }
        return self.store.run(
            "student", inputs, lambda out: self.workshop.distill(plan.student, plan.distill, out, teacher), resumable=True
        )

    @cached_property
    def graph(self) -> Path:
        """The student as one float ONNX graph with sidecar and golden inputs, checked in another runtime."""
        return self._capture("graph", self.plan.student, self.student)

    def _capture(self, stage: str, plan: ModelPlan, folder: Path) -> Path:
        inputs = {
            "weights": folder / WEIGHTS,
            "model": plan,
            "data": self.data.digest,
            "versions": environment.package_versions(("torch", "onnx", "onnxscript", "onnxruntime")),
        }

        def work(out: Path) -> None:
            self.progress.say(f"capture {plan.model}")
            model = self.workshop.load(plan, folder)
            capture(model, plan.model, preprocessing(self.plan.data), self.data.class_names, self.data.validation, out)
            check = GraphCheck(folder=out, profile=find_profile(REFERENCE))
            run_isolated("fofa_deploy.verify:check_graph", check, Comparison, seconds=self.plan.limits.run_seconds)

        return self.store.run(stage, inputs, work)

    @cached_property
    def expected(self) -> Path:
        """The student's own logits in PyTorch on the validation and test images: what artifacts are held to."""
        return self._expected("expected", self.plan.student, self.student)

    def _expected(self, stage: str, plan: ModelPlan, folder: Path) -> Path:
        splits = {name: getattr(self.data, name).head(self.plan.verify.samples) for name in ("validation", "test")}
        inputs = {"weights": folder / WEIGHTS, "model": plan, "splits": self.splits}

        def work(out: Path) -> None:
            self.progress.say(f"run {plan.model} in PyTorch")
            write_expected(self.workshop.load(plan, folder), splits, preprocessing(self.plan.data), out)

        return self.store.run(stage, inputs, work)

    @cached_property
    def reference(self) -> tuple[TargetRow, Candidate]:
        """The model to beat, as an artifact: the teacher, or where there is none the student itself, fp32 on ONNX Runtime."""
        plan, folder = self.teacher or (self.plan.student, self.student)
        graph = self._capture("reference/graph", plan, folder) if self.teacher else self.graph
        expected = self._expected("reference/expected", plan, folder) if self.teacher else self.expected
        evidence = Evidence(graph / "golden.npz", self.splits, expected, self.plan.data.labelled)
        profile = find_profile(REFERENCE).model_copy(update={"name": "reference"})
        tuner = Tuner(self.store, graph, evidence, None, self._settings("fp32"), self.progress)
        row = tuner.attempt(profile)[0]
        if row.status is not Status.VERIFIED:
            raise BackendError(f"the reference does not run on ONNX Runtime: {row.reason}", "run fofa-deploy doctor")
        description = f"{plan.model}, fp32 on ONNX Runtime"
        return tuner.tested(profile, row.model_copy(update={"description": description})), tuner.candidate(profile, row)

    def tuner(self, recipe: str | None = None, fresh: bool = False, timed: bool = True) -> Tuner:
        """For all recipes or one; ``fresh`` verifies again; without ``timed`` there is no reference to race against."""
        evidence = Evidence(self.graph / "golden.npz", self.splits, self.expected, self.plan.data.labelled)
        settings = self._settings(recipe, fresh)
        reference = self.reference[1] if timed else None
        return Tuner(self.store, self.graph, evidence, self.splits / "calibration", settings, self.progress, reference)

    def targets(self) -> tuple[list[TargetRow], TargetRow]:
        """One row per target and recipe; and the reference's row, with what it took beside the first target."""
        tuner = self.tuner()
        rows = [row for profile in self.profiles for row in tuner.tune(profile)]
        timed = tuner.reference_timings[0] if tuner.reference_timings else {}
        return rows, self.reference[0].model_copy(update=timed)

    def _settings(self, recipe: str | None = None, fresh: bool = False) -> Settings:
        plan = self.plan
        return Settings(plan.accuracy, plan.measure, plan.limits, plan.budget, plan.seed, recipe, fresh)

    def report(self, rows: Sequence[TargetRow], reference: TargetRow) -> RunReport:
        """Write report.json, report.md, report.html and model_card.md into the run directory."""
        teacher = self.teacher[1] if self.teacher else None
        trained = {"teacher": read_curve(teacher) if teacher else (), "student": read_curve(self.student)}
        report = RunReport(
            name=self.plan.name,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            tool_version=__version__,
            method=self.plan.distill.method if self.plan.distill else "none",
            data=self._data_summary(),
            teacher=read_summary(teacher) if teacher else None,
            student=read_summary(self.student),
            targets=tuple(rows),
            reference=reference,
            curves={name: curve for name, curve in trained.items() if curve},
            environment=environment.describe(),
            stages=tuple(self.store.timings),
            notices=(*read_notices(self.student), *self.store.notices),
            sidecar=Graph.load(self.graph).sidecar,
            command=f"fofa-deploy compress-and-export {PLAN} --out {self.store.root.name}",
        )
        write_report(report, self.store.root)
        return report

    def _data_summary(self) -> DataSummary:
        data = self.data
        sizes = {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)}
        return DataSummary(name=self.plan.data.name, classes=len(data.class_names), digest=data.digest, **sizes)


def record_plan(store: Store, plan: RunPlan, force: bool) -> None:
    """Keep the resolved plan in the run directory, and refuse another one there unless forced.

    Raises:
        PlanError: the directory belongs to another plan; says what differs.
    """
    path = store.root / PLAN
    text = plan.model_dump_json(indent=1)
    if path.is_file() and path.read_text() != text and not force:
        changes = _differences(load_plan(str(path)).model_dump(), plan.model_dump())
        action = "choose another --out, or --force to go on here: stages that the change does not touch are kept"
        raise PlanError(f"{store.root} was made from another plan: {'; '.join(changes)}", action)
    write_atomic(path, text.encode())


def _differences(before: object, after: object, where: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted({*before, *after})
        return [d for key in keys for d in _differences(before.get(key), after.get(key), f"{where}.{key}".lstrip("."))]
    return [] if before == after else [f"{where} was {before!r}, is {after!r}"]


@contextmanager
def opened(plan: RunPlan, out: Path, progress: Progress, force: bool = False) -> Iterator[Run]:
    """The run in directory ``out``, locked while it is open.

    Raises:
        LockedError: another process has it open.
        PlanError: the directory belongs to another plan, and ``force`` was not given.
    """
    with Store(out) as store:
        record_plan(store, plan, force)
        yield Run(plan, store, progress)


def compress_and_export(plan: RunPlan, out: Path, progress: Progress, force: bool = False) -> RunReport:
    """The whole job: data, teacher, student, graph, targets, report.

    Raises:
        FofaError: a stage failed; run again to go on from the last finished one.
    """
    with opened(plan, out, progress, force) as run:
        return run.report(*run.targets())


def reopened(out: Path, progress: Progress) -> AbstractContextManager[Run]:
    """A run directory by itself, with the plan it was made from.

    Raises:
        PlanError: ``out`` is not a run directory.
    """
    path = out / PLAN
    if not path.is_file():
        raise PlanError(
            f"{out} is not a run directory: it has no {PLAN}", "make one: fofa-deploy compress-and-export PLAN --out DIR"
        )
    return opened(load_plan(str(path)), out, progress)


def failures(plan: RunPlan, report: RunReport) -> list[str]:
    """Why a finished run is not a success: required targets without a chosen artifact, or no target with anything to show."""
    chosen = {row.target for row in report.targets if row.chosen}
    names = [find_profile(name).name for name in plan.required]
    problems = [f"required target {name} has no verified artifact" for name in names if name not in chosen]
    if not any(row.status in (Status.VERIFIED, Status.BUILT_NOT_RUN) for row in report.targets):
        problems.append("no target could be built")
    return problems
