"""An artifact against PyTorch, on golden inputs and on whole splits. Runs in a child process; numpy only."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fofa_deploy.backend import Session, float_recipe, get_backend
from fofa_deploy.errors import BuildError, GraphError
from fofa_deploy.metrics import Labels, Logits, compare
from fofa_deploy.results import Comparison
from fofa_deploy.types import Artifact, Frozen, Graph, HardwareProfile

CHECKED_BATCHES = (1, 2, 8)
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


class Verification(Frozen):
    """``whole`` is over the split that was asked for."""

    golden: Comparison
    whole: Comparison | None = None


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
        images = np.load(request.split / "images.npy", mmap_mode="r", allow_pickle=False)
        labels: Labels = np.load(request.split / "labels.npy", allow_pickle=False)
        expected: Logits = np.load(request.expected, allow_pickle=False)
        logits = run_all(session, artifact, images, request.batch_size)
    return Verification(golden=golden, whole=compare(logits, expected, labels if request.labelled else None))


def run_all(session: Session, artifact: Artifact, images: NDArray[np.uint8], batch_size: int) -> Logits:
    """Logits float32 (N,K) for uint8 images (N,C,H,W), in batches."""
    sidecar = artifact.sidecar
    batches = [
        _logits(session, artifact, sidecar.preprocessing.apply(images[start : start + batch_size]))
        for start in range(0, len(images), batch_size)
    ]
    return np.concatenate(batches)


def _logits(session: Session, artifact: Artifact, inputs: NDArray[np.float32]) -> Logits:
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
    graph = Graph.load(request.folder)
    backend = get_backend(request.profile.runtime)
    recipe = float_recipe(backend, request.profile, graph)
    with tempfile.TemporaryDirectory() as out:
        artifact = backend.build(graph, recipe, None, Path(out))
        with backend.load(artifact, request.profile) as session:
            found = compare_golden(session, artifact, request.folder / "golden.npz")
    if not found.finite or found.relative_error is None or not found.relative_error <= GRAPH_TOLERANCE:
        problem = f"{graph.path} differs from PyTorch: relative error {found.relative_error}, agreement {found.agreement:.0%}"
        raise GraphError(problem, "the exporter mistranslated the model; choose another student, or report the model's name")
    return found
