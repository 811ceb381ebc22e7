"""Semantic attention: a global [CLS] token over the tokens of one Swin stage.

A Swin transformer has no [CLS] token and hence no global attention map. Here one learned token and
a position embedding join the semantic tokens (one per mask unit), `blocks` pre-norm transformer
blocks follow, and from the last block we keep A, the [CLS] row of the softmax over the patch tokens,
renormalised per head, and how much of the row that was: both together guide masks (`Encoded.importance`).
`kind="full"`: all tokens attend. `kind="class"`: only [CLS] attends, the patches stay as they are (class
attention: Touvron et al., "Going deeper with image transformers").

`similarity="dot"` is the usual scaled product, whose logits start so small that attention starts, and
for long stays, uniform. `"cosine"` compares directions and learns a scale per head (Liu et al., "Swin
Transformer V2"), so that attention is selective from the first step and its ranking is trained early.

Without `position`, [CLS] has to choose by what a token shows, not by where it is: empty air, which tells
where the body is, then tells it nothing, and attention goes to what differs from scan to scan. `registers` are
learned tokens beside [CLS] that a head can attend to when it looks for nothing; without them it rests on
tokens that show nothing, here air (Darcet et al., "Vision transformers need registers", 2024).
"""

from __future__ import annotations

import math
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.core.config import Config
from smartlab.models.attend import Look, keyless, look
from smartlab.models.swin import Mlp
from smartlab.models.windows import Grid


class Semantic(NamedTuple):
    """What semantic attention makes of a stage."""

    cls: Tensor  # (B, C) image token
    tokens: Tensor  # (B, N, C) patch tokens
    attention: Tensor  # (B, heads, N) and the others, see `Look`
    strength: Tensor
    share: Tensor
    received: Tensor | None


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
        position: bool = True,
        registers: int = 0,
    ) -> None:
        super().__init__()
        self.first = 1 + registers  # where the patch tokens begin
        self.norm_in = nn.LayerNorm(channels)
        self.cls = nn.Parameter(torch.zeros(1, self.first, channels))  # [CLS], then the registers
        self.position = nn.Parameter(torch.zeros(1, channels, *base)) if position else None
        self.blocks = nn.ModuleList(SemanticBlock(channels, heads, kind, similarity) for _ in range(blocks))
        self.norm = nn.LayerNorm(channels)
        nn.init.trunc_normal_(self.cls, std=0.02)
        if self.position is not None:
            nn.init.trunc_normal_(self.position, std=0.02)

    @classmethod
    def of(cls, config: Config, channels: int, stride: int) -> SemanticAttention | None:
        """As configured, or none, on tokens of so many voxels a side."""
        s, base = config.semantic, (config.data.view // stride,) * 3
        how = (s.blocks, s.heads, s.kind, s.similarity, s.position, s.registers)
        return cls(channels, base, *how) if s.enabled else None

    def positions(self, grid: Grid) -> Tensor | float:
        """Position embedding on this grid, (1, N, C); nothing where positions are off."""
        if self.position is None:
            return 0.0
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
        x, seen = cast(SemanticBlock, self.blocks[-1]).look(x, self.first, received)
        x = self.norm(x)
        return Semantic(x[:, 0], x[:, self.first :], *seen)


class SemanticBlock(nn.Module):
    """One pre-norm transformer block over [CLS], registers and N patch tokens, (B, 1 + R + N, C)."""

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
        qkv = keyless(self.qkv, self.norm1(x)).view(batch, n, 3, self.heads, channels // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        if self.log_scale is not None:  # SDPA divides by √(C/heads): undo it
            scale = self.log_scale.clamp(max=math.log(100.0)).exp() * q.shape[-1] ** 0.5
            q, k = F.normalize(q, dim=-1) * scale.to(q.dtype), F.normalize(k, dim=-1)
        return q, k, v

    def forward(self, x: Tensor) -> Tensor:
        return self._attend(x, *self._split(x))

    def _attend(self, x: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        who = slice(0, 1) if self.kind == "class" else slice(None)  # who attends
        out = F.scaled_dot_product_attention(q[:, :, who], k, v).transpose(1, 2).flatten(2)
        changed = x[:, who] + self.proj(out)
        changed = changed + self.mlp(self.norm2(changed))
        return torch.cat([changed, x[:, 1:]], 1) if self.kind == "class" else changed

    def look(self, x: Tensor, first: int, received: bool) -> tuple[Tensor, Look]:
        """forward(x), and the attention paid to the patches x[:, first:]."""
        q, k, v = self._split(x)
        return self._attend(x, q, k, v), look(q, k, first, received)
