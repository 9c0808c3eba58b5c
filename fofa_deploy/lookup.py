"""What a plan names, found before anything is done: a misspelt candidate must not be told after a night of training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from fofa_deploy.config import AUTO, CandidatePlan, ModelPlan, RunPlan
from fofa_deploy.errors import ModelError, PlanError, UserError
from fofa_deploy.models import find_model
from fofa_deploy.profile import find_profile
from fofa_deploy.select.candidates import distinct, expand, listed_for
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
    lines = _candidates(plan, profiles)
    expanded = _each(lambda line: expand([line], plan.data.image_size, plan.select.image_sizes), lines, problems)
    candidates = [candidate for found in expanded for candidate in found]
    by_name = {line.model for line in lines}  # what a pattern matches is there, and may lack weights: the others have them
    students = [candidate.student for candidate in candidates if candidate.student.model in by_name]
    students += [plan.student] if plan.student.model != AUTO else []
    _each(_find, [*([plan.teacher] if plan.teacher else []), *students], problems)
    if not problems:
        distinct(candidates)
        return _distinct(profiles)
    if len(problems) == 1:
        raise problems[0]
    told = dict.fromkeys(f"{problem.message}: {problem.action}" for problem in problems)
    raise PlanError("\n  ".join(("the plan names what is not there", *told)), "correct these")


def _distinct(profiles: list[HardwareProfile]) -> list[HardwareProfile]:
    if len({profile.name for profile in profiles}) < len(profiles):
        raise PlanError("two targets have the same name", "list each profile once, and give copies a name of their own")
    return profiles


def _candidates(plan: RunPlan, profiles: Sequence[HardwareProfile]) -> Sequence[CandidatePlan]:
    """The lines that students are chosen from; those of the curated lists hang on the first target."""
    if plan.student.model != AUTO:
        return ()
    return plan.select.candidates or [line for profile in profiles[:1] for line in listed_for(profile)]


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
