"""What the ONNX-based back ends share: reading a graph safely, and asking about it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
from onnx.external_data_helper import uses_external_data

from fofa_deploy.errors import GraphError, IntegrityError
from fofa_deploy.types import Graph, digest_file

DOMAINS = frozenset({"", "ai.onnx"})
WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
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
    try:
        onnx.checker.check_model(str(path))
        model = onnx.load(path)
    except (onnx.checker.ValidationError, DecodeError, OSError) as error:
        raise GraphError(f"{path} is not a safe ONNX file: {error}", _EXPORT_AGAIN) from error
    _check_single_file(model, path)
    _check_domains(model, path)
    _check_names(model, path, inputs, outputs)
    return model


def _check_single_file(model: onnx.ModelProto, path: Path) -> None:
    # onnx.load has resolved ordinary external data by now, so the question goes to the file as it is stored.
    stored = onnx.load(path, load_external_data=False)
    if any(uses_external_data(tensor) for tensor in _tensors(stored.graph)):
        raise GraphError(f"{path} keeps weights in other files, which its digest does not cover", _EXPORT_AGAIN)


def _check_domains(model: onnx.ModelProto, path: Path) -> None:
    nodes = [*_nodes(model.graph), *(node for function in model.functions for node in function.node)]
    found = {node.domain for node in nodes} | {function.domain for function in model.functions}
    if foreign := found - DOMAINS:
        raise GraphError(f"{path} uses operators outside the ONNX standard, from {', '.join(sorted(foreign))}", _EXPORT_AGAIN)


def _check_names(model: onnx.ModelProto, path: Path, inputs: set[str], outputs: set[str]) -> None:
    found = ({value.name for value in model.graph.input}, {value.name for value in model.graph.output})
    if found != (inputs, outputs):
        raise GraphError(f"{path} maps {found[0]} to {found[1]}, its sidecar {inputs} to {outputs}", "capture the model again")


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node, those in the branches of If, Loop and Scan included."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for branch in (attribute.g, *attribute.graphs):
                yield from _nodes(branch)


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    yield from graph.initializer
    for node in _nodes(graph):
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


def weighted(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The convolutions and matrix products with constant weights: the layers that cost."""
    known = constants(model.graph)
    return [node for node in model.graph.node if node.op_type in WEIGHTED and node.input[1] in known]


def is_transformer(model: onnx.ModelProto) -> bool:
    """Whether it attends or normalizes per token: such graphs lose accuracy when everything in them is quantized."""
    known = constants(model.graph)
    return any(
        node.op_type in {"Attention", "LayerNormalization"} or (node.op_type == "MatMul" and not known.intersection(node.input))
        for node in model.graph.node
    )


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
