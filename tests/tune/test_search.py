"""The search builds little, tries the fastest first, and stops where nothing better can come."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from fofa_deploy.config import AccuracyPlan, LimitsPlan, MeasurePlan
from fofa_deploy.errors import BuildError
from fofa_deploy.progress import Quiet
from fofa_deploy.store import Store
from fofa_deploy.tune import Settings
from fofa_deploy.tune.rows import row_of
from fofa_deploy.tune.search import Search
from fofa_deploy.tune.tuner import asked_for
from fofa_deploy.types import Budget, HardwareProfile, Precision, Probe, Recipe, Status

PROFILE = HardwareProfile(name="somewhere", description="", runtime="none", precisions=(Precision.FP32, Precision.INT8))
PROBE = Probe(can_build=True, can_run=True)


def recipe(name: str, family: str = "", **fields) -> Recipe:
    return Recipe(name=name, precision=Precision.INT8, description=name, family=family, **fields)


FP32 = Recipe(name="fp32", precision=Precision.FP32, description="float")
PLAN = [recipe("a", "a"), recipe("a+", "a"), recipe("b", "b"), recipe("b+", "b"), recipe("c"), FP32]


class Bench:
    """A workbench whose recipes are good, broken or large as a test says."""

    def __init__(self, store: Store, good: set[str], broken: set[str] = frozenset(), sizes: dict[str, int] | None = None) -> None:
        self.store, self.good, self.broken, self.sizes = store, good, broken, sizes or {}
        self.progress, self.calibration, self.name = Quiet(), Path(), "graph"
        self.settings = Settings(AccuracyPlan(), MeasurePlan(), LimitsPlan(), Budget(size_bytes=100), 0)
        self.built: list[str] = []

    def build(self, profile, recipe, probe):
        if recipe.name in self.broken:
            raise BuildError("refused", "try another")
        self.built.append(recipe.name)
        return SimpleNamespace(sha256=recipe.name, recipe=recipe)

    def attempt(self, profile, recipe, probe):
        if recipe.name in self.broken:
            return row_of(profile, recipe, Status.FAILED, "refused")
        status = Status.VERIFIED if recipe.name in self.good else Status.REJECTED
        return row_of(profile, recipe, status, "").model_copy(update={"size_bytes": self.sizes.get(recipe.name, 10)})


def race_of(**speeds: float):
    """Families by speed; a race counts how often it is run."""

    def race(artifacts):
        race.runs += 1
        return [speeds[artifact.sha256.rstrip("+")] for artifact in artifacts]

    race.runs = 0
    return race


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "run") as opened:
        yield opened


def found(bench: Bench, race, recipes=PLAN) -> dict[str, Status]:
    return {row.recipe: row.status for row in Search(bench, PROFILE, PROBE, race).rows(recipes)}


def test_the_fastest_family_that_passes_ends_the_search(store):
    bench = Bench(store, {"a", "b", "c", "fp32"})
    rows = found(bench, race_of(a=3.0, b=1.0, c=2.0, fp32=5.0))
    assert rows == {"b": Status.VERIFIED, "c": Status.SKIPPED, "a": Status.SKIPPED, "fp32": Status.VERIFIED}
    assert list(rows) == ["b", "c", "a", "fp32"]


def test_inside_a_family_it_goes_on_until_one_passes(store):
    rows = found(Bench(store, {"b+", "fp32"}), race_of(a=3.0, b=1.0, c=2.0, fp32=5.0))
    assert (rows["b"], rows["b+"], rows["c"]) == (Status.REJECTED, Status.VERIFIED, Status.SKIPPED)


def test_where_float_is_fastest_nothing_else_is_tried(store):
    rows = found(Bench(store, {"a", "b", "c", "fp32"}), race_of(a=3.0, b=1.0, c=2.0, fp32=0.5))
    assert rows == {"fp32": Status.VERIFIED, "b": Status.SKIPPED, "c": Status.SKIPPED, "a": Status.SKIPPED}


def test_a_close_second_is_tried_too(store):
    rows = found(Bench(store, {"a", "b", "fp32"}), race_of(a=1.1, b=1.0, c=2.0, fp32=5.0))
    assert (rows["a"], rows["b"], rows["c"]) == (Status.VERIFIED, Status.VERIFIED, Status.SKIPPED)


def test_a_rejected_family_prunes_nothing(store):
    rows = found(Bench(store, {"c", "fp32"}), race_of(a=1.0, b=2.0, c=3.0, fp32=5.0))
    assert [rows[name] for name in ("a", "a+", "b", "b+", "c")] == [Status.REJECTED] * 4 + [Status.VERIFIED]


def test_one_that_is_too_large_does_not_count_as_passed(store):
    rows = found(Bench(store, {"b", "b+", "fp32"}, sizes={"b": 1000}), race_of(a=3.0, b=1.0, c=2.0, fp32=5.0))
    assert rows["b"] is rows["b+"] is Status.VERIFIED


def test_a_family_that_is_too_large_keeps_no_slower_one_from_being_tried(store):
    sizes = dict.fromkeys(("b", "b+", "fp32"), 1000)
    rows = found(Bench(store, {"a", "b", "b+", "fp32"}, sizes=sizes), race_of(a=3.0, b=1.0, c=2.0, fp32=0.5))
    assert (rows["fp32"], rows["b"], rows["c"], rows["a"]) == (Status.VERIFIED, Status.VERIFIED, Status.REJECTED, Status.VERIFIED)


def test_a_budget_of_memory_which_no_race_tells_keeps_every_family(store):
    bench = Bench(store, {"a", "b", "c", "fp32"})
    bench.settings = Settings(AccuracyPlan(), MeasurePlan(), LimitsPlan(), Budget(peak_rss_bytes=100), 0)
    rows = found(bench, race_of(a=3.0, b=1.0, c=2.0, fp32=5.0))
    assert [rows[name] for name in ("a", "b", "c", "fp32")] == [Status.VERIFIED] * 4


def test_a_recipe_that_does_not_build_leaves_its_family_to_the_next(store):
    bench = Bench(store, {"b+", "fp32"}, broken={"b", "c"})
    rows = found(bench, race_of(a=3.0, b=1.0, fp32=5.0))
    assert (rows["b"], rows["b+"], rows["a"]) == (Status.FAILED, Status.VERIFIED, Status.SKIPPED)
    assert rows["c"] is Status.FAILED, "why it does not build is told"


def test_the_same_artifacts_are_raced_once(store):
    race = race_of(a=3.0, b=1.0, c=2.0, fp32=5.0)
    first, second = (found(Bench(store, {"b", "fp32"}), race) for _ in range(2))
    assert first == second
    assert race.runs == 1


def test_two_families_are_tried_without_a_race(store):
    race = race_of(a=1.0, fp32=2.0)
    assert found(Bench(store, {"a", "fp32"}), race, [PLAN[0], FP32]) == {"a": Status.VERIFIED, "fp32": Status.VERIFIED}
    assert race.runs == 0


def test_without_a_race_every_family_is_tried(store):
    rows = found(Bench(store, {"a", "b", "c", "fp32"}), None)
    assert rows == dict.fromkeys(("a", "b", "c", "fp32"), Status.VERIFIED)


MIXED = [
    recipe("a", "a"),
    recipe("a-mixed50", "a-mixed50", after="a"),
    recipe("a-mixed80", "a-mixed80", after="a"),
    recipe("b", "b"),
    recipe("b-mixed50", "b-mixed50", after="b"),
    FP32,
]


def test_mixed_precision_waits_until_all_in_eight_bits_has_lost_too_much(store):
    bench = Bench(store, {"b", "fp32"})
    rows = found(bench, race_of(a=1.0, b=1.1, fp32=5.0), MIXED)
    assert rows["b"] is Status.VERIFIED
    assert (rows["a"], rows["a-mixed50"], rows["a-mixed80"]) == (Status.REJECTED,) * 3
    assert "b-mixed50" not in rows
    assert not {"a-mixed50", "b-mixed50"} & set(bench.built), "the short race does without them"


BF16 = Recipe(name="bf16", precision=Precision.BF16, description="half as long")
RESTS = [recipe("a-bf16", rest=Precision.BF16), recipe("a", rest=Precision.FP32), recipe("c"), BF16, FP32]


@pytest.mark.parametrize(
    ("bf16", "tried", "left"), [(1.5, "a-bf16", "a"), (2.9, "a", "a-bf16"), (9.0, "a", "a-bf16")], ids=["faster", "even", "slower"]
)
def test_int8_rests_on_the_faster_float(store, bf16, tried, left):
    bench = Bench(store, {"a", "a-bf16", "c", "bf16", "fp32"})
    rows = found(bench, race_of(**{"a": 1.0, "a-bf16": 1.0, "c": 1.1, "bf16": bf16, "fp32": 3.0}), RESTS)
    assert rows[tried] is rows["c"] is rows["fp32"] is Status.VERIFIED
    assert left not in rows
    assert left not in bench.built


def test_int8_rests_on_what_the_back_end_names_first_where_nothing_can_tell(store):
    assert "a-bf16" in found(Bench(store, {"a-bf16"}), None, RESTS)
    assert "a" not in found(Bench(store, {"a-bf16"}), None, RESTS)


def test_mixed_precision_ends_with_the_first_share_that_suffices(store):
    rows = found(Bench(store, {"a-mixed50", "fp32"}), race_of(a=1.0, b=9.0, fp32=5.0), MIXED)
    assert rows["a-mixed50"] is Status.VERIFIED
    assert "a-mixed80" not in rows
    assert rows["b"] is Status.SKIPPED, "float is faster"
    assert "b-mixed50" not in rows


def test_a_broken_relative_does_not_keep_mixed_precision_from_being_tried(store):
    plan = [recipe("a", "a"), recipe("a+", "a"), recipe("a-mixed50", "a-mixed50", after="a"), recipe("b"), FP32]
    rows = found(Bench(store, {"a-mixed50", "fp32"}, broken={"a+"}), race_of(a=1.0, b=9.0, fp32=5.0), plan)
    assert (rows["a"], rows["a+"], rows["a-mixed50"]) == (Status.REJECTED, Status.FAILED, Status.VERIFIED)


def test_a_recipe_asked_for_by_name_is_tried_whatever_it_comes_after(store):
    assert found(Bench(store, {"a-mixed80"}), race_of(), [MIXED[2]]) == {"a-mixed80": Status.VERIFIED}


def test_what_is_tried_on_request_alone_has_to_be_asked_for():
    plain, kept = recipe("a"), recipe("b").model_copy(update={"on_request": True})
    assert asked_for([plain, kept], None) == [plain]
    assert asked_for([plain, kept], "b") == [kept]
    assert asked_for([plain, kept], "c") == []
