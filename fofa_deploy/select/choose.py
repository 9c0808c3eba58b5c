"""From what was measured and foretold to one student: who fits, who is on the front, who is taken.

Among the candidates that fit, the highest foretold accuracy wins; those within ``TIE`` of it count as equally good, and
of them the fastest (p50) is taken, then the smaller one, then the first by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from pydantic import Field, PositiveFloat, PositiveInt

from fofa_deploy.errors import PlanError
from fofa_deploy.types import Budget, Fraction, Frozen

TIE = 0.005
"""Of accuracy: less than a forecast can tell apart."""


class NobodyFitsError(PlanError):
    """Everybody was measured, and misses a budget."""


class Speed(Frozen):
    """A candidate on one target, in the recipe that counts. Missing figures miss every limit that is set on them."""

    name: str
    p50_ms: PositiveFloat
    p90_ms: PositiveFloat | None = None
    throughput_sps: PositiveFloat | None = None
    size_bytes: PositiveInt | None = None
    peak_rss_bytes: PositiveInt | None = None


class Scored(Frozen):
    """One that fits, and the accuracy foretold for the whole training."""

    speed: Speed
    top1: Fraction


class Miss(Frozen):
    """A limit that was missed, and by what factor: 1.5 is half as much again as allowed, or a third too little."""

    name: str
    figure: str
    value: float | None = Field(description="None where it is missing, or no number")
    limit: PositiveFloat
    most: bool = Field(description="the limit is an upper one")

    @property
    def factor(self) -> float:
        """Infinite where the figure is missing."""
        if self.value is None:
            return math.inf
        return self.value / self.limit if self.most else self.limit / self.value

    def __str__(self) -> str:
        if self.value is None:
            return f"{self.name}: {self.figure} unknown, the budget is {self.limit:.6g}"
        return f"{self.name}: {self.figure} {self.value:.6g}, the budget is {self.limit:.6g} ({self.factor:.3g}x)"


def misses(speed: Speed, budgets: Sequence[Budget]) -> tuple[Miss, ...]:
    """Every limit of every budget (the profile's and the plan's) that is not kept; NaN keeps none."""
    return tuple(miss for budget in budgets for miss in _missed(speed, budget))


def _missed(speed: Speed, budget: Budget) -> list[Miss]:
    most = [_miss(speed, name, budget, most=True) for name in ("p90_ms", "size_bytes", "peak_rss_bytes")]
    return [miss for miss in (*most, _miss(speed, "throughput_sps", budget, most=False)) if miss]


def _miss(speed: Speed, figure: str, budget: Budget, *, most: bool) -> Miss | None:
    value, limit = getattr(speed, figure), getattr(budget, figure)
    if limit is None:
        return None
    if figure == "p90_ms" and value is None and speed.p50_ms > limit:  # too slow for a p90 in the time given, and for the limit
        value, figure = speed.p50_ms, "p50_ms"
    known = value if value is not None and math.isfinite(value) else None
    found = Miss(name=speed.name, figure=figure, value=known, limit=limit, most=most)
    return None if found.factor <= 1 else found


def fitting(speeds: Sequence[Speed], budgets: Sequence[Budget]) -> tuple[tuple[Speed, ...], tuple[Miss, ...]]:
    """Who fits, and what the others missed.

    Raises:
        NobodyFitsError: names who came nearest and by how much.
        PlanError: there is nobody.
    """
    if not speeds:
        raise PlanError("no candidate could be measured", "see the reason beside each, and list others in select.candidates")
    found = {speed.name: misses(speed, budgets) for speed in speeds}
    kept = tuple(speed for speed in speeds if not found[speed.name])
    if not kept:
        nearest = min(found.values(), key=lambda missed: max(miss.factor for miss in missed))
        action = "raise the budget, list smaller candidates in select.candidates, or smaller images in select.image_sizes"
        raise NobodyFitsError(f"no candidate fits; the nearest is {'; '.join(map(str, nearest))}", action)
    return kept, tuple(miss for missed in found.values() for miss in missed)


def front(scored: Sequence[Scored]) -> tuple[Scored, ...]:
    """Those that no other one beats in accuracy and p50 latency, the fastest first."""
    kept: list[Scored] = []
    for one in sorted(scored, key=lambda s: (s.speed.p50_ms, -s.top1, s.speed.name)):
        if not kept or one.top1 > kept[-1].top1:
            kept.append(one)
    return tuple(kept)


def choose(scored: Sequence[Scored], tie: float = TIE) -> Scored:
    """The student, by the rule above."""
    best = max(one.top1 for one in scored)
    equal = [one for one in scored if one.top1 >= best - tie]
    return min(equal, key=lambda s: (s.speed.p50_ms, s.speed.size_bytes or math.inf, s.speed.name))
