"""How often does the gate cry wolf, and what does it find? Real models, real verdicts; writes README.md beside itself.

python benchmarks/gate/run.py --phase idle
python benchmarks/gate/run.py --phase loaded

Run the same command again to go on where it stopped. Every trial is one verdict of `fofa_deploy.gate.check`, stored as it comes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import numpy as np

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
RUNTIMES = ("onnxruntime", "openvino")
KINDS = {"same": 0.0, "+3%": 0.03, "+5%": 0.05, "+10%": 0.10}
MOST_LAYERS, CALIBRATION_LAUNCHES = 24, 16
LOAD = """import os, time, numpy as np
a, parent = np.ones((256, 256), np.float32), os.getppid()
while os.getppid() == parent:
    until = time.monotonic() + 0.2
    while time.monotonic() < until: a @ a
    time.sleep(0.2)
"""
"""Busy half of the time, in stretches as long as a scheduler's patience: like a build beside the job. Ends with its parent."""


@click.command()
@click.option("--phase", type=click.Choice(["idle", "loaded"]), default="idle", show_default=True)
@click.option("--runtime", "runtimes", type=click.Choice(RUNTIMES), multiple=True, default=RUNTIMES)
@click.option("--same", default=50, show_default=True, help="A/A trials per runtime; 100 together are enough for the goal.")
@click.option("--slower", default=30, show_default=True, help="Trials per runtime and slowdown.")
@click.option("--quick", is_flag=True, help="A taste: 10 A/A trials and 5 per slowdown, recorded in --work.")
@click.option("--load", default=2, show_default=True, help="Processes of load in the phase 'loaded'.")
@click.option("--render", is_flag=True, help="Only write README.md from what is recorded.")
@click.option("--work", type=click.Path(path_type=Path), default=ROOT / "runs" / "gate", help="Where the models are built.")
def main(phase: str, runtimes: tuple[str, ...], same: int, slower: int, quick: bool, load: int, render: bool, work: Path) -> None:
    """Record trials until there are as many as asked for, then write the README."""
    results = work / "quick" if quick else HERE / "results"
    results.mkdir(parents=True, exist_ok=True)
    if not render:
        wanted = {kind: (10 if quick else same) if kind == "same" else (5 if quick else slower) for kind in KINDS}
        models = {runtime: calibrated(runtime, work, results) for runtime in runtimes}
        accuracy(results)
        with loaded(load if phase == "loaded" else 0):
            for kind, runtime in schedule(results, phase, runtimes, wanted):
                record(results / "trials.jsonl", trial(phase, kind, runtime, models[runtime], load if phase == "loaded" else 0))
    from summary import write_readme

    write_readme(results, (results if quick else HERE) / "README.md")


def record(path: Path, line: dict[str, Any]) -> None:
    with path.open("a") as stream:
        stream.write(json.dumps(line, allow_nan=False) + "\n")
    click.echo(json.dumps({key: line[key] for key in ("phase", "kind", "runtime", "verdict", "ratio", "seconds") if key in line}))


def recorded(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def schedule(results: Path, phase: str, runtimes: tuple[str, ...], wanted: dict[str, int]) -> Iterator[tuple[str, str]]:
    """What is left to do, every kind in turn, so that none has a quieter hour to itself."""
    done = Counter((line["kind"], line["runtime"]) for line in recorded(results / "trials.jsonl") if line["phase"] == phase)
    for number in range(max(wanted.values())):
        for kind, count in wanted.items():
            yield from ((kind, runtime) for runtime in runtimes if done[kind, runtime] <= number < count)


# --- models -------------------------------------------------------------------------------------------------------


def profile_file(runtime: str, work: Path) -> Path:
    """The installed profile of this machine's CPU, with one thread."""
    from fofa_profiles import __file__ as package

    work.mkdir(parents=True, exist_ok=True)
    path = work / f"cpu-{runtime}.toml"
    text = (Path(package).parent / f"cpu-{runtime}.toml").read_text()
    assert "threads = 0\n" in text
    path.write_text(text.replace("threads = 0\n", "threads = 1\n"))
    return path


def calibrated(runtime: str, work: Path, results: Path) -> dict[str, Path]:
    """An artifact per kind and the baseline; how many layers make which slowdown is measured, and the true ratio recorded."""
    from models import write_artifact

    from fofa_deploy.profile import find_profile

    profile = find_profile(str(profile_file(runtime, work)))
    file = results / f"models-{runtime}.json"
    baseline = write_artifact(work, profile, 0, "baseline")
    if not file.is_file():
        most = true_ratio(profile, baseline, write_artifact(work, profile, MOST_LAYERS, "slow"))
        per_layer = np.log(most["ratio"]) / MOST_LAYERS
        layers = {kind: round(float(np.log1p(slowdown) / per_layer)) for kind, slowdown in KINDS.items()}
        built = {kind: write_artifact(work, profile, count, "slow" if count else "same") for kind, count in layers.items()}
        measured = {kind: {"layers": layers[kind], **true_ratio(profile, baseline, path)} for kind, path in built.items()}
        file.write_text(json.dumps(measured, indent=1, allow_nan=False) + "\n")
    layers = {kind: found["layers"] for kind, found in json.loads(file.read_text()).items()}
    kinds = {kind: write_artifact(work, profile, count, "slow" if count else "same") for kind, count in layers.items()}
    return {"baseline": baseline, "profile": work / f"cpu-{runtime}.toml", **kinds}


def true_ratio(profile: Any, baseline: Path, candidate: Path) -> dict[str, float]:  # noqa: ANN401 - HardwareProfile
    """The ratio over twice as many launches as a verdict takes, long and interleaved."""
    from fofa_deploy.config import LimitsPlan
    from fofa_deploy.gate import statistics
    from fofa_deploy.gate.launches import race
    from fofa_deploy.gate.rules import Series
    from fofa_deploy.measure import Candidate

    sides = [Candidate(artifact=path, profile=profile, golden=path / "golden.npz") for path in (baseline, candidate)]
    series = Series(list(race(sides[0], sides[1], range(CALIBRATION_LAUNCHES), LimitsPlan())))
    found = statistics.shift(series.logs("baseline", "candidate"))
    medians = {name: float(np.median(series.pooled(name))) for name in ("baseline", "candidate")}
    return {"ratio": found.ratio, "lower": found.lower, "upper": found.upper, **medians}


# --- trials -------------------------------------------------------------------------------------------------------


def trial(phase: str, kind: str, runtime: str, models: dict[str, Path], load: int) -> dict[str, Any]:
    """One verdict of the gate, and one of each rival rule on a run of its own per side."""
    from fofa_deploy.config import GatePlan
    from fofa_deploy.gate.check import Options, check
    from fofa_deploy.progress import Quiet

    # The slower models are larger, too: only latency is to decide here.
    options = Options(profile=str(models["profile"]), gate=GatePlan(max_size_increase=None, max_memory_increase=None))
    before = os.getloadavg()[0]
    report, _ = check(models[kind], models["baseline"], Quiet(), options)
    latency = next(finding for finding in report.findings if finding.metric == "latency")
    return {
        "phase": phase,
        "kind": kind,
        "runtime": runtime,
        "verdict": report.verdict,
        "findings": {finding.metric: finding.verdict for finding in report.findings},
        "ratio": latency.ratio,
        "p_value": latency.p_value,
        "self_check": next(finding.ratio for finding in report.findings if finding.metric == "self-check"),
        "launches": sum(report.launches.values()),
        "seconds": report.seconds,
        "load": load,
        "load_average": [before, os.getloadavg()[0]],
        "rivals": rivals(models, kind),
        "at": report.created_at,
        "environment": report.environment.fingerprint,
        "cpu": report.environment.cpu,
        "cores": report.environment.cores,
    }


def rivals(models: dict[str, Path], kind: str) -> dict[str, bool]:
    """Whether the usual rules call it slower, after one run of each side, one after the other."""
    from scipy import stats

    from fofa_deploy.config import LimitsPlan
    from fofa_deploy.gate.launches import CANDIDATE, race
    from fofa_deploy.gate.rules import Series
    from fofa_deploy.measure import Candidate
    from fofa_deploy.profile import find_profile

    profile, times = find_profile(str(models["profile"])), []
    for path in (models["baseline"], models[kind]):
        side = Candidate(artifact=path, profile=profile, golden=path / "golden.npz")
        times.append(Series(list(race(None, side, range(1), LimitsPlan()))).pooled(CANDIDATE))
    base, own = times
    rng = np.random.default_rng(0)
    draws = [np.median(rng.choice(side, (1000, len(side))), axis=1) for side in (own, base)]
    return {
        "Mann-Whitney, p < .05": bool(stats.mannwhitneyu(own, base, alternative="greater").pvalue < 0.05),
        "bootstrap interval of the median ratio": bool(np.quantile(draws[0] / draws[1], 0.025) > 1),
        "7 % threshold on the median": bool(np.median(own) > 1.07 * np.median(base)),
    }


@contextmanager
def loaded(processes: int) -> Iterator[None]:
    """A load generator of so many processes beside the trials."""
    started = [subprocess.Popen([sys.executable, "-c", LOAD]) for _ in range(processes)]
    try:
        time.sleep(1 if started else 0)
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


# --- accuracy -----------------------------------------------------------------------------------------------------


def accuracy(results: Path, trials: int = 1000, images: int = 10_000) -> None:
    """The accuracy rule on pairs drawn from real answers: two classifiers' to the same handwritten digits, out of fold.

    A candidate that lost one point answers as the baseline does, but for a share of images as the weaker classifier.
    """
    file = results / "accuracy.json"
    if file.is_file():
        return
    strong, weak = digit_answers()
    gap = float(strong.mean() - weak.mean())
    rng, found = np.random.default_rng(0), Counter[str]()
    for _ in range(trials):
        drawn = rng.integers(0, len(strong), images)
        mixed = np.where(rng.random(images) < 0.01 / gap, weak[drawn], strong[drawn])
        found["drop"] += accuracy_verdict(strong[drawn], mixed) == "fail"
        found["equal"] += accuracy_verdict(strong[drawn], strong[drawn]) == "fail"
    line = {"trials": trials, "images": images, "strong": float(strong.mean()), "weak": float(weak.mean()), **found}
    file.write_text(json.dumps({"drop": 0, "equal": 0, **line}, indent=1, allow_nan=False) + "\n")


def accuracy_verdict(baseline: np.ndarray, candidate: np.ndarray) -> str:
    """By the gate's own rule, in the family of one latency and one accuracy."""
    from fofa_deploy.config import GatePlan
    from fofa_deploy.gate import rules, statistics

    pair = rules.Paired(baseline, candidate)
    worse, better = (statistics.holm({"accuracy": p, "latency": 1.0})["accuracy"] for p in (pair.p_worse, pair.p_better))
    return rules.judge_accuracy("digits", "top-1", pair, worse, better, GatePlan().accuracy_margin).verdict


def digit_answers() -> tuple[np.ndarray, np.ndarray]:
    """Right or wrong per digit, bool (1797,), of a nearest-neighbour classifier and of naive Bayes, ten-fold."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import cross_val_predict
    from sklearn.naive_bayes import GaussianNB
    from sklearn.neighbors import KNeighborsClassifier

    images, labels = load_digits(return_X_y=True)
    strong, weak = (cross_val_predict(kind, images, labels, cv=10) == labels for kind in (KNeighborsClassifier(3), GaussianNB()))
    return strong, weak


if __name__ == "__main__":
    main()
