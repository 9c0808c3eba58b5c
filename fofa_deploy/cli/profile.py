"""``fofa-deploy profile``"""

from __future__ import annotations

import click

from fofa_deploy.cli import options
from fofa_deploy.cli.source import Source, finish, open_source, source_options


@click.command()
@source_options
@options.as_json
@options.quiet
def command(source: Source, as_json: bool, quiet: bool) -> None:
    """Measure every verified artifact of SOURCE (a run directory or an ONNX file), side by side."""
    from fofa_deploy.cli.show import measurements, progress

    with open_source(source, progress(quiet), timed=True, build=False) as (tuner, profiles):
        rows = [row for profile in profiles for row in tuner.tune(profile)]
    if not as_json:
        measurements([(f"{row.target}/{row.recipe}", row.measurement) for row in rows if row.measurement])
    finish(rows, as_json)
