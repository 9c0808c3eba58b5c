"""What the user sees while it runs: a bar with an ETA on a terminal, one line per step of the job elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from datetime import timedelta
from typing import Protocol

LINE_SECONDS = 10.0


def one_line(text: object) -> str:
    """Text without line breaks, control or direction characters: from wherever it came, it commands no terminal and no page."""
    return "".join(c if c.isprintable() else " " for c in str(text))


def lines(text: object) -> str:
    """The same, but for line breaks."""
    return "\n".join(map(one_line, str(text).split("\n")))


class Task(Protocol):
    def advance(self, steps: int = 1, note: str = "") -> None:
        """Move on by ``steps``; ``note`` is shown behind the bar."""
        ...


class Progress(Protocol):
    """Where stages report to."""

    def say(self, text: str) -> None: ...

    def task(self, name: str, total: int, done: int = 0) -> AbstractContextManager[Task]: ...


class _Silent:
    def advance(self, steps: int = 1, note: str = "") -> None:
        pass


class Quiet:
    """Reports nothing; for use as a library and in tests."""

    def say(self, text: str) -> None:
        pass

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Task]:
        yield _Silent()


class _Bar:
    def __init__(self, bar: object, handle: object) -> None:
        self._bar, self._handle = bar, handle

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._bar.update(self._handle, advance=steps, note=note)  # type: ignore[attr-defined]


class _Lines:
    """A line every ten seconds, for logs; tasks that are over before say nothing."""

    def __init__(self, name: str, total: int, done: int) -> None:
        self._name, self._total, self._done, self._begun = name, max(total, 1), done, done
        self._started = self._said = time.monotonic()

    def advance(self, steps: int = 1, note: str = "") -> None:
        self._done += steps
        if time.monotonic() - self._said > LINE_SECONDS:
            self._said = time.monotonic()
            print(f"  {self._name}: {self._done}/{self._total}, {self._left()} left  {note}", file=sys.stderr, flush=True)

    def _left(self) -> timedelta:
        """At the pace so far."""
        pace = (time.monotonic() - self._started) / max(self._done - self._begun, 1)
        return timedelta(seconds=round(pace * (self._total - self._done)))


class Terminal:
    """Bars on a terminal, lines in a log; all on standard error, so that results can be piped."""

    def __init__(self) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)

    def say(self, text: str) -> None:
        self._console.print(lines(text), markup=False)

    @contextmanager
    def task(self, name: str, total: int, done: int = 0) -> Iterator[Task]:
        if not self._console.is_terminal:
            yield _Lines(name, total, done)
            return
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with RichProgress(*columns, TextColumn("{task.fields[note]}"), console=self._console, transient=True) as bar:
            yield _Bar(bar, bar.add_task(name, total=total, completed=done, note=""))
