"""A plan and hardware profiles go in; a verified, measured deployment comes out. The only file that strings stages together.

Each stage is a function from frozen inputs to a folder of the run directory, and the store decides whether it has to run:
running the same command again resumes, and a finished run redoes nothing but measurements.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path

from fofa_deploy import __version__, environment
from fofa_deploy.capture import capture, tool_versions, write_expected
from fofa_deploy.config import AUTO, AccuracyPlan, ModelPlan, RunPlan, TeacherPlan, size_name
from fofa_deploy.data import Data, load_data, preprocessing, write_splits
from fofa_deploy.distill import parallel
from fofa_deploy.distill.inputs import pruned_inputs, taught_inputs
from fofa_deploy.distill.job import WEIGHTS, Workshop, check_floor, read_curve, read_notices, read_summary, retraining
from fofa_deploy.errors import BackendError, PlanError, StageError, UnavailableError, UserError
from fofa_deploy.isolate import run_isolated
from fofa_deploy.lookup import look_up
from fofa_deploy.measure import Candidate
from fofa_deploy.models import code_identity
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Progress, Quiet
from fofa_deploy.recorded import PLAN, record_plan, recorded_plan, recorded_profiles
from fofa_deploy.recovery import PREFIX, RecoveringTuner, RetrainedTuner
from fofa_deploy.remote.device import places, profile_on
from fofa_deploy.report import write_report
from fofa_deploy.report.elsewhere import kept
from fofa_deploy.results import Comparison, DataSummary, RunReport, TargetRow
from fofa_deploy.select.apart import settled
from fofa_deploy.select.candidates import code_of
from fofa_deploy.select.record import Selection
from fofa_deploy.select.search import select_student
from fofa_deploy.store import Store
from fofa_deploy.tune import Evidence, Settings, Tuner, sensitivity
from fofa_deploy.types import Graph, Status
from fofa_deploy.verify import GraphCheck

REFERENCE = "cpu-onnxruntime"
"""The profile that graphs are checked and the model to beat is timed under; the latter with each target's own threads."""


class Run:
    """One run directory being filled. Every stage is a property: its folder, made at most once.

    Args:
        stored: take every stage as it was finished before, whatever became of its inputs; needs neither data nor training.

    Raises (on any access):
        FofaError: what the stage raises; nothing half-done is left.
    """

    def __init__(self, plan: RunPlan, store: Store, progress: Progress, stored: bool = False) -> None:
        self.plan, self.store, self.progress, self._stored, self._lessons = plan, store, progress, stored, plan.distill
        self._made: dict[str, Path] = {}
        self.notices: list[str] = []
        self.selection: Selection | None = None
        self.profiles = recorded_profiles(store.root, plan) if stored else look_up(plan)

    def _stage(
        self, stage: str, inputs: Callable[[], Mapping[str, object]], work: Callable[[Path], None], *, resumable: bool = False
    ) -> Path:
        if stage not in self._made:
            run = self.store.existing if self._stored else partial(self.store.run, inputs=inputs(), work=work, resumable=resumable)
            self._made[stage] = run(stage)
        return self._made[stage]

    @cached_property
    def data(self) -> Data:
        self.progress.say(f"read {self.plan.data.name}")
        return load_data(self.plan.data, self.plan.seed)

    @cached_property
    def workshop(self) -> Workshop:
        return Workshop(self.data, self.plan.seed, self.plan.threads, self.progress)

    @property
    def splits(self) -> Path:
        """validation/, test/ and calibration/ as the student sees them: what children read."""
        return self._splits(self.plan.student.image_size)

    def _splits(self, size: tuple[int, int] | None = None) -> Path:
        """At a model's own size, or the plan's. Every image has been decoded once by then."""
        data = self.plan.data
        own = data.at(size) is not data

        def work(out: Path) -> None:
            if own:
                self._splits()
            write_splits(self.data.at(size), self.plan.verify, out, self.progress, scanned=own)

        stage = f"data-{size_name(size)}" if size and own else "data"
        return self._stage(stage, lambda: {"data": self.data.digest, "sizes": self.plan.verify}, work)

    @cached_property
    def teacher(self) -> tuple[TeacherPlan, Path] | None:
        """The teacher's plan, and the folder with its weights, training curve and accuracy.

        Raises:
            TrainingError: it misses its floor; its weights are kept.
        """
        plan = self.plan.teacher
        if plan is None:
            return None

        def inputs() -> dict[str, object]:
            return {"teacher": plan.decisive(), "code": code_identity(plan), "data": self.data.digest, "seed": self.plan.seed}

        folder = self._stage("teacher", inputs, lambda out: self._prepared(first=True).fit(plan, out), resumable=True)
        if not self._stored:
            check_floor(plan, read_summary(folder), len(self.data.class_names))
        return plan, folder

    def _prepared(self, first: bool = False) -> Workshop:
        """The workshop, once every image is known to be readable; before the ``first`` training, all of them are rehearsed."""
        if first:
            self.workshop.rehearse(self.plan)
        self._splits()
        return self.workshop

    def choose(self) -> Selection | None:
        """The student that is chosen where the plan leaves it open, or each target's.

        Raises:
            PlanError: no candidate fits, or the choice is to be made by several processes.
        """
        if self.plan.student.model != AUTO:
            return None
        self.selection = Selection.load(self._stage("selection", self._selection_inputs, lambda out: self._select().write(out)))
        return self.selection

    def settle(self) -> None:
        """Choose the student where the plan leaves it open: from here on the plan names one.

        Raises:
            PlanError: as `choose` does; or the targets get different students, which are trained by a run for each.
        """
        if selection := self.choose():
            self.plan = settled(selection, self.plan, self.store.root, self.teacher and self.teacher[1] / WEIGHTS)

    def _selection_inputs(self) -> dict[str, object]:
        plan = self.plan
        decided = {"select": plan.select, "budget": plan.budget, "targets": self.profiles, "size": plan.data.image_size}
        method = {"code": code_of(plan.select, self.profiles[0]), "distill": plan.distill and plan.distill.decisive()}
        return {**decided, **method, **plan.export.inputs(), **self._training_inputs()}

    def _training_inputs(self) -> dict[str, object]:
        return {"data": self.data.digest, "seed": self.plan.seed, "teacher": self.teacher and taught_inputs(*self.teacher)}

    def _select(self) -> Selection:
        if parallel.size() > 1:
            action = "run fofa-deploy select in one process first; the launched command then finds its choice"
            raise PlanError("several processes cannot choose a student together", action)
        return select_student(self.plan, self.profiles, self.store, self._prepared(), self.teacher, self._training_inputs())

    @cached_property
    def student(self) -> Path:
        """The folder with the student's weights, training curve and accuracy."""
        plan = self.plan

        def inputs() -> dict[str, object]:
            method = plan.distill and plan.distill.decisive()
            return {"student": plan.student, "code": code_identity(plan.student), "distill": method, **self._training_inputs()}

        def work(out: Path) -> None:
            self._prepared(first=self.teacher is None).distill(plan.student, plan.distill, out, self.teacher)

        return self._heard(self._stage("student", inputs, work, resumable=True))

    @cached_property
    def retrained(self) -> Path:
        """The folder of the student after quantization-aware training: still in float, with weights that lie on int8 grids.

        Raises:
            PlanError: there are no labels to train by.
        """
        plan = self.plan.model_copy(update={"distill": self._lessons})  # which the plan of a ready teacher lacks
        if not plan.data.labelled:
            raise PlanError("images without labels train nothing", "give labelled data, or set qat.when = 'never'")
        taught_by = (plan.distill and plan.distill.terms and self.teacher) or (plan.student, self.student)

        def inputs() -> dict[str, object]:
            return {
                "student": plan.student,
                "weights": taught_inputs(plan.student, self.student),
                "distill": retraining(plan).decisive(),
                "scheme": {"weight_bits": plan.qat.weight_bits, "calibration": plan.verify.calibration},
                "data": self.data.digest,
                "seed": plan.seed,
                "teacher": taught_inputs(*taught_by),
            }

        def work(out: Path) -> None:
            self._prepared().retrain(plan, out, self.student, taught_by)

        return self._stage("student-qat", inputs, work, resumable=True)

    @cached_property
    def graph(self) -> Path:
        """The student as one float ONNX graph with sidecar and golden inputs, checked in another runtime."""
        return self._capture("graph", self.plan.student, self.student)

    def _capture(self, stage: str, plan: ModelPlan, folder: Path) -> Path:
        def inputs() -> dict[str, object]:
            model = self._model_inputs(plan, folder)
            return {**model, **self.plan.export.inputs(), "data": self.data.digest, "versions": tool_versions()}

        def work(out: Path) -> None:
            self.progress.say(f"capture {plan.model}")
            data = self.workshop.seen_by(plan)
            told = plan.model, preprocessing(data.plan), data.class_names, data.validation
            capture(self.workshop.load(plan, folder), *told, out, self.plan.export.input)
            check = GraphCheck(folder=out, profile=find_profile(REFERENCE))
            run_isolated("fofa_deploy.verify:check_graph", check, Comparison, seconds=self.plan.limits.run_seconds)

        return self._heard(self._stage(stage, inputs, work))

    def _heard(self, folder: Path) -> Path:
        """A stage's folder, whose notices are the run's from now on."""
        self.notices += read_notices(folder)
        return folder

    def _model_inputs(self, plan: ModelPlan, folder: Path) -> dict[str, object]:
        """All that decides a trained model's outputs."""
        made_of = {"model": plan.model, "arguments": plan.arguments, "code": code_identity(plan), **pruned_inputs(plan)}
        return {"weights": folder / WEIGHTS, "model": made_of, "preprocessing": preprocessing(self.plan.data.at(plan.image_size))}

    @cached_property
    def expected(self) -> Path:
        """The student's own logits in PyTorch on the validation and test images: what artifacts are held to."""
        return self._expected("expected", self.plan.student, self.student)

    def _expected(self, stage: str, plan: ModelPlan, folder: Path) -> Path:
        def inputs() -> dict[str, object]:
            versions = environment.package_versions(("torch",))
            return {**self._model_inputs(plan, folder), "splits": self._splits(plan.image_size), "versions": versions}

        def work(out: Path) -> None:
            self.progress.say(f"run {plan.model} in PyTorch")
            data = self.workshop.seen_by(plan)
            splits = {name: getattr(data, name).head(self.plan.verify.samples) for name in ("validation", "test")}
            write_expected(self.workshop.load(plan, folder), splits, preprocessing(data.plan), out)

        return self._stage(stage, inputs, work)

    @cached_property
    def reference(self) -> tuple[TargetRow, Candidate] | None:
        """The model to beat, as an artifact: the teacher, or where there is none the student itself, fp32 on ONNX Runtime.

        None, with a notice, where it cannot be had: the targets do not need it.
        """
        plan, folder = self.teacher or (self.plan.student, self.student)
        try:
            graph = self._capture("reference/graph", plan, folder) if self.teacher else self.graph
            expected = self._expected("reference/expected", plan, folder) if self.teacher else self.expected
            return self._reference_artifact(plan, graph, expected)
        except (StageError, UserError, UnavailableError) as error:
            self.notices.append(f"no reference to compare with: {error.message}")
            return None

    def _reference_artifact(self, plan: ModelPlan, graph: Path, expected: Path) -> tuple[TargetRow, Candidate]:
        evidence = self._evidence(plan, graph, expected)
        profile = find_profile(REFERENCE).model_copy(update={"name": "the-model-to-beat"})  # "reference" is a profile
        # Held to PyTorch alone: the plan's accuracy budget is the student's.
        settings = replace(self._settings("fp32"), accuracy=AccuracyPlan(), build=not self._stored)
        tuner = Tuner(self.store, graph, evidence, None, settings, self.progress)
        row = tuner.attempt(profile)[0]
        if row.status is not Status.VERIFIED:
            raise BackendError(f"it does not run on ONNX Runtime: {row.reason}", "run fofa-deploy doctor")
        told = {"description": f"{plan.model}, fp32 on ONNX Runtime", "target": "reference"}
        return tuner.tested(profile, row.model_copy(update=told)), tuner.candidate(profile, row)

    def tuner(self, recipe: str | None = None, *, fresh: bool = False, build: bool = True, timed: bool = True) -> Tuner:
        """For all recipes or one. ``fresh`` verifies again; without ``build`` nothing is built, without ``timed`` nothing raced."""
        settings = replace(self._settings(recipe), fresh=fresh, build=build)
        reference = self.reference[1] if timed and self.reference else None
        files = self.graph, self._evidence(self.plan.student, self.graph, self.expected), self.splits / "calibration"
        return RecoveringTuner(self.store, *files, settings, self.progress, reference, self.plan.qat.when, self._retrained)

    def _evidence(self, plan: ModelPlan, graph: Path, expected: Path) -> Evidence:
        return Evidence(graph / "golden.npz", self._splits(plan.image_size), expected, self.plan.data.labelled)

    def _retrained(self, settings: Settings) -> Tuner | None:
        """For the retrained student's graph; None, with a notice, where it cannot be had: the other recipes do not need it."""
        try:
            graph = self._capture("graph-qat", self.plan.student, self.retrained)
            expected = self._expected("expected-qat", self.plan.student, self.retrained)
        except (StageError, UserError, UnavailableError) as error:
            self.notices.append(f"no quantization-aware training: {error.message}")
            return None
        files = graph, self._evidence(self.plan.student, graph, expected), self.splits / "calibration"
        return RetrainedTuner(self.store, *files, settings, self.progress)

    def targets(self) -> tuple[list[TargetRow], TargetRow | None]:
        """One row per target and recipe; and the reference's row, with what it took beside the first target."""
        tuner = self.tuner()
        rows = [row for profile in self.profiles for row in profile_on(places(profile), tuner, profile)]
        if self.reference is None:
            return rows, None
        return rows, self.reference[0].model_copy(update=tuner.reference_timings)

    def _settings(self, recipe: str | None = None) -> Settings:
        plan = self.plan
        return Settings(plan.accuracy, plan.measure, plan.limits, plan.budget, plan.seed, recipe)

    def report(self, rows: Sequence[TargetRow], reference: TargetRow | None) -> RunReport:
        """Write report.json, report.md, report.html and model_card.md into the run directory."""
        teacher = self.teacher[1] if self.teacher else None
        folder = shlex.quote(self.store.root.resolve().name)
        trained = {"teacher": read_curve(teacher) if teacher else (), "student": read_curve(self.student)}
        if any(row.recipe.startswith(PREFIX) for row in rows):
            trained["student-qat"] = read_curve(self.retrained)
        if self.selection:
            reached = read_summary(self.student).top1_validation
            self.notices += [self.selection.kept_word(reached), *self.selection.notices]
        report = RunReport(
            name=self.plan.name,
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
            tool_version=__version__,
            method=self.plan.distill.method if self.plan.distill else "none",
            data=self._data_summary(),
            teacher=read_summary(teacher) if teacher else None,
            student=read_summary(self.student),
            targets=(*rows, *kept(self.store.root, rows, {profile.name for profile in self.profiles})),
            reference=reference,
            sensitivity=sensitivity(self.store.root),
            choice=self.selection.told() if self.selection else None,
            curves={name: curve for name, curve in trained.items() if curve},
            environment=environment.describe(),
            stages=tuple(self.store.timings),
            notices=(*self.notices, *self.store.notices),
            sidecar=Graph.load(self.graph).sidecar,
            command=f"fofa-deploy compress-and-export {folder}/{PLAN} --out {folder}",
        )
        write_report(report, self.store.root)
        return report

    def _data_summary(self) -> DataSummary:
        data = self.data
        sizes = {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)}
        return DataSummary(name=self.plan.data.name, classes=len(data.class_names), digest=data.digest, **sizes)


@contextmanager
def opened(plan: RunPlan, out: Path, progress: Progress, force: bool = False, *, settled: bool = True) -> Iterator[Run]:
    """The run in directory ``out``, locked while it is open; ``settled`` has its student chosen.

    Raises:
        LockedError: another process has it open.
        PlanError: the directory belongs to another plan, and ``force`` was not given.
    """
    with Store(out) as store, parallel.leading():
        run = Run(plan, store, progress)
        record_plan(store, plan, run.profiles, force)
        if settled:
            run.settle()
        yield run


def follow(plan: RunPlan) -> bool:
    """Whether this process was launched beside rank 0: it has then taken part in all trainings, and is done."""
    if parallel.rank() == 0:
        return False
    parallel.join()  # before the data are read, which may take longer than rank 0 waits to be met
    Workshop(load_data(plan.data, plan.seed), plan.seed, plan.threads, Quiet()).follow()
    return True


def compress_and_export(plan: RunPlan, out: Path, progress: Progress, force: bool = False) -> RunReport:
    """The whole job: data, teacher, student, graph, targets, report.

    Raises:
        FofaError: a stage failed; run again to go on from the last finished one.
    """
    with opened(plan, out, progress, force) as run:
        return run.report(*run.targets())


@contextmanager
def reopened(out: Path, progress: Progress, *, stored: bool) -> Iterator[Run]:
    """A run directory by itself, with the plan it was made from.

    Args:
        stored: take its stages as they were finished; neither the data nor a training is needed then.

    Raises:
        PlanError: ``out`` is not a run directory.
    """
    plan = recorded_plan(out)
    with Store(out) as store:
        run = Run(plan, store, progress, stored)
        run.settle()
        yield run
