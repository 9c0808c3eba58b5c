"""The benchmark against other tools: its peers really build, its races tell slow from fast, its goals can be missed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny

from fofa_deploy.isolate import run_isolated
from fofa_deploy.measure import Candidate
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.results import Comparison
from fofa_deploy.types import Precision
from fofa_deploy.verify import Verification, VerifyRequest

FOLDER = Path(__file__).parent.parent / "benchmarks" / "peers"
sys.path.append(str(FOLDER))
import backends  # noqa: E402 - from the benchmark's folder
import standings  # noqa: E402
from contest import Lap, Rounds, contest  # noqa: E402
from entries import LIMITS, Entry, Field  # noqa: E402
from peers import PEERS, NotBuiltError, Peer, build, peers_for  # noqa: E402
from verdict import Goal, Race, goals, ratio  # noqa: E402

HEATS, ROUNDS = 8, 3


def lap(ms: float, seed: int = 0, noise: float = 0.0, drift: np.ndarray | float = 1.0, luck: float = 0.0) -> Lap:
    """Blocks of a candidate that takes so long: noise of its own, a disturbance that is everybody's, and luck for each process."""
    rng = np.random.default_rng(seed)
    own = 1 + noise * rng.standard_normal((HEATS, ROUNDS)) + luck * rng.standard_normal((HEATS, 1))
    return Lap(setting="x", heats_ms=tuple(map(tuple, ms * own * drift)), screened_ms={"x": ms})


def entry(name: str, side: str, top1: float, agreement: float, **more: object) -> Entry:
    tested = Comparison(samples=100, finite=True, top1=top1, agreement=agreement, cosine=0.99)
    return Entry(name=name, side=side, runtime="onnxruntime", description=name, folder=Path("/x"), tested=tested, **more)


def field(*entries: Entry) -> Field:
    return Field(model="m", parameters=1, labelled=True, images=100, top1=0.9, entries=entries)


def race(chosen: tuple[str, ...] = ("onnxruntime/deployed",), **laps: Lap) -> Race:
    return Race(target="cpu-onnxruntime", laps={k.replace("__", "/"): v for k, v in laps.items()}, missing={}, chosen=chosen)


# --- ratios and goals


def test_a_ratio_is_told_through_a_disturbance_that_hits_all():
    drift = np.where(np.arange(HEATS * ROUNDS) % 5 == 0, 3.0, 1.0).reshape(HEATS, ROUNDS)
    found = ratio([lap(2.0, 1, 0.01, drift)], [lap(1.0, 2, 0.01, drift)])
    assert found.low < found.value < found.high
    assert found.low == pytest.approx(2.0, rel=0.03)
    assert found.high == pytest.approx(2.0, rel=0.03)


def test_a_ratio_over_several_is_their_geometric_mean():
    fast = lap(1.0)
    assert ratio([lap(2.0), lap(8.0)], [fast, fast]).value == pytest.approx(4.0)


DEPLOYED = entry("deployed", "ours", 0.9, 0.99)


@pytest.mark.parametrize(("ms", "met"), [(0.5, "yes"), (1.0, "open"), (2.0, "no")])
def test_at_accuracy_the_deployed_meets_the_fastest_peer_that_keeps_it(ms, met):
    peers = entry("good", "peer", 0.895, 0.97), entry("broken", "peer", 0.5, 0.5)
    laps = {"onnxruntime__deployed": lap(ms, 1, 0.05), "good": lap(1.0, 2, 0.05), "broken": lap(0.1)}
    found = goals(field(DEPLOYED, *peers), race(**laps))[0]
    assert (found.peer, found.met) == ("good", met)


def test_the_fastest_peer_of_all_is_met_by_ours_that_are_as_close():
    fast, peer = entry("fast", "ours", 0.7, 0.7), entry("broken", "peer", 0.5, 0.5)
    laps = {"onnxruntime__deployed": lap(1.0), "onnxruntime__fast": lap(0.3), "broken": lap(0.5)}
    found = goals(field(DEPLOYED, fast, peer), race(**laps))[1]
    assert (found.ours, found.peer, found.met) == ("onnxruntime/fast", "broken", "yes")
    closer = goals(field(DEPLOYED, fast, entry("broken", "peer", 0.8, 0.8)), race(**laps))[1]
    assert (closer.ours, closer.met) == ("onnxruntime/deployed", "no")


def test_the_defaults_are_met_on_the_geometric_mean_and_nothing_deployed_meets_nothing():
    peers = entry("a", "peer", 0.9, 0.9, default=True), entry("b", "peer", 0.9, 0.9, default=True), entry("c", "peer", 0.9, 0.9)
    laps = {"onnxruntime__deployed": lap(1.0), "a": lap(4.0), "b": lap(1.0), "c": lap(0.1)}
    found = goals(field(DEPLOYED, *peers), race(**laps))[2]
    assert found.ratio
    assert (found.peer, found.met, round(found.ratio.value, 6)) == ("a, b", "yes", 2.0)
    assert goals(field(DEPLOYED, *peers), race(chosen=(), **laps))[2].met == "no"


# --- peers that really build


def job(folder: Path) -> Path:
    graph = tiny.write_graph(folder / "graph")
    images = tiny.PREPROCESSING.apply(tiny.pixels(8))
    np.save(folder / "images.npy", images)
    np.save(folder / "labels.npy", (images.reshape(8, -1) @ tiny.weights()).argmax(1))
    told = {"graph": str(graph.path), "sha256": graph.sha256, "input": "images", "transformer": False, "saturating": True}
    told |= {name: str(folder / "images.npy") for name in ("calibration", "validation")}
    told |= {"labels": str(folder / "labels.npy"), "weights": "", "model": "", "arguments": {}, "heads": 0, "width": 0}
    path = folder / "job.json"
    path.write_text(json.dumps(told))
    return path


def named(name: str) -> Peer:
    return next(peer for peer in PEERS if peer.name == name)


@pytest.fixture(autouse=True)
def registered(tmp_path, monkeypatch):
    """Child processes find the benchmark's back ends; nothing of it outlives the test."""
    for name in ("PYTHONPATH", "TORCHINDUCTOR_CACHE_DIR"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    backends.register(tmp_path / "registered")


@pytest.mark.parametrize(("name", "profile"), [("ort-static-best", "cpu-onnxruntime"), ("nncf-default", "cpu-openvino")])
def test_a_peer_builds_an_artifact_that_answers_nearly_as_the_model_does(tmp_path, name, profile):
    artifact, took = build(named(name), job(tmp_path), tmp_path / name, tmp_path)
    assert took["seconds"] > 0
    golden = tmp_path / "graph" / "golden.npz"
    request = VerifyRequest(artifact=artifact.folder, profile=find_profile(profile), golden=golden)
    found = run_isolated("fofa_deploy.verify:verify", request, Verification, seconds=120).golden
    assert found.cosine is not None
    assert 0.95 < found.cosine < 1 - 1e-7, "int8 is near the model, and not the model itself"
    stamp = (artifact.folder / "build.json").stat().st_mtime_ns
    build(named(name), job(tmp_path), tmp_path / name, tmp_path)
    assert (artifact.folder / "build.json").stat().st_mtime_ns == stamp, "built once"


def test_a_peer_that_fails_is_told_by_its_own_last_line(tmp_path):
    path = job(tmp_path)
    (tmp_path / "graph" / "model.onnx").write_bytes(b"no model")
    with pytest.raises(NotBuiltError, match=r"Error|INVALID|protobuf"):
        build(named("ort-static-default"), path, tmp_path / "out", tmp_path)


def test_tools_for_transformers_are_left_out_elsewhere():
    there = {peer.name for peer in peers_for({"onnxruntime"}, transformer=True)}
    elsewhere = {peer.name for peer in peers_for({"onnxruntime"}, transformer=False)}
    assert there - elsewhere == {"ort-transformers-fp32", "ort-transformers-dynamic"}
    assert len({peer.name for peer in PEERS}) == len(PEERS)


# --- the race and the page


def test_a_race_counts_the_better_setting_and_tells_who_could_not_start(tmp_path):
    golden = tiny.write_graph(tmp_path / "graph").path.parent / "golden.npz"
    artifact, profile = (
        tiny.build(tiny.Graph.load(golden.parent), "cpu-onnxruntime", tmp_path / "a"),
        find_profile("cpu-onnxruntime"),
    )
    one, many = (Candidate(artifact=artifact, profile=profile, golden=golden, batch=batch) for batch in (1, 100_000))
    gone = Candidate(artifact=tmp_path / "gone", profile=profile, golden=golden)
    entries = {"both": {"many": many, "one": one}, "gone": {"x": gone}}
    laps, missing = contest(entries, Rounds(screening=2, heats=2, counting=3), LIMITS, 0, Quiet())
    assert laps["both"].setting == "one"
    assert [len(heat) for heat in laps["both"].heats_ms] == [3, 3]
    assert set(laps["both"].screened_ms) == {"many", "one"}
    assert set(missing) == {"gone"}


def test_the_page_tells_the_goals_and_everybody_that_raced_or_could_not(tmp_path):
    peer = entry("peer", "peer", 0.9, 0.99, default=True, build_seconds=3.0, precision=Precision.INT8)
    absent = Entry(name="absent", side="peer", runtime="onnxruntime", description="", failure="does not install: no wheel")
    found, run = field(DEPLOYED, peer, absent), race(onnxruntime__deployed=lap(1.0), peer=lap(3.0))
    record = {
        "environment": {"cpu": "c", "cores": 2, "os": "o", "python": "3", "versions": {"torch": "2"}},
        "models": [
            {
                "field": found.model_dump(mode="json"),
                "races": [run.model_dump(mode="json")],
                "goals": {run.target: [goal.model_dump() for goal in goals(found, run)]},
            }
        ],
    }
    standings.write(record, tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert "**ours: onnxruntime/deployed** (deployed)" in page
    assert "3.00 [3.00, 3.00] | yes" in page
    assert "does not install: no wheel" in page
    assert (tmp_path / "m.svg").stat().st_size > 1000
    assert Goal.model_validate(record["models"][0]["goals"][run.target][0]).met == "yes"
