"""One forward pass from images and labels to the loss, for every method. arXiv 2501.08885, equation 6, and its neighbours.

L = CE(z_S, y) + the weighted sum of what the plan's method learns from the teacher (:mod:`fofa_deploy.distill.terms`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fofa_deploy.config import FEATURE_TERMS, DistillPlan
from fofa_deploy.distill.balance import GradientBalance
from fofa_deploy.distill.fofa import FeatureBranch
from fofa_deploy.distill.lesson import Lesson, Term
from fofa_deploy.distill.losses import divergence
from fofa_deploy.distill.replay import Prefix
from fofa_deploy.distill.tapped import Features, Prompt, TappedModel
from fofa_deploy.distill.terms import TERMS
from fofa_deploy.errors import ModelError


class Losses(NamedTuple):
    """The weighted sum, every term before its weight (detached scalars), and the student's logits (B, K), detached."""

    total: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


class Objective(nn.Module):
    """The student and all that is trained with it; the teacher is held frozen, in eval mode, outside parameters and state.

    Features teach while ``progress``, the share of the training that is done, is below the plan's ``features_until``.

    Args:
        teacher: None for method ``none``.

    Raises:
        ModelError: teacher and student do not fit, or the method needs what a model does not give.
    """

    def __init__(self, student: TappedModel, teacher: TappedModel | None, plan: DistillPlan) -> None:
        super().__init__()
        self.plan = plan
        self.student = student
        # In a tuple it is no submodule: not in state_dict, not in parameters, out of reach of train() and of DDP's buffers.
        self._frozen: tuple[TappedModel, ...] = () if teacher is None else (_freeze(teacher),)
        _check(student, teacher, plan)
        self.terms = nn.ModuleDict({name: TERMS[name](student, teacher, plan) for name in plan.terms} if teacher else {})
        self.balance = (
            GradientBalance(plan.terms, plan.balance_every, plan.accumulate) if plan.balance == "gradient" and self.terms else None
        )
        self._prefix: Prefix | None = None
        self.progress = 0.0

    @property
    def teacher(self) -> TappedModel | None:
        return self._frozen[0] if self._frozen else None

    @property
    def notices(self) -> tuple[str, ...]:
        """What could not be done as asked, for the report."""
        terms = (notice for term in self.terms.values() if isinstance(term, Term) for notice in term.notices)
        return (*self.student.notices, *(notice for teacher in self._frozen for notice in teacher.notices), *terms)

    def forward(self, images: Tensor, labels: Tensor, shown: Tensor | None = None) -> Losses:
        """Images (B, C, H, W), labels (B,) -> losses. One student pass, one plain teacher pass, at most one prompted pass.

        Args:
            shown: the same images as the teacher sees them, where its size is another.
        """
        student = self.student(images)
        terms = {"ce": functional.cross_entropy(student.logits.float(), labels, label_smoothing=self.plan.label_smoothing)}
        if self.terms:
            _check_grids(self.student, student)
            lesson = self._lesson(images if shown is None else shown, labels, student)
            for name, term in self.terms.items():
                if self._teaches(name):
                    terms |= _weighable(name, term(lesson), self.plan)
        scales = self.balance(terms, self.student.parameters()) if self.balance is not None else {}
        weighted = [getattr(self.plan.weights, name) * scales.get(name, 1.0) * term for name, term in terms.items()]
        return Losses(torch.stack(weighted).sum(), {name: term.detach() for name, term in terms.items()}, student.logits.detach())

    def _teaches(self, term: str) -> bool:
        return term not in FEATURE_TERMS or self.progress < self.plan.features_until

    def _lesson(self, shown: Tensor, labels: Tensor, student: Features) -> Lesson:
        with torch.no_grad(), self._recording(shown):
            plain = self._run_teacher(shown)
        return Lesson(shown, labels, student, plain, self._teach)

    def _recording(self, images: Tensor) -> AbstractContextManager[None]:
        """Keep of the plain pass what the prompted pass shares with it, where there will be one."""
        branch = self._branch
        over = self.training and not self._teaches("fofa")
        if branch is None or branch.first_prompt is None or not branch.due or over:
            return nullcontext()
        if self._prefix is None:
            self._prefix = Prefix(self._frozen[0], branch.first_prompt, images[:1], self._whole)
        return self._prefix.recording(images)

    def _teach(self, images: Tensor, prompts: Mapping[int, Prompt]) -> Features:
        prefix = self._prefix if self._prefix is not None and self._prefix.knows(images, prompts) else None
        with prefix.replaying(images) if prefix else nullcontext():
            return self._run_teacher(images, prompts)

    def _run_teacher(self, images: Tensor, prompts: Mapping[int, Prompt] | None = None) -> Features:
        teacher = self._frozen[0]
        if any(module.training for module in teacher.modules()):  # somebody else's train() must not move BatchNorm statistics
            teacher.eval()
        return teacher(images, prompts)  # type: ignore[no-any-return]

    @property
    def _whole(self) -> bool:
        """Whether the prompted pass sees the whole batch."""
        return self.plan.fofa.prompt_share == 1

    @property
    def _branch(self) -> FeatureBranch | None:
        return next((term for term in self.terms.values() if isinstance(term, FeatureBranch)), None)

    @torch.no_grad()
    def diagnostics(self, images: Tensor, labels: Tensor, shown: Tensor | None = None) -> dict[str, float]:
        """Sums over a batch of validation data, as `forward` takes it: divide by ``samples`` after adding batches up.

        ``teacher_correct``, ``prompted_correct`` (of z_T and z_T') and ``drift_nats``, KL(z_T || z_T'). Empty without teacher.
        """
        if self.teacher is None:
            return {}
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        lesson = self._lesson(images if shown is None else shown, labels, self.student(images))
        plain, prompted = lesson.teacher.logits, (self._branch.prompted(lesson) if self._branch else lesson.teacher).logits
        for module, mode in modes:
            module.training = mode
        return {
            "samples": float(len(labels)),
            "teacher_correct": float((plain.argmax(1) == labels).sum()),
            "prompted_correct": float((prompted.argmax(1) == labels).sum()),
            "drift_nats": float(divergence(plain, prompted)) * len(labels),
        }

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Two optimizer groups; norms, biases, scalars, positional encodings and what the student lists do not decay."""
        exempt = {f"student.model.{name}" for name in _listed(self.student.model)} | {"terms.fofa.attention.positions"}
        decayed: list[nn.Parameter] = []
        kept: list[nn.Parameter] = []
        for name, parameter in self.named_parameters():
            if parameter.requires_grad:
                (kept if parameter.ndim <= 1 or name.endswith(".bias") or name in exempt else decayed).append(parameter)
        groups = [(decayed, weight_decay), (kept, 0.0)]
        return [{"params": params, "lr": lr, "weight_decay": decay} for params, decay in groups if params]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move the teacher along: it is no submodule."""
        for teacher in self._frozen:
            teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


def _freeze(teacher: TappedModel) -> TappedModel:
    return teacher.requires_grad_(False).eval()


def _listed(model: nn.Module) -> set[str]:
    listed = getattr(model, "no_weight_decay", None)
    return set(listed()) if callable(listed) else set()


def _check_grids(model: TappedModel, seen: Features) -> None:
    """The model was looked at in eval mode: what drops tokens in training would be taken for a smaller image."""
    for stage, grid in zip(model.stages, seen.maps, strict=True):
        if grid.shape[1:] != stage.shape:
            problem = f"{stage.module} passes {tuple(grid.shape[1:])}, and passed {stage.shape} when it was looked at"
            action = (
                "tap the model at the size of these images, and switch off what drops tokens in training, such as patch_drop_rate"
            )
            raise ModelError(problem, action)


def _weighable(name: str, losses: dict[str, Tensor], plan: DistillPlan) -> dict[str, Tensor]:
    """A term's losses, if each has a weight, and one the term's own name: by it, it is balanced."""
    if unweighed := [each for each in losses if each not in type(plan.weights).model_fields]:
        raise ModelError(f"term {name} gives a loss {unweighed[0]!r} that has no weight", "add a field of that name to WeightsPlan")
    if name not in losses:
        raise ModelError(f"term {name} gives {', '.join(losses) or 'no loss'}", f"name one loss {name!r}: by that it is balanced")
    return losses


def _check(student: TappedModel, teacher: TappedModel | None, plan: DistillPlan) -> None:
    if teacher is None:
        if plan.terms:
            raise ModelError(f"method {plan.method!r} needs a teacher", "add a [teacher] table, or use method = 'none'")
        return
    if teacher.classes != student.classes:
        raise ModelError(
            f"the teacher has {teacher.classes} classes, the student {student.classes}", "set num_classes alike in both models"
        )
