"""``fofa-deploy bundle``"""

from __future__ import annotations

from pathlib import Path

import click

from fofa_deploy.cli import options


def _zip(ctx: click.Context, param: click.Parameter, value: Path) -> Path:
    """So that nothing else is written over, and that others know what it is."""
    if value.suffix != ".zip":
        raise click.BadParameter(f"{str(value)!r} does not end in .zip")
    return value


@click.command()
@click.argument("run", type=options.EXISTING_FOLDER)
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), callback=_zip, required=True, help="The zip file to write.")
@options.hardware
@click.option("--recipe", help="Which recipe; default: the one that was chosen for the profile, or the only one.")
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
        wanted = recipe or (_chosen(run, profiles[0].name) if len(profiles) == 1 else None)
        bundle(opened.tuner(wanted, build=False, timed=False), profiles, out)
    click.echo(out)


def _chosen(run: Path, target: str) -> str | None:
    """The recipe that the report chose, where there is one that says so."""
    from fofa_deploy.errors import UserError
    from fofa_deploy.report import read_report

    try:
        rows = read_report(run).targets
    except UserError:
        return None
    return next((row.recipe for row in rows if row.chosen and row.target == target), None)
