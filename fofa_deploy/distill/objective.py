"""One forward pass from images and labels to the loss, for every method. arXiv 2501.08885, equation 6, and 2507.21844.

L = CE(z_S, y) + alpha KL(z_T || z_S) + beta L_FD + gamma KL(z_T || z_T') + RSD
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from fofa_deploy.config import DistillPlan, FofaPlan
from fofa_deploy.distill.attention import Aligner, RegionAwareAttention
from fofa_deploy.distill.losses import Projector, Standardizer, divergence, hierarchical_context_loss, redundancy_loss
from fofa_deploy.distill.prompts import PromptBlock, resize
from fofa_deploy.distill.tapped import Features, Prompt, Stage, TappedModel
from fofa_deploy.distill.taps import evenly
from fofa_deploy.errors import ModelError


class Losses(NamedTuple):
    """The weighted sum, every term before its weight (detached scalars), and the student's logits (B, K), detached."""

    total: Tensor
    terms: dict[str, Tensor]
    logits: Tensor


class FeatureBranch(nn.Module):
    """Everything FOFA trains beside the student: attention, aligners, prompts; and the teacher's statistics.

    Stages are paired shallow to deep; where one model has more, it gives evenly spaced ones.
    """

    def __init__(self, student: TappedModel, teacher: TappedModel, plan: FofaPlan) -> None:
        super().__init__()
        pairs = min(len(student.stages), len(teacher.stages), plan.stages)
        self.student_stages = evenly(len(student.stages), pairs)
        self.teacher_stages = evenly(len(teacher.stages), pairs)
        targets = [teacher.stages[index] for index in self.teacher_stages]
        shapes = [student.stages[index].shape for index in self.student_stages]
        self.attention = RegionAwareAttention(shapes, plan.regions, plan.width, plan.heads)
        self.aligners = nn.ModuleList(Aligner(plan.width, stage.channels) for stage in targets)
        self.scales = nn.ModuleList(Standardizer(stage.channels) if plan.standardize else nn.Identity() for stage in targets)
        entries = [teacher.entries[index] for index in self.teacher_stages]
        self.prompts = _prompts(entries, targets, plan)
        self.notices = _unprompted(self.prompts, plan)

    def targets(self, features: Features) -> tuple[Tensor, ...]:
        """The paired teacher maps (B, C_i, H_i, W_i), raw."""
        return tuple(features.maps[index] for index in self.teacher_stages)

    @torch.no_grad()
    def update(self, plain: Sequence[Tensor]) -> None:
        """Merge plain-teacher maps into the running statistics."""
        for scale, grid in zip(self.scales, plain, strict=True):
            if isinstance(scale, Standardizer):
                scale.update(grid)

    def standardize(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        return tuple(scale(grid) for scale, grid in zip(self.scales, maps, strict=True))

    def align(self, student: Features, plain: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The student's regions in the shapes of the plain teacher's maps: equations 3 and 4."""
        regions = self.attention([student.maps[index] for index in self.student_stages])
        sizes = [(grid.shape[-2], grid.shape[-1]) for grid in plain]
        return tuple(align(tokens, size) for align, tokens, size in zip(self.aligners, regions, sizes, strict=True))

    def bends(self, aligned: Sequence[Tensor], plain: Sequence[Tensor]) -> dict[int, Prompt]:
        """Prompts by teacher stage, fed with this batch's gap between the aligned student and the plain teacher."""
        return {
            self.teacher_stages[int(pair)]: partial(prompt, gap=(aligned[int(pair)] - plain[int(pair)]).detach())
            for pair, prompt in self.prompts.items()
        }


def _prompts(entries: Sequence[Stage | None], targets: Sequence[Stage], plan: FofaPlan) -> nn.ModuleDict:
    """A prompt per wanted and possible pair; keys are 0-based."""
    prompts = nn.ModuleDict()
    for pair, (entry, target) in enumerate(zip(entries, targets, strict=True)):
        if entry is not None and pair + 1 in plan.prompted_stages:
            prompts[str(pair)] = PromptBlock(entry.channels, target.channels if plan.feedback else None)
    return prompts


def _unprompted(prompts: nn.ModuleDict, plan: FofaPlan) -> tuple[str, ...]:
    left_out = [str(stage) for stage in sorted(set(plan.prompted_stages)) if str(stage - 1) not in prompts]
    return (f"teacher stages without the prompt that was asked for: {', '.join(left_out)}",) if left_out else ()


class Objective(nn.Module):
    """The student and all that is trained with it; the teacher is held frozen, in eval mode, outside parameters and state.

    Args:
        teacher: None for method ``none``.
        teacher_size: height and width that the teacher sees, where they are not the student's.

    Raises:
        ModelError: teacher and student do not fit, or the method needs what a model does not give.
    """

    def __init__(
        self,
        student: TappedModel,
        teacher: TappedModel | None,
        plan: DistillPlan,
        teacher_size: tuple[int, int] | None = None,
    ) -> None:
        super().__init__()
        self.plan, self.teacher_size = plan, teacher_size
        self.student = student
        # In a tuple it is no submodule: not in state_dict, not in parameters, out of reach of train() and of DDP's buffers.
        self._frozen: tuple[TappedModel, ...] = () if teacher is None else (_freeze(teacher),)
        _check(student, teacher, plan)
        self.features = FeatureBranch(student, teacher, plan.fofa) if teacher and "fofa" in plan.terms else None
        self.projector = _projector(student, teacher) if teacher and "rsd" in plan.terms else None

    @property
    def teacher(self) -> TappedModel | None:
        return self._frozen[0] if self._frozen else None

    @property
    def notices(self) -> tuple[str, ...]:
        """What could not be done as asked, for the report."""
        teacher = self.teacher.notices if self.teacher is not None else ()
        return (*self.student.notices, *teacher, *(self.features.notices if self.features is not None else ()))

    def forward(self, images: Tensor, labels: Tensor) -> Losses:
        """Images (B, C, H, W), labels (B,) -> losses. One student pass, one plain teacher pass, at most one prompted pass."""
        student = self.student(images)
        terms = {"ce": functional.cross_entropy(student.logits.float(), labels, label_smoothing=self.plan.label_smoothing)}
        if self.teacher is not None and "kd" in self.plan.terms:
            terms |= self._taught(self._teacher_images(images), student)
        total = torch.stack([getattr(self.plan.weights, name) * term for name, term in terms.items()]).sum()
        return Losses(total, {name: term.detach() for name, term in terms.items()}, student.logits.detach())

    def _taught(self, images: Tensor, student: Features) -> dict[str, Tensor]:
        plain = self._plain(images)
        terms = {"kd": divergence(plain.logits, student.logits, self.plan.temperature)}
        if self.features is not None:
            terms |= self._feature_terms(self.features, images, student, plain)
        if self.projector is not None and student.embedding is not None and plain.embedding is not None:
            terms["rsd"] = _rsd(self.projector, student.embedding, plain.embedding, self.plan.rsd_lambda)
        return terms

    def _feature_terms(self, branch: FeatureBranch, images: Tensor, student: Features, plain: Features) -> dict[str, Tensor]:
        """L_FD and, where there are prompts, KL(z_T || z_T')."""
        if self.training:
            branch.update(branch.targets(plain))
        targets = branch.standardize(branch.targets(plain))
        aligned = branch.align(student, targets)
        if not branch.prompts:
            return {"fofa": _distance(aligned, targets)}
        prompted = self._run_teacher(images, branch.bends(aligned, targets))
        fofa = _distance(aligned, branch.standardize(branch.targets(prompted)))
        return {"fofa": fofa, "regularizer": divergence(plain.logits, prompted.logits)}

    @torch.no_grad()
    def _plain(self, images: Tensor) -> Features:
        return self._run_teacher(images)

    def _run_teacher(self, images: Tensor, prompts: Mapping[int, Prompt] | None = None) -> Features:
        teacher = self._frozen[0]
        if teacher.model.training:  # somebody else's train() call must not move BatchNorm statistics
            teacher.eval()
        return teacher(images, prompts)  # type: ignore[no-any-return]

    def _teacher_images(self, images: Tensor) -> Tensor:
        return images if self.teacher_size is None else resize(images, self.teacher_size)

    @torch.no_grad()
    def diagnostics(self, images: Tensor, labels: Tensor) -> dict[str, float]:
        """Sums over a batch of validation data (B, C, H, W), (B,): divide by ``samples`` after adding batches up.

        ``teacher_correct``, ``prompted_correct`` (of z_T and z_T') and ``drift_nats``, KL(z_T || z_T'). Empty without teacher.
        """
        if self.teacher is None:
            return {}
        modes = [(module, module.training) for module in self.modules()]
        self.eval()
        plain, prompted = self._both_logits(images)
        for module, mode in modes:
            module.training = mode
        return {
            "samples": float(len(labels)),
            "teacher_correct": float((plain.argmax(1) == labels).sum()),
            "prompted_correct": float((prompted.argmax(1) == labels).sum()),
            "drift_nats": float(divergence(plain, prompted)) * len(labels),
        }

    def _both_logits(self, images: Tensor) -> tuple[Tensor, Tensor]:
        shown = self._teacher_images(images)
        plain = self._plain(shown)
        if self.features is None or not self.features.prompts:
            return plain.logits, plain.logits
        targets = self.features.standardize(self.features.targets(plain))
        aligned = self.features.align(self.student(images), targets)
        return plain.logits, self._run_teacher(shown, self.features.bends(aligned, targets)).logits

    def parameter_groups(self, lr: float, weight_decay: float) -> list[dict[str, Any]]:
        """Two optimizer groups; norms, biases, scalars, positional encodings and what the student lists do not decay."""
        exempt = {f"student.model.{name}" for name in _listed(self.student.model)} | {"features.attention.positions"}
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


def _check(student: TappedModel, teacher: TappedModel | None, plan: DistillPlan) -> None:
    if teacher is None:
        if plan.terms != {"ce"}:
            raise ModelError(f"method {plan.method!r} needs a teacher", "add a [teacher] table, or use method = 'none'")
        return
    if teacher.classes != student.classes:
        raise ModelError(
            f"the teacher has {teacher.classes} classes, the student {student.classes}", "set num_classes alike in both models"
        )
    if "rsd" in plan.terms and None in (teacher.embedding_width, student.embedding_width):
        raise ModelError("rsd needs the vector that enters the classifier layer, which a model does not have", "use another method")


def _projector(student: TappedModel, teacher: TappedModel) -> Projector:
    return Projector(student.embedding_width or 0, teacher.embedding_width or 0)


def _distance(aligned: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """L_FD, the sum of HCL over stages."""
    return torch.stack([hierarchical_context_loss(*pair) for pair in zip(aligned, targets, strict=True)]).sum()


def _rsd(projector: Projector, student: Tensor, teacher: Tensor, off_diagonal: float) -> Tensor:
    # One sample has no correlation, and BatchNorm refuses it.
    if len(student) == 1:
        return student.float().sum() * 0.0
    return redundancy_loss(projector(student), teacher, off_diagonal)
