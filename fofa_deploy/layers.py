"""Where an artifact's time goes: its runtime's own profiler, joined to the graph. Runs in a child process."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from fofa_deploy.backend import LayerProfiler, get_backend
from fofa_deploy.errors import StageError, UnavailableError, UserError
from fofa_deploy.isolate import run_isolated
from fofa_deploy.measure import Candidate
from fofa_deploy.results import LayerCost, Peaks
from fofa_deploy.roofline import costs, least_ms, peaks, work
from fofa_deploy.types import Artifact, Frozen, HardwareProfile

RUNS = 20


class LayersRequest(Frozen):
    artifact: Path
    profile: HardwareProfile
    golden: Path
    graph: Path


class LayersFound(Frozen):
    """Empty where the runtime does not tell."""

    layers: tuple[LayerCost, ...] = ()
    peaks: Peaks | None = None
    least_ms: float | None = None


def layers_of(candidate: Candidate, graph: Path, p50: float, seconds: float) -> dict[str, object]:
    """The fields of a row that tell where its time goes; none where the runtime does not say, or cannot be asked."""
    told = candidate.model_dump(include={"artifact", "profile", "golden"})
    request = LayersRequest(**told, graph=graph)
    try:
        found = run_isolated("fofa_deploy.layers:layers", request, LayersFound, seconds=seconds)
    except (StageError, UserError, UnavailableError):
        return {}
    share = found.least_ms / p50 if found.least_ms and candidate.batch == 1 else None
    return {"layers": found.layers, "peaks": found.peaks, "of_limit": share}


def layers(request: LayersRequest) -> LayersFound:
    """Times and limits of every layer for one image, the slowest first.

    Raises:
        FofaError: the artifact cannot be loaded.
    """
    artifact = Artifact.load(request.artifact)
    backend, sidecar = get_backend(artifact.backend), artifact.sidecar
    if not isinstance(backend, LayerProfiler):
        return LayersFound()
    with np.load(request.golden, allow_pickle=False) as arrays:
        feeds = {sidecar.input.name: np.ascontiguousarray(arrays["images"][:1])}
    times = tuple(backend.layer_times(artifact, request.profile, feeds, RUNS))
    # Limits are measured on the CPU, and say nothing about another kind of device.
    limits = peaks(request.profile.execution.thread_count) if request.profile.device.kind == "cpu" else None
    nodes = work(request.graph)
    found = tuple(sorted(costs(times, nodes, limits), key=lambda layer: -layer.ms))
    return LayersFound(layers=found, peaks=limits, least_ms=least_ms(found, nodes))
