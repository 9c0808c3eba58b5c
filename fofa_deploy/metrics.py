"""Accuracy and fidelity of logits, numpy only. Logits are float32 (N,K), labels int64 (N,)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fofa_deploy.results import Comparison

Logits = NDArray[np.float32]
Labels = NDArray[np.int64]


def topk(logits: Logits, labels: Labels, k: int) -> float:
    """Share of images whose label is among the k largest logits; NaN never counts as a hit."""
    clean = np.where(np.isnan(logits), -np.inf, logits)
    k = min(k, logits.shape[1])
    best = np.argpartition(-clean, k - 1, axis=1)[:, :k]
    finite = np.isfinite(np.take_along_axis(logits, labels[:, None], axis=1))[:, 0]
    return float(np.mean((best == labels[:, None]).any(axis=1) & finite))


def best_order(logits: Logits, labels: Labels) -> NDArray[np.int64]:
    """The order (K,) of the logits that makes most of these images right: ``logits[:, order]``.

    An assignment problem over the confusion matrix; classes that it says nothing about stay where they are, if they can.
    """
    from scipy.optimize import linear_sum_assignment

    classes = logits.shape[1]
    confusion = np.bincount(labels * classes + logits.argmax(1), minlength=classes**2).reshape(classes, classes)
    order: NDArray[np.int64] = linear_sum_assignment(confusion + 0.5 * np.eye(classes), maximize=True)[1].astype(np.int64)
    return order


def compare(logits: Logits, expected: Logits, labels: Labels | None) -> Comparison:
    """An artifact's logits against PyTorch's on the same images; without labels, fidelity alone."""
    finite = bool(np.isfinite(logits).all())
    agreement = float(np.mean(logits.argmax(1) == expected.argmax(1))) if finite else 0.0
    return Comparison(
        samples=len(logits),
        finite=finite,
        top1=None if labels is None else topk(logits, labels, 1),
        top5=None if labels is None else topk(logits, labels, 5),
        agreement=agreement,
        cosine=_cosine(logits, expected) if finite else None,
        max_abs_error=float(np.abs(logits - expected).max()) if finite else None,
        relative_error=_relative(logits, expected) if finite else None,
    )


def _cosine(a: Logits, b: Logits) -> float:
    x, y = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(x, axis=1) * np.linalg.norm(y, axis=1)
    return float(np.mean((x * y).sum(axis=1) / np.maximum(norms, 1e-30)))


def _relative(a: Logits, b: Logits) -> float:
    return float(np.linalg.norm(a.astype(np.float64) - b) / max(float(np.linalg.norm(b.astype(np.float64))), 1e-30))
