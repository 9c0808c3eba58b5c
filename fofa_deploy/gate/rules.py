"""The rules: evidence in, findings out. Every limit is written so that a missing figure, or NaN, misses it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from fofa_deploy.config import AccuracyPlan, GatePlan
from fofa_deploy.gate import statistics
from fofa_deploy.gate.launches import BASELINE, CANDIDATE, TWIN, Launch
from fofa_deploy.gate.statistics import Shift, Times
from fofa_deploy.gate.verdicts import Finding, Verdict
from fofa_deploy.judge import ROUNDING

TAILS = (0.9, 0.99)
ADVICE = (
    "too noisy to judge; stop other work on the machine, set the CPU governor to performance, "
    "give the profile fewer threads than there are cores, or judge on a runner of its own"
)


# --- accuracy -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """Right or wrong per image, bool (N,), for both sides on the same images."""

    baseline: NDArray[np.bool_]
    candidate: NDArray[np.bool_]

    @property
    def lost(self) -> int:
        return int((self.baseline & ~self.candidate).sum())

    @property
    def won(self) -> int:
        return int((~self.baseline & self.candidate).sum())

    @property
    def p_worse(self) -> float:
        return statistics.mcnemar(self.lost, self.won)

    @property
    def p_better(self) -> float:
        return statistics.mcnemar(self.won, self.lost)

    @property
    def testable(self) -> bool:
        """Whether enough images changed for the test to count in the family."""
        return statistics.can_matter(self.lost + self.won)


def judge_accuracy(target: str, name: str, pair: Paired, p_worse: float, p_better: float, margin: float) -> Finding:
    """Worse when significantly more images were lost than won, and by more than the margin; better when mirrored.

    Args:
        name: of the metric, such as ``top-1``.
        p_worse, p_better: adjusted for the family.
    """
    before, after = float(pair.baseline.mean()), float(pair.candidate.mean())
    change = after - before
    counts = f"{pair.lost} of {len(pair.baseline):,} images lost, {pair.won} won"
    if p_worse < statistics.LOOKS[0] and change < -margin:
        verdict, reason = Verdict.FAIL, f"{-100 * change:.2f} points lower: {counts}"
    elif p_better < statistics.LOOKS[0] and change > margin:
        verdict, reason = Verdict.IMPROVED, f"{100 * change:.2f} points higher: {counts}"
    else:
        verdict, reason = Verdict.PASS, counts
    return Finding(
        target=target,
        metric=name,
        verdict=verdict,
        reason=reason,
        unit="fraction",
        baseline=before,
        candidate=after,
        p_value=p_worse,
    )


def judge_own_accuracy(target: str, right: float, pytorch: float | None, budget: AccuracyPlan) -> list[Finding]:
    """The plan's own limits: with labels the floor and the largest drop against PyTorch, else the agreement with it."""
    if pytorch is None:
        return [at_least(target, "agreement with PyTorch", right, budget.min_agreement)]
    lowest = pytorch - budget.max_top1_drop
    drop = at_least(target, "top-1 against PyTorch", right, max(0.0, lowest)).model_copy(update={"baseline": pytorch})
    return [*([at_least(target, "top-1 floor", right, budget.min_top1)] if budget.min_top1 else []), drop]


def at_least(target: str, metric: str, value: float | None, limit: float) -> Finding:
    kept = value is not None and value >= limit - ROUNDING
    told = "missing" if value is None else f"{value:.2%}"
    verdict = Verdict.PASS if kept else Verdict.FAIL
    reason = f"{told}, at least {limit:.2%} is asked for"
    return Finding(target=target, metric=metric, verdict=verdict, reason=reason, unit="fraction", candidate=value, limit=limit)


# --- sizes --------------------------------------------------------------------------------------------------------


def at_most(target: str, metric: str, value: float | None, limit: float, unit: str) -> Finding:
    kept = value is not None and value <= limit
    told = "missing" if value is None else f"{value:.6g} {unit}"
    verdict = Verdict.PASS if kept else Verdict.FAIL
    reason = f"{told}, the budget is {limit:.6g}"
    return Finding(target=target, metric=metric, verdict=verdict, reason=reason, unit=unit, candidate=value, limit=limit)


def judge_growth(target: str, metric: str, before: float | None, after: float | None, allowed: float) -> Finding:
    """Worse when it grew by more than the allowed share, better when it shrank by as much."""
    side = "candidate's" if after is None else "baseline's"
    missing = f"the {side} {metric} is missing: measure it, or lift the limit"
    found = Finding(
        target=target, metric=metric, verdict=Verdict.FAIL, reason=missing, unit="bytes", baseline=before, candidate=after,
        limit=1 + allowed,
    )  # fmt: skip
    if before is None or after is None or not before > 0:
        return found
    ratio = after / before
    small = Verdict.IMPROVED if ratio < 1 / (1 + allowed) else Verdict.PASS
    reason = f"{ratio:.3f}x, at most {1 + allowed:.3g}x is allowed"
    return found.model_copy(update={"verdict": small if ratio <= 1 + allowed else Verdict.FAIL, "reason": reason, "ratio": ratio})


# --- latency ------------------------------------------------------------------------------------------------------


@dataclass
class Series:
    """The launches of one target so far."""

    launches: list[Launch] = field(default_factory=list)

    def logs(self, baseline: str, candidate: str) -> list[float]:
        """One log ratio per launch."""
        return [statistics.launch_log_ratio(*_same_blocks(found, baseline, candidate)) for found in self.launches]

    def times(self, rival: str) -> list[Times]:
        """Milliseconds of a rival's runs, per launch; a block's first run does not count, it follows another model's."""
        return [np.concatenate([block[1:] for block in found.blocks[rival]]) / 1e6 for found in self.launches]

    def pooled(self, rival: str) -> Times:
        return np.concatenate(self.times(rival))

    def peak_rss_bytes(self, *rivals: str) -> float | None:
        """The median over the launches in which one of the rivals was loaded first."""
        peaks = [found.peak_rss_bytes for found in self.launches if found.first in rivals]
        return float(np.median(peaks)) if peaks else None


def _same_blocks(found: Launch, *names: str) -> list[Sequence[Sequence[int]]]:
    """The blocks that all of these took part in; the twin is in every second one."""
    step = 2 if TWIN in names else 1
    return [found.blocks[name][:: 1 if name == TWIN else step] for name in names]


@dataclass(frozen=True)
class Noise:
    """The self-check: what the candidate's twin, the same artifact, seems to differ by."""

    offset: float
    spread: float
    too_much: bool

    @classmethod
    def of(cls, series: Series, margin: float) -> Noise:
        logs = series.logs(TWIN, CANDIDATE)
        offset = math.log(statistics.shift(logs).ratio)
        return cls(offset, float(np.max(np.abs(logs))), not abs(offset) <= math.log1p(margin))

    def finding(self, target: str, margin: float) -> Finding:
        told = f"the candidate differs from itself by {abs(math.expm1(self.offset)):.1%}"
        verdict, reason = (Verdict.INCONCLUSIVE, f"{told}: {ADVICE}") if self.too_much else (Verdict.PASS, told)
        return Finding(
            target=target, metric="self-check", verdict=verdict, reason=reason, ratio=math.exp(self.offset), limit=1 + margin
        )


def judge_latency(
    target: str, found: Shift, noise: Noise, p_slower: float, p_faster: float, error: float, plan: GatePlan
) -> Finding:
    """The rule of the gate; p-values are adjusted for the family, ``error`` is what this look may spend.

    Slower or faster must be significant and beyond the margin; where the self-check missed, beyond its worst launch, too.
    """
    needed = math.log1p(plan.margin) + (noise.spread if noise.too_much else 0.0)
    size = math.log(found.ratio)
    told = f"{found.ratio:.3f}x (95 % bounds {found.lower:.3f} and {found.upper:.3f})"
    if p_slower < error and size > needed:
        verdict, reason = Verdict.FAIL, f"slower: {told}"
    elif p_faster < error and size < -needed:
        verdict, reason = Verdict.IMPROVED, f"faster: {told}"
    elif not noise.too_much and found.upper < 1 + plan.max_slowdown:
        verdict, reason = Verdict.PASS, f"not slower: {told}"
    else:
        why = ADVICE if noise.too_much else f"neither significant nor below {1 + plan.max_slowdown:.2f}x; {ADVICE}"
        verdict, reason = Verdict.INCONCLUSIVE, f"{told}: {why}"
    bounds = {"lower": _finite(found.lower), "upper": _finite(found.upper)}
    return Finding(
        target=target,
        metric="latency",
        verdict=verdict,
        reason=reason,
        unit="ms",
        ratio=found.ratio,
        limit=1 + plan.margin,
        p_value=p_slower,
        **bounds,
    )


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def judge_tail(target: str, series: Series, quantile: float, margin: float) -> Finding | None:
    """Worse when binomial bounds lie apart by more than the margin and the launches agree; None with too few runs.

    Held against the twin, too: where that "is worse" than itself, the machine made the tail; where the twin, which runs half as
    often, has too few runs to tell, nobody knows what did.
    """
    apart = _apart(series, BASELINE, CANDIDATE, quantile, margin)
    if apart is None:
        return None
    base, own = (float(np.quantile(series.pooled(rival), quantile)) for rival in (BASELINE, CANDIDATE))
    verdict = apart
    reason = f"{base:.3f} -> {own:.3f} ms"
    twin = _apart(series, TWIN, CANDIDATE, quantile, margin)
    if apart is Verdict.FAIL and twin in (None, Verdict.FAIL):
        told = "as the candidate against itself" if twin else "and too few runs of the candidate against itself to be sure"
        verdict, reason = Verdict.INCONCLUSIVE, f"{reason}, {told}: {ADVICE}"
    name = f"p{round(100 * quantile)}"
    return Finding(
        target=target, metric=name, verdict=verdict, reason=reason, unit="ms", baseline=base, candidate=own, ratio=own / base,
        limit=1 + margin,
    )  # fmt: skip


def _apart(series: Series, baseline: str, candidate: str, quantile: float, margin: float) -> Verdict | None:
    base = statistics.quantile_bounds(series.pooled(baseline), quantile)
    own = statistics.quantile_bounds(series.pooled(candidate), quantile)
    if not (math.isfinite(base[1]) and math.isfinite(own[1])):
        return None
    sides = zip(series.times(baseline), series.times(candidate), strict=True)
    agreed = statistics.shift([float(np.log(np.quantile(c, quantile) / np.quantile(b, quantile))) for b, c in sides])
    if own[0] > base[1] * (1 + margin) and agreed.p_slower < sum(statistics.LOOKS):
        return Verdict.FAIL
    faster = own[1] * (1 + margin) < base[0] and agreed.p_faster < sum(statistics.LOOKS)
    return Verdict.IMPROVED if faster else Verdict.PASS


def judge_p90_budget(target: str, series: Series, limit: float) -> Finding:
    """Kept when the upper binomial bound of p90 is, missed when the lower one is not."""
    times = series.pooled(CANDIDATE)
    lower, upper = statistics.quantile_bounds(times, 0.9)
    told = f"p90 between {lower:.3f} and {upper:.3f} ms, the budget is {limit:.6g}"
    open_or_kept = Verdict.PASS if upper <= limit else Verdict.INCONCLUSIVE
    verdict = open_or_kept if lower <= limit else Verdict.FAIL
    return Finding(
        target=target, metric="p90 budget", verdict=verdict, reason=told, unit="ms", candidate=float(np.quantile(times, 0.9)),
        lower=_finite(lower), upper=_finite(upper), limit=limit,
    )  # fmt: skip


def judge_throughput_budget(target: str, series: Series, batch: int, limit: float) -> Finding:
    """Reached when the lower bound over the launches (95 %, Student's t) is, missed when the upper one is not; images/s."""
    found = np.array([1e3 * batch / float(times.mean()) for times in series.times(CANDIDATE)])
    lower, upper = statistics.mean_bounds(found)
    told = f"between {lower:.6g} and {upper:.6g} images/s, at least {limit:.6g} is asked for"
    open_or_kept = Verdict.PASS if lower >= limit else Verdict.INCONCLUSIVE
    verdict = open_or_kept if upper >= limit else Verdict.FAIL
    return Finding(
        target=target, metric="throughput budget", verdict=verdict, reason=told, unit="images/s", candidate=float(found.mean()),
        lower=_finite(lower), upper=_finite(upper), limit=limit,
    )  # fmt: skip
