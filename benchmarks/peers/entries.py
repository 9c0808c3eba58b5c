"""Who stands at the start for a model: all that the project's tuner tried and all that the peers built, each held to PyTorch."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

import numpy as np
from peers import BUILD_SECONDS, NotBuiltError, Peer, build

from fofa_deploy.config import LimitsPlan
from fofa_deploy.errors import FofaError
from fofa_deploy.isolate import run_isolated
from fofa_deploy.measure import Candidate
from fofa_deploy.metrics import topk
from fofa_deploy.profile import find_profile
from fofa_deploy.progress import Progress
from fofa_deploy.results import Comparison, RunReport, TargetRow
from fofa_deploy.store import digest, write_atomic
from fofa_deploy.tune import Tuner, with_threads
from fofa_deploy.types import Execution, Frozen, HardwareProfile, Status
from fofa_deploy.verify import Verification, VerifyRequest

TARGETS = {"onnxruntime": "cpu-onnxruntime", "openvino": "cpu-openvino", "torch": "cpu-onnxruntime"}
"""Runtime -> the profile that says how it is run here."""

AS_IT_COMES = "as it comes"
SIBLINGS = "siblings.json"
"""Rows of recipes that the search had no reason to try, in the model's folder."""
BATCHES = {"torch": 8}
LIMITS = LimitsPlan(run_seconds=900, build_seconds=1800)


class Entry(Frozen):
    """One artifact of one side; or why there is none."""

    name: str
    side: Literal["ours", "peer"]
    runtime: str
    description: str
    folder: Path | None = None
    default: bool = False
    reference: bool = False
    precision: str = ""
    sha256: str = ""
    size_bytes: int = 0
    build_seconds: float | None = None
    versions: dict[str, str] | None = None
    tested: Comparison | None = None
    failure: str = ""
    status: str = ""  # of ours, as the tuner's report says

    @property
    def key(self) -> str:
        """Its name among all entries of a model; recipes of two runtimes share theirs."""
        return f"{self.runtime}/{self.name}" if self.side == "ours" else self.name


class Field(Frozen):
    """All entries of a model, and what the float model itself answers on the images that they are judged by."""

    model: str
    parameters: int
    labelled: bool
    images: int
    top1: float | None
    entries: tuple[Entry, ...]


def settings(entry: Entry) -> dict[str, HardwareProfile]:
    """Every documented way to run an entry: the better one counts."""
    profile = with_threads(find_profile(TARGETS[entry.runtime]), Execution().thread_count)
    if entry.runtime == "onnxruntime":
        return {"spinning": _spinning(profile, True), "no spinning": _spinning(profile, False)}
    if entry.runtime == "openvino":
        plain = {AS_IT_COMES: with_threads(profile, 0)} if entry.side == "peer" else {}
        return {"latency hint": profile, **plain}
    return {AS_IT_COMES: profile}


def _spinning(profile: HardwareProfile, value: bool) -> HardwareProfile:
    return profile.model_copy(update={"execution": profile.execution.model_copy(update={"spinning": value})})


def candidates(entry: Entry, golden: Path) -> dict[str, Candidate]:
    assert entry.folder
    return {name: Candidate(artifact=entry.folder, profile=p, golden=golden) for name, p in settings(entry).items()}


# --- ours ---------------------------------------------------------------------------------------------------------


def rows_of(run: Path, target: str) -> list[TargetRow]:
    """What the tuner tried for a target, as the pipeline's report tells it."""
    report = RunReport.model_validate_json((run / "report.json").read_bytes())
    return [row for row in report.targets if row.target == target]


def ours(work: Path, runtime: str) -> Iterator[Entry]:
    """What the tuner tried, and the rest of the family of what it deploys."""
    run, target = work / "run", TARGETS[runtime]
    siblings = map(TargetRow.model_validate, json.loads((work / SIBLINGS).read_bytes()))
    for row in (*rows_of(run, target), *(row for row in siblings if row.target == target)):
        failure = "" if row.artifact else row.reason
        yield Entry(
            name=row.recipe,
            side="ours",
            runtime=runtime,
            description=row.description,
            folder=(run / row.artifact).absolute() if row.artifact else None,
            failure=failure,
            status=row.status,
            size_bytes=row.size_bytes or 0,
            sha256=row.sha256 or "",
        )


def choice(tuner: Tuner, rows: list[TargetRow], p50_ms: Mapping[str, float]) -> str | None:
    """The recipe that the tuner deploys at these latencies, of the ones that it verified."""
    profile = find_profile(rows[0].target)
    timed = [
        row.model_copy(update={"latency_ms": row.latency_ms.model_copy(update={"p50": p50_ms[row.recipe]})})
        for row in rows
        if row.recipe in p50_ms and row.latency_ms and row.status is Status.VERIFIED
    ]
    plain = [row.model_copy(update={"chosen": False}) for row in timed]
    return next((row.recipe for row in tuner.choose(profile, plain) if row.chosen), None)


# --- peers --------------------------------------------------------------------------------------------------------


def built(peer: Peer, work: Path, environments: Path) -> Entry:
    entry = Entry(
        name=peer.name,
        side="peer",
        runtime=peer.runtime,
        description=peer.description,
        default=peer.default,
        reference=peer.reference,
        precision=peer.precision,
    )
    try:
        artifact, took = build(peer, work / "job" / "job.json", (work / "peers" / peer.name).absolute(), environments)
    except NotBuiltError as error:
        return entry.model_copy(update={"failure": str(error)})
    except subprocess.TimeoutExpired:
        return entry.model_copy(update={"failure": f"took longer than {BUILD_SECONDS} s"})
    facts = {"folder": artifact.folder, "sha256": artifact.sha256, "size_bytes": artifact.size_bytes}
    return entry.model_copy(update={**facts, "build_seconds": took["seconds"], "versions": took["versions"]})


# --- both alike ---------------------------------------------------------------------------------------------------


def tested(entry: Entry, work: Path, labelled: bool) -> Entry:
    """The entry with its answers on the test images held to PyTorch's; the same function for everybody, kept by content."""
    if entry.folder is None:
        return entry
    run, profile = work / "run", next(iter(settings(entry).values()))
    kept = work / "tested" / f"{digest([entry.sha256, entry.folder / 'artifact.json', run / 'expected'])[:24]}.json"
    if kept.is_file():
        return entry.model_copy(update={"tested": Comparison.model_validate_json(kept.read_bytes())})
    request = VerifyRequest(
        artifact=entry.folder,
        profile=profile,
        golden=run / "graph" / "golden.npz",
        split=run / "data" / "test",
        expected=run / "expected" / "test.npy",
        labelled=labelled,
        batch_size=BATCHES.get(entry.runtime, 32),
    )
    try:
        found = run_isolated("fofa_deploy.verify:verify", request, Verification, seconds=LIMITS.run_seconds).whole
    except FofaError as error:
        return entry.model_copy(update={"failure": error.message.splitlines()[-1][:300]})
    assert found
    kept.parent.mkdir(exist_ok=True)
    write_atomic(kept, found.model_dump_json(indent=1).encode())
    return entry.model_copy(update={"tested": found})


def field_of(model: str, work: Path, runtimes: set[str], peers: list[Peer], environments: Path, progress: Progress) -> Field:
    """Collect, build and test everybody; kept as ``field.json`` in the model's folder."""
    run = work / "run"
    report = RunReport.model_validate_json((run / "report.json").read_bytes())
    found = [entry for runtime in sorted(runtimes - {"torch"}) for entry in ours(work, runtime)]
    for peer in peers:
        progress.say(f"{model}: {peer.name}")
        found.append(built(peer, work, environments))
        if found[-1].failure:
            progress.say(f"  failed: {found[-1].failure}")
    labels = np.load(run / "data" / "test" / "labels.npy")
    labelled = report.student.top1 is not None
    logits = np.load(run / "expected" / "test.npy")
    field = Field(
        model=model,
        parameters=report.student.params,
        labelled=labelled,
        images=len(logits),
        top1=topk(logits, labels, 1) if labelled else None,
        entries=tuple(tested(entry, work, labelled) for entry in found),
    )
    write_atomic(work / "field.json", field.model_dump_json(indent=1).encode())
    return field
