"""Successive halving: short distillations of those that fit, each rung twice as long and on more images, for fewer of them.

Jamieson and Talwalkar, arXiv 1502.07943. Every training is a stage of its own: a killed selection goes on in the middle of it.
Scores are validation accuracies; the test split is out of reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from fofa_deploy.config import DistillPlan, SelectPlan
from fofa_deploy.data import Data
from fofa_deploy.distill.job import Taught, Workshop, read_summary
from fofa_deploy.errors import StageError, TrainingError, UnavailableError, UserError
from fofa_deploy.models import code_identity
from fofa_deploy.select.candidates import Candidate
from fofa_deploy.select.forecast import Curve, Point

Stage = Callable[[str, Mapping[str, object], Callable[[Path], None]], Path]
"""Runs a resumable stage by name: its inputs, and what fills its folder."""


@dataclass(frozen=True)
class Rung:
    """What a training of one rung sees."""

    number: int
    images: int
    epochs: int

    @property
    def seen(self) -> int:
        return self.images * self.epochs


def ladder(plan: SelectPlan, epochs: int, images: int) -> list[Rung]:
    """The rungs below a whole training of ``epochs`` over ``images``: shares of it, as many fewer images as epochs."""
    shares = [min(1.0, plan.first * 2**number) for number in range(plan.rungs)]
    lengths = [max(1, round(epochs * math.sqrt(share))) for share in shares]
    counts = [min(images, max(2, round(images * epochs * share / length))) for share, length in zip(shares, lengths, strict=True)]
    rungs = [Rung(number + 1, *pair) for number, pair in enumerate(zip(counts, lengths, strict=True))]
    # Rounding may make two alike: the later one then tells nothing new.
    return [rung for before, rung in zip([None, *rungs], rungs, strict=False) if before is None or rung.seen > before.seen]


@dataclass(frozen=True)
class Halving:
    """The search among candidates, by what the run is made of.

    Args:
        stage: runs and stores each training.
        decisive: inputs of a training that are the same for all of them, by name.
    """

    plan: SelectPlan
    distill: DistillPlan
    workshop: Workshop
    taught_by: Taught | None
    stage: Stage
    decisive: Mapping[str, object]
    known: dict[tuple[str, int], float] = field(default_factory=dict)
    """Scores by candidate and rung: who climbs for several targets does so once."""
    alike: dict[str, float | None] = field(default_factory=dict)
    """Affinity of each candidate to the teacher after its first rung."""
    faults: dict[str, str] = field(default_factory=dict)
    """Why a candidate could not be trained."""

    def climb(self, candidates: Sequence[Candidate], rival: bool = False) -> dict[str, Curve]:
        """The points of every candidate that can be trained, as far as it got; those that were dropped have fewer.

        Args:
            rival: the last one left has somebody to be compared with, who does not climb: it goes on to the top.

        Raises:
            TrainingError: none can be trained, and there is no rival.
        """
        points: dict[str, list[Point]] = {candidate.name: [] for candidate in candidates}
        left = list(candidates)
        for rung in ladder(self.plan, self.distill.epochs, len(self.workshop.data.train)):
            for candidate in left:
                if (top1 := self._known(candidate, rung)) is not None:
                    points[candidate.name].append(Point(seen=rung.seen, top1=top1))
            left = [candidate for candidate in left if candidate.name not in self.faults]
            left = sorted(left, key=lambda c: -points[c.name][-1].top1)[: math.ceil(self.plan.keep * len(left))]
            if not left or (len(left) == 1 and not rival):
                break
        found = {name: Curve(points=tuple(seen)) for name, seen in points.items() if seen and name not in self.faults}
        if candidates and not found and not rival:
            problem = "; ".join(f"{candidate.name}: {self.faults[candidate.name]}" for candidate in candidates)
            raise TrainingError(f"no candidate can be trained: {problem}", "mend one of them, or name others")
        return found

    def _known(self, candidate: Candidate, rung: Rung) -> float | None:
        """The score; None for a candidate that cannot be trained, which takes nobody along."""
        place = candidate.name, rung.number
        if place not in self.known and candidate.name not in self.faults:
            try:
                self.known[place] = self._score(candidate, rung)
            except (StageError, UserError, UnavailableError) as error:
                self.faults[candidate.name] = error.message
        return self.known.get(place)

    def _score(self, candidate: Candidate, rung: Rung) -> float:
        """Best validation accuracy of a short training."""
        plan = self._shortened(rung)
        student = {"student": candidate.student, "code": code_identity(candidate.student)}
        inputs = {**student, "distill": plan.decisive(), "images": rung.images, **self.decisive}

        def work(out: Path) -> None:
            self._limited(rung).distill(candidate.student, plan, out, self.taught_by)

        folder = self.stage(f"candidates/{candidate.name}/rung-{rung.number}", inputs, work)
        if self.taught_by and self.distill.terms and rung.number == 1:
            self.alike[candidate.name] = self.workshop.affinity(candidate.student, folder, self.taught_by, self.distill)
        return read_summary(folder).top1_validation or 0.0

    def _shortened(self, rung: Rung) -> DistillPlan:
        share = rung.epochs / self.distill.epochs
        return self.distill.model_copy(update={"epochs": rung.epochs, "warmup_epochs": self.distill.warmup_epochs * share})

    def _limited(self, rung: Rung) -> Workshop:
        """On the first of the training images, which are class-balanced; with validation images in place of the test split."""
        data: Data = self.workshop.data
        return replace(self.workshop, data=replace(data, train=data.train.head(rung.images), test=data.validation))
