"""What one would do otherwise: three usual ways to a small deployed model, by their tools' own defaults.

The tools are run by benchmarks/peers, each in a process that knows nothing of this project, and their models by the runtime that
they are made for. Both targets are the same CPU, so a rival may be used for either.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "select"))
sys.path.append(str(HERE.parent / "peers"))
from backends import register  # noqa: E402 - from other benchmarks
from peers import PEERS, NotBuiltError, Peer, build  # noqa: E402
from workroom import Task, Workroom  # noqa: E402

from fofa_deploy.isolate import run_isolated  # noqa: E402
from fofa_deploy.measure import Candidate  # noqa: E402
from fofa_deploy.pipeline import Run  # noqa: E402
from fofa_deploy.profile import find_profile  # noqa: E402
from fofa_deploy.store import digest, write_atomic  # noqa: E402
from fofa_deploy.tune import with_threads  # noqa: E402
from fofa_deploy.types import Artifact, Execution, Fraction, Frozen, Graph, HardwareProfile  # noqa: E402
from fofa_deploy.verify import Verification, VerifyRequest  # noqa: E402

__all__ = ["WAYS", "NotBuiltError", "Way", "register", "tested", "treat"]


class Way(Frozen):
    """A usual way: how the student is trained (None: it is the teacher itself), and who quantizes it."""

    name: str
    title: str
    method: str | None
    peer: str
    target: str
    """The profile of the runtime that its tool is made for."""


WAYS = (
    Way(name="teacher", title="the teacher, NNCF's defaults", method=None, peer="nncf-default", target="cpu-openvino"),
    Way(
        name="alone", title="trained alone, quantize_static's defaults", method="alone",
        peer="ort-static-default", target="cpu-onnxruntime",
    ),
    Way(name="kd", title="plain KD, NNCF's defaults", method="kd", peer="nncf-default", target="cpu-openvino"),
)  # fmt: skip


class Treated(Frozen):
    """What a way's tool made of a model."""

    way: Way
    task: Task | None
    """None: the teacher."""
    artifact: Path
    run: Path

    @property
    def candidate(self) -> Candidate:
        return Candidate(artifact=self.artifact, profile=profile_of(self.way), golden=self.run / "graph" / "golden.npz")


def profile_of(way: Way) -> HardwareProfile:
    """As the project runs its own there: for latency, with every core."""
    return with_threads(find_profile(way.target), Execution().thread_count)


def treat(room: Workroom, way: Way, task: Task | None) -> Treated:
    """Quantize the graph of a task's student, or of the teacher, as the way's tool does it by default; once per graph.

    Raises:
        NotBuiltError: the tool fails on it.
    """
    with _opened(room, task) as run:
        folder = (room.folder / "rivals" / (task.name if task else "teacher")).absolute()
        job = _write_job(run, folder)
        try:
            artifact, _ = build(_peer(way), job, folder / way.peer, room.folder / "environments")
        except subprocess.TimeoutExpired as error:
            raise NotBuiltError(f"took longer than {error.timeout:g} s") from error
        _ = run.expected, run.splits
        return Treated(way=way, task=task, artifact=artifact.folder, run=run.store.root.absolute())


@contextmanager
def _opened(room: Workroom, task: Task | None) -> Iterator[Run]:
    with room.run(task) if task else room.teacher_run() as run:
        yield run


def _peer(way: Way) -> Peer:
    return next(peer for peer in PEERS if peer.name == way.peer)


def _write_job(run: Run, folder: Path) -> Path:
    """What benchmarks/peers tells its tools, as far as these ones ask."""
    folder.mkdir(parents=True, exist_ok=True)
    graph = Graph.load(run.graph)
    calibration = folder / "calibration.npy"
    np.save(calibration, graph.sidecar.preprocessing.apply(np.load(run.splits / "calibration" / "images.npy")))
    told = {
        "graph": str(graph.path.absolute()),
        "sha256": graph.sha256,
        "input": graph.sidecar.input.name,
        "calibration": str(calibration),
    }
    write_atomic(folder / "job.json", json.dumps(told, indent=1).encode())
    return folder / "job.json"


def tested(found: Treated) -> Fraction:
    """Of a rival's artifact on the test images, by the same comparison as for ours; kept beside it.

    Raises:
        FofaError: it does not run.
    """
    key = digest([Artifact.load(found.artifact).sha256, found.run / "expected" / "manifest.json"])
    kept = found.artifact.with_name(f"{found.artifact.name}-tested-{key[:16]}.json")
    if not kept.is_file():
        request = VerifyRequest(
            artifact=found.artifact,
            profile=profile_of(found.way),
            golden=found.run / "graph" / "golden.npz",
            split=found.run / "data" / "test",
            expected=found.run / "expected" / "test.npy",
        )
        write_atomic(kept, run_isolated("fofa_deploy.verify:verify", request, Verification, seconds=900).model_dump_json().encode())
    whole = Verification.model_validate_json(kept.read_bytes()).whole
    assert whole is not None
    assert whole.top1 is not None
    return whole.top1
