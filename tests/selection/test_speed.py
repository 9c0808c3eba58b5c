"""Real graphs, built and timed on ONNX Runtime."""

from contextlib import ExitStack

import pytest
from tiny import write_graph

from fofa_deploy.config import AccuracyPlan, LimitsPlan, MeasurePlan
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.select import speed
from fofa_deploy.select.speed import Stopwatch
from fofa_deploy.select.table import LatencyTable
from fofa_deploy.store import Store
from fofa_deploy.tune import Evidence, Settings
from fofa_deploy.tune.workbench import Workbench
from fofa_deploy.types import Budget, Graph, Precision

QUICK = MeasurePlan(seconds=0.05, max_seconds=0.2, warmup_seconds=0.01, warmup_runs=5)
SETTINGS = Settings(AccuracyPlan(), QUICK, LimitsPlan(run_seconds=60), Budget(), 0)
PROFILE = find_profile("cpu-onnxruntime").model_copy(update={"precisions": (Precision.FP32,)})


@pytest.fixture
def opened(tmp_path):
    """A function: names -> benches in a folder; ``broken`` gets a graph that is none."""
    with ExitStack() as stack:

        def open_all(folder, *names):
            return {name: bench(stack.enter_context(Store(tmp_path / folder / name)), name) for name in names}

        yield open_all


def bench(store, name):
    graph = write_graph(store.root / "graph")
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
