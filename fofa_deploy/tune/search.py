"""Many recipes: which are worth building, in what order, and when to stop.

Recipes of one family run the same kernels, so one of them tells the latency of all. One recipe of every family is built and
timed in a short race; then the families are tried fastest first, each from its cheapest recipe to its most thorough one,
until one is inside the budget. What is clearly slower than that is not tried: no result of it could be chosen. Families that
are slower than another by construction wait until that one has lost too much accuracy. Of recipes that differ in the float of
their other layers, those whose float is the faster one here are tried: that is raced first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from fofa_deploy import environment
from fofa_deploy.errors import StageError, UnavailableError, UserError
from fofa_deploy.judge import size_problem
from fofa_deploy.results import TargetRow
from fofa_deploy.tune.rows import row_of
from fofa_deploy.tune.workbench import Workbench
from fofa_deploy.types import Artifact, Budget, HardwareProfile, Precision, Probe, Recipe, Status

SLACK = 1.15
"""A family up to this factor slower in the short race is tried, too: the long race may see it otherwise."""

WORTH = 1.05
"""A shorter float has to be faster than fp32 by this factor: it rounds more."""

SPEEDS = "speeds.json"

MANY = 3
"""Families from which on a short race costs less than trying them all."""

Race = Callable[[Sequence[Artifact]], list[float | None]]
"""Least milliseconds of artifacts timed side by side; None for one that does not run."""


class Search:
    """The recipes of one target.

    Args:
        race: None where nothing is to be timed; then every family is tried.
    """

    def __init__(self, bench: Workbench, profile: HardwareProfile, probe: Probe, race: Race | None) -> None:
        self._bench, self._profile, self._probe = bench, profile, probe
        self._race = race if probe.can_run and bench.settings.build else None

    def rows(self, recipes: Sequence[Recipe]) -> list[TargetRow]:
        """One per recipe that was tried, and one per family that was not worth it."""
        if not self._bench.settings.build or len(recipes) == 1:
            return [row for family in _families(recipes).values() for row in self._tried(family)]
        families = _families(self._with_fastest_rest(recipes))
        first = {kin: family for kin, family in families.items() if family[0].after not in families}
        speeds = self._speeds(self._race, first, "kinds of recipe") if self._race and len(first) >= MANY else {}
        rows = list(self._walked(first, speeds))
        for kin in first:
            rows += self._followers(kin, families, rows)
        return rows

    def _with_fastest_rest(self, recipes: Sequence[Recipe]) -> list[Recipe]:
        """Where no race can tell, the float that the back end names first."""
        rests = list(dict.fromkeys(recipe.rest for recipe in recipes if recipe.rest))
        if len(rests) > 1 and self._race:
            floats = _families([recipe for recipe in recipes if recipe.precision in rests])
            speeds = self._speeds(self._race, floats, "floats")
            ms = {family[0].precision: speeds.get(kin, math.inf) for kin, family in floats.items()}
            rests.sort(key=lambda rest: ms.get(rest, math.inf) * (1.0 if rest is Precision.FP32 else WORTH))
        return [recipe for recipe in recipes if recipe.rest in (None, *rests[:1])]

    def _walked(self, families: dict[str, list[Recipe]], speeds: dict[str, float]) -> Iterator[TargetRow]:
        """Fastest first, as far as speeds are known; what is clearly slower than what has passed is left out."""
        best: tuple[float, str] | None = None
        for kin in sorted(families, key=lambda name: speeds.get(name, float("inf"))):
            family, speed = families[kin], speeds.get(kin)
            if best and speed and speed > SLACK * best[0] and not _always(family) and not self._limits_memory:
                yield row_of(self._profile, family[0], Status.SKIPPED, _too_slow(speed, *best))
                continue
            rows = self._tried(family)
            passed = next((row.recipe for row in rows if self._passes(row)), None)
            if passed and speed and (best is None or speed < best[0]):
                best = speed, passed
            yield from rows

    def _followers(self, kin: str, families: dict[str, list[Recipe]], rows: Sequence[TargetRow]) -> list[TargetRow]:
        """The families that come after one whose every recipe lost too much accuracy, up to the first that does not."""
        names = {recipe.name for recipe in families[kin]}
        tried = [row for row in rows if row.recipe in names]
        if any(map(self._passes, tried)) or not any(row.status is Status.REJECTED for row in tried):
            return []
        found: list[TargetRow] = []
        for family in families.values():
            if family[0].after == kin:
                found += self._tried(family)
                if self._passes(found[-1]):
                    break
        return found

    def _speeds(self, race: Race, families: dict[str, list[Recipe]], who: str) -> dict[str, float]:
        """Least milliseconds by family, where it ran. Kept, as an aid for choosing and for nothing else: a run that is
        resumed takes the way that it has begun."""
        bench = self._bench
        built = {kin: artifact for kin, family in families.items() if (artifact := self._first_built(family))}
        inputs = {
            "artifacts": {kin: [artifact.sha256, artifact.recipe.options] for kin, artifact in built.items()},
            "profile": self._profile,
            "lines": bench.settings.lines(self._profile)[0],
            "figure": "least milliseconds",
            "machine": environment.describe().fingerprint,
        }

        def work(out: Path) -> None:
            bench.progress.say(f"{self._profile.name}: a short race of {len(built)} {who}")
            (out / SPEEDS).write_text(json.dumps(dict(zip(built, race(list(built.values())), strict=True)), indent=1))

        stage = f"search/{bench.name}/{who.split()[0]}/{self._profile.name}"
        found = json.loads((bench.store.run(stage, inputs, work) / SPEEDS).read_bytes())
        return {kin: speed for kin, speed in found.items() if speed is not None}

    def _first_built(self, family: Sequence[Recipe]) -> Artifact | None:
        """A family whose every recipe fails has no speed; trying it tells why."""
        for recipe in family:
            try:
                return self._bench.build(self._profile, recipe, self._probe)
            except (StageError, UserError, UnavailableError):
                continue
        return None

    def _tried(self, family: Sequence[Recipe]) -> list[TargetRow]:
        """Rows up to the first one that is inside the accuracy and size budgets."""
        if not self._bench.settings.build:
            family = [recipe for recipe in family if self._bench.is_built(self._profile, recipe)]
            return [self._bench.attempt(self._profile, recipe, self._probe) for recipe in family]
        rows: list[TargetRow] = []
        for recipe in family:
            rows.append(self._bench.attempt(self._profile, recipe, self._probe))
            if rows[-1].status is Status.BUILT_NOT_RUN or self._calibration_missing(recipe):
                break
            if self._passes(rows[-1]):
                break
        return rows

    def _passes(self, row: TargetRow) -> bool:
        return row.status is Status.VERIFIED and not self._too_large(row)

    def _calibration_missing(self, recipe: Recipe) -> bool:
        return recipe.needs_calibration and self._bench.calibration is None

    def _too_large(self, row: TargetRow) -> bool:
        return any(size_problem(row, budget) for budget in self._budgets)

    @property
    def _limits_memory(self) -> bool:
        """What the race has yet to tell of the fastest: whether it is inside the budget cannot be known before."""
        return any(budget.peak_rss_bytes is not None for budget in self._budgets)

    @property
    def _budgets(self) -> tuple[Budget, Budget]:
        return self._profile.budget, self._bench.settings.budget


def _families(recipes: Sequence[Recipe]) -> dict[str, list[Recipe]]:
    found: dict[str, list[Recipe]] = {}
    for recipe in recipes:
        found.setdefault(recipe.kin, []).append(recipe)
    return found


def _always(family: Sequence[Recipe]) -> bool:
    """The float form is what int8 is compared with, and what is left when nothing else is good enough."""
    return any(recipe.precision is Precision.FP32 for recipe in family)


def _too_slow(speed: float, best: float, name: str) -> str:
    return f"not tried further: {speed / best:.2f}x the time of {name} in a short race, and that is inside the budget"
