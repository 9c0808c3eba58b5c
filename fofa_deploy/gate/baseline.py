"""Baselines on disk: one small JSON to review, and beside it, by digest, the files to run again.

What is read here may come from anywhere: it is capped, typed, held to its own folder and to its digests before it is used.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn

import numpy as np
from pydantic import Field, ValidationError

from fofa_deploy.errors import IntegrityError, UserError
from fofa_deploy.gate.verdicts import Figures, GateReport
from fofa_deploy.results import Environment
from fofa_deploy.store import digest, digest_tree, write_atomic
from fofa_deploy.types import Frozen, digest_file

NAME = "baseline.json"
SCHEMA_VERSION = 1
MAX_BYTES = 1 << 20
MAX_ARTIFACT_BYTES = 1 << 40
RENEW = "write it again: fofa-deploy check CANDIDATE --update-baseline PATH"


class BaselineTarget(Frozen):
    """One target: its figures when it was recorded, and its files, relative to the JSON's folder."""

    figures: Figures
    folder: str = Field(description="with artifact/, golden.npz and, where there were images, answers.npy")
    truth: str | None = Field(description="digest of what the answers are right or wrong by")
    files: dict[str, str] = Field(description="SHA-256 of every file of the folder")


class Baseline(Frozen):
    schema_version: Literal[1] = 1
    created_at: str
    tool_version: str
    commit: str | None
    environment: Environment
    targets: dict[str, BaselineTarget] = Field(min_length=1)


@dataclass(frozen=True)
class Said:
    """The class that an artifact answered, image by image.

    Args:
        truth: digest of what the answers are right or wrong by.
        reference: without labels, what they are right by: the class that the artifact's own PyTorch model says.
    """

    classes: tuple[int, ...]
    truth: str
    reference: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Kept:
    """What a baseline keeps of a target: folder of the artifact, golden inputs, and the answers where there were images.

    Args:
        holder: whatever the artifact's folder lasts as long as.
    """

    artifact: Path
    golden: Path
    said: Said | None
    holder: object = None


def write_baseline(path: Path, report: GateReport, kept: Mapping[str, Kept]) -> Path:
    """Write the candidate's figures and files; ``path`` is a folder, or a ``.json`` file, whose files lie in a folder of its name.

    Returns:
        The JSON file.

    Raises:
        UserError: there is nothing to keep, or the folder cannot be written.
    """
    if not kept:
        raise UserError("no target has an artifact to keep", "see the findings, and give a candidate that runs here")
    file = path if path.suffix == ".json" else path / NAME
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        targets = {target: _write_target(file, target, report.figures[target], files) for target, files in sorted(kept.items())}
        baseline = Baseline(
            created_at=report.created_at,
            tool_version=report.tool_version,
            commit=report.commit,
            environment=report.environment,
            targets=targets,
        )
        write_atomic(file, (json.dumps(baseline.model_dump(mode="json"), allow_nan=False, indent=1) + "\n").encode())
        _tidy(file, baseline)
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}", "free space or choose another path") from error
    return file


def _write_target(file: Path, target: str, figures: Figures, kept: Kept) -> BaselineTarget:
    """Into a folder that is named by its content: the JSON of before stays valid until it is replaced."""
    scratch = _home(file) / f".{target}"
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(kept.artifact, scratch / "artifact")
    shutil.copyfile(kept.golden, scratch / "golden.npz")
    said = kept.said
    if said:
        rows = [said.classes] if said.reference is None else [said.classes, said.reference]
        np.save(scratch / "answers.npy", np.array(rows, np.int32), allow_pickle=False)
    files = digest_tree(scratch)
    folder = scratch.with_name(f"{target}-{digest(files)[:12]}")
    if not folder.is_dir() or digest_tree(folder) != files:
        shutil.rmtree(folder, ignore_errors=True)
        scratch.rename(folder)
    shutil.rmtree(scratch, ignore_errors=True)
    relative = folder.relative_to(file.parent).as_posix()
    return BaselineTarget(figures=figures, folder=relative, truth=said.truth if said else None, files=files)


def _home(file: Path) -> Path:
    """Of a baseline's files."""
    return file.parent / (file.stem if file.name != NAME else "files")


def _tidy(file: Path, baseline: Baseline) -> None:
    """Remove what earlier baselines kept; nothing that was not written here."""
    named = {(file.parent / entry.folder).name for entry in baseline.targets.values()}
    for folder in _home(file).iterdir():
        ours = re.fullmatch(r".+-[0-9a-f]{12}", folder.name) and (folder / "artifact" / "artifact.json").is_file()
        if ours and folder.name not in named:
            shutil.rmtree(folder, ignore_errors=True)


def baseline_file(path: Path) -> Path | None:
    """The JSON that ``path`` names, itself or inside a folder; None where it is no baseline."""
    if path.is_dir():
        return path / NAME if (path / NAME).is_file() else None
    return path if path.suffix == ".json" else None


def read_baseline(file: Path) -> Baseline:
    """Read and check the JSON; its files are looked at by `kept_files`.

    Raises:
        UserError: it cannot be read, is too large, no JSON, of another ``schema_version``, or a metric is missing or no number.
    """
    try:
        with file.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}", "check the path") from error
    if len(raw) > MAX_BYTES:
        raise UserError(f"{file} is larger than {MAX_BYTES >> 20} MiB: no baseline is", "check the path")
    try:
        data = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not valid JSON: {error}", RENEW) from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION:
        action = "use the fofa-deploy that wrote it, or write it again with --update-baseline"
        raise UserError(f"{file} has schema_version {version!r}; this fofa-deploy reads {SCHEMA_VERSION}", action)
    try:
        found = Baseline.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{file} is not a baseline: {'.'.join(map(str, first['loc']))}: {first['msg']}", RENEW) from error
    _plausible(file, found)
    return found


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is not a JSON number")


def _plausible(file: Path, found: Baseline) -> None:
    for target, entry in found.targets.items():
        if not entry.figures.size_bytes <= MAX_ARTIFACT_BYTES:
            raise UserError(f"{file}: {target} claims {entry.figures.size_bytes:.3g} bytes, no artifact is that large", RENEW)


def kept_files(file: Path, target: str, entry: BaselineTarget) -> Kept:
    """A target's files, every one digested.

    Raises:
        UserError: a path leaves the JSON's folder.
        IntegrityError: a file is missing, altered, or was never recorded, or its name is none.
    """
    try:
        return _kept_files(file, target, entry)
    except (OSError, EOFError, ValueError) as error:  # names with a NUL, or too long; arrays that are none
        raise IntegrityError(f"{file}: the files of {target} cannot be read: {error}", RENEW) from error


def _kept_files(file: Path, target: str, entry: BaselineTarget) -> Kept:
    root, folder = file.parent.resolve(), (file.parent / entry.folder).resolve()
    if root not in folder.parents:
        raise UserError(f"{file}: the folder {entry.folder!r} of {target} leaves {root}", RENEW)
    if any(path.is_symlink() for path in folder.rglob("*")):
        raise UserError(f"{file}: {entry.folder} holds symbolic links, which could lead out of it", RENEW)
    there = {path: digest_file(folder / path) for path in entry.files if _inside(folder, path)}
    if wrong := sorted(path for path, sha256 in entry.files.items() if there.get(path) != sha256):
        action = f"restore the artifact {entry.figures.sha256} from where CI keeps it, or {RENEW}"
        raise IntegrityError(f"{folder / wrong[0]} is missing or altered since the baseline was written", action)
    recorded = {"artifact/artifact.json", "golden.npz"} | ({"answers.npy"} if entry.truth is not None else set())
    if missing := sorted(recorded - there.keys()):
        raise IntegrityError(f"{file}: {target} records no {missing[0]}", RENEW)
    said = None if entry.truth is None else _said(folder / "answers.npy", entry.truth)
    return Kept(folder / "artifact", folder / "golden.npz", said)


def _said(path: Path, truth: str) -> Said:
    """Raises: ValueError: the file holds no answers. It is mapped: what its header claims is not what it may take."""
    found = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(found, np.ndarray) or found.dtype.kind not in "iu" or found.ndim != 2 or len(found) not in (1, 2):
        raise ValueError(f"{path.name} holds no answers")
    classes, *reference = (tuple(row.tolist()) for row in found)
    return Said(classes, truth, reference[0] if reference else None)


def _inside(folder: Path, path: str) -> bool:
    found = (folder / path).resolve()
    return folder in found.parents and found.is_file()
