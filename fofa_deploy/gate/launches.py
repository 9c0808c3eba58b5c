"""Races in fresh processes: every launch loads the rivals anew, and interleaves them in blocks inside one process.

The candidate's twin, a second session of the same artifact, runs along: what differs between those two is the machine.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack

from pydantic import PositiveInt

from fofa_deploy.config import LimitsPlan
from fofa_deploy.isolate import Child
from fofa_deploy.measure import Candidate, Runner
from fofa_deploy.types import Frozen

WARMUP_RUNS = 30
BLOCKS, BLOCK_RUNS = 30, 8
FEWEST_BLOCKS, FEWEST_RUNS = 10, 3
WARM_STEP = 5
STARTED_AT_ONCE = 2
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


class Duel:
    """The loaded rivals, in a child process."""

    def __init__(self, race: Race) -> None:
        self._seed, self._runners = race.seed, {}
        for name, candidate in race.rivals.items():
            self._runners[name] = Runner(candidate)
            if len(self._runners) == 1:
                _ = self._runners[name].block(WARM_STEP)
                self._peak = int(self._runners[name].describe()["peak_rss_bytes"])

    def race(self) -> Launch:
        """Warm up, then blocks of runs in an order shuffled anew each time."""
        runners = self._runners
        blocks, runs = pace(_warm_up(runners))
        times: dict[str, list[tuple[int, ...]]] = {name: [] for name in runners}
        rng, order = random.Random(self._seed), list(runners)
        for number in range(blocks):
            rng.shuffle(order)
            for name in order:
                if name != TWIN or number % 2 == 0:
                    times[name].append(tuple(runners[name].block(runs)))
        return Launch(
            blocks={name: tuple(rows) for name, rows in times.items()},
            first=next(iter(runners)),
            peak_rss_bytes=self._peak,
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


def race(baseline: Candidate | None, candidate: Candidate, numbers: range, limits: LimitsPlan) -> Iterator[Launch]:
    """The launches of these numbers, one at a time: who is loaded first alternates, and with it who gets which memory.

    Starting takes longer than racing: two start at once, and both are ready and idle before either runs.

    Raises:
        FofaError: an artifact could not be loaded or run; see `Child`.
    """
    for first in range(numbers.start, numbers.stop, STARTED_AT_ONCE):
        batch = range(first, min(first + STARTED_AT_ONCE, numbers.stop))
        with ThreadPoolExecutor(STARTED_AT_ONCE) as pool, ExitStack() as stack:
            starting = [pool.submit(_start, _rivals(baseline, candidate, number), number, limits) for number in batch]
            wait(starting)
            ready = [stack.enter_context(started.result()) for started in starting if not started.exception()]
            for started in starting:
                started.result()
            for child in ready:
                yield Launch.model_validate(child.call("race"))


def _start(rivals: dict[str, Candidate], number: int, limits: LimitsPlan) -> Child:
    request = Race(rivals=rivals, seed=number)
    return Child("fofa_deploy.gate.launches:Duel", request, seconds=limits.run_seconds, memory_bytes=limits.memory_bytes)


def _rivals(baseline: Candidate | None, candidate: Candidate, number: int) -> dict[str, Candidate]:
    if baseline is None:
        return {CANDIDATE: candidate}
    known = {BASELINE: baseline, CANDIDATE: candidate, TWIN: candidate}
    return {name: known[name] for name in ORDERS[number % len(ORDERS)]}
