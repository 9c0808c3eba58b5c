"""The statistics, held to what is known of them by hand and to their own error rates."""

import math

import numpy as np
import pytest

from fofa_deploy.gate import statistics
from fofa_deploy.gate.statistics import LOOKS


def test_a_launch_is_the_median_over_blocks_of_the_fastest_runs():
    baseline = [[100, 900], [100, 100], [200, 100]]
    candidate = [[110, 800], [120, 990], [500, 105]]
    assert statistics.launch_log_ratio(baseline, candidate) == pytest.approx(math.log(1.1))


def test_one_disturbed_block_changes_nothing():
    quiet = [[100, 101]] * 7
    assert statistics.launch_log_ratio(quiet, [[100, 101]] * 4 + [[9000, 9000]] * 3) == 0.0


@pytest.mark.parametrize(("launches", "smallest"), [(5, 1 / 32), (8, 1 / 256)])
def test_the_smallest_p_value_is_exact(launches, smallest):
    logs = [0.05 + number / 1000 for number in range(launches)]
    found = statistics.shift(logs)
    assert found.p_slower == pytest.approx(smallest)
    assert found.p_faster == 1.0
    assert found.lower < found.ratio < found.upper
    mirrored = statistics.shift([-log for log in logs])
    assert (mirrored.p_faster, mirrored.ratio) == (pytest.approx(smallest), pytest.approx(1 / found.ratio))


def test_equal_times_are_no_evidence():
    found = statistics.shift([0.0] * 8)
    assert (found.ratio, found.p_slower, found.p_faster, found.upper) == (1.0, 1.0, 1.0, 1.0)


def test_five_launches_bound_the_ratio_by_the_slowest_of_them():
    assert statistics.shift([0.01, 0.02, 0.03, 0.04, 0.05]).upper == pytest.approx(math.exp(0.05))


@pytest.mark.parametrize(
    ("asked", "family", "needed"), [(5, 1, 5), (5, 2, 6), (8, 2, 8), (8, 8, 8), (8, 9, 9), (8, 40, 11), (8, 0, 8)]
)
def test_a_larger_family_gets_the_launches_it_needs(asked, family, needed):
    assert statistics.launches_for(asked, family) == needed
    assert 2.0**-needed * max(family, 1) <= LOOKS[0]


def test_holm_by_hand():
    assert statistics.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert statistics.holm({}) == {}
    assert statistics.holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}


def test_mcnemar_is_the_exact_binomial_test_on_changed_images():
    assert statistics.mcnemar(5, 0) == pytest.approx(1 / 32)
    assert statistics.mcnemar(0, 0) == 1.0
    assert statistics.mcnemar(3, 3) > 0.5
    assert not statistics.can_matter(4)
    assert statistics.can_matter(5)


def test_bounds_of_a_quantile_hold_it_as_often_as_they_say():
    rng = np.random.default_rng(0)
    true = math.log(10)  # p90 of the exponential distribution
    bounds = [statistics.quantile_bounds(rng.exponential(size=400), 0.9) for _ in range(150)]
    assert sum(low <= true for low, _ in bounds) >= 148
    assert sum(high >= true for _, high in bounds) >= 148


def test_too_few_runs_have_no_bound():
    low, high = statistics.quantile_bounds(np.arange(100, dtype=np.float64), 0.99)
    assert math.isnan(high)
    assert not low <= math.nan
    assert math.isfinite(statistics.quantile_bounds(np.arange(700, dtype=np.float64), 0.99)[1])


def test_false_alarms_of_the_whole_rule_on_noise_are_rarer_than_the_error_allowed():
    """Symmetric noise of 3 % per launch, more than the margin, both looks: the worst that the rule is to bear."""
    rng, alarms = np.random.default_rng(1), 0
    for _ in range(80):
        logs = rng.normal(0, 0.03, 16)
        for error, count in zip(LOOKS, (8, 16), strict=True):
            found = statistics.shift(list(logs[:count]))
            if found.p_slower < error and found.ratio > 1.02:
                alarms += 1
                break
    assert alarms / 80 <= sum(LOOKS)
