"""Why an artifact is not good enough: precision, fidelity and accuracy, budgets. Empty text means that it is.

Every comparison is written so that a missing figure, or one that is not a number, misses its limit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fofa_deploy.config import AccuracyPlan, RunPlan
from fofa_deploy.errors import FofaError, StageError, UnavailableError
from fofa_deploy.profile import find_profile
from fofa_deploy.results import Comparison, RunReport, TargetRow
from fofa_deploy.types import Artifact, Budget, Precision, Status
from fofa_deploy.verify import Verification

FLOAT_TOLERANCE = {Precision.FP32: 1e-3, Precision.FP16: 5e-2, Precision.BF16: 2e-1}
"""Largest relative L2 error of a float artifact on the golden inputs; int8 is judged by accuracy alone."""

ROUNDING = 1e-9
"""Of shares of images: far less than one image is worth."""

ELSEWHERE = 2.0
"""How many times its error here an int8 artifact may have on another device, whose kernels round otherwise."""


def precision_problem(artifact: Artifact) -> str:
    """Why the runtime's layer table contradicts the recipe: most layers with weights must run in what was asked for."""
    weighted = [layer for layer in artifact.layers if layer.weighted]
    if not weighted:
        return "the runtime reports no layer with weights"
    kept = sum(layer.precision == artifact.recipe.precision for layer in weighted)
    if 2 * kept > len(weighted):
        return ""
    found = ", ".join(f"{count} {name}" for name, count in Counter(layer.precision for layer in weighted).most_common())
    return f"asked for {artifact.recipe.precision}, but the layers with weights run in {found}"


def accuracy_problem(precision: Precision, found: Verification, budget: AccuracyPlan) -> str:
    """Why an artifact misses the accuracy budget."""
    if not found.golden.finite or (found.whole and not found.whole.finite):
        return "gives NaN or infinity"
    limit, error = FLOAT_TOLERANCE.get(precision), found.golden.relative_error
    if limit is not None and not (error is not None and error <= limit):
        return f"{found.golden.told_error} on the golden inputs, {limit:g} is allowed for {precision}"
    if found.whole is None:
        return _agreement_problem(found.golden, budget)
    if found.whole.top1 is None or found.expected_top1 is None:
        return _agreement_problem(found.whole, budget)
    return _top1_problem(found.whole.top1, found.expected_top1, budget)


def elsewhere_problem(precision: Precision, there: Comparison, here: Comparison | None, budget: AccuracyPlan) -> str:
    """Why an artifact misbehaves on another device, where it sees the golden inputs alone.

    An int8 artifact that passed here need not be exact there, only as good: its few golden inputs are no accuracy test.
    """
    if precision in FLOAT_TOLERANCE or here is None or here.relative_error is None or not there.finite:
        return accuracy_problem(precision, Verification(golden=there), budget)
    limit = ELSEWHERE * here.relative_error + FLOAT_TOLERANCE[Precision.FP32]
    if not (there.relative_error is not None and there.relative_error <= limit):
        return f"{there.told_error} on the golden inputs there, {here.relative_error:.2g} here"
    return ""


def _agreement_problem(found: Comparison, budget: AccuracyPlan) -> str:
    if found.agreement >= budget.min_agreement - ROUNDING:
        return ""
    told = f"agrees with the model it came from on {found.agreement:.1%} of {found.samples} images"
    return f"{told}, {budget.min_agreement:.1%} is asked for"


def _top1_problem(top1: float, expected: float, budget: AccuracyPlan) -> str:
    if not top1 >= expected - budget.max_top1_drop - ROUNDING:
        return f"top-1 {top1:.2%} on validation, {expected - top1:.2%} below PyTorch; {budget.max_top1_drop:.2%} is allowed"
    if not top1 >= budget.min_top1 - ROUNDING:
        return f"top-1 {top1:.2%} on validation, below the floor of {budget.min_top1:.2%}"
    return ""


def size_problem(row: TargetRow, budget: Budget) -> str:
    """Why a built artifact is too large; all that can be known before it is timed."""
    return budget_problem(row, Budget(size_bytes=budget.size_bytes))


def budget_problem(row: TargetRow, budget: Budget) -> str:
    """Which limit a measured row misses; a figure that is not there misses it."""
    figures = (
        ("p90 latency", row.latency_ms.p90 if row.latency_ms else None, budget.p90_ms, "ms"),
        ("size", row.size_bytes, budget.size_bytes, "bytes"),
        ("peak memory", row.peak_rss_bytes, budget.peak_rss_bytes, "bytes"),
    )
    for name, value, limit, unit in figures:
        if limit is not None and not (value is not None and value <= limit):
            return f"{name} {'unknown' if value is None else format(value, '.6g')} {unit}, the budget is {limit:.6g}"
    return _throughput_problem(row.throughput_sps, budget.throughput_sps)


def _throughput_problem(value: float | None, least: float | None) -> str:
    if least is None or (value is not None and value >= least):
        return ""
    return f"throughput {'unknown' if value is None else format(value, '.6g')} images/s, at least {least:.6g} is asked for"


def failures(plan: RunPlan, report: RunReport) -> list[FofaError]:
    """Why a finished run is not a success: required targets without a chosen artifact, or no target with anything to show."""
    names = {name: find_profile(name).name for name in plan.targets}  # rows from devices that are no targets were kept, not tried
    required = [names[name] for name in plan.required]
    own = [row for row in report.targets if row.target in names.values()]
    rows = {target: [row for row in own if row.target == target] for target in names.values()}
    found = [_failure(name, rows[name]) for name in required if not any(row.chosen for row in rows[name])]
    if not any(row.status in (Status.VERIFIED, Status.BUILT_NOT_RUN) for row in own):
        found.append(_failure("every target", own))
    return found


def _failure(target: str, rows: Sequence[TargetRow]) -> FofaError:
    """Not available here, or tried and found wanting: the exit codes differ."""
    reasons = "; ".join(dict.fromkeys(f"{row.recipe} {row.status} ({row.reason})" for row in rows)) or "not tried"
    away = all(row.status in (Status.SKIPPED, Status.BUILT_NOT_RUN) for row in rows)
    kind: type[FofaError] = UnavailableError if away else StageError
    return kind(f"no verified artifact for {target}: {reasons}", "see the report for every recipe that was tried")
