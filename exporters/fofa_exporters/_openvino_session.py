"""A model compiled by OpenVINO, for one batch size or for any."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from types import TracebackType
from typing import Any, Self

import numpy as np

from fofa_deploy.errors import BuildError
from fofa_deploy.types import Feeds
from fofa_exporters._words import telling


def port_names(ports: Sequence[Any], kind: str) -> list[list[str]]:
    """Every name of each input or output. One may have several, where the graph passes a tensor on, and converted modules none."""
    return [sorted(port.names) or [f"{kind}.{number}"] for number, port in enumerate(ports)]


class OpenVinoSession:
    """Infer requests on one device.

    Args:
        compile_for: gives the model compiled for one batch size, or, for None, for any.
        fixed: batch sizes that get a model of their own when they are first seen: with all shapes known the plugin leaves out
            what it does for shapes that may change. Verification's other batch sizes share one.
    """

    def __init__(self, compile_for: Callable[[int | None], Any], fixed: Collection[int] = ()) -> None:
        self._compile_for, self._fixed = compile_for, fixed
        self._requests: dict[int | None, Any] = {}
        compiled = self._opened(next(iter(fixed), None))
        self._outputs = port_names(compiled.outputs, "output")
        self._places = {name: number for number, names in enumerate(port_names(compiled.inputs, "input")) for name in names}
        self.device: str = ",".join(compiled.get_property("EXECUTION_DEVICES"))

    def run(self, feeds: Feeds) -> Feeds:
        batch = len(next(iter(feeds.values())))
        size = batch if batch in self._fixed else None
        try:
            if size not in self._requests:
                self._opened(size)
            # The request reads the caller's arrays, and is done with them when it returns.
            given = {self._places.get(name, name): array for name, array in feeds.items()}
            results = self._requests[size].infer(given, share_inputs=True)
        except RuntimeError as error:
            raise BuildError(
                f"OpenVINO failed while running: {telling(error)}", "check the input's name, shape and type"
            ) from error
        # The request owns its output memory and writes into it again on the next run.
        arrays = [np.array(results[number]) for number in range(len(self._outputs))]
        return {name: array for array, names in zip(arrays, self._outputs, strict=True) for name in names}

    def _opened(self, size: int | None) -> Any:  # noqa: ANN401 - openvino is untyped
        compiled = self._compile_for(size)
        self._requests[size] = compiled.create_infer_request()
        return compiled

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._requests = {}
