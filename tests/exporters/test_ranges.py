"""Each way to choose a range, on distributions whose best range is known."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from fofa_exporters._quantization.ranges import ranges
from fofa_exporters._quantization.scheme import Method
from fofa_exporters._quantization.statistics import BINS, Statistics

METHODS = get_args(Method)


def _statistics(*samples: np.ndarray) -> Statistics:
    low = np.array([s.min() for s in samples], np.float32)
    high = np.array([s.max() for s in samples], np.float32)
    counts = [np.histogram(s, BINS, (s.min(), s.max() if np.ptp(s) else s.min() + 1))[0] for s in samples]
    names = tuple(f"tensor{number}" for number in range(len(samples)))
    return Statistics(names, low, high, low * 0.5, high * 0.5, np.array(counts, np.int64), {})


def _rounding_error(values: np.ndarray, low: float, high: float) -> float:
    step = (high - low) / 255
    return float(np.square(np.clip(np.round(values / step), round(low / step), round(high / step)) * step - values).sum())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [False, True])
def test_zero_is_always_inside(method: Method, symmetric: bool):
    low, high = ranges(_statistics(np.linspace(2, 3, 500), np.linspace(-4, -1, 500)), method, symmetric)
    assert (low <= 0).all()
    assert (high >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_a_constant_tensor_has_a_range(method: Method):
    low, high = ranges(_statistics(np.zeros(100), np.full(100, 2.5)), method, False)
    assert np.isfinite([low, high]).all()
    assert high[1] == pytest.approx(2.5, rel=0.6)


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_an_outlier_is_clipped(method: Method):
    """One value in a million, ten times beyond the rest, would cost every other one three bits."""
    values = np.append(np.random.default_rng(0).normal(size=1_000_000), 40.0)
    _, high = ranges(_statistics(values), method, False)
    assert high[0] < 25


@pytest.mark.parametrize("method", ["percentile", "entropy", "mse"])
def test_a_uniform_tensor_is_kept_whole(method: Method):
    _, high = ranges(_statistics(np.linspace(0, 1, 100_000)), method, False)
    assert high[0] > 0.95


@pytest.mark.parametrize("sample", ["normal", "laplace"])
def test_mse_beats_every_other_way_in_its_own_measure(sample: str):
    values = getattr(np.random.default_rng(1), sample)(size=50_000)
    errors = {}
    for method in METHODS:
        low, high = ranges(_statistics(values), method, False)
        errors[method] = _rounding_error(values, float(low[0]), float(high[0]))
    assert errors["mse"] <= 1.02 * min(errors.values())


def test_symmetric_criteria_look_at_the_symmetric_range():
    values = np.append(np.random.default_rng(0).normal(size=1_000_000), -40.0)
    low, high = ranges(_statistics(values), "mse", True)
    assert -low[0] == pytest.approx(high[0])
    assert high[0] < 25


def test_plain_methods_take_what_was_seen():
    found = replace(_statistics(np.array([-2.0, 4.0])), average_low=np.float32([-1]), average_high=np.float32([3]))
    assert [float(end[0]) for end in ranges(found, "min-max", False)] == [-2.0, 4.0]
    assert [float(end[0]) for end in ranges(found, "moving-average", False)] == [-1.0, 3.0]
