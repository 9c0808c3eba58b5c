"""The recipes that grow from one placement of Q/DQ pairs: what is in the pairs, and which layers stay without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fofa_deploy.types import Recipe, Scalar
from fofa_exporters._quantization.scheme import BEST

VARIANTS: Mapping[str, tuple[str, dict[str, Scalar]]] = {
    "": ("", {}),
    "-mse": ("MSE ranges", {"ranges": "mse"}),
    "-recovered": ("the best of all ranges, learned rounding", {"ranges": BEST, "learned_rounding": True}),
}
"""The same kernels with other numbers, cheapest first."""

SMOOTHING = 0.5
"""Of transformers: half of the spread of activations over channels goes into the weights."""

SHARES = (0.25, 0.5, 0.8, 0.95)
"""Of the error, carried by the layers that stay in float. The first is often a single layer, and costs next to nothing."""


def grown(bases: Iterable[Recipe], shares: Iterable[float] = SHARES, smoothing: float = 0.0) -> list[Recipe]:
    """For every base a family of `VARIANTS`, and one of mixed precision per share.

    Args:
        smoothing: of the recovered variants.
    """
    bases, kept = list(bases), (0.0, *shares)
    return [variant for share in kept for base in bases for variant in _variants(_mixed(base, share), smoothing)]


def _mixed(base: Recipe, share: float) -> Recipe:
    """A share of the error in float is slower than the base, and so worth a try only where that lost too much."""
    if not share:
        return base.model_copy(update={"observes": "statistics", "family": base.name})
    name = f"{base.name}-mixed{share:.0%}".removesuffix("%")
    facts = {
        "name": name,
        "description": f"{base.description}; the layers that carry {share:.0%} of the error in float",
        "options": {**base.options, "float_share": share},
        "observes": "sensitivity",
        "family": name,
        "after": base.name,
    }
    return base.model_copy(update=facts)


def _variants(base: Recipe, smoothing: float) -> Iterable[Recipe]:
    for suffix, (words, options) in VARIANTS.items():
        more = {"smoothing": smoothing} if smoothing and suffix == "-recovered" else {}
        description = f"{base.description}; {words}" if words else base.description
        update = {"name": base.name + suffix, "description": description, "options": {**base.options, **options, **more}}
        yield base.model_copy(update=update)
