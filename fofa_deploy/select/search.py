"""The selection: candidates are captured, measured on every target, held to the budgets, trained for a while; one is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from fofa_deploy.capture import capture
from fofa_deploy.config import AUTO, MeasurePlan, ModelPlan, RunPlan
from fofa_deploy.data import preprocessing
from fofa_deploy.distill.job import Taught, Workshop
from fofa_deploy.errors import PlanError, StageError, UnavailableError, UserError
from fofa_deploy.models import parameter_count
from fofa_deploy.select.candidates import Candidate, expand, listed_for
from fofa_deploy.select.choose import NobodyFitsError, Scored, Speed, choose, fitting, front, misses
from fofa_deploy.select.forecast import Curve, Forecast, forecast
from fofa_deploy.select.record import Choice, Judged, OnTarget, Selection
from fofa_deploy.select.rungs import Halving
from fofa_deploy.select.speed import Speeds, Stopwatch
from fofa_deploy.select.table import LatencyTable
from fofa_deploy.store import Store
from fofa_deploy.tune import Evidence, Settings
from fofa_deploy.tune.workbench import Workbench
from fofa_deploy.types import Budget, Graph, HardwareProfile


def select_student(
    plan: RunPlan,
    profiles: Sequence[HardwareProfile],
    store: Store,
    workshop: Workshop,
    calibration: Path,
    taught_by: Taught | None,
    decisive: Mapping[str, object],
) -> Selection:
    """Choose the student of a plan that leaves it open; its trainings are stages of ``store``.

    Args:
        calibration: folder with ``images.npy``.
        decisive: inputs that all trainings share, by name.

    Raises:
        PlanError: nobody fits, or nobody can be measured; says who came nearest.
    """
    assert plan.distill, "the plan has been checked"
    halving = Halving(plan.select, plan.distill, workshop, taught_by, partial(store.run, resumable=True), decisive)
    return Selector(plan, profiles, store.root, calibration, halving, LatencyTable()).select()


@dataclass(frozen=True)
class Selector:
    """What `select_student` needs; ``root`` is the run directory, where each candidate's artifacts have a store of their own."""

    plan: RunPlan
    profiles: Sequence[HardwareProfile]
    root: Path
    calibration: Path
    halving: Halving
    table: LatencyTable

    def select(self) -> Selection:
        candidates = self.candidates()
        measured, notices, parameters = self._measured(candidates)
        fits = self._fitting(measured)
        climbs = {target: self.halving.climb([one for one in candidates if one.name in names]) for target, names in fits.items()}
        curves = _longest(climbs.values())
        seen = self.halving.distill.epochs * len(self.halving.workshop.data.train)
        foretold = {name: forecast(curve, seen) for name, curve in curves.items()}
        students = {one.name: one.student for one in candidates}
        first, *others = [self._choice(target, measured, climbs[target], foretold, students) for target in fits]
        judged = [self._judged(candidate, measured, curves, parameters, foretold) for candidate in candidates]
        return Selection(
            **dict(first),
            others=tuple(others),
            candidates=tuple(_crowned(one, [first, *others]) for one in judged),
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            notices=tuple(notices),
        )

    def _choice(
        self,
        target: str,
        measured: dict[str, Speeds],
        curves: dict[str, Curve],
        foretold: dict[str, Forecast],
        students: dict[str, ModelPlan],
    ) -> Choice:
        """The best of those that climbed for a target. Those that were dropped early are shown, and do not compete."""
        speeds = {speed.name: speed for speed in measured[target].found}
        longest = max(len(curve.points) for curve in curves.values())
        shown = {name: Scored(speed=speeds[name], top1=foretold[name].top1) for name in curves}
        best = choose([shown[name] for name, curve in curves.items() if len(curve.points) == longest]).speed.name
        order = tuple(one.speed.name for one in front(list(shown.values())))
        return Choice(student=students[best], name=best, foretold=foretold[best], target=target, front=order)

    def candidates(self) -> tuple[Candidate, ...]:
        listed = self.plan.select.candidates or listed_for(self.profiles[0])
        return expand(listed, [self.plan.data.image_size])

    # --- measuring ------------------------------------------------------------------------------------------------

    def _measured(self, candidates: Sequence[Candidate]) -> tuple[dict[str, Speeds], list[str], dict[str, int]]:
        """By target, those this machine or their device can run; what could not be measured; and everybody's parameters."""
        notices: list[str] = []
        found: dict[str, Speeds] = {}
        parameters: dict[str, int] = {}
        with ExitStack() as stack:
            benches: dict[str, Workbench] = {}
            for candidate in candidates:
                try:
                    store = stack.enter_context(Store(self.root / "candidates" / candidate.name / "speed"))
                    benches[candidate.name], parameters[candidate.name] = self._bench(candidate, store)
                except (StageError, UserError, UnavailableError) as error:
                    notices.append(f"{candidate.name} cannot be captured: {error.message}")
            for profile in self.profiles:
                try:
                    stopwatch = Stopwatch(benches, profile, self.table)
                except (StageError, UserError, UnavailableError) as error:
                    notices.append(f"{error.message}: {profile.name} has no say in the choice")
                else:
                    found[profile.name] = stopwatch.speeds(partial(self._fits, profile.name))
        if not found:
            action = "add a target that this machine or a device can run, or name the student"
            raise PlanError(f"student.model = {AUTO!r}, and no target can be measured: {'; '.join(notices)}", action)
        return found, notices, parameters

    def _bench(self, candidate: Candidate, store: Store) -> tuple[Workbench, int]:
        workshop, plan = self.halving.workshop, self.plan
        workshop.progress.say(f"capture {candidate.name}")
        model = workshop.new(candidate.student)

        def work(out: Path) -> None:
            told = candidate.student.model, preprocessing(plan.data), workshop.data.class_names, workshop.data.validation
            capture(model, *told, out, plan.export.input)

        made_of = {"student": candidate.student, "seed": plan.seed, "data": workshop.data.digest, **plan.export.inputs()}
        folder = store.run("graph", made_of, work)
        measure = MeasurePlan(seconds=plan.select.seconds, max_seconds=4 * plan.select.seconds)
        settings = Settings(plan.accuracy, measure, plan.limits, plan.budget, plan.seed)
        evidence = Evidence(folder / "golden.npz")
        bench = Workbench(store, folder, evidence, self.calibration, settings, workshop.progress, Graph.load(folder))
        return bench, parameter_count(model)

    # --- choosing -------------------------------------------------------------------------------------------------

    def _fitting(self, measured: dict[str, Speeds]) -> dict[str, list[str]]:
        """Names of those that keep every target's and the plan's budget, by the target that decides; or each target's own."""
        kept = {target: [speed.name for speed in self._kept(target, speeds)] for target, speeds in measured.items()}
        if self.plan.select.fit == "each":
            return kept
        main, *others = kept
        names = [name for name in kept[main] if all(name in kept[other] for other in others)]
        if not names:
            action = "raise a target's budget, or have one student chosen for each target: select.fit = 'each'"
            raise NobodyFitsError(f"no candidate fits all of {', '.join(measured)}, though each has some that do", action)
        return {main: names}

    def _kept(self, target: str, speeds: Speeds) -> tuple[Speed, ...]:
        try:
            return fitting(speeds.found, self._budgets(target))[0]
        except PlanError as error:
            raise type(error)(f"{target}: {error.message}", error.action) from error

    def _fits(self, target: str, speed: Speed) -> bool:
        return not misses(speed, self._budgets(target))

    def _budgets(self, target: str) -> list[Budget]:
        profile = next(profile for profile in self.profiles if profile.name == target)
        return [profile.budget, self.plan.budget]

    def _judged(
        self,
        candidate: Candidate,
        measured: dict[str, Speeds],
        curves: dict[str, Curve],
        parameters: dict[str, int],
        foretold: dict[str, Forecast],
    ) -> Judged:
        rows = tuple(self._on_target(candidate.name, target, speeds) for target, speeds in measured.items())
        curve = curves.get(candidate.name)
        return Judged(
            name=candidate.name,
            student=candidate.student,
            params=parameters.get(candidate.name),
            targets=rows,
            rungs=curve.points if curve else (),
            foretold=foretold.get(candidate.name),
            affinity=self.halving.alike.get(candidate.name),
        )

    def _on_target(self, name: str, target: str, speeds: Speeds) -> OnTarget:
        speed = next((speed for speed in speeds.found if speed.name == name), None)
        reasons = tuple(f"{recipe}: {_first_line(reason)}" for recipe, reason in speeds.reasons.get(name, {}).items())
        away = f"does not run ({reasons[-1] if reasons else 'it was not captured'})"
        missed = tuple(str(miss) for miss in misses(speed, self._budgets(target))) if speed else (away,)
        return OnTarget(target=target, recipe=speeds.recipes.get(name, ""), speed=speed, missed=missed, failures=reasons)


def _longest(climbs: Iterable[dict[str, Curve]]) -> dict[str, Curve]:
    """Of each candidate what it showed where it climbed highest."""
    found: dict[str, Curve] = {}
    for name, curve in (item for curves in climbs for item in curves.items()):
        if name not in found or len(curve.points) > len(found[name].points):
            found[name] = curve
    return found


def _crowned(judged: Judged, choices: Sequence[Choice]) -> Judged:
    targets = tuple(choice.target for choice in choices if choice.name == judged.name)
    return judged.model_copy(update={"chosen": bool(targets), "chosen_for": targets if len(choices) > 1 else ()})


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
