"""Races in fresh processes: every launch loads the rivals anew, and interleaves them in blocks inside one process.

The candidate's twin, a second session of the same artifact, runs along: what differs between those two is the machine.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping

from pydantic import PositiveInt

from fofa_deploy.isolate import run_isolated
from fofa_deploy.measure import Candidate, Runner
from fofa_deploy.types import Frozen

WARMUP_RUNS = 30
BLOCKS, BLOCK_RUNS = 30, 8
FEWEST_BLOCKS, FEWEST_RUNS = 10, 3
WARM_STEP = 5
LAUNCH_SECONDS = 4.0
"""Measured time that a launch aims at; only models of more than about 6 ms get fewer runs for it."""

BASELINE, CANDIDATE, TWIN = "baseline", "candidate", "twin"
ORDERS = (
    (BASELINE, CANDIDATE, TWIN),
    (CANDIDATE, BASELINE, TWIN),
    (BASELINE, TWIN, CANDIDATE),
    (TWIN, CANDIDATE, BASELINE),
)
"""Of loading, launch by launch: each of any two comes first in half of them."""


class Race(Frozen):
    """Who runs, in the order of loading; the twin takes part in every second block."""

    rivals: dict[str, Candidate]
    seed: int = 0


class Launch(Frozen):
    """Nanoseconds per rival, block and run; and the peak memory of the process when only the first rival was loaded."""

    blocks: dict[str, tuple[tuple[PositiveInt, ...], ...]]
    first: str
    peak_rss_bytes: PositiveInt
    devices: dict[str, str]


def launch(race: Race) -> Launch:
    """Runs in a child process."""
    runners: dict[str, Runner] = {}
    for name, candidate in race.rivals.items():
        runners[name] = Runner(candidate)
        if len(runners) == 1:
            _ = runners[name].block(WARM_STEP)
            peak = int(runners[name].describe()["peak_rss_bytes"])
    blocks, runs = pace(_warm_up(runners))
    times: dict[str, list[tuple[int, ...]]] = {name: [] for name in runners}
    rng, order = random.Random(race.seed), list(runners)
    for number in range(blocks):
        rng.shuffle(order)
        for name in order:
            if name != TWIN or number % 2 == 0:
                times[name].append(tuple(runners[name].block(runs)))
    return Launch(
        blocks={name: tuple(rows) for name, rows in times.items()},
        first=next(iter(runners)),
        peak_rss_bytes=peak,
        devices={name: str(runner.describe()["device"]) for name, runner in runners.items()},
    )


def _warm_up(runners: Mapping[str, Runner]) -> float:
    """Seconds of one round of runs, after enough of them; a model of over 40 ms warms up by time instead of by count."""
    started, last = time.monotonic(), {name: [0] for name in runners}
    for _ in range(0, WARMUP_RUNS, WARM_STEP):
        for name, runner in runners.items():
            last[name] = runner.block(WARM_STEP)
        if time.monotonic() - started > LAUNCH_SECONDS:
            break
    return sum(min(times) * (0.5 if name == TWIN else 1.0) for name, times in last.items()) / 1e9


def pace(round_seconds: float) -> tuple[int, int]:
    """Blocks, and runs per block, for rivals that take so long for one run each."""
    runs = max(FEWEST_RUNS, min(BLOCK_RUNS, int(LAUNCH_SECONDS / (BLOCKS * round_seconds))))
    return max(FEWEST_BLOCKS, min(BLOCKS, int(LAUNCH_SECONDS / (runs * round_seconds)))), runs


def race_once(baseline: Candidate | None, candidate: Candidate, number: int, seconds: float, memory_bytes: int | None) -> Launch:
    """Launch ``number`` of a series: who is loaded first alternates, and with it who gets which memory.

    Raises:
        FofaError: an artifact could not be loaded or run; see `run_isolated`.
    """
    rivals = {CANDIDATE: candidate}
    if baseline is not None:
        known = {BASELINE: baseline, CANDIDATE: candidate, TWIN: candidate}
        rivals = {name: known[name] for name in ORDERS[number % len(ORDERS)]}
    request = Race(rivals=rivals, seed=number)
    return run_isolated("fofa_deploy.gate.launches:launch", request, Launch, seconds=seconds, memory_bytes=memory_bytes)
