"""A selection as a user would have it made: a plan with ``student.model = "auto"``, the contenders listed, the budget set."""

from __future__ import annotations

import os
import time
from contextlib import suppress

from outcome import Picked
from workroom import DATA_SEED, Workroom

from fofa_deploy.config import ModelPlan, RunPlan
from fofa_deploy.pipeline import opened
from fofa_deploy.select.choose import NobodyFitsError
from fofa_deploy.select.record import Selection
from fofa_deploy.select.table import FOLDER

AUTO = ModelPlan(model="auto")


def choose(room: Workroom, target: str, budget_ms: float, itself: bool = False) -> Picked:
    """Let the pipeline choose among the contenders for a target and a p90 budget; the stage is kept, and is not run twice.

    A budget that nobody keeps by what the selection measures is a choice, too: of nobody, before anybody is trained for it.
    With ``itself`` the teacher may be chosen, too; trainings are shared with the choice among contenders alone.
    """
    name = f"selection-{target}-{budget_ms:.6f}"
    os.environ[FOLDER] = str(room.folder / "latencies")  # what other runs on this machine have measured decides nothing here
    started = time.monotonic()
    chosen, images = None, {}
    plan, out = _plan(room, target, budget_ms, name, itself), room.folder / "runs" / name
    with suppress(NobodyFitsError), opened(plan, out, room.progress, force=True) as run:
        assert run.selection
        chosen, images = told(run.selection)
    return Picked(target=target, budget_ms=budget_ms, contender=chosen, images=images, seconds=time.monotonic() - started)


def _plan(room: Workroom, target: str, budget_ms: float, name: str, itself: bool) -> RunPlan:
    usual = room.plan(AUTO, "default", DATA_SEED, name).model_dump()
    listed = [{"name": one.name, **one.plan.model_dump()} for one in room.scale.field]
    changes = {"targets": (target,), "budget": {"p90_ms": budget_ms}, "select": {"candidates": listed, "teacher": itself}}
    return RunPlan.model_validate({**usual, **changes})


def told(selection: Selection) -> tuple[str, dict[str, int]]:
    """The contender that was chosen, and how many images each one was trained on for it, as often as they were seen."""
    images = {_contender(one.name): round(sum(point.seen for point in one.rungs)) for one in selection.candidates}
    return _contender(selection.name), images


def _contender(candidate: str) -> str:
    """A candidate's name says its input size, too."""
    return candidate.rpartition("-")[0]
