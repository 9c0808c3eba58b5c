"""Who may become the student: names and patterns -> candidates, each for the data set's own input size or for several.

A plan that lists nobody gets the list of its target's kind of device (candidates.toml), which spans convolutional, attention,
MLP and hybrid families.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from importlib import resources

from pydantic import Field

from fofa_deploy.config import CandidatePlan, ModelPlan, SelectPlan, Size, size_name
from fofa_deploy.errors import PlanError
from fofa_deploy.models import code_identity
from fofa_deploy.select.variants import named_grid
from fofa_deploy.types import Frozen, HardwareProfile

LISTS = "candidates.toml"
WILD = frozenset("*?[")


class Candidate(Frozen):
    """A network at one input size. Another size of the same network is another candidate."""

    name: str = Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]*$", description="unique; also the name of its folder")
    student: ModelPlan
    image_size: Size = Field(description="height, width")
    ready: bool = Field(default=False, description="the teacher itself: its accuracy is known, and nothing is trained")


def listed(plan: SelectPlan, profile: HardwareProfile) -> tuple[CandidatePlan, ...]:
    """The plan's list, or the one for its first target's kind of device."""
    return plan.candidates or listed_for(profile)


def code_of(plan: SelectPlan, profile: HardwareProfile) -> list[object]:
    """What defines the candidates beside their plans."""
    return [code_identity(line) for line in listed(plan, profile)]


def listed_for(profile: HardwareProfile) -> tuple[CandidatePlan, ...]:
    """The curated list for a profile's kind of device."""
    content = tomllib.loads(resources.files("fofa_deploy.select").joinpath(LISTS).read_text())
    return tuple(CandidatePlan(model=name) for name in content[device_kind(profile)]["models"])


def device_kind(profile: HardwareProfile) -> str:
    """gpu, board (any ARM CPU) or cpu: a section of the lists."""
    if profile.runtime.startswith("tensorrt") or "gpu" in profile.name or "cuda" in profile.name:
        return "gpu"
    return "board" if profile.device.architecture in ("arm64", "aarch64") else "cpu"


def expand(
    listed: Sequence[CandidatePlan], usual: tuple[int, int], image_sizes: Sequence[tuple[int, int]] = ()
) -> tuple[Candidate, ...]:
    """Every candidate of a list in each of its widths and depths, at every size that its line, the list or the data set names.

    Args:
        usual: height and width of the data set's images: of a student that says no other.
        image_sizes: in place of it, for those that name no size of their own.

    Raises:
        PlanError: a pattern that matches nothing, or two candidates of one name.
        ModelError: a model that cannot be scaled so; says why.
    """
    models = [named for plan in listed for name in _models(plan.model) for named in _variants(plan, name)]
    sizes = image_sizes or (usual,)
    return distinct(
        _candidate(name, student, size, usual)
        for name, student in models
        for size in ((student.image_size,) if student.image_size else sizes)
    )


def distinct(candidates: Iterable[Candidate]) -> tuple[Candidate, ...]:
    """Raises: PlanError: two of them have one name."""
    found = tuple(candidates)
    names = [candidate.name for candidate in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        action = "remove the copy, or give each a name of its own in select.candidates"
        raise PlanError(f"select.candidates has two candidates named {twice[0]!r}", action)
    return found


def itself(teacher: ModelPlan, usual: tuple[int, int]) -> Candidate:
    """The teacher as a student that is there already; without the weights, whose place only a run knows."""
    made_of = teacher.model_dump(include=set(ModelPlan.model_fields) - {"checkpoint", "pretrained"})
    size = teacher.image_size or usual
    return Candidate(name=f"teacher-{size_name(size)}", student=ModelPlan(**made_of), image_size=size, ready=True)


def _variants(plan: CandidatePlan, model: str) -> list[tuple[str, ModelPlan]]:
    """Names and plans; one, as it is, where the line names neither widths nor depths."""
    name = plan.name or re.sub(r"[^A-Za-z0-9._-]", "-", model.partition(":")[2])
    student = ModelPlan(**{**plan.model_dump(exclude={"name", "widths", "depths"}), "model": model})
    if not plan.widths and not plan.depths:
        return [(name, student)]
    return [(f"{name}{added}", one) for added, one in named_grid(student, plan.widths or (1.0,), plan.depths or (1.0,))]


def _candidate(name: str, student: ModelPlan, size: tuple[int, int], usual: tuple[int, int]) -> Candidate:
    own = student.model_copy(update={"image_size": None if size == usual else size})
    return Candidate(name=f"{name}-{size_name(size)}", student=own, image_size=size)


def _models(model: str) -> Iterable[str]:
    kind, _, pattern = model.partition(":")
    if kind != "timm" or not WILD & set(pattern):
        return (model,)
    import timm

    matching = [name for name in timm.list_models() if fnmatchcase(name, pattern)]
    if not matching:
        raise PlanError(f"select.candidates: no timm model matches {pattern!r}", "look among timm.list_models()")
    return [f"timm:{name}" for name in matching]
