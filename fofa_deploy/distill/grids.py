"""Resizing and pooling of grids (B, C, H, W); as one product with a fixed matrix where that is cheaper."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

Size = tuple[int, int]

FEW = 64
"""Cells of a grid up to which enlarging it is a product with its matrix: interpolation, its backward pass above all, is slower."""


def resize(grid: Tensor, size: Size) -> Tensor:
    """Bilinear, antialiased where it shrinks: (B, C, H, W) -> (B, C, *size)."""
    if (grid.shape[-2], grid.shape[-1]) == tuple(size):
        return grid
    matrix = enlarging(grid, size)
    if matrix is not None:
        return torch.unflatten(_times(grid, matrix), 2, size)
    # In float32: the antialiased kernel has no bf16 on the CPU.
    return _interpolated(grid.float(), size).to(grid.dtype)


def enlarging(grid: Tensor, size: Size) -> Tensor | None:
    """What a flat ``grid`` (B, C, h * w) is multiplied with to be enlarged: (h * w, H * W). None: interpolation is cheaper."""
    before = (grid.shape[-2], grid.shape[-1])
    few = before[0] * before[1] <= FEW and before[0] <= size[0] and before[1] <= size[1]
    return _enlarging(before, size, grid.device, grid.dtype) if few else None


def pool(grid: Tensor, sides: Sequence[int]) -> Tensor:
    """Adaptive average pooling to several squares at once, side by side: (B, C, H, W) -> (B, C, sum of side * side)."""
    return _times(grid, pooling(grid, sides))


def pooling(grid: Tensor, sides: Sequence[int]) -> Tensor:
    """What a flat ``grid`` (B, C, H * W) is multiplied with to be pooled: (H * W, sum of side * side)."""
    return _pooling((grid.shape[-2], grid.shape[-1]), tuple(sides), grid.device, grid.dtype)


def _interpolated(grid: Tensor, size: Size) -> Tensor:
    shrinks = size[0] < grid.shape[-2] or size[1] < grid.shape[-1]
    return functional.interpolate(grid, size=size, mode="bilinear", align_corners=False, antialias=shrinks)


def _times(grid: Tensor, matrix: Tensor) -> Tensor:
    """In the grid's own type, whatever autocast says."""
    with torch.autocast(grid.device.type, enabled=False):
        return grid.flatten(2) @ matrix


def _units(size: Size) -> Tensor:
    """Every grid that is 1 in one cell and 0 elsewhere: (H * W, 1, H, W). What a linear map makes of them is its matrix."""
    return torch.eye(size[0] * size[1]).view(-1, 1, *size)


@cache
def _enlarging(before: Size, after: Size, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(h * w, H * W)."""
    return _interpolated(_units(before), after).flatten(1).to(device, dtype)


@cache
def _pooling(before: Size, sides: tuple[int, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    """(H * W, sum of side * side)."""
    units = _units(before)
    return torch.cat([functional.adaptive_avg_pool2d(units, side).flatten(1) for side in sides], dim=1).to(device, dtype)
