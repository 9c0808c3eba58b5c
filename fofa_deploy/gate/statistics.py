"""What the gate's rules rest on: pure functions over arrays, the tests themselves from scipy.stats.

A launch is the unit: blocks inside one process share its memory layout and are no independent sample of it.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LOOKS = (0.035, 0.015)
"""Error allowed at the first look and at the second, after doubling: 5 % together, whichever look ends it."""

BOUND = 0.95
"""One-sided confidence that a passed artifact is not slower than allowed."""

TAIL_BOUND = 0.999
"""One-sided confidence of a percentile's bound; runs come in bursts, so this is nominal and the launches must agree, too."""

Times = NDArray[np.float64]
Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Shift:
    """How much slower than the other, over launches. ``ratio`` above 1 is slower; p-values are one-sided and exact."""

    ratio: float
    lower: float
    upper: float
    p_slower: float
    p_faster: float


def launch_log_ratio(baseline: Sequence[Sequence[int]], candidate: Sequence[Sequence[int]]) -> float:
    """One launch's statistic: the median over blocks of log(fastest run of the candidate / fastest of the baseline)."""
    fastest = [np.min(np.asarray(side, np.float64), axis=1) for side in (candidate, baseline)]
    return float(np.median(np.log(fastest[0] / fastest[1])))


def shift(logs: Sequence[float]) -> Shift:
    """Of one log ratio per launch: the pseudo-median, binomial bounds of the median, exact Wilcoxon signed-rank tests."""
    values = np.asarray(logs, np.float64)
    pairs = np.add.outer(values, values)[np.triu_indices(len(values))] / 2
    bounds = [stats.quantile_test(values, p=0.5, alternative=side).confidence_interval(BOUND) for side in ("greater", "less")]
    return Shift(
        ratio=math.exp(float(np.median(pairs))),
        lower=_exp(bounds[0].low),
        upper=_exp(bounds[1].high),
        p_slower=_wilcoxon(values, "greater"),
        p_faster=_wilcoxon(values, "less"),
    )


def _exp(value: float) -> float:
    return math.exp(value) if math.isfinite(value) else math.nan


def _wilcoxon(values: Times, alternative: str) -> float:
    if not np.any(values):
        return 1.0
    return float(stats.wilcoxon(values, alternative=alternative, method="exact").pvalue)


def mcnemar(lost: int, won: int) -> float:
    """Exact one-sided p-value that more images were lost than won, given how many changed; 1 when none did."""
    return float(stats.binomtest(lost, lost + won, 0.5, alternative="greater").pvalue) if lost + won else 1.0


def can_matter(changed: int) -> bool:
    """Whether that many changed images could reach significance at all; a test that cannot is not counted (Tarone)."""
    return 0.5**changed <= LOOKS[0]


def quantile_bounds(times: Times, quantile: float) -> tuple[float, float]:
    """Lower and upper binomial bound of a quantile; NaN where there are too few runs for it."""
    low = stats.quantile_test(times, p=quantile, alternative="greater").confidence_interval(TAIL_BOUND).low
    high = stats.quantile_test(times, p=quantile, alternative="less").confidence_interval(TAIL_BOUND).high
    return tuple(float(bound) if math.isfinite(bound) else math.nan for bound in (low, high))  # type: ignore[return-value]


def holm(p_values: Mapping[Key, float]) -> dict[Key, float]:
    """Holm's step-down adjustment: compare each with the error of the whole family."""
    adjusted, largest = {}, 0.0
    for rank, (key, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[key] = largest
    return adjusted


def launches_for(asked: int, family: int) -> int:
    """Launches with which the smallest possible Wilcoxon p-value, 2^-K, survives Holm's correction over the family."""
    return max(asked, math.ceil(math.log2(max(family, 1) / LOOKS[0])))


def mean_bounds(found: Times) -> tuple[float, float]:
    """95 % bounds of the mean of independent launches, each bound by itself; one launch bounds nothing."""
    if len(found) < 2:
        return -math.inf, math.inf
    half = float(stats.t.ppf(BOUND, len(found) - 1) * found.std(ddof=1) / math.sqrt(len(found)))
    return float(found.mean()) - half, float(found.mean()) + half
