"""What reaches a runtime: only checked, whole, standard ONNX files, and calibration that means something."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from fofa_deploy.backend import backend_names, get_backend
from fofa_deploy.errors import GraphError, IntegrityError
from fofa_deploy.types import Graph, Precision, Recipe
from fofa_exporters import _onnx

from .conftest import Captured, profile_for, stand_in, write_sidecar


def _external(folder: Path) -> Graph:
    stand_in("cnn", folder)
    model = onnx.load(folder / "model.onnx")
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0)
    return Graph.load(folder)


def test_external_data_is_refused(tmp_path: Path):
    with pytest.raises(GraphError, match="digest does not cover"):
        _onnx.read(_external(tmp_path))


@pytest.mark.parametrize("name", backend_names())
def test_hard_linked_external_data_is_refused_by_every_back_end(name: str, tmp_path: Path):
    graph = _external(tmp_path)
    os.link(tmp_path / "weights.bin", tmp_path / "elsewhere.bin")
    backend, profile = get_backend(name), profile_for(name)
    (tmp_path / "out").mkdir()
    if not backend.probe(profile).can_build:
        pytest.skip(backend.probe(profile).reason)
    with pytest.raises(GraphError, match="hard link"):
        backend.build(graph, Recipe(name="fp32", precision=Precision.FP32, description="any"), None, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_external_data_outside_the_folder_is_refused(tmp_path: Path):
    (tmp_path / "inner").mkdir()
    graph = _external(tmp_path / "inner")
    model = onnx.load(graph.path, load_external_data=False)
    for entry in model.graph.initializer[0].external_data:
        entry.value = "../weights.bin" if entry.key == "location" else entry.value
    (tmp_path / "inner" / "weights.bin").rename(tmp_path / "weights.bin")
    graph.path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError):
        _onnx.read(Graph.load(tmp_path / "inner"))


@pytest.mark.parametrize("domain", ["com.microsoft", "evil.example"])
def test_custom_domain_is_refused(domain: str, tmp_path: Path):
    graph = stand_in("cnn", tmp_path)
    model = onnx.load(graph.path)
    model.graph.node[0].domain = domain
    model.graph.node[0].op_type = "EPContext"
    model.opset_import.append(onnx.helper.make_opsetid(domain, 1))
    onnx.save(model, graph.path)
    with pytest.raises(GraphError, match=domain):
        _onnx.read(Graph.load(tmp_path))


def test_what_hides_in_a_branch_of_a_function_is_found(tmp_path: Path):
    graph, make = stand_in("cnn", tmp_path), onnx.helper
    result = make.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
    branch = make.make_graph([make.make_node("Anything", [], ["y"], domain="evil.example")], "branch", [], [result])
    choice = make.make_node("If", ["x"], ["z"], then_branch=branch, else_branch=branch)
    opsets = [make.make_opsetid("", 18), make.make_opsetid("evil.example", 1)]
    model = onnx.load(graph.path)
    model.functions.append(make.make_function("ai.onnx", "Choice", ["x"], ["z"], [choice], opsets))
    onnx.save(model, graph.path)
    with pytest.raises(GraphError, match=r"evil\.example"):
        _onnx.read(Graph.load(tmp_path))


@pytest.mark.parametrize("place", ["initializer", "constant", "branch"])
def test_external_data_of_sparse_tensors_and_branches_is_refused(place: str, tmp_path: Path):
    graph, make = stand_in("cnn", tmp_path), onnx.helper
    model = onnx.load(graph.path)
    values = onnx.numpy_helper.from_array(np.float32([1, 2]), "hidden")
    (tmp_path / "w.bin").write_bytes(values.raw_data)
    onnx.external_data_helper.set_external_data(values, "w.bin")
    values.ClearField("raw_data")
    values.data_location = onnx.TensorProto.EXTERNAL
    sparse = make.make_sparse_tensor(values, onnx.numpy_helper.from_array(np.array([0, 3]), "places"), [4])
    if place == "initializer":
        model.graph.sparse_initializer.append(sparse)
    elif place == "constant":
        model.graph.node.append(make.make_node("Constant", [], ["unread"], sparse_value=sparse))
    else:
        result = make.make_tensor_value_info("out", onnx.TensorProto.FLOAT, [2])
        branch = make.make_graph([make.make_node("Identity", ["hidden"], ["out"])], "b", [], [result], [values])
        model.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "which"))
        model.graph.node.append(make.make_node("If", ["which"], ["unread"], then_branch=branch, else_branch=branch))
    graph.path.write_bytes(model.SerializeToString())
    with pytest.raises(GraphError, match=r"keeps weights in other files|not a safe ONNX file"):
        _onnx.read(Graph.load(tmp_path))


@pytest.mark.parametrize("content", [b"", b"not a graph", b"\x08\x0a" * 50])
def test_junk_is_refused(content: bytes, tmp_path: Path):
    write_sidecar(tmp_path, "junk")
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(GraphError, match=r"model\.onnx"):
        _onnx.read(Graph.load(tmp_path))


def test_altered_graph_is_refused(tmp_path: Path):
    graph = stand_in("cnn", tmp_path)
    graph.path.write_bytes(graph.path.read_bytes() + b" ")
    with pytest.raises(IntegrityError):
        _onnx.read(graph)


def test_other_names_than_the_sidecars_are_refused(tmp_path: Path):
    graph = stand_in("cnn", tmp_path)
    renamed = graph.sidecar.input.model_copy(update={"name": "pixels"})
    with pytest.raises(GraphError, match="pixels"):
        _onnx.read(graph.model_copy(update={"sidecar": graph.sidecar.model_copy(update={"input": renamed})}))


def test_tells_transformers_from_cnns(captured: dict[str, Captured]):
    assert _onnx.is_transformer(_onnx.read(captured["vit"].graph))
    assert not _onnx.is_transformer(_onnx.read(captured["cnn"].graph))


def test_attention_products_are_not_weighted(captured: dict[str, Captured]):
    model = _onnx.read(captured["vit"].graph)
    products = [node for node in model.graph.node if node.op_type in _onnx.WEIGHTED]
    assert len(products) - len(_onnx.weighted(model)) == 2 * 2, "two blocks, each with q x k and attention x v"


class _ChannelGate(nn.Module):
    """A gate of another tensor's making, as in squeeze-and-excitation."""

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        return maps * maps.mean((2, 3), keepdim=True).sigmoid()


class _Written(nn.Module):
    """An activation as a formula."""

    def __init__(self, formula: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.forward = formula


@pytest.mark.parametrize(
    ("activation", "gates"),
    [
        (_Written(lambda x: x * (x + 3).clamp(0, 6) / 6), True),
        (_Written(lambda x: x * ((x + 3).clamp(0, 6) / 6)), True),
        (_Written(lambda x: (x / 6) * (x + 3).clamp(0, 6)), True),
        (_Written(lambda x: x * torch.sigmoid(1.702 * x)), True),
        (nn.GELU("tanh"), True),
        (_Written(lambda x: x * x + x), False),
        (_Written(lambda x: x + x.sigmoid()), False),
        (_Written(lambda x: x.relu() * x.amax(1, keepdim=True).sigmoid()), False),
        (nn.SiLU(), True),
        (nn.Mish(), True),
        (nn.Hardswish(), True),
        (nn.ReLU(), False),
        (nn.Sigmoid(), False),
        (_ChannelGate(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_activation_that_gates_itself_is_known_as_it_is_exported(activation: nn.Module, gates: bool, tmp_path: Path):
    file = tmp_path / "model.onnx"
    network = nn.Sequential(nn.Conv2d(3, 4, 3), activation).eval()
    torch.onnx.export(network, (torch.zeros(1, 3, 8, 8),), file, dynamo=True, opset_version=18, external_data=False, verbose=False)
    assert _onnx.gates_itself(onnx.load(file)) is gates
