"""results.json -> README.md and one picture per model; nothing is typed by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from entries import Entry, Field
from races import kept
from verdict import AHEAD, KEPT_ACCURACY, KEPT_AGREEMENT, Goal, Race, goals, good, p50, ratio

TARGETS = ("cpu-onnxruntime", "cpu-openvino", "any-runtime")
METHOD = f"""
Is what fofa-deploy deploys faster, at the same fidelity, than the best that any other tool makes of the same model on the same
machine? Every tool gets the same float model (ONNX, or its weights) and the same calibration images. Everything it makes is

- held to PyTorch by the same function on test images that no tool has seen: top-1 accuracy where there are labels, agreement with
  PyTorch's top-1 class, cosine similarity of the logits;
- timed by the same stopwatch: batch 1, as many threads as cores, a process each, all of a target interleaved in blocks of about
  50 ms in an order shuffled each round. Everything on ONNX Runtime runs with and without spinning, peers on OpenVINO as it comes
  and with its latency hint; six rounds choose the setting. What is reported are the heats after them, each with new processes:
  the same kernels in two processes differ by a percent or two for as long as those live.

`cpu-onnxruntime` and `cpu-openvino` compare what runs on the same runtime. `any-runtime` races the fastest of both sides from
those two, what was deployed there, and PyTorch's compilers. *Deployed* is the recipe that the project's tuner chooses by accuracy
on the validation images and by these latencies; the other rows of ours are what it tried, and what else belongs to families
with a recipe inside the budget: the same kernels with other numbers.

Goals, per model and target: (a) at >= {KEPT_ACCURACY:.0%} of fp32's accuracy (without labels: >= {KEPT_AGREEMENT:.0%} agreement),
what is deployed is at least as fast as the fastest peer that reaches it; (b) something of ours that agrees with fp32 at least as
often as the fastest peer of all is at least as fast as that; (c) what is deployed is {AHEAD:g}x ahead of the peers' defaults on the
geometric mean. Ratios are peer / ours with 95 % intervals (Student's) over heats: *yes* and *no* are beyond the interval, *open* is
inside it. They are geometric means over heats, p50 is the median over heats: where a heat was disturbed the two differ, and the
interval is wide.

Tools that the project depends on itself (onnxruntime, nncf, openvino, torch) run in its own environment; olive-ai, optimum-onnx,
optimum-intel and torchao in environments of their own, which see its packages and hold PyTorch and the runtimes at its versions.
"""


def gather(folders: Sequence[Path], work: Path) -> dict[str, Any]:
    """The record of all models that were measured."""
    from fofa_deploy.environment import describe

    models = []
    for folder in folders:
        races = [found for target in TARGETS if (found := kept(folder, target))]
        if races:
            field = Field.model_validate_json((folder / "field.json").read_bytes())
            without_paths = json.loads(
                field.model_dump_json(exclude={"entries": {"__all__": {"folder"}}}).replace(str(work), "WORK")
            )
            models.append({"field": without_paths, "races": [found.model_dump(mode="json") for found in races]})
            models[-1]["goals"] = {found.target: [goal.model_dump() for goal in goals(field, found)] for found in races}
    return {"environment": describe().model_dump(mode="json"), "models": models}


def write(record: dict[str, Any], out: Path) -> None:
    place = record["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in place["versions"].items())
    lines = [
        "# The best of other tools, side by side",
        "",
        "Written by `python benchmarks/peers/run.py`; nothing here is typed by hand.",
        "",
        f"{place['cpu']}, {place['cores']} cores, {place['os']}, Python {place['python']}; {versions}.",
        *METHOD.splitlines(),
        "## Goals",
        "",
        *_table(("model", "target", "goal", "wanted", "ours", "peer", "peer / ours", "met"), list(_goal_rows(record))),
        "",
    ]
    for model in record["models"]:
        lines += _model_page(model, out)
    (out / "README.md").write_text("\n".join(lines).rstrip() + "\n")


def _goal_rows(record: dict[str, Any]) -> list[Sequence[str]]:
    rows = []
    for model in record["models"]:
        for target, found in model["goals"].items():
            rows += [(model["field"]["model"], target, *_goal_cells(Goal.model_validate(goal))) for goal in found]
    return rows


def _goal_cells(goal: Goal) -> Sequence[str]:
    found = f"{goal.ratio.value:.2f} [{goal.ratio.low:.2f}, {goal.ratio.high:.2f}]" if goal.ratio else ""
    met = "yes" if goal.met == "yes" else f"**{goal.met}**"
    return goal.name, f">= {goal.wanted:g}x", goal.ours, goal.peer, found, met


def _model_page(model: dict[str, Any], out: Path) -> list[str]:
    field = Field.model_validate(model["field"])
    races = [Race.model_validate(found) for found in model["races"]]
    picture = f"{field.model}.svg"
    draw(field, races, out / picture)
    judged = f"accuracy of fp32 {field.top1:.2%}" if field.top1 is not None else "no labels: agreement counts"
    lines = [
        f"## {field.model}",
        "",
        f"{field.parameters:,} parameters; {field.images} test images; {judged}.",
        "",
        f"![latency and fidelity of everybody]({picture})",
        "",
    ]
    for race in races:
        lines += [f"### {field.model}, {race.target}", "", *_race_table(field, race), ""]
    absent = [(entry.key, _plain(entry.failure)) for entry in field.entries if entry.failure]
    absent += [(name, _plain(why)) for race in races for name, why in race.missing.items()]
    if absent:
        lines += [f"Not measured for {field.model}:", "", *_table(("who", "its own last words"), absent), ""]
    return lines


def _race_table(field: Field, race: Race) -> list[str]:
    entries = {entry.key: entry for entry in field.entries}
    order = sorted(race.laps, key=lambda key: p50(race.laps[key]))
    columns = ("who", "what", "setting", "p50 ms", "deployed is faster by", "top-1", "agreement", "cosine", "MiB", "built in s")
    rows = [_row(entries[key], field, race) for key in order]
    heats = next(iter(race.laps.values())).heats_ms
    when = f"Measured {race.measured_at}, {len(heats)} heats of {len(heats[0])} rounds, {race.seconds:.0f} s"
    load = "" if race.load_average is None else f"; load average before: {race.load_average:.1f}"
    return [*_table(columns, rows), "", f"{when}{load}. *Italic*: below the goal's fidelity."]


def _row(entry: Entry, field: Field, race: Race) -> Sequence[str]:
    lap, found = race.laps[entry.key], entry.tested
    assert found
    name = entry.key if entry.side == "peer" else f"ours: {entry.key}"
    name = f"**{name}** (deployed)" if entry.key in race.chosen else name if good(entry, field) else f"*{name}*"
    against = ""
    if race.chosen and entry.key not in race.chosen:
        than = ratio([lap], [race.laps[race.chosen[0]]])
        against = f"{than.value:.2f}x [{than.low:.2f}, {than.high:.2f}]"
    return (
        name + (", default" if entry.default else ""),
        entry.description,
        lap.setting,
        f"{p50(lap):.3f}",
        against,
        "" if found.top1 is None else f"{found.top1:.2%}",
        f"{found.agreement:.2%}",
        "" if found.cosine is None else f"{found.cosine:.4f}",
        f"{entry.size_bytes / 2**20:.1f}",
        "" if entry.build_seconds is None else f"{entry.build_seconds:.0f}",
    )


def _plain(text: str) -> str:
    return text.replace("\n", " ").replace("|", "\\|")


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(cells) + " |" for cells in [columns, ["---"] * len(columns), *rows]]


# --- picture ------------------------------------------------------------------------------------------------------


def draw(field: Field, races: Sequence[Race], path: Path) -> None:
    """Latency against agreement with fp32, a panel per target; the better corner is the upper left."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    matplotlib.rcParams |= {"svg.hashsalt": "peers", "svg.fonttype": "path"}
    figure, panels = pyplot.subplots(1, len(races), figsize=(5.2 * len(races), 4.4), squeeze=False, layout="constrained")
    entries = {entry.key: entry for entry in field.entries}
    for race, panel in zip(races, panels[0], strict=True):
        for side, colour, mark in (("peer", "tab:orange", "o"), ("ours", "tab:blue", "s")):
            mine = [entries[key] for key in race.laps if entries[key].side == side]
            _scatter(panel, mine, race, colour, mark, side)
        panel.set(xscale="log", xlabel="p50, ms", ylabel="agreement with fp32", title=f"{field.model}, {race.target}")
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right")
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _scatter(panel: Any, entries: Sequence[Entry], race: Race, colour: str, mark: str, side: str) -> None:  # noqa: ANN401
    points = [(p50(race.laps[entry.key]), entry.tested.agreement, entry) for entry in entries if entry.tested]
    panel.scatter([x for x, _, _ in points], [y for _, y, _ in points], c=colour, marker=mark, label=side, alpha=0.8)
    for x, y, entry in points:
        weight = "bold" if entry.key in race.chosen else "normal"
        panel.annotate(entry.name, (x, y), fontsize=5, fontweight=weight, xytext=(3, 3), textcoords="offset points")
