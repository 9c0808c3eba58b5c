"""README.md and the picture that a user decides by, from the record alone; what is missing is said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from outcome import Record
from rivals import WAYS
from sheet import goal_rows, logarithmic, machine, pyplot, setting, table
from standing import OURS, Frontier, Place, Standing, goals, places

from fofa_deploy.store import write_atomic

PICTURE = "frontier.svg"
NAMES = {OURS: "ours: select, distill, tune", **{way.name: way.title for way in WAYS}}
ABOUT = """
Test accuracy of the exported artifact, mean and standard deviation over seeds, within a budget on the 90th percentile of latency
(batch 1, all cores). The budgets and the contenders are those of [benchmarks/select](../select/README.md).

- **ours**: what the selection takes for the budget among the contenders and the teacher itself: a student, distilled by the default
  plan of 2026-11-28 (see there), or the teacher as it is; and the artifact that the tuner deploys of it on the target. The
  selection ran once; a student was trained with every seed.
- **the teacher, NNCF's defaults**: `nncf.quantize` as it comes, on OpenVINO; one figure, for there is one teacher.
- **trained alone, quantize_static's defaults**: the same schedule without a teacher, `quantize_static` as it comes, on
  ONNX Runtime.
- **plain KD, NNCF's defaults**: the same schedule by Hinton's distillation, `nncf.quantize` as it comes, on OpenVINO.

For the last two the model is the largest by FLOPs of the same contenders that meets the budget after that treatment, as measured
beforehand: which is generous, for whoever counts FLOPs does not know that. Both targets are the same CPU, and every rival runs on
the runtime that its tool is made for. All of a target's p90 figures are from one interleaved run, apart from the runs that set the
budgets and chose the rivals. Ours is ahead where it keeps the budget there and its mean is above the rival's: of the teacher there
is one artifact each, and over three seeds a lead of a quarter of a point is within what other seeds may give.
"""


def results(found: Frontier, selected: Record) -> dict[str, Any]:
    """What ``results.json`` holds: the record, and what follows from it."""
    return {
        "record": found.model_dump(mode="json"),
        "places": [place.model_dump(mode="json") for place in places(found)],
        "goals": [goal.model_dump() for goal in goals(found, budget_count(selected))],
    }


def budget_count(selected: Record) -> int:
    return sum(len(times.budgets_ms) for times in selected.times)


def write(found: Frontier, selected: Record, folder: Path) -> None:
    """results.json, README.md and, where there is something to draw, the picture."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "results.json", json.dumps(results(found, selected), indent=1, allow_nan=False).encode() + b"\n")
    if places(found):
        draw(places(found), folder / PICTURE)
    (folder / "README.md").write_text(page(found, selected))


def page(found: Frontier, selected: Record) -> str:
    decided = places(found)
    parts = [
        "# What does the whole pipeline bring within a budget of latency?",
        "",
        "Written by `python benchmarks/frontier/run.py`; nothing here is typed by hand.",
        "",
        machine(found.environment),
        f"{setting(selected.scale)} Seeds: {', '.join(map(str, found.seeds))}.",
        ABOUT,
        *missing(found, selected),
    ]
    if decided:
        parts += [f"![test accuracy within each budget, with standard deviations]({PICTURE})", ""]
        parts += ["## Goals", "", *goal_rows(goals(found, budget_count(selected))), ""]
        parts += ["## Every budget", "", *_place_rows(decided), "", *_failures(found)]
    return "\n".join(parts).rstrip() + "\n"


def missing(found: Frontier, selected: Record) -> list[str]:
    """A sentence about each part that is still to be run."""
    decided = {place.target for place in places(found)}
    told = []
    if not selected.picks:
        told.append("The selections are not recorded.")
    if not found.screened:
        told.append("The rivals' models are not chosen.")
    if undecided := [times.target for times in selected.times if times.target not in decided]:
        told.append(f"Not raced yet: {', '.join(undecided)}.")
    return [f"**Unfinished.** {' '.join(told)} Run the command again.", ""] if told else []


def _place_rows(decided: Sequence[Place]) -> list[str]:
    ways = list(NAMES)
    columns = ("target", "p90 budget, ms", *NAMES.values(), "ahead")
    rows = [
        (p.target, f"{p.budget_ms:.3f}", *(_cell(p.of(way), p.budget_ms) for way in ways), "yes" if p.ahead else "**no**")
        for p in decided
    ]
    return table(columns, rows)


def _cell(one: Standing | None, budget_ms: float) -> str:
    if one is None:
        return "nothing meets the budget"
    spread = "" if one.spread is None else f" ± {100 * one.spread:.2f}"
    late = "" if mean(one.p90_ms) <= budget_ms else ", over the budget"
    return f"{100 * one.mean:.2f}{spread} ({one.contender}, {mean(one.p90_ms):.3f} ms{late})"


def _failures(found: Frontier) -> list[str]:
    screened = [f"{one.way}, {one.contender}: {one.failure}" for one in found.screened if one.failure]
    raced = [f"{race.target}, {name}: {why}" for race in found.races for name, why in race.failed.items()]
    lines = [f"- {text.splitlines()[0]}" for text in (*screened, *raced)]
    return ["## What failed", "", *lines, ""] if lines else []


# --- picture ------------------------------------------------------------------------------------------------------


def draw(decided: Sequence[Place], path: Path) -> None:
    """One panel per target: test accuracy with error bars at each budget, every way a line."""
    plot = pyplot()
    targets = list(dict.fromkeys(place.target for place in decided))
    drawn, panels = plot.subplots(
        1, len(targets), figsize=(5.6 * len(targets), 4.6), squeeze=False, sharey=True, layout="constrained"
    )
    for target, panel in zip(targets, panels[0], strict=True):
        for number, way in enumerate(NAMES):
            _line(panel, [place for place in decided if place.target == target], way, number)
        panel.set(xlabel="p90 budget, ms", title=target)
        logarithmic(panel)
        budgets = sorted({place.budget_ms for place in decided if place.target == target})
        panel.set_xticks(budgets, [f"{budget:.3g}" for budget in budgets])
    panels[0][0].set_ylabel("test accuracy of the artifact, %")
    drawn.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=2, fontsize=8)
    drawn.savefig(path, metadata={"Date": None})
    plot.close(drawn)


def _line(panel: Any, own: Sequence[Place], way: str, number: int) -> None:  # noqa: ANN401
    found = [(place.budget_ms, one) for place in own if (one := place.of(way))]
    style = {"marker": "s", "linewidth": 2} if way == OURS else {"marker": "o", "linewidth": 1, "linestyle": "--"}
    # Side by side by a hair, so that bars that overlap can be told apart.
    places_ms = [budget * (1 + 0.015 * number) for budget, _ in found]
    spreads = [100 * (one.spread or 0.0) for _, one in found]
    panel.errorbar(
        places_ms, [100 * one.mean for _, one in found], yerr=spreads, color=f"C{number}", capsize=3, label=NAMES[way], **style
    )
