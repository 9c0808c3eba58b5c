"""One model captured, built and held to PyTorch through the seam; runs in a child process."""

from __future__ import annotations

import gc
import shutil
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx
import torch
from lively import enliven
from pydantic import BaseModel, ConfigDict
from trial import CLASSES, Candidate, Rules, Zoo

from fofa_deploy.backend import get_backend
from fofa_deploy.capture import capture, write_expected
from fofa_deploy.config import AccuracyPlan, DataPlan
from fofa_deploy.data import load_data, preprocessing, write_split
from fofa_deploy.diagnosis import Offer, OfferRequest, offer
from fofa_deploy.errors import FofaError
from fofa_deploy.judge import accuracy_problem, precision_problem
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Quiet
from fofa_deploy.results import TargetRow
from fofa_deploy.types import Artifact, Calibration, Execution, Graph, HardwareProfile, Recipe, Status
from fofa_deploy.verify import CHECKED_BATCHES, GraphCheck, Verification, VerifyRequest, check_graph, verify

GRAPH_CHECK = "cpu-onnxruntime"
CALIBRATION, VALIDATION = 32, 64
"""Images that int8 is calibrated with, and others that it is compared on."""


class Captured(BaseModel):
    """A graph that says the same as PyTorch in ONNX Runtime at batches of `CHECKED_BATCHES`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    exporter: str
    nodes: int
    bytes: int
    spread: float
    relative_error: float


class Specimens(Zoo):
    """The child's side: chooses models, captures them, and builds and judges recipes, until something ends the process."""

    def __init__(self, request: Rules) -> None:
        super().__init__(request)
        gc.freeze()
        gc.set_threshold(200_000, 50, 1000)  # exporting makes millions of small objects, and each step collects when it starts

    def capture(self, candidate: dict[str, Any], photographs: str, folder: str) -> Captured:
        """Fill ``folder`` with the graph, the images that it is calibrated and compared with, and PyTorch's logits on them."""
        gc.collect()
        chosen, out = Candidate.model_validate(candidate), Path(folder)
        plan = DataPlan(
            name="images",
            root=Path(photographs),
            test_split="test",
            validation_fraction=0.25,
            classes=CLASSES,
            image_size=chosen.shape[1:],
        )
        data, pixels = load_data(plan, seed=0), preprocessing(plan)
        model = chosen.build(*chosen.shape[1:])
        first = data.train.head(CALIBRATION)
        spread = enliven(model, torch.from_numpy(pixels.apply(first.source.images(first.indices))))
        shutil.rmtree(out, ignore_errors=True)  # what a killed capture, or an earlier one, has left
        out.mkdir(parents=True)
        capture(model, chosen.name, pixels, data.class_names, data.test, out)
        write_split(data.train.head(CALIBRATION), out / "calibration", Quiet(), "calibration")
        write_split(data.validation.head(VALIDATION), out / "validation", Quiet(), "validation")
        write_expected(model, {"validation": data.validation.head(VALIDATION)}, pixels, out)
        found = check_graph(GraphCheck(folder=out, profile=_profile(GRAPH_CHECK)))
        proto = onnx.load(out / "model.onnx", load_external_data=False)
        told = {prop.key: prop.value for prop in proto.metadata_props}
        size = (out / "model.onnx").stat().st_size
        exporter = told.get("fofa_deploy.exporter", "")
        return Captured(
            exporter=exporter, nodes=len(proto.graph.node), bytes=size, spread=spread, relative_error=found.relative_error
        )

    def offer(self, folder: str, target: str) -> Offer:
        """What a back end makes of a captured graph."""
        return offer(OfferRequest(graph=Path(folder), profile=_profile(target)))

    def attempt(self, folder: str, target: str, recipe: dict[str, Any], can_run: bool, reason: str) -> TargetRow:
        """One recipe built, its precision proved and, where the target can run here, its outputs compared.

        Args:
            reason: why it cannot be run here, where it cannot.
        """
        gc.collect()
        profile, chosen = _profile(target), Recipe.model_validate(recipe)
        row = TargetRow(target=target, runtime=profile.runtime, profile=target, recipe=chosen.name, status=Status.FAILED, reason="")
        with TemporaryDirectory() as out:
            try:
                artifact = _build(Path(folder), profile, chosen, Path(out))
                if problem := precision_problem(artifact):
                    return row.model_copy(update=_facts(artifact) | {"reason": problem})
                if not can_run:
                    return row.model_copy(update=_facts(artifact) | {"status": Status.BUILT_NOT_RUN, "reason": reason})
                found = _verify(Path(folder), profile, Path(out))
            except FofaError as error:
                return row.model_copy(update={"reason": error.message.splitlines()[0]})
        problem = accuracy_problem(chosen.precision, found, AccuracyPlan())
        status = Status.REJECTED if problem else Status.VERIFIED
        judged = {"status": status, "reason": problem, "golden": found.golden, "validation": found.whole}
        return row.model_copy(update=_facts(artifact) | judged)


def _profile(name: str) -> HardwareProfile:
    """A shipped profile that allows all its back end can do, on one thread and at every batch size that is checked."""
    profile = find_profile(name)
    execution = Execution(threads=1, batch_sizes=CHECKED_BATCHES, spinning=False)
    precisions = tuple(sorted(get_backend(profile.runtime).precisions))
    return profile.model_copy(update={"precisions": precisions, "execution": execution})


def _build(folder: Path, profile: HardwareProfile, recipe: Recipe, out: Path) -> Artifact:
    graph = Graph.load(folder)
    calibration = Calibration(images=folder / "calibration" / "images.npy", sidecar=graph.sidecar)
    backend = get_backend(profile.runtime)
    return backend.build(graph, recipe, calibration if recipe.needs_calibration else None, out)


def _verify(folder: Path, profile: HardwareProfile, artifact: Path) -> Verification:
    return verify(
        VerifyRequest(
            artifact=artifact,
            profile=profile,
            golden=folder / "golden.npz",
            split=folder / "validation",
            expected=folder / "validation.npy",
            labelled=False,
        )
    )


def _facts(artifact: Artifact) -> dict[str, object]:
    weighted = Counter(layer.precision for layer in artifact.layers if layer.weighted)
    return {"precision": dict(weighted), "size_bytes": artifact.size_bytes}
