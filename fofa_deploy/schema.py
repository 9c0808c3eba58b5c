"""TOML text against a typed model: every mistake at once, each with the nearest valid name, none of them repaired."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError, to_json

from fofa_deploy.errors import PlanError
from fofa_deploy.mistakes import explain

M = TypeVar("M", bound=BaseModel)

MAX_BYTES = 64 * 1024
MAX_LINES = 25
MAX_DOTS = 200  # tomllib takes quadratic time over a dotted key


def read_toml(path: Path, model: type[M]) -> M:
    """Read a TOML file of at most 64 KiB into ``model``.

    Raises:
        PlanError: the file cannot be read, is too large, is not TOML, or holds mistakes, all of them named.
    """
    return validate(read_tables(path), model, str(path))


def parse_toml(text: str, model: type[M], source: str) -> M:
    """Parse TOML text into ``model``; ``source`` is what messages call it, usually the file's path.

    Raises:
        PlanError: the text is too large, is not TOML, or holds mistakes, all of them named.
    """
    return validate(_parsed(_capped(text.encode(errors="surrogatepass"), source), source), model, source)


def expanded(path: str) -> Path:
    """With the home folder for ``~``.

    Raises:
        PlanError: there is no such user.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise PlanError(f"{path!r}: {error}", "write the path out") from error


def read_tables(path: Path) -> dict[str, Any]:
    """The plain tables of a TOML file of at most 64 KiB, not yet held against a model.

    Raises:
        PlanError: the file cannot be read, is too large, or is not TOML.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except OSError as error:
        raise PlanError(f"{path} cannot be read: {error.strerror or error}", "check the path and its permissions") from error
    except ValueError as error:  # a path with a NUL in it
        raise PlanError(f"{str(path)!r} is not a path: {error}", "check the path") from error
    return _parsed(_capped(raw, str(path)), str(path))


def validate(data: Mapping[str, object], model: type[M], source: str) -> M:
    """Turn plain tables, as ``tomllib`` gives them, into ``model``. Types are strict: ``"20"`` is not a number.

    Raises:
        PlanError: one line per mistake, in the order of ``data``.
    """
    try:
        # Through JSON, because pydantic's strict mode takes arrays for tuples and strings for enums only there.
        return model.model_validate_json(to_json(data, inf_nan_mode="constants"), strict=True)
    except ValidationError as error:
        lines = explain(error.errors(include_url=False), data, model)
    except PydanticSerializationError as error:
        if "surrogates" in str(error):
            raise PlanError(f"{source} holds characters that are none", "write it in UTF-8") from error
        raise _too_deep(source) from error
    except RecursionError as error:
        raise _too_deep(source) from error
    raise PlanError(_report(lines, source), f"correct {'it' if len(lines) == 1 else 'them'} in {source}; nothing was run")


def _report(lines: list[str], source: str) -> str:
    count = "one mistake" if len(lines) == 1 else f"{len(lines)} mistakes"
    return "\n".join([f"{source} has {count}:", *_shortened(lines)])


def _shortened(lines: list[str]) -> Iterator[str]:
    yield from (f"  {line}" for line in lines[:MAX_LINES])
    if len(lines) > MAX_LINES:
        yield f"  and {len(lines) - MAX_LINES} more"


def _capped(raw: bytes, source: str) -> bytes:
    if len(raw) > MAX_BYTES:
        raise PlanError(f"{source} is larger than {MAX_BYTES // 1024} KiB", "a plan or a profile is a page of text; check the path")
    return raw


def _parsed(raw: bytes, source: str) -> dict[str, Any]:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        raise PlanError(f"{source} is not UTF-8 text (byte {error.start})", "save it as UTF-8") from error
    if any(line.count(".") > MAX_DOTS for line in text.splitlines()):
        raise _too_deep(source)
    try:
        return tomllib.loads(f"{text}\n")  # so that a mistake in the last line is reported with its line number
    except RecursionError as error:
        raise _too_deep(source) from error
    except ValueError as error:  # not only TOMLDecodeError: an integer of 5000 digits is a plain ValueError
        raise PlanError(_syntax_message(error, text, source), "correct the line; https://toml.io shows the syntax") from error


def _too_deep(source: str) -> PlanError:
    return PlanError(f"{source} nests its tables or arrays too deeply", "flatten it; no key needs more than a few levels")


def _syntax_message(error: ValueError, text: str, source: str) -> str:
    """The parser's message, and under it the line it speaks of."""
    place = str(error).rpartition("(at line ")[2].partition(",")[0]
    lines = text.splitlines()
    quoted = f"\n  {place} | {lines[int(place) - 1].strip()[:100]}" if place.isdigit() and int(place) <= len(lines) else ""
    return f"{source} is not valid TOML: {error}{quoted}"


def differences(before: object, after: object, where: str = "") -> list[str]:
    """What differs between two nested tables, key by key."""
    if isinstance(before, dict) and isinstance(after, dict):
        keys = sorted({*before, *after})
        return [d for key in keys for d in differences(before.get(key), after.get(key), f"{where}.{key}".lstrip("."))]
    told = [str(value) if isinstance(value, Path) else repr(value) for value in (before, after)]
    return [] if before == after else [f"{where} was {told[0]}, is {told[1]}"]
