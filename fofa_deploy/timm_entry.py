"""What a timm entry point hands to its network's constructor: read without making the network, and overruled.

``timm.create_model(NAME, **arguments)`` calls a function that knows the family's constructor and the member's arguments. Some of
these functions take no others in their place (mixers, MobileNets, EfficientNets); here the plan's have the last word.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any, TypeGuard

import torch
from torch import nn

BUILDER = "build_model_with_cfg"
"""Through which every entry point makes its network, with the constructor's arguments among its own."""

MULTIPLIER = "channel_multiplier"
"""timm's argument of the families that are scaled by one; their constructors know it as a way of rounding."""


class _Reached(Exception):  # noqa: N818 - no error: the entry point has said all that is asked
    pass


@contextmanager
def _builder(replacement: Callable[..., nn.Module]) -> Iterator[None]:
    """Every family calls ``replacement`` in place of timm's builder."""
    modules = [module for name, module in sys.modules.items() if name.startswith("timm.models.") and hasattr(module, BUILDER)]
    originals = [getattr(module, BUILDER) for module in modules]
    try:
        for module in modules:
            setattr(module, BUILDER, replacement)
        yield
    finally:
        for module, original in zip(modules, originals, strict=True):
            setattr(module, BUILDER, original)


def _reached(name: str, arguments: Mapping[str, Any]) -> tuple[Callable[..., nn.Module], dict[str, Any]] | None:
    """The constructor of a timm model's network and what it is handed; None where timm goes another way."""
    from timm.models import model_entrypoint

    found: list[tuple[Callable[..., nn.Module], dict[str, Any]]] = []

    def reached(network: Callable[..., nn.Module], *_: object, **handed: Any) -> nn.Module:  # noqa: ANN401 - the constructor's
        found.append((network, handed))
        raise _Reached

    with _builder(reached):
        try:
            model_entrypoint(name)(pretrained=False, **arguments)
        except _Reached:
            return found[0]
    return None


def constructor_arguments(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of the network's constructor and their values for a timm model, defaults too; empty if they cannot be told.

    Raises:
        TypeError: one that is given goes to the constructor, which does not know it.
    """
    passed, overruled = split(name, arguments)
    found = _reached(name, passed)
    if found is None:
        return {}
    network, handed = found
    known = {p.name: p.default for p in inspect.signature(network).parameters.values()}
    config = handed.pop("model_cfg", None)
    if is_dataclass(config):
        known |= {field.name: getattr(config, field.name) for field in fields(config)}
    reaching = {**handed, **overruled}
    if unknown := arguments.keys() & reaching.keys() - known.keys() - {MULTIPLIER}:
        raise TypeError(f"it does not take {', '.join(sorted(unknown))}")
    return {**known, **reaching}


def split(name: str, arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arguments that the entry point takes, and those that it holds fixed itself.

    Raises:
        TypeError: it knows one in neither way.
    """
    passed: dict[str, Any] = dict(arguments)
    overruled: dict[str, Any] = {}
    while True:
        try:
            _reached(name, passed)
            return passed, overruled
        except TypeError as error:
            clash = re.search(r"multiple values for (?:keyword )?argument '(\w+)'", str(error))
            if clash is None or clash[1] not in passed:
                raise
            overruled[clash[1]] = passed.pop(clash[1])


def create(name: str, arguments: Mapping[str, Any], **options: Any) -> nn.Module:  # noqa: ANN401 - timm's own
    """``timm.create_model``, with arguments in place of those that the entry point holds fixed.

    Raises:
        TypeError: the network takes no such argument.
    """
    import timm
    from timm.models._builder import build_model_with_cfg

    passed, overruled = split(name, arguments)
    if not overruled:
        return timm.create_model(name, **options, **passed)  # type: ignore[no-any-return]

    def build(*positional: Any, **handed: Any) -> nn.Module:  # noqa: ANN401
        return build_model_with_cfg(*positional, **_overlaid(handed, overruled))  # type: ignore[no-any-return]

    with _builder(build):
        return timm.create_model(name, **options, **passed)  # type: ignore[no-any-return]


def try_out(name: str, arguments: Mapping[str, Any]) -> None:
    """Make the network without values, as a trial of its arguments.

    Raises:
        TypeError, ValueError, AssertionError, RuntimeError: it cannot be made.
    """
    with torch.device("meta"):
        create(name, arguments)


def _overlaid(handed: Mapping[str, Any], overruled: Mapping[str, Any]) -> dict[str, Any]:
    """What is handed to the constructor, with other values; a channel multiplier goes into the rounding that has one."""
    found = {**handed, **overruled}
    if MULTIPLIER in found:
        multiplier, rounding = found.pop(MULTIPLIER), handed.get("round_chs_fn")
        if not is_multiplied(rounding):
            raise TypeError(f"its entry point holds {MULTIPLIER} fixed")
        found["round_chs_fn"] = partial(rounding.func, *rounding.args, **{**rounding.keywords, "multiplier": multiplier})
    return found


def is_multiplied(rounding: object) -> TypeGuard[partial[Any]]:
    """Whether a way of rounding channels holds a channel multiplier."""
    return isinstance(rounding, partial) and "multiplier" in rounding.keywords
