"""README.md and the picture, from recorded lines alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, median, stdev

import study
from scipy import stats

from fofa_deploy.training import FofaPlan

USUAL = FofaPlan()
FORM_REFERENCE = "no feedback"
MUTED = "†"
Block = tuple[str, int]
"""What two methods have in common when they are compared: pair and seed."""
Setting = tuple[str, str, str]
"""Phase, who, and what was set."""
Test = tuple[float, float | None, int]
"""A mean difference, its p where there are seeds enough, and their number."""

_AGAIN = (
    "The first column chose. Two of the teachers were fitted anew after a part of it, and DIST was muted in some (see above):",
    "*again* is the same with the teachers as they are, and DIST as it should be. Neighbouring settings change places by a few",
    "tenths of a point: one seed cannot tell them apart. What the second column would choose are further rows of the comparison.",
    "",
)


def write(lines: Sequence[dict], regimes: Iterable[study.Regime], folder: Path) -> None:
    """README.md, and a picture for every regime that has a table to draw."""
    parts = [
        "# Distillation methods compared",
        "",
        "Written by `python benchmarks/distillation/run.py report` from `results.jsonl`; nothing here is typed by hand.",
        "Fashion-MNIST at 16 x 16 pixels, networks of `models.py`, plans of `study.py`. Validation: 6,000 training images that no",
        "student trains on. A seed is an initialization, an order and an augmentation, the same for all methods. Differences are",
        "averaged over pairs, so that a seed is one number, and tested over the seeds that all pairs have (paired t-test; from",
        "three seeds on; corrected by Holm for the rows of a table that have a p). A pair's own figures are of all its seeds. Two",
        "pairs share a student, which counts twice in means over pairs. A p speaks of other seeds: for these teachers, these",
        "students and this subset of the images.",
        "",
        f"Every method had {_choices()} settings to choose from on validation images, one for all pairs. {study.DEFAULT!r} has",
        f"those of {study.UNPROMPTED!r}, in which features teach to the end and which knows no prompts; what it has",
        f"besides was chosen among {len(study.FORMS)} forms of feedback and {len(study.ENDS)} lengths, on validation images too:",
        "a budget larger than any other method's. Whether features should teach for less than all epochs was asked after test",
        "images had shown what features to the end cost the small convolutional student (trained out, seeds 0 to 2; of ViT and",
        "Mixer seed 0): of students trained out, seeds from 3 on had no part in it. Three earlier forms of the default were seen",
        f"on test images before: {study.UNPROMPTED!r}, 'FOFA, gamma = 1, balance twice as often' and",
        f"{study.TO_THE_END!r}, which have rows of their own.",
        f"FOFA's attention is {study.FOFA['width']} wide with {study.FOFA['heads']} heads here, for networks of this size;",
        f"usually it is {USUAL.width} wide with {USUAL.heads}.",
        "",
        *_muted(lines),
        *_teachers(lines),
    ]
    for regime in regimes:
        parts += _settings([line for line in lines if line.get("regime") == regime.name], regime)
        parts += _comparison(_latest(lines, "compare", regime, "test"), regime, folder)
        parts += _pace(lines, regime)
        parts += _doubling(lines, regime)
        parts += _forgetting(lines, "compare", regime)
        title = f"## Forms of feedback, validation accuracy, {regime.described}"
        muted = {line["method"] for line in lines if line.get("dist_muted") and line["phase"] == "screen"}
        parts += _screening(title, _latest(lines, "screen", regime, "validation"), study.FORMS, FORM_REFERENCE, muted)
        parts += _forgetting(lines, "screen", regime)
        title = f"## How long features teach, validation accuracy, {regime.described}"
        parts += _screening(title, _latest(lines, "end", regime, "validation"), study.ENDS, study.ENDS[-1].name, set())
        title = f"## How finely regions are seen, validation accuracy, {regime.described}"
        parts += _screening(title, _latest(lines, "cells", regime, "validation"), study.CELLS, study.CELLS[-1].name, set())
    (folder / "README.md").write_text("\n".join(parts).rstrip() + "\n")


def _muted(lines: Sequence[dict]) -> list[str]:
    """What older trainings did not get."""
    old = [line for line in lines if line.get("dist_muted")]
    pairs = ", ".join(sorted({line["pair"] for line in old}))
    phases = ", ".join(sorted({line["phase"] for line in old}))
    told = [
        f"{len(old)} trainings of {pairs} (phases {phases}) had DIST at a hundredth of its weight for their first thousand",
        "steps: that student's head starts at zero, a correlation's gradient is a millionfold there, and it was remembered.",
        f"Rows of which they are a part are marked {MUTED}: what these lack is not all a matter of their form.",
        "",
    ]
    return told if old else []


def _teachers(lines: Iterable[dict]) -> list[str]:
    latest = {(line["teacher"], line["epochs"]): line for line in lines if line["phase"] == "teacher"}
    used = "; ".join(f"of {regime.teacher_epochs} epochs for students of {regime.described}" for regime in study.REGIMES.values())
    rows = [
        f"| {kind} | {epochs} | {line['test']:.2%} | {line['validation']:.2%} |" for (kind, epochs), line in sorted(latest.items())
    ]
    head = ["## Teachers", "", f"All training images; {used}.", "", "| family | epochs | test | validation |", "|---|---|---|---|"]
    return [*head, *rows, ""] if rows else []


def _choices() -> str:
    """Three to five, say: so many settings the methods of the table had."""
    counts = [len(method.choices) for method in study.METHODS if len(method.choices) > 1]
    return f"{min(counts)} to {max(counts)}"


def _settings(lines: Sequence[dict], regime: study.Regime) -> list[str]:
    """What was tried on validation images before anything was compared."""
    chosen = {method.name: {name for choice in method.choices for name in choice} for method in (*study.METHODS, *study.TRIED)}
    tried: dict[Setting, dict[str, float]] = defaultdict(dict)
    again: dict[Setting, dict[str, float]] = defaultdict(dict)
    for line in lines:
        if line["phase"] == "rate":
            tried["rate", f"{_student(line)} alone", f"learning rate {line['plan']['lr']:g}"][line["pair"]] = line["validation"]
        elif line["phase"] in ("tune", "retune"):
            own = {name: value for name, value in line["plan"].items() if name in chosen[line["method"]]}
            column = tried if line["phase"] == "tune" else again
            column["tune", line["method"], json.dumps(own)][line["pair"]] = line["validation"]
    if not tried:
        return []
    first = {setting: 100 * mean(found.values()) for setting, found in tried.items()}
    repeated = {key[:2] for key in again}  # of these, what was not run again had the present teachers and DIST as it should be
    second = {key: 100 * mean({**found, **again[key]}.values()) for key, found in tried.items() if key[:2] in repeated}
    rows = [
        f"| {who} | {setting} | {_ranked(first, key)} | {_ranked(second, key)} | {len(tried[key])} |"
        for key in sorted(tried)
        for _, who, setting in [key]
    ]
    head = ["| who | setting | validation accuracy, mean over pairs | again | pairs |", "|---|---|---|---|---|"]
    title = f"## Settings tried on validation images, {regime.described}"
    return [
        title,
        "",
        "Learning rates with half of these epochs, the rest with a quarter; one seed.",
        *(_AGAIN if again else ("",)),
        *head,
        *rows,
        "",
    ]


def _ranked(means: dict[Setting, float], key: Setting) -> str:
    if key not in means:
        return ""
    best = max(value for other, value in means.items() if other[:2] == key[:2])
    return f"{means[key]:.2f}{' (best)' if means[key] == best else ''}"


def _student(line: dict) -> str:
    return str(line["pair"].split()[-1])


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


def _pace(lines: Sequence[dict], regime: study.Regime) -> list[str]:
    """The factors behind equal compute."""
    found, pairs = paces(lines, regime), [pair.name for pair in study.PAIRS]
    if not found or regime.settled:
        return []
    rows = [
        f"| {method.name} | {' | '.join(f'{found[method.name, pair]:.2f}' for pair in pairs)} |"
        for method in study.TIMED
        if all((method.name, pair) in found for pair in pairs)
    ]
    title = f"### Epochs of a method that take as long as one of {study.DEFAULT!r}"
    return [title, "", f"| method | {' | '.join(pairs)} |", "|---" * (len(pairs) + 1) + "|", *rows, ""]


def _doubling(lines: Iterable[dict], regime: study.Regime) -> list[str]:
    """What twice as many epochs are worth to each student alone."""
    alone = study.METHODS[0].name
    scores = _latest(lines, "compare", regime, "validation")
    once, twice = scores[alone], scores[alone + study.TWICE]
    rows = []
    for student, epochs in regime.epochs.items():
        blocks = [block for block in once.keys() & twice.keys() if block[0].split()[-1] == student]
        if blocks:
            first, second = (100 * mean(found[block] for block in blocks) for found in (once, twice))
            seeds = len({seed for _, seed in blocks})  # the teacher makes no difference
            rows.append(f"| {student} | {epochs} | {first:.2f} | {second:.2f} | {second - first:+.2f} | {seeds} |")
    title = "### What twice as many epochs are worth to a student alone, validation accuracy"
    head = [title, "", "| student | epochs | once | twice | gain, points | seeds |", "|---|---|---|---|---|---|"]
    return [*head, *rows, ""] if rows else []


def _latest(lines: Iterable[dict], phase: str, regime: study.Regime, score: str) -> dict[str, dict[Block, float]]:
    """method -> (pair, seed) -> accuracy, of the full schedule or of a method's own."""
    longer = {method.name for method in study.LONGER}
    found: dict[str, dict[Block, float]] = defaultdict(dict)
    for line in lines:
        if line["phase"] != phase or line["regime"] != regime.name:
            continue
        epochs = regime.epochs[_student(line)]
        if line["epochs"] == epochs or (line["method"] in longer and line["epochs"] > epochs):
            found[line["method"]][line["pair"], line["seed"]] = line[score]
    return found


def _comparison(scores: dict[str, dict[Block, float]], regime: study.Regime, folder: Path) -> list[str]:
    if not scores:
        return []
    named = [method.name for method in study.COMPARED if method.name in scores]
    pairs = [pair.name for pair in study.PAIRS if any(pair.name == key[0] for found in scores.values() for key in found)]
    draw(scores, named, pairs, folder / f"methods-{regime.name}.svg")
    return [
        f"## Test accuracy, {regime.described}",
        "",
        *([f"At the settings that were chosen for {study.REGIMES[regime.settled].described}.", ""] if regime.settled else []),
        f"![mean and standard deviation over seeds](methods-{regime.name}.svg)",
        "",
        *_table(scores, named, pairs, study.DEFAULT, set()),
        *(note for name, notes in study.NOTES.items() if name in named for note in (*notes, "")),
        *_behind(scores, named, study.UNPROMPTED),
    ]


def _screening(
    title: str, scores: dict[str, dict[Block, float]], forms: Sequence[study.Method], reference: str, marked: set[str]
) -> list[str]:
    if not scores:
        return []
    named = [method.name for method in forms if method.name in scores]
    pairs = [pair.name for pair in study.PAIRS if any(pair.name == key[0] for found in scores.values() for key in found)]
    return [title, "", *_table(scores, named, pairs, reference, marked)]


def _table(
    scores: dict[str, dict[Block, float]], named: list[str], pairs: list[str], reference: str, marked: set[str]
) -> list[str]:
    """Mean and standard deviation per pair, and the paired difference to ``reference``, p corrected by Holm."""
    tests, corrected = _against(scores, named, reference)
    rows = [f"| method | {' | '.join(pairs)} | {_columns(reference)} |", "|---" * (len(pairs) + 5) + "|"]
    for name in named:
        cells = [_cell([value for key, value in scores[name].items() if key[0] == pair]) for pair in pairs]
        told = _told(tests[name], corrected.get(name)) if name in tests else " |  |  | "
        rows.append(f"| {name}{f' {MUTED}' if name in marked else ''} | {' | '.join(cells)} | {told} |")
    return [*rows, ""]


def _behind(scores: dict[str, dict[Block, float]], named: list[str], reference: str) -> list[str]:
    """The paired differences to one more method, p corrected by Holm."""
    tests, corrected = _against(scores, named, reference)
    rows = [f"| {name} | {_told(test, corrected.get(name))} |" for name, test in tests.items()]
    return [f"| method | {_columns(reference)} |", "|---" * 5 + "|", *rows, ""] if rows else []


def _columns(reference: str) -> str:
    return f"difference to {reference!r}, points | seeds | p | corrected p"


def _told(test: Test, corrected: float | None) -> str:
    difference, p, seeds = test
    return f"{100 * difference:+.2f} | {seeds} | {_p(p)} | {_p(corrected)}"


def _against(scores: dict[str, dict[Block, float]], named: list[str], reference: str) -> tuple[dict[str, Test], dict[str, float]]:
    """Paired tests of all that share a training with ``reference``, and their p corrected by Holm."""
    found = {name: _paired(scores[name], scores.get(reference, {})) for name in named if name != reference}
    tests = {name: test for name, test in found.items() if test}
    return tests, _holm({name: test[1] for name, test in tests.items()})


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    return f"{100 * mean(values):.2f}" + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


def _p(value: float | None) -> str:
    return "" if value is None else "< .001" if value < 0.001 else f"{value:.3f}"


def _paired(one: dict[Block, float], other: dict[Block, float]) -> Test | None:
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


def _holm(found: dict[str, float | None]) -> dict[str, float]:
    """Holm's step-down correction for as many comparisons as there are rows."""
    known = sorted((p, name) for name, p in found.items() if p is not None)
    corrected, largest = {}, 0.0
    for rank, (p, name) in enumerate(known):
        largest = max(largest, min(1.0, p * (len(known) - rank)))
        corrected[name] = largest
    return corrected


def _forgetting(lines: Iterable[dict], phase: str, regime: study.Regime) -> list[str]:
    """What became of the prompted teacher by the last epoch, per form and pair."""
    drops: dict[tuple[str, str], list[float]] = defaultdict(list)
    drifts: dict[tuple[str, str], list[float]] = defaultdict(list)
    for line in lines:
        told = line.get("diagnostics", {})
        if line["phase"] == phase and line["regime"] == regime.name and told.get("drift_nats", 0.0) > 1e-6:
            drops[line["method"], line["pair"]].append(100 * (told["teacher_top1"] - told["prompted_top1"]))
            drifts[line["method"], line["pair"]].append(told["drift_nats"])
    rows = [
        f"| {form} | {pair} | {mean(found):+.1f} | {max(found):+.1f} | {mean(drifts[form, pair]):.3f} | {len(found)} |"
        for (form, pair), found in sorted(drops.items())
    ]
    head = [
        "### Does the prompted teacher forget?",
        "",
        "Its accuracy on 512 validation images after the last epoch, below the plain teacher's: one image is 0.2 points.",
        "",
        "| form | pair | drop, points | largest | KL to the plain teacher, nats | trainings |",
        "|---|---|---|---|---|---|",
    ]
    return [*head, *rows, ""] if rows else []


def draw(scores: dict[str, dict[Block, float]], named: list[str], pairs: list[str], path: Path) -> None:
    """Dots with error bars: one panel per pair, one row per method."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = path.stem  # the same picture from the same results
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(
        1, len(pairs), figsize=(3 + 2.6 * len(pairs), 0.8 + 0.3 * len(named)), sharey=True, squeeze=False
    )
    for panel, pair in zip(panels[0], pairs, strict=True):
        for row, name in enumerate(named):
            values = [100 * value for key, value in scores[name].items() if key[0] == pair]
            if values:
                spread = stdev(values) if len(values) > 1 else 0.0
                colour = "C1" if name == study.DEFAULT else "C0"
                panel.errorbar(mean(values), row, xerr=spread, fmt="o", color=colour, capsize=3)
        panel.set_title(pair, fontsize=10)
        panel.set_yticks(range(len(named)), named)
        panel.grid(axis="x", alpha=0.3)
    panels[0][0].invert_yaxis()
    figure.supxlabel("test accuracy, %", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)
