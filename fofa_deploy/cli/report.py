"""``fofa-deploy report``"""

from __future__ import annotations

from pathlib import Path

import click

from fofa_deploy.cli import options


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
@options.quiet
def command(run: Path, quiet: bool) -> None:
    """Write the reports of RUN again from its report.json; without one, measure what was trained and write the first."""
    from fofa_deploy.report import read_report, write_report

    path = run / "report.json"
    if path.is_file():
        write_report(read_report(path), run)
    else:
        from fofa_deploy.cli.show import progress
        from fofa_deploy.pipeline import reopened

        with reopened(run, progress(quiet), stored=True) as trained:
            trained.student  # noqa: B018 - where it was never trained, says so: a report is no reason to
        with reopened(run, progress(quiet), stored=False) as finished:
            finished.report(*finished.targets())
    click.echo((run / "report.html").absolute())
