"""OpenVINO on Intel and other CPUs and on Intel GPUs: f32, bf16, f16, and int8 through NNCF.

The precision hint is a wish to OpenVINO: on a CPU without bf16 it runs f32 and says nothing. So the recipe states the
hint, and it is read back after compiling; AUTO, which would pick a device silently, is never used.
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence, Sized
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import openvino as ov

from fofa_deploy.errors import BackendError, BuildError
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
from fofa_exporters._device import Products
from fofa_exporters._rewrite import flatten_scales

HINTS = {Precision.FP32: ov.Type.f32, Precision.BF16: ov.Type.bf16, Precision.FP16: ov.Type.f16}
_PRECISIONS = {"f32": Precision.FP32, "bf16": Precision.BF16, "f16": Precision.FP16, "i8": Precision.INT8, "u8": Precision.INT8}
_WEIGHTED = frozenset({"Convolution", "GroupConvolution", "Deconvolution", "FullyConnected"})
RUNTIME_CACHE = "CPU_RUNTIME_CACHE_CAPACITY"
"""OpenVINO 2026.4 may take an executor out of it that was made for another batch size, and then answers wrong.

It only spares time when the batch size changes.
"""
_VIRTUAL_DEVICES = ("AUTO", "MULTI", "HETERO", "BATCH")


class OpenVinoSession:
    """One infer request on one device."""

    def __init__(self, compiled: Any) -> None:  # noqa: ANN401 - openvino is untyped
        self._request = compiled.create_infer_request()
        self._outputs = [output.get_any_name() for output in compiled.outputs]
        self.device: str = ",".join(compiled.get_property("EXECUTION_DEVICES"))

    def run(self, feeds: Feeds) -> Feeds:
        try:
            results = self._request.infer(dict(feeds))
        except RuntimeError as error:
            raise BuildError(f"OpenVINO failed while running: {error}", "check the input's name, shape and type") from error
        # The request owns its output memory and writes into it again on the next run.
        return {name: np.array(results[name]) for name in self._outputs}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._request = None


class OpenVinoBackend:
    """Artifacts are OpenVINO IR: ``model.xml`` and ``model.bin``, compiled again by every device that loads them."""

    name = "openvino"
    precisions = frozenset({Precision.FP32, Precision.BF16, Precision.FP16, Precision.INT8})

    def probe(self, profile: HardwareProfile) -> Probe:
        if reason := _refusal(profile.device.name):
            return Probe(can_build=False, can_run=False, reason=reason, versions=versions())
        return Probe(can_build=True, can_run=True, versions=versions())

    def recipes(self, profile: HardwareProfile, graph: Graph) -> Sequence[Recipe]:
        """The device's own capabilities decide about bf16 and f16; where it is not here, only f32 and int8 are sure."""
        floats = [recipe for recipe in (BF16, FP16, FP32) if recipe.precision in _capabilities(profile.device.name)]
        offered = [*_int8(profile, _onnx.is_transformer(_onnx.read(graph)), floats), *floats]
        return [_on(recipe, profile.device.name) for recipe in offered if recipe.precision in profile.precisions]

    def build(self, graph: Graph, recipe: Recipe, calibration: Calibration | None, out: Path) -> Artifact:
        source = flatten_scales(_onnx.read(graph))
        main = out / "model.xml"
        try:
            model = ov.Core().read_model(source.SerializeToString())
            if recipe.precision is Precision.INT8:
                model = _quantize(model, recipe, _onnx.require_calibration(recipe, calibration))
            ov.save_model(model, main, compress_to_fp16=False)
            layers = layer_table(_compile(main, recipe, threads=None))
        except (RuntimeError, BackendError) as error:
            raise BuildError(f"OpenVINO cannot build {recipe.name}: {error}", "try another recipe") from error
        return Artifact.of(out, main, backend=self.name, recipe=recipe, graph=graph, layers=layers, versions=versions())

    def load(self, artifact: Artifact, profile: HardwareProfile) -> OpenVinoSession:
        recipe = _on(artifact.recipe, profile.device.name)
        threads = profile.execution.thread_count if profile.device.kind == "cpu" else None
        try:
            return OpenVinoSession(_compile(artifact.path, recipe, threads))
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot load {artifact.path}: {error}", "build the artifact again") from error

    def layer_times(self, artifact: Artifact, profile: HardwareProfile, feeds: Feeds, runs: int) -> tuple[LayerTime, ...]:
        recipe = _on(artifact.recipe, profile.device.name)
        threads = profile.execution.thread_count if profile.device.kind == "cpu" else None
        request = _compile(artifact.path, recipe, threads, PERF_COUNT=True).create_infer_request()
        request.infer(dict(feeds))
        counted = []
        for _ in range(runs):
            request.infer(dict(feeds))
            counted += request.profiling_info
        return _counted_times(counted, {layer.name: layer.precision for layer in artifact.layers}, runs)


# --- recipes ------------------------------------------------------------------------------------------------------


def _float(name: str, precision: Precision) -> Recipe:
    options: dict[str, Scalar] = {"inference_precision": str(precision)}
    return Recipe(name=name, precision=precision, description=f"every layer in {precision}", options=options)


BF16 = _float("bf16", Precision.BF16)
FP16 = _float("fp16", Precision.FP16)
FP32 = _float("fp32", Precision.FP32)


def _int8(profile: HardwareProfile, transformer: bool, floats: Sequence[Recipe]) -> list[Recipe]:
    """NNCF's preset on top of the fastest float the device has, and one with seven-bit weights where products saturate."""
    rest = floats[0].precision if floats else Precision.FP32
    plain = _nncf("int8-nncf-transformer" if transformer else "int8-nncf", rest, transformer=transformer)
    if profile.device.kind != "cpu" or _device.products(profile) is Products.EXACT:
        return [plain]
    safe = _nncf(f"{plain.name}-s7", rest, transformer=transformer, seven_bit_weights=True)
    return [safe, plain]  # as fast, and closer to fp32 wherever products saturate


def _nncf(name: str, rest: Precision, **options: bool) -> Recipe:
    width = "seven-bit weights" if options.get("seven_bit_weights") else "eight-bit weights"
    return Recipe(
        name=name,
        precision=Precision.INT8,
        description=f"NNCF post-training quantization, {width}, rest {rest}",
        needs_calibration=True,
        options={"inference_precision": str(rest), **options},
    )


def _on(recipe: Recipe, device: str) -> Recipe:
    return recipe.model_copy(update={"options": {**recipe.options, "device": device}})


# --- devices ------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"openvino": ov.__version__, "nncf": version("nncf")}


def _refusal(device: str) -> str:
    """Why this device cannot be used, or nothing."""
    if device.upper().startswith(_VIRTUAL_DEVICES):
        return f"{device} would choose a device silently: name one"
    available = ov.Core().available_devices
    return "" if device in available or f"{device}.0" in available else f"OpenVINO sees {', '.join(available)} and no {device}"


def _capabilities(device: str) -> set[Precision]:
    if _refusal(device):
        return {Precision.FP32}
    spelled = {"FP32": Precision.FP32, "BF16": Precision.BF16, "FP16": Precision.FP16, "INT8": Precision.INT8}
    return {spelled[name] for name in ov.Core().get_property(device, "OPTIMIZATION_CAPABILITIES") if name in spelled}


def _compile(path: Path, recipe: Recipe, threads: int | None, **more: bool) -> Any:  # noqa: ANN401 - openvino is untyped
    """Compile for exactly the recipe's device and precision.

    Raises:
        BackendError: the device is missing, or OpenVINO chose another device or precision.
    """
    device, wanted = str(recipe.options["device"]), HINTS[Precision(str(recipe.options["inference_precision"]))]
    if reason := _refusal(device):
        raise BackendError(reason, "name a device that `fofa-deploy doctor` lists")
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": wanted, **more}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    if device == "CPU":
        config[RUNTIME_CACHE] = 0
    compiled = ov.Core().compile_model(path, device, config)
    _check_bound(compiled, device, wanted)
    return compiled


def _check_bound(compiled: Any, device: str, wanted: Any) -> None:  # noqa: ANN401
    bound = compiled.get_property("EXECUTION_DEVICES")
    if any(name.split(".")[0] != device.split(".")[0] for name in bound):
        raise BackendError(f"OpenVINO bound {bound} and not {device}", "check the device's driver")
    runs_in = compiled.get_property("INFERENCE_PRECISION_HINT")
    if runs_in != wanted:
        reason = f"{device} runs {runs_in.to_string()} where {wanted.to_string()} was asked for"
        raise BackendError(reason, "drop this precision from the profile: the device does not have it")


# --- quantizing ---------------------------------------------------------------------------------------------------


class Samples(Sized):
    """Calibration images one by one, read again for each of NNCF's passes, never all in memory."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._length = len(np.load(calibration.images, mmap_mode="r", allow_pickle=False))

    def __iter__(self) -> Iterator[Feeds]:
        return self._calibration.batches(1)

    def __len__(self) -> int:
        return self._length


def _quantize(model: Any, recipe: Recipe, calibration: Calibration) -> Any:  # noqa: ANN401 - openvino is untyped
    with _silent():
        import nncf

        samples = Samples(calibration)
        every_weight = bool(recipe.options.get("seven_bit_weights"))
        overflow = nncf.OverflowFix.ENABLE if every_weight else nncf.OverflowFix.FIRST_LAYER
        try:
            return nncf.quantize(
                model,
                nncf.Dataset(samples),
                subset_size=len(samples),
                model_type=nncf.ModelType.TRANSFORMER if recipe.options.get("transformer") else None,
                advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow),
            )
        except (nncf.InternalError, nncf.ValidationError, nncf.UnsupportedModelError) as error:
            raise BuildError(f"NNCF refused the graph: {error}", "try another recipe") from error


@contextmanager
def _silent() -> Iterator[None]:
    """NNCF without telemetry, log lines and progress bars."""
    os.environ.setdefault("NNCF_CI", "1")  # the only switch NNCF has for its telemetry; read when it is imported
    with _onnx.quiet(("", "nncf", "torch.utils.cpp_extension")), redirect_stdout(io.StringIO()):
        yield


# --- what really runs ---------------------------------------------------------------------------------------------


def layer_table(compiled: Any) -> tuple[Layer, ...]:  # noqa: ANN401 - openvino is untyped
    """The execution graph as the device plugin reports it, constants and the graph's ends left out."""
    rows = (_layer(operation) for operation in compiled.get_runtime_model().get_ops())
    return tuple(row for row in rows if row.operator not in {"Const", "Input", "Output"})


def _layer(operation: Any) -> Layer:  # noqa: ANN401
    info = operation.rt_info
    operator, precision = info["layerType"].astype(str), info["runtimePrecision"].astype(str)
    weighted = operator in _WEIGHTED
    return Layer(
        name=operation.get_friendly_name(), operator=operator, precision=_PRECISIONS.get(precision, precision), weighted=weighted
    )


def _counted_times(counted: Sequence[Any], known: dict[str, str], runs: int) -> tuple[LayerTime, ...]:
    """Means per primitive that ran; where the execution graph has no such name, the precision is that of its kernel."""
    times: dict[str, float] = {}
    kinds: dict[str, tuple[str, str]] = {}
    for info in (info for info in counted if info.real_time):
        times[info.node_name] = times.get(info.node_name, 0.0) + info.real_time.total_seconds() * 1e3
        kernel = info.exec_type.rpartition("_")[2].lower()
        kinds[info.node_name] = info.node_type, known.get(info.node_name, _PRECISIONS.get(kernel, kernel))
    return tuple(
        LayerTime(name=name, operator=kinds[name][0], precision=kinds[name][1], ms=total / runs) for name, total in times.items()
    )
