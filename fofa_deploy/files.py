"""Models measured as they are, side by side: files that others built, and artifacts' folders by themselves."""

from __future__ import annotations

import math
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fofa_deploy import environment
from fofa_deploy.backend import FileOpener, check_origin, get_backend, untrusted
from fofa_deploy.errors import DataError, FofaError, UnavailableError, UserError
from fofa_deploy.isolate import run_isolated
from fofa_deploy.measure import Candidate, FileCandidate, measure
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Progress
from fofa_deploy.results import Comparison, Environment, Measurement
from fofa_deploy.tune import Settings, with_threads
from fofa_deploy.types import Artifact, Frozen, HardwareProfile, ModelFile, TensorSpec

T = TypeVar("T")
Shape = tuple[int, ...]
Arrays = dict[str, NDArray[np.generic]]
ENGINES = (".engine", ".plan", ".trt")
USUAL = {".onnx": "cpu-onnxruntime", ".xml": "cpu-openvino", **dict.fromkeys(ENGINES, "datacenter-gpu")}
"""What a file is measured on when nobody says: its own runtime's profile of this machine."""


@dataclass(frozen=True)
class Wish:
    """How models are to be measured as they are.

    Args:
        targets: every model is measured on each of them; without one, on its usual one.
        shapes: whole shapes of inputs by name; the name of a model's only input may be left empty.
        inputs: .npz file with an array per input, or .npy file of a model's only one; without it inputs are seeded noise.
        trusted: the user says that machine code among the files may be run.
    """

    targets: tuple[HardwareProfile, ...] = ()
    shapes: Mapping[str, Shape] = field(default_factory=dict)
    inputs: Path | None = None
    trusted: bool = False


class FileRow(Frozen):
    """One model on one target with inputs of one shape. Without a measurement the reason says why."""

    model: str
    target: str
    runtime: str
    inputs: dict[str, Shape]
    precision: dict[str, int]
    layer_types: dict[str, int]
    size_bytes: int
    sha256: str
    measurement: Measurement | None = None
    reason: str = ""
    compared: Comparison | None = Field(default=None, description="a device's outputs against those of the same files here")
    environment: Environment | None = None


class FileRequest(Frozen):
    path: Path
    profile: HardwareProfile
    trusted: bool


def describe(request: FileRequest) -> ModelFile:
    """Look at a file with its target's runtime; runs in a child process.

    Raises:
        IntegrityError: opening it would run it, and nobody said that it is trusted.
        UserError: this runtime takes no such files.
    """
    backend, suffix = get_backend(request.profile.runtime), request.path.suffix.lower()
    takes = backend.suffixes if isinstance(backend, FileOpener) else ()
    if not isinstance(backend, FileOpener) or suffix not in takes:
        known = f"it takes {', '.join(takes)}" if takes else "it takes only what it has built"
        action = f"name another --target, or have it built: fofa-deploy profile model.onnx --profile {request.profile.name}"
        raise UserError(f"{backend.name} does not open {request.path.name}: {known}", action)
    if backend.native and not request.trusted:
        raise untrusted(request.path)
    return backend.describe_file(request.path, request.profile)


@dataclass(frozen=True)
class Subject:
    """A model, and what it is measured on."""

    path: Path
    profile: HardwareProfile
    model: Artifact | ModelFile

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        return self.model.inputs if isinstance(self.model, ModelFile) else (self.model.sidecar.input,)

    def candidate(self, feeds: Arrays, threads: int, file: Path) -> Candidate | FileCandidate:
        """What to measure, its inputs written to ``file``."""
        profile, arrays = with_threads(self.profile, threads), list(feeds.values())
        batch = arrays[0].shape[0] if arrays and arrays[0].shape else 1
        if isinstance(self.model, ModelFile):
            np.savez(file, *arrays)
            return FileCandidate(file=self.model, profile=profile, feeds=file, batch=batch)
        np.savez(file, images=arrays[0])
        return Candidate(artifact=self.path, profile=profile, golden=file, batch=batch)

    def row(
        self, shapes: Mapping[str, Shape], found: Measurement | FofaError, where: Environment | None, target: str = ""
    ) -> FileRow:
        return FileRow(
            model=str(self.path),
            target=target or self.profile.name,
            runtime=self.profile.runtime,
            inputs=dict(shapes),
            precision=dict(Counter(layer.precision for layer in self.model.layers if layer.weighted)),
            layer_types=dict(Counter(f"{layer.operator} {layer.precision}" for layer in self.model.layers)),
            size_bytes=self.model.size_bytes,
            sha256=self.model.sha256,
            measurement=None if isinstance(found, FofaError) else found,
            reason=found.message.splitlines()[0] if isinstance(found, FofaError) else "",
            environment=where,
        )


def subjects(sources: Sequence[Path], wish: Wish, settings: Settings) -> list[Subject]:
    """Every source on every target, checked before anything is measured.

    Raises:
        UserError: it is no model, is not to be trusted, or does not fit its target.
        UnavailableError: a target is not this machine.
    """
    return [subject for path in sources for subject in _subjects(path, wish, settings)]


def _subjects(path: Path, wish: Wish, settings: Settings) -> Iterator[Subject]:
    artifact = _artifact(path, wish.trusted) if path.is_dir() else None
    for profile in wish.targets or [_usual(artifact.path if artifact else path)]:
        if artifact and profile.runtime != artifact.backend:
            raise UserError(
                f"{path} was built for {artifact.backend}, {profile.name} runs {profile.runtime}", "name its own target"
            )
        yield Subject(path, profile, artifact or _described(path, profile, wish.trusted, settings))


def _artifact(folder: Path, trusted: bool) -> Artifact:
    if not (folder / "artifact.json").is_file():
        problem = f"{folder} is no artifact's folder: it has no artifact.json"
        raise DataError(
            problem, "several models are measured as they are: name files and artifacts' folders, or one run directory alone"
        )
    artifact = Artifact.load(folder)
    check_origin(artifact, trusted)
    return artifact


def _usual(path: Path) -> HardwareProfile:
    if path.suffix.lower() not in USUAL:
        raise UserError(f"{path} is of no known kind: {', '.join(USUAL)}", "name what runs it with --target")
    return find_profile(USUAL[path.suffix.lower()])


def _described(path: Path, profile: HardwareProfile, trusted: bool, settings: Settings) -> ModelFile:
    request, limits = FileRequest(path=path, profile=profile, trusted=trusted), settings.limits
    target = "fofa_deploy.files:describe"
    return run_isolated(target, request, ModelFile, seconds=limits.run_seconds, memory_bytes=limits.memory_bytes)


def measure_files(found: Sequence[Subject], wish: Wish, settings: Settings, progress: Progress) -> list[FileRow]:
    """Every subject at every batch size and number of threads, all interleaved in one run.

    Raises:
        UserError: the inputs that were asked for do not fit.
        UnavailableError: a target is not this machine.
    """
    for subject in found:
        if problem := environment.mismatch(subject.profile):
            raise UnavailableError(f"{subject.profile.name}: {problem}", "name a target of this machine")
    _check_names(found, wish)
    with tempfile.TemporaryDirectory() as scratch:
        feeds = [(subject, arrays, count) for subject in found for arrays, count in _grid(subject, wish, settings)]
        candidates = [
            subject.candidate(arrays, count, Path(scratch) / f"{number}.npz")
            for number, (subject, arrays, count) in enumerate(feeds)
        ]
        measured = measure(candidates, settings.measure, settings.limits, settings.seed, progress)
    where = environment.describe()
    shapes = [{name: array.shape for name, array in arrays.items()} for _, arrays, _ in feeds]
    return [subject.row(of, result, where) for (subject, _, _), of, result in zip(feeds, shapes, measured, strict=True)]


def _grid(subject: Subject, wish: Wish, settings: Settings) -> Iterator[tuple[Arrays, int]]:
    """Inputs and number of threads of every line."""
    own = subject.profile.execution
    dynamic = any(spec.shape[:1] == (None,) for spec in subject.inputs) and not wish.shapes
    batches = settings.batches or (own.batch_sizes if dynamic else (0,))
    for threads in settings.threads or (own.threads,):
        if wish.inputs:
            yield given(wish.inputs, subject), threads
            continue
        for batch in batches:
            yield noise(subject, batch, wish.shapes, settings.seed), threads


# --- inputs -------------------------------------------------------------------------------------------------------


MOST_NUMBERS = 1 << 30
"""Of an input made of noise: what a mistyped shape asks for would fill the memory."""


def noise(subject: Subject, batch: int, shapes: Mapping[str, Shape], seed: int) -> Arrays:
    """Seeded inputs of a subject's own shapes; ``batch`` 0 is the one that it has fixed.

    Raises:
        UserError: a shape is not known, or does not fit.
    """
    free = any(spec.shape[:1] == (None,) for spec in subject.inputs)
    fixed = next((spec for spec in subject.inputs if not free and batch and spec.shape[:1] != (batch,)), None)
    if fixed:
        action = "export it with a dynamic batch axis, or leave --batch out"
        raise UserError(f"{subject.path} takes {_words(fixed)} alone, not a batch of {batch}", action)
    rng, told = np.random.default_rng(seed), _named(shapes, subject)
    return {spec.name: _random(spec, _shape(spec, told.get(spec.name), batch, subject.path), rng) for spec in subject.inputs}


def _check_names(found: Sequence[Subject], wish: Wish) -> None:
    known = {spec.name for subject in found for spec in subject.inputs}
    if unknown := wish.shapes.keys() - known - {""}:
        raise UserError(f"no model here has an input {min(unknown)!r}", f"there are: {', '.join(sorted(known))}")


def _shape(spec: TensorSpec, told: Shape | None, batch: int, path: Path) -> Shape:
    if told is not None:
        _check_shape(spec, told, path)
        return told
    rest = tuple(side for side in spec.shape[1:] if side is not None)
    if len(rest) + 1 < len(spec.shape):
        example = "x".join(str(side or 1) for side in spec.shape)
        raise UserError(
            f"{path}: {_words(spec)} has more than its first axis open", f"give it whole, such as --shape {spec.name}={example}"
        )
    return (spec.shape[0] or batch or 1, *rest) if spec.shape else ()


def _check_shape(spec: TensorSpec, shape: Shape, path: Path) -> None:
    fits = len(shape) == len(spec.shape) and all(side in (None, given) for side, given in zip(spec.shape, shape, strict=True))
    if not fits:
        raise UserError(f"{path} takes {_words(spec)}, not {'x'.join(map(str, shape))}", "give a shape that fits")


def _words(spec: TensorSpec) -> str:
    return f"{spec.name} {'x'.join(str(side or '?') for side in spec.shape)} {spec.dtype}"


def _random(spec: TensorSpec, shape: Shape, rng: np.random.Generator) -> NDArray[np.generic]:
    """Zeros and ones for integers wider than pixels: they may be indices."""
    if math.prod(shape) > MOST_NUMBERS:
        raise UserError(f"{spec.name} {'x'.join(map(str, shape))} is too large an input", f"keep it below {MOST_NUMBERS:,} numbers")
    kind = spec.dtype.rstrip("0123456789")
    if kind == "float":
        return rng.standard_normal(shape).astype(spec.dtype)
    if kind in ("int", "uint", "bool"):
        return np.asarray(rng.integers(0, 256 if spec.dtype == "uint8" else 2, shape)).astype(spec.dtype)
    raise UserError(f"no noise can be made of {spec.dtype} for {spec.name}", "give inputs with --inputs FILE.npz")


def given(file: Path, subject: Subject) -> Arrays:
    """The user's own arrays.

    Raises:
        DataError: they cannot be read.
        UserError: one is missing or does not fit.
    """
    try:
        with file.open("rb") as stream:
            loaded = np.load(stream, allow_pickle=False)
            arrays = _named({"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded), subject)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{file} holds no arrays: {error}", "write it with numpy.savez(FILE, name=array)") from error
    for spec in subject.inputs:
        if spec.name not in arrays:
            raise UserError(f"{file} has no array {spec.name!r}", f"it has {', '.join(sorted(arrays)) or 'none'}: name it so")
        _check_shape(spec, arrays[spec.name].shape, subject.path)
        if arrays[spec.name].dtype.name != spec.dtype:
            raise UserError(f"{file} has {spec.name} in {arrays[spec.name].dtype.name}: {_words(spec)} is wanted", "convert it")
    return {spec.name: np.ascontiguousarray(arrays[spec.name]) for spec in subject.inputs}


def _named(told: Mapping[str, T], subject: Subject) -> dict[str, T]:
    """The empty name is that of a model's only input."""
    if "" in told and len(subject.inputs) != 1:
        names = ", ".join(spec.name for spec in subject.inputs)
        raise UserError(f"{subject.path} has {len(subject.inputs)} inputs ({names})", "say which one is meant: NAME=1x3x224x224")
    return {name or subject.inputs[0].name: value for name, value in told.items()}
