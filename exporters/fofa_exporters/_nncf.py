"""NNCF's post-training quantization of an OpenVINO model: streamed, silent, and its refusals in words."""

from __future__ import annotations

import gc
import io
import os
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from typing import Any

import numpy as np

from fofa_deploy.errors import BuildError
from fofa_deploy.types import Calibration, Feeds, Recipe
from fofa_exporters import _onnx


def nncf_quantized(model: Any, recipe: Recipe, calibration: Calibration, compiled: Callable[[], Any]) -> Any:  # noqa: ANN401
    """An OpenVINO model with what NNCF quantizes in eight bits.

    Args:
        compiled: gives the float model, ready to be run.

    Raises:
        BuildError: NNCF refused the graph.
    """
    # NNCF makes cores of its own, of which none is the last: what they do to this thread's signals ends with the thread.
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_quantized, model, recipe, calibration, compiled).result()


def _quantized(model: Any, recipe: Recipe, calibration: Calibration, compiled: Callable[[], Any]) -> Any:  # noqa: ANN401
    with _silent():
        import nncf

        samples = Samples(calibration)
        every_weight = bool(recipe.options.get("seven_bit_weights"))
        overflow = nncf.OverflowFix.ENABLE if every_weight else nncf.OverflowFix.FIRST_LAYER
        options: dict[str, Any] = {
            "subset_size": len(samples),
            "model_type": nncf.ModelType.TRANSFORMER if recipe.options.get("transformer") else None,
        }
        if recipe.options.get("preset") == "mixed":
            options |= {"preset": nncf.QuantizationPreset.MIXED, "fast_bias_correction": False}
        advanced = nncf.AdvancedQuantizationParameters(overflow_fix=overflow)
        try:
            if max_drop := recipe.options.get("max_drop"):
                answered = Answered(samples, compiled())
                return nncf.quantize_with_accuracy_control(
                    model, nncf.Dataset(samples), nncf.Dataset(answered, answered.feeds), answered.agreement,
                    max_drop=max_drop, advanced_quantization_parameters=advanced, **options,
                )  # fmt: skip
            return nncf.quantize(model, nncf.Dataset(samples), advanced_parameters=advanced, **options)
        except (nncf.InternalError, nncf.ValidationError, nncf.UnsupportedModelError) as error:
            raise BuildError(f"NNCF refused the graph: {error}", "try another recipe") from error
        finally:
            gc.collect()  # those cores, too


class Samples(Sized):
    """Calibration images one by one, read again for each of NNCF's passes, never all in memory."""

    def __init__(self, calibration: Calibration) -> None:
        self._calibration = calibration
        self._length = len(np.load(calibration.images, mmap_mode="r", allow_pickle=False))

    def __iter__(self) -> Iterator[Feeds]:
        return self._calibration.batches(1)

    def __len__(self) -> int:
        return self._length


class Answered(Sized):
    """The same images, each with the class that the float model gives it: NNCF's accuracy control holds others to that."""

    def __init__(self, samples: Samples, compiled: Any) -> None:  # noqa: ANN401 - openvino is untyped
        self._samples, self._classes = samples, [self._class(compiled, feeds) for feeds in samples]

    @staticmethod
    def _class(compiled: Any, feeds: Feeds) -> int:  # noqa: ANN401
        return int(compiled(feeds)[0].argmax())

    @staticmethod
    def feeds(item: tuple[Feeds, int]) -> Feeds:
        return item[0]

    def agreement(self, compiled: Any, items: Iterable[tuple[Feeds, int]]) -> tuple[float, list[float]]:  # noqa: ANN401
        """Share of the items that keep their class, and each one's part in it, for which NNCF would ask again otherwise."""
        kept = [float(self._class(compiled, feeds) == wanted) for feeds, wanted in items]
        return float(np.mean(kept)), kept

    def __iter__(self) -> Iterator[tuple[Feeds, int]]:
        return iter(zip(self._samples, self._classes, strict=True))

    def __len__(self) -> int:
        return len(self._samples)


@contextmanager
def _silent() -> Iterator[None]:
    """NNCF without telemetry, log lines and progress bars."""
    os.environ.setdefault("NNCF_CI", "1")  # the only switch NNCF has for its telemetry; read when it is imported
    with _onnx.quiet(("", "nncf", "torch.utils.cpp_extension")), redirect_stdout(io.StringIO()):
        yield
