"""How peers' models are run: through the project's own seam, so that one stopwatch and one comparison serve everybody.

Found like any other back end, by the entry points that `register` puts on the path; imported in child processes only.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from fofa_deploy.backend import GROUP
from fofa_deploy.errors import BuildError
from fofa_deploy.types import Artifact, Calibration, Feeds, Graph, HardwareProfile, Precision, Probe, Recipe

ENTRY_POINTS = f"[{GROUP}]\npeers-openvino = backends:PeersOpenVino\npeers-torch = backends:PeersTorch\n"


def register(work: Path) -> None:
    """Let child processes find the back ends of this module, and keep what PyTorch compiles in the work folder."""
    found = work / "registered" / "peers-0.dist-info"
    found.mkdir(parents=True, exist_ok=True)
    (found / "METADATA").write_text("Metadata-Version: 2.1\nName: peers\nVersion: 0\n")
    (found / "entry_points.txt").write_text(ENTRY_POINTS)
    paths = [str(Path(__file__).parent), str(found.parent.absolute())]
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str((work / "inductor").absolute())


class _PeersOwn:
    """What both have in common: peers build by themselves, in `make.py`."""

    name: str
    precisions = frozenset(Precision)

    def probe(self, profile: HardwareProfile) -> Probe:
        return Probe(can_build=False, can_run=True)

    def recipes(self, profile: HardwareProfile, graph: Graph) -> Sequence[Recipe]:
        return ()

    def build(self, graph: Graph, recipe: Recipe, calibration: Calibration | None, out: Path) -> Artifact:
        raise BuildError(f"{self.name} builds nothing", "peers build by make.py")


class PeersOpenVino(_PeersOwn):
    """IR as its authors' documentation opens it: with no property at all where the profile leaves the threads to the
    runtime (``threads = 0``), else for latency with that many, and with all shapes known at the profile's batch sizes."""

    name = "peers-openvino"

    def load(self, artifact: Artifact, profile: HardwareProfile) -> Any:  # noqa: ANN401 - a Session
        import openvino as ov

        from fofa_exporters.openvino import OpenVinoSession

        threads = profile.execution.threads
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": threads} if threads else {}

        def compiled(batch: int | None) -> Any:  # noqa: ANN401 - openvino is untyped
            model = ov.Core().read_model(artifact.path)
            if batch is not None:
                shape = model.input().get_partial_shape()
                shape[0] = batch
                model.reshape(shape)
            return ov.Core().compile_model(model, "CPU", config)

        output = ov.Core().read_model(artifact.path).outputs[0].get_any_name()
        return _Renamed(OpenVinoSession(compiled, profile.execution.batch_sizes if threads else ()), output, artifact)


class _Renamed:
    """A session whose tool gave the only input and output names of its own."""

    def __init__(self, session: Any, output: str, artifact: Artifact) -> None:  # noqa: ANN401
        self._session, self._output, self._wanted = session, output, artifact.sidecar.output.name
        self.device = session.device

    def run(self, feeds: Feeds) -> Feeds:
        return {self._wanted: self._session.run(feeds)[self._output]}

    def __enter__(self) -> Self:
        self._session.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._session.__exit__(kind, error, trace)


class PeersTorch(_PeersOwn):
    """Weights or an exported program, compiled for one image where it is run."""

    name = "peers-torch"

    def load(self, artifact: Artifact, profile: HardwareProfile) -> TorchSession:
        import torch

        options = artifact.recipe.options
        sys.path.append(str(options["packages"]))
        torch.set_num_threads(profile.execution.thread_count)
        kind = str(options["compiled"])
        model = _program(artifact.path) if kind == "program" else _network(artifact.path, kind, options)
        if kind != "eager":
            torch._inductor.config.freezing = kind in ("frozen", "program")
            model = torch.compile(model)
        return TorchSession(model, artifact)


def _program(path: Path) -> Any:  # noqa: ANN401 - torch.nn.Module
    import torch
    import torchao.quantization.pt2e.quantizer.x86_inductor_quantizer  # noqa: F401 - its operators and its fusions

    return torch.export.load(path).module()


def _network(path: Path, kind: str, options: Any) -> Any:  # noqa: ANN401
    from make_torch import network

    model = network({"model": options["model"], "arguments": json.loads(options["arguments"]), "weights": path})
    if kind == "int8":
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return model


class TorchSession:
    """A module for one image at a time; a larger batch is run image by image."""

    device = "cpu"

    def __init__(self, model: Any, artifact: Artifact) -> None:  # noqa: ANN401
        self._model, sidecar = model, artifact.sidecar
        self._input, self._output = sidecar.input.name, sidecar.output.name

    def run(self, feeds: Feeds) -> Feeds:
        import torch

        images = torch.from_numpy(np.ascontiguousarray(feeds[self._input]))
        with torch.no_grad():
            logits = [self._model(images[number : number + 1]).numpy() for number in range(len(images))]
        return {self._output: np.concatenate(logits)}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._model = None
