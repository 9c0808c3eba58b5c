"""How a module passes its features on, and the exact way to a (B, C, H, W) grid and back.

A layout is proven, not guessed: :func:`prove` finds the one under which a raw output equals a feature map that the
model itself declares, value by value.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fofa_deploy.errors import ModelError

Path = tuple[int, ...]  # into nested tuples and lists; () is the tensor itself
Kind = Literal["nchw", "nhwc", "tokens", "channel_tokens"]
_MAX_PREFIX = 16


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the grid is in what a module passes on.

    ``tokens`` are (B, prefix + H*W, C), with any number of axes between batch and channel; ``channel_tokens`` are (B, C, H*W).

    Args:
        prefix: tokens in front of the grid (class, distillation and register tokens).
        path: to the tensor in what the module passes on.
        order: for tokens that are not row-major, the raw position of each row-major one.
    """

    kind: Kind
    prefix: int = 0
    path: Path = ()
    order: tuple[int, ...] = ()


def select(raw: Any, path: Path) -> Tensor:  # noqa: ANN401 - modules pass tensors, tuples and lists
    """The tensor at ``path``."""
    for index in path:
        raw = raw[index]
    if not isinstance(raw, Tensor):
        raise ModelError(f"a tapped module passed a {type(raw).__name__} where it passed a tensor before", "tap other modules")
    return raw


def substitute(raw: Any, path: Path, tensor: Tensor) -> Any:  # noqa: ANN401
    """``raw`` with the tensor at ``path`` replaced."""
    if not path:
        return tensor
    first = path[0]
    items = [*raw[:first], substitute(raw[first], path[1:], tensor), *raw[first + 1 :]]
    return tuple(items) if isinstance(raw, tuple) else items


def leaves(raw: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:  # noqa: ANN401
    """Every tensor in nested tuples and lists, with its path."""
    if isinstance(raw, Tensor):
        yield path, raw
    elif isinstance(raw, tuple | list):
        for index, part in enumerate(raw):
            yield from leaves(part, (*path, index))


def _token_grid(count: int, height: int, width: int) -> tuple[int, int]:
    """Sides of a grid of ``count`` tokens with the proportions of height x width."""
    scale = math.sqrt(count / (height * width))
    sides = round(height * scale), round(width * scale)
    if sides[0] * sides[1] != count:
        raise ModelError(
            f"{count} tokens do not form a grid with the proportions {height}x{width}",
            "train on images with the proportions that the model was tapped with, and drop no tokens (patch_drop_rate)",
        )
    return sides


def to_grid(tensor: Tensor, layout: Layout, height: int, width: int) -> Tensor:
    """(B, C, H, W) view or copy of a raw tensor; height and width are those of the probe."""
    if layout.kind == "nchw":
        return tensor
    if layout.kind == "nhwc":
        return tensor.permute(0, 3, 1, 2)
    tokens = tensor.flatten(1, -2) if layout.kind == "tokens" else tensor.transpose(1, 2)
    tokens = tokens[:, layout.prefix :]
    if layout.order:
        tokens = tokens[:, list(layout.order)]
    sides = _token_grid(tokens.shape[1], height, width)
    return torch.unflatten(tokens.transpose(1, 2), 2, sides)


def from_grid(grid: Tensor, tensor: Tensor, layout: Layout) -> Tensor:
    """Inverse of :func:`to_grid`; prefix tokens are taken from ``tensor`` and put back in front."""
    if layout.kind == "nchw":
        return grid
    if layout.kind == "nhwc":
        return grid.permute(0, 2, 3, 1)
    if layout.kind == "channel_tokens":
        return grid.flatten(2)
    tokens = grid.flatten(2).transpose(1, 2)
    if layout.order:
        inverse = torch.tensor(layout.order).argsort()
        tokens = tokens[:, inverse.to(tokens.device)]
    if layout.prefix:
        tokens = torch.cat([tensor[:, : layout.prefix].to(tokens.dtype), tokens], dim=1)
    return tokens.reshape(tensor.shape)


# --- proof ----------------------------------------------------------------------------------------------------


def plausible(shape: torch.Size, grid: torch.Size) -> Iterator[Layout]:
    """Layouts whose shapes fit."""
    batch, channels, height, width = grid
    if len(shape) < 3 or shape[0] != batch:
        return
    if shape == grid:
        yield Layout("nchw")
    prefix = math.prod(shape[1:-1]) - height * width
    if tuple(shape) == (batch, height, width, channels):
        yield Layout("nhwc")
    elif shape[-1] == channels and prefix >= 0 and (len(shape) == 3 or prefix == 0):
        yield Layout("tokens", prefix=prefix)
    if tuple(shape) == (batch, channels, height * width):
        yield Layout("channel_tokens")


def mismatch(found: Tensor, declared: Tensor) -> float:
    """Largest difference, relative to the root mean square of ``declared``."""
    scale = declared.float().square().mean().sqrt().clamp_min(1e-30)
    return float((found.float() - declared.float()).abs().max() / scale)


def tolerance(tensor: Tensor) -> float:
    """What two runs of the same operations may differ by."""
    return max(1e-4, 4 * torch.finfo(tensor.dtype).eps)


def _token_order(tensor: Tensor, layout: Layout, declared: Tensor) -> Layout | None:
    """The same layout with the order in which raw tokens are the declared ones, where there is one."""
    tokens = tensor.flatten(1, -2)[0, layout.prefix :].float()
    nearest = torch.cdist(declared[0].flatten(1).T.float(), tokens).argmin(dim=1)
    order = tuple(nearest.tolist())
    return replace(layout, order=order) if len(set(order)) == len(order) else None


def _proofs(tensor: Tensor, declared: Tensor, reorder: bool) -> Iterator[tuple[float, Layout]]:
    height, width = declared.shape[-2:]
    for layout in plausible(tensor.shape, declared.shape):
        error = mismatch(to_grid(tensor, layout, height, width), declared)
        yield error, layout
        ordered = _token_order(tensor, layout, declared) if reorder and layout.kind == "tokens" and error > 1e-3 else None
        if ordered is not None:
            yield mismatch(to_grid(tensor, ordered, height, width), declared), ordered


def prove(raw: Any, declared: Tensor, reorder: bool = True) -> tuple[float, Layout] | None:  # noqa: ANN401
    """Smallest mismatch, and its layout, under which ``raw`` equals the declared (B, C, H, W) map; None when it never does.

    Args:
        reorder: also look for tokens in another order (window by window, say).
    """
    proofs = [
        (error, replace(layout, path=path))
        for path, tensor in leaves(raw)
        for error, layout in _proofs(tensor, declared, reorder)
        if error <= tolerance(declared)
    ]
    return min(proofs, key=lambda proof: proof[0], default=None)


# --- inference, where nothing is declared ---------------------------------------------------------------------


def channels_last(shape: torch.Size, image_size: tuple[int, int]) -> bool | None:
    """Whether a 4-D map is (B, H, W, C): which reading has the image's proportions. None where both have them alike."""
    first, last = (abs(math.log(h * image_size[1] / (w * image_size[0]))) for h, w in (shape[2:], shape[1:3]))
    return None if first == last else last < first


def infer(shape: torch.Size, image_size: tuple[int, int], undecided: Kind = "nchw") -> tuple[Layout, int, int]:
    """Layout, height and width of an undeclared tap: 4-D maps and 3-D tokens, whichever has the image's proportions.

    Args:
        undecided: what a 4-D map is that fits as (B, C, H, W) and as (B, H, W, C), such as one of 16 x 16 x 16.

    Raises:
        ModelError: no such grid.
    """
    if len(shape) == 4 and min(shape) > 0:
        last = channels_last(shape, image_size)
        kind: Kind = undecided if last is None else "nhwc" if last else "nchw"
        height, width = shape[1:3] if kind == "nhwc" else shape[2:]
        return Layout(kind), height, width
    if len(shape) == 3:
        divisor = math.gcd(*image_size)
        rows, columns = image_size[0] // divisor, image_size[1] // divisor
        for prefix in range(min(_MAX_PREFIX, shape[1])):
            scale = math.isqrt((shape[1] - prefix) // (rows * columns))
            if scale and scale * scale * rows * columns == shape[1] - prefix:
                return Layout("tokens", prefix=prefix), rows * scale, columns * scale
    raise ModelError(
        f"an output of shape {tuple(shape)} is neither a 4-D map nor tokens with the image's proportions",
        "tap modules that pass (B, C, H, W), (B, H, W, C), or (B, prefix + H*W, C)",
    )
