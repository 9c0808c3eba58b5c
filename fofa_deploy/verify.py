"""An artifact against PyTorch, on golden inputs and on whole splits. Runs in a child process; numpy only."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fofa_deploy.backend import Session, float_recipe, get_backend
from fofa_deploy.config import AccuracyPlan
from fofa_deploy.errors import BuildError, GraphError
from fofa_deploy.metrics import Labels, Logits, compare, topk
from fofa_deploy.profile import find_profile
from fofa_deploy.results import Comparison
from fofa_deploy.types import Artifact, Fraction, Frozen, Graph, HardwareProfile

CHECKED_BATCHES = (1, 2, 8)
FIRST_PART, SIGMAS = 256, 4.0
"""Images after which a hopeless artifact is first given up, and how sure that has to be."""

GRAPH_TOLERANCE = 1e-3
"""Largest relative L2 error of a float graph in another runtime; rounding alone stays below 1e-4."""


class VerifyRequest(Frozen):
    artifact: Path
    profile: HardwareProfile
    golden: Path
    split: Path | None = None
    expected: Path | None = None
    labelled: bool = True
    batch_size: int = 32
    budget: AccuracyPlan | None = Field(default=None, description="stop reading the split once this is missed beyond doubt")


class Verification(Frozen):
    """``whole`` is over the split that was asked for, or as much of it as it took to see that the budget is missed."""

    golden: Comparison
    whole: Comparison | None = None
    expected_top1: Fraction | None = Field(default=None, description="PyTorch's on the same labelled images")


def verify(request: VerifyRequest) -> Verification:
    """Run an artifact and compare.

    Raises:
        IntegrityError: its files are not the recorded ones.
        BackendError: the device is not there, or another one was bound.
    """
    artifact = Artifact.load(request.artifact)
    with get_backend(artifact.backend).load(artifact, request.profile) as session:
        golden = compare_golden(session, artifact, request.golden)
        if request.split is None or request.expected is None:
            return Verification(golden=golden)
        return _verify_split(request, request.split, request.expected, session, artifact, golden)


def _verify_split(
    request: VerifyRequest, split: Path, answers: Path, session: Session, artifact: Artifact, golden: Comparison
) -> Verification:
    """In growing parts, each time four times as much."""
    images = np.load(split / "images.npy", mmap_mode="r", allow_pickle=False)
    labels: Labels = np.load(split / "labels.npy", allow_pickle=False)
    expected: Logits = np.load(answers, allow_pickle=False)
    logits = np.empty_like(expected, np.float32)
    read, size = 0, FIRST_PART
    while True:
        end = min(size, len(images))
        logits[read:end] = run_all(session, artifact, images[read:end], request.batch_size)
        known = labels[:end] if request.labelled else None
        found = compare(logits[:end], expected[:end], known)
        top1 = None if known is None else topk(expected[:end], known, 1)
        if end == len(images) or (request.budget and _beyond_doubt(found, top1, request.budget)):
            return Verification(golden=golden, whole=found, expected_top1=top1)
        read, size = end, 4 * end


def _beyond_doubt(found: Comparison, expected_top1: float | None, budget: AccuracyPlan) -> bool:
    """Whether the budget is missed by more than ``SIGMAS`` standard errors of what it is judged by."""
    if not found.finite:
        return True
    changed = 1 - found.agreement
    if found.top1 is None or expected_top1 is None:
        return bool(found.agreement + SIGMAS * float(np.sqrt(changed * found.agreement / found.samples)) < budget.min_agreement)
    # Only images on which the two disagree can move the difference of their accuracies.
    return bool(expected_top1 - found.top1 - SIGMAS * float(np.sqrt(changed / found.samples)) > budget.max_top1_drop)


def run_all(session: Session, artifact: Artifact, images: NDArray[np.uint8], batch_size: int) -> Logits:
    """Logits float32 (N,K) for uint8 images (N,C,H,W), in batches."""
    batches = [
        _logits(session, artifact, artifact.sidecar.prepare(images[start : start + batch_size]))
        for start in range(0, len(images), batch_size)
    ]
    return np.concatenate(batches)


def _logits(session: Session, artifact: Artifact, inputs: NDArray[np.generic]) -> Logits:
    sidecar = artifact.sidecar
    outputs = session.run({sidecar.input.name: inputs})[sidecar.output.name]
    wanted = (len(inputs), *sidecar.output.shape[1:])
    if outputs.shape != wanted:
        raise BuildError(f"{artifact.path} gives {outputs.shape} instead of {wanted}", "report it: the runtime changed the graph")
    return np.asarray(outputs, np.float32)


def compare_golden(session: Session, artifact: Artifact, golden: Path) -> Comparison:
    """The golden inputs in batches of 1, 2 and 8, which also shows a batch axis that was frozen."""
    with np.load(golden, allow_pickle=False) as arrays:
        inputs, expected = arrays["images"], arrays["logits"]
    parts = [(inputs[:size], expected[:size]) for size in CHECKED_BATCHES if size <= len(inputs)]
    logits = np.concatenate([_logits(session, artifact, images) for images, _ in parts])
    return compare(logits, np.concatenate([outputs for _, outputs in parts]), None)


class GraphCheck(Frozen):
    folder: Path
    profile: HardwareProfile


def check_graph(request: GraphCheck) -> Comparison:
    """A captured graph in another runtime, against the golden outputs next to it, at every batch size in `CHECKED_BATCHES`.

    Raises:
        GraphError: it says something else than PyTorch did.
    """
    graph, golden = Graph.load(request.folder), request.folder / "golden.npz"
    with _opened(graph, request.profile) as (session, artifact):
        found = compare_golden(session, artifact, golden)
        if same_answers(found):
            return found
        unrest = _unrest(session, artifact, golden)
    problem = f"{graph.path} differs from PyTorch: {found.told_error}, agreement {found.agreement:.0%}"
    if unrest > GRAPH_TOLERANCE:
        cause = f"; but so do its own answers, by {unrest:.2g}, where its inputs change in their last bit"
        raise GraphError(problem + cause, "no runtime can repeat them: train the model on, or choose another student")
    with _opened(graph, find_profile("reference")) as (session, artifact):
        if same_answers(compare_golden(session, artifact, golden)):
            cause = f"; but it does not where numpy evaluates it: {request.profile.runtime} runs it wrong"
            raise GraphError(problem + cause, "choose another student, or another version of the runtime; and report it there")
    raise GraphError(problem, "the exporter mistranslated the model; choose another student, or report the model's name")


@contextmanager
def _opened(graph: Graph, profile: HardwareProfile) -> Iterator[tuple[Session, Artifact]]:
    """The float graph itself in a runtime."""
    backend = get_backend(profile.runtime)
    with tempfile.TemporaryDirectory() as out:
        artifact = backend.build(graph, float_recipe(backend, profile, graph), None, Path(out))
        with backend.load(artifact, profile) as session:
            yield session, artifact


def answers_of(graph: Graph, profile: HardwareProfile, images: NDArray[np.uint8]) -> Logits:
    """Logits float32 (N,K) of the float graph for uint8 images (N,C,H,W)."""
    with _opened(graph, profile) as (session, artifact):
        return run_all(session, artifact, images, 8)


def same_answers(found: Comparison) -> bool:
    """Whether a float graph has been run right, as far as rounding goes."""
    return found.finite and found.relative_error is not None and found.relative_error <= GRAPH_TOLERANCE


def _unrest(session: Session, artifact: Artifact, golden: Path) -> float:
    """Relative change of the answers where inputs change in their last bit; 0 where inputs are whole numbers."""
    with np.load(golden, allow_pickle=False) as arrays:
        inputs = arrays["images"][: max(CHECKED_BATCHES)]
    if not np.issubdtype(inputs.dtype, np.floating):
        return 0.0
    answers = _logits(session, artifact, inputs)
    moved = _logits(session, artifact, np.nextafter(inputs, np.float32(np.inf)))
    return float(np.linalg.norm(moved - answers) / np.linalg.norm(answers))
