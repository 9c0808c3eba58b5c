"""More candidates of one network: narrower, wider, shallower and deeper ones by its constructor's arguments, and pruned ones.

No family is named here: what a network's constructor takes is read from timm (`fofa_deploy.timm_entry`), and arguments that mean
a width or a depth are known by their names.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from fofa_deploy.config import ModelPlan
from fofa_deploy.errors import ModelError
from fofa_deploy.timm_entry import MULTIPLIER, constructor_arguments, is_multiplied, try_out
from fofa_deploy.types import Scalar

Plan = TypeVar("Plan", bound=ModelPlan)
Value = Scalar | list[Scalar]

MULTIPLE = 8
"""Of channels: what vector units and int8 kernels work in."""

WIDTHS = ("embed_dim", "embed_dims", "dims", "channels", "width", "widths", "growth_rate", "w0", "wa")
DEPTHS = ("depth", "depths", "layers", "num_blocks", "num_layers", "block_config")
HEADS = ("num_heads", "heads")
DEPTH_MULTIPLIER = "depth_multiplier"


def scaled(plan: Plan, width: float = 1.0, depth: float = 1.0) -> Plan:
    """The plan of the same network, its channels times ``width`` and its blocks times ``depth``.

    Channels are multiples of `MULTIPLE` and of the number of heads, which stays. Arguments that do not change are not written.

    Raises:
        ModelError: not timm's, ready-made weights that would not fit, or a family without such an argument.
    """
    name = _scalable(plan)
    if width == depth == 1.0:
        return plan
    known = _known(plan, name)
    changes: dict[str, Value] = {}
    if width != 1.0:
        changes |= _widths(known, width) or _refuse(plan, "width", (*WIDTHS, MULTIPLIER))
    if depth != 1.0:
        changes |= _depths(known, depth) or _refuse(plan, "depth", DEPTHS)
    found = plan.model_copy(update={"arguments": {**plan.arguments, **changes}})
    try:
        try_out(name, found.arguments)
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        problem = f"{plan.model} cannot be scaled to {changes}: {str(error) or 'its constructor refuses'}"
        raise ModelError(problem, "try a factor nearer to 1, or prune it instead: prune = 0.25") from error
    return found


def grid(plan: Plan, widths: Sequence[float] = (0.5, 0.75, 1.0), depths: Sequence[float] = (1.0,)) -> tuple[Plan, ...]:
    """Each width with each depth, in that order, every network once."""
    return tuple(found for _, found in named_grid(plan, widths, depths))


def named_grid(plan: Plan, widths: Sequence[float], depths: Sequence[float]) -> tuple[tuple[str, Plan], ...]:
    """The same with what to add to a name for each: ``-w0.5-d0.75``, without the factors that are 1."""
    found: list[tuple[str, Plan]] = []
    for width in widths:
        for depth in depths:
            one = scaled(plan, width, depth)
            if all(one != other for _, other in found):
                factors = (("w", width), ("d", depth))
                found.append(("".join(f"-{letter}{factor:g}" for letter, factor in factors if factor != 1), one))
    return tuple(found)


def pruned(plan: Plan, shares: Iterable[float]) -> tuple[Plan, ...]:
    """The plan with each of these shares of its channels taken out; 0 leaves it as it is."""
    return _distinct(plan.model_validate({**dict(plan), "prune": share}) for share in shares)


def _distinct(plans: Iterable[Plan]) -> tuple[Plan, ...]:
    found: list[Plan] = []
    for plan in plans:
        if plan not in found:
            found.append(plan)
    return tuple(found)


def _scalable(plan: ModelPlan) -> str:
    kind, _, name = plan.model.partition(":")
    if kind != "timm":
        raise ModelError(f"{plan.model} cannot be scaled: it is not timm's", "list its variants as candidates of their own")
    if plan.has_weights:
        problem = f"{plan.model} comes with weights, which fit no other width or depth"
        raise ModelError(problem, "take checkpoint and pretrained out of the plan, or prune it instead: prune = 0.25")
    return name


def _known(plan: ModelPlan, name: str) -> dict[str, Any]:
    """All constructor arguments and their values."""
    try:
        return constructor_arguments(name, plan.arguments)
    except (TypeError, RuntimeError) as error:
        raise ModelError(f"{plan.model} cannot be scaled: {error}", "check the model's name and arguments") from error


def _refuse(plan: ModelPlan, what: str, names: Sequence[str]) -> dict[str, Value]:
    problem = f"{plan.model} cannot be scaled in {what}: its constructor has none of {', '.join(names)}"
    raise ModelError(problem, "name its relatives as candidates of their own (timm.list_models()), or prune it: prune = 0.25")


def _widths(known: Mapping[str, Any], factor: float) -> dict[str, Value]:
    found = {name: known[name] for name in WIDTHS if _numeric(known.get(name))}
    if found:
        return {name: _wider(value, factor, _heads(known)) for name, value in found.items()}
    rounding = known.get("round_chs_fn")
    if MULTIPLIER in known:
        return {MULTIPLIER: known[MULTIPLIER] * factor}
    return {MULTIPLIER: rounding.keywords["multiplier"] * factor} if is_multiplied(rounding) else {}


def _depths(known: Mapping[str, Any], factor: float) -> dict[str, Value]:
    found = {name: known[name] for name in DEPTHS if _numeric(known.get(name))}
    if found:
        return {name: _each(value, lambda blocks, _: max(1, round(blocks * factor))) for name, value in found.items()}
    # Its way to the constructor is a list of blocks; their number is told by nothing but the argument.
    return {DEPTH_MULTIPLIER: known.get(DEPTH_MULTIPLIER, 1.0) * factor} if is_multiplied(known.get("round_chs_fn")) else {}


def _numeric(value: object) -> bool:
    values = value if isinstance(value, tuple | list) else [value]
    return bool(values) and all(isinstance(item, int | float) and not isinstance(item, bool) for item in values)


def _heads(known: Mapping[str, Any]) -> tuple[int, ...]:
    """Per stage, or one for all."""
    value = next((known[name] for name in HEADS if _numeric(known.get(name))), 1)
    return tuple(value) if isinstance(value, tuple | list) else (value,)


def _wider(value: Any, factor: float, heads: tuple[int, ...]) -> Value:  # noqa: ANN401 - a number, or one per stage
    def one(number: float, stage: int) -> Scalar:
        if isinstance(number, float):
            return number * factor
        step = math.lcm(MULTIPLE, heads[min(stage, len(heads) - 1)])
        return max(step, step * round(number * factor / step))

    return _each(value, one)


def _each(value: Any, change: Callable[[Any, int], Scalar]) -> Value:  # noqa: ANN401
    if isinstance(value, tuple | list):
        return [change(item, stage) for stage, item in enumerate(value)]
    return change(value, 0)
