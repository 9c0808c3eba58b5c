"""``fofa-deploy quantize``"""

from __future__ import annotations

import click

from fofa_deploy.cli import options
from fofa_deploy.cli.source import Source, finish, open_source, source_options


@click.command()
@source_options
@click.option(
    "--on", "host", metavar="USER@HOST", help="The device that it is for, where a GPU builds its own engines (jetson-orin)."
)
@options.as_json
@options.quiet
def command(source: Source, host: str | None, as_json: bool, quiet: bool) -> None:
    """Build every recipe of the profiles for SOURCE (a run directory or an ONNX file), prove its precision and verify it."""
    from fofa_deploy.cli.show import progress
    from fofa_deploy.remote.device import aimed

    with open_source(source, progress(quiet)) as (tuner, profiles):
        finish([row for profile in profiles for row in tuner.attempt(aimed(profile, host))], as_json)
