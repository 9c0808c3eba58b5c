"""Everybody side by side: each candidate in a process of its own, in interleaved blocks.

First a few rounds at every setting, which decide the setting that counts; then the heats that are recorded. Every heat has
processes of its own: where its memory happens to lie makes a process a little faster or slower for as long as it lives.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from statistics import median

from fofa_deploy.config import LimitsPlan
from fofa_deploy.errors import FofaError
from fofa_deploy.isolate import Child
from fofa_deploy.measure import SETTLE_RUNS, Candidate
from fofa_deploy.progress import Progress, Task
from fofa_deploy.runner import timing
from fofa_deploy.types import Execution, Frozen

WARM_SECONDS, WARM_RUNS = 0.3, 10
PAUSE_SECONDS = 0.01
"""Between blocks: threads that spin for work that does not come give up their core."""

Lane = tuple[str, str]
"""Name of an entry, and of one of its settings."""


class Lap(Frozen):
    """What an entry did: the setting that was better, its blocks heat by heat, and every setting's first result."""

    setting: str
    heats_ms: tuple[tuple[float, ...], ...]
    screened_ms: dict[str, float]


class Rounds(Frozen):
    """How many rounds choose the settings; and in how many heats of how many rounds those are measured."""

    screening: int = 6
    heats: int = 8
    counting: int = 3


def contest(
    entries: Mapping[str, Mapping[str, Candidate]], rounds: Rounds, limits: LimitsPlan, seed: int, progress: Progress
) -> tuple[dict[str, Lap], dict[str, str]]:
    """Race the entries, each given as its settings; and why some could not take part."""
    failed: dict[str, str] = {}
    rng = random.Random(seed)
    lanes = {(name, setting): candidate for name, settings in entries.items() for setting, candidate in settings.items()}
    with progress.task("screen", rounds.screening) as task:
        screened = {lane: median(found) for lane, found in _heat(lanes, rounds.screening, limits, rng, failed, task).items()}
    best = {name: min((ms, lane) for lane, ms in screened.items() if lane[0] == name)[1] for name, _ in screened}
    found: dict[Lane, list[tuple[float, ...]]] = {lane: [] for lane in best.values()}
    with progress.task("measure", rounds.heats * rounds.counting) as task:
        for _ in range(rounds.heats):
            heat = _heat({lane: lanes[lane] for lane in found}, rounds.counting, limits, rng, failed, task)
            found = {lane: [*earlier, tuple(heat[lane])] for lane, earlier in found.items() if lane in heat}
    laps = {
        lane[0]: Lap(
            setting=lane[1],
            heats_ms=tuple(heats),
            screened_ms={setting: ms for (name, setting), ms in screened.items() if name == lane[0]},
        )
        for lane, heats in found.items()
    }
    return laps, {name: why for name, why in failed.items() if name not in laps}


class _Runner:
    """A loaded and warm candidate, and how many runs make a block of about 50 ms of it."""

    def __init__(self, candidate: Candidate, limits: LimitsPlan) -> None:
        self._child = Child("fofa_deploy.measure:Runner", candidate, seconds=limits.run_seconds)
        self._size = 0
        started, runs = time.monotonic(), 0
        while runs < WARM_RUNS or time.monotonic() - started < WARM_SECONDS:
            self._child.call("block", runs=5)
            runs += 5

    def block(self) -> float:
        """Median milliseconds of a block's runs, those left out in which the caches still belonged to another."""
        time.sleep(PAUSE_SECONDS)
        if not self._size:  # not while others were starting, too
            self._size = timing.block_runs(self._child.call("block", runs=5))
        return median(self._child.call("block", runs=SETTLE_RUNS + self._size)[SETTLE_RUNS:]) / 1e6

    def close(self) -> None:
        self._child.close()

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _heat(
    lanes: Mapping[Lane, Candidate], rounds: int, limits: LimitsPlan, rng: random.Random, failed: dict[str, str], task: Task
) -> dict[Lane, list[float]]:
    """Everybody in a new process, and one block of everybody per round; orders are shuffled anew, and who fails is out."""
    with ExitStack() as stack:
        runners: dict[Lane, _Runner] = {}

        def start(lane: Lane) -> None:
            try:
                runners[lane] = stack.enter_context(_Runner(lanes[lane], limits))
            except FofaError as error:
                failed[lane[0]] = error.message.splitlines()[0]

        with ThreadPoolExecutor(Execution().thread_count) as pool:
            list(pool.map(start, rng.sample(list(lanes), len(lanes))))
        found: dict[Lane, list[float]] = {lane: [] for lane in sorted(runners)}
        for _ in range(rounds):
            for lane in rng.sample(list(found), len(found)):
                try:
                    found[lane].append(runners[lane].block())
                except FofaError as error:
                    failed[lane[0]] = error.message.splitlines()[0]
                    del found[lane]
            task.advance(1)
    return found
