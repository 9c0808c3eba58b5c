"""The roofline: work counted by hand, limits measured once, and layers found again in their graph."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest

from fofa_deploy import roofline
from fofa_deploy.results import Peaks
from fofa_deploy.roofline import Work, costs, least_ms, peaks, work
from fofa_deploy.types import LayerTime

LIMITS = Peaks(gops={"fp32": 100, "int8": 400}, gbps=10, threads=1, measured_at="", fingerprint="")


def save(path, nodes, shape, weights):
    make = onnx.helper
    values = [make.make_tensor_value_info("x", 1, ["batch", *shape]), make.make_tensor_value_info("y", 1, ["batch", None])]
    tensors = [onnx.numpy_helper.from_array(np.zeros(dims, np.float32), name) for name, dims in weights.items()]
    graph = make.make_graph(nodes, "g", values[:1], values[1:], tensors)
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9), path)
    return path


@pytest.fixture
def graph(tmp_path):
    """A depthwise and a strided convolution, a product of tensors, and a transposed Gemm."""
    make = onnx.helper.make_node
    nodes = [
        make("Conv", ["x", "dw"], ["a"], "depthwise", group=8, pads=[1, 1, 1, 1]),
        make("Conv", ["a", "w"], ["b"], "strided", strides=[2, 2]),
        make("Relu", ["b"], ["c"], "relu"),
        make("Flatten", ["c"], ["d"], "flatten"),
        make("Gemm", ["d", "g"], ["y"], "head", transB=1),
    ]
    return save(tmp_path / "m.onnx", nodes, (8, 16, 16), {"dw": (8, 1, 3, 3), "w": (4, 8, 2, 2), "g": (10, 256)})


@pytest.mark.parametrize("batch", [1, 3])
def test_work_is_what_one_counts_by_hand(graph, batch):
    assert work(graph, batch) == {
        "depthwise": Work(macs=batch * 8 * 16 * 16 * 9, elements=2 * batch * 8 * 16 * 16 + 72, carriers=("a",)),
        "strided": Work(macs=batch * 4 * 8 * 8 * 32, elements=batch * (8 * 16 * 16 + 4 * 8 * 8) + 128, carriers=("b", "c")),
        "head": Work(macs=batch * 10 * 256, elements=batch * (256 + 10) + 2560, carriers=("y",)),
    }


def test_a_kernel_named_after_its_result_is_found_and_the_whole_needs_nearly_all(graph):
    nodes = work(graph)
    names = {"depthwise": "Conv", "c_nchwc": "FusedConv", "head/WithoutBiases": "FullyConnected", "c": "Reorder"}
    times = tuple(LayerTime(name=name, operator=operator, precision="fp32", ms=1) for name, operator in names.items())
    found = costs(times, nodes, LIMITS)
    assert [layer.macs for layer in found] == [nodes["depthwise"].macs, nodes["strided"].macs, nodes["head"].macs, None]
    assert least_ms(found, nodes) == pytest.approx(sum(layer.of_limit for layer in found[:3]))
    assert least_ms(found[:1], nodes) is None


def test_nodes_without_names_go_by_what_they_make_and_weights_keep_their_shapes(graph, tmp_path):
    """As files made by hand are, and those that list their weights among the inputs."""
    wanted, model = work(graph, 3), onnx.load(graph)
    for node in model.graph.node:
        node.name = ""
    for tensor in model.graph.initializer:
        model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    onnx.save(model, tmp_path / "old.onnx")
    found = work(tmp_path / "old.onnx", 3)
    assert {name: cost.macs for name, cost in found.items()} == {
        "a": wanted["depthwise"].macs, "b": wanted["strided"].macs, "y": wanted["head"].macs
    }  # fmt: skip


def test_a_product_of_two_tensors_counts_its_depth(tmp_path):
    nodes = [
        onnx.helper.make_node("Transpose", ["x"], ["t"], "turn", perm=[0, 2, 1]),
        onnx.helper.make_node("MatMul", ["x", "t"], ["p"], "scores"),
        onnx.helper.make_node("Flatten", ["p"], ["y"], "flatten"),
    ]
    assert work(save(tmp_path / "m.onnx", nodes, (5, 7), {})) == {
        "scores": Work(macs=5 * 5 * 7, elements=35 + 35 + 25, carriers=("p",))
    }


def test_the_slower_of_arithmetic_and_memory_is_the_limit():
    nodes = {"busy": Work(macs=5_000_000, elements=10), "moving": Work(macs=10, elements=1_000_000)}
    times = tuple(
        LayerTime(name=name, operator="Conv", precision=precision, ms=ms)
        for name, precision, ms in (
            ("busy", "fp32", 0.4),
            ("busy_token_3", "int8", 0.1),
            ("moving/Bias", "int8", 0.2),
            ("Reorder", "fp32", 0.3),
        )
    )
    found = {layer.name: layer for layer in costs(times, nodes, LIMITS)}
    assert found["busy"].of_limit == pytest.approx(0.1 / 0.4)
    assert found["busy_token_3"].of_limit == pytest.approx(0.025 / 0.1)
    assert found["moving/Bias"].of_limit == pytest.approx(0.1 / 0.2)
    assert (found["moving/Bias"].bytes, found["busy"].bytes) == (1_000_000, 40)
    assert (found["Reorder"].macs, found["Reorder"].of_limit) == (None, None)
    assert sum(layer.share for layer in found.values()) == pytest.approx(1)


def test_a_precision_without_a_measured_limit_claims_none():
    (found,) = costs((LayerTime(name="a", operator="Conv", precision="fp16", ms=1),), {"a": Work(macs=1, elements=1)}, LIMITS)
    assert (found.macs, found.of_limit) == (None, None)


def test_limits_are_measured_once_and_again_on_another_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(roofline, "SIDE", 256)
    monkeypatch.setattr(roofline, "COPY_BYTES", 8 << 20)
    here = roofline.environment.describe()

    def machine(**facts):
        monkeypatch.setattr(roofline.environment, "describe", lambda: here.model_copy(update=facts))

    machine(load_average=0.1)
    first = peaks(1)
    assert {"fp32", "int8"} <= first.gops.keys()
    assert min(*first.gops.values(), first.gbps) > 0
    assert not first.busy
    (file,) = (tmp_path / "fofa-deploy").iterdir()
    assert json.loads(file.read_text())["fingerprint"] == first.fingerprint
    machine(load_average=50.0)
    assert peaks(1) == first
    file.write_text("{")
    assert peaks(1).busy
    machine(fingerprint="e" * 64)
    assert peaks(1).fingerprint == "e" * 64
    assert len(list((tmp_path / "fofa-deploy").iterdir())) == 2


def test_limits_taken_on_a_busy_machine_only_rise(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    here = roofline.environment.describe()
    monkeypatch.setattr(roofline.environment, "describe", lambda: here.model_copy(update={"load_average": 50.0}))
    found = iter([(100.0, 5.0), (80.0, 9.0)])

    def measured(threads, where):
        gops, gbps = next(found)
        return LIMITS.model_copy(update={"gops": {"fp32": gops}, "gbps": gbps, "busy": True})

    monkeypatch.setattr(roofline, "_measured", measured)
    peaks(1)
    risen = peaks(1)
    assert (risen.gops, risen.gbps) == ({"fp32": 100.0}, 9.0)
