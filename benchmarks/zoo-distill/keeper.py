"""What the benchmarks of all families share: the process that tries them, and the record that survives being killed."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from fofa_deploy.environment import describe
from fofa_deploy.errors import FofaError
from fofa_deploy.isolate import Child

MINIATURES = "test_"
"""timm's own for its tests; they do not count as the smallest of a family."""
SHRUNK: dict[str, dict] = {
    name: {"depth": 4}
    for name in (
        *("deepseek_vit_412m", "gemma4_vit_167m", "qwen3_vit_88m"),
        *("beit_base_patch16_224", "naflexvit_base_patch16_parfac_gap", "samvit_base_patch16_224"),
    )
}
"""Constructor arguments for smallest models that are still too large for a quick trial."""


class Keeper:
    """A child process that answers until something goes wrong in it; then the next question goes to a new one.

    Args:
        target: ``module:class`` over there, made from `trial.Rules`.
        folders: where the child finds that module and what it imports.
    """

    def __init__(self, target: str, folders: Sequence[Path], seconds: float, memory_bytes: int) -> None:
        os.environ["PYTHONPATH"] = os.pathsep.join([*map(str, folders), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
        self._target, self._limits = target, {"seconds": seconds, "memory_bytes": memory_bytes}
        self._child: Child | None = None

    def ask(self, method: str, **arguments: Any) -> dict:  # noqa: ANN401 - JSON
        from trial import Rules

        try:
            self._child = self._child or Child(self._target, Rules(ignored_prefix=MINIATURES), **self._limits)
            return self._child.call(method, **arguments)
        except FofaError:
            self._child = None
            raise

    def candidate(self, entry: dict) -> dict:
        """The family's smallest model as it can be made here; asked for once."""
        name = entry["smallest"]["name"]
        entry["candidate"] = entry.get("candidate") or self.ask("candidate", name=name, arguments=SHRUNK.get(name, {}))
        return entry["candidate"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._child is not None:
            self._child.close()


def load(path: Path) -> dict:
    return json.loads(path.read_text()) if path.is_file() else {"families": {}}


def save(path: Path, entries: dict, page: Callable[[dict], str]) -> None:
    """Into the file as it is now, and its page beside it: runs over other families may be at it, too."""
    with Path(__file__).open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        record = load(path)
        record["families"] = dict(sorted((record["families"] | entries).items()))
        record["environment"] = describe().model_dump(mode="json")
        scratch = path.with_suffix(".partial")
        scratch.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n")
        scratch.replace(path)
        path.with_name("README.md").write_text(page(record))


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown."""
    return ["| " + " | ".join(cells) + " |" for cells in [columns, ["---"] * len(columns), *rows]]


def conditions(environment: dict, packages: Sequence[str]) -> str:
    """Of the last trial, in a sentence."""
    versions = ", ".join(f"{name} {environment['versions'][name]}" for name in packages)
    return f"{environment['cpu']}, one thread, Python {environment['python']}; {versions}."


def described(entry: dict) -> list[str]:
    """The model of a family, its size and its images, as cells."""
    candidate = entry.get("candidate", {})
    size = f"{candidate['side']}{'*' if candidate['sized'] else ''}" if candidate else ""
    shrunk = ", ".join(f"{name}={value}" for name, value in candidate.get("arguments", {}).items())
    name = entry["smallest"]["name"] + (f" ({shrunk})" if shrunk else "")
    return [name, f"{candidate.get('params', entry['smallest']['params']) / 1e6:.1f}", size]
