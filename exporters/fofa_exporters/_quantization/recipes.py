"""The recipes that grow from one placement of Q/DQ pairs: what is in the pairs, and which layers stay without."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from fofa_deploy.types import Recipe, Scalar

VARIANTS: Mapping[str, tuple[str, dict[str, Scalar]]] = {
    "": ("", {}),
    "-mse": ("MSE ranges", {"ranges": "mse"}),
    "-recovered": ("MSE ranges, learned rounding", {"ranges": "mse", "learned_rounding": True}),
    "-percentile": ("percentile ranges", {"ranges": "percentile"}),
    "-entropy": ("entropy ranges", {"ranges": "entropy"}),
    "-average": ("ranges averaged over batches", {"ranges": "moving-average"}),
}
"""The same kernels with other numbers, cheapest first. Of the last three each is the best for some model."""

SMOOTHING = 0.5
"""Of transformers: half of the spread of activations over channels goes into the weights."""

SHARES = (0.5, 0.8, 0.95)
"""Of the error, carried by the layers that stay in float."""


def grown(bases: Iterable[Recipe], shares: Iterable[float] = SHARES, smoothing: float = 0.0) -> list[Recipe]:
    """For every base a family of `VARIANTS`, and one of mixed precision per share.

    Args:
        smoothing: of the recovered variants.
    """
    bases, kept = list(bases), (0.0, *shares)
    return [variant for share in kept for base in bases for variant in _variants(_mixed(base, share), smoothing)]


def _mixed(base: Recipe, share: float) -> Recipe:
    if not share:
        return base.model_copy(update={"observes": "statistics", "family": base.name})
    name = f"{base.name}-mixed{share:.0%}".removesuffix("%")
    words = f"{base.description}; the layers that carry {share:.0%} of the error in float"
    options = {**base.options, "float_share": share}
    return base.model_copy(
        update={"name": name, "description": words, "options": options, "observes": "sensitivity", "family": name}
    )


def _variants(base: Recipe, smoothing: float) -> Iterable[Recipe]:
    chosen = list(VARIANTS.items())
    for suffix, (words, options) in chosen if not base.options.get("float_share") else chosen[:3]:
        more = {"smoothing": smoothing} if smoothing and suffix == "-recovered" else {}
        description = f"{base.description}; {words}" if words else base.description
        update = {"name": base.name + suffix, "description": description, "options": {**base.options, **options, **more}}
        yield base.model_copy(update=update)
