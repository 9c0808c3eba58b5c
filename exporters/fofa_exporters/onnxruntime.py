"""ONNX Runtime on CPUs and CUDA: float, static int8 (Q/DQ) and dynamic int8 of matrix products.

What the recipes rest on (measured, see docs): only unsigned activations with signed per-channel weights are fast, and
CPUs without VNNI add pairs of u8 x s8 products in 16 bits that saturate. Two ways out of that, both offered there:
seven-bit weights, and the runtime's exact u8 x u8 kernels.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import numpy as np
import onnx
import onnxruntime as ort
from onnxruntime.capi import onnxruntime_pybind11_state as state

from fofa_deploy.errors import BackendError, BuildError
from fofa_deploy.types import (
    Artifact,
    Calibration,
    Feeds,
    Graph,
    HardwareProfile,
    Layer,
    LayerTime,
    ModelFile,
    Precision,
    Probe,
    Recipe,
)
from fofa_exporters import _device, _onnx
from fofa_exporters._device import Products
from fofa_exporters._quantization import Scheme, prepare, quantized, require_calibration
from fofa_exporters._quantization.recipes import SMOOTHING, grown

PROVIDERS = {"cpu": "CPUExecutionProvider", "gpu": "CUDAExecutionProvider"}
REFUSALS: tuple[type[Exception], ...] = (
    state.EPFail, state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf,
    state.NoSuchFile, state.NotImplemented, state.RuntimeException,
)  # fmt: skip
BUILD_FAULTS: tuple[type[Exception], ...] = (ValueError, RuntimeError, *REFUSALS)  # the quantizer raises plain ones
_WEIGHT_INPUT = {
    "Conv": 1, "FusedConv": 1, "NhwcFusedConv": 1, "ConvTranspose": 1, "Gemm": 1, "FusedGemm": 1, "MatMul": 1, "FusedMatMul": 1,
    "MatMulNBits": 1, "Attention": 1, "ConvInteger": 1, "MatMulInteger": 1, "MatMulIntegerToFloat": 1, "DynamicQuantizeMatMul": 1,
    "QAttention": 1, "QLinearConv": 3, "QLinearMatMul": 3, "QGemm": 3,
}  # fmt: skip
_INTEGER = frozenset({"ConvInteger", "MatMulInteger", "MatMulIntegerToFloat", "DynamicQuantizeMatMul", "QuantizeLinear", "QGemm"})


class OnnxRuntimeSession:
    """An ``InferenceSession`` that is really bound to the provider asked for."""

    def __init__(self, session: Any) -> None:  # noqa: ANN401 - onnxruntime is untyped
        self._session = session
        self._outputs = [value.name for value in session.get_outputs()]
        self.device: str = session.get_providers()[0]

    def run(self, feeds: Feeds) -> Feeds:
        try:
            values = self._session.run(self._outputs, dict(feeds))
        except REFUSALS as error:
            raise BuildError(f"onnxruntime failed while running: {error}", "check the input's name, shape and type") from error
        return dict(zip(self._outputs, values, strict=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._session = None


class OnnxRuntimeBackend:
    """Artifacts are ONNX files that any build of ONNX Runtime optimizes for its own CPU when it loads them."""

    name = "onnxruntime"
    precisions = frozenset({Precision.FP32, Precision.INT8})
    suffixes = (".onnx",)
    native = False

    def probe(self, profile: HardwareProfile) -> Probe:
        provider = PROVIDERS.get(profile.device.kind)
        if provider in ort.get_available_providers():
            return Probe(can_build=True, can_run=True, versions=versions())
        wanted = provider or f"a provider for {profile.device.kind}"
        return Probe(can_build=False, can_run=False, reason=f"this onnxruntime lacks {wanted}", versions=versions())

    def recipes(self, profile: HardwareProfile, graph: Graph) -> Sequence[Recipe]:
        options = {"provider": PROVIDERS.get(profile.device.kind, "")}
        transformer = _onnx.is_transformer(_onnx.read(graph))
        offered = [*(_int8(profile, transformer) if profile.device.kind == "cpu" else []), FP32]
        return [
            recipe.model_copy(update={"options": {**options, **recipe.options}})
            for recipe in offered
            if recipe.precision in profile.precisions
        ]

    def build(self, graph: Graph, recipe: Recipe, calibration: Calibration | None, out: Path) -> Artifact:
        model = _onnx.read(graph)
        main, method = out / "model.onnx", str(recipe.options.get("method", "copy"))
        if method not in _WRITERS:
            raise BuildError(f"{self.name} knows no method {method!r}", f"use one of {', '.join(_WRITERS)}")
        try:
            _WRITERS[method](graph, model, recipe, calibration, main)
            layers = layer_table(main, recipe)
        except BUILD_FAULTS as error:
            raise BuildError(f"onnxruntime refused {recipe.name}: {error}", "try another recipe") from error
        return Artifact.of(out, main, backend=self.name, recipe=recipe, graph=graph, layers=layers, versions=versions())

    def load(self, artifact: Artifact, profile: HardwareProfile) -> OnnxRuntimeSession:
        return OnnxRuntimeSession(_load(artifact.path, profile, session_options(artifact.recipe)))

    def describe_file(self, path: Path, profile: HardwareProfile) -> ModelFile:
        recipe = FP32.model_copy(update={"options": {"provider": PROVIDERS.get(profile.device.kind, "")}})
        try:
            return _onnx.describe(path, _onnx.CONTRIBUTED, lambda: layer_table(path, recipe))
        except REFUSALS as error:
            raise BackendError(f"onnxruntime cannot load {path}: {error}", "export it for this version") from error

    def open_file(self, found: ModelFile, profile: HardwareProfile) -> OnnxRuntimeSession:
        found.check()
        return OnnxRuntimeSession(_load(found.path, profile, session_options(FP32)))

    def layer_times(self, artifact: Artifact, profile: HardwareProfile, feeds: Feeds, runs: int) -> tuple[LayerTime, ...]:
        with TemporaryDirectory() as scratch:
            options = session_options(artifact.recipe)
            options.enable_profiling, options.profile_file_prefix = True, str(Path(scratch) / "profile")
            session = _load(artifact.path, profile, options)
            for _ in range(1 + runs):
                session.run(None, dict(feeds))
            events = json.loads(Path(session.end_profiling()).read_bytes())
        return _kernel_times(events, artifact.layers, runs)


# --- recipes ------------------------------------------------------------------------------------------------------

FP32 = Recipe(name="fp32", precision=Precision.FP32, description="the captured graph as it is")
DYNAMIC = Recipe(
    name="int8-dynamic-matmul",
    precision=Precision.INT8,
    description="weights of matrix products in int8 per channel, activations quantized while running; needs no calibration",
    options={"method": "dynamic"},
)


def _static(name: str, description: str, **options: bool) -> Recipe:
    return Recipe(
        name=name,
        precision=Precision.INT8,
        description=f"u8 activations, s8 weights per channel, Q/DQ; {description}",
        needs_calibration=True,
        options={"method": "static", **options},
    )


FULL = _static("int8-u8s8-per-channel", "full eight bits: for CPUs with VNNI or Arm dot products")
SEVEN = _static("int8-u8s7-per-channel", "weights in seven bits, which cannot saturate without VNNI", seven_bit_weights=True)
EXACT = _static("int8-u8s8-per-channel-exact", "run by the u8 x u8 kernels, exact without VNNI", exact_kernels=True)
_STATIC = {
    Products.EXACT: [FULL],
    # Full width on the fast kernels is as fast as seven bits and loses accuracy for nothing: not offered.
    Products.SATURATING: [SEVEN, EXACT],
    Products.UNKNOWN: [SEVEN, EXACT, FULL],
}


def _int8(profile: HardwareProfile, transformer: bool) -> list[Recipe]:
    """A transformer quantizes the operands of its constant products only, and may find activation ranges while it runs."""
    saturating = _device.products(profile) is not Products.EXACT
    static = _STATIC[_device.products(profile)]
    if not transformer:
        return grown(static)
    dynamic = _seven_bit(DYNAMIC) if saturating else DYNAMIC
    return [dynamic, *grown(map(_weighted_only, static), smoothing=SMOOTHING)]


def _weighted_only(recipe: Recipe) -> Recipe:
    # A float output lets the runtime fuse dequantizing into the product instead of rounding between two floats.
    options = {**recipe.options, "weighted_only": True, "float_outputs": True}
    return recipe.model_copy(update={"name": f"{recipe.name}-weighted-only", "options": options})


def _seven_bit(recipe: Recipe) -> Recipe:
    return recipe.model_copy(update={"options": {**recipe.options, "seven_bit_weights": True}})


# --- writing ------------------------------------------------------------------------------------------------------


def _copy(graph: Graph, model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None, main: Path) -> None:
    shutil.copyfile(graph.path, main)


def _write_static(graph: Graph, model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None, main: Path) -> None:
    onnx.save(quantized(model, require_calibration(recipe, calibration), Scheme.of(recipe)), main)


def _write_dynamic(graph: Graph, model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None, main: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as scratch, _onnx.quiet():
        source = Path(scratch) / "prepared.onnx"
        onnx.save(prepare(model), source)
        quantize_dynamic(
            source,
            main,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            reduce_range=bool(recipe.options.get("seven_bit_weights")),
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},
        )


Writer = Callable[[Graph, onnx.ModelProto, Recipe, Calibration | None, Path], None]
_WRITERS: dict[str, Writer] = {"copy": _copy, "static": _write_static, "dynamic": _write_dynamic}


# --- sessions and what they really run ----------------------------------------------------------------------------


def versions() -> dict[str, str]:
    return {"onnxruntime": ort.__version__, "onnx": onnx.__version__}


def session_options(recipe: Recipe) -> Any:  # noqa: ANN401 - onnxruntime is untyped
    """Options that belong to the artifact; threads and spinning come from the profile."""
    options = ort.SessionOptions()
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.add_session_config_entry("session.x64quantprecision", str(int(bool(recipe.options.get("exact_kernels")))))
    return options


def open_session(path: Path, options: Any, provider: str, device: str = "") -> Any:  # noqa: ANN401
    """An ``InferenceSession`` on ``provider``; onnxruntime itself would fall back to the CPU without an error.

    Raises:
        BackendError: this onnxruntime lacks the provider, or bound another one.
    """
    available = ort.get_available_providers()
    if provider not in available:
        raise BackendError(f"this onnxruntime has no {provider!r}", f"it has {', '.join(available)}: install another build of it")
    # TF32 is on by default on CUDA, and then "fp32" multiplies in 19 bits.
    own = {"device_id": str(_device.ordinal(device)), "use_tf32": "0"} if provider == PROVIDERS["gpu"] else {}
    session = ort.InferenceSession(str(path), options, providers=[provider], provider_options=[own])
    if session.get_providers()[0] != provider:
        raise BackendError(f"onnxruntime bound {session.get_providers()[0]} and not {provider}", "check the device's driver")
    return session


def _load(path: Path, profile: HardwareProfile, options: Any) -> Any:  # noqa: ANN401
    options.intra_op_num_threads = profile.execution.thread_count
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(profile.execution.spinning)))
    try:
        return open_session(path, options, PROVIDERS.get(profile.device.kind, ""), profile.device.name)
    except REFUSALS as error:
        raise BackendError(f"onnxruntime cannot load {path}: {error}", "build the artifact again") from error


def _kernel_times(events: Sequence[dict[str, Any]], table: Sequence[Layer], runs: int) -> tuple[LayerTime, ...]:
    """Means per kernel; each kernel's first event belongs to the run that warmed up."""
    suffix, known = "_kernel_time", {layer.name: layer.precision for layer in table}
    times: dict[tuple[str, str], list[float]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(suffix):
            times.setdefault((event["name"].removesuffix(suffix), event["args"]["op_name"]), []).append(event["dur"] / 1e3)
    return tuple(
        LayerTime(name=name, operator=operator, precision=known.get(name, "unknown"), ms=sum(found[1:]) / runs)
        for (name, operator), found in times.items()
    )


def layer_table(path: Path, recipe: Recipe) -> tuple[Layer, ...]:
    """The kernels that the runtime chose: its own optimized graph, at the level that is run, on this machine."""
    with TemporaryDirectory() as scratch:
        options = session_options(recipe)
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        open_session(path, options, str(recipe.options.get("provider", PROVIDERS["cpu"])))
        model = onnx.load(Path(scratch) / "optimized.onnx")
    known = _onnx.constants(model.graph)
    types = _types(model)
    return tuple(_layer(node, known, types) for node in model.graph.node if not known.issuperset(node.output))


def _layer(node: onnx.NodeProto, known: set[str], types: dict[str, str]) -> Layer:
    place = _WEIGHT_INPUT.get(node.op_type)
    weighted = place is not None and node.input[place] in known
    integer = node.op_type.startswith("QLinear") or node.op_type in _INTEGER
    precision = Precision.INT8 if integer else types.get(node.output[0], Precision.FP32)
    return Layer(name=node.name, operator=node.op_type, precision=precision, weighted=weighted)


def _types(model: onnx.ModelProto) -> dict[str, str]:
    """Element types by tensor name, as far as the optimized graph states them; the rest of a float graph is fp32."""
    spelled = {np.dtype(np.float32): Precision.FP32, np.dtype(np.float16): Precision.FP16, np.dtype(np.int8): Precision.INT8}
    spelled[np.dtype(np.uint8)] = Precision.INT8
    found = {v.name: onnx.helper.tensor_dtype_to_np_dtype(v.type.tensor_type.elem_type) for v in model.graph.value_info}
    return {name: spelled.get(dtype, str(dtype)) for name, dtype in found.items()}
