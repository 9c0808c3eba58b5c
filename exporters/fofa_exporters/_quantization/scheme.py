"""All that decides a quantized graph, and how a recipe spells it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, Self, get_args

from fofa_deploy.errors import BuildError
from fofa_deploy.types import Recipe

Method = Literal["min-max", "moving-average", "percentile", "entropy", "mse"]
BEST = "best"
"""Ranges by the method that changes the logits least, all layers quantized, as the simulator sees it."""


@dataclass(frozen=True)
class Scheme:
    """How Q/DQ pairs are placed and what is in them. Weights are always signed, symmetric and per channel."""

    signed_activations: bool = False
    """Signed activations are symmetric as well; unsigned ones have a zero point."""
    seven_bit_weights: bool = False
    """Weights in -64..64, so that pairs of u8 x s8 products never saturate 16 bits on CPUs without VNNI."""
    weighted_only: bool = False
    """Leave everything but convolutions and matrix products with constant weights alone."""
    float_outputs: bool = False
    """Leave the outputs of products in float, so that a runtime can fuse dequantizing into them."""
    conv_outputs: bool = False
    """Those of convolutions not: for a runtime that has none from int8 to float."""
    quantize_bias: bool = True
    ranges: Method | Literal["best"] = "min-max"
    float_share: float = 0.0
    """The most sensitive layers stay in float: those that together carry this share of the squared error of the logits."""
    smoothing: float = 0.0
    """How much of the activations' spread over channels moves into the weights behind a LayerNorm; 0.5 is usual, 0 none."""
    smallest_scale: float = 0.0
    """Smaller steps become this one: what is so close to zero may round to it, where a short float could not hold its step."""
    learned_rounding: bool = False
    bias_correction: bool = True

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """The options of a recipe that are fields of a scheme; the others belong to its back end.

        Raises:
            BuildError: no such method for ranges.
        """
        names = {field.name for field in fields(cls)}
        scheme = cls(**{name: value for name, value in recipe.options.items() if name in names})  # type: ignore[arg-type]
        known = (*get_args(Method), BEST)
        if scheme.ranges not in known:
            raise BuildError(f"no ranges are called {scheme.ranges!r}", f"use one of {', '.join(known)}")
        return scheme
