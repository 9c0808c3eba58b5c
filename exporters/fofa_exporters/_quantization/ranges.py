"""From statistics to the range that each activation is quantized over.

Min-max and the averaged extremes are taken as they are. The other three clip: each end moves towards zero to where a
criterion over the histogram likes it best.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from fofa_exporters._quantization.scheme import Method
from fofa_exporters._quantization.statistics import BINS, Floats, Statistics

LEVELS = 256
PERCENTILE = 0.9999
FACTORS = np.geomspace(0.02, 1.0, 80)
_FLOOR = 1e-12

Counts = NDArray[np.int64]


def ranges(statistics: Statistics, method: Method, symmetric: bool) -> tuple[Floats, Floats]:
    """Ends (T,), (T,) of each tensor's range, zero always inside.

    Args:
        symmetric: the quantizer will use -max(|low|,|high|)..max(|low|,|high|); the criteria look at that range then.
    """
    if method == "min-max":
        low, high = statistics.low, statistics.high
    elif method == "moving-average":
        low, high = statistics.average_low, statistics.average_high
    else:
        low, high = _clipped(statistics, method, symmetric)
    return np.minimum(low, 0).astype(np.float32), np.maximum(high, 0).astype(np.float32)


def _clipped(statistics: Statistics, method: Method, symmetric: bool) -> tuple[Floats, Floats]:
    rows = zip(statistics.histogram, statistics.low, statistics.high, strict=True)
    ends = [_ends(counts, float(low), float(high), method, symmetric) for counts, low, high in rows]
    low, high = np.array(ends, np.float32).T
    return low, high


def _ends(counts: Counts, low: float, high: float, method: Method, symmetric: bool) -> tuple[float, float]:
    centers = low + (np.arange(BINS) + 0.5) * (high - low) / BINS
    used = counts > 0
    counts, centers = counts[used], centers[used]
    low, high = min(low, 0.0), max(high, 0.0)
    if high - low < _FLOOR:
        return low, high
    if symmetric:
        counts, centers, low = np.append(counts, counts), np.append(centers, -centers), -max(-low, high)
        high = -low
    if method == "percentile":
        return min(_quantile(counts, -centers) * -1, 0.0), max(_quantile(counts, centers), 0.0)
    if method == "entropy":
        # What a ReLU cuts off is a spike at zero, which any range holds: beside it the rest would not count.
        counts = np.where(np.abs(centers) < (high - low) / BINS, 0, counts)
    criterion = _squared_error if method == "mse" else _divergence
    if symmetric:
        factor = _best([criterion(counts, centers, low * factor, high * factor) for factor in FACTORS])
        return low * factor, high * factor
    # One end after the other: they hardly depend on each other, and a tensor may have a tail on one side only.
    high *= _best([criterion(counts, centers, low, high * factor) for factor in FACTORS]) if high else 1.0
    low *= _best([criterion(counts, centers, low * factor, high) for factor in FACTORS]) if low else 1.0
    return low, high


def _best(errors: Sequence[float]) -> float:
    """The widest of equals."""
    return float(FACTORS[len(errors) - 1 - int(np.argmin(errors[::-1]))])


def _quantile(counts: Counts, centers: NDArray[np.float64]) -> float:
    order = np.argsort(centers)
    return float(centers[order][np.searchsorted(np.cumsum(counts[order]) / counts.sum(), PERCENTILE)])


def _levels(centers: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    step = (high - low) / (LEVELS - 1)
    return np.clip(np.round(centers / step), round(low / step), round(high / step)) * step


def _squared_error(counts: Counts, centers: NDArray[np.float64], low: float, high: float) -> float:
    return float(counts @ np.square(centers - _levels(centers, low, high)))


def _divergence(counts: Counts, centers: NDArray[np.float64], low: float, high: float) -> float:
    """KL divergence of the clipped distribution from its quantized form (S. Migacz, 8-bit inference with TensorRT, 2017).

    Values outside count as the outermost bins inside; within a level, the quantized form spreads evenly over the used bins.
    """
    levels, level_of = np.unique(_levels(centers, low, high), return_inverse=True)
    inside = (centers >= low) & (centers <= high)
    if np.count_nonzero(inside) < LEVELS / 2:  # fewer bins than levels lose nothing, and that says nothing
        return np.inf
    p = counts.astype(np.float64) * inside
    p[np.flatnonzero(inside)[0]] += counts[centers < low].sum()
    p[np.flatnonzero(inside)[-1]] += counts[centers > high].sum()
    mass = np.bincount(level_of, counts * inside, len(levels))
    used = np.bincount(level_of, inside, len(levels))
    q = np.where(inside, mass[level_of] / np.maximum(used[level_of], 1), 0.0)
    p, q = p[inside] / max(p.sum(), _FLOOR), q[inside] / max(q.sum(), _FLOOR)
    return float(np.sum(p * np.log(np.maximum(p, _FLOOR) / np.maximum(q, _FLOOR))))
