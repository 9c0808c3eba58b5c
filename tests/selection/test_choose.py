"""Budgets, the front and the rule for ties."""

from math import nan

import pytest

from fofa_deploy.errors import PlanError
from fofa_deploy.select.choose import Scored, Speed, choose, fitting, front, misses
from fofa_deploy.types import Budget


def speed(name, p50=1.0, **more):
    return Speed.model_construct(**{"name": name, "p50_ms": p50, "p90_ms": p50, "throughput_sps": 1e3 / p50, "size_bytes": 100,
                                    "peak_rss_bytes": 1000, **more})  # fmt: skip


def scored(name, p50, top1, size=100):
    return Scored.model_construct(speed=speed(name, p50, size_bytes=size), top1=top1)


@pytest.mark.parametrize(
    ("figure", "on", "off"), [("p90_ms", 10, 10.1), ("size_bytes", 10, 11), ("peak_rss_bytes", 10, 11), ("throughput_sps", 10, 9.9)]
)
def test_a_limit_is_kept_missed_or_unknown(figure, on, off):
    budgets = Budget(), Budget(**{figure: 10})
    assert misses(speed("a", **{figure: on}), budgets) == ()
    for value in (off, nan, None):
        (miss,) = misses(speed("a", **{figure: value}), budgets)
        assert miss.figure == figure


def test_the_slow_one_is_out_and_its_reason_is_told():
    kept, missed = fitting([speed("fast", 1.0), speed("slow", 4.0)], [Budget(p90_ms=2)])
    assert [one.name for one in kept] == ["fast"]
    assert [str(miss) for miss in missed] == ["slow: p90_ms 4, the budget is 2 (2x)"]


def test_where_nobody_fits_the_nearest_is_named_with_every_limit_it_missed():
    near, far = speed("near", 3.0, size_bytes=110), speed("far", 9.0)
    with pytest.raises(PlanError, match=r"nearest is near: p90_ms 3, the budget is 2 \(1.5x\); near: size_bytes 110") as caught:
        fitting([far, near], [Budget(p90_ms=2), Budget(size_bytes=100)])
    assert "select.image_sizes" in caught.value.action


def test_one_without_the_figure_is_never_the_nearest():
    with pytest.raises(PlanError, match="nearest is far"):
        fitting([speed("unknown", p90_ms=None), speed("far", 99.0)], [Budget(p90_ms=2)])


def test_one_that_is_too_slow_for_a_p90_misses_the_limit_by_its_median():
    slow = Speed(name="slow", p50_ms=3.0)
    assert [str(miss) for miss in misses(slow, [Budget(p90_ms=2)])] == ["slow: p50_ms 3, the budget is 2 (1.5x)"]


def test_without_anybody_it_says_where_to_look():
    with pytest.raises(PlanError, match="no candidate could be measured"):
        fitting([], [])


def test_the_front_holds_who_is_beaten_by_nobody():
    found = front([scored("d", 4, 0.8), scored("b", 2, 0.7), scored("c", 3, 0.9), scored("a", 1, 0.5), scored("twin", 2, 0.7)])
    assert [one.speed.name for one in found] == ["a", "b", "c"]


def test_of_equally_good_ones_the_fastest_is_taken_then_the_smallest_then_by_name():
    assert choose([scored("best", 5, 0.900), scored("close", 2, 0.896), scored("worse", 1, 0.89)]).speed.name == "close"
    assert choose([scored("big", 2, 0.9, 200), scored("small", 2, 0.9)]).speed.name == "small"
    assert choose([scored("b", 2, 0.9), scored("a", 2, 0.9)]).speed.name == "a"
    assert choose([scored("best", 5, 0.900), scored("close", 2, 0.896)], tie=0).speed.name == "best"
