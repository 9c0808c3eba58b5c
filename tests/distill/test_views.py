"""Teacher and student at sizes of their own: two views of each picture, both from the original."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_loop import _interrupt_after, distilled, one_thread, retrained, small_plan, workshop  # noqa: F401 - a fixture

from fofa_deploy.config import DataPlan, ModelPlan, TeacherPlan
from fofa_deploy.data import augmented, load_data
from fofa_deploy.distill.inputs import taught_inputs
from fofa_deploy.distill.job import WEIGHTS, read_curve, read_summary
from fofa_deploy.errors import InterruptedRunError, ModelError, PlanError
from fofa_deploy.models import save_weights
from fofa_deploy.store import canonical
from fofa_deploy.types import digest_file

LARGE = "teacher.image_size=32"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A teacher that works at 32 pixels, where the plan's images have 16."""
    plan, folder = (
        small_plan(LARGE, "teacher.fit={epochs=4,batch_size=32,lr=3e-3,warmup_epochs=0.2}"),
        tmp_path_factory.mktemp("teacher"),
    )
    workshop(plan).fit(plan.teacher, folder)
    return plan.teacher, folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("whole") / "student"
    distilled(small_plan(LARGE), folder, teacher)
    return folder


# --- images


def noise(folder: Path) -> Path:
    """Two classes of 24 pictures of fine stripes: sizes that are not made from the originals show."""
    stripes = np.random.default_rng(0)
    for split in ("train", "validation"):
        for kind in ("cat", "dog"):
            (folder / split / kind).mkdir(parents=True)
            for number in range(12):
                Image.fromarray(stripes.integers(0, 256, (40, 50), np.uint8)).save(folder / split / kind / f"{number}.png")
    return folder


@pytest.mark.parametrize("name", ["digits", "folder"])
def test_another_size_is_made_from_the_originals_in_the_same_splits(name, tmp_path):
    root = noise(tmp_path) if name == "folder" else None
    data, wanted = (load_data(DataPlan(name=name, root=root, image_size=side, channels=1), 0) for side in ((24, 24), (12, 16)))
    found = data.at((12, 16))
    assert found.plan == wanted.plan
    for part in ("train", "validation", "test"):
        ours, theirs = getattr(found, part), getattr(wanted, part)
        assert np.array_equal(ours.indices, theirs.indices)
        assert np.array_equal(ours.source.images(ours.indices), theirs.source.images(theirs.indices))
    assert found.digest == wanted.digest != data.digest
    assert data.at(None) is data.at((24, 24)) is data


@pytest.mark.parametrize("changes", [{"flip": True}, {"shift": 4}, {"scale": 0.3}])
def test_both_views_of_a_picture_are_cropped_shifted_and_flipped_alike(changes):
    data = load_data(DataPlan(name="digits", image_size=(32, 32), channels=1, **changes), 0)
    small, first = data.at((16, 16)), np.arange(64)

    def view(whose, epoch):
        return augmented(whose.train, first, whose.plan, 0, epoch).astype(float)

    halved = view(data, 1).reshape(64, 16, 2, 16, 2).mean((2, 4))
    same, other = (np.abs(halved - view(small, epoch)[:, 0]).mean() for epoch in (1, 2))
    assert same < other / 3


# --- training


def test_the_teacher_is_trained_and_asked_at_its_own_size(teacher, uninterrupted):
    assert read_summary(teacher[1]).image_size == (32, 32)
    assert read_summary(uninterrupted).image_size == (16, 16)
    told = [epoch.diagnostics["teacher_top1"] for epoch in read_curve(uninterrupted)]
    assert told == [read_summary(teacher[1]).top1_validation] * 2


@pytest.mark.parametrize("workers", [0, 2])
def test_a_resumed_run_shows_the_teacher_what_it_would_have_seen(tmp_path, teacher, uninterrupted, monkeypatch, workers):
    plan = small_plan(LARGE, f"distill.workers={workers}")
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 4)
        with pytest.raises(InterruptedRunError, match="step 4"):
            distilled(plan, tmp_path / "student", teacher)
    assert distilled(plan, tmp_path / "student", teacher) == digest_file(uninterrupted / WEIGHTS)


def test_training_for_int8_is_taught_at_the_teachers_size_too(tmp_path, teacher, uninterrupted):
    retrained(small_plan(LARGE, "qat.epochs=1"), tmp_path / "int8", uninterrupted, teacher)
    (epoch,) = read_curve(tmp_path / "int8")
    assert epoch.diagnostics["teacher_top1"] == read_summary(teacher[1]).top1_validation
    assert read_summary(tmp_path / "int8").image_size == (16, 16)


def test_affinity_compares_each_at_its_own_size(teacher, uninterrupted):
    plan = small_plan(LARGE)
    alike = workshop(plan).affinity(plan.student, uninterrupted, teacher, plan.distill)
    small = workshop(plan).affinity(plan.student, uninterrupted, (small_plan().teacher, teacher[1]), plan.distill)
    assert 0 < alike <= 1
    assert alike != small


# --- what is said


VIT = {"model": "timm:vit_tiny_patch16_224", "arguments": {"patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 1}}


def test_a_network_made_for_one_size_is_made_for_its_own(tmp_path):
    made = workshop(small_plan())
    large = made.new(TeacherPlan(**VIT, image_size=(32, 32)))
    assert large.pos_embed.shape[1] == 17
    assert made.new(TeacherPlan(**VIT)).pos_embed.shape[1] == 5
    save_weights(large, tmp_path / "large.safetensors")
    trained = TeacherPlan(**VIT, checkpoint=tmp_path / "large.safetensors")
    with pytest.raises(ModelError, match="of another shape") as caught:
        made.new(trained)
    assert "image_size" in caught.value.action
    found = made.new(trained.model_copy(update={"image_size": (32, 32)}))
    assert torch.equal(found.pos_embed, large.pos_embed)


def test_a_size_that_a_network_does_not_take_is_told():
    with pytest.raises(ModelError, match=r"levit_128s does not take images of 100 x 100: .*") as caught:
        workshop(small_plan("data.channels=3")).new(ModelPlan(model="timm:levit_128s", image_size=(100, 100)))
    assert "image_size" in caught.value.action
    with pytest.raises(PlanError, match=r"teacher\.image_size"):
        small_plan("teacher.image_size=[32,32,32]")


def test_the_size_decides_what_a_teacher_teaches_and_plans_without_one_are_what_they_were(teacher):
    plan, folder = teacher
    without = plan.model_copy(update={"image_size": None})
    assert canonical(taught_inputs(plan, folder)) != canonical(taught_inputs(without, folder))
    assert "image_size" in plan.decisive()
    assert "image_size" not in without.decisive()
    assert "image_size" not in canonical(without)
    assert set(taught_inputs(without, folder)) == {"weights", "taps", "model", "arguments", "code"}


@pytest.mark.parametrize("other", [{"model": "timm:resnet18"}, {"arguments": {"act_layer": "silu"}}])
def test_a_teacher_of_the_same_tensors_is_another_one(tmp_path, other):
    """They may mean another activation, or another number of heads."""
    (tmp_path / WEIGHTS).write_bytes(b"weights")
    one = TeacherPlan(model="timm:resnet10t")
    told = [canonical(taught_inputs(plan, tmp_path)) for plan in (one, one.model_copy(update=other))]
    assert told[0] != told[1]
