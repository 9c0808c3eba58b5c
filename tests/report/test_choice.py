"""How the student was chosen, as the page and the summary tell it."""

import pytest
from test_report import HOSTILE, Page, sample

from fofa_deploy.report import render
from fofa_deploy.report.choice import choice_plot
from fofa_deploy.results import CandidateRow, StudentChoice


def candidate(
    name: str, p50: float | None, foretold: float | None, fate: str = "dropped after 1 of the rungs", **more
) -> CandidateRow:
    rungs = (0.5,) if foretold else ()
    figures = {"image_size": (28, 20), "params": 1000, "recipe": "fp32", "p50_ms": p50, "p90_ms": p50, "size_bytes": 4000}
    return CandidateRow(
        name=name, rungs=rungs, foretold=foretold, fate=fate, **{"chosen": False, "front": False, **figures, **more}
    )


def chosen(names=("quick", "good", "large", "broken"), target: str = "pi"):
    quick, good, large, broken = names
    rows = (
        candidate(good, 2.0, 0.9, "chosen", chosen=True, front=True),
        candidate(quick, 1.0, 0.7, front=True),
        candidate(large, 9.0, None, "pi: p90_ms 9, the budget is 4 (2.25x)"),
        candidate(broken, None, None, "not captured", params=None, recipe="", size_bytes=None),
    )
    return sample(choice=StudentChoice(target=target, made_at="2026-01-02T03:04:05+00:00", rows=rows))


def test_everybody_has_a_row_and_those_that_were_trained_a_place():
    page = Page(render.html(chosen()))
    assert "Which student" in page.text
    for fact in ("the budget is 4", "not captured", "90.0 %", "dropped after 1", "an aid for choosing"):
        assert fact in page.text
    picture = str(choice_plot(chosen()))
    assert ">good<" in picture
    assert ">quick<" in picture
    assert ">large<" not in picture
    assert "median latency on pi" in picture
    text = render.markdown(chosen())
    assert "| good | 28 × 20 | 1,000 | fp32 | 2.00 | 2.00 |" in text  # noqa: RUF001
    assert text.index("| good") < text.index("| quick") < text.index("| large")


def test_a_plan_that_names_its_student_tells_of_no_choice():
    assert choice_plot(sample()) == ""
    assert "Which student" not in render.html(sample())
    assert "Which student" not in render.markdown(sample())


def test_without_a_forecast_there_is_a_table_and_no_picture():
    report = chosen()
    untrained = tuple(row.model_copy(update={"foretold": None}) for row in report.choice.rows)
    bare = report.model_copy(update={"choice": report.choice.model_copy(update={"rows": untrained})})
    assert choice_plot(bare) == ""
    assert "Which student" in render.html(bare)


@pytest.mark.parametrize("evil", HOSTILE)
def test_names_of_candidates_become_no_markup(evil):
    tame, page = Page(render.html(chosen(["tame"] * 4, "tame"))), Page(render.html(chosen([evil] * 4, evil)))
    assert page.tags == tame.tags
    assert page.attributes == tame.attributes
