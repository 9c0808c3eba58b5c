"""What cannot be trained is told before anything is, in words of the plan."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import timm
import torch
from test_loop import distilled, small_plan, teacher, workshop  # noqa: F401
from torch import nn

from fofa_deploy.config import load_plan
from fofa_deploy.distill.job import WEIGHTS, Workshop, refuse_other_order
from fofa_deploy.distill.loop import Trainer
from fofa_deploy.errors import BackendError, ModelError, PlanError, TrainingError
from fofa_deploy.models import load_weights, save_weights
from fofa_deploy.pipeline import compress_and_export, opened
from fofa_deploy.progress import Quiet

MISSING = next((name for name in ("wandb", "mlflow") if not importlib.util.find_spec(name)), None)


class Plain(nn.Module):
    """Declares no features."""

    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.body = nn.Conv2d(in_chans, 4, 3)
        self.head = nn.Linear(4, num_classes)

    def forward(self, images):
        return self.head(self.body(images).mean((2, 3)))


def Dropping(num_classes: int, in_chans: int):  # noqa: N802 - stands where classes do
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, depth=2, num_classes=num_classes, in_chans=in_chans, patch_drop_rate=0.5
    )


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (("distill.accumulate=20",), PlanError, "distill: 32 images cannot be shared by 20 passes"),
        (("teacher.fit.accumulate=20",), PlanError, r"teacher\.fit: 32 images cannot be shared"),
        (("data.limit=20", "distill.accumulate=15"), PlanError, "distill: 20 images cannot be shared"),
        (("student={model='test_rehearsal:Plain'}",), ModelError, "student test_rehearsal:Plain: Plain declares no features"),
        (("teacher.model='test_rehearsal:Plain'", "teacher.arguments={}"), ModelError, "teacher test_rehearsal:Plain: Plain decl"),
        (("student.taps=['blocks.9']",), ModelError, r"student timm:\S+: \S+ has no module blocks\.9"),
        (("student.model='test_rehearsal:Dropping'", "student.arguments={}"), ModelError, "drop no tokens"),
        (("student={model='auto'}", "teacher.model='test_rehearsal:Plain'", "teacher.arguments={}"), ModelError, "teacher test_re"),
        *([((f"distill.trackers=['{MISSING}']",), BackendError, f"not installed: {MISSING}")] if MISSING else []),
        *([(("distill.precision='fp16'",), BackendError, "fp16 needs a GPU")] if not torch.cuda.is_available() else []),
    ],
)
def test_it_is_told_before_the_teacher_is_trained(tmp_path, monkeypatch, changes, error, words):
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail(f"{self._name} was begun"))
    with pytest.raises(error, match=words):
        compress_and_export(small_plan("threads=1", *changes), tmp_path / "run", Quiet())


def test_a_run_goes_on_with_the_plan_corrected(tmp_path):
    """Nothing was made yet: there is no other plan's run that it could damage."""
    with pytest.raises(PlanError, match="cannot be shared"):
        compress_and_export(small_plan("threads=1", "distill.accumulate=20"), tmp_path / "run", Quiet())
    with pytest.raises(ModelError, match="declares no features"):
        compress_and_export(small_plan("threads=1", "student={model='test_rehearsal:Plain'}"), tmp_path / "run", Quiet())


def test_what_is_finished_is_not_rehearsed(tmp_path, teacher, monkeypatch):  # noqa: F811
    """As on another machine, without the GPU that the teacher was trained on."""
    run = tmp_path / "run"
    with opened(small_plan("threads=1"), run, Quiet()) as begun:
        assert begun.teacher
    monkeypatch.setattr(Workshop, "rehearse", lambda *_: pytest.fail("the teacher is there"))
    monkeypatch.setattr(Trainer, "run", lambda self: pytest.fail(f"begun: {self._name}"))
    with opened(small_plan("threads=1"), run, Quiet()) as again, pytest.raises(pytest.fail.Exception, match="begun: distill"):
        again.student  # noqa: B018 - the stage


def test_what_has_no_effect_is_said_at_the_start_and_kept(tmp_path, teacher):  # noqa: F811
    said = []

    class Told(Quiet):
        def say(self, text: str) -> None:
            said.append(text)

    plan = small_plan("distill.method='kd'", "distill.epochs=1", "distill.fofa={stages=2,width=16,heads=2}")
    shop = workshop(plan)
    object.__setattr__(shop, "progress", Told())
    shop.rehearse(plan)
    words = "distill.fofa.width (method = 'kd'), distill.fofa.heads (method = 'kd')"
    assert len(said) == 1
    assert said[0].startswith("notice: without effect: ")
    assert words in said[0]
    distilled(plan, tmp_path / "student", teacher)
    assert words in (tmp_path / "student" / "notices.json").read_text()


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_too_little_memory_is_told_in_numbers_of_the_plan(tmp_path, teacher, monkeypatch, error):  # noqa: F811
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(Trainer, "_train_step", fail)
    with pytest.raises(TrainingError, match="out of memory, at 16 images per pass") as caught:
        distilled(small_plan("distill.accumulate=2"), tmp_path / "student", teacher)
    assert "accumulate above 2" in caught.value.action


def test_other_errors_of_a_training_are_not_taken_for_too_little_memory(tmp_path, teacher, monkeypatch):  # noqa: F811
    def fail(*_: object) -> None:
        raise RuntimeError("the shapes do not match")

    monkeypatch.setattr(Trainer, "_train_step", fail)
    with pytest.raises(RuntimeError, match="the shapes do not match"):
        distilled(small_plan(), tmp_path / "student", teacher)


def test_a_tracker_that_does_not_start_is_named(tmp_path, teacher, monkeypatch):  # noqa: F811
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    (tmp_path / "student").mkdir()
    (tmp_path / "student" / "fofa-deploy").write_text("in the way of TensorBoard's folder")
    with pytest.raises(BackendError, match=r"trackers \(tensorboard\) do not start"):
        distilled(small_plan("distill.trackers=['tensorboard']"), tmp_path / "student", teacher)


# --- classes in another order


def answers(labels, order, wrong: float, classes: int, seed: int = 0, near: bool = False):
    """Logits of a model that errs about a share of the images, and has the class that the data number ``i`` at ``order[i]``."""
    rng = np.random.default_rng(seed)
    others = (labels + rng.integers(1, 3, len(labels))) % classes if near else rng.integers(0, classes, len(labels))
    seen = np.where(rng.random(len(labels)) < wrong, others, labels)
    return np.eye(classes, dtype=np.float32)[np.asarray(order)[seen]]


def shuffled(images: int, classes: int):
    return np.random.default_rng(7).permutation(np.arange(images) % classes)


def test_a_teacher_with_its_classes_in_another_order_is_refused_with_their_numbers():
    labels, names = shuffled(500, 10), tuple("abcdefghij")
    order = [0, 1, 2, 3, 5, 6, 7, 8, 9, 4]  # four of ten where they belong
    with pytest.raises(ModelError) as caught:
        refuse_other_order(answers(labels, order, 0.1, 10), labels, names, "timm:x")
    assert "right about 3" in caught.value.message
    assert "would be about 9" in caught.value.message
    assert "number 4 is 'j' there and 'e' here; number 5 is 'e' there and 'f' here;" in caught.value.message
    refuse_other_order(answers(labels, range(10), 0.1, 10), labels, names, "timm:x")


WEAK = (
    (10, 40, 0.5),
    (10, 500, 0.4),
    (102, 102, 0.5),
    (102, 102, 0.3),
    (200, 400, 0.55),
    (37, 74, 0.45),
    (1000, 1000, 0.2),
    (2, 16, 0.6),
)


@pytest.mark.parametrize("near", [False, True], ids=["at random", "among neighbours"])
@pytest.mark.parametrize(("classes", "images", "wrong"), WEAK)
def test_a_model_that_is_merely_weak_is_not_taken_for_one(classes, images, wrong, near):
    labels, names = shuffled(images, classes), tuple(map(str, range(classes)))
    for seed in range(5):
        refuse_other_order(answers(labels, range(classes), wrong, classes, seed, near), labels, names, "timm:x")


def test_a_ready_teacher_is_asked_for_the_order_of_its_classes(tmp_path):
    """Digits are learned in seconds; then two rows of the head change places with others."""
    plan = load_plan(
        "demo",
        [
            "data={name='digits',image_size=8,channels=1}",
            "teacher={model='test_rehearsal:Grid'}",
            "teacher.fit={epochs=8,batch_size=64,lr=3e-3,warmup_epochs=0.2}",
        ],
    )
    shop = workshop(plan)
    (tmp_path / "fitted").mkdir()
    shop.fit(plan.teacher, tmp_path / "fitted")
    model = shop.load(plan.teacher, tmp_path / "fitted")
    ready = plan.teacher.model_copy(update={"fit": None, "checkpoint": tmp_path / "moved.safetensors"})
    save_weights(model, ready.checkpoint)
    (tmp_path / "as it was").mkdir()
    shop.fit(ready, tmp_path / "as it was")
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.copy_(parameter[[1, 2, 0, 3, 4, 5, 6, 7, 8, 9]])
    save_weights(model, ready.checkpoint)
    (tmp_path / "moved").mkdir()
    with pytest.raises(ModelError, match="numbers its classes in another order"):
        shop.fit(ready, tmp_path / "moved")
    shop.fit(ready.model_copy(update={"floor_top1": 0.5}), tmp_path / "moved")
    load_weights(model, tmp_path / "moved" / WEIGHTS)


class Grid(nn.Module):
    def __init__(self, num_classes: int, in_chans: int) -> None:
        super().__init__()
        self.body = nn.Linear(64 * in_chans, 64)
        self.head = nn.Linear(64, num_classes)

    def forward(self, images):
        return self.head(self.body(images.flatten(1)).relu())
