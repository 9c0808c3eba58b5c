"""What decides a model's training and outputs, as inputs of the stages that read them."""

from __future__ import annotations

from pathlib import Path

from fofa_deploy.config import ModelPlan
from fofa_deploy.distill.job import WEIGHTS
from fofa_deploy.models import code_identity


def taught_inputs(plan: ModelPlan, folder: Path) -> dict[str, object]:
    """All that decides what a teacher teaches."""
    sized = {"image_size": plan.image_size} if plan.image_size else {}
    # The same tensors may belong to several models: other activations, other numbers of heads.
    made_of = {"model": plan.model, "arguments": plan.arguments, "code": code_identity(plan), **pruned_inputs(plan), **sized}
    return {"weights": folder / WEIGHTS, "taps": plan.taps, **made_of}


def pruned_inputs(plan: ModelPlan) -> dict[str, object]:
    """Part of what decides a model's outputs where it is pruned; absent where not, as in runs from before there was pruning."""
    return {"prune": plan.prune} if plan.prune else {}
