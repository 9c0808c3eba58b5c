"""What ``quantize``, ``verify`` and ``profile`` work on: a run directory, or a ready-made ONNX file."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fofa_deploy.cli import options

if TYPE_CHECKING:
    from fofa_deploy.progress import Progress
    from fofa_deploy.results import TargetRow
    from fofa_deploy.tune import Settings, Tuner
    from fofa_deploy.types import HardwareProfile


SOURCE = click.Path(path_type=Path, exists=True)


@dataclass(frozen=True)
class Source:
    """The options that say what to work on."""

    path: Path
    profile: str | None
    recipe: str | None
    out: Path | None
    images: Path | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    pixels: bool
    others: tuple[Path, ...] = ()
    """Where a verb takes several."""


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    try:
        numbers = tuple(float(part) for part in value.split(","))
    except ValueError:
        numbers = ()
    positive = param.name != "std" or all(number > 0 for number in numbers)
    if len(numbers) not in (1, 3) or not all(map(math.isfinite, numbers)) or not positive:
        raise click.BadParameter("write one number or three, such as 0.5 or 0.485,0.456,0.406; --std above 0")
    return numbers


def _together(ctx: click.Context, param: click.Parameter, value: Path | tuple[Path, ...]) -> tuple[Path, ...]:
    return value if isinstance(value, tuple) else (value,)


def source_options(command: Callable[..., Any], many: bool = False) -> Callable[..., Any]:
    """The argument SOURCE and everything that goes with it, handed to the command as one `Source`."""

    @functools.wraps(command)  # with the options that the command has already
    def wrapped(
        source: tuple[Path, ...],
        profile_name: str | None,
        recipe: str | None,
        out: Path | None,
        images: Path | None,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        pixels: bool,
        **others: Any,  # noqa: ANN401 - the command's own options
    ) -> Any:  # noqa: ANN401
        return command(Source(source[0], profile_name, recipe, out, images, mean, std, pixels, source[1:]), **others)

    decorators = (
        click.argument("source", nargs=-1 if many else 1, required=True, type=SOURCE, callback=_together),
        options.hardware,
        click.option("--recipe", help="Only this recipe."),
        click.option("--out", type=options.FOLDER, help="Where to build from an ONNX file; default: NAME.fofa beside it."),
        options.images,
        click.option(
            "--mean", default="0.5", callback=_numbers, show_default=True, help="Of an ONNX file's input, when it has no sidecar."
        ),
        click.option(
            "--std", default="0.5", callback=_numbers, show_default=True, help="Of an ONNX file's input, when it has no sidecar."
        ),
        click.option("--pixels", is_flag=True, help="Have an ONNX file's artifacts take uint8 images (NHWC) and normalize them."),
    )
    for decorate in reversed(decorators):
        wrapped = decorate(wrapped)
    return wrapped


@contextmanager
def open_source(
    source: Source, progress: Progress, *, fresh: bool = False, timed: bool = False, build: bool = True
) -> Iterator[tuple[Tuner, list[HardwareProfile]]]:
    """A tuner for the source, and the profiles it is to be used with. Without ``build`` a run's artifacts are taken as they are."""
    from fofa_deploy.profile import find_profile

    if source.path.is_file():
        if source.profile is None:
            raise click.UsageError("name a hardware profile with --profile (see fofa-deploy profiles)")
        profile = find_profile(source.profile)
        with _open_onnx(source, progress, fresh) as tuner:
            yield tuner, [profile]
        return
    from fofa_deploy.cli.show import notices
    from fofa_deploy.pipeline import reopened

    if source.out or source.images or source.pixels:
        others = "--out, --images and --pixels"
        raise click.UsageError(f"{others} go with an ONNX file; {source.path} is a run directory and has its own")
    with reopened(source.path, progress, stored=not build) as run:
        try:
            tuner = run.tuner(source.recipe, fresh=fresh, build=build, timed=timed)
            yield tuner, [find_profile(source.profile)] if source.profile else run.profiles
        finally:
            notices(run.notices, run.store.notices)


@contextmanager
def _open_onnx(source: Source, progress: Progress, fresh: bool) -> Iterator[Tuner]:
    from fofa_deploy.adopt import Preparation, adopt
    from fofa_deploy.cli.show import notices
    from fofa_deploy.store import Store

    with Store(source.out or source.path.with_suffix(".fofa")) as store:
        preparation = Preparation(mean=source.mean, std=source.std, pixels=source.pixels)
        try:
            yield adopt(store, source.path, source.images, preparation, progress, replace(plain_settings(source), fresh=fresh))
        finally:
            notices(store.notices)


def plain_settings(source: Source) -> Settings:
    """Of a source without a plan."""
    from fofa_deploy.config import AccuracyPlan, LimitsPlan, MeasurePlan
    from fofa_deploy.tune import Settings
    from fofa_deploy.types import Budget

    return Settings(AccuracyPlan(), MeasurePlan(), LimitsPlan(), Budget(), 0, source.recipe)


def keep(source: Source, rows: list[TargetRow]) -> None:
    """Put rows from devices into the report of a run directory, each in the place of its last one."""
    from fofa_deploy.errors import UserError
    from fofa_deploy.report import read_report, write_report
    from fofa_deploy.report.elsewhere import joined

    if source.path.is_file():
        return
    if not (source.path / "report.json").is_file():
        action = f"fofa-deploy report {source.path} writes it; then do this again"
        click.echo(f"notice: not kept: {source.path} has no report yet -> {action}", err=True)
        return
    try:
        report = read_report(source.path)
        write_report(report.model_copy(update={"targets": joined(report.targets, rows)}), source.path)
    except UserError as error:  # the rows are shown all the same
        click.echo(f"notice: not kept in the report: {error.message} -> {error.action}", err=True)


def finish(rows: list[TargetRow], as_json: bool) -> None:
    """Show the rows; exit 1 when a target has nothing good to show, 3 when nothing could be tried."""
    import json
    import sys

    from fofa_deploy.cli.show import target_rows
    from fofa_deploy.types import Status

    if as_json:
        click.echo(json.dumps([row.model_dump(mode="json") for row in rows], indent=1, allow_nan=False))
    else:
        target_rows(rows)
    if {row.status for row in rows} <= {Status.SKIPPED}:
        sys.exit(3)
    good = {row.target for row in rows if row.status in (Status.VERIFIED, Status.BUILT_NOT_RUN)}
    sys.exit(0 if good == {row.target for row in rows} else 1)
