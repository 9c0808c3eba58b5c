"""Is ours faster? Ratios with their intervals, and the goals made of them. Ratios above 1: the peer takes longer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from contest import Lap
from entries import Entry, Field
from scipy import stats

from fofa_deploy.types import Frozen

KEPT_ACCURACY, KEPT_AGREEMENT, AHEAD = 0.99, 0.97, 1.5
CONFIDENCE = 0.95


class Ratio(Frozen):
    """How many times longer, with its 95 % interval."""

    value: float
    low: float
    high: float


class Goal(Frozen):
    """``met`` leaves open what the interval leaves open."""

    name: str
    wanted: float
    ours: str = ""
    peer: str = ""
    ratio: Ratio | None = None
    met: Literal["yes", "open", "no", "no peer"]


class Race(Frozen):
    """One interleaved measurement of a model: everybody's blocks, who was deployed, and why others are missing."""

    target: str
    laps: dict[str, Lap]
    missing: dict[str, str]
    chosen: tuple[str, ...] = ()
    measured_at: str = ""
    load_average: float | None = None
    key: str = ""
    seconds: float = 0.0


def p50(lap: Lap) -> float:
    """Median over heats of each heat's median."""
    return float(np.median(_medians(lap)))


def ratio(slower: Sequence[Lap], faster: Sequence[Lap]) -> Ratio:
    """Geometric mean over heats and pairs of (median of the one / median of the other).

    The interval is Student's over heats: who ran in the same heat is compared with each other, so what disturbed both
    cancels, and what differs between two processes of the same artifact does not.
    """
    logs = np.mean([np.log(_medians(top) / _medians(bottom)) for top, bottom in zip(slower, faster, strict=True)], axis=0)
    middle, half = logs.mean(), stats.t.ppf((1 + CONFIDENCE) / 2, len(logs) - 1) * stats.sem(logs)
    return Ratio(value=math.exp(middle), low=math.exp(middle - half), high=math.exp(middle + half))


def _medians(lap: Lap) -> np.ndarray:
    return np.median(lap.heats_ms, axis=1)


def good(entry: Entry, field: Field) -> bool:
    """Whether it keeps 99 % of the float model's accuracy; without labels, 97 % of its answers."""
    found = entry.tested
    if found is None:
        return False
    if field.top1 is not None:
        return found.top1 is not None and found.top1 >= KEPT_ACCURACY * field.top1
    return found.agreement >= KEPT_AGREEMENT


def goals(field: Field, race: Race) -> list[Goal]:
    """The three questions, answered for one race. Every name in a race is an entry that was tested and timed."""
    entries = {entry.key: entry for entry in field.entries if entry.key in race.laps and entry.tested}
    mine = [entry for entry in entries.values() if entry.side == "ours"]
    peers = [entry for entry in entries.values() if entry.side == "peer"]
    return [_at_accuracy(field, race, mine, peers), _at_fidelity(race, mine, peers), _ahead_of_defaults(race, mine, peers)]


def _at_accuracy(field: Field, race: Race, mine: Sequence[Entry], peers: Sequence[Entry]) -> Goal:
    name = f"at >= {KEPT_ACCURACY:.0%} of fp32's accuracy" if field.labelled else f"at >= {KEPT_AGREEMENT:.0%} agreement with fp32"
    kept = [entry for entry in mine if good(entry, field)]
    deployed = [entry for entry in kept if entry.key in race.chosen]
    return _against(race, name, _fastest(race, deployed or kept), _fastest(race, [p for p in peers if good(p, field)]))


def _at_fidelity(race: Race, mine: Sequence[Entry], peers: Sequence[Entry]) -> Goal:
    rival = _fastest(race, peers)
    as_close = [entry for entry in mine if rival and _agreement(entry) >= _agreement(rival)]
    return _against(race, "at the fidelity of the fastest peer", _fastest(race, as_close), rival)


def _ahead_of_defaults(race: Race, mine: Sequence[Entry], peers: Sequence[Entry]) -> Goal:
    name = "geometric mean over the peers' defaults"
    best = _fastest(race, [entry for entry in mine if entry.key in race.chosen])
    defaults = [entry.key for entry in peers if entry.default]
    if best is None or not defaults:
        return Goal(name=name, wanted=AHEAD, met="no" if best is None else "no peer")
    found = ratio([race.laps[peer] for peer in defaults], [race.laps[best.key]] * len(defaults))
    return Goal(name=name, wanted=AHEAD, ours=best.key, peer=", ".join(defaults), ratio=found, met=_met(found, AHEAD))


def _against(race: Race, name: str, best: Entry | None, rival: Entry | None) -> Goal:
    if best is None or rival is None:
        met = "no peer" if rival is None else "no"
        return Goal(name=name, wanted=1.0, ours=best.key if best else "", peer=rival.key if rival else "", met=met)
    found = ratio([race.laps[rival.key]], [race.laps[best.key]])
    return Goal(name=name, wanted=1.0, ours=best.key, peer=rival.key, ratio=found, met=_met(found, 1.0))


def _met(found: Ratio, wanted: float) -> Literal["yes", "open", "no"]:
    if found.low >= wanted:
        return "yes"
    return "open" if found.high >= wanted else "no"


def _fastest(race: Race, entries: Sequence[Entry]) -> Entry | None:
    return min(entries, key=lambda entry: p50(race.laps[entry.key]), default=None)


def _agreement(entry: Entry) -> float:
    assert entry.tested
    return entry.tested.agreement
