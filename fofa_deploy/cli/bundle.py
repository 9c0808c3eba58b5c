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
@click.option("--recipe", help="Which recipe; default: the one that was chosen, or the only one.")
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
        wanted = recipe or _chosen(run, [profile.name for profile in profiles])
        bundle(opened.tuner(wanted, build=False, timed=False), profiles, out)
    click.echo(out)


def _chosen(run: Path, targets: list[str]) -> str | None:
    """The recipe of the only artifact that the report chose on these targets."""
    from fofa_deploy.report import read_report

    if not (run / "report.json").is_file():
        return None
    chosen = [row.recipe for row in read_report(run).targets if row.chosen and row.target in targets]
    return chosen[0] if len(chosen) == 1 else None
