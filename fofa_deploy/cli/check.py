"""``fofa-deploy check``"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fofa_deploy.cli import options, tell
from fofa_deploy.errors import UserError

if TYPE_CHECKING:
    from fofa_deploy.gate.baseline import Kept
    from fofa_deploy.gate.verdicts import GateReport

FILE = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("candidate", type=click.Path(path_type=Path, exists=True))
@click.option("--baseline", type=click.Path(path_type=Path), help="Run directory, baseline, artifact or bundle to compare with.")
@click.option(
    "--update-baseline", type=click.Path(path_type=Path), help="Keep the candidate as baseline here, whatever the verdict."
)
@click.option("--quick", is_flag=True, help="5 launches per look instead of the plan's 8.")
@click.option("--trend", is_flag=True, help="Take a baseline of another device or other tools; latency fails nothing then.")
@options.hardware
@options.trust_engine
@click.option("--junit", type=FILE, help="Write JUnit XML here.")
@click.option("--markdown", type=FILE, help="Write Markdown here; $GITHUB_STEP_SUMMARY gets it, too, where it is set.")
@click.option("--history", type=FILE, help="Append the figures to this file, one JSON line per check.")
@click.option("--plot", type=FILE, help="Draw the history here, as SVG.")
@options.as_json
@options.quiet
def command(
    candidate: Path,
    baseline: Path | None,
    update_baseline: Path | None,
    quick: bool,
    trend: bool,
    profile_name: str | None,
    trust_engine: bool,
    junit: Path | None,
    markdown: Path | None,
    history: Path | None,
    plot: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Judge CANDIDATE (a run directory, baseline, artifact folder or bundle) by its budgets, and against a baseline.

    Both are run again, side by side, in fresh processes. Exit codes: 0 passed, 1 a regression, 4 inconclusive (noise,
    another device).
    """
    if plot and not history:
        raise click.UsageError("--plot draws a history: name it with --history")
    from fofa_deploy.cli.show import progress
    from fofa_deploy.gate.check import Options, check
    from fofa_deploy.gate.history import append_history, picture, read_history
    from fofa_deploy.gate.sinks import make_room, write

    for file in filter(None, (junit, markdown, history, plot)):
        make_room(file)
    if history and plot and history.exists():
        read_history(history)  # a line that is none is told before the race
    timed = bool(update_baseline or history)
    settings = Options(quick=quick, trend=trend, timed=timed, profile=profile_name, trusted=trust_engine)
    report, kept = check(candidate, baseline, progress(quiet), settings)
    outputs = _rendered(report, junit, markdown)
    if history:
        outputs.append(lambda: append_history(history, report))
        if plot:
            outputs.append(lambda: write(plot, picture(read_history(history))))
    if update_baseline:
        outputs.append(lambda: _keep(update_baseline, report, kept))
    problems = [problem for output in outputs if (problem := _problem(output))]
    _show(report, as_json)
    for problem in problems:
        tell(problem)
    sys.exit(report.exit_code or (UserError.exit_code if problems else 0))


def _rendered(report: GateReport, junit: Path | None, markdown: Path | None) -> list[Callable[[], None]]:
    from fofa_deploy.gate import sinks

    outputs = []
    if junit:
        outputs.append(lambda: sinks.write(junit, sinks.junit(report)))
    if markdown:
        outputs.append(lambda: sinks.write(markdown, sinks.markdown(report)))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        outputs.append(lambda: sinks.append(Path(summary), sinks.markdown(report)))
    return outputs


def _keep(update_baseline: Path, report: GateReport, kept: dict[str, Kept]) -> None:
    from fofa_deploy.gate.baseline import write_baseline

    without = "".join(f", without {name}" for name in report.figures if name not in kept)
    click.echo(f"baseline: {write_baseline(update_baseline, report, kept)}{without}", err=True)


def _problem(output: Callable[[], None]) -> UserError | None:
    """Of a file that cannot be written: it is to hide neither the verdict nor another file."""
    try:
        output()
    except UserError as problem:
        return problem
    return None


def _show(report: GateReport, as_json: bool) -> None:
    """The findings and one line; with JSON the line goes to standard error."""
    from rich.markup import escape

    from fofa_deploy.cli.show import table
    from fofa_deploy.gate.sinks import COLUMNS, cells_of
    from fofa_deploy.gate.verdicts import summary
    from fofa_deploy.progress import one_line
    from fofa_deploy.report.record import to_json

    if as_json:
        click.echo(to_json(report), nl=False)
    else:
        colours = {"pass": "green", "fail": "red", "inconclusive": "yellow", "improved": "cyan"}
        rows = [[f"[{colours[f.verdict]}]{f.verdict}[/]", *map(escape, cells_of(f))] for f in report.findings]
        table("", ("verdict", *COLUMNS[1:]), rows)
        for notice in report.notices:
            click.echo(f"notice: {one_line(notice)}")
    click.echo(summary(report), err=as_json)
