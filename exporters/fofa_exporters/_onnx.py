"""What the ONNX-based back ends share: reading a graph safely, asking about it, and static Q/DQ quantization."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import uses_external_data

from fofa_deploy.errors import BuildError, DataError, GraphError, IntegrityError
from fofa_deploy.types import Calibration, Feeds, FileRecord, Graph, Layer, ModelFile, Recipe, TensorSpec, digest_file

DOMAINS = frozenset({"", "ai.onnx"})
CONTRIBUTED = DOMAINS | {"com.microsoft"}
"""With the operators that ONNX Runtime's own optimizer and quantizer write."""
BLOBS = frozenset({"EPContext", "Snpe"})
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
PRODUCTS = tuple(sorted(WEIGHTED))
CALIBRATION_BATCH = 8
MIN_CALIBRATION_IMAGES = 8
_EXPORT_AGAIN = "capture the model again as one standard ONNX file; custom operators and external data are not taken"


# --- reading ------------------------------------------------------------------------------------------------------


def read(graph: Graph) -> onnx.ModelProto:
    """Parse and check a captured graph before any runtime touches its file.

    Raises:
        IntegrityError: the file is not the captured one.
        GraphError: it is malformed, unsafe, or does not fit its sidecar.
    """
    if not graph.path.is_file() or digest_file(graph.path) != graph.sha256:
        raise IntegrityError(f"{graph.path} is missing or altered since it was captured", "capture the model again")
    return read_file(graph.path, {graph.sidecar.input.name}, {graph.sidecar.output.name})


def read_file(path: Path, inputs: set[str], outputs: set[str]) -> onnx.ModelProto:
    """Parse and check an ONNX file: valid, one file, standard operators, the expected inputs and outputs."""
    model = read_any(path, DOMAINS)
    _check_names(model, path, inputs, outputs)
    return model


def read_any(path: Path, domains: Set[str]) -> onnx.ModelProto:
    """Parse and check an ONNX file: valid, one file, operators of these domains, and none that holds a vendor's machine code."""
    try:
        onnx.checker.check_model(str(path))
        model = onnx.load(path)
    except (onnx.checker.ValidationError, DecodeError, OSError) as error:
        raise GraphError(f"{path} is not a safe ONNX file: {error}", _EXPORT_AGAIN) from error
    _check_single_file(model, path)
    _check_operators(model, path, domains)
    return model


def describe(path: Path, domains: Set[str], layers: Callable[[], tuple[Layer, ...]]) -> ModelFile:
    """A file that others built, checked before ``layers`` has a runtime look at it.

    Raises:
        GraphError: it is not safe, or an input is no array whose number of axes is known.
    """
    graph = read_any(path, domains).graph
    weights = {tensor.name for tensor in graph.initializer}
    inputs = tuple(_spec(value, path) for value in graph.input if value.name not in weights)
    return ModelFile(path=path, files=(FileRecord.of(path.parent, path),), inputs=inputs, layers=layers())


def _spec(value: onnx.ValueInfoProto, path: Path) -> TensorSpec:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise GraphError(f"{path} has an input {value.name!r} that is no array, or of no known shape", "export it with shapes")
    shape = tuple(side.dim_value if side.dim_value > 0 else None for side in kind.shape.dim)
    return TensorSpec(name=value.name, shape=shape, dtype=onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name)


def _check_single_file(model: onnx.ModelProto, path: Path) -> None:
    # onnx.load has resolved ordinary external data by now, so the question goes to the file as it is stored.
    stored = onnx.load(path, load_external_data=False)
    if any(uses_external_data(tensor) for tensor in _tensors(stored)):
        raise GraphError(f"{path} keeps weights in other files, which its digest does not cover", _EXPORT_AGAIN)


def _check_operators(model: onnx.ModelProto, path: Path, domains: Set[str]) -> None:
    nodes = list(_all_nodes(model))
    found = {node.domain for node in nodes} | {function.domain for function in model.functions}
    if foreign := found - domains:
        raise GraphError(f"{path} uses operators outside the ONNX standard, from {', '.join(sorted(foreign))}", _EXPORT_AGAIN)
    if blobs := {node.op_type for node in nodes} & BLOBS:
        raise GraphError(f"{path} holds a vendor's machine code, in {', '.join(sorted(blobs))} nodes", _EXPORT_AGAIN)


def _check_names(model: onnx.ModelProto, path: Path, inputs: set[str], outputs: set[str]) -> None:
    found = ({value.name for value in model.graph.input}, {value.name for value in model.graph.output})
    if found != (inputs, outputs):
        raise GraphError(f"{path} maps {found[0]} to {found[1]}, its sidecar {inputs} to {outputs}", "capture the model again")


def _all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for holder in (model.graph, *model.functions):
        yield from _nodes(holder)


def _nodes(graph: onnx.GraphProto | onnx.FunctionProto) -> Iterator[onnx.NodeProto]:
    """Every node, those in the branches of If, Loop and Scan included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for branch in (attribute.g, *attribute.graphs):
                yield from _nodes(branch)


def _tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    yield from model.graph.initializer
    for node in _all_nodes(model):
        for attribute in node.attribute:
            yield from (attribute.t, *attribute.tensors, *attribute.g.initializer)


# --- asking -------------------------------------------------------------------------------------------------------


def constants(graph: onnx.GraphProto) -> set[str]:
    """Names of initializers and of everything computed from them alone."""
    known = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if all(name in known for name in node.input if name):
            known.update(node.output)
    return known


def weighted_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the convolutions and matrix products with constant weights: the layers that cost."""
    known = constants(model.graph)
    return [node.name for node in model.graph.node if node.op_type in WEIGHTED and node.input[1] in known]


def is_transformer(model: onnx.ModelProto) -> bool:
    """Whether it attends or normalizes per token: such graphs lose accuracy when everything in them is quantized."""
    known = constants(model.graph)
    return any(
        node.op_type in {"Attention", "LayerNormalization"} or (node.op_type == "MatMul" and not known.intersection(node.input))
        for node in model.graph.node
    )


# --- quantizing ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scheme:
    """How ``quantize_static`` writes its Q/DQ pairs. Weights are always signed, symmetric and per channel."""

    signed_activations: bool = False
    """Signed activations are symmetric as well; unsigned ones have a zero point."""
    seven_bit_weights: bool = False
    """Weights in -64..63, so that pairs of u8 x s8 products never saturate 16 bits on CPUs without VNNI."""
    weighted_only: bool = False
    """Leave everything but ``weighted_nodes`` alone."""
    float_outputs: tuple[str, ...] = ()
    """Operators whose outputs are left in float."""
    quantize_bias: bool = True


class Reader:
    """onnxruntime's CalibrationDataReader: one batch at a time, so that the images never sit in memory at once."""

    def __init__(self, calibration: Calibration) -> None:
        self._batches = calibration.batches(CALIBRATION_BATCH)

    def get_next(self) -> Feeds | None:
        return next(self._batches, None)


def require_calibration(recipe: Recipe, calibration: Calibration | None) -> Calibration:
    """The calibration images, refused when they would give meaningless ranges without any runtime complaining.

    Raises:
        BuildError: none were given.
        DataError: too few of them, or all of one value.
    """
    if calibration is None:
        raise BuildError(f"recipe {recipe.name!r} needs calibration images and got none", "add calibration images to the plan")
    images = np.load(calibration.images, mmap_mode="r", allow_pickle=False)
    if len(images) < MIN_CALIBRATION_IMAGES:
        found = f"{calibration.images} holds {len(images)} images, fewer than {MIN_CALIBRATION_IMAGES}"
        raise DataError(found, "calibrate on more real images")
    varied = sum(int(image.min() != image.max()) for image in images)
    if varied < MIN_CALIBRATION_IMAGES:
        found = f"all but {varied} images of {calibration.images} are of one constant value"
        raise DataError(found, "calibrate on real, varied images")
    return calibration


def prepare(model: onnx.ModelProto, path: Path) -> onnx.ModelProto:
    """Fold and annotate a graph for onnxruntime's quantizer, and write it to ``path``."""
    from onnxruntime.quantization.shape_inference import quant_pre_process

    source = path.with_suffix(".source.onnx")
    onnx.save(model, source)  # a model given in memory is cut into external files, which onnxruntime then cannot read
    with quiet():
        # Symbolic inference needs sympy and gives up on some ViTs; plain inference annotates every tensor of both kinds here.
        quant_pre_process(source, path, skip_symbolic_shape=True)
    return _name_nodes(path)


def quantize_static(model: onnx.ModelProto, calibration: Calibration, scheme: Scheme, destination: Path) -> None:
    """Write ``model`` with Q/DQ pairs, ranges taken from streamed calibration images, to ``destination``."""
    from onnxruntime.quantization import QuantType, quantize_static

    options = {
        "ActivationSymmetric": scheme.signed_activations,
        "WeightSymmetric": True,
        "QuantizeBias": scheme.quantize_bias,
        "OpTypesToExcludeOutputQuantization": list(scheme.float_outputs),
    }
    with TemporaryDirectory() as scratch, quiet():
        source = Path(scratch) / "prepared.onnx"
        prepared = prepare(model, source)
        quantize_static(
            source,
            destination,
            Reader(calibration),
            nodes_to_quantize=weighted_nodes(prepared) if scheme.weighted_only else None,
            per_channel=True,
            reduce_range=scheme.seven_bit_weights,
            activation_type=QuantType.QInt8 if scheme.signed_activations else QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            extra_options=options,
        )


def _name_nodes(path: Path) -> onnx.ModelProto:
    """onnxruntime's quantizer picks nodes by name, and exporters may leave names out."""
    model = onnx.load(path)
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    onnx.save(model, path)
    return model


@contextmanager
def quiet(loggers: Iterable[str] = ("",)) -> Iterator[None]:
    """Hold back the advice that converters give on their root logger and through warnings; errors pass."""
    levels = {name: logging.getLogger(name).level for name in loggers}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            for name in levels:
                logging.getLogger(name).setLevel(logging.ERROR)
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
