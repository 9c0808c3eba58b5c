"""Evidence in, findings out: every verdict, and every way in which a figure can be missing."""

import numpy as np
import pytest

from fofa_deploy.config import AccuracyPlan, GatePlan
from fofa_deploy.gate import rules, statistics
from fofa_deploy.gate.launches import BASELINE, CANDIDATE, TWIN, Launch
from fofa_deploy.gate.rules import Noise, Paired, Series
from fofa_deploy.gate.verdicts import Finding, Verdict, overall

PLAN = GatePlan()
QUIET, NOISY = Noise(0.001, 0.004, False), Noise(0.04, 0.08, True)


def latency(logs, noise=QUIET):
    found = statistics.shift(logs)
    return rules.judge_latency("cpu", found, noise, found.p_slower, found.p_faster, statistics.LOOKS[0], PLAN)


def around(center, spread=0.002):
    return [center + spread * step for step in (-1.5, -1.1, -0.6, -0.2, 0.2, 0.6, 1.1, 1.5)]


@pytest.mark.parametrize(
    ("logs", "verdict"),
    [
        (around(0.05), Verdict.FAIL),
        (around(0.03), Verdict.FAIL),
        (around(0.01), Verdict.PASS),  # significant, and too small to matter
        (around(0.0), Verdict.PASS),
        (around(-0.05), Verdict.IMPROVED),
        (around(-0.01), Verdict.PASS),
        (around(0.02, 0.04), Verdict.INCONCLUSIVE),  # large, and not significant
        (around(0.0, 0.05), Verdict.INCONCLUSIVE),
    ],
)
def test_latency(logs, verdict):
    assert latency(logs).verdict is verdict


def test_where_the_self_check_misses_only_what_stands_out_of_it_is_judged():
    assert latency(around(0.05), NOISY).verdict is Verdict.INCONCLUSIVE
    assert "too noisy" in latency(around(0.0), NOISY).reason
    assert latency(around(0.20), NOISY).verdict is Verdict.FAIL
    assert latency(around(-0.20), NOISY).verdict is Verdict.IMPROVED


def launch(baseline=1.0, candidate=1.0, twin=1.0, seed=0, tail=1.0):
    """240 runs per rival around so many ms; every tenth run of the candidate is ``tail`` times slower."""
    rng = np.random.default_rng(seed)

    def times(ms, slow=1.0, blocks=30):
        drawn = ms * 1e6 * (1 + 0.02 * rng.random((blocks, 8)))
        drawn[:, 4] *= slow
        return tuple(tuple(int(t) for t in block) for block in drawn)

    blocks = {BASELINE: times(baseline), CANDIDATE: times(candidate, tail), TWIN: times(twin, tail, 15)}
    first = (BASELINE, CANDIDATE)[seed % 2]
    return Launch(blocks=blocks, first=first, peak_rss_bytes=100 + seed, devices={})


def series(**options):
    return Series([launch(seed=seed, **options) for seed in range(8)])


def test_the_self_check_compares_the_candidate_with_its_twin():
    quiet, noisy = Noise.of(series(), PLAN.margin), Noise.of(series(twin=1.05), PLAN.margin)
    assert not quiet.too_much
    assert noisy.too_much
    assert noisy.finding("cpu", PLAN.margin).verdict is Verdict.INCONCLUSIVE
    assert "governor" in noisy.finding("cpu", PLAN.margin).reason


def test_a_tail_of_the_candidate_alone_fails_and_one_of_the_machine_does_not():
    assert rules.judge_tail("cpu", series(), 0.9, 0.1).verdict is Verdict.PASS
    assert rules.judge_tail("cpu", series(tail=3.0), 0.9, 0.1).verdict is Verdict.FAIL
    assert rules.judge_tail("cpu", series(tail=3.0, twin=0.2), 0.9, 0.1).verdict is Verdict.INCONCLUSIVE
    assert rules.judge_tail("cpu", series(baseline=2.0), 0.9, 0.1).verdict is Verdict.IMPROVED
    quick = Series(series(tail=3.0).launches[:5])
    found = rules.judge_tail("cpu", quick, 0.99, 0.1)
    assert found.verdict is Verdict.INCONCLUSIVE, "210 runs a launch, and 105 of the twin, which is too few for a p99"
    assert "too few runs of the candidate against itself" in found.reason
    short = Series(series().launches[:1])
    assert rules.judge_tail("cpu", short, 0.99, 0.1) is None


@pytest.mark.parametrize(("limit", "verdict"), [(2.0, Verdict.PASS), (0.5, Verdict.FAIL), (1.0185, Verdict.INCONCLUSIVE)])
def test_the_budget_of_p90_is_kept_by_the_upper_bound_and_missed_by_the_lower(limit, verdict):
    few = Series(series().launches[:1]) if verdict is Verdict.INCONCLUSIVE else series()
    assert rules.judge_p90_budget("cpu", few, limit).verdict is verdict


@pytest.mark.parametrize(("limit", "verdict"), [(900, Verdict.PASS), (1100, Verdict.FAIL), (985, Verdict.INCONCLUSIVE)])
def test_a_throughput_is_reached_by_the_lower_bound_and_missed_by_the_upper(limit, verdict):
    few = Series(series().launches[:1]) if verdict is Verdict.INCONCLUSIVE else series()
    assert rules.judge_throughput_budget("cpu", few, 1, limit).verdict is verdict


def test_a_throughput_counts_every_image_of_a_batch():
    one, four = (rules.judge_throughput_budget("cpu", series(), batch, 1).candidate for batch in (1, 4))
    assert four == pytest.approx(4 * one)


def test_memory_is_of_the_launches_in_which_a_rival_was_first():
    assert series().peak_rss_bytes(BASELINE) == 103
    assert series().peak_rss_bytes(CANDIDATE) == 104
    assert series().peak_rss_bytes(TWIN) is None


@pytest.mark.parametrize(("before", "after"), [(None, 1.0), (1.0, None), (0.0, 1.0), (1.0, 1.2)])
def test_growth_beyond_the_limit_and_every_missing_figure_fail(before, after):
    assert rules.judge_growth("cpu", "size", before, after, 0.1).verdict is Verdict.FAIL


def test_growth_within_the_limit():
    assert rules.judge_growth("cpu", "size", 100, 110, 0.1).verdict is Verdict.PASS
    assert rules.judge_growth("cpu", "size", 100, 80, 0.1).verdict is Verdict.IMPROVED


@pytest.mark.parametrize("value", [None, 11.0])
def test_a_budget_is_missed_by_more_and_by_nothing(value):
    assert rules.at_most("cpu", "size budget", value, 10, "bytes").verdict is Verdict.FAIL
    assert rules.at_least("cpu", "floor", None if value is None else -value, 10).verdict is Verdict.FAIL


def paired(lost, won, kept=900, wrong=100):
    before = [True] * (kept + lost) + [False] * (won + wrong)
    after = [True] * kept + [False] * lost + [True] * won + [False] * wrong
    return Paired(np.array(before), np.array(after))


def accuracy(pair):
    return rules.judge_accuracy("cpu", "top-1", pair, pair.p_worse, pair.p_better, PLAN.accuracy_margin).verdict


def test_accuracy_is_paired():
    assert accuracy(paired(30, 5)) is Verdict.FAIL
    assert accuracy(paired(5, 30)) is Verdict.IMPROVED
    assert accuracy(paired(60, 55)) is Verdict.PASS
    assert accuracy(paired(0, 0)) is Verdict.PASS
    assert accuracy(paired(12, 0, kept=90_000)) is Verdict.PASS, "significant, and too small to matter"


def test_the_plans_limits_on_accuracy():
    plan = AccuracyPlan(max_top1_drop=0.01, min_top1=0.8)
    assert [f.verdict for f in rules.judge_own_accuracy("cpu", 0.85, 0.855, plan)] == [Verdict.PASS, Verdict.PASS]
    assert [f.verdict for f in rules.judge_own_accuracy("cpu", 0.79, 0.795, plan)] == [Verdict.FAIL, Verdict.PASS]
    assert [f.verdict for f in rules.judge_own_accuracy("cpu", 0.85, 0.87, plan)] == [Verdict.PASS, Verdict.FAIL]
    assert [f.verdict for f in rules.judge_own_accuracy("cpu", 0.96, None, plan)] == [Verdict.FAIL]


def test_the_worst_verdict_is_the_reports():
    def having(*verdicts):
        return overall(Finding(target="cpu", metric="m", verdict=verdict, reason="") for verdict in verdicts)

    assert having() is Verdict.PASS
    assert having(Verdict.PASS, Verdict.IMPROVED) is Verdict.IMPROVED
    assert having(Verdict.INCONCLUSIVE, Verdict.IMPROVED) is Verdict.INCONCLUSIVE
    assert having(Verdict.INCONCLUSIVE, Verdict.FAIL) is Verdict.FAIL
