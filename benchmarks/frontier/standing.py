"""What the frontier's record says: who fits which budget, how accurate it is there, and whether ours is ahead. Pure functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import mean, stdev

from outcome import Goal, Picked
from rivals import WAYS
from workroom import Training

from fofa_deploy.results import Environment
from fofa_deploy.types import Fraction, Frozen

OURS = "ours"
TEACHER = "teacher"


class Screened(Frozen):
    """A model after a rival's treatment, raced beside all others, by which rivals are chosen. No ``contender``: the teacher."""

    way: str
    contender: str | None
    p90_ms: float | None
    failure: str = ""


class Choice(Frozen):
    """Who stands for a way at a budget; None: nothing of it meets the budget."""

    target: str
    budget_ms: float
    way: str
    contender: str | None


class Entry(Frozen):
    """One artifact in a target's last race."""

    way: str
    contender: str
    seed: int
    recipe: str
    test: Fraction
    p90_ms: float


class Race(Frozen):
    """Everything that stands for something at one of a target's budgets, interleaved in one run."""

    target: str
    entries: tuple[Entry, ...]
    failed: dict[str, str]
    measured_at: str
    load_average: float | None


class Frontier(Frozen):
    """All that has been found out so far, beside what benchmarks/select has recorded."""

    seeds: tuple[int, ...]
    environment: Environment | None = None
    screened: tuple[Screened, ...] = ()
    picks: tuple[Picked, ...] = ()
    """As benchmarks/select has them, but that the teacher itself might be chosen."""
    choices: tuple[Choice, ...] = ()
    trainings: tuple[Training, ...] = ()
    races: tuple[Race, ...] = ()


class Standing(Frozen):
    """One way at one budget, over seeds."""

    way: str
    contender: str
    accuracies: tuple[Fraction, ...]
    p90_ms: tuple[float, ...]

    @property
    def mean(self) -> float:
        return mean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation; None for a single figure."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else None


class Place(Frozen):
    """One budget of one target, decided: every way that has something there, ours first."""

    target: str
    budget_ms: float
    standings: tuple[Standing, ...]

    def of(self, way: str) -> Standing | None:
        return next((one for one in self.standings if one.way == way), None)

    def ahead_of(self, way: str) -> bool:
        """Ours keeps its budget in the last race, and the rival has nothing there or is less accurate on average."""
        ours, rival = self.of(OURS), self.of(way)
        if ours is None or not mean(ours.p90_ms) <= self.budget_ms:
            return False
        return rival is None or ours.mean > rival.mean

    @property
    def ahead(self) -> bool:
        return all(self.ahead_of(way.name) for way in WAYS)


def choices(target: str, budget_ms: float, ours: str | None, screened: Sequence[Screened], macs: Mapping[str, int]) -> list[Choice]:
    """Ours as the selection chose it; of each rival the largest by multiplications that meets the budget after its treatment."""
    found = [Choice(target=target, budget_ms=budget_ms, way=OURS, contender=ours)]
    for way in WAYS:
        fitting = [row for row in screened if row.way == way.name and row.p90_ms is not None and row.p90_ms <= budget_ms]
        largest = max(fitting, key=lambda row: macs.get(row.contender or "", 0), default=None)
        found.append(Choice(target=target, budget_ms=budget_ms, way=way.name, contender=largest and (largest.contender or TEACHER)))
    return found


def places(found: Frontier) -> list[Place]:
    """Every budget of the targets that have been raced."""
    raced = {race.target: race for race in found.races}
    budgets = dict.fromkeys((choice.target, choice.budget_ms) for choice in found.choices if choice.target in raced)
    return [Place(target=t, budget_ms=b, standings=tuple(_standings(found.choices, raced[t], b))) for t, b in budgets]


def _standings(chosen: Sequence[Choice], race: Race, budget_ms: float) -> list[Standing]:
    standings = []
    for choice in chosen:
        if (choice.target, choice.budget_ms) != (race.target, budget_ms) or choice.contender is None:
            continue
        mine = [one for one in race.entries if (one.way, one.contender) == (choice.way, choice.contender)]
        if mine:
            accuracies, p90 = tuple(one.test for one in mine), tuple(one.p90_ms for one in mine)
            standings.append(Standing(way=choice.way, contender=choice.contender, accuracies=accuracies, p90_ms=p90))
    return standings


def goals(found: Frontier, wanted: int) -> list[Goal]:
    """Ahead at every one of the ``wanted`` budgets, of all rivals and of each."""
    decided = places(found)
    counts = {"every rival": sum(place.ahead for place in decided)}
    counts |= {way.title: sum(place.ahead_of(way.name) for place in decided) for way in WAYS}
    return [
        Goal(
            name=f"budgets at which ours is ahead of {name}",
            goal=f"{wanted} of {wanted}",
            measured=f"{count} of {wanted}" if decided else None,
            unit="",
            met=wanted > 0 and count == wanted,
        )
        for name, count in counts.items()
    ]
