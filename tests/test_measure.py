"""Measuring: real artifacts in real processes, side by side, and no figure that the sample does not carry."""

import random
from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import pytest
from tiny import build, write_graph

from fofa_deploy import measure as module
from fofa_deploy.config import LimitsPlan, MeasurePlan
from fofa_deploy.errors import BackendError, ChildError, IntegrityError
from fofa_deploy.measure import Candidate, Runner, _latency, measure, patient
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.runner import timing
from fofa_deploy.runner.machine import peak_rss_bytes
from fofa_deploy.runner.timing import runs_for
from fofa_deploy.types import Artifact, Budget

PLAN = MeasurePlan(seconds=0.05, max_seconds=0.2, warmup_seconds=0.01, warmup_runs=10)
LIMITS = LimitsPlan(run_seconds=60)
PROFILES = ("reference", "cpu-onnxruntime")


@pytest.fixture(scope="module")
def candidates(tmp_path_factory) -> dict[str, Candidate]:
    root = tmp_path_factory.mktemp("measure")
    graph = write_graph(root / "graph")
    return {
        name: Candidate(
            artifact=build(graph, name, root / name), profile=find_profile(name), golden=root / "graph" / "golden.npz", batch=3
        )
        for name in PROFILES
    }


@pytest.fixture(scope="module")
def measured(candidates):
    return measure([candidates[name] for name in PROFILES], PLAN, LIMITS, 0, Quiet())


@pytest.mark.parametrize("name", PROFILES)
def test_a_runner_times_every_run(candidates, name):
    runner = Runner(candidates[name])
    times = runner.block(5)
    assert len(times) == 5
    assert min(times) > 0
    described = runner.describe()
    assert described["artifact_sha256"] == Artifact.load(candidates[name].artifact).sha256
    assert described["cold_start_ms"] > max(times) / 1e6
    assert described["device"]


@pytest.mark.parametrize("batch", [1, 3])
def test_a_runtime_is_told_of_the_measured_batch_size_alone(candidates, monkeypatch, batch):
    """OpenVINO compiles a model for each that it is told of, and one for any other, which is slower."""
    real, told = module.get_backend("onnxruntime"), []

    class Watched:
        def load(self, artifact, profile):
            told.append(profile.execution.batch_sizes)
            return real.load(artifact, profile)

    monkeypatch.setattr(module, "get_backend", lambda name: Watched())
    Runner(candidates["cpu-onnxruntime"].model_copy(update={"batch": batch}))
    assert told == [(batch,)]


def test_progress_is_the_share_of_what_is_to_be_measured(candidates):
    """Candidates end together: counting those that have, a bar would stand still until all have."""
    steps: list[int] = []

    class Told(Quiet):
        @contextmanager
        def task(self, name: str, total: int, done: int = 0):
            assert total == 100
            yield SimpleNamespace(advance=steps.append)

    measure([candidates[name] for name in PROFILES], PLAN, LIMITS, 0, Told())
    assert sum(steps) == 100
    assert min(steps) >= 0
    assert max(steps) < 100


@pytest.mark.parametrize(
    ("runs", "ms", "share"),
    [(100, 1, 0.1), (500, 1, 0.5), (1000, 1, 1.0), (100, 10, 0.5), (10, 100, 0.5), (20, 100, 1.0), (1000, 9, 1.0)],
)
def test_a_sample_is_whole_by_time_and_runs_or_by_the_most_time(runs, ms, share):
    assert timing.share([ms * 1_000_000] * runs, 1.0, 2.0) == pytest.approx(share)


def test_garbage_collection_waits_and_comes_back(candidates):
    import gc

    runner = Runner(candidates["reference"])
    seen = []
    run = runner._session.run
    runner._session.run = lambda feeds: seen.append(gc.isenabled()) or run(feeds)
    runner.block(2)
    assert seen == [False] * 4, "two of them are to settle"
    assert gc.isenabled()


def test_two_candidates_get_a_figure_each_with_its_conditions(measured, candidates):
    for name, found in zip(PROFILES, measured, strict=True):
        assert found.artifact_sha256 == Artifact.load(candidates[name].artifact).sha256
        latency = found.latency_ms
        assert 0 < latency.min <= latency.p50 <= (latency.p90 or latency.p50)
        assert found.batch == 3
        assert found.throughput_sps == pytest.approx(3e3 / latency.mean)
        assert found.warmup_runs >= 10
        assert found.threads == candidates[name].profile.execution.thread_count
        assert found.energy_reason
        assert found.cold_start_ms > found.load_ms + found.first_run_ms > 0


def test_the_slower_runtime_is_slower(measured):
    reference, onnxruntime = measured
    assert reference.latency_ms.min > onnxruntime.latency_ms.min


def watched(monkeypatch) -> list[module.Child]:
    """Whose block is timed, in the order of time."""
    calls, real = [], module.Child.call

    def spy(self, method, **arguments):
        if method == "block":
            calls.append(self)
        return real(self, method, **arguments)

    monkeypatch.setattr(module.Child, "call", spy)
    return calls


def test_a_slow_and_a_fast_candidate_are_measured_side_by_side_to_the_end(candidates, monkeypatch):
    calls = watched(monkeypatch)
    plan = PLAN.model_copy(update={"seconds": 0.5, "max_seconds": 2.0})
    slow, fast = measure([candidates[name] for name in PROFILES], plan, LIMITS, 0, Quiet())
    assert slow.latency_ms.min > 2 * fast.latency_ms.min
    last = {child: place for place, child in enumerate(calls)}
    assert min(last.values()) > 0.8 * len(calls), "one left the other alone"


def test_blocks_alternate_in_an_order_that_changes(candidates, monkeypatch):
    calls = watched(monkeypatch)
    monkeypatch.setattr(timing, "BLOCK_SECONDS", 0.002)
    measure([candidates["reference"]] * 2, PLAN, LIMITS, 0, Quiet())
    first, second = set(calls)
    assert {(first, second), (second, first)} <= set(zip(calls[::2], calls[1::2], strict=False))


def test_how_many_runs_a_percentile_needs():
    assert [runs_for(q) for q in (0.9, 0.95, 0.99)] == [64, 130, 662]


@pytest.mark.parametrize(
    ("runs", "there"),
    [(63, set()), (64, {"p90"}), (129, {"p90"}), (130, {"p90", "p95"}), (661, {"p90", "p95"}), (662, {"p90", "p95", "p99"})],
)
def test_a_percentile_without_enough_runs_is_none(runs, there):
    latency = _latency(np.arange(1, runs + 1, dtype=np.float64))
    assert {name for name in ("p90", "p95", "p99") if getattr(latency, name) is not None} == there
    assert (latency.min, latency.mean, latency.p50) == (1, (runs + 1) / 2, (runs + 1) / 2)


def test_percentiles_are_percentiles():
    latency = _latency(np.asarray(random.Random(0).sample(range(1, 1002), 1001), np.float64))
    assert (latency.p90, latency.p95, latency.p99) == (901, 951, 991)


def test_one_that_dies_is_its_error_and_the_other_goes_on(candidates, tmp_path):
    bad = candidates["reference"].model_copy(update={"golden": tmp_path / "gone.npz"})
    found = measure([bad, candidates["cpu-onnxruntime"], bad], PLAN, LIMITS, 0, Quiet())
    assert [type(entry) for entry in found] == [ChildError, type(found[1]), ChildError]
    assert "FileNotFoundError" in found[0].message
    assert found[1].runs > 0


@pytest.mark.parametrize("when", ["block", "describe"])
def test_one_that_is_killed_on_the_way_is_its_error_and_the_other_goes_on(candidates, monkeypatch, when):
    real, killed = module.Child.call, []

    def kill(self, method, **arguments):
        if method == when and (not killed or killed == [self]) and (when == "describe" or arguments["runs"] != 5):
            killed[:] = [self]
            self._process.kill()
        return real(self, method, **arguments)

    monkeypatch.setattr(module.Child, "call", kill)
    found = measure([candidates["reference"], candidates["cpu-onnxruntime"]], PLAN, LIMITS, 0, Quiet())
    (error,) = (entry for entry in found if isinstance(entry, ChildError))
    assert "SIGKILL" in error.message
    (other,) = (entry for entry in found if not isinstance(entry, ChildError))
    assert other.runs > 0


def test_an_altered_artifact_is_never_loaded(candidates, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(candidates["reference"].artifact, folder)
    content = bytearray((folder / "model.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "model.onnx").write_bytes(content)
    altered = candidates["reference"].model_copy(update={"artifact": folder})
    (found,) = measure([altered], PLAN, LIMITS, 0, Quiet())
    assert isinstance(found, IntegrityError)


def test_a_device_that_is_not_here_is_an_error_and_no_figure(candidates):
    profile = find_profile("cpu-openvino").model_copy(update={"runtime": "no-such"})
    elsewhere = candidates["cpu-onnxruntime"].model_copy(update={"profile": profile})
    (found,) = measure([elsewhere], PLAN, LIMITS, 0, Quiet())
    assert not isinstance(found, BackendError)  # the artifact names its back end, a profile cannot swap it
    assert found.artifact_sha256


def test_peak_memory_is_the_childs_own(candidates):
    ballast = np.ones(400 << 20, np.uint8)
    (found,) = measure([candidates["reference"]], PLAN, LIMITS, 0, Quiet())
    assert peak_rss_bytes() > ballast.nbytes
    assert 10 << 20 < found.peak_rss_bytes < ballast.nbytes


def test_memory_that_was_only_asked_for_does_not_count():
    before = peak_rss_bytes()
    untouched = np.empty(2 << 30, np.uint8)
    assert peak_rss_bytes() - before < untouched.nbytes // 4


def test_nothing_to_measure_is_no_error():
    assert measure([], PLAN, LIMITS, 0, Quiet()) == []


def test_a_limit_on_p90_gets_the_time_that_so_many_runs_take():
    plan, few = MeasurePlan(), Budget()
    assert patient(plan, few) == plan
    assert patient(plan, few, Budget(p90_ms=1000.0), Budget(p90_ms=5000.0)).max_seconds == runs_for(0.9)
    assert patient(plan, Budget(p90_ms=1.0)) == plan
