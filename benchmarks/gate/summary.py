"""The recorded trials as a page: rates with exact (Clopper-Pearson) 95 % intervals, held to the goals."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

Trial = dict[str, Any]
GOALS = {"same": ("<=", 0.01), "+3%": (">=", 0.85), "+5%": (">=", 0.95)}
UPPER, SECONDS = 0.03, 60.0


def write_readme(results: Path, page: Path) -> None:
    """Write the page; nothing in it is typed by hand."""
    trials = [json.loads(line) for line in (results / "trials.jsonl").read_text().splitlines()]
    page.parent.mkdir(exist_ok=True)
    page.write_text("\n".join(_page(results, trials)) + "\n")


def _page(results: Path, trials: Sequence[Trial]) -> Iterator[str]:
    machines = sorted({f"{trial['cpu']}, {trial['cores']} cores" for trial in trials})
    yield "# Does the gate cry wolf, and what does it find?"
    yield ""
    yield f"Written by `python benchmarks/gate/run.py`; nothing here is typed by hand. {'; '.join(machines)}."
    yield ""
    yield "Every trial is one verdict of `fofa-deploy check` over launches of its own. A/A compares two files of the same network."
    yield "The rivals judge one run of each side, one after the other, in the same hour. Intervals are Clopper-Pearson, 95 %."
    yield ""
    yield from _models(results)
    for phase in ("idle", "loaded"):
        for runtime in sorted({trial["runtime"] for trial in trials}):
            chosen = [trial for trial in trials if trial["phase"] == phase and trial["runtime"] == runtime]
            if chosen:
                yield from _section(phase, runtime, chosen)
        everyone = [trial for trial in trials if trial["phase"] == phase]
        if everyone:
            yield from _goals(phase, everyone)
    yield from _accuracy(json.loads((results / "accuracy.json").read_text()))


def _models(results: Path) -> Iterator[str]:
    yield "## The models, one thread"
    yield ""
    yield "| runtime | change | more layers | baseline ms | true ratio | bounds |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for file in sorted(results.glob("models-*.json")):
        for kind, found in json.loads(file.read_text()).items():
            bounds = f"{found['lower']:.3f}-{found['upper']:.3f}"
            yield f"| {file.stem[7:]} | {kind} | {found['layers']} | {found['baseline']:.3f} | {found['ratio']:.3f} | {bounds} |"
    yield ""


def _section(phase: str, runtime: str, trials: Sequence[Trial]) -> Iterator[str]:
    kinds = [kind for kind in ("same", "+3%", "+5%", "+10%") if any(trial["kind"] == kind for trial in trials)]
    loads = [value for trial in trials for value in trial["load_average"]]
    yield f"## {phase}, {runtime}"
    yield ""
    yield f"Load average {min(loads):.1f} to {max(loads):.1f}, of it {trials[-1]['load']} processes of our own."
    yield ""
    yield "| rule | " + " | ".join("false alarms" if kind == "same" else f"finds {kind}" for kind in kinds) + " |"
    yield "| --- |" + " --- |" * len(kinds)
    for name, called in _rules(trials):
        cells = [rate([called(trial) for trial in trials if trial["kind"] == kind]) for kind in kinds]
        yield f"| {name} | " + " | ".join(cells) + " |"
    open_ = [rate([trial["verdict"] == "inconclusive" for trial in trials if trial["kind"] == kind]) for kind in kinds]
    yield "| inconclusive | " + " | ".join(open_) + " |"
    yield ""
    seconds = [trial["seconds"] for trial in trials]
    yield f"Seconds per verdict: median {np.median(seconds):.1f}, longest {max(seconds):.1f}."
    yield ""


def _rules(trials: Sequence[Trial]) -> Iterable[tuple[str, Callable[[Trial], bool]]]:
    yield "**fofa-deploy check**", lambda trial: bool(trial["verdict"] == "fail")
    for name in trials[0]["rivals"]:
        yield name, lambda trial, name=name: bool(trial["rivals"][name])  # type: ignore[misc]


def rate(hits: Sequence[bool]) -> str:
    """``3 of 100: 3.0 % (0.6-8.5)``"""
    found = stats.binomtest(sum(hits), len(hits)).proportion_ci(0.95, method="exact")
    return f"{sum(hits)} of {len(hits)}: {100 * np.mean(hits):.1f} % ({100 * found.low:.1f}-{100 * found.high:.1f})"


def _goals(phase: str, trials: Sequence[Trial]) -> Iterator[str]:
    yield f"## Goals, {phase}, all runtimes"
    yield ""
    yield "| goal | wanted | measured | met |"
    yield "| --- | --- | --- | --- |"
    for kind, (sign, limit) in GOALS.items():
        hits = [trial["verdict"] == "fail" for trial in trials if trial["kind"] == kind]
        if not hits:
            continue
        share = float(np.mean(hits))
        name = "false alarms" if kind == "same" else f"{kind} found"
        met = share <= limit if sign == "<=" else share >= limit
        yield f"| {name} | {sign} {100 * limit:.0f} % | {rate(hits)} | {'yes' if met else 'no'} |"
        if kind == "same":
            # The one-sided bound: the question is only whether there are more.
            upper = float(stats.binomtest(sum(hits), len(hits), alternative="less").proportion_ci(0.95, method="exact").high)
            within = "yes" if upper < UPPER else "no"
            yield f"| upper 95 % bound of false alarms, one-sided | < {100 * UPPER:.0f} % | {100 * upper:.1f} % | {within} |"
    seconds = [trial["seconds"] for trial in trials]
    yield f"| seconds per verdict, 95th percentile | < {SECONDS:.0f} | {np.quantile(seconds, 0.95):.1f} | {_met(seconds)} |"
    yield ""


def _met(seconds: Sequence[float]) -> str:
    return "yes" if float(np.quantile(seconds, 0.95)) < SECONDS else "no"


def _accuracy(found: dict[str, Any]) -> Iterator[str]:
    yield "## Accuracy"
    yield ""
    yield f"{found['trials']:,} pairs of {found['images']:,} images, drawn from real out-of-fold answers to 1,797 scanned digits:"
    yield f"a nearest-neighbour classifier's ({found['strong']:.2%} right), and for one point less some of naive Bayes'"
    yield f"({found['weak']:.2%})."
    yield "Resampled, not separately trained networks; judged by the gate's own rule."
    yield ""
    yield "| goal | wanted | measured | met |"
    yield "| --- | --- | --- | --- |"
    for name, key, good, wanted in (
        ("one point found", "drop", 0.99, ">= 99 %"),
        ("false alarm on equal answers", "equal", 0.0, "0"),
    ):
        hits = [True] * found[key] + [False] * (found["trials"] - found[key])
        met = np.mean(hits) >= good if key == "drop" else not any(hits)
        yield f"| {name} | {wanted} | {rate(hits)} | {'yes' if met else 'no'} |"
    yield ""
