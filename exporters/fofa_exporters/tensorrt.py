"""TensorRT and TensorRT for RTX: one code path, because both are strongly typed and take the same typed ONNX.

Precision lives in the graph: fp16 with fp32 inputs and outputs, or symmetric signed Q/DQ pairs. The RTX flavour builds
engines on a machine without a GPU; there, the types of the parsed network are the layer table.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import onnx

from fofa_deploy.errors import BackendError, BuildError, IntegrityError
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
)
from fofa_exporters import _onnx, _typed
from fofa_exporters._cuda import TensorRtSession, choose_gpu, logger, no_gpu, words
from fofa_exporters._engine import inspector_layers, layer_time, network_layers, typed_layers
from fofa_exporters._quantization import Scheme, quantized, require_calibration
from fofa_exporters._quantization.recipes import grown
from fofa_exporters._rewrite import expand_col2im

ENGINE = "model.engine"


# --- the two back ends --------------------------------------------------------------------------------------------


class _Family:
    """What both flavours do; they differ in their package, and in whether a GPU has to be there to build."""

    name: ClassVar[str]
    package: ClassVar[str]
    builds_without_gpu: ClassVar[bool]
    precisions = frozenset({Precision.FP32, Precision.FP16, Precision.BF16, Precision.INT8})
    suffixes = (".engine", ".plan", ".trt")
    native = True

    def probe(self, profile: HardwareProfile) -> Probe:
        if self._builds_there(profile):
            reason = f"{profile.device.host} builds the engine itself, from a typed ONNX file"
            return Probe(can_build=True, can_run=False, reason=reason, versions={"onnx": onnx.__version__})
        try:
            trt = importlib.import_module(self.package)
        except (ImportError, OSError) as error:
            hint = f"pip install 'fofa-deploy[{self.name}]'"
            return Probe(can_build=False, can_run=False, reason=f"{self.package} does not import ({error}): {hint}")
        reason = no_gpu() if profile.device.kind == "gpu" else f"TensorRT has no {profile.device.kind}"
        can_build = profile.device.kind == "gpu" and (self.builds_without_gpu or not reason)
        return Probe(can_build=can_build, can_run=not reason, reason=reason, versions=self.versions(trt))

    def recipes(self, profile: HardwareProfile, graph: Graph) -> Sequence[Recipe]:
        """fp16 first: TensorRT-RTX documents int8 only for weights of matrix products, so int8 has to prove itself."""
        sizes = profile.execution.batch_sizes
        batch: dict[str, Scalar] = {"max_batch": max(sizes), "best_batch": sizes[0], "device": profile.device.name}
        if self._builds_there(profile):
            batch["on_device"] = True
        rest = Precision.FP16 if Precision.FP16 in profile.precisions else Precision.FP32
        held = {"smallest_scale": _typed.SMALLEST_SCALE} if rest is Precision.FP16 else {}
        options = {**INT8.options, "rest": rest, **held}
        int8 = INT8.model_copy(update={"options": options, "description": f"{INT8.description}, rest {rest}"})
        offered = [recipe for recipe in (FP16, BF16, *grown([int8]), FP32) if recipe.precision in profile.precisions]
        return [recipe.model_copy(update={"options": {**recipe.options, **batch}}) for recipe in offered]

    def build(self, graph: Graph, recipe: Recipe, calibration: Calibration | None, out: Path) -> Artifact:
        typed = _written(expand_col2im(_onnx.read(graph)), recipe, calibration)
        if recipe.options.get("on_device"):
            main, versions = out / "model.onnx", {"onnx": onnx.__version__}
            onnx.save(typed, main)
            return Artifact.of(
                out, main, backend=self.name, recipe=recipe, graph=graph, layers=typed_layers(typed), versions=versions
            )
        trt = self.runtime()
        engine, layers = _build_engine(trt, typed, recipe.options)
        main = out / ENGINE
        main.write_bytes(engine)
        versions = self.versions(trt)
        return Artifact.of(out, main, backend=self.name, recipe=recipe, graph=graph, layers=layers, versions=versions)

    def load(self, artifact: Artifact, profile: HardwareProfile) -> TensorRtSession:
        """An engine is native code: only bytes with the artifact's own digest reach the deserializer."""
        if artifact.recipe.options.get("on_device"):
            raise BackendError(f"{artifact.path} is built on its device", "measure it there: fofa-deploy profile")
        return self._session(_engine_bytes(artifact), profile)

    def check_file(self, path: Path) -> None:
        """Of machine code nothing can be told without running it."""

    def describe_file(self, path: Path, profile: HardwareProfile) -> ModelFile:
        record, data = FileRecord.of(path.parent, path), path.read_bytes()
        with self._session(data, profile) as session:
            inputs = session.inputs()
        layers = inspector_layers(_inspect(self.runtime(), data))
        return ModelFile(path=path, files=(record,), inputs=inputs, layers=layers)

    def open_file(self, found: ModelFile, profile: HardwareProfile) -> TensorRtSession:
        return self._session(_engine_bytes(found), profile)

    def _session(self, engine: bytes, profile: HardwareProfile) -> TensorRtSession:
        if reason := no_gpu():
            raise BackendError(f"{self.name} cannot run here: {reason}", "run on a machine with an NVIDIA GPU")
        return TensorRtSession(self.runtime(), engine, profile.device.name)

    def layer_times(self, artifact: Artifact, profile: HardwareProfile, feeds: Feeds, runs: int) -> tuple[LayerTime, ...]:
        known = {layer.name: layer for layer in artifact.layers}
        with self.load(artifact, profile) as session:
            times = session.layer_ms(feeds, runs)
        return tuple(layer_time(name, known.get(name), ms) for name, ms in times.items())

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
BF16 = Recipe(name="bf16", precision=Precision.BF16, description="weights and activations in bfloat16, fp32 in and out")
FP32 = Recipe(name="fp32", precision=Precision.FP32, description="full precision, TF32 off")
INT8 = Recipe(
    name="int8-qdq-symmetric",
    precision=Precision.INT8,
    description="convolutions and constant matrix products in signed symmetric int8 per channel",
    needs_calibration=True,
    # The parser takes no int32 bias behind a DequantizeLinear, and no zero points other than 0.
    options={"signed_activations": True, "weighted_only": True, "float_outputs": True, "quantize_bias": False},
)


# --- the typed graph ----------------------------------------------------------------------------------------------


_WIDE = {Precision.BF16: {**_typed.FLOAT32_INPUTS, "HardSwish": (0,), "ConvTranspose": (0, 1, 2)}}
"""What TensorRT's parser or compiler does not take in bfloat16: it stays in float32 between casts."""


def _as_it_is(model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None) -> onnx.ModelProto:
    return model


def _narrow(model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None) -> onnx.ModelProto:
    return _typed.typed(model, recipe.precision, _WIDE.get(recipe.precision, _typed.FLOAT32_INPUTS))


def _integer(model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None) -> onnx.ModelProto:
    pairs = expand_col2im(quantized(model, require_calibration(recipe, calibration), Scheme.of(recipe)))
    rest = Precision(str(recipe.options.get("rest", Precision.FP32)))
    return pairs if rest is Precision.FP32 else _typed.typed(pairs, rest)


Writer = Callable[[onnx.ModelProto, Recipe, Calibration | None], onnx.ModelProto]
_WRITERS: dict[Precision, Writer] = {
    Precision.FP32: _as_it_is,
    Precision.FP16: _narrow,
    Precision.BF16: _narrow,
    Precision.INT8: _integer,
}


def _written(model: onnx.ModelProto, recipe: Recipe, calibration: Calibration | None) -> onnx.ModelProto:
    if recipe.precision not in _WRITERS:
        raise BuildError(f"TensorRT is not built in {recipe.precision} here", f"ask for one of {', '.join(_WRITERS)}")
    try:
        return _WRITERS[recipe.precision](model, recipe, calibration)
    except (ValueError, RuntimeError) as error:
        raise BuildError(f"the graph cannot be written in {recipe.precision}: {error}", "try another recipe") from error


# --- building -----------------------------------------------------------------------------------------------------


def _build_engine(trt: ModuleType, model: onnx.ModelProto, options: Mapping[str, Scalar]) -> tuple[bytes, tuple[Layer, ...]]:
    """Serialized engine and layer table of a typed ONNX graph; for the GPU that the options name, where there is one.

    Raises:
        BuildError: the parser or the compiler refused, in TensorRT's own words.
    """
    log = logger(trt)
    log.errors.clear()
    if not no_gpu():
        choose_gpu(str(options.get("device", "")))
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString()):
        faults = [str(parser.get_error(index)) for index in range(parser.num_errors)]
        raise BuildError(f"TensorRT's parser refused the graph: {words(faults)}", "try another recipe")
    engine = builder.build_serialized_network(network, _config(trt, builder, network, options))
    if engine is None:
        raise BuildError(f"TensorRT's compiler refused the graph: {words(log.errors)}", "try another recipe")
    data = bytes(engine)
    return data, _layers(trt, network, data)


def _network_flags(trt: ModuleType) -> int:
    """Explicit batch and strong typing, each where this version still has a flag for it."""
    flags = trt.NetworkDefinitionCreationFlag
    return sum(1 << int(getattr(flags, name)) for name in ("EXPLICIT_BATCH", "STRONGLY_TYPED") if hasattr(flags, name))


def _config(trt: ModuleType, builder: Any, network: Any, options: Mapping[str, Scalar]) -> Any:  # noqa: ANN401
    """For batches from one to the largest, fastest at the best. No timing cache: one forces TensorRT-RTX to look for a GPU."""
    best, largest = (int(options.get(name, 1)) for name in ("best_batch", "max_batch"))
    config = builder.create_builder_config()
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shape = tuple(tensor.shape)[1:]
        profile.set_shape(tensor.name, (1, *shape), (min(best, largest), *shape), (largest, *shape))
    config.add_optimization_profile(profile)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, "TF32"):
        config.clear_flag(trt.BuilderFlag.TF32)  # on by default, and then "fp32" multiplies in 19 bits
    return config


# --- layer table --------------------------------------------------------------------------------------------------


def _layers(trt: ModuleType, network: Any, engine: bytes) -> tuple[Layer, ...]:  # noqa: ANN401
    """The engine's own table where a GPU lets it be read and it shows the weights, else the strongly typed network's."""
    declared = network_layers(network)
    if no_gpu():
        return declared
    inspected = inspector_layers(_inspect(trt, engine))
    covered = sum(layer.weighted for layer in inspected) * 2 >= sum(layer.weighted for layer in declared)
    return inspected if covered else declared


def _inspect(trt: ModuleType, engine: bytes) -> str:
    deserialized = trt.Runtime(logger(trt)).deserialize_cuda_engine(engine)
    inspector = deserialized.create_engine_inspector()
    return str(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


# --- running ------------------------------------------------------------------------------------------------------


def _engine_bytes(artifact: Artifact | ModelFile) -> bytes:
    """The engine, digested in memory, so that nothing can swap the file between the check and the deserializer."""
    data = artifact.path.read_bytes()
    if hashlib.sha256(data).hexdigest() != artifact.files[0].sha256:
        raise IntegrityError(f"{artifact.path} is altered since it was built", "build the artifact again")
    return data
