"""What the ONNX-based back ends share: reading a graph safely, and asking about it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import contextmanager
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import uses_external_data

from fofa_deploy.errors import GraphError, IntegrityError
from fofa_deploy.types import FileRecord, Graph, Layer, ModelFile, TensorSpec, digest_file
from fofa_exporters._normal import normalized

DOMAINS = frozenset({"", "ai.onnx"})
CONTRIBUTED = DOMAINS | {"com.microsoft"}
"""With the operators that ONNX Runtime's own optimizer and quantizer write."""
BLOBS = frozenset({"EPContext", "Snpe"})
CONVOLUTIONS = frozenset({"Conv", "ConvTranspose"})
WEIGHTED = CONVOLUTIONS | {"Gemm", "MatMul"}
_BENDS = frozenset({"Clip", "Erf", "HardSigmoid", "Sigmoid", "Softplus", "Tanh"})
_ELEMENTWISE = _BENDS | {"Add", "Div", "Mul", "Pow", "Sub"}
_WHOLE_GATES = frozenset({"Gelu", "HardSwish", "Mish", "Swish"})
_EXPORT_AGAIN = "capture the model again as one standard ONNX file; custom operators and external data are not taken"


# --- reading ------------------------------------------------------------------------------------------------------


def read(graph: Graph) -> onnx.ModelProto:
    """Parse and check a captured graph before any runtime touches its file; written in the one way that others expect.

    Raises:
        IntegrityError: the file is not the captured one.
        GraphError: it is malformed, unsafe, or does not fit its sidecar.
    """
    if not graph.path.is_file() or digest_file(graph.path) != graph.sha256:
        raise IntegrityError(f"{graph.path} is missing or altered since it was captured", "capture the model again")
    return normalized(read_file(graph.path, {graph.sidecar.input.name}, {graph.sidecar.output.name}))


def read_file(path: Path, inputs: set[str], outputs: set[str]) -> onnx.ModelProto:
    """Parse and check an ONNX file: valid, one file, standard operators, the expected inputs and outputs."""
    model = read_any(path, DOMAINS)
    _check_names(model, path, inputs, outputs)
    return model


def read_any(path: Path, domains: Set[str]) -> onnx.ModelProto:
    """Parse and check an ONNX file: valid, one file, operators of these domains, and none that holds a vendor's machine code."""
    try:
        onnx.checker.check_model(str(path))
        model = onnx.load(path, load_external_data=False)
    except (onnx.checker.ValidationError, DecodeError, OSError) as error:
        raise GraphError(f"{path} is not a safe ONNX file: {error}", _EXPORT_AGAIN) from error
    _check_single_file(model, path)
    _check_operators(model, path, domains)
    return _without_weights(model)


def _without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """In place: inputs are what has to be fed. Files of old (IR 3) list their weights as well, as if these could be, too."""
    weights = {tensor.name for tensor in model.graph.initializer}
    inputs = [value for value in model.graph.input if value.name not in weights]
    if len(inputs) < len(model.graph.input):
        copied = [onnx.ValueInfoProto.FromString(value.SerializeToString()) for value in inputs]
        del model.graph.input[:]
        model.graph.input.extend(copied)
        model.ir_version = max(model.ir_version, 4)
    return model


def check_file(path: Path) -> None:
    """Of a file from elsewhere, if it is an ONNX file.

    Raises:
        GraphError: it is not safe.
    """
    if path.suffix.lower() == ".onnx":
        read_any(path, CONTRIBUTED)


def describe(path: Path, domains: Set[str], layers: Callable[[], tuple[Layer, ...]]) -> ModelFile:
    """A file that others built, checked before ``layers`` has a runtime look at it.

    Raises:
        GraphError: it is not safe, or an input is no array whose number of axes is known.
    """
    inputs = tuple(_spec(value, path) for value in read_any(path, domains).graph.input)
    return ModelFile(path=path, files=(FileRecord.of(path.parent, path),), inputs=inputs, layers=layers())


def _spec(value: onnx.ValueInfoProto, path: Path) -> TensorSpec:
    kind = value.type.tensor_type
    if not value.type.HasField("tensor_type") or not kind.HasField("shape"):
        raise GraphError(f"{path} has an input {value.name!r} that is no array, or of no known shape", "export it with shapes")
    shape = tuple(side.dim_value if side.dim_value > 0 else None for side in kind.shape.dim)
    return TensorSpec(name=value.name, shape=shape, dtype=onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type).name)


def _check_single_file(model: onnx.ModelProto, path: Path) -> None:
    if any(uses_external_data(tensor) for tensor in _tensors(model)):
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
    """Every stored tensor, those of branches and the parts of sparse ones included."""
    attributes = [attribute for node in _all_nodes(model) for attribute in node.attribute]
    branches = [branch for attribute in attributes for branch in (attribute.g, *attribute.graphs)]
    sparse = [tensor for attribute in attributes for tensor in (attribute.sparse_tensor, *attribute.sparse_tensors)]
    for graph in (model.graph, *branches):
        yield from graph.initializer
        sparse += graph.sparse_initializer
    for attribute in attributes:
        yield from (attribute.t, *attribute.tensors)
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


# --- asking -------------------------------------------------------------------------------------------------------


def constants(graph: onnx.GraphProto) -> set[str]:
    """Names of initializers and of everything computed from them alone."""
    known = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if all(name in known for name in node.input if name):
            known.update(node.output)
    return known


def weighted(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The convolutions and matrix products with constant weights: the layers that cost."""
    known = constants(model.graph)
    return [node for node in model.graph.node if node.op_type in WEIGHTED and node.input[1] in known]


def stacked(model: onnx.ModelProto) -> list[str]:
    """Names of the products that no runtime has in int8 per output: with a stack of constant matrices (a table per axis, say), or
    with the constant on the left, of which OpenVINO makes other numbers."""
    dims, known = {tensor.name: len(tensor.dims) for tensor in model.graph.initializer}, constants(model.graph)
    products = [node for node in model.graph.node if node.op_type == "MatMul"]
    return [node.name for node in products if node.input[0] in known or (node.input[1] in known and dims.get(node.input[1], 2) > 2)]


def grouped_transposed(model: onnx.ModelProto) -> list[str]:
    """Names of the transposed convolutions in groups that have a bias: a scale per channel of a group is none for it."""
    groups = {node.name: next((a.i for a in node.attribute if a.name == "group"), 1) for node in model.graph.node}
    found = (node for node in model.graph.node if node.op_type == "ConvTranspose" and len(node.input) > 2)
    return [node.name for node in found if groups[node.name] > 1]


def stores_half(model: onnx.ModelProto) -> bool:
    """Whether weights are stored in 16 bits."""
    return any(tensor.data_type in (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16) for tensor in model.graph.initializer)


def is_transformer(model: onnx.ModelProto) -> bool:
    """Whether it attends or normalizes per token: such graphs lose accuracy when everything in them is quantized."""
    known = constants(model.graph)
    return any(
        node.op_type in {"Attention", "LayerNormalization"} or (node.op_type == "MatMul" and not known.intersection(node.input))
        for node in model.graph.node
    )


def is_convolutional(model: onnx.ModelProto) -> bool:
    """Whether half of its layers with weights or more are convolutions, as in hybrids that also attend."""
    layers = weighted(model)
    return 2 * sum(node.op_type in CONVOLUTIONS for node in layers) >= len(layers)


def gates_itself(model: onnx.ModelProto) -> bool:
    """Whether an activation multiplies its input by a function of it, as SiLU and hard swish do."""
    known = constants(model.graph)
    origins: dict[str, str] = {}
    bent: set[str] = set()
    for node in model.graph.node:
        read = [name for name in node.input if name and name not in known]
        if node.op_type in _WHOLE_GATES:
            return True
        if node.op_type not in _ELEMENTWISE or len({origins.get(name, name) for name in read}) != 1:
            continue
        if node.op_type == "Mul" and len(set(read)) == 2 and bent.intersection(read):
            return True
        origins[node.output[0]] = origins.get(read[0], read[0])
        if node.op_type in _BENDS or bent.intersection(read):
            bent.add(node.output[0])
    return False


def is_older(model: onnx.ModelProto, opset: int) -> bool:
    """Whether it is written in standard operators from before ``opset``."""
    return any(used.domain in DOMAINS and used.version < opset for used in model.opset_import)


def has_branches(model: onnx.ModelProto) -> bool:
    """Whether a node holds a graph of its own, which may read any tensor outside it."""
    return any(attribute.HasField("g") or attribute.graphs for node in model.graph.node for attribute in node.attribute)


# --- silence ---------------------------------------------------------------------------------------------------------


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
