"""What a training step costs beside a step of plain KD: all forms interleaved in one run, memory in processes of their own.

python benchmarks/distill-cost/run.py                 # both pairs at 224 px, batch 8; writes results.json and README.md
python benchmarks/distill-cost/run.py --quick         # 64 px, two rounds: printed, not recorded

Random weights: time and memory do not depend on what a model knows.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import click
import timm
import torch

from fofa_deploy.config import DistillPlan
from fofa_deploy.distill.balance import INTERVAL
from fofa_deploy.distill.objective import Objective
from fofa_deploy.distill.taps import tap
from fofa_deploy.environment import describe
from fofa_deploy.measure import peak_rss_bytes
from fofa_deploy.progress import Terminal

HERE = Path(__file__).parent
PAIRS = {
    "Swin-T -> ResNet18": ("swin_tiny_patch4_window7_224", "resnet18"),
    "ConvNeXt-T -> DeiT-T": ("convnext_tiny", "deit_tiny_patch16_224"),
}
BATCH, CLASSES = 8, 100
ALL = {"prompted_stages": [1, 2, 3, 4]}


@dataclass(frozen=True, eq=False)
class Form:
    """A way to train a step; ``goal`` is the largest factor of KD's time."""

    name: str
    plan: dict[str, Any]
    goal: float | None = None

    @property
    def every(self) -> int:
        """Steps after which all kinds of step have been."""
        return self.plan.get("fofa", {}).get("prompt_every", 1)

    @property
    def balanced(self) -> bool:
        return self.plan["method"] != "none" and self.plan.get("balance") != "fixed"


def _prompted(name: str, goal: float | None = None, **fofa: Any) -> Form:  # noqa: ANN401 - fields of a plan
    return Form(name, {"method": "fofa", "balance": "fixed", "fofa": {**ALL, **fofa}}, goal)


FORMS = (
    Form("alone", {"method": "none"}),
    Form("KD", {"method": "kd", "balance": "fixed"}),
    Form("OFA", {"method": "ofa", "balance": "fixed"}),
    Form("RSD", {"method": "rsd", "balance": "fixed"}),
    Form("FOFA + RSD (default)", {"method": "fofa+rsd"}, 1.35),
    Form("FOFA + RSD, fixed weights", {"method": "fofa+rsd", "balance": "fixed"}),
    _prompted("prompts in every stage", 2.5),
    _prompted("prompts in every stage, dense 5x5 fusion (as published)", fusion="dense"),
    _prompted("prompts without feedback", feedback=False),
    _prompted("prompts from stage 2", prompted_stages=[2, 3, 4]),
    _prompted("prompts from stage 3", prompted_stages=[3, 4]),
    _prompted("prompt in stage 4", prompted_stages=[4]),
    _prompted("prompts on every 2nd step", prompt_every=2),
    _prompted("prompts on every 4th step", prompt_every=4),
    _prompted("prompts on half of the batch", prompt_share=0.5),
    _prompted("prompts on a quarter of the batch", prompt_share=0.25),
    _prompted("prompts beside the teacher", path="side"),
)
REFERENCE = "KD"


class Stepper:
    """One form with its own student and optimizer, one step at a time."""

    def __init__(self, pair: str, form: Form, side: int) -> None:
        teacher_name, student_name = PAIRS[pair]
        torch.manual_seed(0)
        plan = DistillPlan.model_validate(form.plan)
        student = tap(_model(student_name, side), (3, side, side))
        teacher = None if plan.method == "none" else tap(_model(teacher_name, side), (3, side, side))
        self._objective = Objective(student, teacher, plan).train()
        self._optimizer = torch.optim.AdamW(self._objective.parameter_groups(1e-4, 0.05))
        self._batch = torch.randn(BATCH, 3, side, side), torch.arange(BATCH) % CLASSES

    def step(self, measuring: bool = False) -> float:
        """Seconds; ``measuring`` makes it one of those on which the balance of terms is measured."""
        if self._objective.balance is not None:
            self._objective.balance.steps.fill_(0 if measuring else 1)
        started = time.perf_counter()
        losses = self._objective(*self._batch)
        self._optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self._objective.parameters() if p.requires_grad], 5.0)
        self._optimizer.step()
        return time.perf_counter() - started


def _model(name: str, side: int) -> torch.nn.Module:
    sized = {"img_size": side} if "swin" in name or "deit" in name else {}
    return timm.create_model(name, num_classes=CLASSES, **sized)


@dataclass(frozen=True)
class Timings:
    """Seconds of each ordinary step, and of each step that measures the balance of terms."""

    steps: list[float]
    measuring: list[float]

    def typical(self, form: Form) -> float:
        """Median step; the mean of the medians where there are several kinds, in the share that each has of all steps."""
        ordinary = mean(median(self.steps[start :: form.every]) for start in range(form.every))
        return ordinary + (median(self.measuring) - ordinary) / INTERVAL if self.measuring else ordinary


def time_pair(pair: str, side: int, rounds: int, progress: Terminal) -> dict[str, Timings]:
    """Every form's steps; each round visits all forms in an order of its own."""
    steppers = {form: Stepper(pair, form, side) for form in FORMS}
    timings = {form: Timings([], []) for form in FORMS}
    for stepper in steppers.values():
        stepper.step(measuring=True)  # memory, lazy parts
        stepper.step()
    rng, order = random.Random(0), list(FORMS)
    with progress.task(pair, rounds) as task:
        for _ in range(rounds):
            rng.shuffle(order)
            for form in order:
                timings[form].steps.append(steppers[form].step())
                if form.balanced:
                    timings[form].measuring.append(steppers[form].step(measuring=True))
            task.advance()
    return {form.name: timing for form, timing in timings.items()}


def _memory(pair: str, form: Form, side: int) -> int:
    """Bytes at the peak of two steps, in a fresh process, above what the process holds before."""
    command = [sys.executable, __file__, "--memory-of", form.name, "--pair", pair, "--side", str(side)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
    return int(found.stdout)


def _print_memory(pair: str, name: str, side: int) -> None:
    form = next(form for form in FORMS if form.name == name)
    before = peak_rss_bytes()
    stepper = Stepper(pair, form, side)
    for _ in range(2):
        stepper.step()
    click.echo(peak_rss_bytes() - before)


@click.command()
@click.option("--quick", is_flag=True, help="64 px, two rounds: printed, not recorded.")
@click.option("--rounds", default=12, show_default=True)
@click.option("--side", default=224, show_default=True, help="Pixels.")
@click.option("--threads", default=2, show_default=True)
@click.option("--pair", type=click.Choice(list(PAIRS)), help="Only this pair.")
@click.option("--memory-of", hidden=True)
def main(quick: bool, rounds: int, side: int, threads: int, pair: str | None, memory_of: str | None) -> None:
    """Time and weigh every form."""
    torch.set_num_threads(threads)
    if memory_of:
        _print_memory(pair or next(iter(PAIRS)), memory_of, side)
        return
    side, rounds = (64, 4) if quick else (side, rounds)
    tables = {}
    for name in [pair] if pair else PAIRS:
        timings = time_pair(name, side, rounds, Terminal())
        tables[name] = {
            form.name: {
                "seconds": timings[form.name].typical(form),
                "bytes": _memory(name, form, side),
                "steps": timings[form.name].steps,
                "measuring_steps": timings[form.name].measuring,
            }
            for form in FORMS
        }
    result = {
        "side": side, "batch": BATCH, "threads": threads, "rounds": rounds,
        "environment": describe().model_dump(mode="json"), "pairs": tables,
    }  # fmt: skip
    if quick or pair:
        click.echo(page(result))
        return
    (HERE / "results.json").write_text(json.dumps(result, indent=1, allow_nan=False) + "\n")
    (HERE / "README.md").write_text(page(result))


def page(result: dict) -> str:
    """The table and what became of the goals, as Markdown."""
    cpu = result["environment"]["cpu"]
    lines = [
        "# What a step costs",
        "",
        f"Written by `python benchmarks/distill-cost/run.py`. {result['side']} px, batch {result['batch']}, fp32, "
        f"{result['threads']} threads, {cpu}; median of {result['rounds']} interleaved rounds. Only the factors mean anything.",
        "",
    ]
    for pair, rows in result["pairs"].items():
        reference = rows[REFERENCE]
        lines += [f"## {pair}", "", "| form | s / step | factor of KD | peak memory, factor of KD |", "|---|---|---|---|"]
        for name, row in rows.items():
            time_factor, memory_factor = _factors(row, reference)
            lines.append(f"| {name} | {row['seconds']:.3f} | {time_factor:.2f} | {memory_factor:.2f} |")
        lines += ["", *(_goal(form, rows, reference) for form in FORMS if form.goal), ""]
    return "\n".join(lines)


def _goal(form: Form, rows: dict, reference: dict) -> str:
    factor, memory = _factors(rows[form.name], reference)
    told = f"- {form.name}: time at most {form.goal:.2f} of KD: {factor:.2f} ({_met(factor, form.goal)})"
    return told + (f"; memory at most 1.50: {memory:.2f} ({_met(memory, 1.5)})" if "default" in form.name else "")


def _factors(row: dict, reference: dict) -> tuple[float, float]:
    return row["seconds"] / reference["seconds"], row["bytes"] / reference["bytes"]


def _met(found: float, goal: float | None) -> str:
    return "met" if goal is not None and found <= goal else "**missed**"


if __name__ == "__main__":
    main()
