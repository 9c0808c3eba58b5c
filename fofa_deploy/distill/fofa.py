"""FOFA's own term: region-aware attention, adaptive feedback prompts, hierarchical context loss. arXiv 2501.08885, eqs. 1 to 5."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from fofa_deploy.config import DistillPlan, FofaPlan
from fofa_deploy.distill.attention import Aligner, RegionAwareAttention
from fofa_deploy.distill.grids import resize
from fofa_deploy.distill.heads import Standardizer
from fofa_deploy.distill.lesson import Lesson, Term
from fofa_deploy.distill.losses import divergence, hierarchical_context_loss
from fofa_deploy.distill.prompts import PromptBlock
from fofa_deploy.distill.tapped import Features, Prompt, Stage, TappedModel
from fofa_deploy.distill.taps import evenly

Maps = tuple[Tensor, ...]
_AVERAGED = {"regions": (1,), "channels": (0, 2, 3), "samples": (1, 2, 3)}
"""Axes of (B, C, H, W) over which an error is averaged before it becomes a weight."""


class FeatureBranch(Term):
    """Everything FOFA trains beside the student: attention, aligners, prompts; and the teacher's statistics.

    Stages are paired shallow to deep; where one model has more, it gives evenly spaced ones.
    """

    steps: Tensor

    def __init__(self, student: TappedModel, teacher: TappedModel, distill: DistillPlan) -> None:
        super().__init__()
        self._plan = plan = distill.fofa
        self._weights, self._passes = distill.weights, distill.accumulate
        pairs = min(len(student.stages), len(teacher.stages), plan.stages)
        self.student_stages = evenly(len(student.stages), pairs)
        self.teacher_stages = evenly(len(teacher.stages), pairs)
        targets = [teacher.stages[index] for index in self.teacher_stages]
        shapes = [student.stages[index].shape for index in self.student_stages]
        self.attention = RegionAwareAttention(shapes, plan.regions, plan.cells, plan.width, plan.heads, plan.attention)
        self.aligners = nn.ModuleList(Aligner(plan.width, stage.channels) for stage in targets)
        self.scales = nn.ModuleList(Standardizer(stage.channels) if plan.standardize else nn.Identity() for stage in targets)
        side = plan.path == "side"
        entries = targets if side else [teacher.entries[index] for index in self.teacher_stages]
        self.prompts = _prompts(entries, targets, plan)
        self.notices = _unprompted(self.prompts, pairs, plan)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @property
    def first_prompt(self) -> int | None:
        """The shallowest teacher stage whose input is bent; None without prompts, or with prompts on the side."""
        return self.teacher_stages[min(map(int, self.prompts))] if self._bends_teacher else None

    @property
    def due(self) -> bool:
        """Whether the prompts take part in the coming pass; in training, those of one step out of ``prompt_every`` do."""
        return not self.training or int(self.steps) // self._passes % self._plan.prompt_every == 0

    @property
    def _bends_teacher(self) -> bool:
        return len(self.prompts) > 0 and self._plan.path == "teacher"

    def forward(self, lesson: Lesson) -> dict[str, Tensor]:
        """Maps (B, C_i, H_i, W_i) of both -> scalars: L_FD and, where there are prompts, what keeps the teacher from forgetting."""
        plain = self.targets(lesson.teacher)
        if self.training:
            self._update(plain)
        targets = self.standardize(plain)
        aligned = self.align(lesson.student, targets)
        if not self.prompts:
            return {"fofa": self._distance(aligned, targets)}
        due = self.due
        self.steps += self.training
        if not due:
            return {"fofa": self._distance(aligned, targets)}
        return self._beside(aligned, targets) if self._plan.path == "side" else self._within(lesson, aligned, targets)

    def _within(self, lesson: Lesson, aligned: Maps, targets: Maps) -> dict[str, Tensor]:
        """Prompts inside the teacher, on the first part of the batch: equation 1, and the KL of equation 6."""
        # Two at least: the prompts' batch norm has no variance of one.
        count = min(len(lesson.images), max(2, math.ceil(self._plan.prompt_share * len(lesson.images))))
        gaps = aligned, targets
        bent = lesson.teach(lesson.images[:count], self.bends(*(tuple(grid[:count] for grid in maps) for maps in gaps)))
        maps = self.standardize(self.targets(bent))
        shown = tuple(
            torch.cat([self._followed(grid), target[count:]]) if count < len(target) else self._followed(grid)
            for grid, target in zip(maps, targets, strict=True)
        )
        plain = lesson.teacher.logits[:count]
        terms = {"fofa": self._distance(aligned, shown), "regularizer": divergence(plain, bent.logits)}
        if self._weights.anchor:
            terms["anchor"] = _distance(maps, tuple(target[:count] for target in targets))
        if self._weights.supervision:
            terms["supervision"] = functional.cross_entropy(bent.logits.float(), lesson.labels[:count])
        return terms

    def _beside(self, aligned: Maps, targets: Maps) -> dict[str, Tensor]:
        """Prompts on the finished features: no second pass. There are no prompted logits; the features are held instead."""
        bent = list(targets)
        for pair, prompt in self.prompts.items():
            bent[int(pair)] = prompt(targets[int(pair)], gap=self._gap(aligned[int(pair)], targets[int(pair)]))
        maps = tuple(bent)
        return {
            "fofa": self._distance(aligned, tuple(map(self._followed, maps))),
            "regularizer": _distance(maps, targets),
        }

    def prompted(self, lesson: Lesson) -> Features:
        """The prompted teacher's answer to a lesson; the plain one's where nothing bends it."""
        if not self._bends_teacher:
            return lesson.teacher
        targets = self.standardize(self.targets(lesson.teacher))
        return lesson.teach(lesson.images, self.bends(self.align(lesson.student, targets), targets))

    def bends(self, aligned: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[int, Prompt]:
        """Prompts by teacher stage, fed with this batch's gap between the aligned student and the plain teacher."""
        return {
            self.teacher_stages[int(pair)]: partial(prompt, gap=self._gap(aligned[int(pair)], targets[int(pair)]))
            for pair, prompt in self.prompts.items()
        }

    @torch.no_grad()
    def _gap(self, aligned: Tensor, target: Tensor) -> Tensor | None:
        """Between student and plain teacher, (B, C, H, W); None for prompts that do not see it."""
        return _enlarged(aligned, target) - target if self._plan.feedback else None

    def standardize(self, maps: Sequence[Tensor]) -> Maps:
        """Teacher maps (B, C_i, H_i, W_i), raw -> the same shapes, comparable between stages and channels."""
        return tuple(scale(grid) for scale, grid in zip(self.scales, maps, strict=True))

    def targets(self, features: Features) -> Maps:
        """The paired teacher maps (B, C_i, H_i, W_i), raw."""
        return tuple(features.maps[index] for index in self.teacher_stages)

    @torch.no_grad()
    def _update(self, plain: Sequence[Tensor]) -> None:
        """Merge plain-teacher maps into the running statistics."""
        for scale, grid in zip(self.scales, plain, strict=True):
            if isinstance(scale, Standardizer):
                scale.update(grid)

    def align(self, student: Features, targets: Sequence[Tensor]) -> Maps:
        """The student's regions in the channels of the teacher's maps, (B, C_i, h_i, w_i), at most as large: equations 3 and 4."""
        regions = self.attention([student.maps[index] for index in self.student_stages])
        sizes = [(grid.shape[-2], grid.shape[-1]) for grid in targets]
        return tuple(align(tokens, size) for align, tokens, size in zip(self.aligners, regions, sizes, strict=True))

    def _followed(self, bent: Tensor) -> Tensor:
        """The same values, with a share of the gradient to the prompts: none, and they learn from the other terms alone."""
        share = self._plan.follow
        return bent if share == 1 else bent.detach() + share * (bent - bent.detach())

    def _distance(self, aligned: Maps, targets: Maps) -> Tensor:
        """L_FD with the plan's emphasis."""
        if self._plan.emphasis == "none":
            return _distance(aligned, targets)
        axes, power = _AVERAGED[self._plan.emphasis], self._plan.emphasis_power
        aligned = tuple(_enlarged(*pair) for pair in zip(aligned, targets, strict=True))
        return _distance(aligned, targets, [_difficulty(*pair, axes, power) for pair in zip(aligned, targets, strict=True)])


def _distance(aligned: Maps, targets: Maps, emphasis: Sequence[Tensor | None] | None = None) -> Tensor:
    """The sum of HCL over stages."""
    stages = zip(aligned, targets, emphasis or [None] * len(targets), strict=True)
    return torch.stack([hierarchical_context_loss(*stage) for stage in stages]).sum()


def _enlarged(aligned: Tensor, target: Tensor) -> Tensor:
    return resize(aligned, (target.shape[-2], target.shape[-1]))


@torch.no_grad()
def _difficulty(aligned: Tensor, target: Tensor, axes: tuple[int, ...], power: float) -> Tensor:
    """Mean squared error over ``axes`` to a power, with mean 1: where the student is further off than elsewhere."""
    error = (aligned.float() - target.float()).square().mean(dim=axes, keepdim=True).clamp_min(1e-12) ** power
    return error / error.mean()


def _prompts(entries: Sequence[Stage | None], targets: Sequence[Stage], plan: FofaPlan) -> nn.ModuleDict:
    """A prompt per wanted and possible pair; keys are 0-based."""
    prompts, wanted = nn.ModuleDict(), {_pair(stage, len(targets)) for stage in plan.prompted_stages}
    for pair, (entry, target) in enumerate(zip(entries, targets, strict=True)):
        if entry is not None and pair in wanted:
            prompts[str(pair)] = PromptBlock(entry.channels, target.channels if plan.feedback else None, plan.fusion)
    return prompts


def _pair(stage: int, pairs: int) -> int:
    """0-based; a plan counts from 1, or from -1 backwards."""
    return stage - 1 if stage > 0 else pairs + stage


def _unprompted(prompts: nn.ModuleDict, pairs: int, plan: FofaPlan) -> tuple[str, ...]:
    left_out = [str(stage) for stage in sorted(set(plan.prompted_stages)) if str(_pair(stage, pairs)) not in prompts]
    return (f"teacher stages without the prompt that was asked for: {', '.join(left_out)}",) if left_out else ()
