"""Where a learning curve leads: accuracy after n images, foretold from short trainings.

The rule is the three-parameter power law a - b * n^-c (Hestness et al., arXiv 1712.00409; Domhan et al., IJCAI 2015, "pow3"),
fitted by least squares within 0 <= a <= 1, b >= 0, c in ``RATES``. Two points do not decide three parameters: ``c`` is then
held at ``USUAL_RATE``; one point foretells itself. A forecast never lies below the last accuracy that was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal

import numpy as np
from pydantic import Field, PositiveFloat, model_validator

from fofa_deploy.types import Fraction, Frozen

RATES = (0.05, 3.0)
USUAL_RATE = 0.5

Rule = Literal["power law", "power law of fixed rate", "last value"]


class Point(Frozen):
    """One rung."""

    seen: PositiveFloat = Field(description="images trained on, each as often as it was seen")
    top1: Fraction = Field(description="on validation images")


class Forecast(Frozen):
    """What is foretold, and by which rule."""

    rule: Rule
    seen: PositiveFloat
    top1: Fraction
    error: float = Field(description="root mean square of what the fit leaves; 0 where it cannot but pass through the points")


class Curve(Frozen):
    """The rungs of one candidate, in the order in which they were climbed."""

    points: tuple[Point, ...] = Field(min_length=1)

    @model_validator(mode="after")
    def _growing(self) -> Curve:
        if any(after.seen <= before.seen for before, after in pairwise(self.points)):
            raise ValueError("each rung must have seen more images than the one before it")
        return self


def forecast(curve: Curve, seen: float) -> Forecast:
    """The accuracy after ``seen`` images."""
    last = curve.points[-1]
    if len(curve.points) == 1 or not seen > last.seen:
        return Forecast(rule="last value", seen=seen, top1=last.top1, error=0.0)
    rule: Rule = "power law" if len(curve.points) > 2 else "power law of fixed rate"
    law, error = _fit(curve.points, RATES if rule == "power law" else (USUAL_RATE, USUAL_RATE))
    foretold = float(_value(law, np.array([seen / last.seen]))[0])
    return Forecast(rule=rule, seen=seen, top1=min(1.0, max(foretold, last.top1)), error=error)


def _fit(points: Sequence[Point], rates: tuple[float, float]) -> tuple[np.ndarray, float]:
    """(a, b, c) float64 (3,), and the root mean square error. Images are counted in units of the last rung."""
    from scipy.optimize import least_squares

    count = np.array([point.seen for point in points]) / points[-1].seen
    top1 = np.array([point.top1 for point in points])
    low, high = np.array([0.0, 0.0, rates[0] - 1e-9]), np.array([1.0, np.inf, rates[1] + 1e-9])
    # The valley is curved, so that one start may end in a corner of it: the best of several.
    starts = [np.array([0.5 + 0.5 * top1[-1], 0.1, rate]) for rate in np.unique(np.clip((0.2, 0.5, 1.0, 2.0), *rates))]
    found = [least_squares(lambda law: _value(law, count) - top1, start, bounds=(low, high)) for start in starts]
    best = min(found, key=lambda one: float(one.cost))
    return best.x, float(np.sqrt(2 * best.cost / len(points)))


def _value(law: np.ndarray, count: np.ndarray) -> np.ndarray:
    """The law a - b * count^-c at ``count``: (N,) -> (N,)"""
    value: np.ndarray = law[0] - law[1] * count ** -law[2]
    return value
