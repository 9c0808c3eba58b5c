"""A PyTorch model -> one verified float ONNX graph with golden inputs and outputs, and a sidecar with all a caller needs."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from fofa_deploy.data import Split
from fofa_deploy.errors import GraphError
from fofa_deploy.inference import predict
from fofa_deploy.types import Preprocessing, Sidecar, TensorSpec

INPUT, OUTPUT = "images", "logits"
GOLDEN = 16
"""Images in ``golden.npz``; enough for the batch sizes that are checked."""

OPSET = 18


def capture(
    model: nn.Module, name: str, preprocessing: Preprocessing, class_names: tuple[str, ...], images: Split, folder: Path
) -> None:
    """Write ``model.onnx`` (dynamic batch), ``sidecar.json`` and ``golden.npz`` (images, logits) into ``folder``.

    Args:
        model: logits (B,classes) from normalized images (B,C,H,W); a copy on the CPU in eval mode is exported.
        name: the model's name, for the record.
        images: real images; the first `GOLDEN` become the golden inputs, repeated where there are fewer.

    Raises:
        GraphError: the exporter refused the model, or its output is not (B,classes).
    """
    model = copy.deepcopy(model).cpu().eval().requires_grad_(False)
    pixels = np.resize(images.source.images(images.indices[:GOLDEN]), (GOLDEN, preprocessing.channels, *preprocessing.image_size))
    inputs = preprocessing.apply(pixels)
    with torch.no_grad():
        outputs = model(torch.from_numpy(inputs))
    _check_output(outputs, len(class_names), name)
    np.savez(folder / "golden.npz", images=inputs, logits=outputs.numpy())
    sidecar = Sidecar(
        model=name,
        input=TensorSpec(name=INPUT, shape=(None, *inputs.shape[1:])),
        output=TensorSpec(name=OUTPUT, shape=(None, len(class_names))),
        preprocessing=preprocessing,
        class_names=class_names,
    )
    (folder / "sidecar.json").write_text(sidecar.model_dump_json(indent=1))
    _export(model, inputs, folder / "model.onnx", sidecar)


def _check_output(outputs: object, classes: int, name: str) -> None:
    if not isinstance(outputs, torch.Tensor) or outputs.shape != (GOLDEN, classes):
        shape = tuple(outputs.shape) if isinstance(outputs, torch.Tensor) else type(outputs).__name__
        raise GraphError(f"{name} gives {shape} for {GOLDEN} images and {classes} classes", "it must return logits (B,classes)")
    if not outputs.isfinite().all():
        raise GraphError(f"{name} gives NaN or infinity for real images", "check its weights and the preprocessing")


def _export(model: nn.Module, inputs: np.ndarray, path: Path, sidecar: Sidecar) -> None:
    # A batch of one would be taken for a constant, and so for the only batch size there is.
    example = torch.from_numpy(inputs[:2])
    batch = torch.export.Dim("batch", min=1, max=4096)
    try:
        with _hushed():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: batch},),
                verbose=False,
            )
    except (torch.onnx.errors.OnnxExporterError, torch._dynamo.exc.TorchDynamoException, RuntimeError, TypeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise GraphError(
            f"{sidecar.model} cannot be exported to ONNX: {reason}", "choose another student, or mend its forward()"
        ) from error
    assert program is not None
    proto = program.model_proto
    onnx.helper.set_model_props(proto, {"fofa_deploy.sidecar": sidecar.model_dump_json()})
    onnx.checker.check_model(proto)
    onnx.save(proto, path)


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
