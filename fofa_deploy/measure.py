"""Latency that can be trusted: every candidate in a process of its own, all of them interleaved in one run; numpy only.

Two figures of one `measure` call may be compared; figures of two calls may not.
"""

from __future__ import annotations

import gc
import math
import random
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from fofa_deploy.backend import get_backend
from fofa_deploy.config import LimitsPlan, MeasurePlan
from fofa_deploy.errors import FofaError
from fofa_deploy.isolate import Child
from fofa_deploy.progress import Progress
from fofa_deploy.results import Latency, Measurement
from fofa_deploy.types import Artifact, Frozen, HardwareProfile

BLOCK_SECONDS = 0.05
SETTLE_RUNS = 2
"""Unmeasured runs at the start of a block: the caches belonged to another candidate."""

NOISY = 0.15
"""Coefficient of variation above which the reader is warned."""


class Candidate(Frozen):
    """What to measure: an artifact's folder, how to run it, on which images (``golden.npz``), in batches of how many."""

    artifact: Path
    profile: HardwareProfile
    golden: Path
    batch: int = 1


class Runner:
    """A loaded artifact in a child process."""

    def __init__(self, request: Candidate) -> None:
        started = time.perf_counter_ns()
        self._artifact = Artifact.load(request.artifact)
        sidecar = self._artifact.sidecar
        with np.load(request.golden, allow_pickle=False) as arrays:
            images = np.resize(arrays["images"], (request.batch, *arrays["images"].shape[1:]))
        self._feeds = {sidecar.input.name: np.ascontiguousarray(images)}
        self._output = sidecar.output.name
        self._session = get_backend(self._artifact.backend).load(self._artifact, request.profile).__enter__()
        self.block(1)
        self._cold_ms = (time.perf_counter_ns() - started) / 1e6

    def block(self, runs: int) -> list[int]:
        """Nanoseconds of each of ``runs`` runs; garbage collection waits, and every output is touched."""
        session, feeds, output = self._session, self._feeds, self._output
        times = []
        gc.disable()
        try:
            for _ in range(runs):
                started = time.perf_counter_ns()
                result = session.run(feeds)[output]
                result.item(0)
                times.append(time.perf_counter_ns() - started)
        finally:
            gc.enable()
        return times

    def describe(self) -> dict[str, Any]:
        return {
            "device": self._session.device,
            "cold_start_ms": self._cold_ms,
            "peak_rss_bytes": peak_rss_bytes(),
            "artifact_sha256": self._artifact.sha256,
        }


def peak_rss_bytes() -> int:
    """High-water mark of this process' resident memory.

    From VmHWM where there is one: ru_maxrss survives exec, and would tell the parent's peak.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@dataclass
class _Entrant:
    candidate: Candidate
    child: Child
    warmup: int = 0
    times: list[int] = field(default_factory=list)

    def warm_up(self, plan: MeasurePlan) -> None:
        """By time and by count: a 20 ms model needs the runs, a 0.1 ms model the time."""
        started = time.monotonic()
        while self.warmup < plan.warmup_runs or time.monotonic() - started < plan.warmup_seconds:
            self.times = self.child.call("block", runs=5)
            self.warmup += 5

    @property
    def block_runs(self) -> int:
        return max(1, min(100, round(BLOCK_SECONDS * 1e9 / max(float(np.median(self.times)), 1.0))))

    def done(self, plan: MeasurePlan) -> bool:
        seconds = sum(self.times) / 1e9
        return (seconds >= plan.seconds and len(self.times) >= runs_for(0.99)) or seconds >= plan.max_seconds


def runs_for(quantile: float) -> int:
    """Runs that a percentile needs: with this many, one lies above it with 99.87 % certainty (binomial, three sigma)."""
    return math.ceil(math.log(0.0013) / math.log(quantile))


def measure(
    candidates: Sequence[Candidate], plan: MeasurePlan, limits: LimitsPlan, seed: int, progress: Progress
) -> list[Measurement | FofaError]:
    """Measure the candidates side by side; the result has one entry per candidate, in their order.

    Blocks of about 50 ms alternate in an order shuffled anew each round, so that a disturbance of the machine hits all
    alike. A candidate that cannot be loaded or dies is returned as its error; the others go on.
    """
    failed: dict[int, FofaError] = {}
    found: dict[int, Measurement] = {}
    with ExitStack() as stack:
        entrants: dict[int, _Entrant] = {}
        for number, candidate in enumerate(candidates):
            try:
                child = Child("fofa_deploy.measure:Runner", candidate, seconds=limits.run_seconds, memory_bytes=limits.memory_bytes)
                entrants[number] = _Entrant(candidate, stack.enter_context(child))
                entrants[number].warm_up(plan)
            except FofaError as error:
                failed[number] = error
                entrants.pop(number, None)
        _race(entrants, failed, plan, random.Random(seed), progress)
        for number in entrants.keys() - failed.keys():
            try:
                found[number] = _summary(entrants[number])
            except FofaError as error:
                failed[number] = error
    return [found[n] if n in found else failed[n] for n in range(len(candidates))]


def _race(
    entrants: dict[int, _Entrant], failed: dict[int, FofaError], plan: MeasurePlan, rng: random.Random, progress: Progress
) -> None:
    sizes = {number: entrant.block_runs for number, entrant in entrants.items()}
    for entrant in entrants.values():
        entrant.times = []
    running = list(entrants)
    with progress.task("measure", len(running)) as task:
        while running:
            rng.shuffle(running)
            for number in running:
                try:
                    times = entrants[number].child.call("block", runs=SETTLE_RUNS + sizes[number])
                    entrants[number].times += times[SETTLE_RUNS:]
                except FofaError as error:
                    failed[number] = error
            left = [n for n in running if n not in failed and not entrants[n].done(plan)]
            task.advance(len(running) - len(left))
            running = left


def _summary(entrant: _Entrant) -> Measurement:
    ms = np.asarray(entrant.times, np.float64) / 1e6
    execution, batch = entrant.candidate.profile.execution, entrant.candidate.batch
    variation = float(ms.std() / ms.mean())
    noisy = (f"noisy machine: the runs vary by {variation:.0%}",) if variation > NOISY else ()
    return Measurement(
        latency_ms=_latency(ms),
        batch=batch,
        throughput_sps=1e3 * batch / float(ms.mean()),
        variation=variation,
        runs=len(ms),
        warmup_runs=entrant.warmup,
        threads=execution.thread_count,
        energy_reason="energy is not measured by this version",
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        warnings=noisy,
        **entrant.child.call("describe"),
    )


def _latency(ms: np.ndarray) -> Latency:
    supported = {f"p{round(q * 100)}": float(np.quantile(ms, q)) for q in (0.9, 0.95, 0.99) if len(ms) >= runs_for(q)}
    return Latency(min=float(ms.min()), mean=float(ms.mean()), p50=float(np.median(ms)), **supported)
