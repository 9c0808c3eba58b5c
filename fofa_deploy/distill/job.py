"""What the pipeline's training stages do in their folders: make a model, train it if asked to, write weights and accuracy."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from fofa_deploy.config import AUTO, LOGIT_TERMS, DistillPlan, ModelPlan, RunPlan, TeacherPlan, TrainPlan
from fofa_deploy.data import Data, Split, eval_batches, preprocessing
from fofa_deploy.distill import engine, parallel
from fofa_deploy.distill.affinity import affinity
from fofa_deploy.distill.fake import fake_quantized
from fofa_deploy.distill.loop import Trainer, least_batch
from fofa_deploy.distill.objective import Objective
from fofa_deploy.distill.tapped import TappedModel
from fofa_deploy.distill.taps import tap
from fofa_deploy.errors import ModelError, TrainingError
from fofa_deploy.inference import Normalize, predict
from fofa_deploy.metrics import Labels, Logits, best_order, topk
from fofa_deploy.models import build_model, load_weights, parameter_count, refuse_random_head, save_weights
from fofa_deploy.progress import Progress
from fofa_deploy.results import Epoch, ModelSummary
from fofa_deploy.store import write_atomic
from fofa_deploy.types import Execution

WEIGHTS, SUMMARY, CURVE, NOTICES = "weights.safetensors", "summary.json", "curve.json", "notices.json"

FOLLOWED = 2 / 3
"""Share of quantization-aware training in which input ranges still move."""

FORGIVEN = 0.01
"""Accuracy that a prompted teacher may lose without a notice."""


MISPLACED = 0.1
"""Accuracy that a wrong order of the classes costs; less may be chance."""

MOST_ORDERED = 4096
"""Classes of which an order is looked for: it takes the square of them in memory."""

SPLITS = ("validation", "test")

CALIBRATION_BATCH = 64

Taught = tuple[ModelPlan, Path]
"""A teacher's plan, and the folder with its weights."""

Untaught = tuple[ModelPlan, None]
"""The plan of a teacher that is still to be trained."""


@dataclass(frozen=True)
class Workshop:
    """What every training of a run shares.

    Of several processes, rank 0 calls `fit`, `distill` and `retrain`, and the others `follow`. They read the same data, and the run
    directory too, so it lies where all of them see it.
    """

    data: Data
    seed: int
    threads: int
    progress: Progress

    def seen_by(self, plan: ModelPlan) -> Data:
        """The data at the size that a model works at."""
        return self.data.at(plan.image_size)

    def new(self, plan: ModelPlan) -> nn.Module:
        """The plan's model with its own weights, or freshly initialized ones that depend on the seed alone."""
        torch.set_num_threads(self.threads or max(1, Execution().thread_count // parallel.neighbours()))
        torch.manual_seed(self.seed)
        channels, height, width = self._shape(plan)
        return build_model(plan, len(self.data.class_names), channels, (height, width))

    def load(self, plan: ModelPlan, folder: Path) -> nn.Module:
        """The model that `fit` or `distill` left in ``folder``, in eval mode."""
        model = self.new(plan.model_copy(update={"checkpoint": None, "pretrained": False}))
        load_weights(model, folder / WEIGHTS)
        return model.eval()

    def follow(self) -> None:
        """Take part in every training that rank 0 begins, until it says that there are no more."""
        for training, arguments in parallel.orders():
            getattr(self, training)(*arguments)

    def rehearse(self, plan: RunPlan) -> None:
        """Make what a run is going to train, and throw it away: what cannot be is told before hours of work, not after.

        In one process the loss is shown two images, too. Of a student that is still to be chosen nothing is known.

        Raises:
            FofaError: what a training would raise in its first seconds.
        """
        for training, name in ((plan.teacher and plan.teacher.fit, "teacher.fit"), (plan.distill, "distill")):
            if training:
                engine.check(training)
                least_batch(training, len(self.data.train), name)
        if plan.distill is None:
            return
        for notice in without_effect(plan.distill):
            self.progress.say(f"notice: {notice}")
        teacher = (plan.teacher, None) if plan.teacher and plan.distill.terms else None
        if plan.student.model != AUTO:
            objective = self._objective(self.new(plan.student), plan.student, plan.distill, teacher)
            if parallel.size() == 1:  # the others know nothing of it
                sizes = dict.fromkeys(self._shape(one) for one in ((plan.student, teacher[0]) if teacher else (plan.student,)))
                images, *shown = (torch.rand(2, *size) for size in sizes)
                objective.train()(images, torch.tensor([0, 0]), *shown)
        elif teacher and plan.distill.compares_maps:
            self._tapped(self.new(teacher[0]), teacher[0], plan.distill.fofa.stages, "teacher")

    def fit(self, plan: TeacherPlan, out: Path) -> None:
        """A teacher: ready-made, or trained by cross-entropy alone."""
        if _is_done(out):
            return
        model = self.new(plan)
        if plan.fit:
            parallel.announce(("fit", (plan, out)))
            alone = DistillPlan(method="none", **{name: getattr(plan.fit, name) for name in TrainPlan.model_fields})
            self._train(self._objective(model, plan, alone), plan, alone, out, "fit the teacher")
        self._finish(plan, model, out, ready=plan.fit is None and plan.floor_top1 is None)

    def distill(self, plan: ModelPlan, distill: DistillPlan | None, out: Path, taught_by: Taught | None) -> None:
        """A student: ready-made, trained alone, or distilled from the teacher whose plan and folder are given."""
        if _is_done(out):
            return
        if distill is None:
            refuse_random_head(plan, len(self.data.class_names))
        model = self.new(plan)
        if distill:
            parallel.announce(("distill", (plan, distill, out, taught_by)))
            taught_by = None if distill.method == "none" else taught_by
            objective = self._objective(model, plan, distill, taught_by)
            curve = self._train(objective, plan, distill, out, f"distill the student ({distill.method})", taught_by)
            _write(out / NOTICES, (*objective.notices, *forgotten(curve), *without_effect(distill)))
        self._finish(plan, model, out)

    def retrain(self, plan: RunPlan, out: Path, student: Path, taught_by: Taught) -> None:
        """The student of a folder, trained on while it computes as if in int8; its weights end on their grids."""
        if _is_done(out):
            return
        method = retraining(plan)
        model = self.load(plan.student, student)
        parallel.announce(("retrain", (plan, out, student, taught_by)))
        objective = self._objective(model, plan.student, method, taught_by)
        batches = method.epochs * len(self.data.train) / method.batch_size * method.accumulate
        images = self._normalized(self.seen_by(plan.student).train.head(plan.verify.calibration))
        with fake_quantized(model, plan.qat.weight_bits, round(FOLLOWED * batches), images):
            self._train(objective, plan.student, method, out, f"quantization-aware training ({method.method})", taught_by)
        self._finish(plan.student, model, out)

    def affinity(self, plan: ModelPlan, folder: Path, taught_by: Taught, method: DistillPlan) -> float | None:
        """How alike a trained student and its teacher see validation images (:mod:`fofa_deploy.distill.affinity`), 0 to 1.

        None where they see every image alike, or one of them has no features to compare.
        """
        teacher_plan, taught = taught_by
        pair = [(plan, folder), (teacher_plan, taught)]
        try:
            student, teacher = (self._tapped(self.load(p, f), p, method.fofa.stages, "model") for p, f in pair)
        except ModelError:
            if method.compares_maps:
                raise
            return None  # such methods learn without
        images, shown = (self.seen_by(p).validation for p, _ in pair)
        return affinity(student, teacher, images, shown, Normalize(preprocessing(self.data.plan)), method.fofa.regions)

    def _normalized(self, split: Split) -> Iterator[Tensor]:
        normalize = Normalize(preprocessing(self.data.plan))
        return (normalize(torch.from_numpy(images)) for images, _ in eval_batches(split, CALIBRATION_BATCH))

    def _objective(
        self, model: nn.Module, plan: ModelPlan, method: DistillPlan, taught_by: Taught | Untaught | None = None
    ) -> Objective:
        stages = method.fofa.stages if method.compares_maps else 0
        student = self._tapped(model, plan, stages, "student")
        if taught_by is None:
            return Objective(student, None, method)
        teacher_plan, folder = taught_by
        teacher = self.load(teacher_plan, folder) if folder else self.new(teacher_plan)
        return Objective(student, self._tapped(teacher, teacher_plan, stages, "teacher"), method)

    def _tapped(self, model: nn.Module, plan: ModelPlan, stages: int, role: str) -> TappedModel:
        try:
            return tap(model, self._shape(plan), stages=stages, names=plan.taps)
        except ModelError as error:
            raise ModelError(f"{role} {plan.model}: {error.message}", error.action) from error

    def _shape(self, plan: ModelPlan) -> tuple[int, int, int]:
        """(C,H,W) of what a model sees."""
        return (self.data.plan.channels, *self.data.plan.at(plan.image_size).image_size)

    def _train(
        self, objective: Objective, model: ModelPlan, plan: TrainPlan, out: Path, name: str, taught_by: Taught | None = None
    ) -> tuple[Epoch, ...]:
        shown = self.seen_by(taught_by[0]) if taught_by and self._shape(taught_by[0]) != self._shape(model) else None
        with engine.within_memory(plan, name), parallel.unbroken():
            curve = Trainer(objective, self.seen_by(model), plan, self.seed, out, self.progress, name, shown).run()
        _write(out / CURVE, [epoch.model_dump(mode="json") for epoch in curve])
        return curve

    def _finish(self, plan: ModelPlan, model: nn.Module, out: Path, ready: bool = False) -> None:
        """Weights and accuracy; the test split is read here for the record, and decides nothing.

        Args:
            ready: it was trained elsewhere, perhaps on classes in another order.
        """
        if parallel.rank() > 0:
            return
        data = self.seen_by(plan)
        model.to("cuda" if torch.cuda.is_available() else "cpu").eval()
        found = {split: predict(model, getattr(data, split), preprocessing(data.plan)) for split in SPLITS if data.plan.labelled}
        if ready and found:
            refuse_other_order(found["validation"], data.validation.labels, data.class_names, plan.model)
        save_weights(model.cpu(), out / WEIGHTS)
        size, accuracy = data.plan.image_size, _accuracy(found, data)
        summary = ModelSummary(model=plan.model, params=parameter_count(model), image_size=size, **accuracy)
        write_atomic(out / SUMMARY, summary.model_dump_json(indent=1).encode())
        shutil.rmtree(out / "checkpoints", ignore_errors=True)


def _accuracy(logits: Mapping[str, Logits], data: Data) -> dict[str, float]:
    if not logits:
        return {}
    return {
        "top1": topk(logits["test"], data.test.labels, 1),
        "top5": topk(logits["test"], data.test.labels, 5),
        "top1_validation": topk(logits["validation"], data.validation.labels, 1),
    }


def refuse_other_order(logits: Logits, labels: Labels, names: Sequence[str], model: str) -> None:
    """Raise ModelError where a model knows the classes, and numbers them in another order than the data do.

    So it may pass its floor: of ten classes, say, that it was taught with six in other places. Whether an order is better is
    asked of other images than those by which it was found: any model is right about more of those.
    """
    if not 1 < len(names) <= MOST_ORDERED:
        return
    halves = np.array_split(np.arange(len(labels)), 2)
    orders = [best_order(logits[half], labels[half]) for half in halves]
    moved = [logits[half][:, order] for half, order in zip(halves, reversed(orders), strict=True)]
    found, best = topk(logits, labels, 1), topk(np.concatenate(moved), labels, 1)
    if best < (1 + 1 / len(names)) / 2 or best - found < MISPLACED:
        return
    theirs = np.argsort(best_order(logits, labels))
    told = [f"number {i} is {names[j]!r} there and {names[i]!r} here" for i, j in enumerate(theirs) if i != j]
    raise ModelError(
        f"{model} numbers its classes in another order: it is right about {found:.1%} of the images, and would be about {best:.1%}."
        f" {'; '.join(told[:3])}{'; ...' if len(told) > 3 else ''}",
        "bring the data's classes into its order (folders sort by name: 00-cat, 01-dog, ...), or set teacher.floor_top1",
    )


def retraining(plan: RunPlan) -> DistillPlan:
    """The plan's distillation again, short and gentle; without a teacher the float student teaches itself by ``kd``.

    Of its terms those about the student's own logits are left: what the others train beside it would start anew, and needs longer.
    """
    usual = plan.distill or DistillPlan(method="none")
    method = "+".join(term for term in usual.terms if term in LOGIT_TERMS and term != "ofa") or "kd"
    changes = {"epochs": plan.qat.epochs, "lr": plan.qat.lr or usual.lr / 10, "warmup_epochs": 0.1 * plan.qat.epochs, "ema": 0.0}
    return usual.model_copy(update={**changes, "method": method, "compile": False})


def _write(path: Path, records: Sequence[object]) -> None:
    if parallel.rank() == 0:
        write_atomic(path, json.dumps(records, indent=1, allow_nan=False).encode())


def without_effect(plan: DistillPlan) -> tuple[str, ...]:
    """A notice of what the plan sets in vain."""
    keys = ", ".join(f"distill.{key} ({reason})" for key, reason in plan.idle.items())
    return (f"without effect: {keys}",) if keys else ()


def forgotten(curve: Sequence[Epoch]) -> tuple[str, ...]:
    """A notice when prompts cost the teacher more than a point of its validation accuracy by the end of training."""
    last = curve[-1].diagnostics if curve else {}
    drop = last.get("teacher_top1", 0.0) - last.get("prompted_top1", 0.0)
    if drop <= FORGIVEN:
        return ()
    return (f"the prompted teacher forgot {100 * drop:.1f} points of accuracy: raise distill.weights.regularizer or anchor",)


def check_floor(plan: TeacherPlan, summary: ModelSummary, classes: int) -> None:
    """Refuse a teacher that is not good enough to teach.

    Raises:
        TrainingError: its validation accuracy is below the plan's floor; its weights are kept.
    """
    found = summary.top1_validation or 0.0
    usual = min(3 / classes, (1 + 1 / classes) / 2)
    floor, whose = (usual, f" (the default for {classes} classes)") if plan.floor_top1 is None else (plan.floor_top1, "")
    if classes > 1 and not found >= floor:
        problem = f"the teacher's validation accuracy is {found:.2%}, its floor {floor:.2%}{whose}"
        raise TrainingError(problem, "check its weights and the preprocessing, train it longer, or lower teacher.floor_top1")


def _is_done(out: Path) -> bool:
    """Whether all that is missing is the store's record: the summary is written last.

    Rank 0 alone asks: others do as they are told, and a network file system may show them a summary that is gone.
    """
    return parallel.rank() == 0 and (out / SUMMARY).is_file()


def read_summary(folder: Path) -> ModelSummary:
    return ModelSummary.model_validate_json((folder / SUMMARY).read_bytes())


def read_curve(folder: Path) -> tuple[Epoch, ...]:
    """One record per epoch; empty for a model that was not trained here."""
    path = folder / CURVE
    return tuple(Epoch.model_validate(record) for record in json.loads(path.read_bytes())) if path.is_file() else ()


def read_notices(folder: Path) -> tuple[str, ...]:
    path = folder / NOTICES
    return tuple(json.loads(path.read_bytes())) if path.is_file() else ()
