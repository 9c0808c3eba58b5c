"""The plan that a run directory was made from."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

from fofa_deploy.config import RunPlan, load_plan
from fofa_deploy.errors import PlanError
from fofa_deploy.profile import find_profile, is_path
from fofa_deploy.schema import differences, expanded, validate
from fofa_deploy.store import Store, write_atomic
from fofa_deploy.training import MANNER
from fofa_deploy.types import HardwareProfile

PLAN = "plan.json"
"""The resolved plan, in the run directory; it is a plan like any other."""


PROFILES = "profiles.json"
"""Its targets' profiles, by the names that the plan has for them."""


def record_plan(store: Store, plan: RunPlan, profiles: Sequence[HardwareProfile], force: bool) -> None:
    """Keep the resolved plan and its targets' profiles in the run directory, and refuse another plan there unless forced.

    Raises:
        PlanError: the directory belongs to another plan; says what differs.
    """
    path = store.root / PLAN
    known = path.is_file() and not force and not store.untouched
    if known and (changes := differences(_decisive(load_plan(str(path))), _decisive(plan))):
        action = "choose another --out, or --force to go on here: stages that the change does not touch are kept"
        raise PlanError(f"{store.root} was made from another plan: {'; '.join(changes)}", action)
    write_atomic(path, plan.model_dump_json(indent=1).encode())
    told = {target: profile.model_dump(mode="json") for target, profile in zip(plan.targets, profiles, strict=True)}
    write_atomic(store.root / PROFILES, json.dumps(told, indent=1, allow_nan=False).encode())


def _decisive(plan: RunPlan) -> dict[str, Any]:
    """The plan without what decides nothing that is kept: how trainings get on, and what a teacher must pass."""
    told = plan.model_dump()
    teacher, distill = told["teacher"] or {}, told["distill"] or {}
    teacher.pop("floor_top1", None)
    for table, key in product((teacher.get("fit") or {}, distill), MANNER):
        table.pop(key, None)
    return told


def recorded_profiles(out: Path, plan: RunPlan) -> list[HardwareProfile]:
    """Of the targets of the plan in ``out``; what is not there, as where a run was carried to, is taken as it was recorded.

    Raises:
        PlanError: one is neither there nor recorded.
    """
    return [_recorded(out / PROFILES, target) for target in plan.targets]


def _recorded(file: Path, target: str) -> HardwareProfile:
    try:
        return find_profile(target)
    except PlanError:
        if not file.is_file() or (is_path(target) and os.path.isfile(expanded(target))):  # noqa: PTH113 - Path's raises in closed folders
            raise
        told = _profiles(file)
        if target not in told:
            raise
    return validate(told[target], HardwareProfile, f"{file}, {target}")


def _profiles(file: Path) -> dict[str, dict[str, object]]:
    action = "put the profiles back where the plan names them, and remove this file"
    try:
        told = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise PlanError(f"{file} is not what was recorded: {error}", action) from error
    if not isinstance(told, dict) or not all(isinstance(profile, dict) for profile in told.values()):
        raise PlanError(f"{file} is not what was recorded: it holds no profiles by name", action)
    return told


def recorded_plan(out: Path) -> RunPlan:
    """Raises: PlanError: ``out`` is not a run directory."""
    path = out / PLAN
    if not path.is_file():
        action = "make one: fofa-deploy compress-and-export PLAN --out DIR"
        raise PlanError(f"{out} is not a run directory: it has no {PLAN}", action)
    return load_plan(str(path))
