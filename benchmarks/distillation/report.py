"""README.md and the picture, from recorded lines alone."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev

import goals
import study
from evidence import Scores, Test, across_pairs, against, forgotten, gains, latest, paces, standing, student, told_p

from fofa_deploy.training import FofaPlan

USUAL = FofaPlan()
MUTED = "†"
Setting = tuple[str, str, str]
"""Phase, who, and what was set."""

_AGAIN = (
    "The first column chose. Two of the teachers were fitted anew after a part of it, and DIST was muted in some (see above):",
    "*again* is the same with the teachers as they are, and DIST as it should be. Neighbouring settings change places by a few",
    "tenths of a point: one seed cannot tell them apart. What the second column would choose are further rows of the comparison.",
    "",
)


def write(lines: Sequence[dict], regimes: Iterable[study.Regime], folder: Path) -> None:
    """README.md, and a picture for every regime that has a table to draw."""
    lines, regimes = standing(lines), list(regimes)
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
        *goals.section(lines, regimes),
        *_muted(lines),
        *_teachers(lines),
    ]
    for regime in regimes:
        parts += _settings([line for line in lines if line.get("regime") == regime.name], regime)
        parts += _comparison(latest(lines, "compare", regime, "test"), regime, folder)
        parts += _pace(lines, regime)
        parts += _doubling(lines, regime)
        parts += _forgetting(lines, "compare", regime)
        title = f"## Forms of feedback, validation accuracy, {regime.described}"
        muted = {line["method"] for line in lines if line.get("dist_muted") and line["phase"] == "screen"}
        parts += _screening(title, latest(lines, "screen", regime, "validation"), study.FORMS, study.UNFED, muted)
        parts += _forgetting(lines, "screen", regime)
        title = f"## How long features teach, validation accuracy, {regime.described}"
        parts += _screening(title, latest(lines, "end", regime, "validation"), study.ENDS, study.ENDS[-1].name, set())
        title = f"## Switches of the default plan, validation accuracy, {regime.described}"
        parts += _screening(title, latest(lines, "switch", regime, "validation"), study.SWITCHES, study.SWITCHES[0].name, set())
        parts += _forgetting(lines, "switch", regime)
        title = f"## How finely regions are seen, validation accuracy, {regime.described}"
        parts += _screening(title, latest(lines, "cells", regime, "validation"), study.CELLS, study.CELLS[-1].name, set())
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
            tried["rate", f"{student(line)} alone", f"learning rate {line['plan']['lr']:g}"][line["pair"]] = line["validation"]
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
    rows = [
        f"| {gain.student} | {gain.epochs} | {gain.once:.2f} | {gain.twice:.2f} | {gain.points:+.2f} | {gain.seeds} |"
        for gain in gains(lines, regime)
    ]
    title = "### What twice as many epochs are worth to a student alone, validation accuracy"
    head = [title, "", "| student | epochs | once | twice | gain, points | seeds |", "|---|---|---|---|---|---|"]
    return [*head, *rows, ""] if rows else []


def _comparison(scores: Scores, regime: study.Regime, folder: Path) -> list[str]:
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
        *_by_pairs(scores),
        *(note for name, notes in study.NOTES.items() if name in named for note in (*notes, "")),
        *_behind(scores, named, study.UNPROMPTED),
    ]


def _by_pairs(scores: Scores) -> list[str]:
    """Whether other families would see the same lead: a harder question than that of other seeds."""
    ours = scores.get(study.DEFAULT, {})
    found = {method.name: across_pairs(ours, scores[method.name]) for method in study.METHODS if method.name in scores}
    told = ", ".join(f"{name} {told_p(p)}" for name, p in found.items() if name != study.DEFAULT and p is not None)
    return [f"With pairs as the sample, not seeds, p of the lead of {study.DEFAULT!r} over: {told}.", ""] if told else []


def _screening(title: str, scores: Scores, forms: Sequence[study.Method], reference: str, marked: set[str]) -> list[str]:
    if not scores:
        return []
    named = [method.name for method in forms if method.name in scores]
    pairs = [pair.name for pair in study.PAIRS if any(pair.name == key[0] for found in scores.values() for key in found)]
    return [title, "", *_table(scores, named, pairs, reference, marked)]


def _table(scores: Scores, named: list[str], pairs: list[str], reference: str, marked: set[str]) -> list[str]:
    """Mean and standard deviation per pair, and the paired difference to ``reference``, p corrected by Holm."""
    tests, corrected = against(scores, named, reference)
    rows = [f"| method | {' | '.join(pairs)} | {_columns(reference)} |", "|---" * (len(pairs) + 5) + "|"]
    for name in named:
        cells = [_cell([value for key, value in scores[name].items() if key[0] == pair]) for pair in pairs]
        told = _told(tests[name], corrected.get(name)) if name in tests else " |  |  | "
        rows.append(f"| {name}{f' {MUTED}' if name in marked else ''} | {' | '.join(cells)} | {told} |")
    return [*rows, ""]


def _behind(scores: Scores, named: list[str], reference: str) -> list[str]:
    """The paired differences to one more method, p corrected by Holm."""
    tests, corrected = against(scores, named, reference)
    rows = [f"| {name} | {_told(test, corrected.get(name))} |" for name, test in tests.items()]
    return [f"| method | {_columns(reference)} |", "|---" * 5 + "|", *rows, ""] if rows else []


def _columns(reference: str) -> str:
    return f"difference to {reference!r}, points | seeds | p | corrected p"


def _told(test: Test, corrected: float | None) -> str:
    difference, p, seeds = test
    return f"{100 * difference:+.2f} | {seeds} | {told_p(p)} | {told_p(corrected)}"


def _cell(values: list[float]) -> str:
    if not values:
        return ""
    return f"{100 * mean(values):.2f}" + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


def _forgetting(lines: Iterable[dict], phase: str, regime: study.Regime) -> list[str]:
    """What became of the prompted teacher by the last epoch, per form and pair."""
    rows = [
        f"| {row.form} | {row.pair} | {mean(row.drops):+.1f} | {max(row.drops):+.1f} | {mean(row.drifts):.3f} | {len(row.drops)} |"
        for row in forgotten(lines, phase, regime)
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


def draw(scores: Scores, named: list[str], pairs: list[str], path: Path) -> None:
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
