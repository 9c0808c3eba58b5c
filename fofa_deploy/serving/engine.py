"""A TensorRT engine as a function from one image to its logits, through memory that CPU and GPU share."""

from __future__ import annotations

import ctypes
import math
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from cuda.bindings import runtime as cuda

BUILD = "/usr/src/tensorrt/bin/trtexec --onnx=model.onnx --saveEngine=model.engine --stronglyTyped --shapes={name}:1x{sides}"


class Engine:
    """``trt`` is the package that the engine was built with; it runs only on the GPU that it was built for."""

    def __init__(self, trt: ModuleType, path: Path, sidecar: dict[str, Any]) -> None:
        images, logits = sidecar["input"], sidecar["output"]
        if not path.is_file():
            command = BUILD.format(name=images["name"], sides="x".join(map(str, images["shape"][1:])))
            sys.exit(f"{path.name} is built on its own device, from the model.onnx beside it: {command}")
        status, count = cuda.cudaGetDeviceCount()
        if int(status) or not count:
            sys.exit(f"no CUDA device ({status.name}): {path.name} runs on the GPU that it was built for")
        self._runtime = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            sys.exit(f"{path.name} was built for another GPU or another version than {trt.__version__}")
        self._context = self._engine.create_execution_context()
        self._context.set_input_shape(images["name"], (1, *images["shape"][1:]))
        self._stream = _value(cuda.cudaStreamCreate())
        self._images, self._logits = self._shared(images), self._shared(logits)

    def _shared(self, spec: dict[str, Any]) -> np.ndarray:
        """An array that the engine reads or writes."""
        shape, dtype = (1, *spec["shape"][1:]), np.dtype(spec["dtype"])
        address = _value(cuda.cudaMallocManaged(dtype.itemsize * math.prod(shape), cuda.cudaMemAttachGlobal))
        self._context.set_tensor_address(spec["name"], int(address))
        return np.ctypeslib.as_array(ctypes.cast(int(address), ctypes.POINTER(np.ctypeslib.as_ctypes_type(dtype))), shape)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """An image as `preprocess.prepare` gives it -> float32 (1,classes)"""
        self._images[...] = image
        if not self._context.execute_async_v3(int(self._stream)):
            sys.exit("TensorRT failed while running")
        _value(cuda.cudaStreamSynchronize(self._stream))
        return self._logits.copy()


def _value(result: tuple[Any, ...]) -> Any:  # noqa: ANN401 - CUDA's bindings are untyped
    status, *values = result
    if int(status):
        sys.exit(f"CUDA failed with {status.name}")
    return values[0] if values else None
