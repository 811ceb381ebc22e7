"""Patches of images and scans, and where they are: cut out, embedded, chosen, and told their places.

Su et al., "RoFormer" (2021), for rotations; sines and cosines as in MAE.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.core.errors import UseError

Size = tuple[int, ...]  # rows and columns, or depth, height and width
Turn = tuple[Tensor, Tensor]  # cosines and sines by token and pair of channels, (…, N, c / 2)


class PatchEmbed(nn.Module):
    """Images or scans (B, channels, …) -> tokens (B, N, C), row by row; `keep` (B, n): of these patches only."""

    def __init__(self, channels: int, dim: int, patch: int, dims: int = 2) -> None:
        super().__init__()
        self.proj = (nn.Conv2d if dims == 2 else nn.Conv3d)(channels, dim, patch, patch)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        patches = taken(to_patches(x, self.proj.kernel_size[0]), keep)
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


def to_patches(images: Tensor, patch: int) -> Tensor:
    """(B, C, …) -> (B, N, C · patch^dims), row by row."""
    batch, channels, *size = images.shape
    split = images.reshape(batch, channels, *(n for length in size for n in (length // patch, patch)))
    grid, inside = range(2, 2 + 2 * len(size), 2), range(3, 3 + 2 * len(size), 2)
    return split.permute(0, *grid, 1, *inside).flatten(1 + len(size)).flatten(1, len(size))


def taken(x: Tensor, places: Tensor | None) -> Tensor:
    """Of tokens (B, N, C) those at the places (B, n)."""
    return x if places is None else x.gather(1, places[..., None].expand(-1, -1, x.shape[-1]))


def turned(x: Tensor, turn: Turn) -> Tensor:
    """Every pair of neighbouring channels of x (B, heads, N, c), rotated (RoFormer, section 3.2)."""
    cos, sin = turn
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


def rotations(grid: Size, head: int, device: torch.device) -> Tensor:
    """Angles (N, head / 2): every axis turns an equal share of the pairs of channels, each pair more slowly."""
    count = head // (2 * len(grid))
    speeds = 10000 ** (-torch.arange(count, device=device) / count)
    places = [torch.arange(n, device=device, dtype=torch.float32) for n in grid]
    axes = [axis[..., None] * speeds for axis in torch.meshgrid(*places, indexing="ij")]
    return torch.cat(axes, -1).flatten(0, -2)


def sine_positions(grid: Size, dim: int, span: Size | None = None) -> Tensor:
    """(N, dim) sines and cosines of place, as in MAE: columns in the first part of the channels, then rows, …

    span: count positions as on a grid of this size (patch centres lie over those of that grid).
    """
    parts = 2 * len(grid)
    if dim % parts:
        raise UseError(
            f"{dim} channels cannot hold sines and cosines of rows and columns", expected=f"{parts} · n"
        )
    axes = [
        (torch.arange(n, dtype=torch.float64) + 0.5) * (s / n) - 0.5
        for n, s in zip(grid, span or grid, strict=True)
    ]
    frequency = 10000 ** (-torch.arange(dim // parts, dtype=torch.float64) / (dim // parts))
    angles = [place.flatten() for place in torch.meshgrid(*axes, indexing="ij")][::-1]
    waves = [wave(place[:, None] * frequency) for place in angles for wave in (torch.sin, torch.cos)]
    return torch.cat(waves, 1).float()
