"""ONNX Runtime on CPUs and CUDA: float; on CPUs static int8 (Q/DQ) and dynamic int8 of matrix products, on CUDA fp16 and bf16."""

from __future__ import annotations

import contextlib
import functools
import io
import re
import shutil
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import onnx
import onnx.version_converter
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
    Scalar,
)
from fofa_exporters import _device, _kernels, _onnx, _typed
from fofa_exporters._fused import fused
from fofa_exporters._onnxruntime_recipes import CUDA, FP32, on_cpu
from fofa_exporters._quantization import Scheme, prepare, quantized, require_calibration
from fofa_exporters._rewrite import saturate_gates

PROVIDERS = {"cpu": "CPUExecutionProvider", "gpu": "CUDAExecutionProvider"}
REFUSALS: tuple[type[Exception], ...] = (
    state.EPFail, state.Fail, state.InvalidArgument, state.InvalidGraph, state.InvalidProtobuf,
    state.NoSuchFile, state.NotImplemented, state.RuntimeException,
)  # fmt: skip
_BF16_OPSET = 22  # the first whose convolutions may be in bf16
_NO_BF16: _typed.Places = {
    **dict.fromkeys(("MaxPool", "GlobalAveragePool", "GlobalMaxPool", "DepthToSpace", "SpaceToDepth"), (0,)),
    **dict.fromkeys(("LeakyRelu", "Elu", "Selu", "LogSoftmax", "Log", "Reciprocal", "Floor", "Ceil", "Round"), (0,)),
    **dict.fromkeys(("ReduceMax", "ReduceMin", "ReduceProd", "ReduceL2", "ReduceLogSumExp", "CumSum"), (0,)),
    **dict.fromkeys(("PRelu", "Einsum"), (0, 1)),
    **dict.fromkeys(("Clip", "Resize", "ConvTranspose", "InstanceNormalization"), (0, 1, 2)),
    "Pad": (0, 2),
    "BatchNormalization": (0, 1, 2, 3, 4),
}
"""Of ONNX Runtime 1.31's CUDA provider, as its own kernels tell; what it lacks beyond these it refuses by name."""
BUILD_FAULTS: tuple[type[Exception], ...] = (
    *(ValueError, RuntimeError, onnx.version_converter.ConvertError),  # the quantizer raises plain ones
    *REFUSALS,
)


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
    precisions = frozenset({Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8})
    suffixes = (".onnx",)
    native = False
    check_file = staticmethod(_onnx.check_file)

    def probe(self, profile: HardwareProfile) -> Probe:
        reason = _absence(profile)
        return Probe(can_build=not reason, can_run=not reason, reason=reason, versions=versions())

    def recipes(self, profile: HardwareProfile, graph: Graph) -> Sequence[Recipe]:
        options = _bound_to(profile)
        offered = CUDA if profile.device.kind == "gpu" else on_cpu(profile, _onnx.read(graph))
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
        recipe = FP32.model_copy(update={"options": _bound_to(profile)})
        try:
            return _onnx.describe(path, _onnx.CONTRIBUTED, lambda: layer_table(path, recipe))
        except REFUSALS as error:
            raise BackendError(f"onnxruntime cannot load {path}: {error}", "export it for this version") from error

    def open_file(self, found: ModelFile, profile: HardwareProfile) -> OnnxRuntimeSession:
        found.check()
        return OnnxRuntimeSession(_load(found.path, profile, session_options(FP32)))

    def layer_times(self, artifact: Artifact, profile: HardwareProfile, feeds: Feeds, runs: int) -> tuple[LayerTime, ...]:
        with TemporaryDirectory() as scratch:
            session = _load(artifact.path, profile, _profiling(session_options(artifact.recipe), Path(scratch)))
            for _ in range(1 + runs):
                session.run(None, dict(feeds))
            return _kernels.times(_kernels.events(Path(session.end_profiling())), artifact.layers, runs)


# --- writing ------------------------------------------------------------------------------------------------------


def _copy(graph: Graph, model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None, main: Path) -> None:
    shutil.copyfile(graph.path, main)


def _write_fused(graph: Graph, model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None, main: Path) -> None:
    onnx.save(fused(model), main)


def _write_static(graph: Graph, model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None, main: Path) -> None:
    written = saturate_gates(quantized(model, require_calibration(recipe, calibration), Scheme.of(recipe)))
    onnx.save(fused(written) if recipe.options.get("fused") else written, main)


def _write_dynamic(graph: Graph, model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None, main: Path) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with TemporaryDirectory() as scratch, _onnx.quiet():
        source = Path(scratch) / "prepared.onnx"
        prepared = prepare(fused(model) if recipe.options.get("fused") else model)
        onnx.save(prepared, source)
        quantize_dynamic(
            source,
            main,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=not recipe.options.get("per_tensor"),
            reduce_range=bool(recipe.options.get("seven_bit_weights")),
            weight_type=QuantType.QInt8,
            nodes_to_exclude=_onnx.stacked(prepared),
            extra_options={"MatMulConstBOnly": True},
        )


def _write_typed(graph: Graph, model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None, main: Path) -> None:
    if recipe.precision is Precision.FP16:
        onnx.save(_typed.typed(model, recipe.precision), main)
        return
    newer = onnx.version_converter.convert_version(model, _BF16_OPSET) if _onnx.is_older(model, _BF16_OPSET) else model
    onnx.save(_typed.typed(newer, recipe.precision, _NO_BF16), main)


Writer = Callable[[Graph, onnx.ModelProto, Recipe, Calibration | None, Path], None]
_WRITERS: dict[str, Writer] = {
    "copy": _copy,
    "fused": _write_fused,
    "static": _write_static,
    "dynamic": _write_dynamic,
    "typed": _write_typed,
}


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


def open_session(model: Path | bytes, options: Any, provider: str, device: str = "") -> Any:  # noqa: ANN401
    """An ``InferenceSession`` on ``provider``; onnxruntime itself falls back to the CPU without an error, now or in a later run.

    Raises:
        BackendError: this onnxruntime lacks the provider, cannot start it, or bound another one.
    """
    available = ort.get_available_providers()
    if provider not in available:
        raise BackendError(f"this onnxruntime has no {provider!r}, it has {', '.join(available)}", _remedy(provider))
    cuda = provider == PROVIDERS["gpu"]
    missing = _preload() if cuda else ""
    # TF32 is on by default on CUDA, and then "fp32" multiplies in 19 bits.
    own = {"device_id": str(_device.ordinal(device)), "use_tf32": "0"} if cuda else {}
    source = model if isinstance(model, bytes) else str(model)
    try:
        session = ort.InferenceSession(source, options, providers=[provider], provider_options=[own], enable_fallback=0)
    except RuntimeError as error:  # none of its own kinds: what CUDA throws
        if not cuda:
            raise
        raise BackendError(f"{provider} does not start: {_words(str(error))}", "check `nvidia-smi`") from error
    if session.get_providers()[0] != provider:
        raise BackendError(
            f"onnxruntime bound {session.get_providers()[0]} and not {provider}",
            missing or "check the device's driver and libraries",
        )
    return session


@functools.cache
def _preload() -> str:
    """Load CUDA and cuDNN from where pip puts them. What is missing, in onnxruntime's words, or nothing."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()
    return " ".join(said.getvalue().split())


def _words(error: str) -> str:
    """CUDA's own words of an error that is wrapped in places in the source."""
    found = re.search(r"(?:CUDA|CUDNN|CUBLAS) failure \d+: [^;]+", error)
    return found.group().strip() if found else error.partition("\n")[0]


def _remedy(provider: str) -> str:
    if provider != PROVIDERS["gpu"]:
        return "install another build of it"
    swap = "pip uninstall -y onnxruntime onnxruntime-gpu && pip install 'onnxruntime-gpu[cuda,cudnn]'"
    both = "onnxruntime and onnxruntime-gpu are both installed and overwrite each other: " if _installed("onnxruntime-gpu") else ""
    return both + swap


def _installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def _absence(profile: HardwareProfile) -> str:
    """Why the profile's device cannot be used here, or nothing: onnxruntime lists providers that it then cannot start."""
    provider = PROVIDERS.get(profile.device.kind)
    if provider is None:
        return f"onnxruntime has no provider for {profile.device.kind} here"
    try:
        open_session(_nothing(), ort.SessionOptions(), provider, profile.device.name)
    except BackendError as error:
        return f"{error.message}: {error.action}"
    except REFUSALS as error:
        return f"{provider} does not start: {_words(str(error))}"
    return ""


def _nothing() -> bytes:
    """The smallest model: what goes in comes out."""
    ends = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1]) for name in ("in", "out")]
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["in"], ["out"])], "nothing", ends[:1], ends[1:])
    made = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    return bytes(made.SerializeToString())


def _load(path: Path, profile: HardwareProfile, options: Any) -> Any:  # noqa: ANN401
    options.intra_op_num_threads = profile.execution.thread_count
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(profile.execution.spinning)))
    try:
        return open_session(path, options, PROVIDERS.get(profile.device.kind, ""), profile.device.name)
    except REFUSALS as error:
        raise BackendError(f"onnxruntime cannot load {path}: {error}", "build the artifact again") from error


def _bound_to(profile: HardwareProfile) -> dict[str, Scalar]:
    """What a recipe says of its device: which of several GPUs matters, a CPU is the whole machine."""
    provider: dict[str, Scalar] = {"provider": PROVIDERS.get(profile.device.kind, "")}
    return {**provider, "device": profile.device.name} if profile.device.kind == "gpu" else provider


def _profiling(options: Any, scratch: Path) -> Any:  # noqa: ANN401
    options.enable_profiling, options.profile_file_prefix = True, str(scratch / "profile")
    return options


def layer_table(path: Path, recipe: Recipe) -> tuple[Layer, ...]:
    """The kernels that the runtime chose, at the level that is run, on this machine, as they ran on one batch of zeros.

    Raises:
        BackendError: the recipe's provider is not there, or layers with weights ran elsewhere.
    """
    provider = str(recipe.options.get("provider", PROVIDERS["cpu"]))
    with TemporaryDirectory() as scratch:
        options = _profiling(session_options(recipe), Path(scratch))
        options.optimized_model_filepath = str(Path(scratch) / "optimized.onnx")
        session = open_session(path, options, provider, str(recipe.options.get("device", "")))
        model = onnx.load(options.optimized_model_filepath)
        feeds = _kernels.blank(model)
        if feeds is not None:
            session.run(None, dict(feeds))
        return _kernels.layers(model, _kernels.events(Path(session.end_profiling())), provider)
