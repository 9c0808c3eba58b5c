"""Per target: build every recipe worth trying, prove its precision, hold it to PyTorch, time what passes, keep the fastest.

Building and running happen in child processes. What fails is a row with its reason, never an exception: the other recipes
and targets go on. Choices are made on the validation split; the test split is read once, for the recipe that was chosen.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fofa_deploy import environment
from fofa_deploy.backend import get_backend
from fofa_deploy.config import AccuracyPlan, LimitsPlan, MeasurePlan
from fofa_deploy.diagnosis import Offer, OfferRequest
from fofa_deploy.errors import DataError, FofaError, StageError, UnavailableError, UserError
from fofa_deploy.isolate import run_isolated
from fofa_deploy.judge import accuracy_problem, budget_problem, precision_problem
from fofa_deploy.layers import layers_of
from fofa_deploy.measure import Candidate, measure
from fofa_deploy.metrics import topk
from fofa_deploy.progress import Progress
from fofa_deploy.results import Environment, Measurement, TargetRow
from fofa_deploy.serving import write_example
from fofa_deploy.store import Store
from fofa_deploy.types import Artifact, Budget, Calibration, Frozen, Graph, HardwareProfile, Probe, Recipe, Status
from fofa_deploy.verify import Verification, VerifyRequest


class BuildRequest(Frozen):
    graph: Path
    profile: HardwareProfile
    recipe: Recipe
    calibration: Calibration | None
    out: Path


class Built(Frozen):
    """All that has to come back from the child: the rest is on disk, and is digested when it is read."""

    sha256: str


def build(request: BuildRequest) -> Built:
    """Runs in a child process."""
    backend = get_backend(request.profile.runtime)
    artifact = backend.build(Graph.load(request.graph), request.recipe, request.calibration, request.out)
    write_example(artifact)
    return Built(sha256=artifact.sha256)


@dataclass(frozen=True)
class Evidence:
    """Files that artifacts are held to: golden inputs, and where there are any, whole splits with PyTorch's logits on them."""

    golden: Path
    splits: Path | None = None
    expected: Path | None = None
    labelled: bool = False

    def split(self, name: str) -> tuple[Path, Path] | None:
        """The folder of a split's images and labels, and the file of PyTorch's logits."""
        if self.splits is None or self.expected is None or not (self.splits / name).is_dir():
            return None
        return self.splits / name, self.expected / f"{name}.npy"


@dataclass(frozen=True)
class Settings:
    """The parts of the plan that decide a target."""

    accuracy: AccuracyPlan
    measure: MeasurePlan
    limits: LimitsPlan
    budget: Budget
    seed: int
    recipe: str | None = None
    fresh: bool = False
    """Verify again what has been verified before."""
    build: bool = True
    """False: only what has been built before, as it is."""
    batches: tuple[int, ...] = ()
    """Batch sizes to measure, instead of the profile's."""
    threads: tuple[int, ...] = ()
    """Numbers of threads to measure, instead of the profile's."""

    def lines(self, profile: HardwareProfile) -> list[tuple[int, int]]:
        """Every (batch size, threads) to measure; recipes are chosen by the first."""
        own = profile.execution
        return [(batch, count) for count in self.threads or (own.threads,) for batch in self.batches or own.batch_sizes]


class Tuner:
    """Tunes targets for one captured graph, into one store.

    Args:
        graph: folder of the captured graph.
        calibration: folder with ``images.npy``, or None: then only recipes without calibration are built.
        reference: an artifact that is measured alongside every target, and its golden inputs: the model to beat.
    """

    def __init__(
        self,
        store: Store,
        graph: Path,
        evidence: Evidence,
        calibration: Path | None,
        settings: Settings,
        progress: Progress,
        reference: Candidate | None = None,
    ) -> None:
        self._store, self._folder, self._evidence, self.settings = store, graph, evidence, settings
        self.root, self.progress, self._reference = store.root, progress, reference
        self._graph = Graph.load(graph)
        self._calibration = calibration
        self.reference_timings: dict[str, object] = {}  # of the first race
        self._expected_top1 = _expected_top1(evidence)

    def tune(self, profile: HardwareProfile) -> list[TargetRow]:
        """One row per recipe, the chosen one marked; one row that says why where nothing could be tried."""
        return self._finish(profile, self._race(profile, self.attempt(profile)))

    def attempt(self, profile: HardwareProfile) -> list[TargetRow]:
        """Build and verify every recipe, without timing any."""
        try:
            offered = self._offer(profile)
        except (StageError, UserError, UnavailableError) as error:
            return [self._row(profile, None, Status.SKIPPED, error.message)]
        if not offered.probe.can_build:
            return [self._row(profile, None, Status.SKIPPED, offered.probe.reason)]
        recipes = [r for r in offered.recipes if self.settings.recipe in (None, r.name)]
        if not recipes:
            names = ", ".join(r.name for r in offered.recipes) or "none"
            wanted = f"is named {self.settings.recipe!r}" if self.settings.recipe else "fits the profile's precisions"
            return [self._row(profile, None, Status.SKIPPED, f"no recipe {wanted}; offered: {names}")]
        return [self._try(profile, recipe, offered.probe) for recipe in recipes]

    def _offer(self, profile: HardwareProfile) -> Offer:
        request = OfferRequest(graph=self._folder, profile=profile)
        return run_isolated("fofa_deploy.diagnosis:offer", request, Offer, seconds=self.settings.limits.build_seconds)

    # --- one recipe -------------------------------------------------------------------------------------------

    def _try(self, profile: HardwareProfile, recipe: Recipe, probe: Probe) -> TargetRow:
        self.progress.say(f"{profile.name}: {recipe.name}")
        try:
            artifact = self._build(profile, recipe, probe)
            if problem := precision_problem(artifact):
                return self._row(profile, recipe, Status.FAILED, problem, artifact)
            if not probe.can_run:
                return self._row(profile, recipe, Status.BUILT_NOT_RUN, probe.reason, artifact)
            found = self._verify(profile, artifact, "validation")
        except (StageError, UserError, UnavailableError) as error:
            return self._row(profile, recipe, Status.FAILED, _first_line(error))
        reason = accuracy_problem(recipe.precision, found, self.settings.accuracy, self._expected_top1)
        status = Status.REJECTED if reason else Status.VERIFIED
        return self._row(profile, recipe, status, reason or "inside the accuracy budget", artifact, found)

    def _build(self, profile: HardwareProfile, recipe: Recipe, probe: Probe) -> Artifact:
        stage = f"artifacts/{profile.name}/{recipe.name}"
        if not self.settings.build:
            return Artifact.load(self._built(stage))
        calibration = self._calibrated(recipe)
        inputs = {
            "graph": self._graph.path,
            "sidecar": self._graph.sidecar,
            "recipe": recipe,
            "profile": profile,
            "versions": probe.versions,
            "calibration": calibration.images if calibration else None,
            "machine": environment.describe().fingerprint,
        }

        def work(out: Path) -> None:
            request = BuildRequest(graph=self._folder, profile=profile, recipe=recipe, calibration=calibration, out=out)
            limits = self.settings.limits
            run_isolated("fofa_deploy.tune:build", request, Built, seconds=limits.build_seconds, memory_bytes=limits.memory_bytes)

        return Artifact.load(self._store.run(stage, inputs, work))

    def _built(self, stage: str) -> Path:
        if not (self._store.root / stage).is_dir():
            raise DataError("not built yet; fofa-deploy quantize builds it", "run fofa-deploy quantize first")
        return self._store.existing(stage)

    def _calibrated(self, recipe: Recipe) -> Calibration | None:
        if not recipe.needs_calibration:
            return None
        if self._calibration is None:
            raise DataError(f"recipe {recipe.name} needs calibration images", "give real images with --images")
        sidecar = self._graph.sidecar
        images = self._calibration / "images.npy"
        return Calibration(images=images, preprocessing=sidecar.preprocessing, input_name=sidecar.input.name)

    def _verify(self, profile: HardwareProfile, artifact: Artifact, split: str) -> Verification:
        golden = self._evidence.golden
        images, expected = self._evidence.split(split) or (None, None)
        request = VerifyRequest(
            artifact=artifact.folder,
            profile=profile,
            golden=golden,
            split=images,
            expected=expected,
            labelled=self._evidence.labelled,
        )
        inputs = {
            "artifact": artifact.sha256,
            "profile": profile,
            "golden": golden,
            "images": images,
            "expected": expected,
            "machine": environment.describe().fingerprint,
        }

        if self.settings.fresh:
            return self._run_verify(request)

        def work(out: Path) -> None:
            (out / "verification.json").write_text(self._run_verify(request).model_dump_json(indent=1))

        stage = f"verification/{profile.name}/{artifact.recipe.name}/{split}"
        return Verification.model_validate_json((self._store.run(stage, inputs, work) / "verification.json").read_bytes())

    def _run_verify(self, request: VerifyRequest) -> Verification:
        limits = self.settings.limits
        child = "fofa_deploy.verify:verify"
        return run_isolated(child, request, Verification, seconds=limits.run_seconds, memory_bytes=limits.memory_bytes)

    # --- all recipes of a target ------------------------------------------------------------------------------

    def _race(self, profile: HardwareProfile, rows: Sequence[TargetRow]) -> list[TargetRow]:
        """Time every verified row against each other and the reference, in one run."""
        runnable = [row for row in rows if row.status is Status.VERIFIED]
        if not runnable:
            return list(rows)
        first = self.settings.lines(profile)[0]
        candidates = [self.candidate(profile, row, *first) for row in runnable]
        reference = self._reference_candidate(profile)
        everyone = [*candidates, *([reference] if reference else [])]
        settings = self.settings
        found = measure(everyone, settings.measure, settings.limits, settings.seed, self.progress)
        base = found.pop() if reference else None
        if isinstance(base, Measurement):
            self.reference_timings = self.reference_timings or timings(base, environment.describe())
        timed = {row.recipe: self._timed(row, m, base) for row, m in zip(runnable, found, strict=True)}
        return [timed.get(row.recipe, row) for row in rows]

    def candidate(self, profile: HardwareProfile, row: TargetRow, batch: int = 1, threads: int | None = None) -> Candidate:
        """What to measure of a row that has an artifact; with the profile's threads if not with others."""
        assert row.artifact
        folder, golden = self.root / row.artifact, self._evidence.golden
        return Candidate(artifact=folder, profile=with_threads(profile, threads), golden=golden, batch=batch)

    def sweep(self, batches: tuple[int, ...], threads: tuple[int, ...]) -> None:
        """Measure at these batch sizes and numbers of threads instead of the profiles' own; none = those."""
        self.settings = replace(self.settings, batches=batches, threads=threads)

    def _reference_candidate(self, profile: HardwareProfile) -> Candidate | None:
        """The model to beat, with this target's threads and batch size."""
        if self._reference is None:
            return None
        batch, threads = self.settings.lines(profile)[0]
        same = self._reference.profile.model_copy(update={"execution": profile.execution})
        return self._reference.model_copy(update={"profile": with_threads(same, threads), "batch": batch})

    def _timed(self, row: TargetRow, found: Measurement | FofaError, base: Measurement | FofaError | None) -> TargetRow:
        if isinstance(found, FofaError):
            return row.model_copy(update={"status": Status.FAILED, "reason": _first_line(found)})
        speedup = base.latency_ms.p50 / found.latency_ms.p50 if isinstance(base, Measurement) else None
        return row.model_copy(update={**timings(found, environment.describe()), "speedup": speedup})

    def _finish(self, profile: HardwareProfile, rows: Sequence[TargetRow]) -> list[TargetRow]:
        """Of the chosen row, the other batch sizes and the accuracy on the test split, too."""
        return [self._finished(profile, row) if row.chosen else row for row in self.choose(profile, rows)]

    def choose(self, profile: HardwareProfile, rows: Sequence[TargetRow]) -> list[TargetRow]:
        """Reject what misses the profile's or the plan's budget, then mark the fastest that is left."""
        judged = [self._inside_budget(profile, row) for row in rows]
        best = min((r for r in judged if r.status is Status.VERIFIED and r.latency_ms), key=_p50, default=None)
        if best is None:
            return judged
        chosen = best.model_copy(update={"chosen": True, "reason": _why(best, judged)})
        return [chosen if row is best else row for row in judged]

    def _finished(self, profile: HardwareProfile, row: TargetRow) -> TargetRow:
        others, problems = self._sweep(profile, row)
        facts = {"reason": "; ".join([row.reason, *problems]), "other_batches": others}
        return self.tested(profile, row).model_copy(update=facts | self._layers(profile, row))

    def _layers(self, profile: HardwareProfile, row: TargetRow) -> dict[str, object]:
        candidate = self.candidate(profile, row, *self.settings.lines(profile)[0])
        return layers_of(candidate, self._graph.path, _p50(row), self.settings.limits.run_seconds)

    def _inside_budget(self, profile: HardwareProfile, row: TargetRow) -> TargetRow:
        if row.status is not Status.VERIFIED or row.measurement is None:
            return row
        for budget, owner in ((profile.budget, "profile"), (self.settings.budget, "plan")):
            if problem := budget_problem(row, budget):
                return row.model_copy(update={"status": Status.REJECTED, "reason": f"{problem} ({owner})"})
        return row

    def tested(self, profile: HardwareProfile, row: TargetRow) -> TargetRow:
        """The row with its artifact's accuracy on the test split, where there is one."""
        if self._evidence.split("test") is None:
            return row
        found = self._verify(profile, Artifact.load(self._store.root / str(row.artifact)), "test").whole
        return row.model_copy(update={"top1": found.top1, "top5": found.top5, "agreement": found.agreement}) if found else row

    def _sweep(self, profile: HardwareProfile, row: TargetRow) -> tuple[tuple[Measurement, ...], list[str]]:
        """The chosen artifact at the other batch sizes and numbers of threads, and why some of them failed."""
        settings = self.settings
        candidates = [self.candidate(profile, row, *line) for line in settings.lines(profile)[1:]]
        found = measure(candidates, settings.measure, settings.limits, settings.seed, self.progress) if candidates else []
        problems = [
            f"batch {candidate.batch}, {candidate.profile.execution.thread_count} threads: {_first_line(result)}"
            for candidate, result in zip(candidates, found, strict=True)
            if isinstance(result, FofaError)
        ]
        return tuple(m for m in found if isinstance(m, Measurement)), problems

    def _row(
        self,
        profile: HardwareProfile,
        recipe: Recipe | None,
        status: Status,
        reason: str,
        artifact: Artifact | None = None,
        found: Verification | None = None,
    ) -> TargetRow:
        row = TargetRow(
            target=profile.name,
            runtime=profile.runtime,
            profile=profile.name,
            recipe=recipe.name if recipe else "none",
            description=recipe.description if recipe else "",
            status=status,
            reason=reason,
        )
        if artifact is None:
            return row
        return row.model_copy(
            update={
                "precision": dict(Counter(layer.precision for layer in artifact.layers if layer.weighted)),
                "layer_types": dict(Counter(f"{layer.operator} {layer.precision}" for layer in artifact.layers)),
                "golden": found.golden if found else None,
                "validation": found.whole if found else None,
                "size_bytes": artifact.size_bytes,
                "artifact": artifact.folder.relative_to(self._store.root).as_posix(),
                "sha256": artifact.sha256,
            }
        )


def timings(found: Measurement, where: Environment) -> dict[str, object]:
    """A measurement as the fields of a row."""
    return {
        "measurement": found,
        "latency_ms": found.latency_ms,
        "throughput_sps": found.throughput_sps,
        "peak_rss_bytes": found.peak_rss_bytes,
        "cold_start_ms": found.cold_start_ms,
        "environment": where,
    }


def with_threads(profile: HardwareProfile, threads: int | None) -> HardwareProfile:
    if threads is None:
        return profile
    return profile.model_copy(update={"execution": profile.execution.model_copy(update={"threads": threads})})


def _why(best: TargetRow, rows: Sequence[TargetRow]) -> str:
    """Why this recipe: how much faster than the slowest that would have done, too."""
    passed = [_p50(row) for row in rows if row.status is Status.VERIFIED]
    if len(passed) == 1:
        return "the only recipe inside the budget"
    return f"fastest of {len(passed)} inside the budget, {max(passed) / _p50(best):.2f}x the slowest of them"


def _expected_top1(evidence: Evidence) -> float | None:
    """PyTorch's own top-1 on the validation split, where there are labels."""
    found = evidence.split("validation")
    if not evidence.labelled or found is None:
        return None
    labels = np.load(found[0] / "labels.npy", allow_pickle=False)
    return topk(np.load(found[1], allow_pickle=False), labels, 1)


def _p50(row: TargetRow) -> float:
    assert row.latency_ms
    return row.latency_ms.p50


def _first_line(error: FofaError) -> str:
    return error.message.splitlines()[0]
