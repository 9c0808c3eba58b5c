"""Several processes on one batch: what they learn is what one learns, and they live and die together."""

from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import rank_targets
import torch
from safetensors.torch import load_file
from test_loop import distilled, one_thread, retrained, small_plan, teacher, workshop  # noqa: F401 - fixtures

from fofa_deploy import pipeline
from fofa_deploy.distill import checkpoint, parallel
from fofa_deploy.distill.job import WEIGHTS, read_curve, read_summary
from fofa_deploy.distill.losses import redundancy_loss
from fofa_deploy.errors import InterruptedRunError, PlanError, TrainingError

SECONDS = 180
CLOSE = 2e-5
"""Largest relative difference of a loss between one process and two: the order of additions in float32, over 6 steps."""
ROUNDING = 1e-6
"""In nats: a KL near zero is a difference of terms near one."""

# LayerNorm throughout the student, no dropout; 91 images make batches of 32, 32 and 27, which two processes share unequally.
EXACT = (
    "data.limit=91",
    "distill.method='kd'",
    "distill.balance='fixed'",
    "student.arguments={patch_size=4,embed_dim=16,depth=2,num_heads=2}",
)


def _run(target, arguments, rank: int, count: int, port: int, answers) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    try:
        answers.put((rank, target(*arguments)))
    except (InterruptedRunError, TrainingError) as error:
        answers.put((rank, error))


@pytest.fixture(scope="session")
def forks():
    """Processes that start quickly: forked from one that has imported everything and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["accelerate", "fofa_deploy.pipeline", "timm", "torch.distributed.fsdp", "torch.nn.parallel"])
    return context


@pytest.fixture
def ranks(forks):
    """Call a function in two processes that train together; returns what each gave or raised, by rank, None for the dead."""

    def call(target, *arguments, count: int = 2):
        with closing(socket.create_server(("127.0.0.1", 0))) as found:
            port = found.getsockname()[1]
        answers = forks.Queue()
        crew = [forks.Process(target=_run, args=(target, arguments, rank, count, port, answers)) for rank in range(count)]
        for process in crew:
            process.start()
        deadline = time.monotonic() + SECONDS
        found = {}
        while len(found) < count and (any(p.is_alive() for p in crew) or not answers.empty()) and time.monotonic() < deadline:
            if not answers.empty():
                rank, answer = answers.get()
                found[rank] = answer
            time.sleep(0.02)
        for process in crew:
            process.join(timeout=max(0.0, deadline - time.monotonic()))
            assert process.exitcode is not None, "a process hangs"
        return [found.get(rank) for rank in range(count)]

    return call


# --- words and tensors


def test_processes_agree(ranks):
    images = torch.randn(9, 4, generator=torch.Generator().manual_seed(3))
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(4), requires_grad=True)
    loss = redundancy_loss(images @ weight.T, images, 0.05)
    loss.backward()
    zero, one = ranks(rank_targets.primitives, weight.tolist())
    assert (zero.pop("share"), one.pop("share")) == ([0, 1, 2], [3, 4])
    assert zero == one
    assert (zero["any"], zero["every"], zero["first"]) == ((False, True, True), [0, 10], "zero")
    assert zero["extremes"] == [0.0, 107.0]
    maps = torch.arange(20.0).reshape(5, 2, 2, 1)
    whole = torch.var_mean(torch.cat([maps[:3], maps[:2] + 100]), (0, 2, 3), correction=0)
    assert torch.allclose(torch.tensor(zero["var_mean"]), torch.stack(whole))
    # A correlation over gathered batches has the gradient of the whole batch.
    assert zero["loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert torch.allclose(torch.tensor(zero["gradient"]), weight.grad, rtol=1e-4, atol=1e-6)


def test_alone_everything_is_the_identity():
    tensor = torch.randn(3, 2, 4, 4)
    assert parallel.gathered(tensor) is tensor
    assert torch.equal(parallel.var_mean(tensor, (0, 2, 3))[0], torch.var_mean(tensor, dim=(0, 2, 3), correction=0)[0])
    assert parallel.any_rank(True, False) == (True, False)
    assert parallel.every("x") == ["x"]
    assert np.array_equal(parallel.share(np.arange(5)), np.arange(5))
    assert (parallel.rank(), parallel.size(), parallel.neighbours()) == (0, 1, 1)


# --- training


def curves_agree(one: Path, other: Path) -> None:
    pairs = list(zip(read_curve(one), read_curve(other), strict=True))
    assert [(a.step, a.top1) for a, _ in pairs] == [(b.step, b.top1) for _, b in pairs]
    for a, b in pairs:
        assert b.losses == pytest.approx(a.losses, rel=CLOSE, abs=ROUNDING)
    weights = [load_file(folder / WEIGHTS) for folder in (one, other)]
    for found in weights:
        for bias in (value for name, value in found.items() if name.endswith("qkv.bias")):
            # That of attention's keys has no gradient but that of rounding, of which Adam makes steps nevertheless.
            bias.chunk(3)[1].zero_()
    assert all(torch.allclose(value, weights[1][name], rtol=1e-3, atol=5e-5) for name, value in weights[0].items())


@pytest.fixture(scope="module")
def by_one(tmp_path_factory, teacher):  # noqa: F811
    folder = tmp_path_factory.mktemp("one") / "student"
    distilled(small_plan(*EXACT), folder, teacher)
    return folder


def test_two_processes_learn_what_one_learns(tmp_path, teacher, by_one, ranks):  # noqa: F811
    ranks(rank_targets.train, tmp_path / "student", teacher[1], EXACT)
    curves_agree(by_one, tmp_path / "student")


def test_they_share_statistics_and_balance_too(tmp_path, teacher, ranks):  # noqa: F811
    # A head that starts at zero, as timm's do, has answers whose correlation is one of rounding in the first steps.
    started = EXACT[-1][:-1] + ",weight_init='moco'}"
    method = "distill.method='fofa+rsd+dist'", "distill.balance='gradient'", "distill.fofa={stages=2,width=16,heads=2}"
    plan = (*EXACT, started, *method)
    distilled(small_plan(*plan), tmp_path / "one", teacher)
    ranks(rank_targets.train, tmp_path / "two", teacher[1], plan)
    curves_agree(tmp_path / "one", tmp_path / "two")


def test_passes_that_share_a_batch_learn_what_one_pass_learns(tmp_path, teacher, by_one):  # noqa: F811
    distilled(small_plan(*EXACT, "distill.accumulate=3"), tmp_path / "student", teacher)
    curves_agree(by_one, tmp_path / "student")


def test_a_teacher_of_another_size_is_shown_each_processs_and_each_passs_own_images(tmp_path, teacher, ranks):  # noqa: F811
    plan = (*EXACT, "teacher.image_size=32")
    large = small_plan(*plan).teacher, teacher[1]
    distilled(small_plan(*plan), tmp_path / "one", large)
    distilled(small_plan(*plan, "distill.accumulate=3"), tmp_path / "parts", large)
    ranks(rank_targets.train, tmp_path / "two", teacher[1], plan)
    for other in ("parts", "two"):
        curves_agree(tmp_path / "one", tmp_path / other)


def test_two_processes_train_for_int8_as_one_does(tmp_path, teacher, by_one, ranks):  # noqa: F811
    # Rounding makes integers of small differences: the weights hardly move here.
    plan = (*EXACT, "qat.epochs=1", "qat.lr=1e-6")
    retrained(small_plan(*plan), tmp_path / "one", by_one, (small_plan().teacher, teacher[1]))
    ranks(rank_targets.retrain, tmp_path / "two", by_one, teacher[1], plan)
    (one,), (two,) = (read_curve(tmp_path / name) for name in ("one", "two"))
    assert two.losses == pytest.approx(one.losses, rel=1e-3)


def test_a_batch_that_is_too_small_to_share_is_refused(tmp_path, teacher):  # noqa: F811
    with pytest.raises(PlanError, match=r"distill.*: 32 images cannot be shared by 20 passes, each of two or more"):
        distilled(small_plan("distill.accumulate=20"), tmp_path / "student", teacher)


def test_killed_or_terminated_together_they_resume_bit_identically(tmp_path, teacher, ranks):  # noqa: F811
    """With everything random that a student may do; the teacher is sharded, and two of the runs have data loader processes."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    plan = ("distill.shard_teacher=true", "distill.channels_last=true", "distill.accumulate=2")
    uninterrupted, _ = ranks(rank_targets.train, whole, teacher[1], plan)

    loading = (*plan, "distill.workers=2")
    assert ranks(rank_targets.train, killed, teacher[1], loading, "killed", 2) == [None, None]
    state, _ = checkpoint.load_newest(killed / "checkpoints")
    assert state["step"] in (1, 2)

    # SIGTERM to rank 1 alone, in mid-epoch again: both stop after the same step, with a checkpoint.
    errors = ranks(rank_targets.train, killed, teacher[1], plan, "terminated", 5)
    assert [type(error) for error in errors] == [InterruptedRunError] * 2
    assert {error.message for error in errors} == {"interrupted at step 5, checkpoint written"}

    assert ranks(rank_targets.train, killed, teacher[1], loading)[0] == uninterrupted
    strip = [[epoch.model_copy(update={"seconds": 0.0}) for epoch in read_curve(folder)] for folder in (whole, killed)]
    assert strip[0] == strip[1]


def test_a_sharded_teacher_is_shared_out_and_answers_as_a_whole_one(ranks):
    one, other = ranks(rank_targets.shard, True)
    whole, _ = ranks(rank_targets.shard, False)
    for found in (one, other):
        assert found["held"] < 0.6 * found["weights"], "each process holds about a half"
        assert found["logits"] == pytest.approx(whole["logits"], rel=1e-6)
    assert whole["held"] == whole["weights"] == one["weights"]


def test_nobody_goes_on_before_a_checkpoint_is_written(tmp_path, teacher, ranks):  # noqa: F811
    one, other = ranks(rank_targets.train, tmp_path / "student", teacher[1], ("distill.epochs=1",), "slow")
    assert (bool(one), other) == (True, "")


def test_a_process_that_dies_fails_the_others_soon(tmp_path, teacher, ranks):  # noqa: F811
    left, dead = ranks(rank_targets.train, tmp_path / "student", teacher[1], (), "deserted", 2)
    assert dead is None
    assert isinstance(left, TrainingError)
    assert "another process of this training" in left.message


# --- as users start it


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    # One process: several on CPUs are more than it starts.
    "accelerate launch": ["accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_distill(launcher, tmp_path):
    """The whole verb: rank 0 alone keeps the run directory, others help with both trainings."""
    sets = ["data.limit=64", "data.image_size=16", "teacher.arguments={channels=[8,8,16,16],stem_width=4}"]
    sets += ["teacher.fit={epochs=1,batch_size=32}", "teacher.floor_top1=0.0", "distill.epochs=1"]
    sets += ["student.arguments={patch_size=4,embed_dim=16,depth=2,num_heads=2}", "distill.method='kd'"]
    shown = [part for value in sets for part in ("--set", value)]
    command = [
        sys.executable,
        "-m",
        *LAUNCHERS[launcher],
        "-m",
        "fofa_deploy",
        "distill",
        "demo",
        "--out",
        str(tmp_path / "run"),
        *shown,
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=SECONDS, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("parameters, test top-1") == 1
    assert [epoch.step for epoch in read_curve(tmp_path / "run" / "student")] == [2]
    assert read_summary(tmp_path / "run" / "teacher").top1 is not None
    assert not list((tmp_path / "run" / ".scratch").iterdir())


def test_a_follower_joins_before_it_reads_the_data(monkeypatch):
    """Rank 0 waits ten minutes to be met, and days for what comes after."""
    done = []

    def read(*_):
        done.append("read")
        raise KeyboardInterrupt

    monkeypatch.setattr(parallel, "rank", lambda: 1)
    monkeypatch.setattr(parallel, "join", lambda: done.append("joined"))
    monkeypatch.setattr(pipeline, "load_data", read)
    with pytest.raises(KeyboardInterrupt):
        pipeline.follow(small_plan())
    assert done == ["joined", "read"]
