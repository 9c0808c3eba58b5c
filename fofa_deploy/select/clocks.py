"""Where candidates are timed: side by side on this machine, or one after another on a device elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Protocol

from fofa_deploy import environment
from fofa_deploy.errors import BackendError, ChildError, FofaError
from fofa_deploy.measure import Candidate, measure
from fofa_deploy.progress import Progress
from fofa_deploy.remote.bundle import write_bundle
from fofa_deploy.remote.device import Place, examine, job_of, places
from fofa_deploy.remote.results import Failed
from fofa_deploy.results import Measurement
from fofa_deploy.tune import Settings
from fofa_deploy.types import HardwareProfile, Probe


class Clock(Protocol):
    """Times artifacts on one device."""

    @property
    def fingerprint(self) -> str:
        """Of the device."""
        ...

    def times(self, group: Sequence[Candidate], settings: Settings, progress: Progress) -> list[Measurement | FofaError]:
        """One answer per candidate, in their order, by the first batch size of its profile.

        Raises:
            BackendError: the device was lost; what it says of nobody is told of nobody.
        """
        ...


@dataclass(frozen=True)
class Here:
    """This machine: all of a group in turns, in one run."""

    @cached_property
    def fingerprint(self) -> str:
        return environment.describe().fingerprint

    def times(self, group: Sequence[Candidate], settings: Settings, progress: Progress) -> list[Measurement | FofaError]:
        return measure(group, settings.measure, settings.limits, settings.seed, progress)


@dataclass(frozen=True)
class There:
    """A device elsewhere: a bundle per candidate, sent, timed and answered before the next one is."""

    place: Place
    fingerprint: str

    def times(self, group: Sequence[Candidate], settings: Settings, progress: Progress) -> list[Measurement | FofaError]:
        with progress.task(f"measure on {self.place.name}", len(group)) as task:
            found = []
            for candidate in group:
                found.append(self._time(candidate, settings))
                task.advance(1)
        return found

    def _time(self, candidate: Candidate, settings: Settings) -> Measurement | FofaError:
        try:
            return self._asked(candidate, replace(settings, batches=(candidate.batch,), threads=()))
        except BackendError:
            raise
        except FofaError as error:
            return error

    def _asked(self, candidate: Candidate, settings: Settings) -> Measurement:
        job = job_of(candidate, settings)
        results = self.place.run(lambda out: write_bundle(candidate, job, out), job.seconds)
        if results.error:
            raise ChildError(results.error, "mend it there, then run the same command again")
        (line,) = results.answers(job)
        if isinstance(line, Failed):
            raise ChildError(line.error, "see there")
        if results.machine().fingerprint != self.fingerprint:
            raise BackendError(f"{self.place.name} is another device than it was", "run the same command again")
        return line.measurement(job.artifact_sha256)


def clock_for(profile: HardwareProfile, probe: Probe) -> Clock:
    """The clock of the device that the profile names, else of this machine.

    Raises:
        BackendError: this machine cannot run the target.
        UnavailableError: the device is another kind than the profile's, or lacks the runtime.
        FofaError: it does not answer.
    """
    devices = places(profile)
    if devices:
        return There(devices[0], examine(devices[0], profile).machine().fingerprint)
    if not probe.can_run:
        raise BackendError(f"{profile.name} does not run here: {probe.reason}", "run fofa-deploy doctor")
    return Here()
