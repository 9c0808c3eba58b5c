"""The benchmark of distillation methods: tests over seeds, equal compute, and a real quick run that leaves the record alone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from scipy import stats

FOLDER = Path(__file__).parent.parent / "benchmarks" / "distillation"
FASHION = Path("/usr/share/datasets/fashion-mnist")
before = list(sys.path)
sys.path.insert(0, str(FOLDER))
import report  # noqa: E402 - from the benchmark's folder
import run  # noqa: E402
import study  # noqa: E402

sys.path[:] = before  # the benchmarks' modules have common names
for name in ("report", "run", "study"):
    del sys.modules[name]

SMALL, LONG = study.REGIMES["small"], study.REGIMES["long"]


def scores(*seeds: tuple[float, float]) -> dict[tuple[str, int], float]:
    """Accuracies on two pairs, by seed."""
    return {(pair, seed): value for seed, both in enumerate(seeds) for pair, value in zip("ab", both, strict=True)}


def test_a_seed_is_one_number():
    one, other = scores((0.9, 0.5), (0.8, 0.7), (0.9, 0.6)), scores((0.8, 0.5), (0.8, 0.6), (0.6, 0.6))
    difference, p, seeds = report._paired(one, other)
    by_seed = [0.05, 0.05, 0.15]
    assert (difference, seeds) == (pytest.approx(sum(by_seed) / 3), 3)
    assert p == pytest.approx(stats.ttest_1samp(by_seed, 0).pvalue)


def test_only_seeds_that_all_pairs_have_are_compared():
    one, other = scores((0.9, 0.5), (0.8, 0.7)), scores((0.8, 0.5), (0.8, 0.6))
    del one["a", 1]
    assert report._paired(one, other) == (pytest.approx(0.05), None, 1)
    del one["a", 0]
    assert report._paired(one, other) is None


def test_p_is_corrected_by_holm():
    assert report._holm({"x": 0.01, "y": 0.04, "z": 0.03, "unknown": None}) == pytest.approx({"x": 0.03, "z": 0.06, "y": 0.06})


def pace(method: str, seed: int, seconds: float) -> dict:
    return {"phase": "pace", "regime": "small", "pair": "a", "method": method, "seed": seed, "seconds": seconds}


@pytest.mark.parametrize("regime", [SMALL, LONG], ids=["its own", "that of the regime it takes its settings from"])
def test_equal_compute_is_the_median_of_what_was_timed_side_by_side(regime):
    rounds = [(2.0, 4.0), (1.0, 5.0), (1.0, 3.0)]
    names = "KD", study.DEFAULT
    lines = [pace(name, number, taken[at]) for number, taken in enumerate(rounds) for at, name in enumerate(names)]
    assert report.paces(lines, regime) == {("KD", "a"): 3.0, (study.DEFAULT, "a"): 1.0}
    assert report.paces(lines[:-1], regime)["KD", "a"] == 3.5, "a round of which one half is missing does not count"
    assert report.paces(lines[:1], regime) == {}


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
