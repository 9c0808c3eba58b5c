"""Run once per distinct input: content-hashed keys, atomic publication, resumption, integrity on every read.

A stage is a function that fills a folder. The store decides whether it has to run, gives it a scratch folder, writes
``manifest.json`` last and publishes the whole with one rename. A killed run leaves nothing half-done in sight; a failed
stage leaves nothing at all, unless it is resumable: then its own half-finished folder is given back to it next time.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Self

from pydantic import BaseModel, ValidationError

from fofa_deploy import __version__
from fofa_deploy.errors import IntegrityError, LockedError, UserError
from fofa_deploy.results import StageTiming
from fofa_deploy.types import FileRecord, Frozen, digest_file

MANIFEST = "manifest.json"
ALTERED = "altered"


class Manifest(Frozen):
    """The record of one finished stage. ``inputs`` holds a digest per named input, so that a change can be named."""

    stage: str
    version: int
    key: str
    inputs: dict[str, str]
    files: tuple[FileRecord, ...]
    why: str
    seconds: float
    finished_at: str
    tool_version: str


def write_atomic(path: Path, content: bytes) -> None:
    """Replace ``path`` as a whole or not at all, also when the disk is full or the process is killed."""
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}")
    try:
        with partial.open("wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def canonical(value: object) -> object:
    """A JSON value that is equal exactly when the inputs are: files count by content, not by path.

    Raises:
        TypeError: a value that has no canonical form.
    """
    match value:
        case None | bool() | int() | float() | str() if not isinstance(value, Enum):
            return value
        case Enum():
            return canonical(value.value)
        case Path():
            return {"sha256": digest_file(value)} if value.is_file() else digest_tree(value)
        case BaseModel():
            return {name: canonical(item) for name, item in value if not _excluded(value, name, item)}
        case Mapping():
            return {_string_key(k): canonical(v) for k, v in value.items()}
        case list() | tuple():
            return [canonical(item) for item in value]
    raise TypeError(f"a {type(value).__name__} cannot be part of a stage's key")


def _excluded(value: BaseModel, name: str, item: object) -> bool:
    """Whether a field says that this value of it changes nothing: what is new in a plan leaves the keys of older ones alone."""
    condition = type(value).model_fields[name].exclude_if
    return condition is not None and condition(item)


def _string_key(key: object) -> str:
    if not isinstance(key, str):
        raise TypeError(f"a {type(key).__name__} cannot name a stage's input")
    return key


def digest_tree(folder: Path) -> dict[str, str]:
    """SHA-256 per file below ``folder``, which must exist; manifests and logs, which hold dates, do not count."""
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist", "check the path")
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(folder).as_posix(): digest_file(p) for p in files}


def digest(value: object) -> str:
    """SHA-256 of the canonical form."""
    text = json.dumps(canonical(value), sort_keys=True, allow_nan=False, ensure_ascii=False)
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()  # file names need not be text


class Store:
    """The stages of one run directory, held by one process at a time.

    Raises:
        LockedError: on entry, when another process holds the directory.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.timings: list[StageTiming] = []
        self.notices: list[str] = []

    def __enter__(self) -> Self:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            self._lock = (self.root / ".lock").open("a+")
        except OSError as error:
            raise UserError(f"cannot write to {self.root}: {error.strerror}", "choose another --out") from error
        try:
            fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or "unknown"
            self._lock.close()
            raise LockedError(f"{self.root} is in use by process {holder}", "wait for it, or choose another --out") from error
        self._lock.truncate(0)
        self._lock.write(str(os.getpid()))
        self._lock.flush()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._lock.close()

    def run(
        self,
        stage: str,
        inputs: Mapping[str, object],
        work: Callable[[Path], None],
        *,
        version: int = 1,
        resumable: bool = False,
    ) -> Path:
        """Return the stage's folder, after running ``work`` on a scratch folder unless that was done for these inputs.

        Args:
            stage: the folder below the run directory, such as ``graph`` or ``artifacts/cpu/int8``.
            inputs: everything that decides the result, by name.
            work: fills the folder it is given; may raise, and then nothing is stored.
            version: raised by hand when the stage's code changes its meaning.
            resumable: the folder of an interrupted run is given back instead of an empty one.
        """
        started = time.monotonic()
        digests = {name: digest(value) for name, value in inputs.items()}
        key = digest({"stage": stage, "version": version, "inputs": digests})
        final = self.root / stage
        why = self._why(final, key, version, digests)
        if why.startswith(ALTERED) and resumable:
            raise IntegrityError(f"{final}: {why}", f"put the file back, or remove {final} to make it again")
        if why:
            scratch = self._scratch(stage, key, resumable)
            if not _finished(scratch):
                self._work(work, scratch, resumable)
                _write_manifest(scratch, stage, version, key, digests, why, time.monotonic() - started)
            self._publish(scratch, final)
        seconds = round(time.monotonic() - started, 3)
        self.timings.append(StageTiming(stage=stage, seconds=seconds, reused=not why, why=why or "same inputs as before"))
        return final

    def existing(self, stage: str) -> Path:
        """The stage's folder as it was published, for whatever inputs.

        Raises:
            IntegrityError: it was never finished, or a file is not the one that was recorded.
        """
        final = self.root / stage
        manifest = _read_manifest(final)
        if manifest is None:
            raise IntegrityError(f"{final} is not a finished stage", "finish the run first, with the command that made it")
        for record in manifest.files:
            if not _intact(final, record):
                raise IntegrityError(f"{final / record.path} is missing or altered since it was written", "finish the run again")
        return final

    @property
    def untouched(self) -> bool:
        """Whether no stage has been finished or begun here."""
        begun = (path for path in (self.root / ".scratch").rglob("*") if path.is_file())
        return not any(self.root.glob(f"*/{MANIFEST}")) and not any(begun)

    def _why(self, final: Path, key: str, version: int, digests: Mapping[str, str]) -> str:
        """Why the stage has to run; empty when its stored result is whole and of the same inputs."""
        manifest = _read_manifest(final)
        if manifest is None:
            _refuse_others(final)
            return "first run"
        if manifest.key != key:
            changed = [name for name in {**manifest.inputs, **digests} if manifest.inputs.get(name) != digests.get(name)]
            return f"changed: {', '.join(changed)}" if changed else f"stage version {manifest.version} -> {version}"
        altered = [r.path for r in manifest.files if not _intact(final, r)]
        if altered:
            self.notices.append(f"{final / altered[0]} is missing or altered since it was written; {manifest.stage} runs again")
            return f"{ALTERED}: {', '.join(altered)}"
        return ""

    def _work(self, work: Callable[[Path], None], scratch: Path, resumable: bool) -> None:
        try:
            work(scratch)
        except BaseException:
            if not resumable:
                shutil.rmtree(scratch, ignore_errors=True)
            raise

    def _scratch(self, stage: str, key: str, resumable: bool) -> Path:
        scratch = self.root / ".scratch" / f"{stage.replace('/', '--')}-{key[:16]}"
        if scratch.exists() and not resumable and not _finished(scratch):
            shutil.rmtree(scratch)
        scratch.mkdir(parents=True, exist_ok=True)
        return scratch

    def _publish(self, scratch: Path, final: Path) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        trash = self.root / ".scratch" / f"trash-{uuid.uuid4().hex[:8]}"
        if final.exists():
            final.rename(trash)
        scratch.rename(final)
        shutil.rmtree(trash, ignore_errors=True)


def _refuse_others(final: Path) -> None:
    """What no manifest speaks for is not ours to replace; a damaged one still does."""
    if not os.path.lexists(final) or (final / MANIFEST).is_file() or (final.is_dir() and not any(final.iterdir())):
        return
    raise UserError(f"{final} is in the way: it was not made here, and would be replaced", "choose another --out, or move it away")


def _intact(folder: Path, record: FileRecord) -> bool:
    path = folder / record.path
    return path.is_file() and path.stat().st_size == record.size_bytes and digest_file(path) == record.sha256


def _finished(folder: Path) -> bool:
    """Whether a scratch folder was killed between its record and its publication, and is still what was recorded."""
    manifest = _read_manifest(folder)
    return manifest is not None and all(_intact(folder, record) for record in manifest.files)


def _read_manifest(folder: Path) -> Manifest | None:
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None


def _write_manifest(folder: Path, stage: str, version: int, key: str, inputs: Mapping[str, str], why: str, seconds: float) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    manifest = Manifest(
        stage=stage,
        version=version,
        key=key,
        inputs=dict(inputs),
        files=tuple(FileRecord.of(folder, p) for p in files),
        why=why,
        seconds=round(seconds, 3),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        tool_version=__version__,
    )
    write_atomic(folder / MANIFEST, manifest.model_dump_json(indent=1).encode())


def manifests(root: Path) -> list[Manifest]:
    """Every published stage of a run directory, those of stores inside it too, in the order they were finished."""
    folders = [p.parent for p in root.rglob(MANIFEST) if ".scratch" not in p.relative_to(root).parts]
    found = {folder.relative_to(root).as_posix(): _read_manifest(folder) for folder in folders}
    named = [manifest.model_copy(update={"stage": place}) for place, manifest in found.items() if manifest]
    return sorted(named, key=lambda m: m.finished_at)
