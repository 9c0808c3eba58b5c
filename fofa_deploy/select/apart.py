"""Targets that get students of their own get runs of their own: the commands that make them."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from pathlib import Path

from fofa_deploy.config import ModelPlan, RunPlan
from fofa_deploy.errors import PlanError
from fofa_deploy.profile import find_profile
from fofa_deploy.recorded import PLAN
from fofa_deploy.select.record import Choice, Selection


def settled(selection: Selection, plan: RunPlan, run: Path, teacher: Path | None) -> RunPlan:
    """The plan with the student of all targets; where that is the teacher itself, with its weights and no training.

    Raises:
        PlanError: they have several; says which, and the commands for a run of each.
    """
    if lines := commands(selection, plan, run):
        told = ", ".join(f"{choice.name} for {choice.target}" for choice in selection.choices)
        if left := _unmeasured(selection, plan):
            told += f"; {', '.join(left)} could not be measured, and gets the first one"
        raise PlanError(f"targets have students of their own: {told}", "\n".join(["run", *lines]))
    if selection.ready:
        return plan.model_copy(update={"student": selection.student.model_copy(update={"checkpoint": teacher}), "distill": None})
    return plan.model_copy(update={"student": selection.student})


def commands(selection: Selection, plan: RunPlan, run: Path) -> tuple[str, ...]:
    """Where targets have several students, a run for each, as lines for a shell; each takes the splits and the teacher along."""
    run = run.resolve()  # "." has no name that another could go beside
    students: dict[str, list[Choice]] = {}
    for choice in selection.choices:
        students.setdefault(choice.name, []).append(choice)
    if len(students) == 1:
        return ()
    named = {find_profile(name).name: name for name in plan.targets}
    runs = [(choices, [named[choice.target] for choice in choices]) for choices in students.values()]
    runs[0][1].extend(_unmeasured(selection, plan))
    return tuple(line for choices, targets in runs for line in _run(choices, targets, plan, run))


def _unmeasured(selection: Selection, plan: RunPlan) -> list[str]:
    """The plan's targets that no choice was made for."""
    chosen = {choice.target for choice in selection.choices}
    return [name for name in plan.targets if find_profile(name).name not in chosen]


def _run(choices: Sequence[Choice], targets: list[str], plan: RunPlan, run: Path) -> list[str]:
    out = run.with_name(f"{run.name}-{choices[0].name}")
    required = [name for name in plan.required if name in targets]
    settings = {"targets": targets, "required": required, "student": _given(choices[0].student)}
    changes = [word for key, value in settings.items() for word in ("--set", f"{key}={toml(value)}")]
    go = ["fofa-deploy", "compress-and-export", str(run / PLAN), "--out", str(out), *changes]
    stages = [str(run / stage) for stage in ("data", "teacher") if (run / stage).is_dir()]
    taken = [f"mkdir -p {shlex.quote(str(out))}", shlex.join(["cp", "-r", *stages, str(out)])] if stages else []
    return [*taken, shlex.join(go)]


def _given(student: ModelPlan) -> dict[str, object]:
    return student.model_dump(mode="json", exclude_defaults=True)


def toml(value: object) -> str:
    """A value on one line of TOML."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{json.dumps(key)} = {toml(item)}' for key, item in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(toml, value))}]"
    return json.dumps(value)
