"""Artifacts on devices elsewhere: each is sent, verified and timed there, and becomes a row like any other."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from fofa_deploy.environment import cpu_mismatch
from fofa_deploy.errors import FofaError, IntegrityError, StageError, UnavailableError, UserError
from fofa_deploy.judge import elsewhere_problem
from fofa_deploy.measure import Candidate, patient
from fofa_deploy.remote.bundle import Job, Line, job_for, write_bundle, write_question
from fofa_deploy.remote.results import Failed, Results, Timed, compare_outputs, read_results
from fofa_deploy.remote.transport import ADB, Adb, Ssh, Transport, exchange
from fofa_deploy.results import LayerCost, TargetRow
from fofa_deploy.roofline import costs
from fofa_deploy.runner.runtimes import MODULES
from fofa_deploy.schema import validate
from fofa_deploy.tune import Settings, Tuner, timings
from fofa_deploy.types import Artifact, Device, HardwareProfile, LayerTime, Status

QUESTION_SECONDS = 60.0
SENT = (Status.VERIFIED, Status.BUILT_NOT_RUN)
CARRIED = "elsewhere"
"""The host of a device that nothing but a bundle reaches."""
NOT_FROM_HERE = {"latency_ms": None, "measurement": None, "environment": None, "speedup": None, "chosen": False}


@dataclass(frozen=True)
class Place:
    """A device, and the Python there that has numpy and the runtime."""

    transport: Transport
    python: str = "python3"

    @property
    def name(self) -> str:
        return self.transport.name

    def run(self, write: Callable[[Path], object], seconds: float) -> Results:
        """Write a bundle, run it there and read its results."""
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(folder) / "bundle.zip"
            write(bundle)
            return read_results(exchange(self.transport, self.python, bundle, seconds), self.name)


def examine(place: Place, profile: HardwareProfile) -> Results:
    """What the device is, when it is the profile's and can run its artifacts.

    Raises:
        UnavailableError: it is another kind of device, or lacks the runtime or numpy.
        FofaError: it does not answer; see `exchange`.
    """
    told = place.run(write_question, QUESTION_SECONDS)
    found = told.machine()
    if problem := cpu_mismatch(profile, found.machine, told.flags):
        raise UnavailableError(f"{place.name} is not a {profile.name}: {problem}", "choose the profile of that device")
    if profile.runtime not in MODULES:
        raise UnavailableError(f"{profile.runtime} runs on this machine only", f"choose a profile of {', '.join(MODULES)}")
    packages = ((profile.runtime, f"{profile.runtime}-gpu"), ("numpy",))
    if missing := [names[0] for names in packages if not found.versions.keys() & set(names)]:
        action = f"there: {place.python} -m pip install {' '.join(missing)}; or name another Python with --python"
        raise UnavailableError(f"{place.name} has no {' and no '.join(missing)} for {place.python}", action)
    return told


def places(
    profile: HardwareProfile, hosts: Sequence[str] = (), python: str | None = None, config: Path | None = None
) -> list[Place]:
    """The devices to measure on: those named, else the profile's own; none is this machine.

    Raises:
        PlanError: a name is not that of a host.
    """
    own = profile.device
    devices = [own.model_copy(update={"host": host}) for host in hosts] or [own]
    told = [device.model_dump() | {"python": python or device.python} for device in devices if device.host is not None]
    checked = [validate(device, Device, "the device's address") for device in told]
    return [Place(_transport(str(device.host), config), device.python) for device in checked]


def _transport(host: str, config: Path | None) -> Transport:
    return Adb(host.removeprefix(ADB)) if host.startswith(ADB) else Ssh(host, config)


def aimed(profile: HardwareProfile, host: str | None) -> HardwareProfile:
    """The profile of a GPU or NPU as one that is on ``host``, where it does not say where it is: some build their artifacts there.

    A CPU's artifacts are built here, from what its profile says of it.

    Raises:
        PlanError: the name is not that of a host.
    """
    if host is None or profile.device.host or profile.device.kind == "cpu":
        return profile
    there = validate(profile.device.model_dump() | {"host": host}, Device, "the device's address")
    return profile.model_copy(update={"device": there})


def profile_on(devices: Sequence[Place], tuner: Tuner, profile: HardwareProfile) -> list[TargetRow]:
    """The rows of a profile's artifacts on every device, or here without one; what failed says why."""
    if not devices:
        return tuner.tune(profile)
    rows = tuner.attempt(aimed(profile, devices[0].name))
    return [row for place in devices for row in _measured(place, tuner, profile, rows)]


def _measured(place: Place, tuner: Tuner, profile: HardwareProfile, rows: Sequence[TargetRow]) -> list[TargetRow]:
    target = profile.name if place.name == profile.device.host else f"{profile.name} on {place.name}"
    there = [row.model_copy(update={**NOT_FROM_HERE, "target": target}) for row in rows]
    try:
        if any(row.status in SENT for row in there):
            examine(place, profile)
    except (StageError, UserError, UnavailableError) as error:
        return [_ended(row, Status.SKIPPED, error) if row.status in SENT else row for row in there]
    return _chosen(tuner, profile, [_sent(place, tuner, profile, row) if row.status in SENT else row for row in there])


def _chosen(tuner: Tuner, profile: HardwareProfile, rows: Sequence[TargetRow]) -> list[TargetRow]:
    """With the fastest marked, which goes on telling what else came of it there; one by itself was not compared."""
    known = {row.recipe: row.reason for row in rows}

    def told(row: TargetRow) -> str:
        return known[row.recipe] if len(rows) == 1 else f"{row.reason}; {known[row.recipe]}"

    return [row.model_copy(update={"reason": told(row)}) if row.chosen else row for row in tuner.choose(profile, rows)]


def _sent(place: Place, tuner: Tuner, profile: HardwareProfile, row: TargetRow) -> TargetRow:
    tuner.progress.say(f"{place.name}: {row.recipe}")
    candidate = tuner.candidate(profile, row)
    try:
        job = job_of(candidate, tuner.settings)
        results = place.run(lambda out: write_bundle(candidate, job, out), job.seconds)
        return _believed(results, job, candidate.golden, row, tuner)
    except (StageError, UserError, UnavailableError) as error:
        return _ended(row, Status.FAILED, error)


def job_of(candidate: Candidate, settings: Settings) -> Job:
    lines = [Line(batch=batch, threads=threads) for batch, threads in settings.lines(candidate.profile)]
    return job_for(candidate, lines, patient(settings.measure, candidate.profile.budget, settings.budget), settings.limits)


def bundle(tuner: Tuner, profiles: Sequence[HardwareProfile], out: Path) -> None:
    """Write the one artifact that is meant as a bundle.

    Raises:
        UserError: there is none, or there are several and nothing says which; or the file cannot be written.
    """
    tried = [(profile, row) for profile in profiles for row in tuner.attempt(aimed(profile, CARRIED))]
    found = [(profile, row) for profile, row in tried if row.status in SENT]
    if len(found) != 1:
        raise _unclear(found, tried[0][1].reason if tried else "none could be made", profiles[0])
    ((profile, row),) = found
    candidate = tuner.candidate(profile, row)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        write_bundle(candidate, job_of(candidate, tuner.settings), out)
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error.strerror or error}", "free space or choose another file") from error


def _unclear(found: Sequence[tuple[HardwareProfile, TargetRow]], reason: str, profile: HardwareProfile) -> UserError:
    names = ", ".join(f"--profile {p.name} --recipe {row.recipe}" for p, row in found)
    if names:
        return UserError(f"{len(found)} artifacts could be meant", f"choose one: {names}")
    return UserError(
        f"there is no artifact for {profile.name}: {reason}", "fofa-deploy quantize RUN, with the same --profile, builds it"
    )


def import_results(
    content: bytes, where: str, tuner: Tuner, profiles: Sequence[HardwareProfile], device: str | None = None
) -> TargetRow:
    """The row of a bundle that somebody carried to a device.

    Args:
        device: what to call it; by its CPU where nothing is said, and then devices of one kind are one.

    Raises:
        IntegrityError: the results are damaged, or belong to no artifact here.
        UnavailableError: they are of another kind of device.
    """
    results = read_results(content, where)
    asked = results.job
    if asked is None:
        raise IntegrityError(f"{where} does not say which bundle it belongs to", "run the bundle again there")
    profile = next((profile for profile in profiles if profile.name == asked.target), None)
    if profile is None:
        action = f"name the profile it was bundled for: --profile {asked.target}, or where that file is"
        raise IntegrityError(f"{where} belongs to none of {', '.join(p.name for p in profiles)}", action)
    if problem := cpu_mismatch(profile, results.machine().machine, results.flags):
        raise UnavailableError(f"{where} is not of a {profile.name}: {problem}", "run the bundle on that device")
    row = next((r for r in tuner.attempt(aimed(profile, CARRIED)) if r.recipe == asked.recipe and r.artifact), None)
    if row is None:
        raise IntegrityError(
            f"{where} belongs to recipe {asked.recipe!r}, which is not built here", "import it where it was bundled"
        )
    candidate = tuner.candidate(profile, row)
    job = job_for(candidate, asked.grid, asked.measure, tuner.settings.limits)
    limits = {"build_seconds": asked.build_seconds, "run_seconds": asked.run_seconds, "memory_bytes": asked.memory_bytes}
    there = row.model_copy(update={**NOT_FROM_HERE, "target": f"{profile.name} on {device or results.machine().cpu}"})
    return _chosen(tuner, profile, [_believed(results, job.model_copy(update=limits), candidate.golden, there, tuner)])[0]


def _believed(results: Results, job: Job, golden: Path, row: TargetRow, tuner: Tuner) -> TargetRow:
    """The row that results make, once they are those of this job.

    Raises:
        IntegrityError: they are not.
    """
    environment = results.machine()
    if results.error and results.job == job:
        return row.model_copy(update={"status": Status.FAILED, "reason": results.error, "environment": environment})
    first, *others = results.answers(job)
    if isinstance(first, Failed):
        return row.model_copy(update={"status": Status.FAILED, "reason": first.error, "environment": environment})
    found = compare_outputs(first, job, golden)
    artifact = Artifact.load(tuner.root / str(row.artifact))
    problem = elsewhere_problem(artifact.recipe.precision, found, row.golden, tuner.settings.accuracy)
    failed = [f"batch {line.batch}, {line.threads} threads: {line.error}" for line in others if isinstance(line, Failed)]
    facts = {
        "status": Status.REJECTED if problem else Status.VERIFIED,
        "reason": "; ".join([problem or "gives the right outputs there", *failed]),
        "golden": found,
        "other_batches": tuple(line.measurement(job.artifact_sha256) for line in others if isinstance(line, Timed)),
        "layers": _layers(results.layers, artifact),
    }
    return row.model_copy(update={**timings(first.measurement(job.artifact_sha256), environment), **facts})


def _layers(times: tuple[LayerTime, ...], artifact: Artifact) -> tuple[LayerCost, ...]:
    """The slowest first, in the precision that the layer table has for them; without limits, which were measured here."""
    table = {layer.name: layer.precision for layer in artifact.layers}
    known = tuple(time.model_copy(update={"precision": table.get(time.name, time.precision)}) for time in times)
    return tuple(sorted(costs(known, {}, None), key=lambda layer: -layer.ms))


def _ended(row: TargetRow, status: Status, error: FofaError) -> TargetRow:
    return row.model_copy(update={"status": status, "reason": error.message.splitlines()[0]})
