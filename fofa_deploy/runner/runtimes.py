"""A runtime's session on a device, and the one build step that has to happen there: TensorRT's.

Each opener gives the name of the device that is really bound, and a function from images to logits.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fofa_deploy.runner.machine import ordinal

MODULES = {"onnxruntime": "onnxruntime", "openvino": "openvino", "tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
Run = Callable[[Any], Any]


class RunnerError(Exception):
    """The job cannot be done here; the text is for the person who reads the results."""


def onnxruntime_session(job: dict[str, Any], path: Path, threads: int, trace: str = "") -> Any:  # noqa: ANN401
    """A session really bound to the job's provider; with ``trace`` it profiles itself into files of that prefix."""
    import onnxruntime as ort

    options, wanted = ort.SessionOptions(), {"cpu": "CPUExecutionProvider", "gpu": "CUDAExecutionProvider"}[job["device_kind"]]
    if wanted not in ort.get_available_providers():
        raise RunnerError(f"this onnxruntime has no {wanted}, it has {', '.join(ort.get_available_providers())}")
    options.inter_op_num_threads, options.intra_op_num_threads, options.log_severity_level = 1, threads, 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(job["spinning"])))
    options.add_session_config_entry("session.x64quantprecision", str(int(bool(job["options"].get("exact_kernels")))))
    if trace:
        options.enable_profiling, options.profile_file_prefix = True, trace
    own = {}
    if job["device_kind"] == "gpu":
        own = {"device_id": str(ordinal(job["device_name"])), "use_tf32": "0"}
        with contextlib.redirect_stdout(sys.stderr):
            getattr(ort, "preload_dlls", bool)()  # CUDA and cuDNN, from where pip puts them; a Jetson's onnxruntime may be older
    try:  # without its own fallback, which would go on with the CPU when a kernel fails while running
        session = ort.InferenceSession(str(path), options, providers=[wanted], provider_options=[own], enable_fallback=0)
    except RuntimeError as error:
        raise RunnerError(f"onnxruntime cannot start {wanted}: {error}") from error
    if session.get_providers()[0] != wanted:
        raise RunnerError(f"onnxruntime bound {session.get_providers()[0]} and not {wanted}")
    return session


def _onnxruntime(job: dict[str, Any], path: Path, threads: int, batch: int) -> tuple[str, Run]:
    session = onnxruntime_session(job, path, threads)
    return session.get_providers()[0], lambda images: session.run([job["output"]], {job["input"]: images})[0]


def openvino() -> Any:  # noqa: ANN401
    """The module, which unless told otherwise reports each use to its maker: not from here."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    return importlib.import_module("openvino")


def openvino_model(job: dict[str, Any], path: Path, threads: int, batch: int, **more: object) -> Any:  # noqa: ANN401
    """Compiled for exactly the job's device and precision, and for one batch size."""
    ov = openvino()
    wanted = {"fp32": ov.Type.f32, "bf16": ov.Type.bf16, "fp16": ov.Type.f16}[job["options"]["inference_precision"]]
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": wanted, **more}
    if job["device_kind"] == "cpu":
        config["INFERENCE_NUM_THREADS"] = threads
    core = ov.Core()
    model = core.read_model(path)
    model.reshape([batch, *list(model.input().get_partial_shape())[1:]])
    compiled = core.compile_model(model, job["device_name"], config)
    runs_in, bound = compiled.get_property("INFERENCE_PRECISION_HINT"), compiled.get_property("EXECUTION_DEVICES")
    if runs_in != wanted or any(name.split(".")[0] != job["device_name"].split(".")[0] for name in bound):
        raise RunnerError(f"OpenVINO bound {bound} in {runs_in.to_string()}: asked for {job['device_name']}, {wanted.to_string()}")
    return compiled


def _openvino(job: dict[str, Any], path: Path, threads: int, batch: int) -> tuple[str, Run]:
    requests: dict[int, Any] = {}

    def opened(size: int) -> Any:  # noqa: ANN401
        compiled = openvino_model(job, path, threads, size)
        requests[size] = compiled.create_infer_request()
        return compiled

    def run(images: Any) -> Any:  # noqa: ANN401
        if len(images) not in requests:  # to be checked, not to be timed
            opened(len(images))
        return requests[len(images)].infer({job["input"]: images}, share_inputs=True)[job["output"]].copy()

    return ",".join(opened(batch).get_property("EXECUTION_DEVICES")), run


def build_engine(job: dict[str, Any], source: Path, target: Path) -> None:
    """A TensorRT engine from the job's typed ONNX file: engines run only on the GPU and the version they were built for."""
    trt = importlib.import_module(MODULES[job["runtime"]])
    _cudart()("cudaSetDevice", ordinal(job["device_name"]))
    logger = trt.Logger(trt.Logger.ERROR)
    builder, names = trt.Builder(logger), trt.NetworkDefinitionCreationFlag
    flags = sum(1 << int(getattr(names, name)) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(names, name))
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(source.read_bytes()):
        raise RunnerError(f"TensorRT's parser refused the graph: {parser.get_error(0)}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    shape, batches = tuple(network.get_input(0).shape)[1:], [line["batch"] for line in job["grid"]]
    profile.set_shape(job["input"], *((size, *shape) for size in (1, batches[0], max(*job["checked"], *batches))))
    config.add_optimization_profile(profile)
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise RunnerError("TensorRT's compiler refused the graph; its own words are above")
    target.write_bytes(bytes(engine))


def _tensorrt(job: dict[str, Any], path: Path, threads: int, batch: int) -> tuple[str, Run]:
    """Through libcudart itself: Jetson's TensorRT comes without CUDA bindings for Python."""
    import numpy as np

    trt, cuda = importlib.import_module(MODULES[job["runtime"]]), _cudart()
    cuda("cudaSetDevice", ordinal(job["device_name"]))
    runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
    engine = runtime.deserialize_cuda_engine(path.read_bytes())
    if engine is None:
        raise RunnerError("TensorRT refused the engine")
    context = engine.create_execution_context()
    dtypes = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in (job["input"], job["output"])}
    stream, held = ctypes.c_void_p(), {}
    cuda("cudaStreamCreate", ctypes.byref(stream))
    largest = engine.get_tensor_profile_shape(job["input"], 0)[2][0]
    for name, dtype in dtypes.items():
        held[name] = ctypes.c_void_p()
        size = largest * math.prod(tuple(engine.get_tensor_shape(name))[1:]) * dtype.itemsize
        cuda("cudaMalloc", ctypes.byref(held[name]), ctypes.c_size_t(size))
        context.set_tensor_address(name, held[name].value)

    def copy(target: Any, source: Any, size: int, kind: int) -> None:  # noqa: ANN401
        cuda("cudaMemcpyAsync", ctypes.c_void_p(target), ctypes.c_void_p(source), ctypes.c_size_t(size), kind, stream)

    def run(images: Any) -> Any:  # noqa: ANN401
        images = np.ascontiguousarray(images, dtypes[job["input"]])
        context.set_input_shape(job["input"], images.shape)
        result = np.empty(tuple(context.get_tensor_shape(job["output"])), dtypes[job["output"]])
        copy(held[job["input"]].value, images.ctypes.data, images.nbytes, 1)
        if not context.execute_async_v3(stream.value):
            raise RunnerError("TensorRT failed while running")
        copy(result.ctypes.data, held[job["output"]].value, result.nbytes, 2)
        cuda("cudaStreamSynchronize", stream)
        return result

    return f"cuda:{ordinal(job['device_name'])}", run


def _cudart() -> Callable[..., None]:
    names = ("libcudart.so", *(f"libcudart.so.{number}" for number in (13, 12, 11)))
    for name in names:
        with contextlib.suppress(OSError):
            library = ctypes.CDLL(name)
            break
    else:
        raise RunnerError(f"no CUDA runtime library is found ({', '.join(names)}): add it to LD_LIBRARY_PATH")

    def call(function: str, *arguments: object) -> None:
        status = getattr(library, function)(*arguments)
        if status:
            raise RunnerError(f"{function} failed with CUDA error {status}")

    return call


OPENERS: dict[str, Callable[[dict[str, Any], Path, int, int], tuple[str, Run]]] = {
    "onnxruntime": _onnxruntime, "openvino": _openvino, "tensorrt": _tensorrt, "tensorrt-rtx": _tensorrt
}  # fmt: skip
