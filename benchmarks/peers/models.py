"""The models that everybody is given: trained, captured and tuned by the project's own pipeline, then told to the peers."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from entries import SIBLINGS

from fofa_deploy.backend import get_backend
from fofa_deploy.config import RunPlan, load_plan
from fofa_deploy.pipeline import Run, opened
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Progress
from fofa_deploy.results import RunReport, TargetRow
from fofa_deploy.runner.machine import cpu_flags
from fofa_deploy.store import write_atomic
from fofa_deploy.types import Graph, Precision, Status

HERE = Path(__file__).parent
SUITES = HERE.parent / "suites"
VALIDATION = 500
"""Images for peers that check their own accuracy while they quantize: of the validation split, as the project's choice is."""

TASTE = ("verify.samples=64", "verify.calibration=16", "measure.seconds=0.1", "measure.max_seconds=0.2")
SHORT = ("data.name=digits", "data.image_size=32", "data.limit=640", "data.class_names=[]", "distill.epochs=1")


@dataclass(frozen=True)
class Subject:
    """A model: its plan, and what a tool for transformers has to be told about it."""

    name: str
    plan: Path
    trained: bool = True
    heads: int = 0
    width: int = 0


SUBJECTS = (
    Subject("efficientnet-lite0", SUITES / "efficientnet-lite0.toml", trained=False),
    Subject("resnet18", HERE / "resnet18.toml"),
    Subject("vit-tiny", HERE / "vit_tiny.toml", heads=3, width=192),
)


def plan_of(subject: Subject, work: Path, quick: bool) -> RunPlan:
    """The resolved plan. Weights and photographs of a model that is not trained here are written first."""
    overrides = [] if subject.trained else _ready_made(work / "inputs")
    if quick:
        overrides += [*TASTE, *(SHORT if subject.trained else ())]
    return load_plan(str(subject.plan), overrides)


def _ready_made(inputs: Path) -> list[str]:
    photographs, weights = inputs / "photographs", inputs / "weights.safetensors"
    if not weights.is_file():
        spec = importlib.util.spec_from_file_location("efficientnet_lite0", SUITES / "efficientnet_lite0.py")
        assert spec
        assert spec.loader
        ingredients = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(ingredients)
        ingredients.write_photographs(photographs)
        ingredients.write_weights(weights)
    return [
        f"data.root={photographs.absolute()}",
        f"student.checkpoint={weights.absolute()}",
        'targets=["cpu-onnxruntime", "cpu-openvino"]',
        "required=[]",
        "verify.calibration=128",
        "measure.seconds=0.5",
        "measure.max_seconds=2.0",
    ]


def prepare(subject: Subject, work: Path, quick: bool, progress: Progress) -> None:
    """Train, capture, tune for every target, and write ``job.json`` for the peers. Run again to resume."""
    with opened(plan_of(subject, work, quick), work / "run", progress) as run:
        report = run.report(*run.targets())
        rows = [row.model_dump(mode="json") for row in _siblings(run, report)]
        write_atomic(work / SIBLINGS, json.dumps(rows, indent=1).encode())
        _write_job(subject, run, work / "job")


def _siblings(run: Run, report: RunReport) -> Iterator[TargetRow]:
    """What the search had no reason to try of families with a recipe inside the budget: as fast, and some closer to PyTorch."""
    for chosen in (row for row in report.targets if row.chosen):
        profile = find_profile(chosen.profile)
        rows = {row.recipe: row for row in report.targets if row.target == chosen.target}
        recipes = get_backend(profile.runtime).recipes(profile, Graph.load(run.graph))
        good = {recipe.kin for recipe in recipes if recipe.name in rows and rows[recipe.name].status is Status.VERIFIED}
        for recipe in recipes:
            if recipe.kin in good and recipe.precision is Precision.INT8 and recipe.name not in rows:
                yield from run.tuner(recipe.name, timed=False).attempt(profile)


def _write_job(subject: Subject, run: Run, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    graph = Graph.load(run.graph)
    apply = graph.sidecar.preprocessing.apply
    expected = np.load(run.expected / "validation.npy")[:VALIDATION].argmax(1)
    labels = np.load(run.splits / "validation" / "labels.npy")[:VALIDATION] if run.plan.data.labelled else expected
    np.save(folder / "calibration.npy", apply(np.load(run.splits / "calibration" / "images.npy")))
    np.save(folder / "validation.npy", apply(np.load(run.splits / "validation" / "images.npy")[:VALIDATION]))
    np.save(folder / "labels.npy", labels)
    student = run.plan.student
    spec = graph.sidecar.preprocessing
    fixed = {"img_size": spec.image_size} if subject.heads else {}
    job = {
        "graph": str(graph.path.absolute()),
        "sha256": graph.sha256,
        "input": graph.sidecar.input.name,
        "calibration": str((folder / "calibration.npy").absolute()),
        "validation": str((folder / "validation.npy").absolute()),
        "labels": str((folder / "labels.npy").absolute()),
        "weights": str((run.student / "weights.safetensors").absolute()),
        "model": student.model.removeprefix("timm:"),
        "arguments": {**fixed, **student.arguments, "num_classes": len(graph.sidecar.class_names), "in_chans": spec.channels},
        "transformer": bool(subject.heads),
        "heads": subject.heads,
        "width": subject.width,
        "saturating": not {"avx512_vnni", "avx_vnni"} & set(cpu_flags()),
    }
    write_atomic(folder / "job.json", json.dumps(job, indent=1).encode())
