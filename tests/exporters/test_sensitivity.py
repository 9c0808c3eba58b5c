"""The simulator is the float graph where nothing is masked, and tells a layer that cannot bear eight bits from those that can."""

from __future__ import annotations

from typing import get_args

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from fofa_exporters import _onnx
from fofa_exporters._quantization import Scheme, prepare
from fofa_exporters._quantization.scheme import Method
from fofa_exporters._quantization.sensitivity import Simulator, best_ranges, fake_quantized, most_sensitive, sensitivity
from fofa_exporters._quantization.statistics import Statistics, observe

from .conftest import Captured


@pytest.fixture(scope="module", params=["cnn", "vit"])
def case(request: pytest.FixtureRequest, captured: dict[str, Captured]) -> tuple[Captured, onnx.ModelProto, Statistics]:
    return _observed(captured[request.param])


@pytest.fixture
def captured_vit(captured: dict[str, Captured]) -> tuple[Captured, onnx.ModelProto, Statistics]:
    return _observed(captured["vit"])


def _observed(found: Captured) -> tuple[Captured, onnx.ModelProto, Statistics]:
    prepared = prepare(_onnx.read(found.graph))
    return found, prepared, observe(prepared, found.calibration)


def test_no_mask_is_float_and_every_bit_changes_something(case: tuple[Captured, onnx.ModelProto, Statistics]):
    captured, prepared, statistics = case
    simulator = Simulator(prepared, statistics, Scheme())
    plain = simulator.logits({"images": captured.inputs}, ())
    assert np.abs(plain - captured.logits).max() < 1e-3
    errors = [np.abs(simulator.logits({"images": captured.inputs}, (n,)) - plain).max() for n in range(len(simulator.layers))]
    # The last norm of a residual branch begins at zero, and with it all that only it hears.
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in prepared.graph.initializer}
    live = [bool(np.any(weights[node.input[1]])) for node in _onnx.weighted(prepared)]
    assert len(errors) == len(live)
    assert not any(error for error, alive in zip(errors, live, strict=True) if not alive)
    assert sum(error > 0 for error in errors) >= len(errors) / 3


def test_all_bits_are_near_the_written_graph(case: tuple[Captured, onnx.ModelProto, Statistics]):
    """The simulation is made of the same roundings as what runs in the end."""
    from fofa_exporters._quantization import quantized

    captured, prepared, statistics = case
    simulator = Simulator(prepared, statistics, Scheme())
    simulated = simulator.logits({"images": captured.inputs}, range(len(simulator.layers)))
    scheme = Scheme(weighted_only=True, float_outputs=True, bias_correction=False)
    written = quantized(_onnx.read(captured.graph), captured.calibration, scheme)
    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_quant_qdq", "1")
    session = ort.InferenceSession(written.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": captured.inputs})[0]
    assert np.linalg.norm(found - simulated) < 0.7 * np.linalg.norm(simulated - captured.logits)


def test_a_badly_scaled_layer_is_more_sensitive(captured_vit: tuple[Captured, onnx.ModelProto, Statistics]):
    """One huge weight in a channel leaves the others few of its steps."""
    captured, prepared, statistics = captured_vit
    spoilt = onnx.ModelProto()
    spoilt.CopyFrom(prepared)
    victim = _onnx.weighted(spoilt)[1]
    tensor = next(t for t in spoilt.graph.initializer if t.name == victim.input[1])
    weight = onnx.numpy_helper.to_array(tensor).copy()
    weight[0] *= 300
    tensor.CopyFrom(onnx.numpy_helper.from_array(weight, tensor.name))
    errors = sensitivity(spoilt, observe(spoilt, captured.calibration), captured.calibration, Scheme())
    before = sensitivity(prepared, statistics, captured.calibration, Scheme())
    assert errors[victim.name] > 3 * before[victim.name]


def test_the_best_ranges_are_those_that_change_the_logits_least(captured_vit: tuple[Captured, onnx.ModelProto, Statistics]):
    captured, prepared, statistics = captured_vit
    best = best_ranges(prepared, statistics, captured.calibration, Scheme())
    feeds = next(captured.calibration.batches(8))
    errors = {}
    for method in get_args(Method):
        simulator = Simulator(prepared, statistics, Scheme(ranges=method))
        whole = simulator.logits(feeds, range(len(simulator.layers)))
        errors[method] = np.square(whole - simulator.logits(feeds, ())).sum()
    assert errors[best] == min(errors.values())


def test_the_fewest_layers_that_carry_the_share():
    errors = {"a": 1.0, "b": 6.0, "c": 3.0}
    assert most_sensitive(errors, 0.0) == []
    assert most_sensitive(errors, 0.5) == ["b"]
    assert most_sensitive(errors, 0.8) == ["b", "c"]
    assert most_sensitive(errors, 1.0) == ["b", "c", "a"]
    assert most_sensitive({"a": 0.0}, 0.5) == []


@pytest.mark.parametrize(("axis", "top"), [(0, 127), (-1, 127), (0, 64)])
def test_fake_quantized_weights_lie_on_a_grid_per_channel(axis: int, top: int):
    weight = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    found = fake_quantized(weight, axis, top)
    scale = np.abs(weight).max(axis=1 - axis % 2, keepdims=True) / top
    assert found / scale == pytest.approx(np.round(found / scale), abs=1e-3)
    assert np.abs(found - weight).max() <= scale.max() / 2 + 1e-6
