"""One family of models put through real FOFA steps, as teacher and as student; runs in a child process."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import timm
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from fofa_deploy.config import DistillPlan
from fofa_deploy.distill.grids import resize
from fofa_deploy.distill.objective import Losses, Objective
from fofa_deploy.distill.tapped import Features, TappedModel
from fofa_deploy.distill.taps import tap
from fofa_deploy.errors import ModelError

CLASSES = 5
STEPS = (3, 2)
"""Images per step: the last batch is the smaller one."""
SIDES = (64, 96, 128, 160, 192, 224, 256, 288, 320, 384, 448, 512, 768)
"""Below 64 px the last map of most families is one pixel, which says nothing about how features are laid out."""
STUDENT, TEACHER = "mobilenetv3_small_050", "pvt_v2_b0"
"""The fixed partners: a convolutional student and a transformer teacher, both for any image size."""
TOLERANCE = 1e-3
ADAMW_EPSILON = 1e-8
"""A gradient below it is rounding noise, and moves next to nothing: of a LayerNorm over one channel, say."""


class _Value(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Rules(_Value):
    """Which models of a family do not count as its smallest."""

    ignored_prefix: str


class Smallest(_Value):
    """A family's classifier with the fewest parameters (at 5 classes), and how many it was chosen from."""

    name: str
    params: int
    models: int


class Candidate(_Value):
    """A timm model, the constructor arguments that shrink it, and the image size that it takes.

    Args:
        sized: the constructor has to be told the size.
    """

    name: str
    arguments: dict[str, int | list[int]]
    side: int
    sized: bool
    params: int

    @property
    def shape(self) -> tuple[int, int, int]:
        return 3, self.side, self.side

    def build(self, height: int, width: int) -> nn.Module:
        torch.manual_seed(0)
        return _build(self.name, self.arguments, (height, width) if self.sized else None)


class StageFound(_Value):
    module: str
    shape: tuple[int, int, int]
    layout: str
    prompt: str


class Outcome(_Value):
    """One trial that ran to its end. ``problems`` is empty where every check passed."""

    problems: tuple[str, ...]
    stages: tuple[StageFound, ...]
    notices: tuple[str, ...]
    losses: dict[str, float]
    figures: dict[str, float]
    seconds: float
    peak_mib: int


class Zoo:
    """The child's side: chooses models and tries them, until something ends the process."""

    def __init__(self, request: Rules) -> None:
        torch.set_num_threads(1)
        self.rules = request

    def smallest(self, family: str) -> Smallest:
        """Builds every model of a family, without memory for its weights."""
        names = [name for name in timm.list_models(module=family) if not name.startswith(self.rules.ignored_prefix)]
        with torch.device("meta"):
            models = [(name, timm.create_model(name, num_classes=CLASSES)) for name in names]
        sizes = [(_count(model), name) for name, model in models if model.num_classes == CLASSES]  # an encoder has none
        return Smallest(params=min(sizes)[0], name=min(sizes)[1], models=len(sizes))

    def candidate(self, name: str, arguments: dict[str, int | list[int]]) -> Candidate:
        """At the smallest side that it takes."""
        for side in sorted({*SIDES, timm.get_pretrained_cfg(name).input_size[-1]}):
            for sized in (True, False):
                try:
                    model = _build(name, arguments, (side, side) if sized else None)
                    with torch.no_grad():
                        logits = model.eval()(torch.zeros(2, 3, side, side))
                except (TypeError, ValueError, AssertionError, RuntimeError, IndexError, ZeroDivisionError):
                    continue
                if logits.shape == (2, CLASSES):
                    return Candidate(name=name, arguments=arguments, side=side, sized=sized, params=_count(model))
        raise ModelError(f"{name} takes no square image of {SIDES[0]} to {SIDES[-1]} px", "look at its constructor")

    def attempt(self, role: str, candidate: dict[str, Any]) -> Outcome:
        """One trial: real steps, and the checks on what they leave behind."""
        gc.collect()
        return ROLES[role](Candidate.model_validate(candidate))


def _as_teacher(candidate: Candidate) -> Outcome:
    """Frozen, prompted, teaching a small convolutional student."""
    shape = candidate.shape
    with _measured() as cost:
        teacher = tap(_perturbed(candidate.build(*shape[1:])), shape)
        watch = _Watch(_objective(_tapped(STUDENT, shape), teacher))
        watch.identity(_images(shape))
        watch.steps(shape)
        watch.reversal(_images(shape))
        watch.frozen()
        watch.larger_student(candidate.side)
    return watch.outcome(teacher, cost)


def _as_student(candidate: Candidate) -> Outcome:
    """Trained under a small prompted transformer."""
    shape = candidate.shape
    with _measured() as cost:
        student = tap(candidate.build(*shape[1:]), shape)
        watch = _Watch(_objective(student, _tapped(TEACHER, shape)))
        wanted = _trained_by_cross_entropy(student.model, _images(shape, STEPS[0]))
        before = {name: parameter.detach().clone() for name, parameter in student.model.named_parameters()}
        watch.steps(shape)
        watch.trained(before, wanted)
        watch.reversal(_images(shape))
        watch.frozen()
    return watch.outcome(student, cost)


def _non_square(candidate: Candidate) -> Outcome:
    """Teacher on images twice as wide as high."""
    shape = (3, candidate.side, 2 * candidate.side)
    with _measured() as cost:
        teacher = tap(_perturbed(candidate.build(*shape[1:])), shape)
        watch = _Watch(_objective(_tapped(STUDENT, shape), teacher))
        watch.identity(_images(shape))
        watch.steps(shape, counts=(2,))
        watch.frozen()
    return watch.outcome(teacher, cost)


ROLES = {"as_teacher": _as_teacher, "as_student": _as_student, "non_square": _non_square}


# --- pieces ---------------------------------------------------------------------------------------------------


def _count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def _build(name: str, arguments: dict[str, int | list[int]], size: tuple[int, int] | None) -> nn.Module:
    return timm.create_model(name, num_classes=CLASSES, **arguments, **({"img_size": size} if size else {}))


def _perturbed(model: nn.Module) -> nn.Module:
    """As if trained a little: no branch and no classifier is left at zero, where nothing could be told apart."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model


def _tapped(name: str, shape: tuple[int, int, int]) -> TappedModel:
    torch.manual_seed(0)
    return tap(_build(name, {}, None), shape)


def _objective(student: TappedModel, teacher: TappedModel) -> Objective:
    torch.manual_seed(2)
    fofa = {"width": 16, "heads": 2, "regions": 4, "prompted_stages": (1, 2, 3, 4), "feedback": True}
    plan = DistillPlan(method="fofa", fofa=fofa)
    return Objective(student, teacher, plan).train()


def _images(shape: tuple[int, int, int], count: int = 2) -> Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


def _distance(left: Tensor, right: Tensor) -> float:
    """Largest difference, relative to the root mean square of ``right``."""
    return float((left - right).abs().max() / right.float().square().mean().sqrt().clamp_min(1e-30))


def _graded(model: nn.Module, least: float = 0.0) -> set[str]:
    """Names of the tensors with a finite gradient, at some place larger than ``least``."""
    found = ((name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None)
    return {name for name, gradient in found if gradient.isfinite().all() and gradient.abs().max() > least}


def _trained_by_cross_entropy(model: nn.Module, images: Tensor) -> set[str]:
    """Names of the tensors to which a plain loss on the logits sends a gradient."""
    nn.functional.cross_entropy(model.train()(images), torch.arange(len(images)) % CLASSES).backward()
    found = _graded(model, ADAMW_EPSILON)
    model.zero_grad()
    return found


def _parts(features: Features) -> list[Tensor]:
    return [features.logits, *features.maps]


@contextmanager
def _measured() -> Iterator[dict[str, float]]:
    """Wall-clock seconds, and the peak of resident memory (MiB) since the start of the trial."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the kernel's high-water mark
    cost, started = {}, time.monotonic()
    yield cost
    cost["seconds"] = round(time.monotonic() - started, 1)
    cost["peak_mib"] = int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) // 1024


class _Watch:
    """Collects what the checks of a trial find."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective
        self.problems: list[str] = []
        self.losses: dict[str, float] = {}
        self.figures: dict[str, float] = {}
        self.graded: set[str] = set()
        self.teacher_state = {name: value.clone() for name, value in objective.teacher.state_dict().items()}

    def outcome(self, model: TappedModel, cost: dict[str, float]) -> Outcome:
        return Outcome(
            problems=tuple(self.problems),
            stages=tuple(_stage_found(model, index) for index in range(len(model.stages))),
            notices=self.objective.notices,
            losses=self.losses,
            figures=self.figures,
            **cost,
        )

    def _near(self, name: str, pairs: list[tuple[Tensor, Tensor]]) -> None:
        self.figures[name] = max(_distance(*pair) for pair in pairs)
        if not self.figures[name] <= TOLERANCE:
            self.problems.append(f"{name}: {self.figures[name]:.2g}, {TOLERANCE:g} is allowed")

    @torch.no_grad()
    def _teacher_runs(self, images: Tensor) -> tuple[Features, Features]:
        """The plain and the prompted pass, as the objective makes them."""
        made = self.objective
        plain = made.teacher(images)
        targets = made.terms["fofa"].standardize(made.terms["fofa"].targets(plain))
        aligned = made.terms["fofa"].align(made.student(images), targets)
        return plain, made.teacher(images, made.terms["fofa"].bends(aligned, targets))

    def identity(self, images: Tensor) -> None:
        """With b = 0 the prompted teacher is the plain one; with b > 0 every prompt shows in its own stage and the logits."""
        self.objective.eval()
        plain, bent = self._teacher_runs(images)
        self._near("prompted - plain at b = 0", list(zip(_parts(bent), _parts(plain), strict=True)))
        self.objective.train()

    def steps(self, shape: tuple[int, int, int], counts: tuple[int, ...] = STEPS) -> None:
        """Forward, backward and an AdamW step per batch."""
        optimizer = torch.optim.AdamW(self.objective.parameter_groups(1e-3, 0.05))
        for number, count in enumerate(counts, 1):
            losses = self.objective(_images(shape, count), torch.arange(count) % CLASSES)
            optimizer.zero_grad()
            losses.total.backward()
            self.graded |= _graded(self.objective.student.model)
            optimizer.step()
            self.finite(losses, f"in step {number} (batch of {count})")
        self.losses = {name: float(term) for name, term in losses.terms.items()}
        silent = [f"terms.fofa.{n}" for n, p in self.objective.terms["fofa"].named_parameters() if p.grad is None]
        if silent:
            self.problems.append(f"no gradient in {', '.join(silent)}")

    def finite(self, losses: Losses, when: str) -> None:
        if not all(term.isfinite() for term in (losses.total, *losses.terms.values())):
            self.problems.append(f"losses are not finite {when}")

    def trained(self, before: dict[str, Tensor], wanted: set[str]) -> None:
        """All that cross-entropy alone trains had a gradient and moved; the shares are of all the student's tensors.

        Nothing reaches the queries of an attention over one pixel, with any loss: so cross-entropy is the measure.
        """
        moved = {name for name, p in self.objective.student.model.named_parameters() if not torch.equal(p, before[name])}
        if missing := sorted(wanted - (self.graded & moved)):
            self.problems.append(f"{len(missing)} of {len(before)} student tensors are not trained: {', '.join(missing[:3])}, ...")
        self.figures |= {"share with gradient": len(self.graded) / len(before), "share changed": len(moved) / len(before)}

    def reversal(self, images: Tensor) -> None:
        """In eval mode and with open prompts, a reversed batch gives the reversed outputs of everything."""
        self.objective.eval()
        for prompt in self.objective.terms["fofa"].prompts.values():
            nn.init.constant_(prompt.b, 0.3)
        there, back = self._all_outputs(images), self._all_outputs(images.flip(0))
        self._near("reversed batch", [(b.flip(0), a) for a, b in zip(there, back, strict=True)])
        self.objective.train()

    @torch.no_grad()
    def _all_outputs(self, images: Tensor) -> list[Tensor]:
        plain, bent = self._teacher_runs(images)
        return [*_parts(plain), *_parts(bent), *_parts(self.objective.student(images))]

    @torch.no_grad()
    def larger_student(self, side: int) -> None:
        """The same teacher, for a student that sees larger images."""
        larger = (3, side + 32, side + 32)
        objective = _objective(_tapped(STUDENT, larger), self.objective.teacher)
        images = _images(larger)
        self.finite(objective(images, torch.arange(2), resize(images, (side, side))), "with another image size for the teacher")

    def frozen(self) -> None:
        """The teacher is bit for bit what it was, and in eval mode; no hook is left in either model."""
        teacher = self.objective.teacher
        if any(module.training for module in teacher.modules()):
            self.problems.append("the teacher left eval mode")
        if any(not torch.equal(value, self.teacher_state[name]) for name, value in teacher.state_dict().items()):
            self.problems.append("the teacher's state changed")
        modules = [*teacher.modules(), *self.objective.student.modules()]
        if any(module._forward_hooks or module._forward_pre_hooks for module in modules):
            self.problems.append("hooks are left")


def _stage_found(model: TappedModel, index: int) -> StageFound:
    stage, entry = model.stages[index], model.entries[index]
    prefix = f"+{stage.layout.prefix}" if stage.layout.prefix else ""
    order = " reordered" if stage.layout.order else ""
    prompt = "" if entry is None else f"{'before' if entry.before else 'after'} {entry.module}"
    return StageFound(module=stage.module, shape=stage.shape, layout=f"{stage.layout.kind}{prefix}{order}", prompt=prompt)
