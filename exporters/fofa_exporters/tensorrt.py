"""TensorRT and TensorRT for RTX: one code path, because both are strongly typed and take the same typed ONNX.

Precision lives in the graph: fp16 with fp32 inputs and outputs, or symmetric signed Q/DQ pairs. The RTX flavour builds
engines on a machine without a GPU; there, the types of the parsed network are the layer table.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType, TracebackType
from typing import Any, ClassVar, Self

import numpy as np
import onnx
from numpy.typing import NDArray

from fofa_deploy.errors import BackendError, BuildError, IntegrityError
from fofa_deploy.types import (
    Artifact,
    Calibration,
    Feeds,
    Graph,
    HardwareProfile,
    Layer,
    LayerTime,
    Precision,
    Probe,
    Recipe,
    Scalar,
)
from fofa_exporters import _device, _onnx
from fofa_exporters._engine import inspector_layers, network_layers, typed_layers
from fofa_exporters._rewrite import expand_col2im

ENGINE = "model.engine"


# --- the two back ends --------------------------------------------------------------------------------------------


class _Family:
    """What both flavours do; they differ in their package, and in whether a GPU has to be there to build."""

    name: ClassVar[str]
    package: ClassVar[str]
    builds_without_gpu: ClassVar[bool]
    precisions = frozenset({Precision.FP32, Precision.FP16, Precision.INT8})

    def probe(self, profile: HardwareProfile) -> Probe:
        if self._builds_there(profile):
            reason = f"{profile.device.host} builds the engine itself, from a typed ONNX file"
            return Probe(can_build=True, can_run=False, reason=reason, versions={"onnx": onnx.__version__})
        try:
            trt = importlib.import_module(self.package)
        except (ImportError, OSError) as error:
            hint = f"pip install 'fofa-deploy[{self.name}]'"
            return Probe(can_build=False, can_run=False, reason=f"{self.package} does not import ({error}): {hint}")
        reason = _no_gpu() if profile.device.kind == "gpu" else f"TensorRT has no {profile.device.kind}"
        can_build = profile.device.kind == "gpu" and (self.builds_without_gpu or not reason)
        return Probe(can_build=can_build, can_run=not reason, reason=reason, versions=self.versions(trt))

    def recipes(self, profile: HardwareProfile, graph: Graph) -> Sequence[Recipe]:
        """fp16 first: TensorRT-RTX documents int8 only for weights of matrix products, so int8 has to prove itself."""
        batch: dict[str, Scalar] = {"max_batch": max(profile.execution.batch_sizes)}
        if self._builds_there(profile):
            batch["on_device"] = True
        offered = [recipe for recipe in (FP16, INT8, FP32) if recipe.precision in profile.precisions]
        return [recipe.model_copy(update={"options": {**recipe.options, **batch}}) for recipe in offered]

    def build(self, graph: Graph, recipe: Recipe, calibration: Calibration | None, out: Path) -> Artifact:
        typed = _typed(expand_col2im(_onnx.read(graph)), recipe, calibration)
        if recipe.options.get("on_device"):
            main, versions = out / "model.onnx", {"onnx": onnx.__version__}
            onnx.save(typed, main)
            return Artifact.of(
                out, main, backend=self.name, recipe=recipe, graph=graph, layers=typed_layers(typed), versions=versions
            )
        trt = self.runtime()
        engine, layers = _build_engine(trt, typed, int(recipe.options.get("max_batch", 1)))
        main = out / ENGINE
        main.write_bytes(engine)
        versions = self.versions(trt)
        return Artifact.of(out, main, backend=self.name, recipe=recipe, graph=graph, layers=layers, versions=versions)

    def load(self, artifact: Artifact, profile: HardwareProfile) -> TensorRtSession:
        """An engine is native code: only bytes with the artifact's own digest reach the deserializer."""
        if artifact.recipe.options.get("on_device"):
            raise BackendError(f"{artifact.path} is built on its device", "measure it there: fofa-deploy profile")
        if reason := _no_gpu():
            raise BackendError(f"{self.name} cannot run here: {reason}", "run on a machine with an NVIDIA GPU")
        return TensorRtSession(self.runtime(), _engine_bytes(artifact), profile.device.name)

    def layer_times(self, artifact: Artifact, profile: HardwareProfile, feeds: Feeds, runs: int) -> tuple[LayerTime, ...]:
        known = {layer.name: layer for layer in artifact.layers}
        with self.load(artifact, profile) as session:
            times = session.layer_ms(feeds, runs)
        return tuple(_layer_time(name, known.get(name), ms) for name, ms in times.items())

    def _builds_there(self, profile: HardwareProfile) -> bool:
        """An engine runs only on the GPU and the version that it was built for: a remote one gets what it is made from."""
        return profile.device.host is not None and profile.device.kind == "gpu" and not self.builds_without_gpu

    def runtime(self) -> ModuleType:
        """The Python package, imported now and not before.

        Raises:
            BackendError: it is not installed.
        """
        try:
            return importlib.import_module(self.package)
        except (ImportError, OSError) as error:
            hint = f"pip install 'fofa-deploy[{self.name}]'"
            raise BackendError(f"{self.package} does not import: {error}", hint) from error

    def versions(self, trt: ModuleType) -> dict[str, str]:
        return {self.name: str(trt.__version__), "onnx": onnx.__version__}


class TensorRtBackend(_Family):
    """TensorRT for data centres and Jetson: builds and runs on the GPU that the engine is for."""

    name = "tensorrt"
    package = "tensorrt"
    builds_without_gpu = False


class TensorRtRtxBackend(_Family):
    """TensorRT for RTX: builds ahead of time on any CPU, compiles for the GPU when it is loaded."""

    name = "tensorrt-rtx"
    package = "tensorrt_rtx"
    builds_without_gpu = True


FP16 = Recipe(name="fp16", precision=Precision.FP16, description="weights and activations in half precision, fp32 in and out")
FP32 = Recipe(name="fp32", precision=Precision.FP32, description="full precision, TF32 off")
INT8 = Recipe(
    name="int8-qdq-symmetric",
    precision=Precision.INT8,
    description="convolutions and constant matrix products in signed symmetric int8 per channel, rest fp32",
    needs_calibration=True,
)


# --- the typed graph ----------------------------------------------------------------------------------------------


def _as_it_is(model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None) -> onnx.ModelProto:
    return model


def _half(model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None) -> onnx.ModelProto:
    from onnxruntime.transformers.float16 import convert_float_to_float16

    with _onnx.quiet():
        half: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True)
    return half


def _integer(model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None) -> onnx.ModelProto:
    # The parser takes no int32 bias behind a DequantizeLinear, and no zero points other than 0.
    scheme = _onnx.Scheme(signed_activations=True, weighted_only=True, float_outputs=_onnx.PRODUCTS, quantize_bias=False)
    with TemporaryDirectory() as scratch:
        path = Path(scratch) / "typed.onnx"
        _onnx.quantize_static(model, _onnx.require_calibration(recipe, calibration), scheme, path)
        return onnx.load(path)


Writer = Callable[[onnx.ModelProto, Recipe, Calibration | None], onnx.ModelProto]
_TYPED: dict[Precision, Writer] = {Precision.FP32: _as_it_is, Precision.FP16: _half, Precision.INT8: _integer}


def _typed(model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None) -> onnx.ModelProto:
    if recipe.precision not in _TYPED:
        raise BuildError(f"TensorRT is not built in {recipe.precision} here", f"ask for one of {', '.join(_TYPED)}")
    try:
        return _TYPED[recipe.precision](model, recipe, calibration)
    except (ValueError, RuntimeError) as error:
        raise BuildError(f"the graph cannot be written in {recipe.precision}: {error}", "try another recipe") from error


# --- building -----------------------------------------------------------------------------------------------------


@functools.cache
def _logger(trt: ModuleType) -> Any:  # noqa: ANN401 - TensorRT is untyped
    """The one logger of a process (TensorRT ignores every later one). Keeps errors for the exception that will need them."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def _build_engine(trt: ModuleType, model: onnx.ModelProto, max_batch: int) -> tuple[bytes, tuple[Layer, ...]]:
    """Serialized engine and layer table of a typed ONNX graph.

    Raises:
        BuildError: the parser or the compiler refused, in TensorRT's own words.
    """
    logger = _logger(trt)
    logger.errors.clear()
    builder = trt.Builder(logger)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse(model.SerializeToString()):
        faults = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise BuildError(f"TensorRT's parser refused the graph: {_words(faults)}", "try another recipe")
    engine = builder.build_serialized_network(network, _config(trt, builder, network, max_batch))
    if engine is None:
        raise BuildError(f"TensorRT's compiler refused the graph: {_words(logger.errors)}", "try another recipe")
    data = bytes(engine)
    return data, _layers(trt, network, data)


def _words(messages: Sequence[str]) -> str:
    return "; ".join(messages[:3]) or "no reason given"


def _network_flags(trt: ModuleType) -> int:
    """Explicit batch and strong typing, each where this version still has a flag for it."""
    flags = trt.NetworkDefinitionCreationFlag
    return sum(1 << int(getattr(flags, name)) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(flags, name))


def _config(trt: ModuleType, builder: Any, network: Any, max_batch: int) -> Any:  # noqa: ANN401
    """A profile for batch 1..max_batch. No timing cache: creating one forces TensorRT-RTX to look for a GPU."""
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, (1, *shape), (1, *shape), (max_batch, *shape))
    config.add_optimization_profile(profile)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and then "fp32" multiplies in 19 bits
    return config


# --- layer table --------------------------------------------------------------------------------------------------


def _layers(trt: ModuleType, network: Any, engine: bytes) -> tuple[Layer, ...]:  # noqa: ANN401
    """The engine's own table where a GPU lets it be read and it shows the weights, else the strongly typed network's."""
    declared = network_layers(network)
    if _no_gpu():
        return declared
    inspected = inspector_layers(_inspect(trt, engine))
    covered = sum(layer.weighted for layer in inspected) * 2 >= sum(layer.weighted for layer in declared)
    return inspected if covered else declared


def _layer_time(name: str, layer: Layer | None, ms: float) -> LayerTime:
    operator, precision = (layer.operator, layer.precision) if layer else ("unknown", "unknown")
    return LayerTime(name=name, operator=operator, precision=precision, ms=ms)


def _inspect(trt: ModuleType, engine: bytes) -> str:
    deserialized = trt.Runtime(_logger(trt)).deserialize_cuda_engine(engine)
    inspector = deserialized.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


# --- running ------------------------------------------------------------------------------------------------------


def _no_gpu() -> str:
    """Why no CUDA device can be used here, or nothing."""
    try:
        from cuda.bindings import runtime as cuda
    except ImportError as error:
        return f"no CUDA device can be reached without cuda-bindings ({error})"
    status, count = cuda.cudaGetDeviceCount()
    return "" if status == cuda.cudaError_t.cudaSuccess and count else "no CUDA device"


def _cuda(result: tuple[Any, ...]) -> Any:  # noqa: ANN401
    """Value of a CUDA runtime call.

    Raises:
        BackendError: the call failed.
    """
    status, *values = result
    if int(status) != 0:
        raise BackendError(f"CUDA failed with {status.name}", "check `nvidia-smi`, and that no other process fills the GPU")
    return values[0] if values else None


def _engine_bytes(artifact: Artifact) -> bytes:
    """The engine, digested in memory, so that nothing can swap the file between the check and the deserializer."""
    data = artifact.path.read_bytes()
    if hashlib.sha256(data).hexdigest() != artifact.files[0].sha256:
        raise IntegrityError(f"{artifact.path} is altered since it was built", "build the artifact again")
    return data


class TensorRtSession:
    """One execution context on one stream, with device buffers for the engine's largest batch."""

    def __init__(self, trt: ModuleType, engine: bytes, device: str) -> None:
        from cuda.bindings import runtime as cuda

        self._api: Any = cuda
        self._trt: Any = trt
        _cuda(cuda.cudaSetDevice(_device.ordinal(device)))
        self._runtime = trt.Runtime(_logger(trt))
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise BackendError(f"TensorRT refused the engine: {_words(_logger(trt).errors)}", "build it with this version")
        self._context = self._engine.create_execution_context()
        self._stream = _cuda(cuda.cudaStreamCreate())
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._inputs = [name for name in names if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._outputs = [name for name in names if name not in self._inputs]
        self._dtypes = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._max_batch = int(self._engine.get_tensor_profile_shape(self._inputs[0], 0)[2][0])
        self._buffers = {name: self._allocate(name) for name in names}
        self.device = f"cuda:{_device.ordinal(device)}"

    def run(self, feeds: Feeds) -> Feeds:
        """Batches beyond the engine's largest are run in slices."""
        total = len(feeds[self._inputs[0]])
        slices = [slice(start, start + self._max_batch) for start in range(0, total, self._max_batch)]
        parts = [self._run({name: feeds[name][part] for name in self._inputs}) for part in slices]
        return {name: np.concatenate([part[name] for part in parts]) for name in self._outputs}

    def layer_ms(self, feeds: Feeds, runs: int) -> dict[str, float]:
        """Mean milliseconds per layer of warm runs, as TensorRT's own profiler tells it."""
        total: dict[str, float] = {}

        class Profiler(self._trt.IProfiler):  # type: ignore[misc, name-defined]
            def report_layer_time(self, name: str, ms: float) -> None:
                total[name] = total.get(name, 0.0) + ms

        self.run(feeds)
        self._context.profiler = Profiler()
        for _ in range(runs):
            self.run(feeds)
        return {name: ms / runs for name, ms in total.items()}

    def _run(self, feeds: dict[str, NDArray[np.generic]]) -> dict[str, NDArray[np.generic]]:
        arrays = {name: np.ascontiguousarray(array, self._dtypes[name]) for name, array in feeds.items()}
        for name, array in arrays.items():
            self._context.set_input_shape(name, array.shape)
            self._copy(self._buffers[name], array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")
        results = {name: np.empty(tuple(self._context.get_tensor_shape(name)), self._dtypes[name]) for name in self._outputs}
        if not self._context.execute_async_v3(int(self._stream)):
            raise BuildError("TensorRT failed while running", "check the input's shape against the engine's profile")
        for name, result in results.items():
            self._copy(result.ctypes.data, self._buffers[name], result.nbytes, "cudaMemcpyDeviceToHost")
        _cuda(self._api.cudaStreamSynchronize(self._stream))
        return results

    def _allocate(self, name: str) -> int:
        """Device memory of a tensor at the largest batch, bound to the context."""
        shape = (self._max_batch, *tuple(self._engine.get_tensor_shape(name))[1:])
        address = int(_cuda(self._api.cudaMalloc(math.prod(shape) * self._dtypes[name].itemsize)))
        self._context.set_tensor_address(name, address)
        return address

    def _copy(self, target: int, source: int, size: int, direction: str) -> None:
        kind = getattr(self._api.cudaMemcpyKind, direction)
        _cuda(self._api.cudaMemcpyAsync(target, source, size, kind, self._stream))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for address in self._buffers.values():
            _cuda(self._api.cudaFree(address))
        _cuda(self._api.cudaStreamDestroy(self._stream))
        self._buffers, self._context, self._engine = {}, None, None
