"""Hardware profiles: one TOML file per deployment target, found by name among the installed ones or by path."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path

from fofa_deploy.errors import PlanError
from fofa_deploy.mistakes import nearest
from fofa_deploy.schema import expanded, parse_toml, read_toml
from fofa_deploy.types import HardwareProfile

PACKAGE = "fofa_profiles"
SUFFIX = ".toml"


def installed_profiles() -> tuple[HardwareProfile, ...]:
    """Every profile that ships with the package, sorted by name.

    Raises:
        PlanError: an installed file holds mistakes; the message names it and all of them.
    """
    return tuple(_load(file) for _, file in sorted(_installed().items()))


def find_profile(name_or_path: str) -> HardwareProfile:
    """The profile of an installed bare name (``raspberry-pi-5``) or of a path (``./my-board.toml``, ``boards/b.toml``).

    A bare name never looks into the current folder and a path never falls back to an installed profile.

    Raises:
        PlanError: no such profile, with the nearest name; or the file's mistakes, all of them.
    """
    if is_path(name_or_path):
        return read_toml(expanded(name_or_path), HardwareProfile)
    installed = _installed()
    if name_or_path not in installed:
        raise PlanError(f"no hardware profile is named {name_or_path!r}", _hint(name_or_path, sorted(installed)))
    return _load(installed[name_or_path])


def _installed() -> dict[str, Traversable]:
    return {f.name.removesuffix(SUFFIX): f for f in files(PACKAGE).iterdir() if f.name.endswith(SUFFIX)}


def _load(file: Traversable) -> HardwareProfile:
    return parse_toml(file.read_text(encoding="utf-8"), HardwareProfile, str(file))


def is_path(name: str) -> bool:
    """Whether a profile is named by path; else it is an installed one's name."""
    return name.endswith(SUFFIX) or "/" in name or "\\" in name


def _hint(name: str, valid: list[str]) -> str:
    beside = f"{name}{SUFFIX}"
    if Path(beside).is_file():
        return f"for the file in this folder write ./{beside}"
    near = nearest(name, valid)
    return f"did you mean {near!r}?" if near else f"installed: {', '.join(valid)}; or give the path of a .toml file"
