"""How to reach a device: a command there, connected to a process here. OpenSSH with the user's own keys and config, or adb."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import select
import shlex
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Protocol

from fofa_deploy.errors import BackendError, ChildError, IntegrityError
from fofa_deploy.types import digest_file

ADB = "adb:"
"""How a host's name begins that is reached over Android's debug bridge."""
CONNECT_SECONDS = 15
ATTEMPTS = 3
"""Only connecting is tried again: what has begun on the device is not begun twice."""
SLOWEST = 100_000
"""Bytes per second that a link must carry before the transfer counts as hung."""
MAX_RESULTS = 256 << 20
MAX_NOISE = 1 << 20
HEADER = re.compile(r"(?P<size>[0-9]{1,18}) (?P<sha256>[0-9a-f]{64})")
"""What a login shell may print before the job answers."""
LOG_TAIL = 500
BOOT = """import sys
n = int(sys.argv.pop(1)); source = b''; stdin = open(0, 'rb', 0, closefd=False)
while len(source) < n: source += stdin.read(n - len(source)) or sys.exit(1)
exec(compile(source, 'receive.py', 'exec'))"""
"""Reads the device's end of the connection, which is longer than some SSH servers take a command to be."""


class Transport(Protocol):
    """A way to run a command on a device."""

    @property
    def name(self) -> str: ...

    @property
    def by_hand(self) -> str:
        """What a person types to see whether the device answers."""
        ...

    def command(self, arguments: Sequence[str]) -> list[str]:
        """The local process whose standard input and output are those of ``arguments``, run there as they are."""
        ...


@dataclass(frozen=True)
class Ssh:
    """``host`` has passed the pattern of `Device.host`; ``--`` keeps it from being an option all the same."""

    name: str
    config: Path | None = None

    @property
    def by_hand(self) -> str:
        return f"ssh {self.name} true"

    def command(self, arguments: Sequence[str]) -> list[str]:
        own = ["-F", str(self.config)] if self.config else []
        settings = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": "yes",
            "ConnectTimeout": CONNECT_SECONDS,
            "ServerAliveInterval": 5,
            "ServerAliveCountMax": 6,
            "ClearAllForwardings": "yes",
            "PermitLocalCommand": "no",
        }
        options = [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]
        return ["ssh", *own, "-T", *options, "--", self.name, shlex.join(arguments)]


@dataclass(frozen=True)
class Adb:
    """A device on Android's debug bridge, by the serial number that `adb devices` lists, or its address and port.

    ``-T`` gives the command plain pipes instead of a terminal, as a bundle needs. A folder for scratch files is named, because
    Android has none of the usual ones.
    """

    serial: str

    @property
    def name(self) -> str:
        return f"{ADB}{self.serial}"

    @property
    def by_hand(self) -> str:
        return f"adb -s {self.serial} shell true"

    def command(self, arguments: Sequence[str]) -> list[str]:
        return ["adb", "-s", self.serial, "shell", "-T", f"TMPDIR=/data/local/tmp {shlex.join(arguments)}"]


def exchange(transport: Transport, python: str, bundle: Path, seconds: float) -> bytes:
    """Run a bundle on a device with its Python: the content of its results.json, whole.

    Raises:
        BackendError: the device or its Python cannot be reached, or the connection broke; nothing is left there.
        ChildError: the job was refused, ran out of time, or gave no results.
        IntegrityError: the results were damaged on their way.
    """
    for attempt in range(1, ATTEMPTS + 1):
        with _Connection(transport, python, bundle, seconds) as connection:
            if connection.wait_until_ready() or (attempt == ATTEMPTS or not connection.may_succeed_later()):
                return connection.results()
        time.sleep(attempt)
    raise AssertionError("unreachable")


class _Connection:
    """One run of the device's command."""

    def __init__(self, transport: Transport, python: str, bundle: Path, seconds: float) -> None:
        self._transport, self._name, self._marker = transport, transport.name, f"fofa-{secrets.token_hex(8)}"
        self._bundle, self._seconds = bundle, seconds
        self._source = files("fofa_deploy.runner").joinpath("receive.py").read_bytes()
        size = bundle.stat().st_size
        self._transfer_seconds = 60 + (size + MAX_NOISE) / SLOWEST
        told = (len(self._source), self._marker, size, digest_file(bundle), seconds)
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the connection
        self._process = self._start(transport.command([python, "-c", BOOT, *map(str, told)]))
        self._buffer, self._ready = b"", False
        threading.Thread(target=self._send, daemon=True).start()

    def _start(self, command: list[str]) -> subprocess.Popen[bytes]:
        try:
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, start_new_session=True
            )
        except FileNotFoundError as error:
            self._log.close()
            raise BackendError(f"{command[0]} is not installed", "install it, or carry a bundle there") from error

    def _send(self) -> None:
        """Everything, and then nothing: the end of this stream is the order to give up."""
        assert self._process.stdin
        with suppress(OSError, ValueError), self._bundle.open("rb") as bundle:
            self._process.stdin.write(self._source)
            while chunk := bundle.read(1 << 16):
                self._process.stdin.write(chunk)
            self._process.stdin.flush()

    def wait_until_ready(self) -> bool:
        """Whether the device's end answers."""
        self._ready = self._line(time.monotonic() + CONNECT_SECONDS + 60) == "ready"
        return self._ready

    def may_succeed_later(self) -> bool:
        """ssh itself failed, and not for a reason that stays."""
        lasting = ("Permission denied", "verification failed", "Bad configuration", "Could not resolve")
        return self._process.poll() == 255 and not any(words in self._words() for words in lasting)

    def results(self) -> bytes:
        if not self._ready:
            raise self._unreachable()
        line = self._line(time.monotonic() + self._transfer_seconds + self._seconds)
        kind, _, rest = (line or "").partition(" ")
        if kind == "failed":
            raise ChildError(f"{self._name}: {rest}", "mend it there, then run the same command again")
        if kind != "results":
            raise BackendError(
                f"the connection to {self._name} broke while the job ran: {self._words()}", "run the same command again"
            )
        told = HEADER.fullmatch(rest)
        if not told:
            raise IntegrityError(f"{self._name} announces no results: {rest[:100]!r}", "run the same command again")
        size = int(told["size"])
        if size > MAX_RESULTS:
            raise IntegrityError(f"{self._name} answers with {size} bytes, {MAX_RESULTS} are allowed", "measure fewer runs")
        content = self._take(size, time.monotonic() + self._transfer_seconds)
        if hashlib.sha256(content).hexdigest() != told["sha256"]:
            raise IntegrityError(f"the results of {self._name} were damaged on their way", "run the same command again")
        return content

    def _unreachable(self) -> BackendError:
        code, words, by_hand = self._process.poll(), self._words(), f"try `{self._transport.by_hand}` by hand"
        if code in (126, 127):
            return BackendError(
                f"{self._name} has no such Python: {words}", "install Python 3.9 or later there, or name it with --python"
            )
        if code in (None, 255):
            return BackendError(f"{self._name} cannot be reached: {words or 'no answer'}", by_hand)
        action = f"{by_hand}; if that is silent, name a Python of 3.9 or later with --python"
        return BackendError(f"{self._name} ended with code {code}: {words}", action)

    def _line(self, deadline: float) -> str | None:
        """The next line meant for us, without its marker; None when there will be none."""
        noise = 0
        while noise <= MAX_NOISE:
            while b"\n" not in self._buffer:
                if noise + len(self._buffer) > MAX_NOISE or not self._fill(deadline):
                    return None
            line, self._buffer = self._buffer.split(b"\n", 1)
            if line.startswith(self._marker.encode()):
                return line.decode(errors="replace")[len(self._marker) + 1 :]
            noise += len(line) + 1
        return None

    def _take(self, size: int, deadline: float) -> bytes:
        while len(self._buffer) < size and self._fill(deadline):
            pass
        return self._buffer[:size]

    def _fill(self, deadline: float) -> bool:
        assert self._process.stdout
        left = deadline - time.monotonic()  # one who never stops talking must not have more of it
        ready = select.select([self._process.stdout], [], [], left)[0] if left > 0 else []
        chunk = os.read(self._process.stdout.fileno(), 1 << 16) if ready else b""
        self._buffer += chunk
        if ready and not chunk:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(10)  # so that its exit code is known
        return bool(chunk)

    def _words(self) -> str:
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - LOG_TAIL))
        return " ".join(self._log.read().decode(errors="replace").split())

    def __enter__(self) -> _Connection:
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with suppress(OSError, ValueError):
                stream.close()  # type: ignore[union-attr]
