"""Baselines on disk: one small JSON to review, and beside it, by digest, the files to run again.

What is read here may come from anywhere: it is capped, typed, held to its own folder and to its digests before it is used.
"""

from __future__ import annotations

import json
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
from fofa_deploy.store import digest_tree, write_atomic
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
class Kept:
    """What a baseline keeps of a target: folder of the artifact, golden inputs, and the answer to every image."""

    artifact: Path
    golden: Path
    classes: tuple[int, ...] | None
    truth: str | None


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
    except OSError as error:
        raise UserError(f"{file} cannot be written: {error.strerror or error}", "free space or choose another path") from error
    return file


def _write_target(file: Path, target: str, figures: Figures, kept: Kept) -> BaselineTarget:
    # Named by content: the JSON of before stays valid until it is replaced.
    folder = file.parent / (file.stem if file.name != NAME else "files") / f"{target}-{figures.sha256[:12]}"
    scratch = folder.with_name(f".{folder.name}")
    shutil.rmtree(scratch, ignore_errors=True)
    shutil.copytree(kept.artifact, scratch / "artifact")
    shutil.copyfile(kept.golden, scratch / "golden.npz")
    if kept.classes is not None:
        np.save(scratch / "answers.npy", np.asarray(kept.classes, np.int32), allow_pickle=False)
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)
    relative = folder.relative_to(file.parent).as_posix()
    return BaselineTarget(figures=figures, folder=relative, truth=kept.truth, files=digest_tree(folder))


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
        IntegrityError: a file is missing, altered, or was never recorded.
    """
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
    classes = _classes(folder / "answers.npy") if entry.truth is not None else None
    return Kept(folder / "artifact", folder / "golden.npz", classes, entry.truth)


def _classes(path: Path) -> tuple[int, ...]:
    try:
        found = np.load(path, allow_pickle=False)
        return tuple(int(value) for value in found.reshape(-1))
    except (ValueError, EOFError) as error:
        raise IntegrityError(f"{path} holds no answers: {error}", RENEW) from error


def _inside(folder: Path, path: str) -> bool:
    found = (folder / path).resolve()
    return folder in found.parents and found.is_file()
