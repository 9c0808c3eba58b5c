"""OpenVINO on Intel and other CPUs and on Intel GPUs: f32, bf16, f16, and int8 through NNCF.

The precision hint is a wish to OpenVINO: on a CPU without bf16 it runs f32 and says nothing. So the recipe states the
hint, and it is read back after compiling; AUTO, which would pick a device silently, is never used.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnx
import openvino as ov
from openvino import frontend

from fofa_deploy.errors import BackendError, BuildError
from fofa_deploy.types import (
    Artifact,
    Calibration,
    Feeds,
    FileRecord,
    Graph,
    HardwareProfile,
    Layer,
    LayerTime,
    ModelFile,
    Precision,
    Probe,
    Recipe,
    Scalar,
    TensorSpec,
)
from fofa_exporters import _device, _onnx
from fofa_exporters._device import Products
from fofa_exporters._fused import written_out
from fofa_exporters._nncf import nncf_quantized
from fofa_exporters._openvino_session import OpenVinoSession, port_names
from fofa_exporters._quantization import Scheme, quantized, require_calibration
from fofa_exporters._quantization.recipes import SMOOTHING, grown
from fofa_exporters._rewrite import flatten_gathers, flatten_scales, join_hard_swish
from fofa_exporters._words import telling

HINTS = {Precision.FP32: ov.Type.f32, Precision.BF16: ov.Type.bf16, Precision.FP16: ov.Type.f16}
_PRECISIONS = {"f32": Precision.FP32, "bf16": Precision.BF16, "f16": Precision.FP16, "i8": Precision.INT8, "u8": Precision.INT8}
_WEIGHTED = frozenset({"Convolution", "GroupConvolution", "Deconvolution", "FullyConnected"})
RUNTIME_CACHE = "CPU_RUNTIME_CACHE_CAPACITY"
"""OpenVINO 2026.4 may take an executor out of it that was made for another batch size, and then answers wrong.

A model for one size has nothing to mix up, and is a little slower without it.
"""
_UNBUILT: tuple[type[Exception], ...] = (
    *(RuntimeError, BackendError, LookupError),  # the last of a device that does not tell what its layers are
    *(frontend.GeneralFailure, frontend.InitializationFailure, frontend.NotImplementedFailure),  # of the converter
    *(frontend.OpConversionFailure, frontend.OpValidationFailure),
)
_VIRTUAL_DEVICES = ("AUTO", "MULTI", "HETERO", "BATCH")


class OpenVinoBackend:
    """Artifacts are OpenVINO IR: ``model.xml`` and ``model.bin``, compiled again by every device that loads them."""

    name = "openvino"
    precisions = frozenset({Precision.FP32, Precision.BF16, Precision.FP16, Precision.INT8})
    suffixes = (".xml", ".onnx")
    native = False
    check_file = staticmethod(_onnx.check_file)

    def probe(self, profile: HardwareProfile) -> Probe:
        if reason := _refusal(profile.device.name):
            return Probe(can_build=False, can_run=False, reason=reason, versions=versions())
        return Probe(can_build=True, can_run=True, versions=versions())

    def recipes(self, profile: HardwareProfile, graph: Graph) -> Sequence[Recipe]:
        """The device's own capabilities decide about bf16 and f16; where it is not here, only f32 and int8 are sure."""
        floats = [recipe for recipe in (BF16, FP16, FP32) if recipe.precision in _capabilities(profile.device.name)]
        offered = [*_int8(profile, _onnx.read(graph), floats), *floats]
        return [_on(recipe, profile.device.name) for recipe in offered if recipe.precision in profile.precisions]

    def build(self, graph: Graph, recipe: Recipe, calibration: Calibration | None, out: Path) -> Artifact:
        source = _onnx.read(graph)
        main = out / "model.xml"
        try:
            model = _read(source, recipe, calibration)
            ov.save_model(model, main, compress_to_fp16=False)
            layers = layer_table(_compile(main, recipe, threads=None, batch=1))
        except _UNBUILT as error:
            raise BuildError(f"OpenVINO cannot build {recipe.name}: {telling(error)}", "try another recipe") from error
        return Artifact.of(out, main, backend=self.name, recipe=recipe, graph=graph, layers=layers, versions=versions())

    def load(self, artifact: Artifact, profile: HardwareProfile) -> OpenVinoSession:
        recipe = _on(artifact.recipe, profile.device.name)
        try:
            return OpenVinoSession(
                lambda batch: _compile(artifact.path, recipe, _threads(profile), batch), profile.execution.batch_sizes
            )
        except RuntimeError as error:
            raise BackendError(f"OpenVINO cannot load {artifact.path}: {telling(error)}", "build the artifact again") from error

    def describe_file(self, path: Path, profile: HardwareProfile) -> ModelFile:
        if path.suffix.lower() == ".onnx":
            return _onnx.describe(path, _onnx.CONTRIBUTED, lambda: layer_table(_compile_file(path, profile)))
        beside = path.with_suffix(".bin")
        files = tuple(FileRecord.of(path.parent, file) for file in (path, beside) if file.is_file())
        compiled = _compile_file(path, profile)
        return ModelFile(path=path, files=files, inputs=_specs(compiled.inputs), layers=layer_table(compiled))

    def open_file(self, found: ModelFile, profile: HardwareProfile) -> OpenVinoSession:
        found.check()
        compiled = _compile_file(found.path, profile)
        return OpenVinoSession(lambda _: compiled)

    def layer_times(self, artifact: Artifact, profile: HardwareProfile, feeds: Feeds, runs: int) -> tuple[LayerTime, ...]:
        recipe = _on(artifact.recipe, profile.device.name)
        batch = len(next(iter(feeds.values())))
        request = _compile(artifact.path, recipe, _threads(profile), batch, PERF_COUNT=True).create_infer_request()
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


def _int8(profile: HardwareProfile, model: onnx.ModelProto, floats: Sequence[Recipe]) -> list[Recipe]:
    """NNCF's presets and our own pairs, on top of each float of the device; seven-bit weights where products saturate.

    Which float is faster is to be measured: a processor that multiplies bf16 without tiles may be slower in it than in fp32.
    So is which placement of pairs: OpenVINO does a SiLU with the convolution before it unless there is a pair between, and an
    addition in int8 only where there is one.
    """
    transformer = _onnx.is_transformer(model)
    curved = not transformer and (_onnx.gates_itself(model) or bool(written_out(model)))
    placements = {"-weighted-only": True, "": False} if curved else {"": transformer}
    exact = profile.device.kind != "cpu" or _device.products(profile) is Products.EXACT
    smoothing = SMOOTHING if transformer else 0.0
    rests = [recipe.precision for recipe in floats if recipe.precision in profile.precisions] or [Precision.FP32]
    if profile.device.kind == "cpu" and Precision.FP16 in rests:
        rests.remove(Precision.FP16)  # OpenVINO 2026.4 refuses attention that NNCF has quantized where a CPU's rest is in fp16
    found: list[Recipe] = []
    for rest in rests or [Precision.FP32]:
        safe = [] if exact else [_nncf(rest, transformer=transformer, seven_bit_weights=True)]
        pairs = [_pairs(rest, name, weighted_only=only, seven_bit_weights=not exact) for name, only in placements.items()]
        ours = grown(pairs[:1], smoothing=smoothing) + grown(pairs[1:], shares=())
        found += [*safe, _nncf(rest, transformer=transformer), *ours]
    controlled, mixed = _on_request({"transformer": transformer, **({} if exact else {"seven_bit_weights": True})})
    return [*found, controlled, *([] if transformer else [mixed])]


def _pairs(rest: Precision, suffix: str = "", *, weighted_only: bool, seven_bit_weights: bool) -> Recipe:
    """Q/DQ pairs in ONNX, which OpenVINO lowers itself: around all that runs in int8, or what convolutions and products read."""
    options: dict[str, Scalar] = {"weighted_only": True, "float_outputs": True} if weighted_only else {}
    width = "seven" if seven_bit_weights else "eight"
    return Recipe(
        name=_resting(("int8-qdq-u8s7" if seven_bit_weights else "int8-qdq-u8s8") + suffix, rest),
        precision=Precision.INT8,
        description=f"u8 activations, {width}-bit weights per channel, Q/DQ, rest {rest}",
        needs_calibration=True,
        rest=rest,
        options={"method": "qdq", "inference_precision": str(rest), "seven_bit_weights": seven_bit_weights, **options},
    )


def _nncf(rest: Precision, **options: bool) -> Recipe:
    name = "int8-nncf-transformer" if options["transformer"] else "int8-nncf"
    suffix, width = ("-s7", "seven") if options.get("seven_bit_weights") else ("", "eight")
    return Recipe(
        name=_resting(name + suffix, rest),
        precision=Precision.INT8,
        description=f"NNCF post-training quantization, {width}-bit weights, rest {rest}",
        needs_calibration=True,
        family=_resting(name, rest),
        dear=True,
        rest=rest,
        options={"inference_precision": str(rest), **options},
    )


def _on_request(options: dict[str, bool]) -> tuple[Recipe, Recipe]:
    """NNCF's accuracy control and its mixed preset, which is the only one of transformers; benchmarks/peers has what they cost.

    On top of fp32, so that their names are the same everywhere.
    """
    plain = _nncf(Precision.FP32, **options)
    ways: tuple[tuple[str, str, dict[str, Scalar]], ...] = (
        ("int8-nncf-accuracy-control", "layers back to float until agreement drops by at most 1%", {"max_drop": 0.01}),
        ("int8-nncf-mixed", "unsigned activations with zero points, slower bias correction", {"preset": "mixed"}),
    )
    controlled, mixed = (
        plain.model_copy(
            update={
                "name": name,
                "family": "",
                "description": f"{plain.description}; {words}",
                "on_request": True,
                "options": {**plain.options, **more},
            }
        )
        for name, words, more in ways
    )
    return controlled, mixed


def _resting(name: str, rest: Precision) -> str:
    return name if rest is Precision.FP32 else f"{name}-{rest}"


def _on(recipe: Recipe, device: str) -> Recipe:
    return recipe.model_copy(update={"options": {**recipe.options, "device": device}})


# --- devices ------------------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    from importlib.metadata import version

    return {"openvino": ov.__version__, "nncf": version("nncf")}


@cache
def _core() -> Any:  # noqa: ANN401 - openvino is untyped
    """One for the process, never let go.

    Each core gives the thread a stack for signal handlers, and gives back the one that it found, even where that one's
    core has gone meanwhile: of two cores, the older dropped first, what remains is a stack in unmapped memory, and the
    next signal with a handler (a child's end, after a data loader with workers) ends the process.
    """
    return ov.Core()


def _refusal(device: str) -> str:
    """Why this device cannot be used, or nothing."""
    if device.upper().startswith(_VIRTUAL_DEVICES):
        return f"{device} would choose a device silently: name one"
    available = _core().available_devices
    return "" if device in available or f"{device}.0" in available else f"OpenVINO sees {', '.join(available)} and no {device}"


def _capabilities(device: str) -> set[Precision]:
    if _refusal(device):
        return {Precision.FP32}
    spelled = {"FP32": Precision.FP32, "BF16": Precision.BF16, "FP16": Precision.FP16, "INT8": Precision.INT8}
    return {spelled[name] for name in _core().get_property(device, "OPTIMIZATION_CAPABILITIES") if name in spelled}


def _compile(path: Path, recipe: Recipe, threads: int | None, batch: int | None, **more: bool) -> Any:  # noqa: ANN401
    """Compile for exactly the recipe's device and precision, and for one batch size or, with None, for any.

    Raises:
        BackendError: the device is missing, or OpenVINO chose another device or precision.
    """
    device, wanted = str(recipe.options["device"]), HINTS[Precision(str(recipe.options["inference_precision"]))]
    compiled = _compile_on(device, path, threads, batch, INFERENCE_PRECISION_HINT=wanted, **more)
    runs_in = compiled.get_property("INFERENCE_PRECISION_HINT")
    if runs_in != wanted:
        reason = f"{device} runs {runs_in.to_string()} where {wanted.to_string()} was asked for"
        raise BackendError(reason, "drop this precision from the profile: the device does not have it")
    return compiled


def _compile_on(device: str, path: Path, threads: int | None, batch: int | None = None, **more: object) -> Any:  # noqa: ANN401
    """Raises: BackendError: the device is missing, or OpenVINO chose another one."""
    if reason := _refusal(device):
        raise BackendError(reason, "name a device that `fofa-deploy doctor` lists")
    config: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", **more}
    if threads is not None:
        config["INFERENCE_NUM_THREADS"] = threads
    model = _core().read_model(path)
    if batch is not None:
        model = _sized(model, batch)
    if device == "CPU" and model.is_dynamic():
        config[RUNTIME_CACHE] = 0
    compiled = _core().compile_model(model, device, config)
    bound = compiled.get_property("EXECUTION_DEVICES")
    if any(name.split(".")[0] != device.split(".")[0] for name in bound):
        raise BackendError(f"OpenVINO bound {bound} and not {device}", "check the device's driver")
    return compiled


def _sized(model: Any, batch: int) -> Any:  # noqa: ANN401
    """A model of one input, for one batch size."""
    shape = model.input().get_partial_shape()
    shape[0] = batch
    model.reshape(shape)
    return model


def _compile_file(path: Path, profile: HardwareProfile) -> Any:  # noqa: ANN401
    """Somebody else's file, in the precision that OpenVINO itself chooses for it."""
    try:
        return _compile_on(profile.device.name, path, _threads(profile))
    except RuntimeError as error:
        lacking = "" if path.suffix != ".xml" or path.with_suffix(".bin").is_file() else f": there is no {path.stem}.bin beside it"
        raise BackendError(f"OpenVINO cannot load {path}{lacking}: {telling(error)}", "convert it for this version") from error


def _threads(profile: HardwareProfile) -> int | None:
    return profile.execution.thread_count if profile.device.kind == "cpu" else None


def _specs(ports: Sequence[Any]) -> tuple[TensorSpec, ...]:
    shapes = [tuple(side.get_length() if side.is_static else None for side in port.get_partial_shape()) for port in ports]
    kinds = [port.get_element_type().to_dtype().name for port in ports]
    names = [found[0] for found in port_names(ports, "input")]
    return tuple(TensorSpec(name=n, shape=shape, dtype=kind) for n, shape, kind in zip(names, shapes, kinds, strict=True))


# --- quantizing ---------------------------------------------------------------------------------------------------


def _read(source: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None) -> Any:  # noqa: ANN401 - openvino is untyped
    """The graph as OpenVINO's model, quantized where the recipe says so."""
    if recipe.precision is not Precision.INT8:
        return _core().read_model(flatten_scales(source).SerializeToString())
    calibration = require_calibration(recipe, calibration)
    if pairs := recipe.options.get("method") == "qdq":
        source = flatten_gathers(join_hard_swish(quantized(source, calibration, Scheme.of(recipe))))
    # Conversion folds what shapes weights: NNCF would keep depthwise layers in float, and pairs would be most of the model's text.
    model = ov.convert_model(io.BytesIO(flatten_scales(source).SerializeToString()))
    if pairs:
        return model
    compiled = partial(_core().compile_model, model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return nncf_quantized(model, recipe, calibration, compiled)


# --- what really runs ---------------------------------------------------------------------------------------------


def layer_table(compiled: Any) -> tuple[Layer, ...]:  # noqa: ANN401 - openvino is untyped
    """The execution graph as the device plugin reports it, constants and the graph's ends left out."""
    hint = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    rows = (_layer(operation, hint) for operation in compiled.get_runtime_model().get_ops())
    return tuple(row for row in rows if row.operator not in {"Const", "Input", "Output"})


def _layer(operation: Any, hint: str) -> Layer:  # noqa: ANN401
    info = operation.rt_info
    operator, precision = info["layerType"].astype(str), info["runtimePrecision"].astype(str)
    if hint == "f32" and precision in ("f16", "bf16"):  # as its weights are stored
        precision = hint
    sources = (value.get_node().rt_info["layerType"].astype(str) for value in operation.input_values())
    weighted = operator in _WEIGHTED or (operator == "MatMul" and "Const" in sources)  # a stack of matrices
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
