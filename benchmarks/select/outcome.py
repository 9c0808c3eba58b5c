"""What the record says: who was chosen, at what cost, by measurement and by rules of thumb, against the truth. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from contenders import Scale
from scipy import stats
from stopwatch import Times
from workroom import Taught, Training

from fofa_deploy.results import Environment
from fofa_deploy.types import Frozen

REGRET, COST = 0.3, 0.25
"""Goals: points of accuracy lost to the best fitting contender, and share of what trying them all costs."""


class Picked(Frozen):
    """What the selection chose at a budget, and how many training images each contender saw until then."""

    target: str
    budget_ms: float
    contender: str | None
    """None: by what the selection measured, nobody fits."""
    images: dict[str, int]
    seconds: float
    """All of it, by the clock: making, measuring and training candidates."""


class Record(Frozen):
    """All that has been found out so far; ``results.json`` without what follows from it."""

    scale: Scale
    environment: Environment | None = None
    """Of the machine that did the last step."""
    teacher: Taught | None = None
    trainings: tuple[Training, ...] = ()
    times: tuple[Times, ...] = ()
    picks: tuple[Picked, ...] = ()

    def truth(self) -> dict[str, Training]:
        """Contender -> what came of the whole schedule of the default plan."""
        return {one.task.contender: one for one in self.trainings if one.task.method == "default" and one.task.seed == 0}

    @property
    def complete(self) -> bool:
        """Whether everything that the goals are about is there."""
        known = self.truth()
        return all(name in known for name in self.scale.contenders) and bool(self.times)

    def pick(self, target: str, budget_ms: float) -> Picked | None:
        return next((pick for pick in self.picks if (pick.target, pick.budget_ms) == (target, budget_ms)), None)


class Goal(Frozen):
    name: str
    goal: str
    measured: float | str | None
    unit: str
    met: bool


class Verdict(Frozen):
    """One budget of one target. Regrets are points of validation accuracy behind the best that fits; None: it does not fit."""

    target: str
    budget_ms: float
    fitting: tuple[str, ...]
    best: str
    chosen: str | None
    by_flops: str
    by_parameters: str
    regret: dict[str, float | None]
    test: dict[str, float]
    """Test accuracy of all that are named above."""
    cost: float | None
    """Of the selection, as a share of training all contenders by the whole schedule."""


def verdicts(record: Record) -> list[Verdict]:
    """One per budget that has been decided; empty while the truth is not known."""
    if not record.complete:
        return []
    return [
        _verdict(record, times, pick)
        for times in record.times
        for budget in times.budgets_ms
        if (pick := record.pick(times.target, budget))
    ]


def _verdict(record: Record, times: Times, pick: Picked) -> Verdict:
    truth = record.truth()
    fitting = {name: truth[name] for name, p90 in times.p90_ms.items() if p90 <= pick.budget_ms}
    best = max(fitting, key=lambda name: fitting[name].validation)
    rules = {"by_flops": largest(fitting, lambda one: one.macs), "by_parameters": largest(fitting, lambda one: one.parameters)}
    named = {"chosen": pick.contender, **rules}
    return Verdict(
        target=times.target,
        budget_ms=pick.budget_ms,
        fitting=tuple(sorted(fitting)),
        best=best,
        chosen=pick.contender,
        regret={way: regret(name, fitting) for way, name in named.items()},
        test={name: truth[name].test for name in sorted({best, *filter(None, named.values())})},
        cost=cost(pick.images, truth),
        **rules,
    )


def largest(fitting: Mapping[str, Training], measure: Callable[[Training], int]) -> str:
    """The rule of thumb that rivals choose by: as large as the budget allows."""
    return max(fitting, key=lambda name: measure(fitting[name]))


def regret(name: str | None, fitting: Mapping[str, Training]) -> float | None:
    """Points of validation accuracy behind the best that fits; None for a choice that does not fit."""
    if name not in fitting:
        return None
    return 100 * (max(one.validation for one in fitting.values()) - fitting[name].validation)


def cost(images: Mapping[str, int], truth: Mapping[str, Training]) -> float:
    """Images seen times measured seconds per image, as a share of the same sum over everybody's whole schedule."""
    spent = sum(count * truth[name].seconds_per_image for name, count in images.items())
    return spent / sum(one.seconds for one in truth.values())


def rank_correlations(record: Record) -> dict[str, dict[str, float]]:
    """Target -> Spearman's coefficient of multiplications and of parameters with the measured p90."""
    truth = record.truth()
    found: dict[str, dict[str, float]] = {}
    for times in record.times if record.complete else ():
        rows = [(p90, truth[name].macs, truth[name].parameters) for name, p90 in times.p90_ms.items()]
        latency, macs, parameters = zip(*rows, strict=True)
        found[times.target] = {"FLOPs": _spearman(macs, latency), "parameters": _spearman(parameters, latency)}
    return found


def _spearman(left: Sequence[float], right: Sequence[float]) -> float:
    return float(stats.spearmanr(left, right).statistic)


def goals(record: Record) -> list[Goal]:
    """What was aimed at; a goal that not all budgets have been decided for is not met."""
    found = verdicts(record)
    wanted = sum(len(times.budgets_ms) for times in record.times)
    whole = bool(found) and len(found) == wanted
    regrets = [_or_infinite(one.regret["chosen"]) for one in found]
    costs = [_or_infinite(one.cost) for one in found]
    return [
        _goal("largest regret over all budgets", REGRET, max(regrets, default=None), "points of accuracy", whole),
        _goal("largest cost of a selection / cost of training all", COST, max(costs, default=None), "", whole),
        *(_at_least_as_good(f"choosing by {name}", way, found, wanted) for name, way in RULES.items()),
    ]


RULES = {"FLOPs": "by_flops", "parameters": "by_parameters"}


def _or_infinite(value: float | None) -> float:
    return math.inf if value is None else value


def _goal(name: str, limit: float, measured: float | None, unit: str, whole: bool) -> Goal:
    finite = measured if measured is not None and math.isfinite(measured) else None
    shown = "a choice that does not fit" if measured == math.inf else finite
    met = whole and finite is not None and finite <= limit
    return Goal(name=name, goal=f"<= {limit:g}", measured=shown, unit=unit, met=met)


def _at_least_as_good(name: str, way: str, found: Sequence[Verdict], wanted: int) -> Goal:
    good = sum(_or_infinite(one.regret["chosen"]) <= _or_infinite(one.regret[way]) for one in found)
    return Goal(
        name=f"budgets with an accuracy not below that of {name}",
        goal=f"{wanted} of {wanted}",
        measured=f"{good} of {len(found)}",
        unit="",
        met=bool(found) and good == wanted,
    )
