"""The benchmark of distillation methods: tests over seeds, equal compute, and a real quick run that leaves the record alone."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from scipy import stats

FOLDER = Path(__file__).parent.parent / "benchmarks" / "distillation"
FASHION = Path("/usr/share/datasets/fashion-mnist")
before = list(sys.path)
sys.path.insert(0, str(FOLDER))
import evidence  # noqa: E402 - from the benchmark's folder
import goals  # noqa: E402
import run  # noqa: E402
import study  # noqa: E402

sys.path[:] = before  # the benchmarks' modules have common names
for name in ("evidence", "goals", "report", "run", "study"):
    del sys.modules[name]

SMALL, LONG = study.REGIMES["small"], study.REGIMES["long"]


def scores(*seeds: tuple[float, float]) -> dict[tuple[str, int], float]:
    """Accuracies on two pairs, by seed."""
    return {(pair, seed): value for seed, both in enumerate(seeds) for pair, value in zip("ab", both, strict=True)}


def test_a_seed_is_one_number():
    one, other = scores((0.9, 0.5), (0.8, 0.7), (0.9, 0.6)), scores((0.8, 0.5), (0.8, 0.6), (0.6, 0.6))
    difference, p, seeds = evidence.paired(one, other)
    by_seed = [0.05, 0.05, 0.15]
    assert (difference, seeds) == (pytest.approx(sum(by_seed) / 3), 3)
    assert p == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue)


def test_only_seeds_that_all_pairs_have_are_compared():
    one, other = scores((0.9, 0.5), (0.8, 0.7)), scores((0.8, 0.5), (0.8, 0.6))
    del one["a", 1]
    assert evidence.paired(one, other) == (pytest.approx(0.05), None, 1)
    del one["a", 0]
    assert evidence.paired(one, other) is None


def test_p_is_corrected_by_holm():
    assert evidence.holm({"x": 0.01, "y": 0.04, "z": 0.03, "unknown": None}) == pytest.approx({"x": 0.03, "z": 0.06, "y": 0.06})


def test_pairs_may_be_the_sample():
    one = {(pair, seed): 0.8 + 0.01 * seed for pair in "abc" for seed in range(2)}
    other = {("a", 0): 0.7, ("b", 1): 0.75, ("c", 0): 0.78, ("c", 1): 0.75}
    assert evidence.across_pairs(one, other) == pytest.approx(stats.ttest_1samp([0.1, 0.06, 0.04], 0).pvalue)
    assert evidence.across_pairs({block: 0.5 for block in one if block[0] != "c"}, other) is None


# --- goals


def trained(method: str, pair: study.Pair, seed: int, test: float, **more) -> dict:
    told = {"phase": "compare", "regime": "small", "plan": {}, "epochs": SMALL.epochs[pair.student], "validation": test}
    return {**told, "pair": pair.name, "method": method, "seed": seed, "test": test, **more}


def record(lead: float, drop: float) -> list[dict]:
    """Four seeds in which the default is ahead of all by ``lead``, and of RSD by less; its teacher forgets ``drop``."""
    lines = [
        {"phase": "teacher", "teacher": kind, "epochs": SMALL.teacher_epochs, "test": 0.9} for kind in ("cnn", "mixer", "hybrid")
    ]
    for seed, pair in product(range(4), study.PAIRS):
        base = 0.8 + 0.001 * seed
        told = {"drift_nats": 0.1, "teacher_top1": 0.9, "prompted_top1": 0.9 - drop}
        lines.append(trained(study.DEFAULT, pair, seed, base + lead, diagnostics=told))
        lines += [trained(name, pair, seed, base + 0.0001 * (-1) ** seed) for name in ("alone", "KD", "OFA")]
        lines.append(trained("RSD", pair, seed, base + lead - (0.001, 0.02, -0.001, 0.01)[seed]))
        if seed == 0:
            twice = trained("alone, twice the epochs", pair, seed, base + 0.004)
            lines.append({**twice, "epochs": 2 * twice["epochs"]})
    return lines


def verdicts(lines: list[dict]) -> dict[str, bool]:
    return {goal: met for goal, _, met in goals._rows(lines, SMALL)}


def test_goals_are_held_to_the_record():
    met = verdicts(record(lead=0.03, drop=0.004))
    assert {goal for goal, reached in met.items() if not reached} == {"ahead of RSD, p below 0.05"}
    assert len(met) == 4 + 3 + 3 + 4
    missed = {goal for goal, reached in verdicts(record(lead=0.015, drop=0.012)).items() if not reached}
    assert missed == {goal for goal in met if "ahead of the student alone" in goal or "forgets" in goal or "RSD" in goal}
    behind = verdicts(record(lead=-0.01, drop=0.0))
    assert not behind["ahead of KD, corrected p below 0.05"], "a difference that is sure, and of the wrong sign"


def test_a_goal_without_room_is_none():
    lines = [{**line, "test": 0.83} if line["phase"] == "teacher" else line for line in record(lead=0.03, drop=0.004)]
    assert not any("ahead of the student alone" in goal for goal in verdicts(lines))


def test_what_was_muted_is_trained_again_and_then_stands_no_more():
    training = next(iter(run.screen(SMALL, 1)))
    muted = {**json.loads(json.dumps(training.key)), "validation": 0.5, "dist_muted": True}
    sound = {**muted, "validation": 0.6}
    del sound["dist_muted"]
    assert not run._is_done(training, [muted])
    assert run._is_done(training, [muted, sound])
    assert evidence.standing([muted, sound]) == [sound]
    assert evidence.standing([muted]) == [muted]


def test_all_takes_up_phases_in_an_order_that_serves_them():
    found = [training.phase for training in run.everything(SMALL, 1)]
    assert list(dict.fromkeys(found)) == ["rate", "tune", "retune", "pace", "screen", "end", "switch", "cells", "compare"]
    assert {training.phase for training in run.everything(LONG, 1)} == {"compare"}


def pace(method: str, seed: int, seconds: float) -> dict:
    return {"phase": "pace", "regime": "small", "pair": "a", "method": method, "seed": seed, "seconds": seconds}


@pytest.mark.parametrize("regime", [SMALL, LONG], ids=["its own", "that of the regime it takes its settings from"])
def test_equal_compute_is_the_median_of_what_was_timed_side_by_side(regime):
    rounds = [(2.0, 4.0), (1.0, 5.0), (1.0, 3.0)]
    names = "KD", study.DEFAULT
    lines = [pace(name, number, taken[at]) for number, taken in enumerate(rounds) for at, name in enumerate(names)]
    assert evidence.paces(lines, regime) == {("KD", "a"): 3.0, (study.DEFAULT, "a"): 1.0}
    assert evidence.paces(lines[:-1], regime)["KD", "a"] == 3.5, "a round of which one half is missing does not count"
    assert evidence.paces(lines[:1], regime) == {}


def test_a_quick_run_leaves_out_what_only_explains_unless_it_is_named():
    compared = list(run.compare(SMALL, 1))
    explaining = {method.name for method in (*study.ABLATIONS, *study.RIVALS)}

    def names(only: str | None, quick: bool) -> set[str]:
        return {training.method.name for training in run.asked(compared, only, None, quick)}

    assert names(None, quick=False) - names(None, quick=True) == explaining
    assert study.DEFAULT in names(None, quick=True)
    assert names("without attention", quick=True) == {"FOFA without attention"}
    assert {training.pair.name for training in run.asked(compared, None, "vit", quick=True)} == {"cnn -> vit"}


@pytest.mark.skipif(not FASHION.is_dir(), reason=f"Debian's dataset-fashion-mnist is not installed in {FASHION}")
def test_a_quick_run_trains_with_the_tuned_settings_and_keeps_its_own_record(tmp_path):
    record = (FOLDER / "results.jsonl").read_bytes()
    arguments = ["compare", "--quick", "--only", "RSD, equal", "--pair", "mixer -> cnn", "--work", str(tmp_path), "--quiet"]
    for _ in range(2):  # again: nothing is done twice
        command = [sys.executable, str(FOLDER / "run.py"), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert [(line["method"], line["regime"]) for line in lines] == [("RSD, equal compute", "small-quick")]
    assert lines[0]["plan"]["weights"] == {"rsd": 4.0}
    assert lines[0]["epochs"] > 2
    assert lines[0]["test"] > 0.5
    assert "| RSD, equal compute |" in (tmp_path / "README.md").read_text()
    assert (FOLDER / "results.jsonl").read_bytes() == record
