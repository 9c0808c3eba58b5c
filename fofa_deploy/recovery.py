"""Int8 recipes tried again on a student that was trained for them, where those of the student itself lose too much accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np

from fofa_deploy.config import AccuracyPlan
from fofa_deploy.diagnosis import Offer
from fofa_deploy.measure import Candidate
from fofa_deploy.metrics import topk
from fofa_deploy.progress import Progress
from fofa_deploy.results import TargetRow
from fofa_deploy.store import Store
from fofa_deploy.tune import Evidence, Settings, Tuner
from fofa_deploy.types import Artifact, HardwareProfile, Precision, Recipe, Status

PREFIX = "qat-"
"""Of the names of recipes that are built from the retrained student's graph."""


def recovered(accuracy: AccuracyPlan, top1: float | None) -> AccuracyPlan:
    """The budget of the retrained student's artifacts: they are held to the accuracy of the student before, ``top1``."""
    if top1 is None:
        return accuracy
    return accuracy.model_copy(update={"max_top1_drop": 1.0, "min_top1": max(accuracy.min_top1, top1 - accuracy.max_top1_drop)})


class RetrainedTuner(Tuner):
    """Of a retrained student's graph: its int8 recipes, under names of their own."""

    def _offer(self, profile: HardwareProfile) -> Offer:
        offered = super()._offer(profile)
        recipes = tuple(_renamed(recipe) for recipe in offered.recipes if recipe.precision is Precision.INT8)
        return offered.model_copy(update={"recipes": recipes})


def _renamed(recipe: Recipe) -> Recipe:
    description = f"{recipe.description}; after quantization-aware training"
    names = {"name": f"{PREFIX}{recipe.name}", "family": f"{PREFIX}{recipe.kin}"}
    names |= {"after": f"{PREFIX}{recipe.after}"} if recipe.after else {}
    return recipe.model_copy(update={**names, "description": description})


class RecoveringTuner(Tuner):
    """Tunes for the student's graph, and where that is due for the retrained student's, too: all recipes compete.

    Args:
        when: as `QatPlan`.
        retrain: makes the other tuner, by these settings, when it is needed for the first time; None where there can be none.
    """

    def __init__(
        self,
        store: Store,
        graph: Path,
        evidence: Evidence,
        calibration: Path | None,
        settings: Settings,
        progress: Progress,
        reference: Candidate | None,
        when: str,
        retrain: Callable[[Settings], Tuner | None],
    ) -> None:
        super().__init__(store, graph, evidence, calibration, settings, progress, reference)
        self._evidence, self._when, self._retrain = evidence, when, retrain

    @cached_property
    def _retrained(self) -> Tuner | None:
        accuracy = recovered(self.settings.accuracy, _expected_top1(self._evidence))
        return self._retrain(replace(self.settings, accuracy=accuracy))

    def search(self, profile: HardwareProfile, *, timed: bool) -> list[TargetRow]:
        wanted = self.settings.recipe
        named = wanted is not None and wanted.startswith(PREFIX)
        rows = [] if named else super().search(profile, timed=timed)
        if (named or (wanted is None and self._is_due(profile, rows))) and self._retrained is not None:
            rows += self._retrained.search(profile, timed=timed)
        return rows

    def _is_due(self, profile: HardwareProfile, rows: Sequence[TargetRow]) -> bool:
        """Int8 that is slower than float in the short race was not tried, and nothing is missed by that."""
        if self._when != "needed":
            return self._when == "always" and Precision.INT8 in profile.precisions
        tried = {row.status for row in rows if row.artifact and self._recipe(row).precision is Precision.INT8}
        return Status.REJECTED in tried and Status.VERIFIED not in tried

    def _recipe(self, row: TargetRow) -> Recipe:
        return Artifact.load(self.root / str(row.artifact)).recipe

    def candidate(self, profile: HardwareProfile, row: TargetRow, batch: int = 1, threads: int | None = None) -> Candidate:
        """With the golden outputs of the graph that the row's artifact was built from."""
        other = self._other(row)
        return other.candidate(profile, row, batch, threads) if other else super().candidate(profile, row, batch, threads)

    def tested(self, profile: HardwareProfile, row: TargetRow) -> TargetRow:
        other = self._other(row)
        return other.tested(profile, row) if other else super().tested(profile, row)

    def _other(self, row: TargetRow) -> Tuner | None:
        return self._retrained if row.recipe.startswith(PREFIX) else None


def _expected_top1(evidence: Evidence) -> float | None:
    """PyTorch's own top-1 on the validation split, where there are labels."""
    found = evidence.split("validation")
    if not evidence.labelled or found is None:
        return None
    labels = np.load(found[0] / "labels.npy", allow_pickle=False)
    return topk(np.load(found[1], allow_pickle=False), labels, 1)
