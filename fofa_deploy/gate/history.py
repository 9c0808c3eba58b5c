"""One line per check, appended whole; and the picture of it. A trend is for looking at: it fails nothing."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from fofa_deploy.errors import UserError
from fofa_deploy.gate.verdicts import Figures, GateReport, Verdict
from fofa_deploy.types import Frozen

MAX_LINE = 1 << 20


class Entry(Frozen):
    """One check as the history keeps it."""

    schema_version: Literal[1] = 1
    created_at: str
    commit: str | None
    verdict: Verdict
    fingerprint: str
    figures: dict[str, Figures]


def append_history(path: Path, report: GateReport) -> None:
    """Append one JSON line: whole or not at all, also beside other jobs that append.

    Raises:
        UserError: the file cannot be written.
    """
    entry = Entry(
        created_at=report.created_at,
        commit=report.commit,
        verdict=report.verdict,
        fingerprint=report.environment.fingerprint,
        figures=report.figures,
    )
    line = json.dumps(entry.model_dump(mode="json"), allow_nan=False).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX)
            size = os.fstat(descriptor).st_size
            # A line that a full disk cut short must not swallow this one.
            torn = size > 0 and os.pread(descriptor, 1, size - 1) != b"\n"
            _write_whole(descriptor, b"\n" + line if torn else line, size)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}", "free space or choose another path") from error


def _write_whole(descriptor: int, content: bytes, size: int) -> None:
    if os.write(descriptor, content) != len(content):
        os.ftruncate(descriptor, size)
        raise OSError("only a part of the line could be written")


def read_history(path: Path) -> list[Entry]:
    """Every entry, in the order they were appended.

    Raises:
        UserError: the file cannot be read, or a line is no entry; names the line.
    """
    entries = []
    try:
        with path.open("rb") as stream:
            for number, line in enumerate(iter(lambda: stream.readline(MAX_LINE), b""), 1):
                if line.strip():
                    entries.append(_entry(path, number, line))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}", "check the path") from error
    return entries


def _entry(path: Path, number: int, line: bytes) -> Entry:
    try:
        return Entry.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise UserError(f"{path}, line {number}, is no entry of a history: {first['msg']}", "remove the line") from error


def picture(entries: Sequence[Entry]) -> str:
    """SVG: median latency and accuracy per target, check by check; a line breaks where device or tools change."""
    from fofa_deploy.report.plots import trend  # matplotlib is not free

    return trend({"median latency, ms": _lines(entries, "p50_ms", 1.0), "accuracy, %": _lines(entries, "accuracy", 100.0)})


def _lines(entries: Sequence[Entry], figure: str, factor: float) -> dict[str, list[list[tuple[float, float]]]]:
    """Per target, runs of points of the same fingerprint."""
    lines: dict[str, list[list[tuple[float, float]]]] = {}
    before: dict[str, str] = {}
    for number, entry in enumerate(entries, 1):
        for target, figures in entry.figures.items():
            value = getattr(figures, figure)
            if value is None:
                continue
            runs = lines.setdefault(target, [])
            if before.get(target) != entry.fingerprint:
                runs.append([])
            before[target] = entry.fingerprint
            runs[-1].append((float(number), factor * value))
    return lines
