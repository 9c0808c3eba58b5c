"""What a training step costs beside a step of plain KD: all forms interleaved in one run, memory in processes of their own.

python benchmarks/distill-cost/run.py                 # both pairs at 224 px, batch 8; writes results.json and README.md
python benchmarks/distill-cost/run.py --quick         # 64 px, few rounds: printed, not recorded

Every round is recorded as it ends: interrupt at will, run again. --again forgets what is recorded.

Random weights: time and memory do not depend on what a model knows.
"""

from __future__ import annotations

import ast
import json
import random
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median, quantiles
from typing import Any

import click
import timm
import torch

from fofa_deploy.config import DistillPlan
from fofa_deploy.distill import objective
from fofa_deploy.distill.heads import SETTLED, Standardizer
from fofa_deploy.distill.objective import Objective
from fofa_deploy.distill.taps import tap
from fofa_deploy.environment import describe
from fofa_deploy.measure import peak_rss_bytes
from fofa_deploy.progress import Terminal
from fofa_deploy.store import digest, write_atomic

HERE = Path(__file__).parent
PAIRS = {
    "Swin-T -> ResNet18": ("swin_tiny_patch4_window7_224", "resnet18"),
    "ConvNeXt-T -> DeiT-T": ("convnext_tiny", "deit_tiny_patch16_224"),
}
BATCH, CLASSES = 8, 100
ALL = {"prompted_stages": [1, 2, 3, 4], "feedback": True}


@dataclass(frozen=True, eq=False)
class Form:
    """A way to train a step; ``goal`` is the largest factor of KD's time, ``progress`` the share of the epochs that is done."""

    name: str
    plan: dict[str, Any]
    goal: float | None = None
    progress: float = 0.0

    @property
    def every(self) -> int:
        """Steps after which all kinds of step have been."""
        return self.plan.get("fofa", {}).get("prompt_every", 1)

    @property
    def balanced(self) -> bool:
        return self.plan["method"] != "none" and self.plan.get("balance") != "fixed"


def _prompted(name: str, goal: float | None = None, **fofa: Any) -> Form:  # noqa: ANN401 - fields of a plan
    return Form(name, {"method": "fofa", "balance": "fixed", "fofa": {**ALL, **fofa}}, goal)


DEFAULT = Form("FOFA + RSD + DIST (default)", {"method": "fofa+rsd+dist"}, 1.35)
SECOND_HALF = replace(DEFAULT, name="FOFA + RSD + DIST (default), features done", goal=None, progress=1.0)
FORMS = (
    Form("alone", {"method": "none"}),
    Form("KD", {"method": "kd", "balance": "fixed"}),
    Form("OFA", {"method": "ofa", "balance": "fixed"}),
    Form("RSD", {"method": "rsd", "balance": "fixed"}),
    DEFAULT,
    SECOND_HALF,
    Form("FOFA + RSD + DIST, fixed weights", {"method": "fofa+rsd+dist", "balance": "fixed"}),
    Form("FOFA + RSD + DIST, prompt on half of the batch", {"method": "fofa+rsd+dist", "fofa": {"prompt_share": 0.5}}),
    Form("FOFA + RSD + DIST, no prompt", {"method": "fofa+rsd+dist", "fofa": {"prompted_stages": []}}),
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
FORMS_BY_NAME = {form.name: form for form in FORMS}
REFERENCE = "KD"
ACCURACY = HERE.parent / "distillation" / "results.jsonl"
SWITCHES = {DEFAULT.name: "default", "FOFA + RSD + DIST, no prompt": "no prompt", "prompt in stage 4": "prompt in the last stage"}
"""What the accuracy benchmark calls a form where it has another name there."""

PHASES = {"all": FORMS, "contested": tuple(form for form in FORMS if form.goal or form.name == REFERENCE)}
"""Rounds of all forms, then further ones of those whose factor a goal hangs on."""

DRAWS = 2000


class Stepper:
    """One form with its own student and optimizer, one step at a time."""

    def __init__(self, pair: str, form: Form, side: int) -> None:
        teacher_name, student_name = PAIRS[pair]
        torch.manual_seed(0)
        plan = DistillPlan.model_validate(form.plan)
        student = tap(_model(student_name, side), (3, side, side))
        teacher = None if plan.method == "none" else tap(_model(teacher_name, side), (3, side, side))
        self._objective = Objective(student, teacher, plan).train()
        self._objective.progress = form.progress
        for module in self._objective.modules():
            if isinstance(module, Standardizer):  # as on all but the first steps of a training
                module.batches.fill_(SETTLED)
        self._optimizer = torch.optim.AdamW(self._objective.parameter_groups(1e-4, 0.05), fused=True)
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

    def at(self, rounds: Sequence[int]) -> Timings:
        return Timings([self.steps[number] for number in rounds], [self.measuring[number] for number in rounds if self.measuring])

    def typical(self, form: Form) -> float:
        """Median step; the mean of the medians where there are several kinds, in the share that each has of all steps."""
        ordinary = mean(median(self.steps[start :: form.every] or self.steps) for start in range(form.every))
        every = DistillPlan.model_validate(form.plan).balance_every
        return ordinary + (median(self.measuring) - ordinary) / every if self.measuring else ordinary


def time_pair(
    pair: str, side: int, forms: Sequence[Form], rounds: int, done: dict[str, Timings], progress: Terminal, what: str
) -> Iterator[dict[str, Timings]]:
    """The forms' steps after each round, going on from ``done``; a round visits all of them in an order of its own."""
    timings = {form: done.get(form.name) or Timings([], []) for form in forms}
    before = len(timings[forms[0]].steps)
    if before >= rounds:
        return
    steppers = {form: Stepper(pair, form, side) for form in forms}
    for form, stepper in steppers.items():
        stepper.step(measuring=True)  # memory, lazy parts
        for _ in range(1 + before % form.every):  # kinds of step come in turns: go on where the last process stopped
            stepper.step()
    with progress.task(f"{pair}, {what}", rounds, before) as task:
        for number in range(before, rounds):
            order = list(forms)
            random.Random(number).shuffle(order)
            for form in order:
                timings[form].steps.append(steppers[form].step())
                if form.balanced:
                    timings[form].measuring.append(steppers[form].step(measuring=True))
            task.advance()
            yield {form.name: timing for form, timing in timings.items()}


def _memory(pair: str, form: Form, side: int) -> int:
    """Bytes at the peak of two steps, in a fresh process, above what the process holds before."""
    command = [sys.executable, __file__, "--memory-of", form.name, "--pair", pair, "--side", str(side)]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1800)
    return int(found.stdout)


def _print_memory(pair: str, name: str, side: int) -> None:
    before = peak_rss_bytes()
    stepper = Stepper(pair, FORMS_BY_NAME[name], side)
    for _ in range(2):
        stepper.step()
    click.echo(peak_rss_bytes() - before)


@click.command()
@click.option("--quick", is_flag=True, help="64 px, four rounds and four more: printed, not recorded.")
@click.option("--again", is_flag=True, help="Forget what is recorded.")
@click.option("--rounds", default=12, show_default=True, help="Of all forms.")
@click.option("--more", default=48, show_default=True, help="Further rounds, of the forms with a goal and of KD.")
@click.option("--side", default=224, show_default=True, help="Pixels.")
@click.option("--threads", default=2, show_default=True)
@click.option("--pair", type=click.Choice(list(PAIRS)), help="Only this pair.")
@click.option("--memory-of", hidden=True)
def main(
    quick: bool, again: bool, rounds: int, more: int, side: int, threads: int, pair: str | None, memory_of: str | None
) -> None:
    """Time and weigh every form."""
    torch.set_num_threads(threads)
    if memory_of:
        _print_memory(pair or next(iter(PAIRS)), memory_of, side)
        return
    side, rounds, more = (64, 4, 4) if quick else (side, rounds, more)
    record = Record({"side": side, "batch": BATCH, "threads": threads}, None if quick else HERE / "results.json", again)
    for name in [pair] if pair else PAIRS:
        _fill(record, name, side, {"all": rounds, "contested": more})
    if quick:
        click.echo(page(record.result))
        return
    (HERE / "README.md").write_text(page(record.result))


class Record:
    """results.json as it grows; begun anew where the conditions, or the code that is timed, are others.

    Args:
        file: None keeps nothing.
    """

    def __init__(self, conditions: dict[str, Any], file: Path | None, again: bool) -> None:
        place = describe()
        plans = {form.name: {**form.plan, "progress": form.progress} for form in FORMS}
        conditions |= {"forms": plans, "code": _code(), "machine": place.fingerprint}
        known = json.loads(file.read_text()) if file and file.is_file() and not again else {}
        same = known.get("conditions") == conditions
        fresh = {"conditions": conditions, "environment": place.model_dump(mode="json"), "pairs": {}}
        self.result: dict[str, Any] = known if same else fresh
        self._file = file

    def rows(self, pair: str) -> dict[str, dict[str, Any]]:
        found: dict[str, dict[str, Any]] = self.result["pairs"].setdefault(pair, {})
        return found

    def save(self) -> None:
        if self._file:
            write_atomic(self._file, (json.dumps(self.result, indent=1, allow_nan=False) + "\n").encode())


def _code() -> str:
    """What is timed, in short: the modules that a step is made of, but for their words."""
    package = objective.__name__.rpartition(".")[0]
    parts = sorted(name for name in sys.modules if name.startswith(f"{package}."))
    return digest({name: _wordless(Path(str(sys.modules[name].__file__)).read_text()) for name in parts})


def _wordless(source: str) -> str:
    """Without comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [each for each in body if not _is_words(each)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_words(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _fill(record: Record, pair: str, side: int, rounds: dict[str, int]) -> None:
    rows = record.rows(pair)
    for phase, forms in PHASES.items():
        done = {form.name: Timings(**rows[form.name][phase]) for form in forms if phase in rows.get(form.name, {})}
        for timings in time_pair(pair, side, forms, rounds[phase], done, Terminal(), phase):
            for name, timing in timings.items():
                rows[name] = rows.get(name, {}) | {phase: asdict(timing)}
            record.save()
    with Terminal().task(f"memory, {pair}", len(FORMS)) as task:
        for form in FORMS:
            if "bytes" not in rows[form.name]:
                rows[form.name]["bytes"] = _memory(pair, form, side)
                record.save()
            task.advance()


def _timings(row: dict[str, Any], *phases: str) -> Timings:
    found = [Timings(**row[phase]) for phase in phases if phase in row]
    return Timings([step for each in found for step in each.steps], [step for each in found for step in each.measuring])


def page(result: dict) -> str:
    """The table and what became of the goals, as Markdown."""
    cpu, told = result["environment"]["cpu"], result["conditions"]
    counts = [
        " and ".join(dict.fromkeys(str(len(_timings(rows[REFERENCE], phase).steps)) for rows in result["pairs"].values()))
        for phase in PHASES
    ]
    lines = [
        "# What a step costs",
        "",
        f"Written by `python benchmarks/distill-cost/run.py`. {told['side']} px, batch {told['batch']}, fp32, "
        f"{told['threads']} threads, {cpu}; {counts[0]} interleaved rounds of all forms, then {counts[1]} of "
        "KD and the forms with a goal; statistics of the teacher settled. Only the factors, of rounds that both took part in, "
        "mean anything: of median steps, and where a form has several kinds of step (with and without a prompt, or measuring the "
        "balance of the terms), of the mean of their medians in the share that each has of a training. Steps are of the part of a "
        "training in which features teach, unless said otherwise. Brackets: 95 % of what other rounds would have given "
        "(bootstrap); a goal inside them is open.",
        "",
        *_about_accuracy(),
    ]
    worth = _worth()
    for pair, rows in result["pairs"].items():
        lines += [f"## {pair}", "", "| form | s / step | factor of KD | peak memory, factor of KD | accuracy |"]
        lines += ["|---|---|---|---|---|"]
        for name, row in sorted(rows.items(), key=lambda item: list(FORMS_BY_NAME).index(item[0])):
            time_factor, memory_factor = _factors(name, rows)
            seconds = _timings(row, "all").typical(FORMS_BY_NAME[name])
            accuracy = worth.get(SWITCHES.get(name, name), "")
            lines.append(f"| {name} | {seconds:.3f} | {time_factor:.2f} | {memory_factor:.2f} | {accuracy} |")
        lines += ["", *(_goal(form, rows) for form in FORMS if form.goal), _training(rows), ""]
    return "\n".join(lines)


def _about_accuracy() -> list[str]:
    return [
        "Accuracy: what the same prompts bring in a plan that is the default's in all else, on validation images, in points "
        "against the default: the mean of two pairs of [benchmarks/distillation](../distillation/README.md), whose teacher has "
        "two stages that a prompt can stand before, and the number of seeds. One seed tells differences of half a point and more.",
        "",
    ]


def _worth() -> dict[str, str]:
    """Switch -> its accuracy against the default's, as told."""
    lines = [json.loads(line) for line in ACCURACY.read_text().splitlines()] if ACCURACY.is_file() else []
    found: dict[str, dict[tuple[str, int], float]] = {}
    for line in lines:
        if line["phase"] == "switch":
            found.setdefault(line["method"], {})[line["pair"], line["seed"]] = line["validation"]
    usual = found.get("default", {})
    pairs = {pair for pair, _ in usual}
    told = {}
    for name, scores in found.items():
        common = usual.keys() & scores.keys()
        if seeds := [seed for seed in {seed for _, seed in common} if all((pair, seed) in common for pair in pairs)]:
            gain = 100 * mean(scores[pair, seed] - usual[pair, seed] for pair in pairs for seed in seeds)
            told[name] = f"{gain:+.2f} ({len(seeds)})" if name != "default" else "0"
    return told


def _goal(form: Form, rows: dict) -> str:
    assert form.goal
    factor, memory = _factors(form.name, rows)
    low, high = _interval(form, *(_timings(rows[name], *PHASES) for name in (form.name, REFERENCE)))
    verdict = "met" if high <= form.goal else "**missed**" if low > form.goal else "**open**"
    told = f"- {form.name}: time at most {form.goal:.2f} of KD: {factor:.2f} [{low:.2f}, {high:.2f}] ({verdict})"
    return told + (f"; memory at most 1.50: {memory:.2f} ({'met' if memory <= 1.5 else '**missed**'})" if form is DEFAULT else "")


def _training(rows: dict) -> str:
    """The default's two kinds of step in the share that each has of the epochs."""
    share = DistillPlan.model_validate(DEFAULT.plan).features_until
    first, second = (_factors(form.name, rows)[0] for form in (DEFAULT, SECOND_HALF))
    whole = share * first + (1 - share) * second
    return f"- A whole training by the default, features in {share:.0%} of its epochs: {whole:.2f} of KD"


def _factors(name: str, rows: dict) -> tuple[float, float]:
    """Of KD's time, in the rounds that both took part in, and of its memory."""
    phases = [phase for phase in PHASES if phase in rows[name]]
    own, other = (_timings(rows[one], *phases).typical(FORMS_BY_NAME[one]) for one in (name, REFERENCE))
    return own / other, rows[name]["bytes"] / rows[REFERENCE]["bytes"]


def _interval(form: Form, timings: Timings, reference: Timings) -> tuple[float, float]:
    """95 % of the factor of time, were the rounds drawn anew (bootstrap): what was side by side stays so."""
    rng = random.Random(0)
    kinds = [range(kind, len(timings.steps), form.every) for kind in range(form.every)]
    found = []
    for _ in range(DRAWS):
        drawn = [rng.choice(kinds[number % form.every]) for number in range(len(timings.steps))]
        found.append(timings.at(drawn).typical(form) / reference.at(drawn).typical(FORMS_BY_NAME[REFERENCE]))
    cuts = quantiles(found, n=40)
    return cuts[0], cuts[-1]


if __name__ == "__main__":
    main()
