"""What each layer takes on a device, by its runtime's own profiler; a run of its own, because profiling slows it down."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fofa_deploy.runner.runtimes import onnxruntime_session, openvino_model

RUNS = 20
Times = Iterator[tuple[str, str, str, float]]
"""Name, operator, precision as far as its kernel tells, milliseconds: one per kernel and run."""
_KERNELS = {"f32": "fp32", "bf16": "bf16", "f16": "fp16", "i8": "int8", "u8": "int8"}


def _onnxruntime(job: dict[str, Any], path: Path, threads: int, images: Any) -> Times:  # noqa: ANN401
    with tempfile.TemporaryDirectory() as scratch:
        session = onnxruntime_session(job, path, threads, str(Path(scratch) / "trace"))
        for _ in range(1 + RUNS):
            session.run(None, {job["input"]: images})
        events = json.loads(Path(session.end_profiling()).read_bytes())
    suffix, warm = "_kernel_time", set()
    for event in (event for event in events if event.get("cat") == "Node" and event["name"].endswith(suffix)):
        found = event["name"][: -len(suffix)], event["args"]["op_name"]
        if found in warm:
            yield (*found, "unknown", event["dur"] / 1e3)
        warm.add(found)


def _openvino(job: dict[str, Any], path: Path, threads: int, images: Any) -> Times:  # noqa: ANN401
    request = openvino_model(job, path, threads, len(images), PERF_COUNT=True).create_infer_request()
    request.infer({job["input"]: images})
    for _ in range(RUNS):
        request.infer({job["input"]: images})
        for info in (info for info in request.profiling_info if info.real_time):
            kernel = info.exec_type.rpartition("_")[2].lower()
            yield info.node_name, info.node_type, _KERNELS.get(kernel, "unknown"), info.real_time.total_seconds() * 1e3


PROFILERS: dict[str, Callable[..., Times]] = {"onnxruntime": _onnxruntime, "openvino": _openvino}


def layer_times(job: dict[str, Any], path: Path, threads: int, images: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    """Mean milliseconds of every layer; empty where the runtime does not tell."""
    total: dict[str, dict[str, Any]] = {}
    profiler = PROFILERS.get(job["runtime"])
    for name, operator, precision, ms in profiler(job, path, threads, images) if profiler else ():
        layer = total.setdefault(name, {"name": name, "operator": operator, "precision": precision, "ms": 0.0})
        layer["ms"] += ms / RUNS
    return list(total.values())
