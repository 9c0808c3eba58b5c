"""What does a step of distillation cost, and does the cost model of docs/scaling.md tell it beforehand?

    python benchmarks/scaling/run.py

measures step time (CPU time of one thread: other work on the machine does not count) and peak memory of a few pairs, compares
them with the model's prediction, and writes results.json and README.md beside this file. The model:

    seconds = operations per image x images / rate
    bytes   = 16 per trained parameter + 4 per teacher parameter + activations per image x images

Operations and activations per image are counted by PyTorch on two images; the rate is that of the first measurement alone.
"""

from __future__ import annotations

import copy
import io
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from fofa_deploy.config import DataPlan, DistillPlan, ModelPlan
from fofa_deploy.data.decode import to_pixels
from fofa_deploy.distill.balance import GradientBalance
from fofa_deploy.distill.heads import SETTLED, Standardizer
from fofa_deploy.distill.objective import Objective
from fofa_deploy.distill.taps import tap
from fofa_deploy.environment import describe
from fofa_deploy.models import build_model

HERE = Path(__file__).parent
SIDE, CLASSES, STEPS, COUNTED = 64, 100, 3, 2
PAIRS = [  # teacher, student, method, batches; the first batch of the first pair sets the rate
    ("timm:resnet50", "timm:resnet18", "kd", (16, 32)),
    ("timm:resnet50", "timm:resnet18", "fofa", (8, 16)),
    ("timm:convnext_tiny", "timm:mobilenetv3_small_100", "kd", (16,)),
]
IMAGENET, IMAGENET_SIDE, IMAGENET_CLASSES = 1_281_167, 224, 1000
IMAGENET_PAIRS = [
    ("timm:resnet50", "timm:resnet18", "kd"),
    ("timm:resnet50", "timm:resnet18", "fofa"),
    ("timm:convnext_small", "timm:mobilenetv3_large_100", "kd"),
]
GPU = {"name": "A100 80 GB", "peak": 312e12, "share": 0.30, "network": 25e9}
"""Assumed, not measured: bf16 operations per second, the share of them that training reaches, bytes per second between GPUs."""


def objective(teacher: str, student: str, method: str, side: int, classes: int) -> Objective:
    torch.manual_seed(0)
    shape = (3, side, side)
    models = [build_model(ModelPlan(model=name), classes, 3, (side, side)) for name in (student, teacher)]
    return Objective(tap(models[0], shape), tap(models[1], shape), DistillPlan(method=method)).train()


def batch(count: int, side: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 3, side, side, generator=generator), torch.arange(count) % classes


def parameters(found: Objective) -> tuple[int, int]:
    """Trained ones (student, prompts, attention), and the teacher's."""
    return sum(p.numel() for p in found.parameters()), sum(p.numel() for p in found.teacher.parameters())


def _ordinary(found: Objective, side: int, classes: int) -> Objective:
    """A copy at an ordinary step: no measurement of the balance, statistics of the teacher settled, what its passes share known."""
    found = copy.deepcopy(found)
    found(*batch(COUNTED, side, classes))
    for module in found.modules():
        if isinstance(module, GradientBalance):
            module.steps.fill_(1)
        elif isinstance(module, Standardizer):
            module.batches.fill_(SETTLED)
    return found


def counted(found: Objective, side: int, classes: int) -> tuple[float, float]:
    """Operations of a step, and bytes kept for its backward pass, per image."""
    found = _ordinary(found, side, classes)
    known = {p.untyped_storage()._cdata for m in (found, found.teacher) for p in m.parameters()}
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    formulas = {torch.ops.aten.convolution_backward: _convolution_backward}
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            losses = found(*batch(COUNTED, side, classes))
        losses.total.backward()
    return counter.get_total_flops() / COUNTED, sum(kept.values()) / COUNTED


def _convolution_backward(
    gradient: torch.Size, inputs: torch.Size, weight: torch.Size, *others: object, out_shape: object = None
) -> int:
    """As many operations as forward for each gradient that is asked for. PyTorch's own formula takes depthwise ones for dense."""
    transposed, wanted = others[4], others[-1]
    cells = math.prod((inputs if transposed else gradient)[2:])
    return 2 * gradient[0] * cells * math.prod(weight) * sum(wanted[:2])


def peak() -> int:
    """Largest resident memory of this process since the last `reset`."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def reset() -> int:
    Path("/proc/self/clear_refs").write_text("5")
    return psutil.Process().memory_info().rss


def measured(pair: int) -> list[dict[str, object]]:
    """Steps of one pair, in a process of its own: batches grow, so that none profits from memory of the one before."""
    torch.set_num_threads(1)
    teacher, student, method, batches = PAIRS[pair]
    before = reset()
    found = objective(teacher, student, method, SIDE, CLASSES)
    optimizer = torch.optim.AdamW(found.parameter_groups(1e-4, 0.05), fused=True)
    operations, activations = counted(found, SIDE, CLASSES)
    trained, frozen = parameters(found)
    rows = []
    for count in batches:
        images, labels = batch(count, SIDE, CLASSES)
        reset()
        took = []
        for _ in range(STEPS):
            started = time.process_time()
            optimizer.zero_grad(set_to_none=True)
            found(images, labels).total.backward()
            optimizer.step()
            took.append(time.process_time() - started)
        rows.append(
            {"teacher": teacher, "student": student, "method": method, "batch": count}
            | {"operations_per_image": operations, "activations_per_image": activations}
            | {"trained_parameters": trained, "teacher_parameters": frozen}
            | {"seconds": statistics.median(took), "bytes": peak() - before}
        )
    return rows


def predicted(row: dict[str, float], rate: float) -> dict[str, float]:
    memory = 16 * row["trained_parameters"] + 4 * row["teacher_parameters"] + row["activations_per_image"] * row["batch"]
    return {"predicted_seconds": row["operations_per_image"] * row["batch"] / rate, "predicted_bytes": memory}


def decoding() -> float:
    """JPEGs of ImageNet's usual size that one core decodes, crops and resizes per second; noise, the dearest of pictures."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (375, 500, 3), np.uint8)).save(stream, "jpeg", quality=90)
    plan = DataPlan(name="digits")
    started = time.process_time()
    for _ in range(50):
        to_pixels(Image.open(stream), plan, (0.1, 0.1, 0.8, 0.8))
    return 50 / (time.process_time() - started)


def imagenet(teacher: str, student: str, method: str) -> dict[str, object]:
    """Per-GPU throughput and memory at 224 px by the model, with the assumptions in `GPU`; activations halve in bf16."""
    found = objective(teacher, student, method, IMAGENET_SIDE, IMAGENET_CLASSES)
    operations, activations = counted(found, IMAGENET_SIDE, IMAGENET_CLASSES)
    trained, frozen = parameters(found)
    speed, count = GPU["peak"] * GPU["share"] / operations, 256
    row = {"teacher": teacher, "student": student, "method": method, "gigaflop_per_image": operations / 1e9}
    row["gpu_gigabytes"] = (16 * trained + 4 * frozen + activations / 2 * count) / 1e9
    for gpus in (1, 8, 64):
        step = count / speed + (8 * trained * (gpus - 1) / gpus / GPU["network"])
        row[f"images_per_second_{gpus}"] = gpus * count / step
        row[f"epoch_minutes_{gpus}"] = IMAGENET / (gpus * count / step) / 60
    return row


def table(columns: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def page(results: dict) -> str:
    def shown(row: dict) -> list[str]:
        pair = [row["teacher"].removeprefix("timm:"), row["student"].removeprefix("timm:"), row["method"], str(row["batch"])]
        times = f"{row['seconds']:.2f}", f"{row['predicted_seconds']:.2f}", f"{row['predicted_seconds'] / row['seconds']:.2f}"
        sizes = f"{row['bytes'] / 1e6:.0f}", f"{row['predicted_bytes'] / 1e6:.0f}", f"{row['predicted_bytes'] / row['bytes']:.2f}"
        return [*pair, *times, *sizes]

    def told(row: dict) -> list[str]:
        pair = [row["teacher"].removeprefix("timm:"), row["student"].removeprefix("timm:"), row["method"]]
        speeds = [f"{row[f'images_per_second_{n}']:,.0f} ({row[f'epoch_minutes_{n}']:.1f} min)" for n in (1, 8, 64)]
        return [*pair, f"{row['gigaflop_per_image']:.1f}", f"{row['gpu_gigabytes']:.0f}", *speeds]

    machine = results["environment"]
    columns = ["teacher", "student", "method", "batch", "CPU s / step", "predicted", "ratio", "MB", "predicted", "ratio"]
    foreseen = ["teacher", "student", "method", "GFLOP / image", "GB / GPU", *(f"images/s (epoch), {n} GPUs" for n in (1, 8, 64))]
    return f"""# Cost of a step, measured and predicted

Written by `python benchmarks/scaling/run.py`; nothing here is typed by hand.

{machine["cpu"]}, 1 thread, torch {machine["versions"]["torch"]}, {SIDE} px, fp32.
Load average while measuring: {results["load"]:.1f} on {machine["cores"]} cores.
Calibrated rate: {results["rate"] / 1e9:.1f} GFLOP/s, from the first row alone.
One core decodes {results["decoded_per_second"]:.0f} images of 500 x 375 pixels (noise) per second.

{table(columns, [shown(row) for row in results["measured"]])}

## ImageNet-1k by the model: not measured

{IMAGENET:,} images, 224 px, bf16, 256 images per GPU, on {GPU["name"]}, **assuming** {GPU["share"]:.0%} of {GPU["peak"] / 1e12:.0f}
TFLOP/s and {GPU["network"] / 1e9:.0f} GB/s between GPUs, and that the images arrive in time.

{table(foreseen, [told(row) for row in results["imagenet"]])}
"""


def main() -> None:
    rows = []
    for pair in range(len(PAIRS)):
        child = subprocess.run([sys.executable, __file__, str(pair)], capture_output=True, text=True, check=True)
        rows += json.loads(child.stdout)
    rate = rows[0]["operations_per_image"] * rows[0]["batch"] / rows[0]["seconds"]
    results = {
        "environment": describe().model_dump(mode="json"),
        "rate": rate,
        "load": os.getloadavg()[1],
        "decoded_per_second": decoding(),
        "measured": [{**row, **predicted(row, rate)} for row in rows],
        "imagenet": [imagenet(*pair) for pair in IMAGENET_PAIRS],
    }
    (HERE / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    (HERE / "README.md").write_text(page(results))
    print(page(results))


if __name__ == "__main__":
    if sys.argv[1:]:
        print(json.dumps(measured(int(sys.argv[1]))))
    else:
        main()
