"""What a device answers, believed only as far as it can be checked: schema, digests, finite numbers, golden outputs."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import AfterValidator, Field, NonNegativeFloat, PositiveFloat, ValidationError

from fofa_deploy.environment import environment_of
from fofa_deploy.errors import IntegrityError
from fofa_deploy.measure import summarize
from fofa_deploy.metrics import compare
from fofa_deploy.remote.bundle import Job
from fofa_deploy.results import Comparison, Environment, Measurement
from fofa_deploy.types import Frozen, LayerTime

AGAIN = "measure again; results.json is written by run.py alone"


def _base64(text: str) -> str:
    try:
        base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise ValueError(f"not base64: {error}") from error
    return text


Packed = Annotated[str, AfterValidator(_base64)]
Text = Annotated[str, Field(max_length=4000)]
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Number = Annotated[int, Field(gt=0, lt=1 << 63)]


class Failed(Frozen):
    batch: Number
    threads: Count
    error: Text


class Timed(Frozen):
    batch: Number
    threads: Number
    device: Text
    load_ms: NonNegativeFloat
    first_run_ms: PositiveFloat
    warmup_runs: Count
    times_ns: Packed = Field(description="int64, little endian")
    peak_rss_bytes: Number
    measured_at: Text
    energy_mj: NonNegativeFloat | None
    energy_reason: Text
    logits: Packed = Field(default="", description="float32, little endian: of the golden inputs in every checked batch size")

    def measurement(self, artifact_sha256: str) -> Measurement:
        """Raises: IntegrityError: it holds no times, or some that are none."""
        times = _unpacked(self.times_ns, "<i8")
        if not len(times) or not (times > 0).all():
            raise IntegrityError(f"the times at batch {self.batch} are none", AGAIN)
        told = self.model_dump(exclude={"times_ns", "logits"})
        cold = self.load_ms + self.first_run_ms
        try:
            return summarize(times.tolist(), cold_start_ms=cold, artifact_sha256=artifact_sha256, **told)
        except (ValueError, ArithmeticError) as error:  # numbers that no clock tells, whose sums are none
            raise IntegrityError(f"the measurement at batch {self.batch} is none: {str(error).splitlines()[0]}", AGAIN) from error


class Results(Frozen):
    """results.json."""

    schema_version: Literal[1]
    job: Job | None
    files: dict[str, str]
    lines: tuple[Timed | Failed, ...]
    layers: tuple[LayerTime, ...] = Field(default=(), max_length=100_000)
    error: Text
    environment: dict[str, Any]

    def machine(self) -> Environment:
        """Raises: IntegrityError: the facts are not those of a machine."""
        facts = dict(self.environment)
        try:
            if not all(isinstance(flag, str) for flag in facts["flags"]):
                raise TypeError("a CPU's flags are words")
            return environment_of(facts, facts.pop("versions"))
        except (KeyError, TypeError, ValueError, ArithmeticError) as error:
            raise IntegrityError(f"the results describe no machine: {error}", AGAIN) from error

    def answers(self, job: Job) -> tuple[Timed | Failed, ...]:
        """One line per line of the job. Raises: IntegrityError: they are of another job, of other files or other lines."""
        if self.job != job:
            raise IntegrityError("the results belong to another job than the one here", AGAIN)
        check_files(self.files, job.files)
        asked = [(line.batch, line.threads) for line in job.grid]
        given = [(line.batch, line.threads) for line in self.lines]
        if len(asked) != len(given) or any(a[0] != g[0] or a[1] not in (0, g[1]) for a, g in zip(asked, given, strict=True)):
            raise IntegrityError(f"the results are of (batch, threads) {given} where {asked} were asked for", AGAIN)
        return self.lines

    @property
    def flags(self) -> frozenset[str]:
        return frozenset(self.environment["flags"])


def read_results(content: bytes, where: str) -> Results:
    """Strict JSON of exactly this schema.

    Raises:
        IntegrityError: it is not.
    """
    try:
        data = json.loads(content, parse_constant=_refuse)
        return Results.model_validate_json(json.dumps(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise IntegrityError(f"{where} holds no results: {place}: {first['msg']}", AGAIN) from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"{where} is not the JSON of results: {error}", AGAIN) from error


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} is no number")


def check_files(found: Mapping[str, str], wanted: Mapping[str, str]) -> None:
    """Raises: IntegrityError: the device ran other files than those that were sent."""
    if odd := sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name)):
        raise IntegrityError(f"the results belong to another {odd[0]} than the one here", "make the bundle again and measure that")


def compare_outputs(line: Timed, job: Job, golden: Path) -> Comparison:
    """The device's logits against PyTorch's, on the golden inputs at every checked batch size.

    Raises:
        IntegrityError: there are not as many as there should be.
    """
    with np.load(golden, allow_pickle=False) as arrays:
        expected = arrays["logits"]
    wanted = np.concatenate([expected[:size] for size in job.checked if size <= len(expected)])
    logits = _unpacked(line.logits, "<f4").astype(np.float32)
    if logits.size != wanted.size:
        raise IntegrityError(f"the results hold {logits.size} outputs of the golden inputs instead of {wanted.size}", AGAIN)
    return compare(logits.reshape(wanted.shape), wanted, None)


def _unpacked(text: str, dtype: str) -> NDArray[Any]:
    data = base64.b64decode(text)
    return np.frombuffer(data[: len(data) // np.dtype(dtype).itemsize * np.dtype(dtype).itemsize], dtype)
