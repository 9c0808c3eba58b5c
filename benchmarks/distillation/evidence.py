"""What the recorded lines say, in numbers: accuracies by method and block, paired tests, paces, gains, what the teacher forgets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, median

import study
from scipy import stats

Block = tuple[str, int]
"""What two methods have in common when they are compared: pair and seed."""
Scores = dict[str, dict[Block, float]]
"""method -> (pair, seed) -> accuracy."""
Test = tuple[float, float | None, int]
"""A mean difference, its p where there are seeds enough, and their number."""


def student(line: dict) -> str:
    return str(line["pair"].split()[-1])


_IDENTITY = ("phase", "regime", "pair", "method", "plan", "seed", "epochs")


def standing(lines: Iterable[dict]) -> list[dict]:
    """Without trainings that had DIST muted and were repeated with DIST as it should be."""
    lines = list(lines)
    sound = [[line.get(name) for name in _IDENTITY] for line in lines if not line.get("dist_muted")]
    return [line for line in lines if not (line.get("dist_muted") and [line.get(name) for name in _IDENTITY] in sound)]


def latest(lines: Iterable[dict], phase: str, regime: study.Regime, score: str) -> Scores:
    """method -> (pair, seed) -> accuracy, of the full schedule or of a method's own."""
    longer = {method.name for method in study.LONGER}
    found: Scores = defaultdict(dict)
    for line in lines:
        if line["phase"] != phase or line["regime"] != regime.name:
            continue
        epochs = regime.epochs[student(line)]
        if line["epochs"] == epochs or (line["method"] in longer and line["epochs"] > epochs):
            found[line["method"]][line["pair"], line["seed"]] = line[score]
    return found


def against(scores: Scores, named: list[str], reference: str) -> tuple[dict[str, Test], dict[str, float]]:
    """Paired tests of all that share a training with ``reference``, and their p corrected by Holm."""
    found = {name: paired(scores[name], scores.get(reference, {})) for name in named if name != reference}
    tests = {name: test for name, test in found.items() if test}
    return tests, holm({name: test[1] for name, test in tests.items()})


def paired(one: dict[Block, float], other: dict[Block, float]) -> Test | None:
    """Mean difference over pairs and the seeds that all of them have, p of the t-test over seeds, and their number.

    Pairs with one student share what a seed makes of it, and the student alone is even the same one for all teachers: only
    seeds are independent of one another.
    """
    common, pairs = one.keys() & other.keys(), {pair for pair, _ in other}
    whole = sorted(seed for seed in {seed for _, seed in common} if all((pair, seed) in common for pair in pairs))
    if not whole:
        return None
    differences = [mean(one[pair, seed] - other[pair, seed] for pair in pairs) for seed in whole]
    p = float(stats.ttest_1samp(differences, 0.0).pvalue) if len(whole) > 2 and len(set(differences)) > 1 else None
    return mean(differences), p, len(whole)


def across_pairs(one: dict[Block, float], other: dict[Block, float]) -> float | None:
    """p of the t-test with pairs as the sample, each the mean over the seeds that both have; None below three pairs."""
    common = one.keys() & other.keys()
    pairs = sorted({pair for pair, _ in common})
    differences = [mean(one[block] - other[block] for block in common if block[0] == pair) for pair in pairs]
    return float(stats.ttest_1samp(differences, 0.0).pvalue) if len(pairs) > 2 and len(set(differences)) > 1 else None


def holm(found: dict[str, float | None]) -> dict[str, float]:
    """Holm's step-down correction for as many comparisons as there are rows."""
    known = sorted((p, name) for name, p in found.items() if p is not None)
    corrected, largest = {}, 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[name] = largest
    return corrected


def told_p(value: float | None) -> str:
    return "" if value is None else "< .001" if value < 0.001 else f"{value:.3f}"


def paces(lines: Iterable[dict], regime: study.Regime) -> dict[tuple[str, str], float]:
    """(method, pair) -> how many of its epochs take as long as one of the default plan, the median over rounds."""
    seconds: dict[tuple[str, str], dict[int, float]] = defaultdict(dict)
    for line in lines:
        if line["phase"] == "pace" and line["regime"] == (regime.settled or regime.name):
            seconds[line["method"], line["pair"]][line["seed"]] = line["seconds"]
    factors = {}
    for (method, pair), rounds in seconds.items():
        ours = seconds.get((study.DEFAULT, pair), {})
        if common := rounds.keys() & ours.keys():
            factors[method, pair] = median(ours[number] / rounds[number] for number in common)
    return factors


@dataclass(frozen=True)
class Gain:
    """What twice as many epochs are worth to a student alone: validation accuracies in percent, means over seeds."""

    student: str
    epochs: int
    once: float
    twice: float
    seeds: int

    @property
    def points(self) -> float:
        return self.twice - self.once


def gains(lines: Iterable[dict], regime: study.Regime) -> list[Gain]:
    """One per student that was trained both ways with the same seed."""
    alone = study.METHODS[0].name
    scores = latest(lines, "compare", regime, "validation")
    once, twice = scores[alone], scores[alone + study.TWICE]
    found = []
    for name, epochs in regime.epochs.items():
        blocks = [block for block in once.keys() & twice.keys() if block[0].split()[-1] == name]
        if blocks:
            first, second = (100 * mean(each[block] for block in blocks) for each in (once, twice))
            found.append(Gain(name, epochs, first, second, len({seed for _, seed in blocks})))  # the teacher makes no difference
    return found


@dataclass(frozen=True)
class Forgotten:
    """What became of the prompted teacher by the last epoch: a drop in points and a drift in nats for each training."""

    form: str
    pair: str
    drops: list[float]
    drifts: list[float]


def forgotten(lines: Iterable[dict], phase: str, regime: study.Regime) -> list[Forgotten]:
    """One per form and pair."""
    found: dict[tuple[str, str], Forgotten] = {}
    for line in lines:
        told = line.get("diagnostics", {})
        if line["phase"] == phase and line["regime"] == regime.name and told.get("drift_nats", 0.0) > 1e-6:
            key = line["method"], line["pair"]
            row = found.setdefault(key, Forgotten(*key, [], []))
            row.drops.append(100 * (told["teacher_top1"] - told["prompted_top1"]))
            row.drifts.append(told["drift_nats"])
    return [found[key] for key in sorted(found)]
