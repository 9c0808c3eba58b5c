"""What there is to learn from a teacher: one class per method, all with the same way in and out.

What a new method takes, docs/method.md says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from fofa_deploy.config import DistillPlan
from fofa_deploy.distill import losses
from fofa_deploy.distill.fofa import FeatureBranch
from fofa_deploy.distill.heads import ExitBranch, Projector, Regressor, Sketch
from fofa_deploy.distill.lesson import Lesson, Term
from fofa_deploy.distill.parallel import gathered
from fofa_deploy.distill.tapped import TappedModel
from fofa_deploy.errors import ModelError


class Divergence(Term):
    """KD (arXiv 1503.02531), DKD (2203.08679) or DIST (2205.10536): a function of the two models' logits."""

    def __init__(self, name: str, loss: Callable[[Lesson], Tensor]) -> None:
        super().__init__()
        self._name, self._loss = name, loss

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """Logits (B, K) of both -> a scalar."""
        return {self._name: self._loss(lesson)}


def _kd(student: TappedModel, teacher: TappedModel, plan: DistillPlan) -> Term:
    return Divergence("kd", lambda seen: losses.divergence(seen.teacher.logits, seen.student.logits, plan.temperature))


def _dkd(student: TappedModel, teacher: TappedModel, plan: DistillPlan) -> Term:
    def loss(seen: Lesson) -> Tensor:
        logits = seen.teacher.logits, seen.student.logits
        return losses.decoupled_divergence(*logits, seen.labels, plan.temperature, plan.dkd_beta)

    return Divergence("dkd", loss)


def _dist(student: TappedModel, teacher: TappedModel, plan: DistillPlan) -> Term:
    def loss(seen: Lesson) -> Tensor:
        # Correlations over samples are over the whole batch, wherever its parts are.
        return losses.relational_divergence(gathered(seen.teacher.logits), gathered(seen.student.logits), plan.temperature)

    return Divergence("dist", loss)


class OneForAll(Term):
    """OFA-KD (arXiv 2310.19444): an exit at every stage of the student and its own logits, all taught by the teacher's logits."""

    def __init__(self, student: TappedModel, teacher: TappedModel, plan: DistillPlan) -> None:
        super().__init__()
        self._gamma = plan.ofa_gamma
        self.exits = nn.ModuleList(ExitBranch(stage.shape, student.classes) for stage in student.stages)

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """The student's maps (B, C_i, H_i, W_i), each by its exit (B, K), and its logits (B, K) -> the sum of their losses."""
        answers = [branch(grid) for branch, grid in zip(self.exits, lesson.student.maps, strict=True)]
        taught = [
            losses.one_for_all_loss(lesson.teacher.logits, logits, lesson.labels, self._gamma)
            for logits in (*answers, lesson.student.logits)
        ]
        return {"ofa": torch.stack(taught).sum()}


class Hint(Term):
    """FitNet (arXiv 1412.6550): the student's middle stage regresses to the teacher's, as it is and unscaled."""

    def __init__(self, student: TappedModel, teacher: TappedModel, plan: DistillPlan) -> None:
        super().__init__()
        self._student, self._teacher = (len(model.stages) // 2 for model in (student, teacher))
        self.regress = Regressor(student.stages[self._student].channels, teacher.stages[self._teacher].channels)

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """One map of each, (B, c, h, w) and (B, C, H, W) -> their mean squared error at the teacher's size."""
        target = lesson.teacher.maps[self._teacher]
        guess = self.regress(lesson.student.maps[self._student], (target.shape[-2], target.shape[-1]))
        return {"fitnet": functional.mse_loss(guess.float(), target.float())}


class RedundancySuppression(Term):
    """RSD (arXiv 2507.21844): the projected embedding correlates with the teacher's, dimension by dimension and no further.

    Where the teacher's embedding is wider than a batch, a fixed random projection of it takes its place.
    """

    def __init__(self, student: TappedModel, teacher: TappedModel, plan: DistillPlan) -> None:
        super().__init__()
        if student.embedding_width is None or teacher.embedding_width is None:
            problem = "rsd needs the vector that enters the classifier layer, which a model does not have"
            raise ModelError(problem, "use another method")
        self._off_diagonal = plan.rsd_lambda
        # B images cannot tell more than B dimensions apart: what they are asked to decorrelate beyond that is noise.
        width = min(teacher.embedding_width, max(1, plan.batch_size // plan.accumulate))
        self.projector = Projector(student.embedding_width, width)
        self.sketch = Sketch(teacher.embedding_width, width) if width < teacher.embedding_width else nn.Identity()

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """Embeddings (B, D_s) and (B, D_t) -> a scalar; zero where the whole batch is one image."""
        assert lesson.student.embedding is not None
        assert lesson.teacher.embedding is not None
        # Correlations, and the projector's batch norm, are over the whole batch, wherever its parts are.
        student, teacher = gathered(lesson.student.embedding), gathered(lesson.teacher.embedding)
        # One sample has no correlation, and BatchNorm refuses it.
        if len(student) == 1:
            return {"rsd": student.float().sum() * 0.0}
        return {"rsd": losses.redundancy_loss(self.projector(student), self.sketch(teacher), self._off_diagonal)}


TERMS: Mapping[str, Callable[[TappedModel, TappedModel, DistillPlan], Term]] = {
    "kd": _kd,
    "dkd": _dkd,
    "dist": _dist,
    "ofa": OneForAll,
    "fitnet": Hint,
    "rsd": RedundancySuppression,
    "fofa": FeatureBranch,
}
