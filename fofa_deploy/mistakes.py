"""Pydantic's errors in the words of the person who wrote the file: one line per mistake, with the nearest valid name."""

from __future__ import annotations

import json
import re
import types
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Annotated, Any, TypeGuard, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

Path = tuple[str | int, ...]

TYPES = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "string": "a string",
    "tuple": "an array",
    "list": "an array",
    "frozen_set": "an array",
    "dict": "a table",
    "mapping": "a table",
    "model": "a table",
    "model_attributes": "a table",
}
LIMITS = {
    "greater_than": "greater than {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "less than {lt:g}",
    "less_than_equal": "at most {le:g}",
    "multiple_of": "a multiple of {multiple_of}",
    "finite_number": "a finite number",
}


@dataclass(frozen=True)
class Mistake:
    """One wrong place in the data.

    ``expected`` is set when the type is wrong, so that a union's complaints can be merged; ``suggested`` when a name is
    unknown; ``hollow`` when the complaint means nothing once there is a mistake further inside.
    """

    path: Path
    text: str
    expected: str | None = None
    suggested: str | None = None
    hollow: bool = False

    def __str__(self) -> str:
        return f"{dotted(self.path) or 'the whole file'}: {self.text}"


def explain(errors: Iterable[ErrorDetails], data: Mapping[str, object], model: type[BaseModel]) -> list[str]:
    """One line per mistake, in the order in which ``data`` lists its keys."""
    found = [_mistake(error, data, model) for error in errors]
    clear = _merged(_without_echoes(_without_renamed(found)), data)
    return [str(m) for m in sorted(clear, key=lambda m: _position(m.path, data))]


def nearest(name: str, valid: Iterable[str]) -> str | None:
    """The valid name that a typing mistake most likely meant; case and ``-``/``_`` count for nothing."""
    by_plain = {_plain(v): v for v in valid}
    near = get_close_matches(_plain(name)[:100], by_plain, n=1)
    return by_plain[near[0]] if near else None


def suggestion(name: str, valid: Sequence[str]) -> str:
    """``did you mean 'x'?``, or the valid names when none is near."""
    near = nearest(name, valid)
    return f"did you mean '{near}'?" if near else f"valid: {', '.join(valid) or 'nothing'}"


def dotted(path: Path) -> str:
    """``distill.losses[0].name``, as the path would be written in TOML."""
    text = ""
    for step in path:
        text += f"[{step}]" if isinstance(step, int) else f".{_key(step)}" if text else _key(step)
    return text


# --- one error ------------------------------------------------------------------------------------------------


def _mistake(error: ErrorDetails, data: Mapping[str, object], model: type[BaseModel]) -> Mistake:
    kind, context = error["type"], error.get("ctx", {})
    path, value = _locate(error["loc"], data)
    if kind == "extra_forbidden":
        return _unknown_key(error["loc"], path, data, model)
    if kind == "missing":
        return _missing(error["loc"], path, data, model)
    if kind.startswith("union_tag"):
        return _bad_tag(path, context)
    if kind in ("enum", "literal_error"):
        return Mistake(path, _bad_choice(value, context["expected"]))
    if kind in LIMITS:
        return Mistake(path, f"must be {LIMITS[kind].format(**context)}, got {show(value)}")
    expected = _expected_type(kind)
    if expected:
        return Mistake(path, f"expected {expected}, got {show(value)}", expected=expected, hollow=True)
    return Mistake(path, _other(error, value), hollow=kind == "too_short")


def _unknown_key(loc: Path, path: Path, data: Mapping[str, object], model: type[BaseModel]) -> Mistake:
    name = str(loc[-1])
    valid = list(_fields_at(loc[:-1], data, model))
    elsewhere = (p for p in _all_paths(model) if p.endswith(f".{name}") and p != dotted(path))
    near = nearest(name, valid) or next(elsewhere, None)
    hint = f"did you mean '{near}'?" if near else f"valid here: {', '.join(valid)}"
    return Mistake(path, f"unknown key; {hint}", suggested=near)


def _missing(loc: Path, path: Path, data: Mapping[str, object], model: type[BaseModel]) -> Mistake:
    field = _fields_at(loc[:-1], data, model).get(str(loc[-1]))
    about = f": {field.description}" if field and field.description else ""
    return Mistake((*path, loc[-1]), f"missing, and has no default{about}")


def _bad_tag(path: Path, context: Mapping[str, Any]) -> Mistake:
    """A discriminated sub-table whose discriminator is absent or unknown."""
    key = (*path, str(context["discriminator"]).strip("'"))
    if "tag" not in context:
        return Mistake(key, "missing; it says which kind of table this is")
    return Mistake(key, _bad_choice(context["tag"], context["expected_tags"]))


def _bad_choice(value: object, expected: str) -> str:
    valid = re.findall(r"'([^']*)'", expected)
    if not isinstance(value, str) or not valid:
        return f"must be {expected}, got {show(value)}"
    near = nearest(value, valid)
    return f"unknown value {show(value)}; " + (f"did you mean {show(near)}? " if near else "") + f"(valid: {', '.join(valid)})"


def _expected_type(kind: str) -> str | None:
    if kind == "int_from_float":
        return TYPES["int"]
    stem, _, ending = kind.rpartition("_")
    return TYPES.get(stem) if ending in ("type", "parsing") else None


def _other(error: ErrorDetails, value: object) -> str:
    context = error.get("ctx", {})
    if error["type"] in ("too_short", "string_too_short"):
        return f"must not be empty; it needs at least {context.get('min_length')}"
    if error["type"] == "string_pattern_mismatch":
        return f"{show(value)} does not match {context['pattern']}"
    if error["type"] == "value_error":
        return str(context["error"])
    return f"{error['msg'][:1].lower()}{error['msg'][1:]}, got {show(value)}"


# --- all of them together -------------------------------------------------------------------------------------


def _without_renamed(found: list[Mistake]) -> list[Mistake]:
    """A misspelt required key is one mistake, not an unknown key and a missing one."""
    meant = {(*m.path[:-1], m.suggested) for m in found if m.suggested}
    return [m for m in found if not (m.text.startswith("missing") and m.path in meant)]


def _without_echoes(found: list[Mistake]) -> list[Mistake]:
    """A table with a mistake inside it is not also "not a string", nor an array of bad items "empty"."""
    inner = {m.path[:n] for m in found for n in range(len(m.path))}
    return [m for m in found if not (m.hollow and m.path in inner)]


def _merged(found: list[Mistake], data: Mapping[str, object]) -> list[Mistake]:
    """One mistake per path: what the members of a union expect is joined by "or"."""
    by_path: dict[Path, list[Mistake]] = {}
    for mistake in found:
        by_path.setdefault(mistake.path, []).append(mistake)
    return [_joined(path, group, data) for path, group in by_path.items()]


def _joined(path: Path, group: list[Mistake], data: Mapping[str, object]) -> Mistake:
    telling = [m for m in group if m.expected is None]
    if telling or len(group) == 1:
        return Mistake(path, "; ".join(dict.fromkeys(m.text for m in telling or group)))
    kinds = list(dict.fromkeys(m.expected for m in group if m.expected))
    listed = " or ".join(filter(None, [", ".join(kinds[:-1]), kinds[-1]]))
    return Mistake(path, f"expected {listed}, got {show(_locate(path, data)[1])}")


# --- finding the place in the data and in the model -----------------------------------------------------------


def _locate(loc: Path, data: object) -> tuple[Path, object]:
    """The path of ``loc`` that exists in the data: pydantic's own labels of union members are not in the file."""
    path: Path = ()
    for step in loc:
        if _holds(data, step):
            path, data = (*path, step), data[step]  # type: ignore[index]
    return path, data


def _holds(data: object, step: str | int) -> bool:
    if isinstance(data, Mapping):
        return step in data
    return isinstance(data, list | tuple) and isinstance(step, int) and step < len(data)


def _position(path: Path, data: object) -> tuple[float, ...]:
    """Where the path stands in the file; what is missing comes last in its table."""
    order: list[float] = []
    for step in path:
        order.append(_rank(data, step))
        data = data[step] if _holds(data, step) else None  # type: ignore[index]
    return tuple(order)


def _rank(data: object, step: str | int) -> float:
    if isinstance(step, int):
        return step
    return list(data).index(step) if isinstance(data, Mapping) and step in data else float("inf")


def _fields_at(loc: Path, data: object, model: type[BaseModel]) -> dict[str, FieldInfo]:
    """The keys that the table at ``loc`` may have."""
    options: list[object] = [model]
    for step in loc:
        if _holds(data, step):
            options, data = [inner for option in options for inner in _inside(option, step)], data[step]  # type: ignore[index]
        else:  # a union member's label narrows the choice
            options = [option for option in options if _answers_to(option, step)] or options
    return {name: field for option in options if _is_model(option) for name, field in _fields(option).items()}


def _fields(model: type[BaseModel]) -> dict[str, FieldInfo]:
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _inside(annotation: object, step: str | int) -> Iterator[object]:
    if _is_model(annotation):
        field = _fields(annotation).get(str(step))
        return _flat(field.annotation) if field else iter(())
    arguments = get_args(annotation)
    return _flat(arguments[-1 if isinstance(step, str) else 0]) if arguments else iter(())


def _flat(annotation: object) -> Iterator[object]:
    """The members of a union, through Annotated."""
    if get_origin(annotation) is Annotated:
        yield from _flat(get_args(annotation)[0])
    elif get_origin(annotation) in (Union, types.UnionType):
        for member in get_args(annotation):
            yield from _flat(member)
    else:
        yield annotation


def _is_model(annotation: object) -> TypeGuard[type[BaseModel]]:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _answers_to(annotation: object, label: str | int) -> bool:
    if not _is_model(annotation):
        return False
    return annotation.__name__ == label or any(label in get_args(f.annotation) for f in annotation.model_fields.values())


def _all_paths(model: type[BaseModel], prefix: str = "", depth: int = 4) -> Iterator[str]:
    for name, field in _fields(model).items():
        yield f"{prefix}{name}"
        for inner in filter(_is_model, _flat(field.annotation) if depth else ()):
            yield from _all_paths(inner, f"{prefix}{name}.", depth - 1)


# --- words ----------------------------------------------------------------------------------------------------


def show(value: object) -> str:
    """A value as TOML would write it, on one line, short, and with nothing in it that a terminal would obey."""
    if isinstance(value, Mapping):
        return "a table"
    if isinstance(value, list | tuple):
        return "an array"
    text: Callable[[str], str] = _quoted if isinstance(value, str) else _bare
    return text(str(value))


def _bare(text: str) -> str:
    return {"True": "true", "False": "false", "None": "nothing"}.get(text, text[:40])


def _quoted(text: str) -> str:
    short = text if len(text) <= 60 else f"{text[:57]}..."
    return json.dumps(short, ensure_ascii=not short.isprintable())


def _key(step: str) -> str:
    return step if re.fullmatch(r"[A-Za-z0-9_-]{1,60}", step) else _quoted(step)


def _plain(name: str) -> str:
    return name.casefold().replace("-", "_")
