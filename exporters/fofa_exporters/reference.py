"""The back end with no runtime: numpy only, through onnx's reference evaluator. Read this file to learn the seam.

It is slow and exact, which makes it the test double of the others and the tie-breaker when two of them disagree.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from fofa_deploy.errors import BuildError
from fofa_deploy.types import Artifact, Calibration, Feeds, Graph, HardwareProfile, Layer, Precision, Probe, Recipe
from fofa_exporters import _onnx

FP32 = Recipe(name="fp32", precision=Precision.FP32, description="the captured graph as it is, evaluated with numpy")


class ReferenceSession:
    """An evaluator and nothing to give back."""

    device = "numpy"

    def __init__(self, model: onnx.ModelProto) -> None:
        try:
            self._evaluator = ReferenceEvaluator(model)
        except (RuntimeError, NotImplementedError) as error:  # an operator, or a version of one, that it does not know
            raise BuildError(f"numpy cannot evaluate the graph: {error}", "export it for a newer opset") from error
        self._outputs = [value.name for value in model.graph.output]

    def run(self, feeds: Feeds) -> Feeds:
        values = self._evaluator.run(self._outputs, dict(feeds))
        return {name: np.asarray(value) for name, value in zip(self._outputs, values, strict=True)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


class ReferenceBackend:
    """Float graphs in, the same graphs out."""

    name = "reference"
    precisions = frozenset({Precision.FP32})

    def probe(self, profile: HardwareProfile) -> Probe:
        """Everything this needs is a hard dependency; only the device can be wrong."""
        if profile.device.kind != "cpu":
            return Probe(can_build=False, can_run=False, reason=f"numpy has no {profile.device.kind}", versions=versions())
        return Probe(can_build=True, can_run=True, versions=versions())

    def recipes(self, profile: HardwareProfile, graph: Graph) -> Sequence[Recipe]:
        return [FP32] if Precision.FP32 in profile.precisions else []

    def build(self, graph: Graph, recipe: Recipe, calibration: Calibration | None, out: Path) -> Artifact:
        """Copy the graph. Other back ends translate, quantize or compile it here."""
        if recipe.precision not in self.precisions:
            raise BuildError(f"{self.name} cannot build {recipe.precision}", "ask for fp32")
        model = _onnx.read(graph)
        main = Path(shutil.copyfile(graph.path, out / "model.onnx"))
        return Artifact.of(out, main, backend=self.name, recipe=recipe, graph=graph, layers=layer_table(model), versions=versions())

    def load(self, artifact: Artifact, profile: HardwareProfile) -> ReferenceSession:
        names = {artifact.sidecar.input.name}, {artifact.sidecar.output.name}
        return ReferenceSession(_onnx.read_file(artifact.path, *names))


def versions() -> dict[str, str]:
    return {"onnx": onnx.__version__, "numpy": np.__version__}


def layer_table(model: onnx.ModelProto) -> tuple[Layer, ...]:
    """One row per node. Precision is exactly what the graph says: the evaluator changes nothing."""
    weighted = {node.name for node in _onnx.weighted(model)}
    return tuple(
        Layer(name=node.name, operator=node.op_type, precision=Precision.FP32, weighted=node.name in weighted)
        for node in model.graph.node
    )
