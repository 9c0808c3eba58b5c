"""The selection: candidates are captured, measured on every target, held to the budgets, trained for a while; one is chosen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from fofa_deploy.capture import capture
from fofa_deploy.config import AUTO, MeasurePlan, RunPlan
from fofa_deploy.data import preprocessing
from fofa_deploy.distill.job import Taught, Workshop
from fofa_deploy.errors import PlanError, StageError, UnavailableError, UserError
from fofa_deploy.models import parameter_count
from fofa_deploy.select.candidates import Candidate, expand, listed_for
from fofa_deploy.select.choose import Scored, Speed, choose, fitting, front, misses
from fofa_deploy.select.forecast import Curve, forecast
from fofa_deploy.select.record import Judged, OnTarget, Selection
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
        curves = self.halving.climb([candidate for candidate in candidates if candidate.name in fits])
        seen = self.halving.distill.epochs * len(self.halving.workshop.data.train)
        foretold = {name: forecast(curve, seen) for name, curve in curves.items()}
        main = next(iter(measured))
        speeds = {speed.name: speed for speed in measured[main].found}
        # Those that were dropped early were dropped for their accuracy: they are shown, and do not compete.
        longest = max(len(curve.points) for curve in curves.values())
        finalists = [Scored(speed=speeds[name], top1=foretold[name].top1) for name in fits if len(curves[name].points) == longest]
        best = choose(finalists)
        shown = [Scored(speed=speeds[name], top1=foretold[name].top1) for name in fits]
        judged = [self._judged(candidate, measured, curves, parameters) for candidate in candidates]
        return Selection(
            student=next(candidate for candidate in candidates if candidate.name == best.speed.name).student,
            name=best.speed.name,
            foretold=foretold[best.speed.name],
            target=main,
            candidates=tuple(
                one.model_copy(update={"foretold": foretold.get(one.name), "chosen": one.name == best.speed.name}) for one in judged
            ),
            front=tuple(one.speed.name for one in front(shown)),
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            notices=tuple(notices),
        )

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
                    found[profile.name] = stopwatch.speeds()
        if not found:
            action = "add a target that this machine or a device can run, or name the student"
            raise PlanError(f"student.model = {AUTO!r}, and no target can be measured: {'; '.join(notices)}", action)
        return found, notices, parameters

    def _bench(self, candidate: Candidate, store: Store) -> tuple[Workbench, int]:
        workshop, plan = self.halving.workshop, self.plan
        workshop.progress.say(f"capture {candidate.name}")
        model = workshop.new(candidate.student)

        def work(out: Path) -> None:
            names = workshop.data.class_names
            capture(model, candidate.student.model, preprocessing(plan.data), names, workshop.data.validation, out)

        folder = store.run("graph", {"student": candidate.student, "seed": plan.seed, "data": workshop.data.digest}, work)
        measure = MeasurePlan(seconds=plan.select.seconds, max_seconds=4 * plan.select.seconds)
        settings = Settings(plan.accuracy, measure, plan.limits, plan.budget, plan.seed)
        evidence = Evidence(folder / "golden.npz")
        bench = Workbench(store, folder, evidence, self.calibration, settings, workshop.progress, Graph.load(folder))
        return bench, parameter_count(model)

    # --- choosing -------------------------------------------------------------------------------------------------

    def _fitting(self, measured: dict[str, Speeds]) -> list[str]:
        """Names of those that keep every target's and the plan's budget."""
        kept = [self._kept(name, speeds) for name, speeds in measured.items()]
        names = [speed.name for speed in kept[0] if all(speed.name in {other.name for other in others} for others in kept[1:])]
        if not names:
            action = "raise a target's budget, or select for one target at a time"
            raise PlanError(f"no candidate fits all of {', '.join(measured)}, though each has some that do", action)
        return names

    def _kept(self, target: str, speeds: Speeds) -> tuple[Speed, ...]:
        try:
            return fitting(speeds.found, self._budgets(target))[0]
        except PlanError as error:
            raise PlanError(f"{target}: {error.message}", error.action) from error

    def _budgets(self, target: str) -> list[Budget]:
        profile = next(profile for profile in self.profiles if profile.name == target)
        return [profile.budget, self.plan.budget]

    def _judged(
        self, candidate: Candidate, measured: dict[str, Speeds], curves: dict[str, Curve], parameters: dict[str, int]
    ) -> Judged:
        rows = tuple(self._on_target(candidate.name, target, speeds) for target, speeds in measured.items())
        curve = curves.get(candidate.name)
        return Judged(
            name=candidate.name,
            student=candidate.student,
            params=parameters.get(candidate.name),
            targets=rows,
            rungs=curve.points if curve else (),
        )

    def _on_target(self, name: str, target: str, speeds: Speeds) -> OnTarget:
        speed = next((speed for speed in speeds.found if speed.name == name), None)
        reasons = tuple(f"{recipe}: {_first_line(reason)}" for recipe, reason in speeds.reasons.get(name, {}).items())
        away = f"does not run ({reasons[-1] if reasons else 'it was not captured'})"
        missed = tuple(str(miss) for miss in misses(speed, self._budgets(target))) if speed else (away,)
        return OnTarget(target=target, recipe=speeds.recipes.get(name, ""), speed=speed, missed=missed, failures=reasons)


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0]
