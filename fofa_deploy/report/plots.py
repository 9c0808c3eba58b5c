"""Inline SVG that takes its colours from the page, so that one picture serves light, dark and paper."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from fofa_deploy.report import words
from fofa_deploy.report.summary import reference_name, targets_of
from fofa_deploy.results import Epoch, RunReport, TargetRow

# Stand-ins that leave matplotlib as CSS variables: #000001 becomes var(--ink).
INK, MUTED, RULE, PAPER = "#000001", "#000002", "#000003", "#000004"
SERIES = tuple(f"#0000{number:02x}" for number in range(0x11, 0x17))
VARIABLES = {INK: "ink", MUTED: "muted", RULE: "rule", PAPER: "paper"} | {c: f"s{n}" for n, c in enumerate(SERIES, 1)}

MARKERS = ("o", "s", "^", "D", "v", "P")
# svg.fonttype none keeps text as text: it can be searched, read aloud and set in the page's own font.
STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fofa-deploy",
    "text.parse_math": False,  # a class named $\frac{$ is a name
    "font.size": 13,
    "text.color": INK,
    "axes.edgecolor": RULE,
    "axes.labelcolor": MUTED,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    "figure.facecolor": "none",
    "legend.frameon": False,
}
LABEL_SIZE = 12.0
LABEL_LENGTH = 34
SPAN = 15.0  # percentage points below the best; a recipe that collapsed further is pinned to the lower edge

# From the point, in pixels; tried in this order.
OFFSETS: tuple[tuple[float, float, Literal["left", "center", "right"]], ...] = (
    (12, -4, "left"),
    (-12, -4, "right"),
    (0, 13, "center"),
    (0, -22, "center"),
    (10, 12, "left"),
    (10, -21, "left"),
    (-10, 12, "right"),
    (-10, -21, "right"),
)

Box = tuple[float, float, float, float]
Point = tuple[float, float]


# --- accuracy against latency ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dot:
    """A recipe as the picture shows it: x in ms, y in percent."""

    x: float
    y: float
    text: str
    number: int
    chosen: bool


def scatter(report: RunReport) -> Markup:
    """Every recipe with a latency and an accuracy, and each target's Pareto front; the chosen ones filled. Empty when none is."""
    dots = _dots(report)
    if not dots:
        return Markup("")
    with mpl.rc_context(STYLE):
        figure, (axes,) = figure_of(14.4, 6.0, 1)
        star = _star(report)
        for number in {dot.number for dot in dots}:
            _draw_front(axes, [dot for dot in dots if dot.number == number])
        for dot in dots:
            _draw(axes, dot)
        if star:
            _draw_reference(axes, star)
        labelled = any(row.validation and row.validation.top1 is not None for row in report.targets)
        height = "validation top-1" if labelled else "agreement with PyTorch"
        _scatter_axes(axes, [dot.x for dot in (*dots, *([star] if star else []))], height)
        _legend(axes, report, {dot.number for dot in dots}, star)
        figure.tight_layout()
        label_all(figure, axes, dots)
        return svg_of(figure, "Validation accuracy against median latency of every recipe tried")


def _dots(report: RunReport) -> list[Dot]:
    rows = [(number, row) for number, target in enumerate(targets_of(report)) for row in target.rows]
    shown = [(number, row, at) for number, row in rows if (at := _place(row))]
    floor = _floor([y for *_, (_, y) in shown])
    return [Dot(x, max(y, floor), _name(row, y, floor), number, row.chosen) for number, row, (x, y) in shown]


def _floor(accuracies: Sequence[float]) -> float:
    """Where the picture ends: a collapsed recipe must not press the others, between which the choice is, into one line."""
    best = max(accuracies, default=0.0)
    lowest = min((y for y in accuracies if y >= best - SPAN), default=0.0)
    return lowest - max(1.0, 0.4 * (best - lowest))


def _place(row: TargetRow | None) -> Point | None:
    """Without labels, how often it says the same as PyTorch."""
    if row is None or row.latency_ms is None or row.validation is None:
        return None
    found = row.validation
    return row.latency_ms.p50, 100 * (found.agreement if found.top1 is None else found.top1)


def _name(row: TargetRow, y: float, floor: float) -> str:
    name = words.clipped(row.recipe, LABEL_LENGTH)
    return name if y >= floor else f"↓ {y:.1f} %  {name}"


def _star(report: RunReport) -> Dot | None:
    at = _place(report.reference)
    return Dot(*at, words.clipped(f"reference: {reference_name(report)}", 50), 0, chosen=False) if at else None


def _look(number: int) -> tuple[str, str]:
    return SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]


def _draw(axes: Axes, dot: Dot) -> None:
    colour, marker = _look(dot.number)
    face, size = (colour, 11) if dot.chosen else (PAPER, 8)
    axes.plot(dot.x, dot.y, marker, ms=size, mfc=face, mec=colour, mew=1.8, zorder=4 if dot.chosen else 3)


def _draw_front(axes: Axes, dots: Sequence[Dot]) -> None:
    """The Pareto front of a target: what no other of its recipes beats in both."""
    front = [dot for dot in dots if not any(o.x <= dot.x and o.y >= dot.y and (o.x, o.y) != (dot.x, dot.y) for o in dots)]
    front.sort(key=lambda dot: dot.x)
    colour, _ = _look(dots[0].number)
    axes.step([dot.x for dot in front], [dot.y for dot in front], where="post", color=colour, lw=1.2, alpha=0.6, zorder=2)


def _draw_reference(axes: Axes, star: Dot) -> None:
    axes.axhline(star.y, color=MUTED, lw=0.9, ls=(0, (2, 4)), zorder=1)
    axes.axvline(star.x, color=MUTED, lw=0.9, ls=(0, (2, 4)), zorder=1)
    axes.plot(star.x, star.y, "*", ms=15, color=INK, zorder=4)


def _scatter_axes(axes: Axes, times: Sequence[float], height: str) -> None:
    if min(times) > 0 and max(times) > 4 * min(times):
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %" if value <= 100 else ""))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    axes.margins(x=0.14, y=0.14)
    axes.grid(axis="y", color=RULE, lw=0.8)
    axes.tick_params(length=0, pad=6)
    axes.set_xlabel("median latency, ms")
    axes.set_ylabel(height)


def _legend(axes: Axes, report: RunReport, numbers: set[int], star: Dot | None) -> None:
    for number, target in enumerate(targets_of(report)):
        if number in numbers:
            colour, marker = _look(number)
            axes.plot([], [], marker, ms=8, color=colour, label=words.clipped(target.name, LABEL_LENGTH))
    if star:
        axes.plot([], [], "*", color=INK, ms=12, label=star.text)
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.01), ncols=4, labelcolor=MUTED, handletextpad=0.2, columnspacing=1.4)


def label_all(figure: Figure, axes: Axes, dots: Sequence[Dot]) -> None:
    """Name each point where there is room; a name that would cover another is left to the table, chosen ones go first."""
    figure.draw_without_rendering()
    frame = axes.get_window_extent()
    spots = [(dot, axes.transData.transform((dot.x, dot.y))) for dot in sorted(dots, key=lambda dot: not dot.chosen)]
    taken: list[Box] = [(x - 7, y - 7, x + 7, y + 7) for _, (x, y) in spots]
    for dot, (x, y) in spots:
        for dx, dy, side in OFFSETS:
            box = _label_box((x + dx, y + dy), 0.56 * LABEL_SIZE * len(dot.text), side)
            if box[0] >= frame.x0 and box[2] <= frame.x1 and not any(_overlap(box, other) for other in taken):
                _write(axes, dot, (dx, dy), side)
                taken.append(box)
                break


def _label_box(corner: Point, width: float, side: str) -> Box:
    left = corner[0] - {"left": 0.0, "center": width / 2, "right": width}[side]
    return left, corner[1] - 3, left + width, corner[1] + LABEL_SIZE


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _write(axes: Axes, dot: Dot, offset: Point, side: Literal["left", "center", "right"]) -> None:
    weight, colour = ("bold", INK) if dot.chosen else ("normal", MUTED)
    axes.annotate(
        dot.text,
        (dot.x, dot.y),
        offset,
        textcoords="offset points",
        ha=side,
        fontsize=LABEL_SIZE,
        color=colour,
        fontweight=weight,
    )


# --- training curves ------------------------------------------------------------------------------------------


def curves(report: RunReport) -> dict[str, Markup]:
    """One picture per stage: loss, validation accuracy and, where there are any, the teacher's diagnostics."""
    with mpl.rc_context(STYLE):
        return {stage: _curve(stage, epochs) for stage, epochs in report.curves.items() if epochs}


def _curve(stage: str, epochs: Sequence[Epoch]) -> Markup:
    accuracies, others = _accuracies(epochs), _others(epochs)
    panels = [("loss", _losses(epochs)), ("accuracy, %", accuracies), ("teacher diagnostics", others)]
    drawn = [(title, lines) for title, lines in panels if lines]
    figure, all_axes = figure_of(14.4, 4.2, len(drawn))
    for axes, (title, lines) in zip(all_axes, drawn, strict=True):
        _panel(axes, title, lines)
    figure.tight_layout(w_pad=2.5)
    return svg_of(figure, f"Training curves of {words.clipped(stage, 60)}")


Lines = dict[str, list[Point]]


def _losses(epochs: Sequence[Epoch]) -> Lines:
    return {"total": [(e.epoch, e.loss) for e in epochs], **_by_name((e.epoch, e.losses) for e in epochs)}


def _accuracies(epochs: Sequence[Epoch]) -> Lines:
    student = [(float(e.epoch), 100 * e.top1) for e in epochs if e.top1 is not None]
    watched = _by_name((e.epoch, {k: 100 * v for k, v in e.diagnostics.items() if "top1" in k}) for e in epochs)
    return ({"validation top-1": student} if student else {}) | watched


def _others(epochs: Sequence[Epoch]) -> Lines:
    return _by_name((e.epoch, {k: v for k, v in e.diagnostics.items() if "top1" not in k}) for e in epochs)


def _by_name(values: Iterable[tuple[int, Mapping[str, float]]]) -> Lines:
    lines: Lines = {}
    for epoch, terms in values:
        for name, value in terms.items():
            lines.setdefault(words.clipped(name, LABEL_LENGTH), []).append((epoch, value))
    return lines


def _panel(axes: Axes, title: str, lines: Lines) -> None:
    for number, (name, line) in enumerate(lines.items()):
        colour = INK if number == 0 else SERIES[(number - 1) % len(SERIES)]
        marker = "o" if len(line) == 1 else ""
        axes.plot(*zip(*line, strict=True), color=colour, lw=1.8 if number == 0 else 1.3, marker=marker, ms=4, label=name)
    values = [y for line in lines.values() for _, y in line]
    if title == "loss" and min(values) > 0 and max(values) > 50 * min(values):
        axes.set_yscale("log")
    axes.set_title(title, loc="left", fontsize=13.5, color=INK)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(axis="y", color=RULE, lw=0.7)
    axes.tick_params(length=0, which="both")
    axes.legend(fontsize=12, labelcolor=MUTED, handlelength=1.2, borderaxespad=0.2)


# --- history of checks ----------------------------------------------------------------------------------------

COLOURS = {
    "ink": "#1a1a1a",
    "muted": "#5f6368",
    "rule": "#c9ccd1",
    "paper": "#ffffff",
    "s1": "#0b6bcb",
    "s2": "#c2410c",
    "s3": "#15803d",
    "s4": "#7e22ce",
    "s5": "#b91c1c",
    "s6": "#0f766e",
}
"""For a picture without a page around it."""


def trend(panels: Mapping[str, Mapping[str, Sequence[Sequence[Point]]]]) -> str:
    """A standalone SVG file: one panel per figure, one colour per name, and a gap wherever a name's next run of points begins."""
    with mpl.rc_context(STYLE):
        figure, all_axes = figure_of(14.4, 4.2, len(panels))
        for axes, (title, lines) in zip(all_axes, panels.items(), strict=True):
            _trend_panel(axes, title, lines)
        figure.tight_layout(w_pad=2.5)
        svg = svg_of(figure, "Figures of every check, in the order of checking")
    variables = ";".join(f"--{name}:{colour}" for name, colour in COLOURS.items())
    style = f'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" style="{variables};background:#ffffff"'
    return f"{str(svg).replace('<svg ', f'<svg {style} ', 1)}\n"


def _trend_panel(axes: Axes, title: str, lines: Mapping[str, Sequence[Sequence[Point]]]) -> None:
    for number, (name, runs) in enumerate(lines.items()):
        colour, marker = _look(number)
        for part, run in enumerate(runs):
            label = words.clipped(name, LABEL_LENGTH) if part == 0 else None
            axes.plot(*zip(*run, strict=True), color=colour, lw=1.4, marker=marker, ms=4, label=label)
    axes.set_title(title, loc="left", fontsize=13.5, color=INK)
    axes.set_xlabel("check")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.grid(axis="y", color=RULE, lw=0.7)
    axes.tick_params(length=0, which="both")
    if lines:
        axes.legend(fontsize=12, labelcolor=MUTED, handlelength=1.2, borderaxespad=0.2)


# --- matplotlib's SVG into the page's ------------------------------------------------------------------------


def figure_of(width: float, height: float, columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=(width, height), dpi=72)
    grid = figure.subplots(1, columns, squeeze=False)
    return figure, list(grid[0])


def svg_of(figure: Figure, label: str) -> Markup:
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    body = re.sub(r"<metadata>.*?</metadata>", "", stream.getvalue(), flags=re.DOTALL)
    inner = body[body.index("<svg") :].partition(">")[2]
    size = re.search(r'viewBox="[^"]*"', body)
    return Markup(f'<svg {size.group() if size else ""} role="img" aria-label="{Markup.escape(label)}">{_themed(inner)}')


def _themed(body: str) -> str:
    """Page colours, page font, and none of the numbered ids that would clash between two pictures of one page."""
    body = re.sub(r"#0000[0-9a-f]{2}", lambda m: f"var(--{VARIABLES.get(m.group(), 'ink')})", body)
    body = re.sub(r"(font: (?:\w+ )*[\d.]+px) [^;\"]*", r"\1 inherit", body)
    return re.sub(r' id="[A-Za-z]\w*_\d+"', "", body)
