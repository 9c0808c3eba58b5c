"""The picture of how the student was chosen."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from markupsafe import Markup
from matplotlib.axes import Axes

from fofa_deploy.report import words
from fofa_deploy.report.plots import INK, LABEL_LENGTH, MUTED, RULE, SERIES, STYLE, Dot, figure_of, label_all, svg_of
from fofa_deploy.results import CandidateRow, RunReport


def choice_plot(report: RunReport) -> Markup:
    """Foretold accuracy of the candidates over their latency, the front as a line, the chosen one filled. Empty without any."""
    found = report.choice
    placed = [(row, dot) for row in found.rows if (dot := _dot(row))] if found else []
    if not found or not placed:
        return Markup("")
    with mpl.rc_context(STYLE):
        figure, (axes,) = figure_of(14.4, 5.2, 1)
        _draw(axes, placed)
        axes.set_xlabel(f"median latency on {words.clipped(found.target)}, ms")
        axes.set_ylabel("foretold validation top-1, %")
        axes.grid(color=RULE, lw=0.7)
        axes.tick_params(length=0, which="both")
        axes.margins(x=0.1, y=0.15)
        axes.set_xlim(left=0)
        figure.tight_layout()
        label_all(figure, axes, [dot for _, dot in placed])
        return svg_of(figure, "Foretold validation accuracy of the candidates against their median latency")


def _dot(row: CandidateRow) -> Dot | None:
    if row.foretold is None or row.p50_ms is None:
        return None
    return Dot(row.p50_ms, 100 * row.foretold, words.clipped(row.name, LABEL_LENGTH), 0, row.chosen)


def _draw(axes: Axes, placed: Sequence[tuple[CandidateRow, Dot]]) -> None:
    line = sorted((dot.x, dot.y) for row, dot in placed if row.front)
    axes.plot([x for x, _ in line], [y for _, y in line], color=MUTED, lw=1.2)
    for _, dot in placed:
        axes.plot(dot.x, dot.y, "o", ms=9, color=SERIES[0] if dot.chosen else INK, mfc=SERIES[0] if dot.chosen else "none", mew=1.6)
