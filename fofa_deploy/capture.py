"""A PyTorch model -> one verified float ONNX graph with golden inputs and outputs, and a sidecar with all a caller needs."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from torch import nn

from fofa_deploy.data import Split
from fofa_deploy.environment import package_versions
from fofa_deploy.errors import GraphError
from fofa_deploy.inference import predict
from fofa_deploy.pixels import take_pixels
from fofa_deploy.types import InputForm, Preprocessing, Sidecar, TensorSpec

INPUT, OUTPUT = "images", "logits"
GOLDEN = 16
"""Images in ``golden.npz``; enough for the batch sizes that are checked."""

OPSET = 18

FAULTS = (
    *(torch._dynamo.exc.TorchDynamoException, onnx.checker.ValidationError),
    *(RuntimeError, TypeError, ValueError, AssertionError, LookupError, AttributeError),
)
"""What exporters raise, what their graphs are refused for, and what a forward() may raise that is given symbols for numbers."""


def tool_versions() -> dict[str, str]:
    """Of what makes a graph, and checks it."""
    return package_versions(("torch", "onnx", "onnxscript", "onnxruntime", "onnxruntime-gpu"))


def capture(
    model: nn.Module,
    name: str,
    preprocessing: Preprocessing,
    class_names: tuple[str, ...],
    images: Split,
    folder: Path,
    form: InputForm = "float32-nchw",
) -> None:
    """Write ``model.onnx`` (dynamic batch), ``sidecar.json`` and ``golden.npz`` (images, logits) into ``folder``.

    Where the first of `EXPORTERS` refused the model, ``notices.json`` tells which one took it, and why not the first.

    Args:
        model: logits (B,classes) from normalized images (B,C,H,W); a copy on the CPU in eval mode is exported.
        name: the model's name, for the record.
        images: real images; the first `GOLDEN` become the golden inputs, repeated where there are fewer.
        form: how the graph takes images; of all the rest, the sidecar says it.

    Raises:
        GraphError: no exporter takes the model, or its output is not (B,classes).
    """
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    pixels = np.resize(images.source.images(images.indices[:GOLDEN]), (GOLDEN, preprocessing.channels, *preprocessing.image_size))
    inputs = preprocessing.apply(pixels)
    with torch.no_grad():
        outputs = model(torch.from_numpy(inputs))
    _check_output(outputs, len(class_names), name)
    sidecar = Sidecar(
        model=name,
        input=TensorSpec(name=INPUT, shape=(None, *inputs.shape[1:])),
        output=TensorSpec(name=OUTPUT, shape=(None, len(class_names))),
        preprocessing=preprocessing,
        class_names=class_names,
    )
    exporter, proto = _export(model, inputs, folder, name)
    if form == "uint8-nhwc":
        proto, sidecar = take_pixels(proto, sidecar)
        onnx.checker.check_model(proto)
    onnx.helper.set_model_props(proto, {"fofa_deploy.sidecar": sidecar.model_dump_json(), "fofa_deploy.exporter": exporter})
    onnx.save(proto, folder / "model.onnx")
    (folder / "sidecar.json").write_text(sidecar.model_dump_json(indent=1))
    np.savez(folder / "golden.npz", images=sidecar.prepare(pixels), logits=outputs.numpy())


def _check_output(outputs: object, classes: int, name: str) -> None:
    if not isinstance(outputs, torch.Tensor) or outputs.shape != (GOLDEN, classes):
        shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise GraphError(f"{name} gives {shape} for {GOLDEN} images and {classes} classes", "it must return logits (B,classes)")
    if not outputs.isfinite().all():
        raise GraphError(f"{name} gives NaN or infinity for real images", "check its weights and the preprocessing")


def _export(model: nn.Module, inputs: np.ndarray, folder: Path, name: str) -> tuple[str, onnx.ModelProto]:
    """The valid graph by the first exporter that writes one, and its name; a notice in ``folder`` where that is not the first."""
    # A batch of one would be taken for a constant, and so for the only batch size there is.
    example = torch.from_numpy(inputs[:2])
    refusals: list[str] = []
    for exporter, export in EXPORTERS.items():
        try:
            with _hushed():
                proto = export(model, example)
            onnx.checker.check_model(proto)
            break
        except FAULTS as error:
            refusals.append(f"{exporter}: {_reason(error)}")
    else:
        problem = f"{name} cannot be exported to ONNX; {'; '.join(refusals)}"
        raise GraphError(problem, "choose another student, or mend its forward()")
    if refusals:
        notice = f"{name} was exported by {exporter}; {'; '.join(refusals)}"
        (folder / "notices.json").write_text(json.dumps([notice]))
    return exporter, proto


def _reason(error: Exception) -> str:
    """The exporters put what went wrong at first below a page of advice."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return next((line for line in lines if line.startswith("<class ")), lines[0])


def _by_export(model: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    program = torch.onnx.export(
        model,
        (example,),
        dynamo=True,
        opset_version=OPSET,
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=_any_batch(),
        verbose=False,
    )
    assert program is not None
    _keep_constants(program)
    return program.model_proto


def _keep_constants(program: torch.onnx.ONNXProgram) -> None:
    """Give the graph what its nodes read and it has lost.

    The rewriter that fuses a minimum and a maximum names their constants after the tensor they bound. Of two pairs that bound
    the same tensor the graph keeps one, and the nodes of the other read constants that are nowhere (onnxscript 0.7).
    """
    graph = program.model.graph
    for value in (value for node in graph for value in node.inputs):
        if value is not None and value.const_value is not None and value.producer() is None:
            graph.register_initializer(value)


def _any_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1, max=4096)},)


def _by_tracing(model: nn.Module, example: torch.Tensor) -> onnx.ModelProto:
    # A trace follows the branch that the example takes, in silence; this refuses a forward() that branches on its data.
    torch.export.export(model, (example,), dynamic_shapes=_any_batch(), strict=False)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "traced.onnx"
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=False,
            opset_version=OPSET,
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_axes={INPUT: {0: "batch"}, OUTPUT: {0: "batch"}},
        )
        return onnx.load(path)


EXPORTERS = {"torch.export": _by_export, "TorchScript": _by_tracing}
"""In the order in which they are tried. PyTorch deprecates the second; it writes operators that the first does not write yet."""


@contextlib.contextmanager
def _hushed() -> Iterator[None]:
    """The exporter prints its progress and warns of its own deprecations; none of it is the user's."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)


def write_expected(model: nn.Module, splits: dict[str, Split], preprocessing: Preprocessing, folder: Path) -> None:
    """PyTorch's logits float32 (N,classes) per split, as ``NAME.npy``."""
    for name, split in splits.items():
        np.save(folder / f"{name}.npy", predict(model, split, preprocessing))
