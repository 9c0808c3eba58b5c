"""Latency that can be trusted: every candidate in a process of its own, all of them interleaved in one run; numpy only.

Two figures of one `measure` call may be compared; figures of two calls may not.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from fofa_deploy.backend import FileOpener, Session, get_backend
from fofa_deploy.config import LimitsPlan, MeasurePlan
from fofa_deploy.errors import FofaError
from fofa_deploy.isolate import Child
from fofa_deploy.progress import Progress
from fofa_deploy.results import Latency, Measurement
from fofa_deploy.runner import timing
from fofa_deploy.runner.energy import Meter
from fofa_deploy.runner.machine import peak_rss_bytes
from fofa_deploy.runner.timing import runs_for
from fofa_deploy.types import Artifact, Budget, Feeds, Frozen, HardwareProfile, ModelFile

__all__ = ["Candidate", "FileCandidate", "FileRunner", "Runner", "measure", "peak_rss_bytes", "runs_for", "summarize"]

SETTLE_RUNS = 2
"""Unmeasured runs at the start of a block."""

NOISY = 0.15
"""Coefficient of variation above which the reader is warned."""


class Candidate(Frozen):
    """What to measure: an artifact's folder, how to run it, on which images (``golden.npz``), in batches of how many."""

    runner: ClassVar = "fofa_deploy.measure:Runner"
    artifact: Path
    profile: HardwareProfile
    golden: Path
    batch: int = 1

    @property
    def opened_for(self) -> HardwareProfile:
        """The profile at this batch size alone: a runtime may compile a model of its own for every one that it is told."""
        execution = self.profile.execution.model_copy(update={"batch_sizes": (self.batch,)})
        return self.profile.model_copy(update={"execution": execution})


class FileCandidate(Frozen):
    """The same of a model file that others built; ``feeds`` is an .npz with one array per input, in the file's order."""

    runner: ClassVar = "fofa_deploy.measure:FileRunner"
    file: ModelFile
    profile: HardwareProfile
    feeds: Path
    batch: int = 1


class Runner:
    """A loaded artifact in a child process."""

    def __init__(self, request: Candidate) -> None:
        started = time.perf_counter_ns()
        artifact = Artifact.load(request.artifact)
        sidecar = artifact.sidecar
        with np.load(request.golden, allow_pickle=False) as arrays:
            images = np.resize(arrays["images"], (request.batch, *arrays["images"].shape[1:]))
        self._feeds: Feeds = {sidecar.input.name: np.ascontiguousarray(images)}
        self._sha256 = artifact.sha256
        self._open(started, request.profile, lambda: get_backend(artifact.backend).load(artifact, request.opened_for))

    def _open(self, started: int, profile: HardwareProfile, load: Callable[[], Session]) -> None:
        opened = time.perf_counter_ns()
        self._session = load().__enter__()
        self._load_ms = (time.perf_counter_ns() - opened) / 1e6
        self._meter = Meter.beside(self._session.device, profile.device.name)
        self._first_run_ms = self.warm_up(1)[0] / 1e6
        self._cold_ms = (time.perf_counter_ns() - started) / 1e6

    def warm_up(self, runs: int) -> list[int]:
        """Nanoseconds of each of ``runs`` runs that are no part of the sample; every output is touched."""
        return timing.timed(self._run, runs)

    def block(self, runs: int) -> list[int]:
        """The same of runs that are, and whose energy counts, after a few that settle the caches: they belonged to others."""
        self.warm_up(SETTLE_RUNS)
        with self._meter.over(runs):
            return timing.timed(self._run, runs)

    def _run(self) -> None:
        for output in self._session.run(self._feeds).values():
            output.flat[:1]

    def describe(self) -> dict[str, Any]:
        return {
            "device": self._session.device,
            "cold_start_ms": self._cold_ms,
            "load_ms": self._load_ms,
            "first_run_ms": self._first_run_ms,
            "peak_rss_bytes": peak_rss_bytes(),
            "artifact_sha256": self._sha256,
            **self._meter.found(),
        }


class FileRunner(Runner):
    """A loaded model file in a child process."""

    def __init__(self, request: FileCandidate) -> None:
        started = time.perf_counter_ns()
        backend = get_backend(request.profile.runtime)
        assert isinstance(backend, FileOpener), "it has described the file"
        with np.load(request.feeds, allow_pickle=False) as arrays:
            self._feeds = {spec.name: arrays[f"arr_{place}"] for place, spec in enumerate(request.file.inputs)}
        self._sha256 = request.file.sha256
        self._open(started, request.profile, lambda: backend.open_file(request.file, request.profile))


@dataclass
class _Entrant:
    candidate: Candidate | FileCandidate
    child: Child
    warmup: int = 0
    times: list[int] = field(default_factory=list)
    size: int = 0
    """Runs of a block."""
    share: float = 0.0
    """How much of its sample there is, and how much of it a block is worth."""
    step: float = 0.0

    def warm_up(self, plan: MeasurePlan) -> None:
        """By time and by count: a 20 ms model needs the runs, a 0.1 ms model the time."""
        started, times = time.monotonic(), [1]
        while self.warmup < plan.warmup_runs or time.monotonic() - started < plan.warmup_seconds:
            times = self.child.call("warm_up", runs=5)
            self.warmup += 5
        self.size = timing.block_runs(times)

    def go_on(self, plan: MeasurePlan) -> None:
        """One more block."""
        self.times += self.child.call("block", runs=self.size)
        before, self.share = self.share, timing.share(self.times, plan.seconds, plan.max_seconds)
        self.step = self.share - before


def measure(
    candidates: Sequence[Candidate | FileCandidate], plan: MeasurePlan, limits: LimitsPlan, seed: int, progress: Progress
) -> list[Measurement | FofaError]:
    """Measure the candidates side by side; the result has one entry per candidate, in their order.

    Blocks of about 50 ms alternate in an order shuffled anew each round, and all samples grow alike, to the end: a disturbance of
    the machine hits all of them. A candidate that cannot be loaded or dies is returned as its error; the others go on.
    """
    failed: dict[int, FofaError] = {}
    found: dict[int, Measurement] = {}
    with ExitStack() as stack:
        entrants: dict[int, _Entrant] = {}
        for number, candidate in enumerate(candidates):
            try:
                child = Child(candidate.runner, candidate, seconds=limits.run_seconds, memory_bytes=limits.memory_bytes)
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
    running, told = list(entrants), 0
    with progress.task(f"measure {len(running)}, %", 100) as task:
        while running:
            rng.shuffle(running)
            behind = min(entrants[number].share for number in running)
            for number in running:
                entrant = entrants[number]
                if entrant.share > behind + entrant.step:
                    continue  # a block ahead of somebody, who is waited for: nobody is to be measured alone at the end
                try:
                    entrant.go_on(plan)
                except FofaError as error:
                    failed[number] = error
            running = [n for n in running if n not in failed and entrants[n].share < 1]
            done = int(100 * (1 - sum(1 - entrants[n].share for n in running) / len(entrants)))
            task.advance(done - told)
            told = done


def _summary(entrant: _Entrant) -> Measurement:
    candidate = entrant.candidate
    described = entrant.child.call("describe")
    described |= {
        "threads": candidate.profile.execution.thread_count,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return summarize(entrant.times, batch=candidate.batch, warmup_runs=entrant.warmup, **described)


def summarize(times: Sequence[int], *, batch: int, **described: Any) -> Measurement:  # noqa: ANN401 - fields of a measurement
    """The measurement that a sample of nanoseconds per run carries, with a warning where the machine was noisy."""
    ms = np.asarray(times, np.float64) / 1e6
    variation = float(ms.std() / ms.mean())
    noisy = (f"noisy machine: the runs vary by {variation:.0%}",) if variation > NOISY else ()
    return Measurement(
        latency_ms=_latency(ms),
        batch=batch,
        throughput_sps=1e3 * batch / float(ms.mean()),
        variation=variation,
        runs=len(ms),
        warnings=noisy,
        **described,
    )


def patient(plan: MeasurePlan, *budgets: Budget) -> MeasurePlan:
    """Time enough for the p90 of whoever may keep the limit on it: who is slower misses it by the median."""
    limit = min((budget.p90_ms for budget in budgets if budget.p90_ms), default=0.0)
    return plan.model_copy(update={"max_seconds": max(plan.max_seconds, runs_for(0.9) * limit / 1000)})


def _latency(ms: np.ndarray) -> Latency:
    supported = {f"p{round(q * 100)}": float(np.quantile(ms, q)) for q in (0.9, 0.95, 0.99) if len(ms) >= runs_for(q)}
    return Latency(min=float(ms.min()), mean=float(ms.mean()), p50=float(np.median(ms)), **supported)
