"""NNCF's post-training quantization of an OpenVINO model: streamed, silent, and its refusals in words."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sized
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np

from fofa_deploy.errors import BuildError
from fofa_deploy.types import Calibration, Feeds, Recipe
from fofa_exporters import _onnx


def nncf_quantized(model: Any, recipe: Recipe, calibration: Calibration) -> Any:  # noqa: ANN401 - openvino is untyped
    """The model with what NNCF quantizes in eight bits.

    Raises:
        BuildError: NNCF refused the graph.
    """
    with _silent():
        import nncf

        samples = Samples(calibration)
        every_weight = bool(recipe.options.get("seven_bit_weights"))
        overflow = nncf.OverflowFix.ENABLE if every_weight else nncf.OverflowFix.FIRST_LAYER
        try:
            return nncf.quantize(
                model,
                nncf.Dataset(samples),
                subset_size=len(samples),
                model_type=nncf.ModelType.TRANSFORMER if recipe.options.get("transformer") else None,
                advanced_parameters=nncf.AdvancedQuantizationParameters(overflow_fix=overflow),
            )
        except (nncf.InternalError, nncf.ValidationError, nncf.UnsupportedModelError) as error:
            raise BuildError(f"NNCF refused the graph: {error}", "try another recipe") from error


class Samples(Sized):
    """Calibration images one by one, read again for each of NNCF's passes, never all in memory."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._length = len(np.load(calibration.images, mmap_mode="r", allow_pickle=False))

    def __iter__(self) -> Iterator[Feeds]:
        return self._calibration.batches(1)

    def __len__(self) -> int:
        return self._length


@contextmanager
def _silent() -> Iterator[None]:
    """NNCF without telemetry, log lines and progress bars."""
    os.environ.setdefault("NNCF_CI", "1")  # the only switch NNCF has for its telemetry; read when it is imported
    with _onnx.quiet(("", "nncf", "torch.utils.cpp_extension")), redirect_stdout(io.StringIO()):
        yield
