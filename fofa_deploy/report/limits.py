"""Pictures of where time goes: layers under this machine's roofline, and one artifact on several devices."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes

from fofa_deploy.report import words
from fofa_deploy.report.plots import LABEL_LENGTH, MARKERS, MUTED, RULE, SERIES, STYLE, figure_of, svg_of
from fofa_deploy.report.summary import fleet, profiled
from fofa_deploy.results import LayerCost, Peaks, RunReport, TargetRow

SPAN = (0.1, 1000.0)
"""Operations per byte that the picture shows."""


def rooflines(report: RunReport) -> dict[str, Markup]:
    """Per chosen artifact with profiled layers: each layer's speed over its arithmetic intensity, below the measured limits."""
    with mpl.rc_context(STYLE):
        return {row.target: _roofline(row, row.peaks) for row in profiled(report) if row.peaks and _placed(row.layers)}


def _placed(layers: Sequence[LayerCost]) -> list[tuple[float, float, LayerCost]]:
    """(operations per byte, 10^9 operations per second) of every layer for which both are known."""
    return [(2 * x.macs / x.bytes, 2 * x.macs / x.ms / 1e6, x) for x in layers if x.macs and x.bytes and x.ms]


def _roofline(row: TargetRow, peaks: Peaks) -> Markup:
    figure, (axes,) = figure_of(14.4, 5.2, 1)
    precisions = sorted({layer.precision for *_, layer in _placed(row.layers)})
    for number, precision in enumerate(precisions):
        dots = [(x, y, layer) for x, y, layer in _placed(row.layers) if layer.precision == precision]
        _roof(axes, peaks, precision, SERIES[number % len(SERIES)])
        for x, y, layer in dots:
            size = 5 + 25 * layer.share**0.5
            axes.plot(x, y, MARKERS[number % len(MARKERS)], ms=size, mfc="none", mec=SERIES[number % len(SERIES)], mew=1.6)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte")
    axes.set_ylabel("10⁹ operations per second")
    _plain(axes)
    figure.tight_layout()
    return svg_of(figure, f"Layers of {row.recipe} on {row.target} below the measured limits of the machine")


def _roof(axes: Axes, peaks: Peaks, precision: str, colour: str) -> None:
    limit = peaks.gops[precision]
    ridge = min(max(limit / peaks.gbps, SPAN[0]), SPAN[1])
    xs = (SPAN[0], ridge, SPAN[1])
    axes.plot(xs, [min(limit, x * peaks.gbps) for x in xs], color=colour, lw=1.6, label=f"{precision}: {limit:,.0f} · 10⁹/s")


def fleet_plot(report: RunReport) -> Markup:
    """Median latency of every artifact that was measured in several places."""
    groups = fleet(report)
    if not groups:
        return Markup("")
    places = list(dict.fromkeys(row.target for rows in groups.values() for row in rows))
    with mpl.rc_context(STYLE):
        figure, (axes,) = figure_of(14.4, 1.4 + 0.45 * len(places), 1)
        for number, (recipe, rows) in enumerate(groups.items()):
            points = [(row.latency_ms.p50, places.index(row.target)) for row in rows if row.latency_ms]
            colour, marker = SERIES[number % len(SERIES)], MARKERS[number % len(MARKERS)]
            axes.plot(*zip(*points, strict=True), marker, ms=9, color=colour, label=words.clipped(recipe, LABEL_LENGTH))
        axes.set_yticks(range(len(places)), [words.clipped(place, LABEL_LENGTH) for place in places])
        axes.set_ylim(len(places) - 0.5, -0.5)
        axes.set_xlim(left=0)
        axes.set_xlabel("median latency, ms")
        _plain(axes)
        figure.tight_layout()
        return svg_of(figure, "Median latency of the same artifacts on several devices")


def _plain(axes: Axes) -> None:
    axes.grid(color=RULE, lw=0.7)
    axes.tick_params(length=0, which="both")
    axes.legend(loc="lower left", bbox_to_anchor=(-0.01, 1.01), ncols=4, labelcolor=MUTED, fontsize=12)
