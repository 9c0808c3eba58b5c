"""Which entries race for which target, and the record of it."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path

from contest import Rounds, contest
from entries import LIMITS, TARGETS, Entry, Field, candidates, choice, rows_of
from verdict import Race, good, p50

from fofa_deploy import environment
from fofa_deploy.pipeline import reopened
from fofa_deploy.progress import Progress, Quiet
from fofa_deploy.store import digest, write_atomic

ANY = "any-runtime"
RUNTIMES = {"cpu-onnxruntime": "onnxruntime", "cpu-openvino": "openvino"}
FINALISTS = 2
"""Of each side and runtime, that meet PyTorch's compilers in the race of all runtimes, beside the ones that were deployed."""


def race(field: Field, target: str, work: Path, rounds: Rounds, again: bool, progress: Progress) -> Race:
    """Measure a target's entries side by side; kept until one of them changes, or ``again``."""
    started = time.monotonic()
    earlier = {name: kept(work, name) for name in RUNTIMES} if target == ANY else {}
    starters = _finalists(field, earlier) if target == ANY else _of(field, RUNTIMES[target])
    key = digest([target, rounds, {entry.key: (entry.sha256, entry.description) for entry in starters}])
    found = kept(work, target)
    if found and found.key == key and not again:
        return found
    before = environment.describe().load_average
    golden = work / "run" / "graph" / "golden.npz"
    lanes = {entry.key: candidates(entry, golden) for entry in starters}
    for lap in (lap for other in earlier.values() if other for lap in other.laps.items() if lap[0] in lanes):
        lanes[lap[0]] = {lap[1].setting: lanes[lap[0]][lap[1].setting]}
    laps, missing = contest(lanes, rounds, LIMITS, 0, progress)
    result = Race(
        target=target,
        laps=laps,
        missing=missing,
        measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        load_average=before,
        key=key,
        seconds=time.monotonic() - started,
    )
    chosen = _chosen_any(result, earlier) if target == ANY else _chosen(field, result, work / "run")
    result = result.model_copy(update={"chosen": chosen})
    write_atomic(_file(work, target), result.model_dump_json(indent=1).encode())
    return result


def kept(work: Path, target: str) -> Race | None:
    path = _file(work, target)
    return Race.model_validate_json(path.read_bytes()) if path.is_file() else None


def _file(work: Path, target: str) -> Path:
    return work / f"race-{target}.json"


def _of(field: Field, runtime: str) -> list[Entry]:
    return [entry for entry in field.entries if entry.runtime == runtime and entry.tested]


def _finalists(field: Field, earlier: dict[str, Race | None]) -> list[Entry]:
    """PyTorch's own, and of each earlier race the deployed, and of both sides the fastest and the fastest good ones."""
    found = {entry.key: entry for entry in _of(field, "torch")}
    for done in filter(None, earlier.values()):
        raced = sorted((e for e in field.entries if e.key in done.laps and e.tested), key=lambda e: p50(done.laps[e.key]))
        for side in ("ours", "peer"):
            own = [entry for entry in raced if entry.side == side]
            kept_well = [entry for entry in own if good(entry, field)]
            found |= {entry.key: entry for entry in (*own[:FINALISTS], *kept_well[:FINALISTS])}
        found |= {entry.key: entry for entry in raced if entry.key in done.chosen}
    return list(found.values())


def _chosen(field: Field, found: Race, run: Path) -> tuple[str, ...]:
    """What the tuner deploys, given these latencies."""
    runtime = RUNTIMES[found.target]
    times = {
        entry.name: p50(found.laps[entry.key]) for entry in _of(field, runtime) if entry.side == "ours" and entry.key in found.laps
    }
    with reopened(run, Quiet(), stored=True) as opened:
        recipe = choice(opened.tuner(build=False, timed=False), rows_of(run, TARGETS[runtime]), times)
    return (f"{runtime}/{recipe}",) if recipe else ()


def _chosen_any(found: Race, earlier: dict[str, Race | None]) -> tuple[str, ...]:
    """The faster one of what was deployed on each runtime."""
    deployed = [key for done in filter(None, earlier.values()) for key in done.chosen if key in found.laps]
    return tuple(sorted(deployed, key=lambda key: p50(found.laps[key]))[:1])
