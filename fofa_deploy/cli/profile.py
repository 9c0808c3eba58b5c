"""``fofa-deploy profile``"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from fofa_deploy.cli import options
from fofa_deploy.cli.as_is import AsIs, Places, as_is_options, measure_as_is
from fofa_deploy.cli.source import Source, finish, keep, open_source, source_options

if TYPE_CHECKING:
    from fofa_deploy.files import FileRow
    from fofa_deploy.results import TargetRow
    from fofa_deploy.types import Frozen


def _counts(ctx: click.Context, param: click.Parameter, value: str | None) -> tuple[int, ...]:
    if value is None:
        return ()
    numbers = tuple(int(part) if part.isdecimal() and len(part) < 7 else 0 for part in value.split(","))
    if not all(numbers) or len(set(numbers)) < len(numbers):
        raise click.BadParameter("write whole numbers above 0 and below a million, each once, such as 1,8")
    return numbers


def _json(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    """So that a model's name behind ``--json`` is not written over."""
    if value not in (None, "-") and not str(value).endswith(".json"):
        raise click.BadParameter(f"{value!r} does not end in .json; for JSON on standard output, put --json last")
    if value not in (None, "-") and not Path(str(value)).parent.is_dir():
        raise click.BadParameter(f"the folder of {value!r} does not exist: make it first")
    return value


def _named(ctx: click.Context, param: click.Parameter, value: str | None) -> str | None:
    if value is not None and not (value.strip() and value.isprintable()):
        raise click.BadParameter("write a name of printable characters")
    return value


@click.command()
@functools.partial(source_options, many=True)
@as_is_options
@click.option("--batch", "batches", callback=_counts, metavar="N,N", help="Batch sizes; recipes are chosen by the first one.")
@click.option("--threads", callback=_counts, metavar="N,N", help="Numbers of threads; recipes are chosen by the first one.")
@click.option(
    "--on", "hosts", multiple=True, metavar="USER@HOST", help="Measure on this device over SSH (or adb:SERIAL); may be repeated."
)
@click.option("--python", help="The Python on the device that has numpy and the runtime; default: the profile's, python3.")
@click.option("--ssh-config", type=options.FILE, help="OpenSSH configuration to use instead of your own.")
@click.option("--import", "results", type=options.FILE, help="Take in the results.json of a bundle.")
@click.option(
    "--as",
    "device",
    callback=_named,
    metavar="NAME",
    help="What to call the device of --import; default: by its CPU, as equal boards are.",
)
@click.option(
    "--json",
    "json_to",
    is_flag=False,
    flag_value="-",
    callback=_json,
    metavar="[FILE.json]",
    help="Write JSON to a file, or print it.",
)
@options.quiet
def command(
    source: Source,
    as_is: AsIs,
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    hosts: tuple[str, ...],
    python: str | None,
    ssh_config: Path | None,
    results: Path | None,
    device: str | None,
    json_to: str | None,
    quiet: bool,
) -> None:
    """Measure latency, side by side in one interleaved run: here, or on devices.

    SOURCE is a run directory: every verified artifact of it. Or an ONNX file with --profile: every recipe worth trying, built and
    verified. Or any number of models as they are: ONNX files, OpenVINO's .xml, TensorRT's .engine, folders of single artifacts.
    """
    from fofa_deploy.cli.show import progress

    if device and not results:
        raise click.UsageError("--as names the device of --import")
    if results and (hosts or batches or threads or source.others):
        raise click.UsageError("--import takes what was measured elsewhere: give it alone")
    if as_is.meant(source) and not results:
        where = Places(hosts, python, ssh_config, batches, threads)
        _tell_as_is(measure_as_is(source, as_is, where, progress(quiet)), json_to)
    with open_source(source, progress(quiet), timed=not (hosts or results), build=False) as (tuner, profiles):
        from fofa_deploy.remote.device import import_results, places, profile_on

        tuner.sweep(batches, threads)
        if results:
            rows = [import_results(results.read_bytes(), str(results), tuner, profiles, device)]
        else:
            rows = [row for p in profiles for row in profile_on(places(p, hosts, python, ssh_config), tuner, p)]
        _tell(rows, json_to)  # before they are kept: what was measured far away must not be lost with a report
        if hosts or results or any(profile.device.host for profile in profiles):
            keep(source, rows)
    finish(rows, json_to == "-")


def _tell(rows: list[TargetRow], json_to: str | None) -> None:
    from fofa_deploy.cli.show import measurements

    if json_to != "-":
        measurements([(f"{r.target}/{r.recipe}", m) for r in rows if r.measurement for m in (r.measurement, *r.other_batches)])
    _write(rows, json_to)


def _tell_as_is(rows: list[FileRow], json_to: str | None) -> None:
    """Ends the command: 1 when a model could not be measured."""
    from fofa_deploy.cli.show import file_rows

    if json_to == "-":
        click.echo(_dump(rows))
    else:
        file_rows(rows)
        _write(rows, json_to)
    sys.exit(1 if any(row.measurement is None for row in rows) else 0)


def _write(rows: Sequence[Frozen], json_to: str | None) -> None:
    from fofa_deploy.store import write_atomic

    if json_to not in (None, "-"):
        write_atomic(Path(str(json_to)), _dump(rows).encode())


def _dump(rows: Sequence[Frozen]) -> str:
    return json.dumps([row.model_dump(mode="json") for row in rows], indent=1, allow_nan=False)
