"""What recipes share: the prepared graph, its statistics, and the sensitivity of its layers, each found out once."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import onnx

from fofa_deploy.types import Calibration, Frozen, Graph
from fofa_exporters import _onnx
from fofa_exporters._quantization.prepare import prepare
from fofa_exporters._quantization.scheme import Scheme
from fofa_exporters._quantization.sensitivity import sensitivity
from fofa_exporters._quantization.statistics import Statistics, observe

PREPARED, STATISTICS, SENSITIVITY = "prepared.onnx", "statistics.npz", "sensitivity.json"


class ObserveRequest(Frozen):
    graph: Path
    calibration: Calibration
    out: Path


class Done(Frozen):
    """The files are the answer."""


def write_statistics(request: ObserveRequest) -> Done:
    """The prepared graph and its statistics, into ``out``. Runs in a child process."""
    prepared = prepare(_onnx.read(Graph.load(request.graph)))
    onnx.save(prepared, request.out / PREPARED)
    observe(prepared, request.calibration).save(request.out / STATISTICS)
    return Done()


def write_sensitivity(request: ObserveRequest) -> Done:
    """The sensitivity of every weighted layer, into ``out``; needs the statistics. Runs in a child process."""
    prepared, statistics = _known(request.calibration, _onnx.read(Graph.load(request.graph)))
    errors = sensitivity(prepared, statistics, request.calibration, Scheme())
    (request.out / SENSITIVITY).write_text(json.dumps(errors, indent=1))
    return Done()


@dataclass(frozen=True)
class Observed:
    """``errors``: squared error of the logits by layer; empty when the scheme at hand keeps nothing in float."""

    prepared: onnx.ModelProto
    statistics: Statistics
    errors: dict[str, float]

    @classmethod
    def of(cls, model: onnx.ModelProto, calibration: Calibration, scheme: Scheme) -> Observed:
        """From the calibration's folders where there are any, found out now where there are none."""
        prepared, statistics = _known(calibration, model)
        if not scheme.float_share:
            return cls(prepared, statistics, {})
        if calibration.sensitivity is None:
            return cls(prepared, statistics, sensitivity(prepared, statistics, calibration, Scheme()))
        return cls(prepared, statistics, json.loads((calibration.sensitivity / SENSITIVITY).read_bytes()))


def _known(calibration: Calibration, model: onnx.ModelProto) -> tuple[onnx.ModelProto, Statistics]:
    if calibration.statistics is None:
        prepared = prepare(model)
        return prepared, observe(prepared, calibration)
    return onnx.load(calibration.statistics / PREPARED), Statistics.load(calibration.statistics / STATISTICS)
