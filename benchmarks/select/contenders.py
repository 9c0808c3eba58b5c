"""What is chosen from: ten small networks of four kinds, their teacher, their data, and the one schedule they all get.

Parameters, multiplications and latencies put them into three different orders: that is what makes choosing a question.
"""

from __future__ import annotations

import sys
from pathlib import Path

# Where the teacher and the mixer for 16 pixels are; plans name them "models:..."
sys.path.insert(0, str(Path(__file__).parent.parent / "distillation"))

from fofa_deploy.config import DataPlan, DistillPlan, MeasurePlan, ModelPlan, RunPlan, TeacherPlan, TrainPlan
from fofa_deploy.types import Frozen

TARGETS = ("cpu-onnxruntime", "cpu-openvino")
TEACHER_TAPS = ("stem.0", "stem.1", "blocks.0", "blocks.2")
METHODS = {
    "default": {"method": "fofa+rsd+dist", "fofa": {"width": 64, "heads": 4, "stages": 4}},
    "alone": {"method": "none"},
    "kd": {"method": "kd", "balance": "fixed"},
}
"""This project's default plan at the width that 16 pixels call for; no teacher; Hinton's distillation and nothing else."""


class Contender(Frozen):
    """A student that may be chosen."""

    name: str
    kind: str
    plan: ModelPlan


def _contender(name: str, kind: str, model: str, taps: tuple[str, ...] = (), **arguments: int | list[int]) -> Contender:
    plan = {"model": model, "arguments": arguments, "taps": taps}
    return Contender(name=name, kind=kind, plan=ModelPlan.model_validate(plan))


STAGES = ("stages.0", "stages.1", "stages.2")
CONTENDERS = (
    _contender("plain-narrow", "cnn", "networks:plain_cnn", STAGES, channels=[8, 16, 32], depth=1),
    _contender("plain", "cnn", "networks:plain_cnn", STAGES, channels=[16, 32, 48], depth=2),
    _contender("resnet", "cnn", "timm:resnet18", layers=[1, 1, 1, 1], channels=[48, 96, 192, 384]),
    _contender("convnext", "cnn", "timm:convnext_atto", depths=[2, 2, 2, 2], dims=[16, 32, 48, 64], patch_size=1),
    _contender("mobilenet", "cnn", "timm:mobilenetv3_small_050"),
    _contender("vit-narrow", "vit", "timm:vit_tiny_patch16_224", patch_size=4, embed_dim=48, depth=3, num_heads=3),
    _contender("vit-wide", "vit", "timm:vit_tiny_patch16_224", patch_size=4, embed_dim=128, depth=3, num_heads=4),
    _contender("mixer", "mixer", "models:mixer_student"),
    _contender(
        "tiny-vit",
        "hybrid",
        "timm:tiny_vit_5m_224",
        embed_dims=[16, 32, 48, 64],
        depths=[1, 1, 2, 1],
        num_heads=[1, 2, 3, 4],
        window_sizes=[4, 4, 4, 4],
    ),
    _contender("mobilevit", "hybrid", "timm:mobilevit_xxs"),
)


class Scale(Frozen):
    """How much of everything; two records of different scales cannot be mixed."""

    contenders: tuple[str, ...] = tuple(contender.name for contender in CONTENDERS)
    images: int = 5_000
    epochs: int = 8
    teacher_images: int = 20_000
    teacher_epochs: int = 5
    floor: float = 0.85
    samples: int = 10_000
    seconds: float = 3.0
    """Least time measured per artifact in a race; a tuner's own races take a third of it."""

    @property
    def field(self) -> tuple[Contender, ...]:
        return tuple(contender for contender in CONTENDERS if contender.name in self.contenders)

    @property
    def measure(self) -> MeasurePlan:
        return MeasurePlan(seconds=self.seconds, max_seconds=10 * self.seconds)


FULL = Scale()
QUICK = Scale(
    contenders=("plain-narrow", "vit-narrow", "mixer", "tiny-vit"),
    images=1_200,
    epochs=4,
    teacher_images=2_000,
    teacher_epochs=2,
    floor=0.3,
    samples=500,
    seconds=0.3,
)


def contender(name: str) -> Contender:
    return next(known for known in CONTENDERS if known.name == name)


def data(root: str, limit: int) -> DataPlan:
    return DataPlan.model_validate(
        {
            "name": "idx", "root": root, "limit": limit, "image_size": 16, "channels": 1, "validation_fraction": 0.05,
            "mean": (0.286,), "std": (0.33,), "flip": True, "shift": 1,
        }
    )  # fmt: skip


def teacher(scale: Scale) -> TeacherPlan:
    fit = TrainPlan(epochs=scale.teacher_epochs, batch_size=128, lr=2e-3, warmup_epochs=0.5)
    return TeacherPlan(model="models:hybrid_teacher", taps=TEACHER_TAPS, floor_top1=scale.floor, fit=fit)


def distill(scale: Scale, method: str) -> DistillPlan:
    common = {"epochs": scale.epochs, "batch_size": 128, "lr": 2e-3, "warmup_epochs": 1.0, "checkpoint_seconds": 600.0}
    return DistillPlan.model_validate({**common, **METHODS[method]})


def run_plan(root: str, scale: Scale, student: ModelPlan, method: str | None, weights: Path, seed: int, name: str) -> RunPlan:
    """The plan of a student and everything after it, on both targets; ``method`` is None for a ready one.

    Args:
        weights: of the fitted teacher, which all runs share.
    """
    taught_by = teacher(scale).model_copy(update={"fit": None, "checkpoint": weights})
    return RunPlan.model_validate(
        {
            "name": name,
            "seed": seed,
            "threads": 1,
            "targets": TARGETS,
            "data": data(root, scale.images),
            "teacher": None if method is None else taught_by,
            "student": student,
            "distill": None if method is None else distill(scale, method),
            "verify": {"samples": scale.samples},
            "measure": MeasurePlan(seconds=scale.seconds / 3, max_seconds=5 * scale.seconds),
        }
    )
