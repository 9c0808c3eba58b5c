"""The device's end of a connection, sent ahead of everything as one string: takes a bundle from standard input, runs it, answers.

Nothing outlives the connection: at the end of standard input, whenever it comes, the job is killed and its folder removed.
Arguments: a marker that starts every line meant for the other side, the bundle's size and SHA-256, seconds for the whole job.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import zipfile
import zlib
from pathlib import Path
from typing import BinaryIO

ENTRY = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*/)*[A-Za-z0-9_-][A-Za-z0-9._-]*")
MAX_ENTRIES, MAX_BYTES, MAX_RATIO = 64, 8 << 30, 100
CHUNK, LOG_TAIL = 1 << 20, 2000


class RefusedError(Exception):
    """The text goes to the other side."""


def take(source: BinaryIO, size: int, sha256: str, target: Path) -> None:
    """Copy exactly ``size`` bytes into a file, and compare their digest."""
    found, left = hashlib.sha256(), size
    with target.open("wb") as out:
        while left and (chunk := source.read(min(CHUNK, left))):
            found.update(chunk)
            out.write(chunk)
            left -= len(chunk)
    if left or found.hexdigest() != sha256:
        raise RefusedError(f"the bundle was damaged on its way: {size - left} of {size} bytes arrived")


def unpack(file: Path, folder: Path) -> None:
    """Write a bundle's entries into a folder; anything but a few plain files of honest sizes is refused before one is written."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            _check(entries)
            for entry in entries:
                _write(archive, entry, folder / entry.filename)
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:  # RuntimeError: encrypted
        raise RefusedError(f"{file.name} is not a sound zip file: {error}") from error


def _check(entries: list[zipfile.ZipInfo]) -> None:
    names = [entry.filename for entry in entries]
    if len(entries) > MAX_ENTRIES or len(set(names)) < len(names):
        raise RefusedError(
            f"the bundle has {len(entries)} entries, {len(set(names))} of different names; {MAX_ENTRIES} are allowed"
        )
    if odd := [name for name in names if not ENTRY.fullmatch(name)]:
        raise RefusedError(f"the bundle has an entry named {odd[0]!r}")
    if links := [entry.filename for entry in entries if entry.external_attr >> 16 & 0o170000 not in (0, 0o100000)]:
        raise RefusedError(f"the bundle's {links[0]} is not a plain file")
    if sum(entry.file_size for entry in entries) > MAX_BYTES:
        raise RefusedError(f"the bundle unpacks to more than {MAX_BYTES >> 30} GiB")
    if bombs := [e.filename for e in entries if e.file_size > MAX_RATIO * max(e.compress_size, 1)]:
        raise RefusedError(f"the bundle's {bombs[0]} is compressed beyond {MAX_RATIO}:1")


def _write(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as source, target.open("xb") as out:
        shutil.copyfileobj(source, out, CHUNK)  # zipfile stops at the declared size and compares its checksum


class Job:
    """The bundle's own process and whatever it starts."""

    def __init__(self, folder: Path) -> None:
        self._log = (folder / "log.txt").open("w+b")
        command = [sys.executable, "run.py"]
        self._process = subprocess.Popen(
            command, cwd=folder, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, start_new_session=True
        )
        self._results = folder / "results.json"

    def kill(self) -> None:
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def results(self, seconds: float) -> bytes:
        """The content of results.json, or why there is none."""
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RefusedError(f"the job was killed after {seconds:g} s") from None
        finally:
            self.kill()
        if self._results.is_file():
            return self._results.read_bytes()
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LOG_TAIL))
        raise RefusedError(f"the job ended with code {code} and no results: {self._log.read().decode(errors='replace').strip()}")


def serve(source: BinaryIO, size: int, sha256: str, seconds: float) -> bytes:
    """Receive a bundle, run it, give back its results; the folder is gone whichever way this ends."""
    folder = Path(tempfile.mkdtemp(prefix="fofa-"))
    try:
        take(source, size, sha256, folder / "bundle.zip")
        unpack(folder / "bundle.zip", folder)
        (folder / "bundle.zip").unlink()
        job = Job(folder)
        threading.Thread(target=_until_the_end, args=(source, job, folder), daemon=True).start()
        return job.results(seconds)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _until_the_end(source: BinaryIO, job: Job, folder: Path) -> None:
    """Wait for the other side to hang up, and leave nothing."""
    while source.read(1):
        pass
    job.kill()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _leave(number: int, frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> None:
    marker, size, sha256, seconds = sys.argv[1:5]
    for number in (signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, _leave)
    out = sys.stdout.buffer
    out.write(f"\n{marker} ready\n".encode())  # a login shell may have spoken, and not ended its line
    out.flush()
    try:
        answer = serve(open(0, "rb", buffering=0, closefd=False), int(size), sha256, float(seconds))  # noqa: SIM115
        out.write(f"{marker} results {len(answer)} {hashlib.sha256(answer).hexdigest()}\n".encode() + answer)
    except (RefusedError, OSError) as error:
        out.write(f"{marker} failed {' '.join(str(error).split())}\n".encode())
    out.flush()


if __name__ == "__main__":
    main()
