"""``fofa-deploy bundle``"""

from __future__ import annotations

from pathlib import Path

import click

from fofa_deploy.cli import options


@click.command()
@click.argument("run", type=options.EXISTING_FOLDER)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), required=True, help="The zip file to write.")
@options.hardware
@click.option("--recipe", help="Which recipe, where there are several.")
@options.quiet
def command(run: Path, out: Path, profile_name: str | None, recipe: str | None, quiet: bool) -> None:
    """Pack an artifact of RUN with golden inputs and a runner, for a device that cannot be reached.

    There: unzip, `python run.py`. Back here: fofa-deploy profile RUN --import results.json.
    """
    from fofa_deploy.cli.show import progress
    from fofa_deploy.pipeline import reopened
    from fofa_deploy.profile import find_profile
    from fofa_deploy.remote.device import bundle

    with reopened(run, progress(quiet), stored=True) as opened:
        profiles = [find_profile(profile_name)] if profile_name else opened.profiles
        bundle(opened.tuner(recipe, build=False, timed=False), profiles, out)
    click.echo(out)
