"""Rows from devices: none is lost, none is doubled, one per target is the chosen one."""

from test_report import chosen_row, row, sample, write_report
from tiny import build, write_graph

from fofa_deploy.report.elsewhere import joined, kept
from fofa_deploy.types import Artifact, Status


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


def test_a_target_that_the_plan_has_no_more_is_not_kept(tmp_path):
    mine = row(target="pi", recipe="int8", sha256="sha of int8")
    before = row(target="cpu-onnxruntime", recipe="int8", sha256="sha of int8", p50=1.0, chosen=True)
    write_report(sample(targets=(mine, before)), tmp_path)
    assert kept(tmp_path, [mine], {"pi"}) == []


def test_what_was_built_for_a_device_alone_is_kept_while_its_graph_is_there(tmp_path):
    graph = write_graph(tmp_path / "graph")
    artifact = Artifact.load(build(graph, "cpu-onnxruntime", tmp_path / "artifacts" / "jetson" / "fp16"))
    told = {"sha256": artifact.sha256, "artifact": "artifacts/jetson/fp16"}
    there = row(target="jetson at home", recipe="fp16", p50=1.0, chosen=True, **told)
    skipped = row(target="jetson", recipe="fp16", status=Status.SKIPPED, sha256=None)
    write_report(sample(targets=(skipped, there)), tmp_path)
    assert kept(tmp_path, [skipped], {"jetson"}) == [there]
    (tmp_path / "graph" / "model.onnx").write_bytes(b"of another student")
    assert kept(tmp_path, [skipped], {"jetson"}) == []
