"""Rows from devices: none is lost, none is doubled, one per target is the chosen one."""

from test_report import chosen_row, row, sample, write_report

from fofa_deploy.report.elsewhere import joined, kept
from fofa_deploy.types import Status


def measured_there(recipe, p50, **more):
    return row(target="pi on a desk", recipe=recipe, p50=p50, chosen=True, sha256=f"sha of {recipe}", **more)


def test_a_device_measured_again_has_its_newest_row():
    before = (chosen_row(), measured_there("int8", 9.0))
    found = joined(before, [measured_there("int8", 7.0)])
    assert [(one.target, one.latency_ms.p50) for one in found[1:]] == [("pi on a desk", 7.0)]
    assert found[0] == before[0]


def test_of_several_recipes_from_one_device_the_fastest_is_chosen_whatever_came_last():
    first = joined((chosen_row(),), [measured_there("int8", 7.0)])
    second = joined(first, [measured_there("fp32", 9.0)])
    assert {one.recipe: one.chosen for one in second[1:]} == {"int8": True, "fp32": False}
    assert second[0].chosen, "another target's"


def test_a_run_that_is_finished_anew_keeps_what_devices_told_of_artifacts_it_still_has(tmp_path):
    mine = row(target="pi", recipe="int8", status=Status.BUILT_NOT_RUN, sha256="sha of int8")
    there = measured_there("int8", 7.0), measured_there("fp32", 9.0)
    assert kept(tmp_path, [mine], {"pi"}) == [], "there is no report yet"
    write_report(sample(targets=(mine, *there)), tmp_path)
    assert kept(tmp_path, [mine], {"pi"}) == [there[0]], "the other one's artifact is gone"
