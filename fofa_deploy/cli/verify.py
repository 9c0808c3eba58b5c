"""``fofa-deploy verify``"""

from __future__ import annotations

import click

from fofa_deploy.cli import options
from fofa_deploy.cli.source import Source, finish, open_source, source_options


@click.command()
@source_options
@options.as_json
@options.quiet
def command(source: Source, as_json: bool, quiet: bool) -> None:
    """Run the artifacts of SOURCE (a run directory or an ONNX file) again and compare them with the model they came from."""
    from fofa_deploy.cli.show import progress

    with open_source(source, progress(quiet), fresh=True, build=False) as (tuner, profiles):
        finish([row for profile in profiles for row in tuner.attempt(profile)], as_json)
