"""Decoders of masked autoencoding: from the tokens of visible patches to the pixels of hidden ones.

A decoder fills the places of hidden patches with a mask token, *interpolates* this grid of tokens to that of
its scale (s² times as many, of scans s³), adds positions and runs transformer blocks, with attention of any kind.
Every token then predicts one patch of the image at s times the resolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.core.settings import Decoding, MaeConfig
from smartlab.models.patches import sine_positions, taken
from smartlab.models.vit import ViTBlock, start


class Decoder(nn.Module):
    """One scale. side: tokens per side of the encoder's grid; patch: pixels per side of a predicted patch, of
    `images` channels."""

    position: Tensor
    stretch: Tensor

    def __init__(
        self,
        channels: int,
        side: int,
        patch: int,
        decoding: Decoding,
        settings: MaeConfig | None = None,
        dims: int = 2,
        images: int = 1,
    ) -> None:
        super().__init__()
        scale, width = decoding.scale, decoding.width
        self.scale, self.side, self.dims = scale, side, dims
        fine = side * scale
        self.embed = nn.Linear(channels, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            ViTBlock(width, decoding.heads, kind=decoding.attention, tokens=1 + fine**dims, settings=settings)
            for _ in range(decoding.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, images * patch**dims)
        # counted in fine tokens, to tell neighbours apart
        table = sine_positions((fine,) * dims, width)[None]
        self.register_buffer("position", table, persistent=False)
        self.register_buffer("stretch", stretching(side, fine), persistent=False)
        nn.init.normal_(self.mask_token, std=0.02)
        start(self)

    def forward(self, seen: Tensor, keep: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Predicted patches (B, m, images · patch^dims), row by row on the fine grid.

        seen:   (B, 1 + n, C) [CLS] and visible tokens of the encoder.   keep: (B, n) their places.
        wanted: (B, m) places on the fine grid to predict; by default all.
        """
        x = self.spread(self.embed(seen), keep)
        for block in self.blocks:
            x = block(x)
        x = x[:, 1:]  # pixels of visible patches are never asked for
        return self.pixels(self.norm(taken(x, wanted)))

    def spread(self, x: Tensor, keep: Tensor) -> Tensor:
        """(B, 1 + n, width) of [CLS] and visible tokens -> (B, 1 + (side · scale)^dims, width) on the fine grid."""
        batch, _, width = x.shape
        grid = self.mask_token.to(x.dtype).expand(batch, self.side**self.dims, -1)
        grid = grid.scatter(1, keep[..., None].expand(-1, -1, width), x[:, 1:])
        # linear along each axis, as products: the same on every device, forwards and backwards
        if self.scale > 1:
            grid, stretch = grid.unflatten(1, (self.side,) * self.dims), self.stretch.to(x.dtype)
            for axis in range(1, 1 + self.dims):
                grid = torch.tensordot(grid, stretch, ([axis], [1])).movedim(-1, axis)
            grid = grid.flatten(1, self.dims)
        return torch.cat([x[:, :1], grid + self.position.to(x.dtype)], 1)


def stretching(side: int, fine: int) -> Tensor:
    """(fine, side) matrix of linear interpolation along one axis."""
    return F.interpolate(torch.eye(side)[None], size=fine, mode="linear", align_corners=False)[0].T


def from_patches(patches: Tensor, side: int, patch: int, dims: int = 2) -> Tensor:
    """(B, side^dims, C · patch^dims) -> (B, C, side · patch, …)."""
    x = patches.unflatten(2, (-1, *(patch,) * dims)).unflatten(1, (side,) * dims)
    order = [0, 1 + dims, *(axis + inside for axis in range(1, 1 + dims) for inside in (0, 1 + dims))]
    return x.permute(order).reshape(len(x), -1, *[side * patch] * dims)


def finer(places: Tensor, side: int, scale: int, dims: int = 2) -> Tensor:
    """(B, n) places on a grid of `side` -> (B, n · scale^dims) of what they cover on the finer grid, ascending."""
    found, steps = torch.zeros_like(places)[..., None], torch.arange(scale, device=places.device)
    for axis in reversed(range(dims)):  # of places the last axis is the innermost
        along = places // side**axis % side * scale
        found = (found[..., None] * side * scale + along[..., None, None] + steps).flatten(2)
    return found.flatten(1).sort(1).values
