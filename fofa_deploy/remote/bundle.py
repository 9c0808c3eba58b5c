"""A job for a device as one zip file: artifact, sidecar, golden inputs, and the runner that measures them there."""

from __future__ import annotations

import hashlib
import io
import zipfile
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from fofa_deploy.config import LimitsPlan, MeasurePlan
from fofa_deploy.measure import Candidate
from fofa_deploy.types import Artifact, Frozen, Scalar
from fofa_deploy.verify import CHECKED_BATCHES

RUNNER = ("energy.py", "job.py", "layers.py", "machine.py", "receive.py", "runtimes.py", "timing.py")
GOLDEN, JOB, RUN = "golden.npy", "job.json", "run.py"
START = """import sys
from pathlib import Path

sys.dont_write_bytecode = True
from fofa_deploy.runner.job import main  # the folder beside this file

main(Path(__file__).resolve().parent, sys.argv[1:])
"""
DATE = (1980, 1, 1, 0, 0, 0)


class Line(Frozen):
    """One row of a grid. ``threads`` 0 is every core that the job may use there."""

    batch: PositiveInt
    threads: NonNegativeInt


class Job(Frozen):
    """What the runner is asked to do; it reads this as plain JSON."""

    schema_version: Literal[1] = 1
    target: str
    recipe: str
    runtime: str
    options: dict[str, Scalar]
    artifact_sha256: str
    main: str
    files: dict[str, str]
    input: str
    output: str
    device_kind: str
    device_name: str
    spinning: bool
    grid: tuple[Line, ...] = Field(min_length=1)
    checked: tuple[PositiveInt, ...] = CHECKED_BATCHES
    measure: MeasurePlan
    build_seconds: PositiveFloat
    run_seconds: PositiveFloat
    memory_bytes: PositiveInt | None

    @property
    def seconds(self) -> float:
        """Longest time that the whole job may take."""
        return self.build_seconds + len(self.grid) * self.run_seconds + 60


def golden_images(golden: Path) -> bytes:
    """The inputs of a ``golden.npz`` as an .npy file; the expected outputs stay here, where they are compared."""
    with np.load(golden, allow_pickle=False) as arrays, io.BytesIO() as stream:
        np.save(stream, arrays["images"])
        return stream.getvalue()


def job_for(candidate: Candidate, lines: Iterable[Line], measure: MeasurePlan, limits: LimitsPlan) -> Job:
    """What a device is asked about a candidate.

    Raises:
        IntegrityError: the artifact's files are not the recorded ones.
    """
    artifact, profile = Artifact.load(candidate.artifact), candidate.profile
    golden = hashlib.sha256(golden_images(candidate.golden)).hexdigest()
    return Job(
        target=profile.name,
        recipe=artifact.recipe.name,
        runtime=artifact.backend,
        options=artifact.recipe.options,
        artifact_sha256=artifact.sha256,
        main=artifact.files[0].path,
        files={record.path: record.sha256 for record in artifact.files} | {GOLDEN: golden},
        input=artifact.sidecar.input.name,
        output=artifact.sidecar.output.name,
        device_kind=profile.device.kind,
        device_name=profile.device.name,
        spinning=profile.execution.spinning,
        grid=tuple(lines),
        measure=measure,
        build_seconds=limits.build_seconds,
        run_seconds=limits.run_seconds,
        memory_bytes=limits.memory_bytes,
    )


def write_bundle(candidate: Candidate, job: Job, out: Path) -> None:
    """Write the zip file ``out``: the same bytes for the same job."""
    artifact = Artifact.load(candidate.artifact)
    content: list[tuple[str, bytes | Path]] = [
        (GOLDEN, golden_images(candidate.golden)),
        (JOB, job.model_dump_json(indent=1).encode()),
        ("artifact.json", artifact.model_dump_json(indent=1).encode()),
        ("sidecar.json", artifact.sidecar.model_dump_json(indent=1).encode()),
    ]
    _zip(out, [*_runner(), *content, *((record.path, artifact.folder / record.path) for record in artifact.files)])


def write_question(out: Path) -> None:
    """A bundle without a job: its results tell what the device is."""
    _zip(out, _runner())


def _runner() -> list[tuple[str, bytes | Path]]:
    package = files("fofa_deploy.runner")
    sources: list[tuple[str, bytes | Path]] = [
        (f"fofa_deploy/runner/{name}", package.joinpath(name).read_bytes()) for name in RUNNER
    ]
    return [(RUN, START.encode()), ("fofa_deploy/__init__.py", b""), ("fofa_deploy/runner/__init__.py", b""), *sources]


def _zip(out: Path, entries: Iterable[tuple[str, bytes | Path]]) -> None:
    with zipfile.ZipFile(out, "w") as archive:  # stored: weights do not shrink
        for name, content in entries:
            entry = zipfile.ZipInfo(name, DATE)
            entry.external_attr = 0o100644 << 16
            data = content.read_bytes() if isinstance(content, Path) else content
            archive.writestr(entry, data)
