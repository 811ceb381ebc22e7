"""Decoders of masked autoencoding: from the tokens of visible patches to the pixels of hidden ones.

A decoder fills the places of hidden patches with a mask token, *interpolates* this grid of tokens to that of
its scale (s² times as many), adds positions and runs transformer blocks, with attention of any kind. Every token
then predicts one patch of the image at s times the resolution.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.core.settings import Decoding, MaeConfig
from smartlab.models.vit import ViTBlock, sine_positions, start


class Decoder(nn.Module):
    """One scale. side: tokens per side of the encoder's grid; patch: pixels per side of a predicted patch."""

    position: Tensor
    stretch: Tensor

    def __init__(
        self, channels: int, side: int, patch: int, decoding: Decoding, settings: MaeConfig | None = None
    ) -> None:
        super().__init__()
        scale, width = decoding.scale, decoding.width
        self.scale, self.side, self.patch = scale, side, patch
        fine = side * scale
        self.embed = nn.Linear(channels, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.blocks = nn.ModuleList(
            ViTBlock(
                width,
                decoding.heads,
                kind=decoding.attention,
                tokens=1 + fine**2,
                settings=settings,
            )
            for _ in range(decoding.depth)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.pixels = nn.Linear(width, patch**2)
        table = sine_positions((fine, fine), width)[None]  # counted in fine tokens, to tell neighbours apart
        self.register_buffer("position", table, persistent=False)
        self.register_buffer("stretch", stretching(side, fine), persistent=False)
        nn.init.normal_(self.mask_token, std=0.02)
        start(self)

    def forward(self, seen: Tensor, keep: Tensor, wanted: Tensor | None = None) -> Tensor:
        """Predicted patches (B, m, patch²), row by row on the fine grid.

        seen:   (B, 1 + n, C) [CLS] and visible tokens of the encoder.   keep: (B, n) their places.
        wanted: (B, m) places on the fine grid to predict; by default all.
        """
        x = self.spread(self.embed(seen), keep)
        for block in self.blocks:
            x = block(x)
        x = x[:, 1:]
        if wanted is not None:  # pixels of visible patches are never asked for
            x = x.gather(1, wanted[..., None].expand(-1, -1, x.shape[-1]))
        return self.pixels(self.norm(x))

    def spread(self, x: Tensor, keep: Tensor) -> Tensor:
        """(B, 1 + n, width) of [CLS] and visible tokens -> (B, 1 + (side · scale)², width) on the fine grid."""
        batch, _, width = x.shape
        grid = self.mask_token.to(x.dtype).expand(batch, self.side**2, -1)
        grid = grid.scatter(1, keep[..., None].expand(-1, -1, width), x[:, 1:])
        if self.scale > 1:  # bilinear, as two products: the same on every device, forwards and backwards
            rows = torch.einsum("fs,bstw->bftw", self.stretch.to(x.dtype), grid.unflatten(1, (self.side, -1)))
            grid = torch.einsum("gt,bftw->bfgw", self.stretch.to(x.dtype), rows).flatten(1, 2)
        return torch.cat([x[:, :1], grid + self.position.to(x.dtype)], 1)


def stretching(side: int, fine: int) -> Tensor:
    """(fine, side) matrix of linear interpolation along one axis."""
    return F.interpolate(torch.eye(side)[None], size=fine, mode="linear", align_corners=False)[0].T


def to_patches(images: Tensor, patch: int) -> Tensor:
    """(B, 1, H, W) -> (B, N, patch²), row by row."""
    return F.unfold(images, patch, stride=patch).transpose(1, 2)


def from_patches(patches: Tensor, side: int, patch: int) -> Tensor:
    """(B, side², patch²) -> (B, 1, side · patch, side · patch)."""
    return F.fold(patches.transpose(1, 2), side * patch, patch, stride=patch)


def finer(places: Tensor, side: int, scale: int) -> Tensor:
    """(B, n) places on a grid of `side` -> (B, n · scale²) of what they cover on the finer grid, ascending."""
    steps = torch.arange(scale, device=places.device)
    row, column = places // side * scale, places % side * scale
    rows, columns = row[..., None, None] + steps[:, None], column[..., None, None] + steps
    return (rows * side * scale + columns).flatten(1).sort(1).values
