"""README.md and the picture, from the record alone; what is missing is said."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contenders import Scale
from outcome import Goal, Record, Verdict, goals, rank_correlations, verdicts
from stopwatch import Times

from fofa_deploy.results import Environment
from fofa_deploy.store import write_atomic

sys.path.append(str(Path(__file__).parent.parent / "zoo-distill"))
from keeper import table

PICTURE = "accuracy-latency.svg"
NOT_FITTING = "does not fit"
ABOUT = """
A budget is a limit on the 90th percentile of latency, batch 1, all cores. Every contender is trained by the whole schedule of the
default plan, tuned for the target, and timed beside all others in one interleaved run: that is the truth. Budgets let in the
fastest quarter, half and three quarters, half-way (in logarithms) to the next slower contender; they were set once, from these
latencies.

When this was recorded, on 2026-11-28, the default plan was `fofa+rsd+dist` without prompts and with features to the end; today's
has not been run here.

- **chosen**: by `student.model = "auto"` with the budget in the plan, which knows neither the truth nor the test images; nothing
  where by what it measured itself nobody keeps the budget.
- **by FLOPs**, **by parameters**: the largest by that count of those that the *measured* latencies let in, which is generous.
- **regret**: points of validation accuracy behind the best contender that fits. Test accuracy is shown beside it and decides
  nothing.
- **cost**: training images that the selection showed to each contender times that contender's measured seconds per image (one
  thread), as a share of the same sum over all contenders' whole schedules.

Where one contender is the best at every budget, as by accuracy on one CPU it may be, a regret of 0 says little of other choices.
"""


def results(record: Record) -> dict[str, Any]:
    """What ``results.json`` holds: the record, and what follows from it."""
    return {
        "record": record.model_dump(mode="json"),
        "verdicts": [verdict.model_dump(mode="json") for verdict in verdicts(record)],
        "rank_correlations": rank_correlations(record),
        "goals": [goal.model_dump() for goal in goals(record)],
    }


def write(record: Record, folder: Path) -> None:
    """results.json, README.md and, where there is something to draw, the picture."""
    write_atomic(folder / "results.json", json.dumps(results(record), indent=1, allow_nan=False).encode() + b"\n")
    if record.complete:
        draw(record, folder / PICTURE)
    (folder / "README.md").write_text(page(record))


def page(record: Record) -> str:
    scale = record.scale
    parts = [
        "# Does choosing by measurement find the best student, cheaply?",
        "",
        "Written by `python benchmarks/select/run.py`; nothing here is typed by hand.",
        "",
        machine(record.environment),
        setting(scale),
        ABOUT,
        *missing(record),
    ]
    if found := verdicts(record):
        parts += ["## Goals", "", *goal_rows(goals(record)), "", *_decisions(found)]
    if record.complete:
        parts += [f"![accuracy and latency of the contenders; the budgets as lines]({PICTURE})", ""]
        parts += ["## What the rules of thumb go by", "", *_correlations(record), ""]
    parts += _contenders(record)
    return "\n".join(parts).rstrip() + "\n"


def setting(scale: Scale) -> str:
    students = f"{scale.images:,} training images, {scale.epochs} epochs per student"
    return f"Fashion-MNIST at 16 px, {students}; the teacher was fitted to {scale.teacher_images:,} images."


def machine(environment: Environment | None) -> str:
    if environment is None:
        return ""
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items())
    return f"{environment.cpu}, {environment.cores} cores, {environment.os}, Python {environment.python}; {versions}."


def missing(record: Record) -> list[str]:
    """A sentence about each part that is still to be run."""
    untrained = [name for name in record.scale.contenders if name not in record.truth()]
    undecided = [(t.target, b) for t in record.times for b in t.budgets_ms if record.pick(t.target, b) is None]
    told = []
    if untrained:
        told.append(f"Not trained yet: {', '.join(untrained)}.")
    if not record.times:
        told.append("No contender has been timed yet, so there are no budgets.")
    if undecided:
        told.append(f"Not chosen yet: {', '.join(f'{target} at {budget:.3f} ms' for target, budget in undecided)}.")
    return [f"**Unfinished.** {' '.join(told)} Run the command again.", ""] if told else []


def goal_rows(found: Sequence[Goal]) -> list[str]:
    """A Markdown table."""
    columns = ("goal", "wanted", "measured", "met")
    return table(columns, [(g.name, f"{g.goal} {g.unit}".strip(), _measured(g), "yes" if g.met else "**no**") for g in found])


def _measured(goal: Goal) -> str:
    return goal.measured if isinstance(goal.measured, str) else "" if goal.measured is None else f"{goal.measured:.3g}"


def _decisions(found: Sequence[Verdict]) -> list[str]:
    columns = ("target", "p90 budget, ms", "fitting", "best", "chosen", "by FLOPs", "by parameters", "cost")
    return ["## Choices", "", *table(columns, [_decision(one) for one in found]), ""]


def _decision(one: Verdict) -> Sequence[str]:
    ways = (("chosen", one.chosen), ("by_flops", one.by_flops), ("by_parameters", one.by_parameters))
    choices = [f"{name or 'nothing'}: {_regret(one.regret[way])}{_test(one, name)}" for way, name in ways]
    best = f"{one.best}{_test(one, one.best)}"
    return (one.target, f"{one.budget_ms:.3f}", str(len(one.fitting)), best, *choices, f"{one.cost:.1%}" if one.cost else "")


def _regret(value: float | None) -> str:
    return NOT_FITTING if value is None else f"regret {value:.2f}"


def _test(one: Verdict, name: str | None) -> str:
    return f" (test {one.test[name]:.2%})" if name in one.test else ""


def _correlations(record: Record) -> list[str]:
    columns = ("target", "Spearman's coefficient of FLOPs and p90", "of parameters and p90")
    found = rank_correlations(record)
    return table(columns, [(t, f"{row['FLOPs']:.2f}", f"{row['parameters']:.2f}") for t, row in found.items()])


def _contenders(record: Record) -> list[str]:
    targets = [times.target for times in record.times]
    columns = ("contender", "parameters", "M multiplications", "validation", "test", "seconds", *(f"{t}, p90 ms" for t in targets))
    known = sorted(record.truth().items(), key=lambda item: item[1].macs)
    rows = []
    for name, one in known:
        sizes = f"{one.parameters:,}", f"{one.macs / 1e6:.2f}", f"{one.validation:.2%}", f"{one.test:.2%}", f"{one.seconds:.0f}"
        rows.append((name, *sizes, *(_timed(times, name) for times in record.times)))
    taught = record.teacher
    teacher = f"Teacher: {taught.model}, {taught.parameters:,} parameters, test {taught.test:.2%}." if taught else ""
    return ["## Contenders", "", teacher, "", *table(columns, rows), ""] if rows else []


def _timed(times: Times, name: str) -> str:
    row = next((row for row in times.rows if row.contender == name), None)
    return f"{row.p90_ms:.3f} ({row.recipe})" if row else ""


# --- picture ------------------------------------------------------------------------------------------------------


def pyplot() -> Any:  # noqa: ANN401 - a module
    """Matplotlib set up so that the same record makes the same file."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot as found

    matplotlib.rcParams |= {"svg.hashsalt": "select", "svg.fonttype": "path"}
    return found


def draw(record: Record, path: Path) -> None:
    """One panel per target: accuracy over latency, area by FLOPs, a line per budget, a ring around what was chosen for it."""
    plot = pyplot()
    figure, panels = plot.subplots(
        1, len(record.times), figsize=(5.6 * len(record.times), 4.4), squeeze=False, layout="constrained"
    )
    for times, panel in zip(record.times, panels[0], strict=True):
        _dots(panel, times, record)
        for number, budget in enumerate(times.budgets_ms):
            panel.axvline(budget, color=f"C{number + 1}", linestyle="--", linewidth=1)
            _ring(panel, times, record, budget, f"C{number + 1}", 260 + 160 * number)
        panel.set(xlabel="p90, ms", ylabel="validation accuracy, %", title=times.target)
        logarithmic(panel)
    figure.savefig(path, metadata={"Date": None})
    plot.close(figure)


def logarithmic(panel: Any) -> None:  # noqa: ANN401
    """Latencies, with ticks in plain milliseconds that do not run into each other."""
    from matplotlib.ticker import LogLocator, NullFormatter, NullLocator

    panel.set_xscale("log")
    panel.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    panel.xaxis.set_major_formatter("{x:g}")
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.margins(x=0.12)
    panel.grid(alpha=0.3)


def _dots(panel: Any, times: Times, record: Record) -> None:  # noqa: ANN401
    truth = record.truth()
    largest = max(one.macs for one in truth.values())
    for row in times.rows:
        one = truth[row.contender]
        panel.scatter(row.p90_ms, 100 * one.validation, s=20 + 400 * one.macs / largest, color="C0", alpha=0.5)
        panel.annotate(row.contender, (row.p90_ms, 100 * one.validation), fontsize=7, xytext=(4, 4), textcoords="offset points")


def _ring(panel: Any, times: Times, record: Record, budget: float, colour: str, size: float) -> None:  # noqa: ANN401
    pick = record.pick(times.target, budget)
    if pick and pick.contender:
        place = times.p90_ms[pick.contender], 100 * record.truth()[pick.contender].validation
        panel.scatter(*place, s=size, facecolors="none", edgecolors=colour, linewidths=1.5)
