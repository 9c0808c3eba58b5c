"""Running an engine: CUDA memory, one execution context, TensorRT's one logger."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from types import ModuleType, TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from fofa_deploy.errors import BackendError, BuildError
from fofa_deploy.types import Feeds, TensorSpec
from fofa_exporters import _device
from fofa_exporters._engine import input_spec


@functools.cache
def logger(trt: ModuleType) -> Any:  # noqa: ANN401 - TensorRT is untyped
    """The one logger of a process (TensorRT ignores every later one). Keeps errors for the exception that will need them."""

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:  # noqa: ANN401
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)

    return Logger()


def words(messages: Sequence[str]) -> str:
    return "; ".join(messages[:3]) or "no reason given"


def no_gpu() -> str:
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


def choose_gpu(device: str) -> None:
    """Have this process use the GPU of a profile's device, ``cuda:1``, from here on."""
    from cuda.bindings import runtime as cuda

    _cuda(cuda.cudaSetDevice(_device.ordinal(device)))


class TensorRtSession:
    """One execution context on one stream, with device buffers for the engine's largest batch."""

    def __init__(self, trt: ModuleType, engine: bytes, device: str) -> None:
        from cuda.bindings import runtime as cuda

        self._api: Any = cuda
        self._trt: Any = trt
        choose_gpu(device)
        self._runtime = trt.Runtime(logger(trt))
        self._engine = self._runtime.deserialize_cuda_engine(engine)
        if self._engine is None:
            raise BackendError(f"TensorRT refused the engine: {words(logger(trt).errors)}", "build it with this version")
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

    def inputs(self) -> tuple[TensorSpec, ...]:
        return tuple(input_spec(name, self._engine.get_tensor_shape(name), self._dtypes[name]) for name in self._inputs)

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
