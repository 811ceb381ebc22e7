"""Semantic attention: a global [CLS] token over the tokens of one Swin stage.

A Swin transformer has no [CLS] token and hence no global attention map. Here one learned token and
a position embedding join the semantic tokens (one per mask unit), `blocks` pre-norm transformer
blocks follow, and from the last block we keep A, the [CLS] row of the softmax over the patch tokens,
renormalised per head. `kind="full"`: all tokens attend. `kind="class"`: only [CLS] attends, the
patches stay as they are (class attention: Touvron et al., "Going deeper with image transformers").

`similarity="dot"` is the usual scaled product, whose logits start so small that attention starts, and
for long stays, uniform. `"cosine"` compares directions and learns a scale per head (Liu et al., "Swin
Transformer V2"), so that attention is selective from the first step and its ranking is trained early.
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.models.swin import Grid, Mlp


class Semantic(NamedTuple):
    """What semantic attention sees."""

    cls: Tensor  # (B, C) image token
    tokens: Tensor  # (B, N, C) patch tokens
    attention: Tensor  # (B, heads, N) [CLS] row, sums to 1 over N
    received: Tensor | None  # (B, N) attention each token receives, averaged over queries and heads


class SemanticAttention(nn.Module):
    """Tokens (B, D, H, W, C) -> `Semantic`. Grids other than `base` get interpolated positions."""

    def __init__(
        self,
        channels: int,
        base: Grid,
        blocks: int = 2,
        heads: int = 4,
        kind: str = "full",
        similarity: str = "dot",
    ) -> None:
        super().__init__()
        self.norm_in = nn.LayerNorm(channels)
        self.cls = nn.Parameter(torch.zeros(1, 1, channels))
        self.position = nn.Parameter(torch.zeros(1, channels, *base))
        self.blocks = nn.ModuleList(SemanticBlock(channels, heads, kind, similarity) for _ in range(blocks))
        self.norm = nn.LayerNorm(channels)
        nn.init.trunc_normal_(self.cls, std=0.02)
        nn.init.trunc_normal_(self.position, std=0.02)

    def positions(self, grid: Grid) -> Tensor:
        """Position embedding on this grid, (1, N, C)."""
        table: Tensor = self.position
        if tuple(table.shape[2:]) != grid:
            table = F.interpolate(table, size=grid, mode="trilinear", align_corners=False)
        return table.flatten(2).transpose(1, 2)

    def forward(self, tokens: Tensor, received: bool = False) -> Semantic:
        batch, *grid, channels = tokens.shape
        x = self.norm_in(tokens).reshape(batch, -1, channels) + self.positions((grid[0], grid[1], grid[2]))
        x = torch.cat([self.cls.expand(batch, -1, -1).to(x.dtype), x], 1)
        for block in self.blocks[:-1]:
            x = block(x)
        attention, incoming = cast(SemanticBlock, self.blocks[-1]).look(x, received)
        x = self.norm(self.blocks[-1](x))
        return Semantic(x[:, 0], x[:, 1:], attention, incoming)


class SemanticBlock(nn.Module):
    """One pre-norm transformer block over [CLS] and N patch tokens, (B, 1 + N, C)."""

    def __init__(self, channels: int, heads: int, kind: str, similarity: str = "dot") -> None:
        super().__init__()
        self.heads, self.kind = heads, kind
        self.norm1, self.norm2 = nn.LayerNorm(channels), nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        self.mlp = Mlp(channels, 4 * channels)
        self.log_scale = (
            nn.Parameter(torch.full((heads, 1, 1), math.log(10.0))) if similarity == "cosine" else None
        )

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (B, heads, 1 + N, C / heads)."""
        batch, n, channels = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, n, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.log_scale is not None:  # SDPA divides by √(C/heads): undo it
            scale = self.log_scale.clamp(max=math.log(100.0)).exp() * q.shape[-1] ** 0.5
            q, k = F.normalize(q, dim=-1) * scale.to(q.dtype), F.normalize(k, dim=-1)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self._split(x)
        who = slice(0, 1) if self.kind == "class" else slice(None)  # who attends
        out = F.scaled_dot_product_attention(q[:, :, who], k, v).transpose(1, 2).flatten(2)
        changed = x[:, who] + self.proj(out)
        changed = changed + self.mlp(self.norm2(changed))
        return torch.cat([changed, x[:, 1:]], 1) if self.kind == "class" else changed

    def look(self, x: Tensor, received: bool) -> tuple[Tensor, Tensor | None]:
        """The attention this block pays, in fp32: [CLS] row per head, and received attention."""
        q, k, _ = (part.float() for part in self._split(x))
        scale = q.shape[-1] ** -0.5
        rows = (q[:, :, :1] @ k.transpose(-2, -1) * scale)[..., 0, 1:].softmax(-1)  # over patches only
        if not received:
            return rows, None
        every = (q @ k.transpose(-2, -1) * scale).softmax(-1)[..., 1:].mean((1, 2))
        return rows, every / every.sum(-1, keepdim=True)
