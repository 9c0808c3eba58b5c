"""Checkpoints that survive a kill at any moment: one file each, its digest at its end, written aside and renamed."""

from __future__ import annotations

import hashlib
import io
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fofa_deploy.errors import IntegrityError, TrainingError
from fofa_deploy.models import is_sound
from fofa_deploy.store import write_atomic

KEPT = 2
_DIGEST_BYTES = hashlib.sha256().digest_size


def save(folder: Path, step: int, state: dict[str, Any], made: Mapping[str, Tensor] | None = None) -> None:
    """Write ``step-N.pt``, and then remove all but it and the one before.

    Args:
        made: buffers that the network was made with, by the end of their names: infinity in them is no accident.

    Raises:
        TrainingError: the state has NaN or infinity in it; nothing is written.
    """
    _refuse_unsound(state, f"step {step}", made or {})
    folder.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0, io.SEEK_END)
    buffer.write(hashlib.sha256(buffer.getbuffer()).digest())
    write_atomic(folder / f"step-{step}.pt", buffer.getvalue())
    steps = _steps(folder)
    # One beyond this step was damaged, or training had not gone back behind it.
    for other in {*steps} - {*[known for known in steps if known <= step][-KEPT:]}:
        (folder / f"step-{other}.pt").unlink(missing_ok=True)


def load_newest(folder: Path) -> tuple[dict[str, Any] | None, list[str]]:
    """The newest intact checkpoint, or None where there has been none yet, and a notice for each damaged one passed over.

    Raises:
        IntegrityError: there are checkpoints, and none is intact.
    """
    notices: list[str] = []
    for step in reversed(_steps(folder)):
        path = folder / f"step-{step}.pt"
        content = memoryview(path.read_bytes())
        state, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if hashlib.sha256(state).digest() == digest:
            return torch.load(io.BytesIO(state), map_location="cpu", weights_only=True), notices
        notices.append(f"checkpoint {path} is damaged; the one before it is used")
    if notices:
        raise IntegrityError(f"every checkpoint in {folder} is damaged", "remove that folder to train from the start")
    return None, []


def _steps(folder: Path) -> list[int]:
    found = (re.fullmatch(r"step-(\d+)\.pt", path.name) for path in folder.glob("step-*.pt"))
    return sorted(int(match[1]) for match in found if match)


def _refuse_unsound(state: dict[str, Any], where: str, made: Mapping[str, Tensor]) -> None:
    for name, tensor in _tensors(state, ""):
        if not is_sound(tensor, next((buffer for end, buffer in made.items() if name.endswith(f".{end}")), None)):
            raise TrainingError(f"{name} has NaN or infinity at {where}", "lower the learning rate, or train in fp32")


def _tensors(value: Any, name: str) -> list[tuple[str, Tensor]]:  # noqa: ANN401
    if isinstance(value, Tensor):
        return [(name, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    return [pair for key, item in items for pair in _tensors(item, f"{name}.{key}".lstrip("."))]


def random_state() -> dict[str, Any]:
    """Of every global generator that a training may draw from, in values that a checkpoint may hold."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_available() else [],  # this process's device: others may be gone
        "python": [version, list(numbers), gauss],
        "numpy": [str(name), torch.from_numpy(np.asarray(keys).astype(np.int64)), int(position), int(has_gauss), float(cached)],
    }


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"][0])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
