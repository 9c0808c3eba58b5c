"""Statistics are exact, streamed, and refused where they would mean nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from fofa_deploy.errors import BuildError, DataError
from fofa_deploy.types import Calibration, Precision, Recipe
from fofa_exporters import _onnx
from fofa_exporters._quantization import prepare, require_calibration
from fofa_exporters._quantization.statistics import BINS, Statistics, observe

from .conftest import Captured, images, sidecar

INT8 = Recipe(name="int8", precision=Precision.INT8, description="any", needs_calibration=True)


@pytest.fixture(scope="module")
def prepared(captured: dict[str, Captured]) -> onnx.ModelProto:
    return prepare(_onnx.read(captured["cnn"].graph))


@pytest.fixture(scope="module")
def statistics(prepared: onnx.ModelProto, captured: dict[str, Captured]) -> Statistics:
    return observe(prepared, captured["cnn"].calibration)


def _all(prepared: onnx.ModelProto, calibration: Calibration, name: str) -> np.ndarray:
    """An activation on every calibration image at once."""
    shown = onnx.ModelProto()
    shown.CopyFrom(prepared)
    shown.graph.output.append(onnx.ValueInfoProto(name=name))
    session = ort.InferenceSession(shown.SerializeToString(), providers=["CPUExecutionProvider"])
    (feeds,) = calibration.batches(1000)
    return session.run([name], feeds)[0]


def test_prepared_graph_is_the_same_function(prepared: onnx.ModelProto, captured: dict[str, Captured]):
    session = ort.InferenceSession(prepared.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"images": captured["cnn"].inputs})[0]
    assert np.abs(found - captured["cnn"].logits).max() < 1e-3
    assert not any(node.op_type == "BatchNormalization" for node in prepared.graph.node)
    assert all(node.name for node in prepared.graph.node)


def test_extremes_and_channels_are_those_of_all_images(
    prepared: onnx.ModelProto, statistics: Statistics, captured: dict[str, Captured]
):
    name = next(name for name in statistics.channels if name != "images")
    values, place = _all(prepared, captured["cnn"].calibration, name), statistics.names.index(name)
    assert statistics.low[place] == pytest.approx(values.min(), abs=1e-5)
    assert statistics.high[place] == pytest.approx(values.max(), rel=1e-5)
    channels = statistics.channels[name]
    assert channels.mean == pytest.approx(values.mean((0, 2, 3)), abs=1e-4)
    assert channels.high == pytest.approx(values.max((0, 2, 3)), abs=1e-4)


def test_histogram_counts_every_value_once(prepared: onnx.ModelProto, statistics: Statistics, captured: dict[str, Captured]):
    name = next(name for name in statistics.channels if name != "images")
    values, place = _all(prepared, captured["cnn"].calibration, name), statistics.names.index(name)
    assert statistics.histogram[place].sum() == values.size
    centers = statistics.low[place] + (np.arange(BINS) + 0.5) * (statistics.high[place] - statistics.low[place]) / BINS
    assert statistics.histogram[place] @ centers / values.size == pytest.approx(values.mean(), abs=2e-3 * float(np.ptp(values)))


def test_saved_statistics_come_back_whole(statistics: Statistics, tmp_path: Path):
    statistics.save(tmp_path / "statistics.npz")
    again = Statistics.load(tmp_path / "statistics.npz")
    assert again.names == statistics.names
    assert np.array_equal(again.histogram, statistics.histogram)
    assert np.array_equal(again.average_high, statistics.average_high)
    assert {name: c.mean.tolist() for name, c in again.channels.items()} == {
        name: c.mean.tolist() for name, c in statistics.channels.items()
    }


def test_a_nan_activation_is_refused(prepared: onnx.ModelProto, captured: dict[str, Captured]):
    broken = onnx.ModelProto()
    broken.CopyFrom(prepared)
    weight = next(t for t in broken.graph.initializer if len(t.dims) == 4)
    values = onnx.numpy_helper.to_array(weight).copy()
    values.flat[0] = np.nan
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    with pytest.raises(DataError, match="NaN or infinite"):
        observe(broken, captured["cnn"].calibration)


def _calibration(folder: Path, pixels: np.ndarray) -> Calibration:
    np.save(folder / "images.npy", pixels)
    return Calibration(images=folder / "images.npy", sidecar=sidecar("noise"))


def test_calibration_is_required():
    with pytest.raises(BuildError, match="calibration"):
        require_calibration(INT8, None)


@pytest.mark.parametrize("count", [0, 1, 7])
def test_tiny_calibration_is_refused(count: int, tmp_path: Path):
    with pytest.raises(DataError, match="fewer than"):
        require_calibration(INT8, _calibration(tmp_path, images(max(count, 1), 0)[:count]))


def test_constant_calibration_is_refused(tmp_path: Path):
    for colour in ((0, 0, 0), (200, 10, 10)):
        flat = np.broadcast_to(np.array(colour, np.uint8)[None, :, None, None], (32, 3, 8, 8)).copy()
        with pytest.raises(DataError, match="of one colour"):
            require_calibration(INT8, _calibration(tmp_path, flat))
