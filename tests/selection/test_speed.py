"""Real graphs, built here and timed on ONNX Runtime: here, and on a device behind a real SSH server."""

import os
import shutil
import sys
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import onnx
import pytest
import remote_sshd
from tiny import write_graph

from fofa_deploy import environment
from fofa_deploy.backend import get_backend
from fofa_deploy.config import AccuracyPlan, LimitsPlan, MeasurePlan
from fofa_deploy.errors import BackendError, FofaError
from fofa_deploy.measure import patient, runs_for
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.select import speed
from fofa_deploy.select.clocks import Here
from fofa_deploy.select.speed import Stopwatch
from fofa_deploy.select.table import Entry, Figures, LatencyTable
from fofa_deploy.store import Store
from fofa_deploy.tune import Evidence, Settings
from fofa_deploy.tune.workbench import Workbench
from fofa_deploy.types import Artifact, Budget, Graph, Precision

QUICK = MeasurePlan(seconds=0.05, max_seconds=0.2, warmup_seconds=0.01, warmup_runs=5)
SETTINGS = Settings(AccuracyPlan(), QUICK, LimitsPlan(run_seconds=60), Budget(), 0)
PROFILE = find_profile("cpu-onnxruntime").model_copy(update={"precisions": (Precision.FP32,)})


@pytest.fixture
def opened(tmp_path):
    """A function: names -> benches in a folder, each with a graph of its own; ``broken`` gets one that is none."""
    with ExitStack() as stack:

        def open_all(folder, *names):
            return {name: bench(stack.enter_context(Store(tmp_path / folder / name)), name) for name in names}

        yield open_all


def bench(store, name):
    graph = write_graph(store.root / "graph")
    model = onnx.load(graph.path)
    model.doc_string = name
    onnx.save(model, graph.path)
    if name == "broken":
        graph.path.write_bytes(b"not a graph")
    folder = store.root / "graph"
    return Workbench(store, folder, Evidence(folder / "golden.npz"), None, SETTINGS, Quiet(), Graph.load(folder))


def built(root):
    return [path for path in root.rglob("artifacts") if path.is_dir()]


def test_what_runs_is_timed_and_what_cannot_be_built_is_told_with_its_reason(opened, tmp_path):
    found = Stopwatch(opened("run", "good", "broken"), PROFILE, LatencyTable(tmp_path / "aid")).speeds()
    assert [one.name for one in found.found] == ["good"]
    assert found.found[0].p50_ms > 0
    assert found.found[0].size_bytes > 0
    assert found.reasons["good"] == {}
    assert all(found.reasons["broken"].values())
    assert found.reasons["broken"]


def test_the_aid_spares_the_second_selection_every_build(opened, tmp_path):
    table = LatencyTable(tmp_path / "aid")
    first = Stopwatch(opened("one", "good"), PROFILE, table).speeds()
    second = Stopwatch(opened("two", "good"), PROFILE, table).speeds()
    assert second.found == first.found
    assert built(tmp_path / "one")
    assert not built(tmp_path / "two")
    other = PROFILE.model_copy(update={"description": "another"})
    Stopwatch(opened("three", "good"), other, table).speeds()
    assert built(tmp_path / "three")


def test_groups_share_their_first_artifact_and_nobody_is_lost(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "GROUP", 2)
    found = Stopwatch(opened("run", "a", "b", "c"), PROFILE, LatencyTable(tmp_path / "aid"))
    assert {one.name for one in found.speeds().found} == {"a", "b", "c"}


def test_dear_recipes_are_built_of_those_alone_that_do_not_fit_by_the_others(tmp_path, opened):
    np.save(tmp_path / "images.npy", np.random.default_rng(0).integers(0, 256, (32, 1, 4, 4), np.uint8))
    found = find_profile("cpu-openvino")
    profile = found.model_copy(update={"precisions": (Precision.FP32, Precision.INT8)})
    benches = {name: replace(one, calibration=tmp_path) for name, one in opened("run", "fits", "misses").items()}
    dear = {recipe.name for recipe in get_backend("openvino").recipes(profile, benches["fits"].graph) if recipe.dear}
    assert dear
    found = Stopwatch(benches, profile, LatencyTable(tmp_path / "aid")).speeds(lambda speed: speed.name == "fits")
    assert {one.name for one in found.found} == {"fits", "misses"}
    tried = {name: {path.name for path in (tmp_path / "run" / name / "artifacts" / profile.name).iterdir()} for name in benches}
    assert "fp32" in tried["fits"]
    assert any(name.startswith("int8-qdq") for name in tried["fits"])
    assert not tried["fits"] & dear
    assert (tried["misses"] | set(found.reasons["misses"])) & dear


class Losing(Here):
    """This machine's clock, which sees artifacts damaged on disk before its n-th group: their models are cut short."""

    def __init__(self, name, before):
        self.name, self.before, self.calls = name, before, 0

    def times(self, group, settings, progress):
        self.calls += 1
        for candidate in group:
            if self.calls == self.before and self.name in candidate.artifact.parts:
                Artifact.load(candidate.artifact).path.write_bytes(b"")
        return super().times(group, settings, progress)


def test_a_reference_that_stops_running_ends_the_timing_and_leaves_nothing_unscaled(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "GROUP", 2)
    table = LatencyTable(tmp_path / "aid")
    with pytest.raises(BackendError, match="a ran before and does not now"):
        Stopwatch(opened("run", "a", "b", "c"), PROFILE, table, Losing("a", 2)).speeds()
    assert len(list(table.folder.rglob("*.json"))) == 1, "only what was timed while the reference ran"


def test_where_the_first_does_not_run_the_next_is_the_reference(opened, tmp_path, monkeypatch):
    monkeypatch.setattr(speed, "GROUP", 2)
    found = Stopwatch(opened("run", "a", "b", "c"), PROFILE, LatencyTable(tmp_path / "aid"), Losing("a", 1)).speeds()
    assert {one.name for one in found.found} == {"b", "c"}
    assert found.reasons["a"]


# --- elsewhere


@pytest.fixture
def board(tmp_path, monkeypatch):
    """A server that plain ``ssh`` reaches as board, as it would by a user's own configuration; and a profile that is on it."""
    if remote_sshd.SSHD is None:
        pytest.skip("sshd is not installed (Debian: apt-get install openssh-server)")
    server = remote_sshd.start(tmp_path)
    (tmp_path / "bin").mkdir()
    command = tmp_path / "bin" / "ssh"
    command.write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {server.config} "$@"\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    device = PROFILE.device.model_copy(update={"host": "board", "python": sys.executable})
    yield server, PROFILE.model_copy(update={"name": "board", "device": device})
    server.process.terminate()
    server.process.wait(20)


def test_candidates_of_a_device_elsewhere_are_timed_there_and_kept_by_its_fingerprint(opened, tmp_path, board):
    server, profile = board
    table = LatencyTable(tmp_path / "aid")
    stopwatch = Stopwatch(opened("run", "good", "broken"), profile, table)
    there = stopwatch.fingerprint
    assert there != environment.describe().fingerprint, "the device tells fewer packages than this process"
    found = stopwatch.speeds()
    assert [one.name for one in found.found] == ["good"]
    assert found.found[0].p50_ms > 0
    assert found.reasons["broken"]
    (kept,) = table.folder.rglob("*.json")
    assert Entry.model_validate_json(kept.read_bytes()).setting.fingerprint == there
    assert server.left() == []


def test_the_aid_spares_a_device_its_second_selection(opened, tmp_path, board):
    table = LatencyTable(tmp_path / "aid")
    first = Stopwatch(opened("one", "good"), board[1], table).speeds()
    assert Stopwatch(opened("two", "good"), board[1], table).speeds().found == first.found
    assert not built(tmp_path / "two")


def test_a_device_that_does_not_answer_is_told_before_anything_is_built(opened, tmp_path, board):
    _, profile = board
    dead = profile.model_copy(update={"device": profile.device.model_copy(update={"host": "dead"})})
    with pytest.raises(FofaError, match="dead"):
        Stopwatch(opened("run", "good"), dead, LatencyTable(tmp_path / "aid"))
    assert not built(tmp_path / "run")


def test_a_device_that_is_lost_on_the_way_ends_the_selection_and_disqualifies_nobody(opened, tmp_path, board):
    server, profile = board
    table = LatencyTable(tmp_path / "aid")
    stopwatch = Stopwatch(opened("run", "good"), profile, table)
    server.process.terminate()
    server.process.wait(20)
    with pytest.raises(BackendError, match="board"):
        stopwatch.speeds()
    assert not list(table.folder.rglob("*.json"))


# --- what counts


def test_a_target_of_another_cpu_has_no_clock_here(opened, tmp_path):
    """The back end alone would say that it runs: it knows of no architecture."""
    other = "x86_64" if environment.describe().machine == "aarch64" else "aarch64"
    profile = PROFILE.model_copy(update={"device": PROFILE.device.model_copy(update={"architecture": other})})
    with pytest.raises(BackendError, match=f"does not run here: needs an {other} CPU"):
        Stopwatch(opened("run", "good"), profile, LatencyTable(tmp_path / "aid"))


def within(benches, **limits):
    """The same benches under a plan's budget."""
    settings = replace(SETTINGS, budget=Budget(**limits))
    return {name: replace(one, settings=settings) for name, one in benches.items()}


def test_a_limit_on_p90_has_those_measured_again_that_had_too_few_runs_for_one(opened, tmp_path):
    table, benches = LatencyTable(tmp_path / "aid"), opened("run", "good")
    stopwatch = Stopwatch(benches, PROFILE, table)
    stopwatch.speeds()
    (entry,) = stopwatch._entries("good", benches["good"])
    lacking = table.find(entry.setting).model_copy(update={"p90_ms": None, "p50_ms": 500.0})
    table.keep(entry.setting, lacking)
    assert stopwatch.speeds().found[0].p90_ms is None, "nobody asks for it"
    assert Stopwatch(within(benches, p90_ms=600.0), PROFILE, table).speeds().found[0].p90_ms > 0


def test_what_was_timed_at_a_busy_moment_is_not_out_for_good(opened, tmp_path):
    table, benches = LatencyTable(tmp_path / "aid"), opened("run", "good")
    first = Stopwatch(benches, PROFILE, table)
    first.speeds()
    (entry,) = first._entries("good", benches["good"])
    busy = table.find(entry.setting).model_copy(update={"p50_ms": 500.0, "p90_ms": 600.0})
    table.keep(entry.setting, busy)
    for limits in ({"p90_ms": 700.0}, {"size_bytes": 1}):
        assert Stopwatch(within(benches, **limits), PROFILE, table).speeds().found[0].p50_ms == 500.0, "no time is missed"
    again = Stopwatch(within(benches, p90_ms=100.0), PROFILE, table)
    assert again.speeds().found[0].p90_ms < 100
    table.keep(entry.setting, busy)
    assert again.speeds().found[0].p50_ms == 500.0, "once is enough"


def test_whoever_may_keep_the_limit_is_given_the_time_for_a_p90(opened, tmp_path):
    benches, table = opened("run", "good"), LatencyTable(tmp_path / "aid")
    longest = {
        limit: patient(SETTINGS.measure, *Stopwatch(within(benches, p90_ms=limit), PROFILE, table)._limits).max_seconds
        for limit in (None, 1.0, 100.0)
    }
    assert longest == {None: QUICK.max_seconds, 1.0: QUICK.max_seconds, 100.0: runs_for(0.9) * 0.1}


def test_a_slower_recipe_that_fits_counts_before_a_faster_one_that_does_not(opened, tmp_path):
    profile = find_profile("cpu-openvino").model_copy(update={"precisions": (Precision.FP32, Precision.INT8)})
    table, benches = LatencyTable(tmp_path / "aid"), opened("run", "good")
    stopwatch = Stopwatch(benches, profile, table)
    entries = sorted(stopwatch._entries("good", benches["good"]), key=lambda entry: entry.recipe.dear)
    assert not entries[1].recipe.dear
    for number, entry in enumerate(entries):
        figures = Figures(p50_ms=1.0 + number, p90_ms=None, throughput_sps=1.0, size_bytes=100 - number, peak_rss_bytes=1)
        table.keep(entry.setting, figures)
    assert stopwatch.speeds().recipes == {"good": entries[0].recipe.name}
    assert stopwatch.speeds(lambda one: one.size_bytes < 100).recipes == {"good": entries[1].recipe.name}
    assert stopwatch.speeds(lambda one: False).recipes == {"good": entries[0].recipe.name}
