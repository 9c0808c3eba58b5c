"""How results look on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fofa_deploy.progress import Progress, Quiet, Terminal, one_line

if TYPE_CHECKING:
    from fofa_deploy.files import FileRow
    from fofa_deploy.results import Measurement, RunReport, TargetRow

LOG_WIDTH = 1000

_COLOURS = {"verified": "green", "built-not-run": "cyan", "rejected": "yellow", "failed": "red", "skipped": "dim"}


def progress(quiet: bool) -> Progress:
    return Quiet() if quiet else Terminal()


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table; cells may hold rich markup, so what comes from outside has been escaped."""
    view = Table(title=title, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        view.add_column(column, overflow="fold", no_wrap=number < len(columns) - 1)
    for row in rows:
        view.add_row(*map(one_line, row))
    screen = console()
    if screen.is_terminal:
        screen.print(view)
        return
    with screen.capture() as lines:
        screen.print(view)
    click.echo("\n".join(line.rstrip() for line in lines.get().splitlines()))


def console() -> Console:
    """Standard output; a pipe or a log file has no width of its own and gets enough for every path in a table."""
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=LOG_WIDTH)


def target_rows(rows: Sequence[TargetRow]) -> None:
    """One line per recipe: status, accuracy, latency, size, why."""
    columns = ("target", "recipe", "status", "top-1", "p50 ms", "speed-up", "KiB", "why")
    table("", columns, [_target_cells(row) for row in rows])


def _target_cells(row: TargetRow) -> list[str]:
    colour = _COLOURS[row.status]
    accuracy = row.top1 if row.chosen else (row.validation.top1 if row.validation else None)
    return [
        escape(row.target),
        f"[bold]{escape(row.recipe)}[/]" if row.chosen else escape(row.recipe),
        f"[{colour}]{row.status}[/]",
        "" if accuracy is None else f"{accuracy:.2%}{'' if row.chosen else ' val'}",
        "" if row.latency_ms is None else f"{row.latency_ms.p50:.3f}",
        "" if row.speedup is None else f"{row.speedup:.2f}x",
        "" if row.size_bytes is None else f"{row.size_bytes / 1024:.0f}",
        escape(row.reason),
    ]


FIGURES = ("batch", "threads", "p50 ms", "p90", "p99", "images/s", "cold ms", "peak MiB", "runs", "note")


def measurements(named: Sequence[tuple[str, Measurement]]) -> None:
    """One line per measurement; a percentile without enough runs says so."""
    table("", ("artifact", *FIGURES), [[escape(name), *_figures(found, found.warnings)] for name, found in named])


def file_rows(rows: Sequence[FileRow]) -> None:
    """One line per model as it is: where it ran and in what precision, as the runtime tells it."""
    table("", ("model", "target", "layers with weights", *FIGURES), [_file_cells(row) for row in rows])


def _file_cells(row: FileRow) -> list[str]:
    precision = ", ".join(f"{count} {name}" for name, count in row.precision.items()) or "none known"
    known, found = [escape(row.model), escape(row.target), escape(precision)], row.measurement
    if found is None:
        return [*known, *[""] * (len(FIGURES) - 1), f"[red]{escape(row.reason)}[/]"]
    return [*known, *_figures(found, [*found.warnings, *filter(None, [row.reason])])]


def _figures(found: Measurement, notes: Sequence[str]) -> list[str]:
    latency = found.latency_ms
    tails = ["not enough runs" if value is None else f"{value:.3f}" for value in (latency.p90, latency.p99)]
    figures = [f"{found.throughput_sps:.0f}", f"{found.cold_start_ms:.0f}", f"{found.peak_rss_bytes / 2**20:.0f}", str(found.runs)]
    return [
        str(found.batch),
        str(found.threads),
        f"{latency.p50:.3f}",
        *tails,
        *figures,
        escape("; ".join(notes)),
    ]


def notices(*found: Sequence[str]) -> None:
    """What has been noticed so far, on standard error; a run's report, where one is written, has it too."""
    for notice in chain(*found):
        click.echo(f"notice: {one_line(notice)}", err=True)


def outcome(report: RunReport, out: Path) -> None:
    """The end of a run: what became of every target, and where to read on."""
    target_rows(report.targets)
    screen = console()
    if report.reference and report.reference.latency_ms:
        name = report.teacher.model if report.teacher else report.student.model
        screen.print(f"reference: {name}, fp32 on ONNX Runtime, p50 {report.reference.latency_ms.p50:.3f} ms", markup=False)
    for notice in report.notices:
        screen.print(f"notice: {one_line(notice)}", markup=False)
    screen.print(f"report: {(out / 'report.html').absolute()}", markup=False, soft_wrap=True)
