"""Everybody side by side: each candidate at each of its settings in a process of its own, in interleaved blocks.

First a short round at every setting, which decides the setting that counts; then, afresh, the rounds that are recorded.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from statistics import median

from fofa_deploy.config import LimitsPlan
from fofa_deploy.errors import FofaError
from fofa_deploy.isolate import Child
from fofa_deploy.measure import SETTLE_RUNS, Candidate
from fofa_deploy.progress import Progress
from fofa_deploy.runner import timing
from fofa_deploy.types import Frozen

WARM_SECONDS, WARM_RUNS = 0.3, 10
PAUSE_SECONDS = 0.01
"""Between blocks: threads that spin for work that does not come give up their core."""

Lane = tuple[str, str]
"""Name of an entry, and of one of its settings."""


class Lap(Frozen):
    """What an entry did: the setting that was better, that setting's blocks round by round, and every setting's first result."""

    setting: str
    blocks_ms: tuple[float, ...]
    screened_ms: dict[str, float]


class Rounds(Frozen):
    """How often everybody is asked; the last ones count."""

    screening: int = 6
    counting: int = 24


def contest(
    entries: Mapping[str, Mapping[str, Candidate]], rounds: Rounds, limits: LimitsPlan, seed: int, progress: Progress
) -> tuple[dict[str, Lap], dict[str, str]]:
    """Race the entries, each given as its settings; and why some could not take part."""
    failed: dict[str, str] = {}
    with ExitStack() as stack:
        lanes: dict[Lane, _Runner] = {}
        for name, settings in entries.items():
            for setting, candidate in settings.items():
                try:
                    lanes[name, setting] = stack.enter_context(_Runner(candidate, limits))
                except FofaError as error:
                    failed[name] = error.message.splitlines()[0]
        rng = random.Random(seed)
        screened = _medians(_alternate(lanes, rounds.screening, rng, failed, progress, "screen"))
        best = {name: min((ms, lane) for lane, ms in screened.items() if lane[0] == name)[1] for name, _ in screened}
        for lane in lanes.keys() - set(best.values()):
            lanes[lane].close()
        finalists = {lane: lanes[lane] for lane in best.values()}
        blocks = _alternate(finalists, rounds.counting, rng, failed, progress, "measure")
    laps = {
        lane[0]: Lap(
            setting=lane[1],
            blocks_ms=tuple(found),
            screened_ms={setting: ms for (name, setting), ms in screened.items() if name == lane[0]},
        )
        for lane, found in blocks.items()
    }
    return laps, {name: why for name, why in failed.items() if name not in laps}


class _Runner:
    """A loaded and warm candidate, and how many runs make a block of about 50 ms of it."""

    def __init__(self, candidate: Candidate, limits: LimitsPlan) -> None:
        self._child = Child("fofa_deploy.measure:Runner", candidate, seconds=limits.run_seconds)
        times, started, runs = [1], time.monotonic(), 0
        while runs < WARM_RUNS or time.monotonic() - started < WARM_SECONDS:
            times, runs = self._child.call("block", runs=5), runs + 5
        self._size = timing.block_runs(times)

    def block(self) -> float:
        """Median milliseconds of a block's runs, those left out in which the caches still belonged to another."""
        time.sleep(PAUSE_SECONDS)
        return median(self._child.call("block", runs=SETTLE_RUNS + self._size)[SETTLE_RUNS:]) / 1e6

    def close(self) -> None:
        self._child.close()

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _alternate(
    lanes: Mapping[Lane, _Runner], rounds: int, rng: random.Random, failed: dict[str, str], progress: Progress, name: str
) -> dict[Lane, list[float]]:
    """One block of everybody per round, in an order shuffled anew; who fails in between is out."""
    found: dict[Lane, list[float]] = {lane: [] for lane in lanes}
    with progress.task(name, rounds) as task:
        for _ in range(rounds):
            for lane in rng.sample(list(found), len(found)):
                try:
                    found[lane].append(lanes[lane].block())
                except FofaError as error:
                    failed[lane[0]] = error.message.splitlines()[0]
                    del found[lane]
            task.advance(1)
    return found


def _medians(blocks: Mapping[Lane, Sequence[float]]) -> dict[Lane, float]:
    return {lane: median(found) for lane, found in blocks.items()}
