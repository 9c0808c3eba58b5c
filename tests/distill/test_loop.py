"""Training: a resumed run is the same run, and nothing that is not finite gets through."""

from __future__ import annotations

import importlib.util
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from torch import nn

from fofa_deploy.config import DataPlan, ModelPlan, load_plan
from fofa_deploy.data import load_data
from fofa_deploy.distill import average, checkpoint, loop
from fofa_deploy.distill.engine import _parts as parts_of
from fofa_deploy.distill.engine import check, compiled
from fofa_deploy.distill.fofa import FeatureBranch
from fofa_deploy.distill.interrupt import interruptible
from fofa_deploy.distill.job import WEIGHTS, Workshop, check_floor, read_curve, read_summary
from fofa_deploy.distill.loop import Trainer
from fofa_deploy.distill.objective import Objective
from fofa_deploy.distill.tapped import TappedModel
from fofa_deploy.distill.taps import tap
from fofa_deploy.errors import BackendError, DataError, IntegrityError, InterruptedRunError, TrainingError
from fofa_deploy.progress import Quiet
from fofa_deploy.results import ModelSummary
from fofa_deploy.types import digest_file

SMALL = (
    "data.limit=96",
    "data.image_size=16",
    "teacher.arguments={channels=[8,8,16,16],stem_width=4}",
    "teacher.fit={epochs=1,batch_size=32}",
    "teacher.floor_top1=0.0",
    "student.arguments={patch_size=4,embed_dim=16,depth=2,num_heads=2,drop_path_rate=0.1,proj_drop_rate=0.1}",
    "distill.epochs=2",
    "distill.batch_size=32",
    "distill.method='fofa+rsd'",
    "distill.fofa={stages=2,width=16,heads=2,prompted_stages=[2]}",
    "distill.checkpoint_seconds=0.001",
    "distill.ema=0.9",
)


def small_plan(*more: str):
    return load_plan("demo", [*SMALL, *more])


def workshop(plan) -> Workshop:
    return Workshop(load_data(plan.data, plan.seed), plan.seed, 1, Quiet())


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    plan, folder = small_plan(), tmp_path_factory.mktemp("teacher")
    workshop(plan).fit(plan.teacher, folder)
    return plan.teacher, folder


def distilled(plan, folder: Path, teacher) -> str:
    folder.mkdir(exist_ok=True)
    workshop(plan).distill(plan.student, plan.distill, folder, teacher)
    return digest_file(folder / WEIGHTS)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, teacher):
    folder = tmp_path_factory.mktemp("whole") / "student"
    distilled(small_plan(), folder, teacher)
    return folder


def test_a_run_leaves_weights_a_curve_and_the_teachers_diagnostics(uninterrupted):
    curve = read_curve(uninterrupted)
    assert [epoch.epoch for epoch in curve] == [1, 2]
    assert set(curve[0].losses) == {"ce", "kd", "fofa", "regularizer", "rsd"}
    assert set(curve[1].losses) == {"ce", "kd"}  # features teach in the first half
    assert set(curve[0].diagnostics) == {"teacher_top1", "prompted_top1", "drift_nats"}
    assert read_summary(uninterrupted).top1_validation == max(epoch.top1 for epoch in curve)


def _interrupt_after(monkeypatch, steps: int) -> None:
    """Send this process a Ctrl-C in the middle of an epoch."""
    from fofa_deploy.distill.loop import Trainer

    step = Trainer._train_step

    def counted(self, *batch):
        step(self, *batch)
        if self._step == steps:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", counted)


@pytest.mark.parametrize(("workers", "steps"), [(0, 2), (0, 4), (2, 4)], ids=["features", "predictions", "workers"])
def test_ctrl_c_checkpoints_and_the_resumed_run_is_bit_identical(tmp_path, teacher, uninterrupted, monkeypatch, workers, steps):
    plan = small_plan(f"distill.workers={workers}")
    with monkeypatch.context() as patch:
        _interrupt_after(patch, steps)
        with pytest.raises(InterruptedRunError, match=f"step {steps}"):
            distilled(plan, tmp_path / "student", teacher)
    assert distilled(plan, tmp_path / "student", teacher) == digest_file(uninterrupted / WEIGHTS)
    strip = [epoch.model_copy(update={"seconds": 0.0}) for epoch in read_curve(tmp_path / "student")]
    assert strip == [epoch.model_copy(update={"seconds": 0.0}) for epoch in read_curve(uninterrupted)]


@pytest.fixture
def ctrl_c():
    """It acts, also where the tests were started in the background of a shell, which has its jobs ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_sigterm_may_come_twice_and_a_second_ctrl_c_acts_at_once():
    """Batch systems tell every process, and launchers pass it on."""
    before = signal.getsignal(signal.SIGTERM)
    with interruptible() as interrupted:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert interrupted.is_set()
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigkill_in_mid_epoch_and_resume_is_bit_identical(tmp_path, teacher, uninterrupted):
    script = f"""
        import sys, torch
        sys.path.insert(0, {str(Path(__file__).parent)!r})
        from pathlib import Path
        from test_loop import distilled, small_plan
        torch.set_num_threads(1)
        distilled(small_plan(), Path({str(tmp_path / "student")!r}), (small_plan().teacher, Path({str(teacher[1])!r})))
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(script)])
    checkpoints = tmp_path / "student" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-*.pt")) and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.01)
    child.kill()
    child.wait()
    state, _ = checkpoint.load_newest(checkpoints)
    assert state is not None
    assert 0 < state["step"] < 6, "the kill came too late to show anything"
    assert distilled(small_plan(), tmp_path / "student", teacher) == digest_file(uninterrupted / WEIGHTS)


def retrained(plan, folder: Path, student: Path, teacher) -> str:
    folder.mkdir(exist_ok=True)
    workshop(plan).retrain(plan, folder, student, teacher)
    return digest_file(folder / WEIGHTS)


def test_quantization_aware_training_resumes_bit_identically(tmp_path, teacher, uninterrupted, monkeypatch):
    plan = small_plan("qat.epochs=2")
    whole = retrained(plan, tmp_path / "whole", uninterrupted, teacher)
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 4)
        with pytest.raises(InterruptedRunError, match="step 4"):
            retrained(plan, tmp_path / "cut", uninterrupted, teacher)
    state, _ = checkpoint.load_newest(tmp_path / "cut" / "checkpoints")
    ranges = {name: value for name, value in state["objective"].items() if name.endswith("input_range.seen")}
    assert ranges
    assert all(int(seen) == 4 for seen in ranges.values())
    assert retrained(plan, tmp_path / "cut", uninterrupted, teacher) == whole
    curve = read_curve(tmp_path / "whole")
    assert set(curve[0].losses) == {"ce", "kd"}
    # The summary is of the weights on their grids, the curve of activations on theirs, too: a few of 288 images.
    assert read_summary(tmp_path / "whole").top1_validation == pytest.approx(max(epoch.top1 for epoch in curve), abs=0.02)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(tmp_path, teacher, monkeypatch):
    forward = Objective.forward

    def poisoned(self, *batch):
        losses = forward(self, *batch)
        return losses._replace(total=losses.total * float("nan"))

    monkeypatch.setattr(Objective, "forward", poisoned)
    with pytest.raises(TrainingError, match="loss is not finite at step 0"):
        distilled(small_plan(), tmp_path / "student", teacher)
    assert not (tmp_path / "student" / WEIGHTS).exists()


def test_in_fp16_steps_are_skipped_but_not_for_ever(tmp_path, teacher, monkeypatch):
    """Its scaler skips a step whose gradient is not finite, and halves its scale; a gradient that never is ends the training."""
    init = Trainer.__init__

    def scaled(self, *arguments):
        init(self, *arguments)
        monkeypatch.setattr(Accelerator, "backward", lambda _, loss: loss.backward())  # which would scale it
        self._engine.scaler = SimpleNamespace(state_dict=dict)
        self._engine.clip_grad_norm_ = lambda *_: torch.tensor(next(norms))

    monkeypatch.setattr(Trainer, "__init__", scaled)
    monkeypatch.setattr(loop, "SKIPPED", 2)
    norms = iter([math.inf, math.inf, 1.0] * 2)
    distilled(small_plan(), tmp_path / "whole", teacher)
    norms = iter([1.0] + [math.inf] * 5)
    with pytest.raises(TrainingError, match="gradient is not finite at step 3"):
        distilled(small_plan(), tmp_path / "cut", teacher)


def test_the_generator_of_this_device_alone_is_kept_and_not_missed_without_it(monkeypatch):
    """Others may be out of sight when the training goes on."""
    told = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_rng_state", lambda: torch.tensor([7]))
        patch.setattr(torch.cuda, "set_rng_state", told.append)
        state = checkpoint.random_state()
        checkpoint.set_random_state(state)
    assert told == state["cuda"] == [torch.tensor([7])]
    checkpoint.set_random_state(state)


def test_the_teacher_is_looked_at_in_batches_that_training_has_held(tmp_path, teacher, monkeypatch):
    seen, look = [], Objective.diagnostics

    def counted(self, images, *rest):
        seen.append(len(images))
        return look(self, images, *rest)

    monkeypatch.setattr(Objective, "diagnostics", counted)
    distilled(small_plan("distill.accumulate=4"), tmp_path / "student", teacher)
    assert max(seen) == 8


@pytest.mark.parametrize("method", ["none", "kd", "rsd+dist"])
def test_a_student_that_declares_no_features_learns_where_none_are_compared(tmp_path, teacher, method):
    plan = small_plan(f"distill.method='{method}'")
    plan = plan.model_copy(update={"student": ModelPlan(model="test_loop:plain")})
    distilled(plan, tmp_path / "student", teacher)
    found = tmp_path / "retrained"
    if method == "kd":
        retrained(plan, found, tmp_path / "student", teacher)
        assert read_summary(found).top1_validation is not None
        assert workshop(plan).affinity(plan.student, tmp_path / "student", (plan.teacher, teacher), plan.distill) is None


def plain(num_classes: int, in_chans: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(in_chans, 4, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, num_classes))


def masked(num_classes: int, in_chans: int) -> nn.Module:
    model = plain(num_classes, in_chans)
    model.register_buffer("mask", torch.tensor([0.0, -math.inf]))
    return model


def test_a_mask_of_minus_infinity_is_no_accident(tmp_path, teacher):
    plan = small_plan("distill.method='kd'").model_copy(update={"student": ModelPlan(model="test_loop:masked")})
    distilled(plan, tmp_path / "student", teacher)
    assert workshop(plan).load(plan.student, tmp_path / "student").mask[1] == -math.inf


@pytest.mark.parametrize("found", [[0.0, math.nan], [math.inf, 0.0], [math.inf, -math.inf]])
def test_what_a_mask_turned_into_is_refused(tmp_path, found):
    made = {"mask": torch.tensor([0.0, -math.inf])}
    with pytest.raises(TrainingError, match=r"model\.mask has NaN"):
        checkpoint.save(tmp_path, 1, {"model": {"mask": torch.tensor(found)}}, made)


def test_a_student_that_drops_tokens_learns_where_none_are_compared(tmp_path, teacher):
    dropping = SMALL[5][:-1] + ",patch_drop_rate=0.25}"
    distilled(small_plan(dropping, "distill.method='dist'"), tmp_path / "student", teacher)
    assert len(read_curve(tmp_path / "student")) == 2


def test_a_checkpoint_never_holds_nan(tmp_path):
    state = {"model": {"weight": torch.tensor([1.0, float("nan")])}}
    with pytest.raises(TrainingError, match=r"model\.weight has NaN"):
        checkpoint.save(tmp_path, 1, state)
    assert not list(tmp_path.iterdir())


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, {"step": step})
    assert sorted(path.name for path in tmp_path.glob("*.pt")) == ["step-2.pt", "step-3.pt"]
    newest = tmp_path / "step-3.pt"
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")
    state, notices = checkpoint.load_newest(tmp_path)
    assert state == {"step": 2}
    assert len(notices) == 1
    assert "step-3.pt" in notices[0]
    (tmp_path / "step-2.pt").write_bytes(b"")
    with pytest.raises(IntegrityError, match="every checkpoint"):
        checkpoint.load_newest(tmp_path)


def test_what_was_just_saved_is_kept_whatever_lies_beyond_it(tmp_path):
    for step in (170, 180):
        (tmp_path / f"step-{step}.pt").write_bytes(b"damaged")
    checkpoint.save(tmp_path, 160, {"step": 160})
    checkpoint.save(tmp_path, 160, {"step": 160, "again": True})  # an epoch's end after a checkpoint that was due
    assert checkpoint.load_newest(tmp_path) == ({"step": 160, "again": True}, [])
    assert [path.name for path in tmp_path.iterdir()] == ["step-160.pt"]


def test_a_checkpoint_of_another_version_is_refused_by_name(tmp_path, teacher, monkeypatch):
    plan = small_plan()
    with monkeypatch.context() as patch:
        _interrupt_after(patch, 2)
        with pytest.raises(InterruptedRunError):
            distilled(plan, tmp_path / "student", teacher)
    checkpoints = tmp_path / "student" / "checkpoints"
    state, _ = checkpoint.load_newest(checkpoints)
    del state["objective"]["balance.norms"]
    checkpoint.save(checkpoints, state["step"], state)
    with pytest.raises(IntegrityError, match="another version") as told:
        distilled(plan, tmp_path / "student", teacher)
    assert str(tmp_path / "student") in str(told.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_went_bad_is_named_wherever_it_is_read(tmp_path, workers):
    for split, name, number in product(("train", "validation"), "ab", range(4)):
        file = tmp_path / "data" / split / name / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(file)
    plan = small_plan("distill.method='none'", f"distill.workers={workers}")
    data = load_data(DataPlan(name="folder", root=tmp_path / "data", image_size=8), 0)
    for file in (tmp_path / "data" / "train").rglob("*.png"):
        file.write_bytes(b"no image")
    shop = Workshop(data, 0, 1, Quiet())
    student = plan.student.model_copy(update={"model": "timm:test_resnet", "arguments": {}})
    with pytest.raises(DataError, match=r"train/[ab]/\d\.png"):
        shop.distill(student, plan.distill, tmp_path, None)


def test_a_teacher_below_its_floor_is_refused():
    plan = small_plan("teacher.floor_top1=0.99")
    weak = ModelSummary(model="weak", params=1, top1_validation=0.5)
    with pytest.raises(TrainingError, match=r"50\.00%, its floor 99\.00%"):
        check_floor(plan.teacher, weak, 10)
    check_floor(plan.teacher, weak.model_copy(update={"top1_validation": 0.99}), 10)
    with pytest.raises(TrainingError, match=r"0\.00%, its floor 30\.00%"):
        check_floor(plan.teacher.model_copy(update={"floor_top1": None}), weak.model_copy(update={"top1_validation": None}), 10)


def test_bf16_autocast_trains(tmp_path, teacher):
    plan = small_plan("distill.precision='bf16'", "distill.epochs=1", "distill.channels_last=true")
    seen = set()

    def look(_, inputs, output):
        seen.add(output.dtype)

    with torch.nn.modules.module.register_module_forward_hook(
        lambda module, inputs, output: look(module, inputs, output) if isinstance(module, torch.nn.Linear) else None
    ):
        distilled(plan, tmp_path / "student", teacher)
    assert torch.bfloat16 in seen
    (epoch,) = read_curve(tmp_path / "student")
    assert 0 < epoch.losses["ce"] < 5


def test_the_learning_rate_warms_up_and_falls_to_zero(tmp_path, teacher, monkeypatch):
    rates, step = [], Trainer._train_step

    def stepped(self, *batch):
        step(self, *batch)
        rates.append(self._optimizer.param_groups[0]["lr"])

    monkeypatch.setattr(Trainer, "_train_step", stepped)
    plan = ("data.limit=160", "distill.method='none'", "distill.epochs=4", "distill.warmup_epochs=1", "distill.lr=0.1")
    distilled(small_plan(*plan), tmp_path / "student", teacher)
    length = len(rates) // 4
    assert rates[:length] == pytest.approx([0.1 * (at + 1) / (length + 1) for at in range(length)])
    falling = [0.05 * (1 + math.cos(math.pi * at / (3 * length))) for at in range(3 * length)]
    assert rates[length:] == pytest.approx(falling)


def test_averaged_weights_follow_soon_and_then_slowly():
    model = torch.nn.Sequential(torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False), torch.nn.BatchNorm1d(1))
    model[1].weight = model[0].weight  # tied: one tensor, twice in the state
    twin, expected = average.twin(model), float(model[0].weight.detach())
    for step in range(200):
        with torch.no_grad():
            model[0].weight.fill_(step)
        model[2].num_batches_tracked.fill_(step)
        average.follow(twin, model, 0.9, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * step
    assert float(twin[0].weight) == pytest.approx(expected, rel=1e-5)
    assert float(twin[0].weight) == pytest.approx(199 - 0.9 / 0.1, abs=0.1), "by now that of a constant decay"
    assert int(twin[2].num_batches_tracked) == 199
    assert not twin[0].weight.requires_grad


def test_a_short_training_with_averaged_weights_is_worth_as_much(tmp_path, teacher):
    plan = ("data.limit=800", "distill.method='none'", "distill.epochs=6", "distill.checkpoint_seconds=60")
    for name, decay in (("plain", 0.0), ("averaged", 0.9998)):
        distilled(small_plan(*plan, f"distill.ema={decay}"), tmp_path / name, teacher)
    plain, averaged = (read_summary(tmp_path / name).top1 for name in ("plain", "averaged"))
    assert plain > 0.25
    assert averaged > 0.8 * plain


def test_terms_are_averaged_over_the_images_that_they_saw(tmp_path, teacher, monkeypatch):
    """Prompts on every second step: their losses are not those of half of what they saw."""
    seen, forward = [], FeatureBranch.forward
    monkeypatch.setattr(FeatureBranch, "forward", lambda self, lesson: seen.append(forward(self, lesson)) or seen[-1])
    fofa = "distill.fofa={stages=2,width=16,heads=2,prompt_every=2}"
    plan = ("data.limit=128", "distill.epochs=1", fofa, "distill.weights={supervision=1.0}")
    distilled(small_plan(*plan), tmp_path / "student", teacher)
    taught = [float(terms["supervision"].detach()) for terms in seen if "supervision" in terms]
    (epoch,) = read_curve(tmp_path / "student")
    assert 0 < len(taught) < len(seen)
    assert epoch.losses["supervision"] == pytest.approx(sum(taught) / len(taught), rel=1e-5)


GROUP = """
import sys, time
from pathlib import Path
from test_loop import distilled, small_plan
from fofa_deploy.distill.loop import Trainer
run = Trainer._train_step
def stepped(self, *batch):
    if self._step == 2:
        print("now", flush=True)
        time.sleep(1)
    run(self, *batch)
Trainer._train_step = stepped
plan = small_plan("distill.workers=2", "data.limit=800")
distilled(plan, Path(sys.argv[1]), (plan.teacher, Path(sys.argv[2])))
"""


def test_a_whole_group_that_is_told_to_stop_leaves_a_checkpoint(tmp_path, teacher):
    """As torchrun and batch systems stop: data loader workers get the signal, too, before the step has ended."""
    command = [sys.executable, "-c", GROUP, str(tmp_path / "student"), str(teacher[1])]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=Path(__file__).parent, start_new_session=True, **streams) as process:
        assert process.stdout.readline() == "now\n"
        os.killpg(process.pid, signal.SIGTERM)
        _, told = process.communicate(timeout=180)
    assert "InterruptedRunError: interrupted at step 3, checkpoint written" in told
    state, _ = checkpoint.load_newest(tmp_path / "student" / "checkpoints")
    assert state["step"] == 3


def test_trackers_get_the_curve(tmp_path, teacher):
    pytest.importorskip("tensorboard", reason="TensorBoard is not installed: pip install tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    distilled(small_plan("distill.method='kd'", "distill.trackers=['tensorboard']"), tmp_path / "student", teacher)
    events = EventAccumulator(str(tmp_path / "student" / "fofa-deploy")).Reload()
    curve = read_curve(tmp_path / "student")
    for name in ("loss", "top1"):
        told = [(event.step, event.value) for event in events.Scalars(f"epoch/{name}")]
        assert told == [(epoch.step, pytest.approx(getattr(epoch, name), rel=1e-6)) for epoch in curve]
    assert {"epoch/ce", "epoch/kd", "epoch/teacher_top1"} <= set(events.Tags()["scalars"])


@pytest.mark.parametrize("name", ["mlflow", "wandb"])
def test_a_tracker_that_is_not_installed_is_named_before_training(tmp_path, teacher, name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed here")
    with pytest.raises(BackendError, match=f"trackers are not installed: {name}"):
        distilled(small_plan(f"distill.trackers=['{name}']"), tmp_path / "student", teacher)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, which trains in fp16")
def test_fp16_is_refused_on_a_cpu(tmp_path, teacher):
    with pytest.raises(BackendError, match="fp16 needs a GPU"):
        distilled(small_plan("distill.precision='fp16'"), tmp_path / "student", teacher)


def compilable() -> TappedModel:
    torch.manual_seed(0)
    return TappedModel(
        torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 8), torch.nn.GELU(), torch.nn.Linear(8, 3)), (), ()
    )


def test_a_compiled_model_computes_what_it_did():
    plain, model, images = compilable(), compilable(), torch.randn(4, 3, 2, 2)
    compiled(model)
    outputs = [tapped(images).logits for tapped in (plain, model)]
    assert torch.allclose(*outputs, atol=1e-6)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    assert model.model.state_dict().keys() == plain.model.state_dict().keys()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here, for which no C++ compiler is needed")
def test_without_a_compiler_compilation_is_refused(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(BackendError, match=r"needs a C\+\+ compiler"):
        check(small_plan("distill.compile=true").distill)


def test_models_are_cut_where_no_feature_is_taken(teacher):
    """The parts hold every weight once, and no place where hooks sit lies inside one."""
    plan = small_plan()
    tapped = tap(workshop(plan).new(plan.student), (1, 16, 16), stages=2)
    names = {module: name for name, module in tapped.model.named_modules()}
    parts = [names[part] for part in parts_of(tapped)]
    assert {"blocks.0", "blocks.1"} <= set(parts)
    holders = {name: [part for part in parts if name.startswith(f"{part}.")] for name, _ in tapped.model.named_parameters()}
    assert {len(found) for found in holders.values()} <= {0, 1}
    assert {name for name, found in holders.items() if not found} == {"cls_token", "pos_embed"}, "the model's own"
    places = [stage.module for stage in (*tapped.stages, *filter(None, tapped.entries))] + list(tapped.heads)
    assert not [place for place in places for part in parts if place.startswith(f"{part}.")]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_interruption_after_an_epochs_last_step_does_not_wait_for_its_validation(tmp_path, teacher, monkeypatch, workers):
    whole = distilled(small_plan(), tmp_path / "whole", teacher)
    step, validate = Trainer._train_step, Trainer._validate

    def stepped(self, *batch):
        step(self, *batch)
        if self._offset == self._epoch_length:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "_train_step", stepped)
    monkeypatch.setattr(Trainer, "_validate", lambda *_: pytest.fail("validated"))
    with pytest.raises(InterruptedRunError, match="interrupted at step 3, checkpoint written"):
        distilled(small_plan(), tmp_path / "student", teacher)
    monkeypatch.setattr(Trainer, "_train_step", step)
    monkeypatch.setattr(Trainer, "_validate", validate)
    assert distilled(small_plan(f"distill.workers={workers}"), tmp_path / "student", teacher) == whole
