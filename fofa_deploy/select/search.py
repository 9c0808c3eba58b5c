"""The selection: candidates are captured, measured on every target, held to the budgets, trained for a while; one is chosen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from fofa_deploy.capture import capture, tool_versions
from fofa_deploy.config import AUTO, MeasurePlan, RunPlan, size_name
from fofa_deploy.data import preprocessing, write_split
from fofa_deploy.distill.job import Taught, Workshop, read_summary
from fofa_deploy.errors import PlanError, StageError, UnavailableError, UserError
from fofa_deploy.models import code_identity, parameter_count
from fofa_deploy.select.candidates import Candidate, expand, itself, listed
from fofa_deploy.select.choose import NobodyFitsError, Scored, Speed, choose, fitting, front, misses
from fofa_deploy.select.forecast import Curve, Forecast, Point, forecast
from fofa_deploy.select.record import Choice, Judged, OnTarget, Selection
from fofa_deploy.select.rungs import Halving
from fofa_deploy.select.speed import Speeds, Stopwatch
from fofa_deploy.select.table import LatencyTable
from fofa_deploy.store import Store
from fofa_deploy.tune import Evidence, Settings
from fofa_deploy.tune.workbench import Workbench
from fofa_deploy.types import Budget, Graph, HardwareProfile

ANEW = "remove selection/ in the run directory to choose anew"


def select_student(
    plan: RunPlan,
    profiles: Sequence[HardwareProfile],
    store: Store,
    workshop: Workshop,
    taught_by: Taught | None,
    decisive: Mapping[str, object],
) -> Selection:
    """Choose the student of a plan that leaves it open; its trainings are stages of ``store``.

    Args:
        decisive: inputs that all trainings share, by name.

    Raises:
        PlanError: nobody fits, or nobody can be measured; says who came nearest.
    """
    assert plan.distill, "the plan has been checked"
    halving = Halving(plan.select, plan.distill, workshop, taught_by, partial(store.run, resumable=True), decisive)
    return Selector(plan, profiles, store, halving, LatencyTable()).select()


@dataclass(frozen=True)
class Selector:
    """What `select_student` needs; ``store`` is the run's. Each candidate's artifacts have one of their own."""

    plan: RunPlan
    profiles: Sequence[HardwareProfile]
    store: Store
    halving: Halving
    table: LatencyTable

    def select(self) -> Selection:
        candidates = self.candidates()
        measured, notices, parameters, faults = self._measured(candidates)
        fits = self._fitting(measured)
        climbs = {target: self._climbed([one for one in candidates if one.name in names]) for target, names in fits.items()}
        curves = _longest(climbs.values())
        foretold = {name: forecast(curve, self._seen) for name, curve in curves.items()}
        named = {one.name: one for one in candidates}
        first, *others = [self._choice(target, measured, climbs[target], foretold, named) for target in fits]
        untrained = self.halving.faults
        judged = [self._judged(one, measured, curves, parameters, {**faults, **untrained}, foretold) for one in candidates]
        return Selection(
            **dict(first),
            others=tuple(others),
            candidates=tuple(_crowned(one, [first, *others]) for one in judged),
            made_at=datetime.now(UTC).isoformat(timespec="seconds"),
            notices=(
                *(f"{name} cannot be captured: {fault}" for name, fault in faults.items()),
                *(f"{name} cannot be trained: {fault}" for name, fault in untrained.items()),
                *self._flattered(candidates),
                *notices,
            ),
        )

    def _choice(
        self,
        target: str,
        measured: dict[str, Speeds],
        curves: dict[str, Curve],
        foretold: dict[str, Forecast],
        named: dict[str, Candidate],
    ) -> Choice:
        """The best of those that climbed for a target or are ready. Those that were dropped early are shown, and do not compete."""
        speeds = {speed.name: speed for speed in measured[target].found}
        longest = max(len(curve.points) for curve in curves.values())
        shown = {name: Scored(speed=speeds[name], top1=foretold[name].top1) for name in curves}
        competing = [shown[name] for name, curve in curves.items() if named[name].ready or len(curve.points) == longest]
        best = named[choose(competing).speed.name]
        order = tuple(one.speed.name for one in front(list(shown.values())))
        told = foretold[best.name]
        return Choice(student=best.student, name=best.name, ready=best.ready, foretold=told, target=target, front=order)

    def candidates(self) -> tuple[Candidate, ...]:
        """The plan's, and the teacher where it may be deployed as it is."""
        select, usual, taught_by = self.plan.select, self.plan.data.image_size, self.halving.taught_by
        found = expand(listed(select, self.profiles[0]), usual, select.image_sizes)
        # A checkpoint is loaded before channels are taken out: that of a pruned teacher fits no network that a plan can name.
        offered = select.teacher and select.fit == "all" and taught_by and not taught_by[0].prune
        ready = [itself(taught_by[0], usual)] if offered and taught_by else []
        return (*found, *(one for one in ready if one.name not in {other.name for other in found}))

    def _climbed(self, candidates: Sequence[Candidate]) -> dict[str, Curve]:
        """What a training showed of everybody, or what is known of the ready ones."""
        ready = {one.name: Curve(points=(self._reached(),)) for one in candidates if one.ready}
        return self.halving.climb([one for one in candidates if not one.ready], rival=bool(ready)) | ready

    def _flattered(self, candidates: Sequence[Candidate]) -> list[str]:
        """A notice where the teacher competes by images that it may have learned: it was not trained here."""
        if self.plan.teacher is None or self.plan.teacher.fit or not any(one.ready for one in candidates):
            return []
        told = "the teacher competes by its accuracy on validation images; where it was trained on them, that flatters it"
        return [f"{told}: select.teacher = false leaves it out"]

    def _reached(self) -> Point:
        assert self.halving.taught_by, "it is a candidate"
        return Point(seen=self._seen, top1=read_summary(self.halving.taught_by[1]).top1_validation or 0.0)

    @property
    def _seen(self) -> int:
        """Images of a whole training."""
        return self.halving.distill.epochs * len(self.halving.workshop.data.train)

    # --- measuring ------------------------------------------------------------------------------------------------

    def _measured(self, candidates: Sequence[Candidate]) -> tuple[dict[str, Speeds], list[str], dict[str, int], dict[str, str]]:
        """By target, those this machine or their device can run; which targets cannot; and everybody's parameters or fault."""
        notices: list[str] = []
        found: dict[str, Speeds] = {}
        parameters: dict[str, int] = {}
        faults: dict[str, str] = {}
        calibrations = {size: self._calibration(one) for size, one in {one.image_size: one for one in candidates}.items()}
        with ExitStack() as stack:
            benches: dict[str, Workbench] = {}
            for one in candidates:
                try:
                    store = stack.enter_context(Store(self.store.root / "candidates" / one.name / "speed"))
                    benches[one.name], parameters[one.name] = self._bench(one, store, calibrations[one.image_size])
                except (StageError, UserError, UnavailableError) as error:
                    faults[one.name] = error.message
            for profile in self.profiles:
                try:
                    stopwatch = Stopwatch(benches, profile, self.table)
                except (StageError, UserError, UnavailableError) as error:
                    if profile.device.host:  # the choice would be stored, as if the device did not count
                        raise
                    notices.append(f"{error.message}: {profile.name} has no say in the choice; {ANEW} once it can")
                else:
                    found[profile.name] = stopwatch.speeds(partial(self._fits, profile.name))
        if not found:
            action = "add a target that this machine or a device can run, or name the student"
            raise PlanError(f"student.model = {AUTO!r}, and no target can be measured: {'; '.join(notices)}", action)
        return found, notices, parameters, faults

    def _calibration(self, candidate: Candidate) -> Path:
        """The folder with ``images.npy``, for all candidates of one size."""
        workshop, count = self.halving.workshop, self.plan.verify.calibration
        stage = f"calibration/{size_name(candidate.image_size)}"

        def work(out: Path) -> None:
            write_split(workshop.seen_by(candidate.student).train.head(count), out / "images", workshop.progress, "calibration")

        return self.store.run(stage, {"data": workshop.data.digest, "count": count}, work) / "images"

    def _bench(self, candidate: Candidate, store: Store, calibration: Path) -> tuple[Workbench, int]:
        workshop, plan = self.halving.workshop, self.plan
        model = workshop.new(candidate.student)

        def work(out: Path) -> None:
            workshop.progress.say(f"capture {candidate.name}")
            data = workshop.seen_by(candidate.student)
            told = candidate.student.model, preprocessing(data.plan), data.class_names, data.validation
            capture(model, *told, out, plan.export.input)

        made_of = {"student": candidate.student, "code": code_identity(candidate.student), "versions": tool_versions()}
        given = {"seed": plan.seed, "data": workshop.data.digest, **plan.export.inputs()}
        folder = store.run("graph", {**made_of, **given}, work)
        measure = MeasurePlan(seconds=plan.select.seconds, max_seconds=4 * plan.select.seconds)
        settings = Settings(plan.accuracy, measure, plan.limits, plan.budget, plan.seed)
        evidence = Evidence(folder / "golden.npz")
        bench = Workbench(store, folder, evidence, calibration, settings, workshop.progress, Graph.load(folder))
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
        faults: dict[str, str],
        foretold: dict[str, Forecast],
    ) -> Judged:
        rows = tuple(self._on_target(candidate.name, target, speeds) for target, speeds in measured.items())
        curve = curves.get(candidate.name)
        return Judged(
            name=candidate.name,
            student=candidate.student,
            image_size=candidate.image_size,
            ready=candidate.ready,
            params=parameters.get(candidate.name),
            fault=_first_line(faults.get(candidate.name, "")),
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
