"""One artifact's folder on a device, without the run that it came from: how fast there, and how near to its outputs here."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

from fofa_deploy.backend import get_backend
from fofa_deploy.errors import ChildError, StageError, UnavailableError, UserError
from fofa_deploy.files import FileRow, Subject, noise
from fofa_deploy.isolate import run_isolated
from fofa_deploy.measure import Candidate
from fofa_deploy.progress import Progress
from fofa_deploy.remote.bundle import Job, write_bundle
from fofa_deploy.remote.device import Place, examine, job_of
from fofa_deploy.remote.results import Failed, Timed, compare_outputs
from fofa_deploy.tune import Settings
from fofa_deploy.types import Artifact, Frozen, HardwareProfile

IMAGES = 8


class OutputsRequest(Frozen):
    """An artifact, and a ``golden.npz`` that has its inputs and is to have its outputs."""

    artifact: Path
    profile: HardwareProfile
    golden: Path


class Done(Frozen):
    outputs: int


def add_outputs(request: OutputsRequest) -> Done:
    """What the artifact says here; runs in a child process."""
    artifact = Artifact.load(request.artifact)
    with np.load(request.golden, allow_pickle=False) as arrays:
        images = arrays["images"]
    with get_backend(artifact.backend).load(artifact, request.profile) as session:
        logits = session.run({artifact.sidecar.input.name: images})[artifact.sidecar.output.name]
    np.savez(request.golden, images=images, logits=logits)
    return Done(outputs=len(logits))


def measure_there(subject: Subject, place: Place, settings: Settings, progress: Progress) -> list[FileRow]:
    """One row per line of the grid; where it failed, the reason."""
    progress.say(f"{place.name}: {subject.path}")
    target = f"{subject.profile.name} on {place.name}"
    try:
        examine(place, subject.profile)
        with tempfile.TemporaryDirectory() as scratch:
            golden = Path(scratch) / "golden.npz"
            images = noise(subject, IMAGES, {}, settings.seed)[subject.inputs[0].name]
            np.savez(golden, images=images)
            return _measured(subject, place, golden, settings, target)
    except (StageError, UserError, UnavailableError) as error:
        return [subject.row({}, error, None, target)]


def _measured(subject: Subject, place: Place, golden: Path, settings: Settings, target: str) -> list[FileRow]:
    candidate = Candidate(artifact=subject.path, profile=subject.profile, golden=golden)
    job = job_of(candidate, settings)
    results = place.run(lambda out: write_bundle(candidate, job, out), job.seconds)
    if results.error:
        raise ChildError(results.error, "mend it there, then run the same command again")
    spec, lines = subject.inputs[0], results.answers(job)
    rows = []
    for line in lines:
        shape = (line.batch, *(side or 1 for side in spec.shape[1:]))
        found = ChildError(line.error, "see there") if isinstance(line, Failed) else line.measurement(job.artifact_sha256)
        rows.append(subject.row({spec.name: shape}, found, results.machine(), target))
    if isinstance(lines[0], Timed):
        rows[0] = rows[0].model_copy(update=_compared(lines[0], job, candidate, settings))
    return rows


def _compared(line: Timed, job: Job, candidate: Candidate, settings: Settings) -> dict[str, object]:
    """What the outputs there are beside those of the same files here. Told, not judged: CPUs differ in how they round int8."""
    request = OutputsRequest(artifact=candidate.artifact, profile=candidate.profile, golden=candidate.golden)
    try:
        run_isolated("fofa_deploy.remote.folder:add_outputs", request, Done, seconds=settings.limits.run_seconds)
    except (StageError, UserError, UnavailableError) as error:
        return {"reason": f"outputs not compared: {error.message.splitlines()[0]}"}
    found = compare_outputs(line, job, candidate.golden)
    words = f"relative error {found.relative_error:.1g} against the outputs here" if found.relative_error is not None else ""
    words = words if found.finite else "gives NaN or infinity there"
    return {"compared": found, "reason": words}
