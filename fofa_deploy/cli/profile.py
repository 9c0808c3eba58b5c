"""``fofa-deploy profile``"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import click

from fofa_deploy.cli import options
from fofa_deploy.cli.source import Source, finish, keep, open_source, plain_settings, source_options


def _counts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    if value is None:
        return ()
    numbers = tuple(int(part) if part.isdecimal() else 0 for part in value.split(","))
    if not all(numbers) or len(set(numbers)) < len(numbers):
        raise click.BadParameter("write whole numbers above 0, each once, such as 1,8")
    return numbers


@click.command()
@source_options
@click.option("--batch", "batches", callback=_counts, metavar="N,N", help="Batch sizes; recipes are chosen by the first one.")
@click.option("--threads", callback=_counts, metavar="N,N", help="Numbers of threads; recipes are chosen by the first one.")
@click.option("--on", "hosts", multiple=True, metavar="USER@HOST", help="Measure on this device over SSH; may be repeated.")
@click.option("--python", help="The Python on the device that has numpy and the runtime; default: the profile's, python3.")
@click.option("--ssh-config", type=options.FILE, help="OpenSSH configuration to use instead of your own.")
@click.option("--import", "results", type=options.FILE, help="Take in the results.json of a bundle.")
@options.as_json
@options.quiet
def command(
    source: Source,
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    hosts: tuple[str, ...],
    python: str | None,
    ssh_config: Path | None,
    results: Path | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure every verified artifact of SOURCE (a run directory or an ONNX file), side by side: here, or on devices.

    SOURCE may also be the folder of one artifact, which is measured by itself.
    """
    from fofa_deploy.cli.show import measurements, progress
    from fofa_deploy.remote.device import import_results, places, profile_on

    if results and (hosts or batches or threads):
        raise click.UsageError("--import takes what was measured elsewhere: give it alone")
    if (source.path / "artifact.json").is_file():
        if hosts or results:
            raise click.UsageError("an artifact's folder by itself is measured here; devices need the run that it came from")
        _alone(source, batches, threads, quiet, as_json)
        return
    with open_source(source, progress(quiet), timed=not (hosts or results), build=False) as (tuner, profiles):
        tuner.sweep(batches, threads)
        if results:
            rows = [import_results(results.read_bytes(), str(results), tuner, profiles)]
        else:
            rows = [row for p in profiles for row in profile_on(places(p, hosts, python, ssh_config), tuner, p)]
    if hosts or results or any(profile.device.host for profile in profiles):
        keep(source, rows)
    if not as_json:
        measurements([(f"{r.target}/{r.recipe}", m) for r in rows if r.measurement for m in (r.measurement, *r.other_batches)])
    finish(rows, as_json)


def _alone(source: Source, batches: tuple[int, ...], threads: tuple[int, ...], quiet: bool, as_json: bool) -> None:
    from fofa_deploy.adopt import measure_folder
    from fofa_deploy.cli.show import measurements, progress
    from fofa_deploy.errors import FofaError
    from fofa_deploy.profile import find_profile

    if source.profile is None:
        raise click.UsageError("name a hardware profile with --profile (see fofa-deploy profiles)")
    settings = replace(plain_settings(source), batches=batches, threads=threads)
    found = measure_folder(source.path, find_profile(source.profile), settings, progress(quiet))
    for error in (entry for entry in found if isinstance(entry, FofaError)):
        raise error
    measured = [entry for entry in found if not isinstance(entry, FofaError)]
    if as_json:
        click.echo(json.dumps([entry.model_dump(mode="json") for entry in measured], indent=1, allow_nan=False))
    else:
        measurements([(source.path.name, entry) for entry in measured])
