"""``fofa-deploy report``"""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path, exists=True, file_okay=False))
def command(run: Path) -> None:
    """Write report.html, report.md and model_card.md of RUN again from its report.json."""
    from fofa_deploy.errors import DataError
    from fofa_deploy.report import read_report, write_report

    path = run / "report.json"
    if not path.is_file():
        raise DataError(f"{path} does not exist", "finish the run first: fofa-deploy compress-and-export PLAN --out DIR")
    write_report(read_report(path), run)
    click.echo((run / "report.html").absolute())
