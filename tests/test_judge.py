"""Verdicts: on the limit passes, beyond it fails, and what is unknown fails too."""

from math import inf, nan
from pathlib import Path

import pytest
from tiny import PREPROCESSING

from fofa_deploy.config import AccuracyPlan
from fofa_deploy.gate.rules import judge_own_accuracy
from fofa_deploy.gate.verdicts import Verdict
from fofa_deploy.judge import FLOAT_TOLERANCE, accuracy_problem, budget_problem, precision_problem
from fofa_deploy.results import Comparison, Latency, TargetRow
from fofa_deploy.types import Artifact, Budget, FileRecord, Layer, Precision, Recipe, Sidecar, Status, TensorSpec
from fofa_deploy.verify import Verification

BUDGET = AccuracyPlan(max_top1_drop=0.25, min_top1=0.5, min_agreement=0.75)
INT8, FP32 = Precision.INT8, Precision.FP32


def compared(**figures) -> Comparison:
    """Good in everything that is not given; past the types, so that NaN can be tried."""
    good = {"samples": 8, "finite": True, "top1": None, "agreement": 1.0, "cosine": 1.0, "relative_error": 0.0}
    return Comparison.model_construct(**{**good, **figures})


def judged(precision=INT8, golden=None, whole=None, expected=None) -> str:
    found = Verification.model_construct(golden=golden or compared(), whole=whole, expected_top1=expected)
    return accuracy_problem(precision, found, BUDGET)


@pytest.mark.parametrize(("top1", "good"), [(1.0, True), (0.75, True), (0.749, False), (0.0, False), (nan, False)])
def test_the_drop_from_pytorch(top1, good):
    assert (judged(whole=compared(top1=top1), expected=1.0) == "") is good


def test_a_drop_of_as_much_as_is_allowed_is_allowed_whatever_rounding_makes_of_it():
    allowed = BUDGET.model_copy(update={"max_top1_drop": 0.01, "min_top1": 0.0})
    for right in range(1, 101):
        found = Verification.model_construct(golden=compared(), whole=compared(top1=(right - 1) / 100), expected_top1=right / 100)
        assert accuracy_problem(INT8, found, allowed) == ""
        assert judge_own_accuracy("t", (right - 1) / 100, right / 100, allowed)[-1].verdict is Verdict.PASS
        found = found.model_copy(update={"whole": compared(top1=(right - 1) / 100 - 1e-4)})
        assert accuracy_problem(INT8, found, allowed)


@pytest.mark.parametrize(("top1", "good"), [(0.5, True), (0.499, False), (nan, False)])
def test_the_floor(top1, good):
    assert (judged(whole=compared(top1=top1), expected=0.5) == "") is good


def test_an_unknown_expectation_is_no_pass():
    assert "below PyTorch" in judged(whole=compared(top1=1.0), expected=nan)


@pytest.mark.parametrize(("agreement", "good"), [(1.0, True), (0.75, True), (0.749, False), (nan, False)])
def test_agreement_where_there_are_no_labels(agreement, good):
    assert (judged(whole=compared(agreement=agreement)) == "") is good
    assert (judged(golden=compared(agreement=agreement)) == "") is good


@pytest.mark.parametrize("precision", FLOAT_TOLERANCE)
def test_a_float_artifact_is_held_to_the_golden_outputs(precision):
    limit = FLOAT_TOLERANCE[precision]
    assert judged(precision, compared(relative_error=limit)) == ""
    for error in (limit * 1.01, nan, inf):
        assert judged(precision, compared(relative_error=error)).startswith("relative error")
    assert judged(precision, compared(relative_error=None)).startswith("relative error unknown")


def test_int8_is_judged_by_accuracy_alone():
    assert judged(INT8, compared(relative_error=0.5)) == ""


@pytest.mark.parametrize("which", ["golden", "whole"])
def test_nan_in_the_outputs_is_never_good(which):
    spoilt = {which: compared(finite=False, top1=1.0)}
    assert judged(**spoilt, expected=0.0) == "gives NaN or infinity"


# --- precision


def artifact(*layers: tuple[str, bool]) -> Artifact:
    sidecar = Sidecar(
        model="m",
        input=TensorSpec(name="i", shape=(None, 1, 4, 4)),
        output=TensorSpec(name="o", shape=(None, 3)),
        preprocessing=PREPROCESSING,
        class_names=("a", "b", "c"),
    )
    return Artifact(
        backend="b",
        recipe=Recipe(name="int8", precision=INT8, description="d"),
        graph_sha256="0",
        files=(FileRecord(path="m", sha256="0", size_bytes=1),),
        layers=tuple(Layer(name=str(n), operator="Conv", precision=p, weighted=w) for n, (p, w) in enumerate(layers)),
        versions={},
        sidecar=sidecar,
        folder=Path("/nowhere"),
    )


def test_most_layers_with_weights_must_run_as_asked():
    eight, full = ("int8", True), ("fp32", True)
    assert precision_problem(artifact(eight, eight, full)) == ""
    assert precision_problem(artifact(eight, full)) == "asked for int8, but the layers with weights run in 1 int8, 1 fp32"
    assert "run in 1 fp32" in precision_problem(artifact(full))


def test_layers_without_weights_do_not_count():
    assert precision_problem(artifact(("int8", True), *[("fp32", False)] * 9)) == ""
    assert precision_problem(artifact(("int8", False))) == "the runtime reports no layer with weights"
    assert precision_problem(artifact()) != ""


# --- budgets


def row(p90=None, size=None, memory=None) -> TargetRow:
    latency = Latency.model_construct(min=1.0, mean=1.0, p50=1.0, p90=p90)
    facts = {"target": "t", "runtime": "r", "profile": "p", "recipe": "c", "status": Status.VERIFIED, "reason": ""}
    return TargetRow.model_construct(**facts, latency_ms=latency, size_bytes=size, peak_rss_bytes=memory)


@pytest.mark.parametrize(
    ("figure", "limit", "words"),
    [("p90", "p90_ms", "p90 latency"), ("size", "size_bytes", "size"), ("memory", "peak_rss_bytes", "peak memory")],
)
def test_a_budget_is_kept_missed_or_unknown(figure, limit, words):
    budget = Budget(**{limit: 10})
    assert budget_problem(row(**{figure: 10}), budget) == ""
    assert budget_problem(row(**{figure: 11}), budget).startswith(words)
    assert budget_problem(row(**{figure: nan}), budget).startswith(words)
    assert budget_problem(row(), budget).startswith(f"{words} unknown")


def test_without_a_budget_nothing_is_missed():
    assert budget_problem(row(), Budget()) == ""


def test_a_row_that_was_not_measured_misses_its_latency():
    unmeasured = row().model_copy(update={"latency_ms": None})
    assert "unknown" in budget_problem(unmeasured, Budget(p90_ms=1))


@pytest.mark.parametrize(("found", "good"), [(10.0, True), (9.9, False), (nan, False), (None, False)])
def test_a_throughput_is_reached_or_missed(found, good):
    told = budget_problem(row().model_copy(update={"throughput_sps": found}), Budget(throughput_sps=10))
    assert (told == "") is good
    assert good or told.startswith("throughput")
