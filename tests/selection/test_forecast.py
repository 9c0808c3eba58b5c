"""Forecasts against curves whose end is known."""

import numpy as np
import pytest
from pydantic import ValidationError

from fofa_deploy.select.forecast import Curve, Point, forecast


def law(seen, a, b, c):
    return a - b * seen**-c


def curve(*points):
    return Curve(points=tuple(Point(seen=seen, top1=top1) for seen, top1 in points))


@pytest.mark.parametrize(("a", "b", "c"), [(0.95, 5.0, 0.5), (0.8, 30.0, 0.8), (0.99, 1.5, 0.2), (0.7, 400.0, 1.2)])
def test_a_power_law_is_foretold_exactly(a, b, c):
    seen = (500, 1000, 2000, 4000)
    found = forecast(curve(*[(n, law(n, a, b, c)) for n in seen]), 32000)
    assert found.rule == "power law"
    assert found.top1 == pytest.approx(law(32000, a, b, c), abs=2e-3)
    assert found.error < 1e-3


def test_noise_of_a_validation_split_moves_it_little_and_less_than_taking_the_last_value():
    rng, seen = np.random.default_rng(0), (500, 1000, 2000, 4000, 8000)
    truth = law(32000, 0.95, 5.0, 0.5)
    misses, last = [], []
    for _ in range(20):
        points = [(n, float(np.clip(law(n, 0.95, 5.0, 0.5) + rng.normal(0, 0.005), 0, 1))) for n in seen]
        misses.append(abs(forecast(curve(*points), 32000).top1 - truth))
        last.append(abs(points[-1][1] - truth))
    assert np.mean(misses) < 0.015
    assert np.mean(misses) < np.mean(last)


def test_two_rungs_are_continued_at_the_usual_rate():
    found = forecast(curve((1000, law(1000, 0.9, 6.0, 0.5)), (4000, law(4000, 0.9, 6.0, 0.5))), 16000)
    assert found.rule == "power law of fixed rate"
    assert found.top1 == pytest.approx(law(16000, 0.9, 6.0, 0.5), abs=1e-3)


def test_one_rung_and_the_past_are_the_last_value():
    assert forecast(curve((1000, 0.5)), 9000).top1 == 0.5
    assert forecast(curve((1000, 0.5), (2000, 0.6)), 2000).rule == "last value"


def test_a_forecast_stays_between_what_was_seen_and_one():
    assert forecast(curve((1, 0.1), (2, 0.5), (4, 0.9)), 1e9).top1 <= 1.0
    assert forecast(curve((1, 0.9), (2, 0.7), (4, 0.8)), 100).top1 >= 0.8


@pytest.mark.parametrize("seen", [(2, 2), (3, 1)])
def test_rungs_grow(seen):
    with pytest.raises(ValidationError, match="more images"):
        curve(*[(n, 0.5) for n in seen])
