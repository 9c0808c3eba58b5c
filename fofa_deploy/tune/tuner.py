"""One target: search its recipes, race what is left, choose the fastest, measure that one fully.

What fails is a row with its reason, never an exception: the other recipes and targets go on. Choices are made on the
validation split; the test split is read once, for the recipe that was chosen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fofa_deploy import environment
from fofa_deploy.config import MeasurePlan
from fofa_deploy.diagnosis import Offer, OfferRequest
from fofa_deploy.errors import FofaError, StageError, UnavailableError, UserError
from fofa_deploy.isolate import run_isolated
from fofa_deploy.judge import budget_problem
from fofa_deploy.layers import layers_of
from fofa_deploy.measure import Candidate, measure, patient
from fofa_deploy.mistakes import suggestion
from fofa_deploy.progress import Progress, Quiet
from fofa_deploy.results import Measurement, TargetRow
from fofa_deploy.store import Store
from fofa_deploy.tune.evidence import Evidence, Settings
from fofa_deploy.tune.rows import first_line, p50, row_of, timings, with_threads
from fofa_deploy.tune.search import Race, Search
from fofa_deploy.tune.workbench import Workbench
from fofa_deploy.types import Artifact, Graph, HardwareProfile, Recipe, Status

SHORT = MeasurePlan(seconds=0.3, max_seconds=0.6, warmup_seconds=0.1, warmup_runs=3)
"""Tells families of recipes apart by speed; figures of the report are measured by the plan."""

LOSERS = 4
"""Rejected recipes that are timed, too, the most accurate of each family first: what the budget costs should be seen."""


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
        self._bench = Workbench(store, graph, evidence, calibration, settings, progress, Graph.load(graph))
        self.root, self._reference = store.root, reference
        self.reference_timings: dict[str, object] = {}  # of the first race

    @property
    def settings(self) -> Settings:
        return self._bench.settings

    @property
    def progress(self) -> Progress:
        return self._bench.progress

    def tune(self, profile: HardwareProfile) -> list[TargetRow]:
        """One row per recipe tried, the chosen one marked; one row that says why where nothing could be tried."""
        return self._finish(profile, self._raced(profile, self.search(profile, timed=True)))

    def attempt(self, profile: HardwareProfile) -> list[TargetRow]:
        """Build and verify recipes of every family, without timing any."""
        return self.search(profile, timed=False)

    def search(self, profile: HardwareProfile, *, timed: bool) -> list[TargetRow]:
        """One row per recipe tried; ``timed`` leaves out families that are too slow to be chosen."""
        try:
            offered = self._offer(profile)
        except (StageError, UserError, UnavailableError) as error:
            return [row_of(profile, None, Status.SKIPPED, error.message)]
        if not offered.probe.can_build:
            return [row_of(profile, None, Status.SKIPPED, offered.probe.reason)]
        wanted = self.settings.recipe
        recipes = asked_for(offered.recipes, wanted)
        if not recipes:
            names = [recipe.name for recipe in offered.recipes]
            what = f"is named {wanted!r}: {suggestion(wanted, names)}" if wanted else "fits the profile's precisions"
            return [row_of(profile, None, Status.SKIPPED, f"no recipe {what}")]
        race = self._short_race(profile) if timed else None
        rows = Search(self._bench, profile, offered.probe, race).rows(recipes)
        return rows or [row_of(profile, None, Status.FAILED, "not built yet; fofa-deploy quantize builds it")]

    def _offer(self, profile: HardwareProfile) -> Offer:
        request = OfferRequest(graph=self._bench.folder, profile=profile)
        return run_isolated("fofa_deploy.diagnosis:offer", request, Offer, seconds=self.settings.limits.build_seconds)

    # --- timing ---------------------------------------------------------------------------------------------------

    def _short_race(self, profile: HardwareProfile) -> Race:
        def race(artifacts: Sequence[Artifact]) -> list[float | None]:
            batch, threads = self.settings.lines(profile)[0]
            candidates = [self._candidate(profile, artifact.folder, batch, threads) for artifact in artifacts]
            found = measure(candidates, SHORT, self.settings.limits, self.settings.seed, Quiet())
            # Of so few runs the fastest: what others do on the machine only ever adds, and would decide which family is tried.
            return [m.latency_ms.min if isinstance(m, Measurement) else None for m in found]

        return race

    def _raced(self, profile: HardwareProfile, rows: Sequence[TargetRow]) -> list[TargetRow]:
        """Time every verified row, and the best of those rejected, against each other and the reference, in one run."""
        runnable = [row for row in rows if row.status is Status.VERIFIED]
        if not runnable:
            return list(rows)
        runnable += _losers(rows)
        first = self.settings.lines(profile)[0]
        candidates = [self.candidate(profile, row, *first) for row in runnable]
        reference = self._reference_candidate(profile)
        everyone = [*candidates, *([reference] if reference else [])]
        settings = self.settings
        plan = patient(settings.measure, profile.budget, settings.budget)
        found = measure(everyone, plan, settings.limits, settings.seed, self.progress)
        base = found.pop() if reference else None
        if isinstance(base, Measurement):
            self.reference_timings = self.reference_timings or timings(base, environment.describe())
        timed = {row.recipe: self._timed(row, m, base) for row, m in zip(runnable, found, strict=True)}
        return [timed.get(row.recipe, row) for row in rows]

    def candidate(self, profile: HardwareProfile, row: TargetRow, batch: int = 1, threads: int | None = None) -> Candidate:
        """What to measure of a row that has an artifact; with the profile's threads if not with others."""
        assert row.artifact
        return self._candidate(profile, self.root / row.artifact, batch, threads)

    def _candidate(self, profile: HardwareProfile, folder: Path, batch: int, threads: int | None) -> Candidate:
        golden = self._bench.evidence.golden
        return Candidate(artifact=folder, profile=with_threads(profile, threads), golden=golden, batch=batch)

    def sweep(self, batches: tuple[int, ...], threads: tuple[int, ...]) -> None:
        """Measure at these batch sizes and numbers of threads instead of the profiles' own; none = those."""
        settings = replace(self.settings, batches=batches, threads=threads)
        self._bench = replace(self._bench, settings=settings)

    def _reference_candidate(self, profile: HardwareProfile) -> Candidate | None:
        """The model to beat, with this target's threads and batch size."""
        if self._reference is None:
            return None
        batch, threads = self.settings.lines(profile)[0]
        same = self._reference.profile.model_copy(update={"execution": profile.execution})
        return self._reference.model_copy(update={"profile": with_threads(same, threads), "batch": batch})

    def _timed(self, row: TargetRow, found: Measurement | FofaError, base: Measurement | FofaError | None) -> TargetRow:
        if isinstance(found, FofaError):
            return row.model_copy(update={"status": Status.FAILED, "reason": first_line(found)})
        speedup = base.latency_ms.p50 / found.latency_ms.p50 if isinstance(base, Measurement) else None
        return row.model_copy(update={**timings(found, environment.describe()), "speedup": speedup})

    def _finish(self, profile: HardwareProfile, rows: Sequence[TargetRow]) -> list[TargetRow]:
        """Of the chosen row, the other batch sizes and the accuracy on the test split, too."""
        return [self._finished(profile, row) if row.chosen else row for row in self.choose(profile, rows)]

    def choose(self, profile: HardwareProfile, rows: Sequence[TargetRow]) -> list[TargetRow]:
        """Reject what misses the profile's or the plan's budget, then mark the fastest that is left."""
        judged = [self._inside_budget(profile, row) for row in rows]
        best = min((r for r in judged if r.status is Status.VERIFIED and r.latency_ms), key=p50, default=None)
        if best is None:
            return judged
        chosen = best.model_copy(update={"chosen": True, "reason": _why(best, judged)})
        return [chosen if row is best else row for row in judged]

    def _finished(self, profile: HardwareProfile, row: TargetRow) -> TargetRow:
        others, problems = self._sweep(profile, row)
        try:
            row = self.tested(profile, row)
        except (StageError, UserError, UnavailableError) as error:
            problems.append(f"test images: {first_line(error)}")
        facts = {"reason": "; ".join([row.reason, *problems]), "other_batches": others}
        return row.model_copy(update=facts | self._layers(profile, row))

    def _layers(self, profile: HardwareProfile, row: TargetRow) -> dict[str, object]:
        candidate = self.candidate(profile, row, *self.settings.lines(profile)[0])
        return layers_of(candidate, self._bench.graph.path, p50(row), self.settings.limits.run_seconds)

    def _inside_budget(self, profile: HardwareProfile, row: TargetRow) -> TargetRow:
        if row.status is not Status.VERIFIED or row.measurement is None:
            return row
        for budget, owner in ((profile.budget, "profile"), (self.settings.budget, "plan")):
            if problem := budget_problem(row, budget):
                return row.model_copy(update={"status": Status.REJECTED, "reason": f"{problem} ({owner})"})
        return row

    def tested(self, profile: HardwareProfile, row: TargetRow) -> TargetRow:
        """The row with its artifact's accuracy on the test split, where there is one."""
        if self._bench.evidence.split("test") is None:
            return row
        found = self._bench.verify(profile, Artifact.load(self.root / str(row.artifact)), "test").whole
        return row.model_copy(update={"top1": found.top1, "top5": found.top5, "agreement": found.agreement}) if found else row

    def _sweep(self, profile: HardwareProfile, row: TargetRow) -> tuple[tuple[Measurement, ...], list[str]]:
        """The chosen artifact at the other batch sizes and numbers of threads, and why some of them failed."""
        settings = self.settings
        candidates = [self.candidate(profile, row, *line) for line in settings.lines(profile)[1:]]
        found = measure(candidates, settings.measure, settings.limits, settings.seed, self.progress) if candidates else []
        problems = [
            f"batch {candidate.batch}, {candidate.profile.execution.thread_count} threads: {first_line(result)}"
            for candidate, result in zip(candidates, found, strict=True)
            if isinstance(result, FofaError)
        ]
        return tuple(m for m in found if isinstance(m, Measurement)), problems


def _why(best: TargetRow, rows: Sequence[TargetRow]) -> str:
    """Why this recipe: how much faster than the slowest that would have done, too."""
    passed = [p50(row) for row in rows if row.status is Status.VERIFIED]
    if len(passed) == 1:
        return "the only recipe inside the budget"
    return f"fastest of {len(passed)} inside the budget, {max(passed) / p50(best):.2f}x as fast as the slowest of them"


def asked_for(recipes: Sequence[Recipe], name: str | None) -> list[Recipe]:
    """The one of this name; without a name, all that are not kept for those who ask for them."""
    return [recipe for recipe in recipes if (recipe.name == name if name else not recipe.on_request)]


def _losers(rows: Sequence[TargetRow]) -> list[TargetRow]:
    """Of the recipes that missed the budget, the most accurate."""
    rejected = [row for row in rows if row.status is Status.REJECTED and row.artifact]
    return sorted(rejected, key=lambda row: -row.validation.agreement if row.validation else 0.0)[:LOSERS]
