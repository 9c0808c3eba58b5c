"""What test_parallel.py runs in several processes: importable, because they start from nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np
import timm
import torch
from test_loop import distilled, retrained, small_plan
from torch import nn

from fofa_deploy.data import load_data
from fofa_deploy.distill import checkpoint, engine, parallel
from fofa_deploy.distill.job import Workshop
from fofa_deploy.distill.loop import Trainer
from fofa_deploy.distill.losses import redundancy_loss
from fofa_deploy.distill.taps import tap
from fofa_deploy.progress import Quiet


def primitives(weight: list[list[float]]) -> dict[str, object]:
    """What each rank sees of values that differ between ranks; sizes differ, too."""
    parallel.join()
    rank = parallel.rank()
    maps = torch.arange(20.0).reshape(5, 2, 2, 1)[: 3 if rank == 0 else 2] + 100 * rank
    module = nn.Linear(2, 2)
    parallel.copy_from_first(module)
    loss, gradient = _redundancy(torch.tensor(weight))
    found = {
        "any": parallel.any_rank(False, rank == 1, True),
        "every": parallel.every(rank * 10),
        "first": parallel.from_first("zero" if rank == 0 else "one"),
        "share": parallel.share(np.arange(5)).tolist(),
        "var_mean": [part.tolist() for part in parallel.var_mean(maps, (0, 2, 3))],
        "extremes": [float(value) for value in parallel.extremes(maps)],
        "weight": module.weight.tolist(),
        "loss": loss.item(),
        "gradient": gradient.tolist(),
    }
    parallel.leave()
    return found


def _redundancy(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss and gradient of a correlation over the batch of both ranks, each of which has a part of it."""
    images = parallel.share(torch.randn(9, 4, generator=torch.Generator().manual_seed(3)))
    layer = nn.Linear(4, 4, bias=False)
    layer.weight.data = weight
    wrapped = nn.parallel.DistributedDataParallel(layer)
    loss = redundancy_loss(parallel.gathered(wrapped(images)), parallel.gathered(images), 0.05)
    (loss * parallel.size() * len(images) / 9).backward()
    return loss, layer.weight.grad


def train(folder: Path, teacher: Path, overrides: tuple[str, ...], fate: str = "", step: int = 0) -> str:
    """Distill on all ranks; ``fate`` befalls some of them after ``step``. Returns a digest of the weights on rank 0."""
    torch.set_num_threads(1)
    run = Trainer._train_step

    def stepped(self, *batch):
        run(self, *batch)
        if (self._step == step and fate == "killed") or (fate == "deserted" and self._step == step and parallel.rank() == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if fate == "terminated" and self._step == step and parallel.rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def saved(self):
        save(self)
        assert list((self._folder / "checkpoints").glob("step-*.pt")), "everybody waits until it is written"

    def slowly(*arguments):
        time.sleep(1.0)
        write(*arguments)

    Trainer._train_step = stepped
    save, write = Trainer._save, checkpoint.save
    if fate == "slow":
        Trainer._save, checkpoint.save = saved, slowly
    plan = small_plan(*overrides)
    if parallel.rank() == 0:
        with parallel.leading():
            return distilled(plan, folder, (plan.teacher, teacher))
    Workshop(load_data(plan.data, plan.seed), plan.seed, 1, Quiet()).follow()
    return ""


def shard(shared: bool) -> dict[str, object]:
    """A frozen network's weights in all, those that this process holds of them, and its answer to some images."""
    parallel.join()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=64, depth=4, num_heads=2, num_classes=5)
    tapped = tap(model.eval().requires_grad_(False), (3, 32, 32))
    weights = sum(parameter.numel() for parameter in model.parameters())
    if shared:
        engine.sharded(tapped)
    held = sum(getattr(parameter, "_local_tensor", parameter).numel() for parameter in model.parameters())
    with torch.no_grad():
        logits = tapped(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))).logits
    parallel.leave()
    return {"weights": weights, "held": held, "logits": logits.flatten().tolist()}


def retrain(folder: Path, student: Path, teacher: Path, overrides: tuple[str, ...]) -> None:
    """Quantization-aware training on all ranks."""
    torch.set_num_threads(1)
    plan = small_plan(*overrides)
    if parallel.rank() == 0:
        with parallel.leading():
            retrained(plan, folder, student, (plan.teacher, teacher))
    else:
        Workshop(load_data(plan.data, plan.seed), plan.seed, 1, Quiet()).follow()
