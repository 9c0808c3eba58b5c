"""Batches that other processes make: the same ones, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_loop import distilled, small_plan, teacher  # noqa: F401 - a fixture

from fofa_deploy.config import DataPlan
from fofa_deploy.data import eval_batches, load_data
from fofa_deploy.distill.batches import Batches, evaluated
from fofa_deploy.errors import DataError, TrainingError

SECONDS = 20
"""Within which a process is gone that nobody needs."""


def folder(root: Path, spoilt: bool) -> DataPlan:
    for split, (number, name) in ((split, pair) for split in ("train", "validation") for pair in enumerate("ab")):
        (root / split / name).mkdir(parents=True)
        for image in range(5):
            Image.new("L", (16, 16), 40 * number + image).save(root / split / name / f"{image}.png")
    if spoilt:
        (root / "validation" / "b" / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    return DataPlan(name="folder", root=str(root), image_size=16, channels=1, mean=(0.5,), std=(0.5,))


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_sees_the_same_images_whoever_reads_them(tmp_path, workers):
    split = load_data(folder(tmp_path, spoilt=False), 0).test
    expected, found = list(eval_batches(split, 4)), list(evaluated(split, 4, workers, seed=0))
    assert len(found) == len(expected) == 3
    for one, other in zip(expected, found, strict=True):
        assert all(np.array_equal(*pair) for pair in zip(one, other, strict=True))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_read_is_named_whoever_reads_it(tmp_path, workers):
    split = load_data(folder(tmp_path, spoilt=True), 0).test
    with pytest.raises(DataError, match=r"3\.png"):
        list(evaluated(split, 4, workers, seed=0))


def test_workers_go_when_the_process_that_trains_is_killed(tmp_path):
    """Also those with a batch in hand that is larger than a pipe holds: they wait for somebody to take it."""
    script = """
        import multiprocessing, os, signal
        import numpy as np
        from fofa_deploy.distill.batches import _Batches, read

        class Large(_Batches):
            def __len__(self):
                return 100

            def _made(self, number):
                return np.zeros(2**20, np.uint8)

        batches = read(Large(), 2, seed=0)
        next(batches)
        print(*(child.pid for child in multiprocessing.active_children()), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    told = tmp_path / "pids"
    with told.open("w") as file:  # a pipe would be held by the workers, too
        subprocess.run([sys.executable, "-c", textwrap.dedent(script)], stdout=file, timeout=120, check=False)
    pids = [int(pid) for pid in told.read_text().split()]
    assert len(pids) == 2, "the workers were there"
    deadline = time.monotonic() + SECONDS
    while any(map(_runs, pids)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(_runs, pids))


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_worker_that_is_killed_is_an_error_with_an_action(tmp_path, teacher, monkeypatch):  # noqa: F811
    trainer = os.getpid()

    def starved(self, number):
        assert os.getpid() != trainer
        os.kill(os.getpid(), signal.SIGKILL)

    monkeypatch.setattr(Batches, "_made", starved)
    with pytest.raises(TrainingError, match=r"distill.*a data loader process was killed") as caught:
        distilled(small_plan("distill.workers=1"), tmp_path / "student", teacher)
    assert "workers" in caught.value.action


def test_what_a_worker_raises_is_told_as_it_is(tmp_path, teacher, monkeypatch):  # noqa: F811
    def wrong(self, number):
        raise RuntimeError("no such augmentation")

    monkeypatch.setattr(Batches, "_made", wrong)
    with pytest.raises(RuntimeError, match="no such augmentation"):
        distilled(small_plan("distill.workers=1"), tmp_path / "student", teacher)
