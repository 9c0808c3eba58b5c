"""The steps of the frontier, each recorded as soon as it is done; they begin where benchmarks/select ends."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import click
import figure
from choosing import choose
from outcome import Record
from rivals import WAYS, NotBuiltError, Treated, Way, tested, treat
from standing import OURS, TEACHER, Choice, Entry, Frontier, Race, Screened, choices
from stopwatch import Deployed, deploy_all, now, p90, race
from workroom import Task, Workroom

from fofa_deploy import environment
from fofa_deploy.errors import FofaError

SEEDS, QUICK_SEEDS = (0, 1, 2), (0,)


class Ledger:
    """The frontier's record, written to its folder after every step."""

    def __init__(self, folder: Path, seeds: tuple[int, ...], selected: Record) -> None:
        self._folder, self.selected = folder, selected
        path = folder / "results.json"
        fresh = Frontier(seeds=seeds)
        self.found = Frontier.model_validate(json.loads(path.read_bytes())["record"]) if path.is_file() else fresh
        if self.found.seeds != seeds:
            raise click.ClickException(f"{path} was recorded with other seeds: move it away to start anew")

    def note(self, **changes: object) -> None:
        self.found = self.found.model_copy(update={"environment": environment.describe(), **changes})
        self.write()

    def write(self) -> None:
        figure.write(self.found, self.selected, self._folder)


def screen(room: Workroom, ledger: Ledger) -> None:
    """Time every contender after every rival's treatment, with the weights that are there, and choose who stands for whom.

    Ours is what the selection takes when the teacher itself is among the candidates, as it is by default.
    """
    check_selected(ledger.selected)
    if not ledger.found.screened:
        ledger.note(screened=tuple(_screened(room)))
    known = {(pick.target, pick.budget_ms) for pick in ledger.found.picks}
    for pick in ledger.selected.picks:
        if (pick.target, pick.budget_ms) not in known:
            ledger.note(picks=(*ledger.found.picks, choose(room, pick.target, pick.budget_ms, itself=True)))
    macs = {name: one.macs for name, one in ledger.selected.truth().items()}
    found = [
        choice
        for pick in ledger.found.picks
        for choice in choices(pick.target, pick.budget_ms, pick.contender, ledger.found.screened, macs)
    ]
    ledger.note(choices=tuple(found))


def check_selected(selected: Record) -> None:
    wanted = [(times.target, budget) for times in selected.times for budget in times.budgets_ms]
    if not wanted or any(selected.pick(*one) is None for one in wanted):
        raise click.ClickException("the selections are not complete; run with --phase select first")


def _screened(room: Workroom) -> Iterable[Screened]:
    """Latency does not depend on weights, so one set of them tells it for every way of training."""
    there: list[Treated] = []
    for way in WAYS:
        for task in _tasks_of(way, room):
            try:
                there.append(treat(room, way, task))
            except NotBuiltError as error:
                yield Screened(way=way.name, contender=task and task.contender, p90_ms=None, failure=str(error)[:300])
    for one, found in zip(there, race([one.candidate for one in there], room), strict=True):
        yield Screened(way=one.way.name, contender=one.task and one.task.contender, p90_ms=p90(found))


def _tasks_of(way: Way, room: Workroom) -> list[Task | None]:
    if way.method is None:
        return [None]
    return [Task(contender=name, method="default") for name in room.scale.contenders]


def train(room: Workroom, ledger: Ledger, jobs: int) -> None:
    """Every seed of everybody who stands for something, as far as neither benchmark has recorded it."""
    known = {one.task for one in (*ledger.selected.trainings, *ledger.found.trainings)}
    for done in room.train_all([task for task in wanted(ledger.found) if task not in known], jobs):
        ledger.note(trainings=(*ledger.found.trainings, done))


def wanted(found: Frontier) -> list[Task]:
    """All students that the last races need, seeds outermost: what is there is comparable at any time."""
    methods = {OURS: "default", **{way.name: way.method for way in WAYS if way.method}}
    chosen = dict.fromkeys((methods[one.way], one.contender) for one in found.choices if one.contender and one.way in methods)
    return [Task(contender=name, method=method, seed=seed) for seed in found.seeds for method, name in chosen if name != TEACHER]


def measure(room: Workroom, ledger: Ledger) -> None:
    """The last race of every target that has none."""
    known = {one.task for one in (*ledger.selected.trainings, *ledger.found.trainings)}
    if untrained := [task.name for task in wanted(ledger.found) if task not in known]:
        raise click.ClickException(f"not trained yet: {', '.join(untrained)}; run with --phase train first")
    done = {one.target for one in ledger.found.races}
    for target in dict.fromkeys(choice.target for choice in ledger.found.choices):
        if target not in done:
            ledger.note(races=(*ledger.found.races, last_race(room, ledger.found, target)))


def last_race(room: Workroom, found: Frontier, target: str) -> Race:
    """Ours and the rivals of all budgets of a target, side by side."""
    chosen = [one for one in found.choices if one.target == target and one.contender]
    ours, failed = deploy_all(room, _seeded(chosen, OURS, "default", found.seeds), target)
    rivals: list[Treated] = []
    for way in WAYS:
        for task in _seeded(chosen, way.name, way.method, found.seeds):
            try:
                rivals.append(treat(room, way, task))
            except NotBuiltError as error:
                failed[f"{way.name}: {task.name if task else TEACHER}"] = str(error)[:300]
    load = environment.describe().load_average
    times = race([*(one.candidate(target) for one in ours), *(one.candidate for one in rivals)], room)
    entries = [_our_entry(one, p90(took)) for one, took in zip(ours, times, strict=False)]
    for rival, took in zip(rivals, times[len(ours) :], strict=True):
        try:
            entries.append(_rival_entry(rival, p90(took)))
        except FofaError as error:
            failed[f"{rival.way.name}: {rival.artifact.parent.name}"] = error.message
    return Race(target=target, entries=tuple(entries), failed=failed, measured_at=now(), load_average=load)


def _seeded(chosen: Iterable[Choice], way: str, method: str | None, seeds: tuple[int, ...]) -> list[Task | None]:
    names = dict.fromkeys(one.contender for one in chosen if one.way == way and one.contender)
    trained = [Task(contender=name, method=method, seed=seed) for name in names if method and name != TEACHER for seed in seeds]
    return [*trained, None] if TEACHER in names else trained


def _our_entry(one: Deployed, p90_ms: float) -> Entry:
    contender, seed = _whose(one.task)
    return Entry(way=OURS, contender=contender, seed=seed, recipe=one.recipe, test=one.top1, p90_ms=p90_ms)


def _rival_entry(one: Treated, p90_ms: float) -> Entry:
    contender, seed = _whose(one.task)
    return Entry(way=one.way.name, contender=contender, seed=seed, recipe=one.way.peer, test=tested(one), p90_ms=p90_ms)


def _whose(task: Task | None) -> tuple[str, int]:
    return (task.contender, task.seed) if task else (TEACHER, 0)
