"""What contenders take once they are deployed: each tuned by itself, then all side by side in one run; and the budgets."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from workroom import Task, Workroom

from fofa_deploy import environment
from fofa_deploy.config import LimitsPlan
from fofa_deploy.errors import BackendError, FofaError
from fofa_deploy.measure import Candidate, measure
from fofa_deploy.profile import find_profile
from fofa_deploy.results import Measurement
from fofa_deploy.types import Fraction, Frozen

LIMITS = LimitsPlan(run_seconds=900, build_seconds=900)
SHARES = (0.25, 0.5, 0.75)
"""Of the contenders, that each budget lets in."""


class Deployed(Frozen):
    """What the tuner deploys of a student on a target."""

    task: Task | None
    """None: the teacher."""
    recipe: str
    top1: Fraction
    """On the test split, of the artifact."""
    artifact: Path
    golden: Path

    def candidate(self, target: str) -> Candidate:
        return Candidate(artifact=self.artifact, profile=find_profile(target), golden=self.golden)


class Timed(Frozen):
    """A contender's artifact beside all others."""

    contender: str
    recipe: str
    p50_ms: float
    p90_ms: float
    runs: int


class Times(Frozen):
    """One target's race, and the budgets that follow from it."""

    target: str
    rows: tuple[Timed, ...]
    failed: dict[str, str]
    """Contenders that cannot be deployed there, and why; they fit no budget."""
    budgets_ms: tuple[float, ...]
    measured_at: str
    load_average: float | None

    @property
    def p90_ms(self) -> dict[str, float]:
        return {row.contender: row.p90_ms for row in self.rows}


def deploy(room: Workroom, task: Task | None, target: str) -> Deployed:
    """Tune a trained student, or the teacher, for a target; what has been built and verified before is taken as it is.

    Raises:
        BackendError: the tuner has nothing to deploy.
    """
    with room.run(task) if task else room.teacher_run() as run:
        rows = run.tuner(timed=False).tune(find_profile(target))
        row = next((row for row in rows if row.chosen), None)
        if row is None or row.artifact is None or row.top1 is None:
            reasons = "; ".join(dict.fromkeys(f"{row.recipe}: {row.reason}" for row in rows))
            raise BackendError(f"{called(task)} has no verified artifact for {target}: {reasons}", "run fofa-deploy doctor")
        artifact, golden = run.store.root / row.artifact, run.graph / "golden.npz"
        return Deployed(task=task, recipe=row.recipe, top1=row.top1, artifact=artifact, golden=golden)


def race(entries: Sequence[Candidate], room: Workroom) -> list[Measurement]:
    """Everybody interleaved in one run.

    Raises:
        FofaError: one of them does not run.
    """
    found = measure(entries, room.scale.measure, LIMITS, 0, room.progress)
    for one in found:
        if isinstance(one, FofaError):
            raise one
    return [one for one in found if isinstance(one, Measurement)]


def p90(found: Measurement) -> float:
    """The median of a race too short for its p90 (``--quick``)."""
    return found.latency_ms.p90 or found.latency_ms.p50


def time_all(room: Workroom, tasks: Iterable[Task], target: str) -> Times:
    """Deploy and race the contenders of a target."""
    deployed, failed = deploy_all(room, tasks, target)
    load = environment.describe().load_average
    found = race([one.candidate(target) for one in deployed], room)
    rows = tuple(
        Timed(contender=called(one.task), recipe=one.recipe, p50_ms=m.latency_ms.p50, p90_ms=p90(m), runs=m.runs)
        for one, m in zip(deployed, found, strict=True)
    )
    return Times(
        target=target,
        rows=rows,
        failed=failed,
        budgets_ms=budgets([row.p90_ms for row in rows]),
        measured_at=now(),
        load_average=load,
    )


def called(task: Task | None) -> str:
    return task.contender if task else "teacher"


def deploy_all(room: Workroom, tasks: Iterable[Task | None], target: str) -> tuple[list[Deployed], dict[str, str]]:
    """What could be deployed, and why the other contenders could not."""
    deployed, failed = [], {}
    for task in tasks:
        try:
            deployed.append(deploy(room, task, target))
        except BackendError as error:
            failed[called(task)] = error.message
    return deployed, failed


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def budgets(p90_ms: Sequence[float]) -> tuple[float, ...]:
    """For each of `SHARES` the limit that lets in the fastest so many: half-way, in logarithms, to the next slower one.

    Half-way, so that a contender is inside or outside by as much as the field allows, and not by a hair.
    """
    ordered = sorted(p90_ms)
    places = [min(max(1, round(share * len(ordered))), len(ordered) - 1) for share in SHARES]
    return tuple(math.sqrt(ordered[place - 1] * ordered[place]) for place in dict.fromkeys(places))
