"""The benchmarks of choosing a student: truths, choices and goals by hand, pages that say what is missing, a real treatment."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from fofa_deploy.environment import describe
from fofa_deploy.progress import Quiet

FOLDER = Path(__file__).parent.parent / "benchmarks"
before = list(sys.path)
sys.path[:0] = [str(FOLDER / "frontier"), str(FOLDER / "select")]
import choosing  # noqa: E402 - from the benchmarks' folders
import contenders  # noqa: E402
import figure  # noqa: E402
import outcome  # noqa: E402
import rivals  # noqa: E402
import sheet  # noqa: E402
import standing  # noqa: E402
import steps  # noqa: E402
import stopwatch  # noqa: E402
import workroom  # noqa: E402
from outcome import Picked, Record  # noqa: E402
from rounds import Ledger, wanted  # noqa: E402
from standing import Choice, Entry, Frontier, Race, Screened  # noqa: E402
from stopwatch import Timed, Times, budgets  # noqa: E402
from workroom import Task, Taught, Training  # noqa: E402

sys.path[:] = before  # the benchmarks' modules have common names

TARGET = "cpu-onnxruntime"
FIELD = {  # validation, parameters, macs, p90
    "plain-narrow": (0.80, 300, 10, 1.0),
    "mixer": (0.84, 100, 40, 2.0),
    "vit-narrow": (0.82, 200, 50, 4.0),
    "tiny-vit": (0.90, 150, 20, 8.0),
}


def training(name: str, method: str = "default", seed: int = 0) -> Training:
    validation, parameters, macs, _ = FIELD[name]
    accuracy = {"validation": validation, "test": validation - 0.01}
    task = Task(contender=name, method=method, seed=seed)
    return Training(task=task, parameters=parameters, macs=macs, images=1000, seconds_per_image=0.01, **accuracy)


def times(budgets_ms: tuple[float, ...] = (3.0, 5.0)) -> Times:
    rows = tuple(Timed(contender=name, recipe="fp32", p50_ms=p90, p90_ms=p90, runs=100) for name, (*_, p90) in FIELD.items())
    return Times(target=TARGET, rows=rows, failed={}, budgets_ms=budgets_ms, measured_at="now", load_average=0.1)


def pick(budget: float, contender: str | None, images: int = 200) -> Picked:
    return Picked(target=TARGET, budget_ms=budget, contender=contender, images=dict.fromkeys(FIELD, images), seconds=1.0)


def record(*picks: Picked) -> Record:
    trainings = tuple(training(name) for name in FIELD)
    taught = Taught(model="a", parameters=9, validation=0.95, test=0.94, seconds=3.0)
    return Record(
        scale=contenders.QUICK, environment=describe(), teacher=taught, trainings=trainings, times=(times(),), picks=picks
    )


# --- choosing


def test_contenders_are_of_four_kinds_and_one_quick_subset():
    assert {one.kind for one in contenders.CONTENDERS} == {"cnn", "vit", "mixer", "hybrid"}
    assert len({one.name for one in contenders.CONTENDERS}) == len(contenders.CONTENDERS) >= 8
    assert len(contenders.QUICK.field) == len(contenders.QUICK.contenders) == len(FIELD)


def test_budgets_lie_between_contenders_and_let_in_a_quarter_a_half_and_three():
    assert budgets([8.0, 1.0, 4.0, 2.0]) == pytest.approx((2**0.5, 8**0.5, 32**0.5))
    assert len(budgets([1.0, 2.0])) == 1, "never all, never none, and none twice"


def test_a_regret_is_what_the_best_that_fits_has_more():
    found = outcome.verdicts(record(pick(3.0, "plain-narrow"), pick(5.0, "mixer")))
    assert [(one.best, one.fitting) for one in found] == [
        ("mixer", ("mixer", "plain-narrow")),
        ("mixer", ("mixer", "plain-narrow", "vit-narrow")),
    ]
    assert [one.regret["chosen"] for one in found] == pytest.approx([4.0, 0.0])
    assert [(one.by_flops, one.by_parameters) for one in found] == [("mixer", "plain-narrow"), ("vit-narrow", "plain-narrow")]
    assert found[1].regret["by_flops"] == pytest.approx(2.0)
    assert found[0].cost == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("choices", "met"),
    [
        (("mixer", "mixer"), [True, True, True, True]),
        (("plain-narrow", "mixer"), [False, True, False, True]),
        (("tiny-vit", "mixer"), [False, True, False, False]),  # the most accurate of all, and over the budget
        ((None, "mixer"), [False, True, False, False]),
    ],
)
def test_goals_are_met_by_the_right_choices_alone(choices, met):
    found = outcome.goals(record(pick(3.0, choices[0]), pick(5.0, choices[1])))
    assert [goal.met for goal in found] == met


def test_a_dear_selection_misses_its_goal_and_a_missing_one_misses_all():
    assert [goal.met for goal in outcome.goals(record(pick(3.0, "mixer", 300), pick(5.0, "mixer")))] == [True, False, True, True]
    assert not any(goal.met for goal in outcome.goals(record(pick(3.0, "mixer"))))


def test_rank_correlations_are_spearmans():
    found = outcome.rank_correlations(record())[TARGET]
    assert found == pytest.approx({"FLOPs": 0.4, "parameters": -0.4})


def test_the_page_tells_choices_and_goals_and_draws_them(tmp_path):
    sheet.write(record(pick(3.0, "plain-narrow"), pick(5.0, "mixer")), tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "mixer (test 83.00%) | plain-narrow: regret 4.00 (test 79.00%)" in page
    assert "| largest regret over all budgets | <= 0.3 points of accuracy | 4 | **no** |" in page
    assert "Unfinished" not in page
    assert (tmp_path / sheet.PICTURE).stat().st_size > 1000
    found = json.loads((tmp_path / "results.json").read_text())
    assert [goal["met"] for goal in found["goals"]] == [False, True, False, True]
    assert steps.Notebook(tmp_path, contenders.QUICK).record == record(
        pick(3.0, "plain-narrow"), pick(5.0, "mixer")
    ).model_copy(update={"environment": Record.model_validate(found["record"]).environment})  # fmt: skip


def test_a_budget_that_nobody_keeps_is_a_row_that_chose_nothing():
    page = sheet.page(record(pick(3.0, None, 0), pick(5.0, "mixer")))
    assert "| nothing: does not fit | " in page
    assert "a choice that does not fit" in page
    assert "Not chosen yet" not in page


def test_the_page_of_a_part_says_what_is_missing(tmp_path):
    half = record(pick(3.0, "mixer")).model_copy(update={"trainings": (training("mixer"),)})
    assert "Not trained yet: plain-narrow, vit-narrow, tiny-vit." in sheet.page(half)
    assert f"Not chosen yet: {TARGET} at 5.000 ms." in sheet.page(half)
    sheet.write(Record(scale=contenders.QUICK), tmp_path)
    assert "no budgets" in (tmp_path / "README.md").read_text()


def test_records_of_other_scales_are_refused(tmp_path):
    sheet.write(record(), tmp_path)
    with pytest.raises(Exception, match="move it away"):
        steps.Notebook(tmp_path, contenders.FULL)


# --- the frontier


def screened(way: str, name: str | None, p90_ms: float | None) -> Screened:
    return Screened(way=way, contender=name, p90_ms=p90_ms)


def test_a_rival_is_the_largest_that_meets_the_budget_after_its_treatment():
    found = [
        screened("teacher", None, 9.0),
        screened("alone", "mixer", 2.0),
        screened("alone", "vit-narrow", 2.9),
        screened("alone", "tiny-vit", None),
    ]
    macs = {name: values[2] for name, values in FIELD.items()}
    chosen = standing.choices(TARGET, 3.0, "mixer", found, macs)
    assert {one.way: one.contender for one in chosen} == {"ours": "mixer", "teacher": None, "alone": "vit-narrow", "kd": None}
    chosen = standing.choices(TARGET, 9.0, "mixer", found, macs)
    assert {one.way: one.contender for one in chosen}["teacher"] == "teacher"


def entry(way: str, name: str, seed: int, test: float, p90_ms: float = 2.5) -> Entry:
    return Entry(way=way, contender=name, seed=seed, recipe="x", test=test, p90_ms=p90_ms)


def frontier(ours: float, p90_ms: float = 2.5) -> Frontier:
    chosen = [("ours", "mixer"), ("teacher", None), ("alone", "vit-narrow"), ("kd", "mixer")]
    entries = (
        entry("ours", "mixer", 0, ours - 0.01, p90_ms),
        entry("ours", "mixer", 1, ours + 0.01, p90_ms),
        entry("alone", "vit-narrow", 0, 0.80),
        entry("alone", "vit-narrow", 1, 0.82),
        entry("kd", "mixer", 0, 0.70),
    )
    return Frontier(
        seeds=(0, 1),
        environment=describe(),
        screened=(screened("alone", "vit-narrow", 2.5), screened("teacher", None, 9.0)),
        choices=tuple(Choice(target=TARGET, budget_ms=3.0, way=way, contender=name) for way, name in chosen),
        races=(Race(target=TARGET, entries=entries, failed={}, measured_at="now", load_average=None),),
    )


@pytest.mark.parametrize(
    ("found", "met"),
    [
        (frontier(0.83), [True, True, True, True]),
        (frontier(0.81), [False, True, False, True]),  # as good is not ahead
        (frontier(0.83, p90_ms=3.1), [False, False, False, False]),
    ],
)
def test_ours_is_ahead_where_it_keeps_the_budget_and_is_more_accurate(found, met):
    assert [goal.met for goal in standing.goals(found, 1)] == met
    assert not any(goal.met for goal in standing.goals(found, 2)), "the other budget is still open"


def test_students_are_trained_once_for_all_that_they_stand_for():
    found = frontier(0.83)
    assert [task.name for task in wanted(found)] == [
        "mixer-default-0", "vit-narrow-alone-0", "mixer-kd-0", "mixer-default-1", "vit-narrow-alone-1", "mixer-kd-1",
    ]  # fmt: skip


def test_the_frontiers_page_has_means_and_deviations_and_says_where_nothing_fits(tmp_path):
    selected = record(pick(3.0, "mixer"), pick(5.0, "mixer"))
    figure.write(frontier(0.83), selected, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "83.00 ± 1.41 (mixer, 2.500 ms) | nothing meets the budget | 81.00 ± 1.41 (vit-narrow, 2.500 ms)" in page
    assert "| 70.00 (mixer, 2.500 ms) | yes |" in page
    assert (tmp_path / figure.PICTURE).stat().st_size > 1000
    assert Ledger(tmp_path, (0, 1), selected).found.races == frontier(0.83).races
    figure.write(Frontier(seeds=(0,)), Record(scale=contenders.QUICK), tmp_path / "empty")
    assert "**Unfinished.**" in (tmp_path / "empty" / "README.md").read_text()


# --- a real student, a real rival


def write_images(folder: Path, prefix: str, count: int) -> None:
    """28 x 28 images of noise with ten classes, in the four files that Debian ships."""
    rng = np.random.default_rng(len(prefix))
    labels = (np.arange(count) % 10).astype(np.uint8)
    for name, array in (("images-idx3", rng.integers(0, 256, (count, 28, 28), np.uint8)), ("labels-idx1", labels)):
        head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        (folder / f"{prefix}-{name}-ubyte").write_bytes(head + array.tobytes())


@pytest.fixture
def room(tmp_path, monkeypatch):
    """A workroom of one contender and hardly any images; child processes find the peers' back ends."""
    for name in ("distillation", "select"):
        monkeypatch.syspath_prepend(FOLDER / name)
    for name in ("PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    rivals.register(tmp_path)
    for prefix, count in (("train", 400), ("t10k", 40)):
        write_images(tmp_path, prefix, count)
    scale = contenders.Scale(
        contenders=("plain-narrow",),
        images=160,
        epochs=1,
        teacher_images=160,
        teacher_epochs=1,
        floor=0.0,
        samples=40,
        seconds=0.2,
    )
    yield workroom.Workroom(str(tmp_path), tmp_path, scale, Quiet())
    for name in ("models", "networks"):
        sys.modules.pop(name, None)


def test_a_student_is_trained_once_and_treated_by_a_rivals_tool(room):
    assert room.taught().parameters > 100_000
    task = Task(contender="plain-narrow", method="alone")
    done = room.train(task)
    assert done == room.train(task), "taken as it is"
    assert done.images == 160
    assert 0.1e6 < done.macs < 0.5e6
    assert done.seconds > 0
    way = next(way for way in rivals.WAYS if way.method == "alone")
    treated = rivals.treat(room, way, task)
    assert treated.candidate.profile.name == "cpu-onnxruntime"
    assert 0 <= rivals.tested(treated) <= 1
    teacher = rivals.treat(room, rivals.WAYS[0], None)
    assert 0 <= rivals.tested(teacher) <= 1
    assert [found.runs > 0 for found in stopwatch.race([treated.candidate, teacher.candidate], room)] == [True, True]


def test_a_budget_that_nobody_keeps_is_recorded_and_the_others_are_decided(room, monkeypatch):
    monkeypatch.setenv(choosing.FOLDER, str(room.folder))
    room.taught()
    nobody = choosing.choose(room, TARGET, 1e-6)
    assert (nobody.contender, nobody.images, nobody.budget_ms) == (None, {}, 1e-6)
    assert nobody.seconds > 0
    assert choosing.choose(room, TARGET, 1e6).contender == "plain-narrow"
