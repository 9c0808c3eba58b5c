"""The plan that a run directory was made from."""

from __future__ import annotations

from pathlib import Path

from fofa_deploy.config import RunPlan, load_plan
from fofa_deploy.errors import PlanError
from fofa_deploy.schema import differences
from fofa_deploy.store import Store, write_atomic

PLAN = "plan.json"
"""The resolved plan, in the run directory; it is a plan like any other."""


def record_plan(store: Store, plan: RunPlan, force: bool) -> None:
    """Keep the resolved plan in the run directory, and refuse another one there unless forced.

    Raises:
        PlanError: the directory belongs to another plan; says what differs.
    """
    path = store.root / PLAN
    if path.is_file() and not force and not store.untouched and (before := load_plan(str(path))) != plan:
        changes = differences(before.model_dump(), plan.model_dump())
        action = "choose another --out, or --force to go on here: stages that the change does not touch are kept"
        raise PlanError(f"{store.root} was made from another plan: {'; '.join(changes)}", action)
    write_atomic(path, plan.model_dump_json(indent=1).encode())


def recorded_plan(out: Path) -> RunPlan:
    """Raises: PlanError: ``out`` is not a run directory."""
    path = out / PLAN
    if not path.is_file():
        action = "make one: fofa-deploy compress-and-export PLAN --out DIR"
        raise PlanError(f"{out} is not a run directory: it has no {PLAN}", action)
    return load_plan(str(path))
