"""What ``python run.py`` does in an unpacked bundle: read job.json, measure every line of its grid, write results.json.

Each line runs in a child process of its own: cold start and peak memory are its own, and a runtime that crashes or hangs is
a reason in the results, not the end of them. Without a job the results tell what the machine is.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from fofa_deploy.runner.energy import Meter
from fofa_deploy.runner.layers import layer_times
from fofa_deploy.runner.machine import PACKAGES, facts, package_versions, peak_rss_bytes
from fofa_deploy.runner.runtimes import MODULES, OPENERS, RunnerError, build_engine
from fofa_deploy.runner.timing import steady, timed

SCHEMA_VERSION = 1
JOB, RESULTS, ENGINE, GOLDEN = "job.json", "results.json", "model.engine", "golden.npy"
LOG_TAIL = 1000


def run_job(folder: Path) -> dict[str, Any]:
    """The content of results.json; everything that can go wrong on the device is in ``error``, of the whole or of a line."""
    found: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "job": None, "files": {}, "lines": [], "layers": [], "error": ""}
    found["environment"] = facts() | {"versions": package_versions(PACKAGES)}
    if not (folder / JOB).is_file():
        return found
    job = found["job"] = json.loads((folder / JOB).read_text())
    try:
        found["files"] = _digests(folder, job)
        _require_numpy()
        if _builds_here(job):
            _child(folder, "build", 0, job["build_seconds"])
        found["lines"] = [_line(folder, number, job) for number in range(len(job["grid"]))]
        found["layers"] = _layers(folder, job)
    except RunnerError as error:
        found["error"] = str(error)
    return found


def _digests(folder: Path, job: dict[str, Any]) -> dict[str, str]:
    """SHA-256 of every file of the job as it lies here; nothing else reaches a runtime."""
    found = {}
    for name, wanted in job["files"].items():
        path = folder / name
        found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        if found[name] != wanted:
            raise RunnerError(f"{name} is missing or altered: unpack the bundle again")
    return found


def _require_numpy() -> None:
    try:
        import numpy  # noqa: F401
    except ImportError as error:
        raise RunnerError(f"numpy does not import ({error}): install it for {sys.executable}") from error


def _builds_here(job: dict[str, Any]) -> bool:
    return str(job["runtime"]).startswith("tensorrt") and str(job["main"]).endswith(".onnx")


def _line(folder: Path, number: int, job: dict[str, Any]) -> dict[str, Any]:
    try:
        measured = _child(folder, "line", number, job["run_seconds"])
    except RunnerError as error:
        measured = {"error": str(error)}
    return {**job["grid"][number], **measured}


def _layers(folder: Path, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Beside the point of a job: without them it is as good."""
    try:
        layers: list[dict[str, Any]] = _child(folder, "layers", 0, job["run_seconds"])["layers"]
    except RunnerError:
        return []
    return layers


def _child(folder: Path, task: str, number: int, seconds: float) -> dict[str, Any]:
    """What a task says in a process of its own.

    Raises:
        RunnerError: it refused, crashed or hung.
    """
    with tempfile.NamedTemporaryFile(dir=folder) as answer, tempfile.TemporaryFile() as log:
        command = [sys.executable, str(folder / "run.py"), task, str(number), answer.name]
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise RunnerError(f"no answer in {seconds:g} s") from None
        finally:
            process.kill()
            process.wait()
        text = Path(answer.name).read_text()
        with contextlib.suppress(json.JSONDecodeError):  # killed while it wrote
            return _answer(text)
        log.seek(max(0, log.seek(0, os.SEEK_END) - LOG_TAIL))
        how = f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        raise RunnerError(f"{how}: {log.read().decode(errors='replace').strip()}")


def _answer(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    if "error" in found:
        raise RunnerError(found["error"])
    return found


# --- the child's side ---------------------------------------------------------------------------------------------


def measure_line(folder: Path, job: dict[str, Any], number: int) -> dict[str, Any]:
    """One line of the grid, measured; the first one also gives the logits of the golden inputs, in every checked batch size."""
    import numpy as np

    golden, images, threads = _asked(folder, job, number)
    started = time.perf_counter_ns()
    model = folder / (ENGINE if _builds_here(job) else job["main"])
    device, run = OPENERS[job["runtime"]](job, model, threads, len(images))
    loaded = time.perf_counter_ns()
    (first,) = timed(lambda: run(images).item(0), 1)
    meter = Meter.beside(device, job["device_name"])
    times, warmup = steady(lambda: run(images).item(0), job["measure"], meter)
    found = {
        "device": device,
        "threads": threads,
        "load_ms": (loaded - started) / 1e6,
        "first_run_ms": first / 1e6,
        "warmup_runs": warmup,
        "times_ns": _packed(np.asarray(times, "<i8")),
        "peak_rss_bytes": peak_rss_bytes(),
        "measured_at": time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime()),
        **meter.found(),
    }
    if number == 0:
        batches = [golden[:size] for size in job["checked"] if size <= len(golden)]
        found["logits"] = _packed(np.concatenate([run(np.ascontiguousarray(batch)) for batch in batches]).astype("<f4"))
    return found


def _asked(folder: Path, job: dict[str, Any], number: int) -> tuple[Any, Any, int]:
    """The golden inputs, a line's inputs made of them, and its number of threads."""
    import numpy as np

    line, golden = job["grid"][number], np.load(folder / GOLDEN, allow_pickle=False)
    images = np.ascontiguousarray(np.resize(golden, (line["batch"], *golden.shape[1:])))
    return golden, images, line["threads"] or len(os.sched_getaffinity(0))


def _packed(array: Any) -> str:  # noqa: ANN401 - numpy is not there when annotations are read
    return base64.b64encode(array.tobytes()).decode()


def _perform(task: str, number: int, folder: Path) -> dict[str, Any]:
    job = json.loads((folder / JOB).read_text())
    if job["memory_bytes"]:
        resource.setrlimit(resource.RLIMIT_DATA, (job["memory_bytes"], job["memory_bytes"]))
    try:
        if task == "build":
            build_engine(job, folder / job["main"], folder / ENGINE)
            return {}
        if task == "layers":
            _, images, threads = _asked(folder, job, 0)
            return {"layers": layer_times(job, folder / job["main"], threads, images[:1])}
        return measure_line(folder, job, number)
    except ImportError as error:
        package = MODULES[job["runtime"]]
        return {"error": f"{package} does not import ({error}): install it for {sys.executable}"}
    except (RunnerError, OSError) as error:
        return {"error": str(error)}


def write(path: Path, found: dict[str, Any]) -> None:
    """In one step: a reader sees the whole file or none."""
    scratch = path.with_name(f"{path.name}.part")
    scratch.write_text(json.dumps(found, allow_nan=False))
    scratch.replace(path)


def main(folder: Path, arguments: list[str]) -> None:
    if arguments:
        task, number, answer = arguments
        Path(answer).write_text(json.dumps(_perform(task, int(number), folder), allow_nan=False))
        return
    found = run_job(folder)
    write(folder / RESULTS, found)
    problems = [found["error"], *(line.get("error", "") for line in found["lines"])]
    print("\n".join(filter(None, [*problems, f"{folder / RESULTS}: give it to `fofa-deploy profile RUN --import`"])))
    sys.exit(1 if any(problems) else 0)
