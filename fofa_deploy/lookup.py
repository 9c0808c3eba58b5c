"""What a plan names, found before anything is done: a misspelt candidate must not be told after a night of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from fofa_deploy.config import ModelPlan, RunPlan
from fofa_deploy.errors import ModelError, PlanError, UserError
from fofa_deploy.models import find_model
from fofa_deploy.profile import find_profile
from fofa_deploy.select.candidates import models_of
from fofa_deploy.types import HardwareProfile

Named = TypeVar("Named")
Found = TypeVar("Found")


def look_up(plan: RunPlan) -> list[HardwareProfile]:
    """The profiles of a plan's targets, once its models and checkpoints are known to be there, too.

    Raises:
        UserError: naming all that is not.
    """
    problems: list[UserError] = []
    profiles = _each(find_profile, plan.targets, problems)
    for models in _each(lambda profile: models_of(plan, profile), profiles[:1], problems):
        _each(_find, models, problems)
    if not problems:
        return _distinct(profiles)
    if len(problems) == 1:
        raise problems[0]
    told = dict.fromkeys(f"{problem.message}: {problem.action}" for problem in problems)
    raise PlanError("\n  ".join(("the plan names what is not there", *told)), "correct these")


def profiles_of(plan: RunPlan) -> list[HardwareProfile]:
    """The profiles alone: of a run that is finished nothing else is needed.

    Raises:
        PlanError: a profile is not there or wrong, or two have the same name.
    """
    return _distinct([find_profile(name) for name in plan.targets])


def _distinct(profiles: list[HardwareProfile]) -> list[HardwareProfile]:
    if len({profile.name for profile in profiles}) < len(profiles):
        raise PlanError("two targets have the same name", "list each profile once, and give copies a name of their own")
    return profiles


def _each(find: Callable[[Named], Found], names: Iterable[Named], problems: list[UserError]) -> list[Found]:
    """What is found; what is not becomes a problem."""
    found = []
    for name in names:
        try:
            found.append(find(name))
        except UserError as problem:
            problems.append(problem)
    return found


def _find(model: ModelPlan) -> None:
    find_model(model)
    if model.checkpoint and not model.checkpoint.is_file():
        raise ModelError(f"checkpoint {model.checkpoint} does not exist", "check the path")
