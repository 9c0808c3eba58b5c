"""What an artifact answers, image by image. Runs in a child process; numpy only."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fofa_deploy.backend import get_backend
from fofa_deploy.errors import DataError
from fofa_deploy.types import Artifact, Frozen, HardwareProfile
from fofa_deploy.verify import run_all

NO_ANSWER = -1
"""Where the logits are not finite: never right."""


class AnswerRequest(Frozen):
    """``images`` is a .npy file, uint8 (N,C,H,W)."""

    artifact: Path
    profile: HardwareProfile
    images: Path
    batch_size: int = 32


class Answers(Frozen):
    """Top-1 class per image, in file order."""

    classes: tuple[int, ...]


def answer(request: AnswerRequest) -> Answers:
    """Run an artifact on every image.

    Raises:
        DataError: the images do not fit the artifact's input.
    """
    artifact = Artifact.load(request.artifact)
    images = np.load(request.images, mmap_mode="r", allow_pickle=False)
    prepared = artifact.sidecar.preprocessing
    if images.shape[1:] != (prepared.channels, *prepared.image_size):
        problem = (
            f"{artifact.path} takes images of {prepared.channels} x {prepared.image_size}, {request.images} has {images.shape[1:]}"
        )
        raise DataError(problem, "compare run directories: each brings its images as its own preprocessing makes them")
    with get_backend(artifact.backend).load(artifact, request.profile) as session:
        return Answers(classes=tuple(classes_of(run_all(session, artifact, images, request.batch_size)).tolist()))


def classes_of(logits: NDArray[np.float32]) -> NDArray[np.int64]:
    """(N,K) -> (N,)"""
    return np.where(np.isfinite(logits).all(axis=1), logits.argmax(axis=1), NO_ANSWER)
