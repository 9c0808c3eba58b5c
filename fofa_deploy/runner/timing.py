"""The one timing loop, and how long a sample has to be."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from fofa_deploy.runner.energy import Meter

BLOCK_SECONDS = 0.05


def timed(run: Callable[[], object], runs: int) -> list[int]:
    """Nanoseconds of each of ``runs`` calls; garbage collection waits."""
    times = []
    gc.disable()
    try:
        for _ in range(runs):
            started = time.perf_counter_ns()
            run()
            times.append(time.perf_counter_ns() - started)
    finally:
        gc.enable()
    return times


def runs_for(quantile: float) -> int:
    """Runs that a percentile needs: with this many, one lies above it with 99.87 % certainty (binomial, three sigma)."""
    return math.ceil(math.log(0.0013) / math.log(quantile))


def block_runs(times: Sequence[int]) -> int:
    """How many runs fill a block of about 50 ms."""
    return max(1, min(100, round(BLOCK_SECONDS * 1e9 / max(sorted(times)[len(times) // 2], 1))))


def share(times: Sequence[int], seconds: float, max_seconds: float) -> float:
    """How much of a sample there is, in [0, 1]: 1 where it is long enough, and large enough for its 99th percentile or too slow
    to wait for that."""
    took = sum(times) / 1e9
    return min(1.0, max(min(took / seconds, len(times) / runs_for(0.99)), took / max_seconds))


def steady(run: Callable[[], object], plan: dict[str, Any], meter: Meter) -> tuple[list[int], int]:
    """Warm up by time and by count, then measure in blocks: nanoseconds per run, and how many warmed up."""
    warmup, times, started = 0, [1], time.monotonic()
    while warmup < plan["warmup_runs"] or time.monotonic() - started < plan["warmup_seconds"]:
        times, warmup = timed(run, 5), warmup + 5
    size, times = block_runs(times), []
    while share(times, plan["seconds"], plan["max_seconds"]) < 1:
        with meter.over(size):
            times += timed(run, size)
    return times, warmup
