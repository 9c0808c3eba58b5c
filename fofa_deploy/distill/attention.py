"""Region-aware attention (RAA) and the aligners. arXiv 2501.08885, equations 3 and 4.

The student blends its own features over all stages and regions before it is compared with the teacher.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from fofa_deploy.distill.grids import resize


class RegionEmbedding(nn.Module):
    """One stage cut into g x g regions: (B, c, h, w) -> (B, n, d), n = g * g, row-major.

    A convolution whose stride is its kernel is one product of matrices, which is two to three times as fast. The kernel has at
    most ``cells`` to a side, and a finer map is averaged to that: weights would grow with the image otherwise (6.4 million for
    the 56 x 56 map of a ResNet's first stage, cut into 4 x 4), to see what no vector per region is asked for.
    """

    def __init__(self, channels: int, size: tuple[int, int], side: int, cells: int, width: int) -> None:
        super().__init__()
        self.kernel = (min(cells, math.ceil(size[0] / side)), min(cells, math.ceil(size[1] / side)))
        self.size = (self.kernel[0] * side, self.kernel[1] * side)  # below ``cells`` rounded up: nothing is thrown away
        self.embed = nn.Linear(self.kernel[0] * self.kernel[1] * channels, width)

    def forward(self, grid: Tensor) -> Tensor:
        rows, columns = self.kernel
        cut = resize(grid, self.size).unflatten(3, (-1, columns)).unflatten(2, (-1, rows))  # (B, c, g, rows, g, columns)
        regions: Tensor = self.embed(cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))
        return regions


class RegionAwareAttention(nn.Module):
    """softmax(Q K^T / sqrt(d / heads)) V over the regions of all stages (equation 3); Q, K and V are all the student's.

    Args:
        shapes: (c, h, w) of each student stage.
        regions: n per stage, a square number.
        cells: of a region that its embedding tells apart, to a side.
        width: d.
        attend: False leaves every region to itself (the ablation): LayerNorm and V alone.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, int, int]], regions: int, cells: int, width: int, heads: int, attend: bool = True
    ) -> None:
        super().__init__()
        side = math.isqrt(regions)
        self.regions, self.heads = side * side, heads
        self.embeddings = nn.ModuleList(RegionEmbedding(c, (h, w), side, cells, width) for c, h, w in shapes)
        self.norm = nn.LayerNorm(width)
        self.value = nn.Linear(width, width)
        self.attend = attend
        if attend:
            self.positions = nn.Parameter(torch.empty(1, len(shapes) * self.regions, width))
            self.query, self.key = (nn.Linear(width, width) for _ in range(2))
            nn.init.trunc_normal_(self.positions, std=0.02)

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps (B, c_i, h_i, w_i) -> one (B, n, d) per stage."""
        embedded = [embed(grid) for embed, grid in zip(self.embeddings, maps, strict=True)]
        tokens = self.norm(torch.cat(embedded, dim=1))
        value = self.value(tokens)
        return torch.split(self._blend(tokens, value) if self.attend else value, self.regions, dim=1)

    def _blend(self, tokens: Tensor, value: Tensor) -> Tensor:
        """(B, N_q, d) twice -> (B, N_q, d)."""
        placed = tokens + self.positions  # (1, N_q, d): by place in the sequence, never by place in the batch
        query, key, split = (self._split(part) for part in (self.query(placed), self.key(placed), value))
        return functional.scaled_dot_product_attention(query, key, split).transpose(1, 2).flatten(2)

    def _split(self, tokens: Tensor) -> Tensor:
        """(B, N, d) -> (B, heads, N, d / heads)."""
        return torch.unflatten(tokens, 2, (self.heads, -1)).transpose(1, 2)


class Aligner(nn.Module):
    """(B, n, d) -> (B, C, g, g): student regions in the channels of a teacher stage (equation 4).

    Resizing and a 1x1 convolution commute (the weights of both sum over different axes, and those of resizing sum
    to 1), so the convolution runs at whichever of the two sizes is smaller. To enlarge what comes out, with
    :func:`fofa_deploy.distill.grids.resize`, is left to whoever needs the map; the loss does not.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        self.project = nn.Conv2d(width, channels, 1)

    def forward(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        """``size``: (H, W) of the stage; the result has it where it is smaller than (g, g)."""
        side = math.isqrt(tokens.shape[1])
        grid = torch.unflatten(tokens.transpose(1, 2), 2, (side, side))
        smaller = size[0] * size[1] < side * side
        return self.project(resize(grid, size) if smaller else grid)  # type: ignore[no-any-return]
