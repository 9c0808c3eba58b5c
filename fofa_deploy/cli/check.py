"""``fofa-deploy check``"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fofa_deploy.cli import options

if TYPE_CHECKING:
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
    from fofa_deploy.gate.baseline import write_baseline
    from fofa_deploy.gate.check import Options, check
    from fofa_deploy.gate.history import append_history, picture, read_history
    from fofa_deploy.gate.sinks import write

    timed = bool(update_baseline or history)
    settings = Options(quick=quick, trend=trend, timed=timed, profile=profile_name, trusted=trust_engine)
    report, kept = check(candidate, baseline, progress(quiet), settings)
    _render(report, junit, markdown)
    if history:
        append_history(history, report)
        if plot:
            write(plot, picture(read_history(history)))
    _show(report, as_json)
    if update_baseline:
        without = "".join(f", without {name}" for name in report.figures if name not in kept)
        click.echo(f"baseline: {write_baseline(update_baseline, report, kept)}{without}", err=True)
    sys.exit(report.exit_code)


def _render(report: GateReport, junit: Path | None, markdown: Path | None) -> None:
    from fofa_deploy.gate import sinks

    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if junit:
        sinks.write(junit, sinks.junit(report))
    if markdown:
        sinks.write(markdown, sinks.markdown(report))
    if summary:
        sinks.append(Path(summary), sinks.markdown(report))


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
