"""What the activations of a graph do on the calibration images: two streamed passes, in memory that does not grow with images."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from fofa_deploy.errors import BuildError, DataError
from fofa_deploy.types import Calibration, Feeds, Recipe
from fofa_exporters import _onnx

BATCH = 4
BINS = 2048
MIN_IMAGES = 8
HISTOGRAM_IMAGES = 64
"""Histograms cost most of the time, and settle long before the extremes do."""

Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Channels:
    """Per channel of an activation that a weighted layer reads: (C,) each."""

    low: Floats
    high: Floats
    mean: Floats

    @property
    def largest(self) -> Floats:
        return np.maximum(np.abs(self.low), np.abs(self.high))


@dataclass(frozen=True)
class Statistics:
    """Per tensor (T,): extremes, extremes averaged over batches, and a histogram (T,BINS) between the extremes."""

    names: tuple[str, ...]
    low: Floats
    high: Floats
    average_low: Floats
    average_high: Floats
    histogram: NDArray[np.int64]
    channels: Mapping[str, Channels]

    def divided(self, name: str, factor: Floats) -> Self:
        """The same with the channels (C,) of one tensor divided; of that tensor only the extremes remain known."""
        old, place = self.channels[name], self.names.index(name)
        new = Channels(old.low / factor, old.high / factor, old.mean / factor)
        low, high = float(new.low.min()), float(new.high.max())
        histogram = np.zeros(BINS, np.int64)
        histogram[[0, -1]] = 1
        return replace(
            self,
            low=_with(self.low, place, low),
            high=_with(self.high, place, high),
            average_low=_with(self.average_low, place, low),
            average_high=_with(self.average_high, place, high),
            histogram=_with(self.histogram, place, histogram),
            channels={**self.channels, name: new},
        )

    def save(self, path: Path) -> None:
        """One ``.npz`` without pickles."""
        channels = {f"{part}.{n}": getattr(c, part) for n, c in self._numbered() for part in ("low", "high", "mean")}
        np.savez(
            path, names=np.array(self.names), lows=self.low, highs=self.high, average_low=self.average_low,
            average_high=self.average_high, histogram=self.histogram, **channels,
        )  # fmt: skip

    def _numbered(self) -> Iterator[tuple[int, Channels]]:
        yield from ((self.names.index(name), channels) for name, channels in self.channels.items())

    @classmethod
    def load(cls, path: Path) -> Self:
        with np.load(path, allow_pickle=False) as arrays:
            names = tuple(str(name) for name in arrays["names"])
            numbers = [int(key.partition(".")[2]) for key in arrays.files if key.startswith("mean.")]
            channels = {names[n]: Channels(*(arrays[f"{part}.{n}"] for part in ("low", "high", "mean"))) for n in numbers}
            low, high, average_low, average_high, histogram = (
                arrays[key] for key in ("lows", "highs", "average_low", "average_high", "histogram")
            )
            return cls(names, low, high, average_low, average_high, histogram, channels)


def _with(rows: NDArray[Any], place: int, value: Any) -> NDArray[Any]:  # noqa: ANN401 - a row of the same array
    changed = rows.copy()
    changed[place] = value
    return changed


def observe(prepared: onnx.ModelProto, calibration: Calibration) -> Statistics:
    """Statistics of every float tensor of a prepared graph.

    Raises:
        DataError: an activation is NaN or infinite on a calibration image.
    """
    watched = _watched(prepared)
    names = tuple(watched)
    session = exposed(prepared, names)
    axes = _channel_axes(prepared)
    extremes = [_Extremes(axes.get(name)) for name in names]
    for feeds in calibration.batches(BATCH):
        for extreme, values in zip(extremes, session.run(list(names), feeds), strict=True):
            extreme.add(values)
    low, high = (np.array([getattr(e, side) for e in extremes], np.float32) for side in ("low", "high"))
    _check_finite(names, low, high)
    histogram = np.zeros((len(names), BINS), np.int64)
    for feeds in _first(calibration.batches(BATCH), HISTOGRAM_IMAGES // BATCH):
        for row, values in enumerate(session.run(list(names), feeds)):
            histogram[row] += _counts(values, low[row], high[row])
    average_low, average_high = (np.array([e.sums[side] / e.batches for e in extremes], np.float32) for side in (0, 1))
    channels = {name: e.channels() for name, e in zip(names, extremes, strict=True) if e.axis is not None}
    return Statistics(names, low, high, average_low, average_high, histogram, channels)


def exposed(model: onnx.ModelProto, names: Sequence[str]) -> Any:  # noqa: ANN401 - onnxruntime is untyped
    """A session of the graph that gives inner tensors, too."""
    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    outputs = {value.name for value in shown.graph.output}
    shown.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in outputs)
    options = ort.SessionOptions()
    options.log_severity_level = 3
    # A thread that waits busily slows every other process of a shared machine down, and gains nothing in a pass over images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _watched(model: onnx.ModelProto) -> list[str]:
    """Float tensors that depend on the image, the input first where it is one."""
    known = _onnx.constants(model.graph)
    computed = [name for node in model.graph.node for name in node.output if name and name not in known]
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    typed = {value.name: value.type.tensor_type.elem_type for value in values}
    return [n for n in (*(v.name for v in model.graph.input), *computed) if typed.get(n) == onnx.TensorProto.FLOAT]


def _channel_axes(model: onnx.ModelProto) -> dict[str, int]:
    """Of what layers with weights read; not where they do not agree."""
    found: dict[str, set[int]] = defaultdict(set)
    for node in _onnx.weighted(model):
        found[node.input[0]].add(1 if node.op_type in _onnx.CONVOLUTIONS else -1)
    return {name: axes.pop() for name, axes in found.items() if len(axes) == 1}


class _Extremes:
    """Running extremes of one tensor; of each of its channels, too, where an axis is given."""

    def __init__(self, axis: int | None) -> None:
        self.axis, self.batches, self.count = axis, 0, 0
        self.sums = np.zeros(2)
        self.low, self.high = np.inf, -np.inf
        self._low: Floats | None = None
        self._high: Floats | None = None
        self._sum: NDArray[np.float64] | None = None

    def add(self, values: Floats) -> None:
        low, high = values.min(), values.max()
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)  # these two keep a NaN
        self.sums += np.array((low, high))
        self.batches += 1
        if self.axis is not None:
            self._add_channels(np.moveaxis(values, self.axis, 0).reshape(values.shape[self.axis], -1))

    def _add_channels(self, rows: Floats) -> None:
        low, high, total = rows.min(1), rows.max(1), rows.sum(1, dtype=np.float64)
        self.count += rows.shape[1]
        self._low = low if self._low is None else np.minimum(self._low, low)
        self._high = high if self._high is None else np.maximum(self._high, high)
        self._sum = total if self._sum is None else self._sum + total

    def channels(self) -> Channels:
        assert self._low is not None
        assert self._high is not None
        assert self._sum is not None
        return Channels(self._low, self._high, (self._sum / self.count).astype(np.float32))


def _check_finite(names: Sequence[str], low: Floats, high: Floats) -> None:
    wrong = [name for name, ok in zip(names, np.isfinite(low) & np.isfinite(high), strict=True) if not ok]
    if wrong:
        found = f"{len(wrong)} activations are NaN or infinite on the calibration images, the first is {wrong[0]}"
        raise DataError(found, "check the images, the preprocessing, and the model's weights")


def _counts(values: Floats, low: np.float32, high: np.float32) -> NDArray[np.int64]:
    scale = (BINS - 1e-3) / max(float(high - low), 1e-30)
    bins = np.clip((values.ravel() - low) * np.float32(scale), 0, BINS - 1).astype(np.int32)
    return np.bincount(bins, minlength=BINS)


def _first(batches: Iterator[Feeds], count: int) -> Iterator[Feeds]:
    yield from (feeds for _, feeds in zip(range(count), batches, strict=False))


def require_calibration(recipe: Recipe, calibration: Calibration | None) -> Calibration:
    """The calibration images, refused when they would give meaningless ranges without any runtime complaining.

    Raises:
        BuildError: none were given.
        DataError: too few of them, or all of one colour.
    """
    if calibration is None:
        raise BuildError(f"recipe {recipe.name!r} needs calibration images and got none", "add calibration images to the plan")
    images = np.load(calibration.images, mmap_mode="r", allow_pickle=False)
    if len(images) < MIN_IMAGES:
        found = f"{calibration.images} holds {len(images)} images, fewer than {MIN_IMAGES}"
        raise DataError(found, "calibrate on more real images")
    varied = sum(bool((image != image[:, :1, :1]).any()) for image in images)
    if varied < MIN_IMAGES:
        found = f"all but {varied} images of {calibration.images} are of one colour"
        raise DataError(found, "calibrate on real, varied images")
    return calibration
