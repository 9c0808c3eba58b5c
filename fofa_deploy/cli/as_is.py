"""``fofa-deploy profile`` of models as they are: files that others built, and artifacts' folders without their run."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from fofa_deploy.cli import options
from fofa_deploy.cli.source import Source, plain_settings

if TYPE_CHECKING:
    from fofa_deploy.files import FileRow
    from fofa_deploy.progress import Progress

SHAPE = re.compile(r"(?:(?P<name>.+)=)?(?P<sides>[1-9][0-9]{0,6}(?:x[1-9][0-9]{0,6})*)")


@dataclass(frozen=True)
class AsIs:
    """The options that go with models measured as they are."""

    targets: tuple[str, ...]
    shapes: dict[str, tuple[int, ...]]
    inputs: Path | None
    trusted: bool

    def meant(self, source: Source) -> bool:
        """Whether nothing is to be built: no run directory, and no ONNX file with a profile to build for."""
        if source.others or self.targets or self.shapes or self.inputs or self.trusted:
            return True
        if source.path.is_dir():
            return (source.path / "artifact.json").is_file()
        return source.profile is None or source.path.suffix.lower() != ".onnx"


def _shapes(ctx: click.Context, param: click.Parameter, values: Sequence[str]) -> dict[str, tuple[int, ...]]:
    found = {}
    for value in values:
        match = SHAPE.fullmatch(value)
        if not match:
            raise click.BadParameter(f"{value!r} is no shape: write NAME=1x3x224x224, or 1x3x224x224 for a model's only input")
        found[match["name"] or ""] = tuple(int(side) for side in match["sides"].split("x"))
    return found


def as_is_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Handed to the command as one `AsIs`."""

    @functools.wraps(command)
    def wrapped(
        source: Source,
        targets: tuple[str, ...],
        shapes: dict[str, tuple[int, ...]],
        inputs: Path | None,
        trust_engine: bool,
        **others: Any,  # noqa: ANN401 - the command's own options
    ) -> Any:  # noqa: ANN401
        return command(source, AsIs(targets, shapes, inputs, trust_engine), **others)

    decorators = (
        click.option("--target", "targets", multiple=True, metavar="PROFILE", help="Measure files as they are, there; repeatable."),
        click.option("--shape", "shapes", multiple=True, callback=_shapes, metavar="[NAME=]1x3x224x224", help="Of a file's input."),
        click.option("--inputs", type=options.FILE, help="A file's inputs: .npz with an array for each; default: noise."),
        options.trust_engine,
    )
    for decorate in reversed(decorators):
        wrapped = decorate(wrapped)
    return wrapped


@dataclass(frozen=True)
class Places:
    """Where to measure, and at what batch sizes and numbers of threads."""

    hosts: tuple[str, ...]
    python: str | None
    config: Path | None
    batches: tuple[int, ...]
    threads: tuple[int, ...]


def measure_as_is(source: Source, as_is: AsIs, where: Places, progress: Progress) -> list[FileRow]:
    """Raises: click.UsageError: the options contradict each other."""
    from fofa_deploy.files import Wish, measure_files, subjects
    from fofa_deploy.profile import find_profile
    from fofa_deploy.remote.device import places
    from fofa_deploy.remote.folder import measure_there

    _check_options(source, as_is, where)
    settings = replace(plain_settings(source), batches=where.batches, threads=where.threads)
    names = as_is.targets or tuple(filter(None, [source.profile]))
    wish = Wish(tuple(map(find_profile, names)), as_is.shapes, as_is.inputs, as_is.trusted)
    found = subjects([source.path, *source.others], wish, settings)
    devices = [(subject, place) for subject in found for place in places(subject.profile, where.hosts, where.python, where.config)]
    if devices:
        return [row for subject, place in devices for row in measure_there(subject, place, settings, progress)]
    return measure_files(found, wish, settings, progress)


def _check_options(source: Source, as_is: AsIs, where: Places) -> None:
    sources = (source.path, *source.others)
    if source.recipe or source.out or source.images or source.pixels:
        told = "--recipe, --out, --images and --pixels"
        raise click.UsageError(f"{told} go with what is built; these models are measured as they are")
    if source.profile and as_is.targets:
        raise click.UsageError("--profile and --target both say what a model runs on: give --target alone")
    if source.profile and any(path.suffix.lower() == ".onnx" for path in sources):
        raise click.UsageError("--profile builds from one ONNX file; to measure files as they are, say --target instead")
    if as_is.inputs and (as_is.shapes or where.batches):
        raise click.UsageError("--inputs has its own shapes: give it without --shape and --batch")
    if as_is.shapes and where.batches:
        raise click.UsageError("--shape is the whole shape, batch included: give it without --batch")
    if where.hosts and any(path.is_file() for path in sources):
        raise click.UsageError(
            "files as they are run on this machine; --on takes artifacts' folders, a run, or an ONNX file with --profile"
        )
