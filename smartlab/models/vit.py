"""A 2D vision transformer in the form of masked autoencoders: it sees the visible patches only.

- Names, shapes and function of the published MAE ViT (`cls_token`, `pos_embed`, `patch_embed.proj`,
  `blocks.N.…`, `norm`), so that public weights load by name.
- Positions are sines and cosines of row and column. On another grid than that of training they are computed
  anew, spread over the same span, so that no position is new to the weights; a table that came with foreign
  weights and is something else is interpolated.
- `ViTEncoder` is to images what `Encoder` is to scans: the same `features` and `attention` for every
  evaluation. It takes images as they are stored and makes them smaller itself, as in training.

Dosovitskiy et al., "An image is worth 16×16 words" (2021); He et al., "Masked autoencoders are scalable
vision learners" (2022).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.core.config import Config, MaeConfig
from smartlab.core.errors import UseError
from smartlab.models.encoder import Encoded, boxes
from smartlab.models.linear_attention import Attention

Plane = tuple[int, int]  # rows, columns


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class ViTBlock(nn.Module):
    """One pre-norm transformer block, (B, N, C) -> (B, N, C), with attention of any kind."""

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        kind: str = "softmax",
        tokens: int = 0,
        settings: MaeConfig | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, heads, kind, tokens, settings)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))

    def forward(self, x: Tensor, looks: bool = False) -> Any:
        """With `looks` also the [CLS] row of the attention over the other tokens, (B, heads, N − 1), float32, and
        its strength (B, heads), see `Encoded`."""
        q, k, v = self.attn.split(self.norm1(x))
        x = x + self.attn.proj(self.attn.core(q, k, v).transpose(1, 2).flatten(2))
        x = x + self.mlp(self.norm2(x))
        if not looks:
            return x
        rows = q[:, :, :1].detach().float() @ k.detach().float().transpose(-2, -1) * q.shape[-1] ** -0.5
        rows = rows[:, :, 0, 1:]
        return x, rows.softmax(-1), rows.logsumexp(-1) - math.log(rows.shape[-1])


class PatchEmbed(nn.Module):
    """Images (B, channels, H, W) -> tokens (B, N, C), row by row."""

    def __init__(self, channels: int, dim: int, patch: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ViT(nn.Module):
    """The transformer itself: visible patches to tokens. Positions belong to a grid of `base` patches."""

    pos_embed: Tensor

    def __init__(
        self,
        channels: int,
        patch: int,
        dim: int,
        blocks: int,
        heads: int,
        base: Plane,
        mlp_ratio: float = 4.0,
    ) -> None:
        super().__init__()
        self.base, self.dim, self.patch = base, dim, patch
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim))
        table = torch.cat([torch.zeros(1, dim), sine_positions(base, dim)])
        self.register_buffer("pos_embed", table[None])
        self.patch_embed = PatchEmbed(channels, dim, patch)
        self.blocks = nn.ModuleList(ViTBlock(dim, heads, mlp_ratio) for _ in range(blocks))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        nn.init.normal_(self.cls_token, std=0.02)
        start(self)

    def positions(self, grid: Plane) -> Tensor:
        """(1, N, C) for a grid of rows × columns."""
        if grid == self.base:
            return self.pos_embed[:, 1:]
        sines = sine_positions(self.base, self.dim).to(self.pos_embed)
        if (self.pos_embed[0, 1:] - sines).abs().max() < 1e-4:
            return sine_positions(grid, self.dim, self.base)[None].to(self.pos_embed)
        table = self.pos_embed[:, 1:].transpose(1, 2).unflatten(2, self.base)
        return F.interpolate(table, grid, mode="bicubic", align_corners=False).flatten(2).transpose(1, 2)

    def tokens(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        """Images (B, channels, H, W) -> [CLS] and patches before the first block, (B, 1 + n, C).

        keep: (B, n) indices of the visible patches; by default all.
        """
        tokens = self.patch_embed(x)
        tokens = tokens + self.positions((x.shape[2] // self.patch, x.shape[3] // self.patch))
        if keep is not None:
            tokens = tokens.gather(1, keep[..., None].expand(-1, -1, tokens.shape[-1]))
        cls = self.cls_token + self.pos_embed[:, :1]
        return torch.cat([cls.expand(len(x), -1, -1).to(tokens.dtype), tokens], 1)

    def encode(self, x: Tensor, keep: Tensor | None = None) -> tuple[Tensor, list[Tensor], Tensor, Tensor]:
        """-> normalised tokens (B, 1 + n, C), outputs of four evenly spaced blocks, attention (B, heads, n) and its
        strength (B, heads)."""
        x, levels = self.tokens(x, keep), []
        depth = len(self.blocks)
        wanted = [-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)]
        for number, block in enumerate(self.blocks):
            if number < depth - 1:
                x = block(x)
            else:
                x, attention, strength = block(x, looks=True)
            levels += [x] * wanted.count(number)
        return self.norm(x), levels, attention, strength


class ViTEncoder(ViT):
    """The encoder of MAE and MIRAM, for training and for use after it.

    >>> enc = sl.load_encoder("runs/miram")
    >>> enc.features(image)["cls"].shape, enc.attention(image).shape
    """

    def __init__(self, config: Config) -> None:
        e, side = config.encoder, config.mae.input // config.encoder.patch
        super().__init__(e.in_channels, e.patch, e.embed_dim, e.blocks, e.heads, (side, side), e.mlp_ratio)
        self.config = config
        self.smaller = config.data.view // config.mae.input  # stored pixels per pixel that the ViT sees
        self.stride = e.patch * self.smaller  # stored pixels per token
        self.channels, self.stage_channels = e.embed_dim, [e.embed_dim] * 4

    @property
    def device(self) -> torch.device:
        return self.cls_token.device

    def grid(self, size: tuple[int, ...] | torch.Size) -> Plane:
        """Tokens of an image of this size in stored pixels."""
        return size[-2] // self.stride, size[-1] // self.stride

    def shrink(self, x: Tensor, scale: int = 1) -> Tensor:
        """Stored pixels -> pixels of `scale` times the resolution that the ViT sees, by averaging."""
        return F.avg_pool2d(x, self.smaller // scale) if self.smaller > scale else x

    def visible(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, 1, H, W) as the ViT sees them -> normalised tokens (B, 1 + n, C) of [CLS] and the
        patches `keep` (B, n), and the last block's [CLS] attention over these (B, heads, n)."""
        tokens, _, attention, _ = self.encode(x, keep)
        return tokens, attention

    def forward(self, x: Tensor) -> Encoded:
        """Windowed images (B, 1, H, W) in [0, 1], stored pixels -> `Encoded`; stages are (B, h, w, C)."""
        grid = self.grid(x.shape)
        tokens, levels, attention, strength = self.encode(self.shrink(x))
        stages = [level[:, 1:].unflatten(1, grid) for level in levels]
        return Encoded(stages, tokens[:, 0], tokens[:, 1:], attention, None, grid, strength=strength)

    # ---- use after training: images as stored ----

    @torch.no_grad()
    def features(
        self, image: np.ndarray | Tensor, *, window: int | None = None, overlap: float = 0.25
    ) -> dict[str, Any]:
        """Features of an image: "cls" (B, C), "tokens" (B, N, C), "grid" (H, W), "stages" list of (B, C, h, w).

        image:  grey values as in training, (H, W) or (B, 1, H, W), any size, at the spacing of training;
                padded with black to whole strides.
        window: side of the sliding windows in pixels; None: the training view, whatever the image's size.
        """
        x = self._prepare(image)
        sums: list[Tensor] = []
        grid, side = self.grid(x.shape), self._window(x, window)
        count = torch.zeros(*grid, 1, device=x.device)
        cls, number = torch.zeros(len(x), self.channels, device=x.device), 0
        for box in boxes(x.shape[2:], side, overlap, self.stride):
            out = self(x[(slice(None), slice(None), *box)])
            cls, number = cls + out.cls.float(), number + 1
            part = tuple(slice(b.start // self.stride, b.stop // self.stride) for b in box)
            count[part] += 1
            for k, level in enumerate([out.tokens.unflatten(1, out.grid), *out.stages]):
                if len(sums) <= k:
                    sums.append(torch.zeros(len(x), *grid, self.channels, device=x.device))
                sums[k][(slice(None), *part)] += level.float()
        tokens, *stages = (total / count for total in sums)
        return {
            "cls": cls / number,
            "tokens": tokens.flatten(1, 2),
            "grid": grid,
            "stages": [stage.permute(0, 3, 1, 2) for stage in stages],
        }

    @torch.no_grad()
    def attention(
        self, image: np.ndarray | Tensor, *, window: int | None = None, overlap: float = 0.25
    ) -> Tensor:
        """[CLS] attention of the last block, (B, heads, H, W) on the grid of tokens; each head sums to 1.

        Windows are joined as in `Encoder.attention`.
        """
        x = self._prepare(image)
        grid, side = self.grid(x.shape), self._window(x, window)
        summed = torch.zeros(len(x), self.config.encoder.heads, *grid, device=x.device, dtype=torch.float64)
        count = torch.zeros(*grid, device=x.device)
        for box in boxes(x.shape[2:], side, overlap, self.stride):
            out = self(x[(slice(None), slice(None), *box)])
            assert out.attention is not None and out.strength is not None
            part = tuple(slice(b.start // self.stride, b.stop // self.stride) for b in box)
            weight = out.strength.double().exp() * out.attention.shape[-1]
            summed[(slice(None), slice(None), *part)] += (out.attention * weight[..., None]).unflatten(
                2, out.grid
            )
            count[part] += 1
        mean = summed / count
        return (mean / mean.sum((2, 3), keepdim=True)).float()

    def _prepare(self, image: np.ndarray | Tensor) -> Tensor:
        """Grey values in any accepted form -> windowed (B, 1, H, W), padded with black to whole strides."""
        if not isinstance(image, np.ndarray | Tensor):
            raise UseError(
                "cannot encode this", found=type(image).__name__, expected="an array of grey values"
            )
        x = torch.as_tensor(
            image if isinstance(image, Tensor) else np.ascontiguousarray(image).astype(np.float32)
        )
        x = x.to(self.device, torch.float32)
        x = x[None, None] if x.dim() == 2 else x
        if x.dim() != 4 or x.shape[1] != self.config.encoder.in_channels:
            raise UseError(
                "cannot encode this array",
                found=tuple(x.shape),
                expected="(H, W) or (B, 1, H, W) grey values",
            )
        low, high = self.config.data.window
        x = ((x - low) / (high - low)).clamp(0, 1)
        rows, columns = (-length % self.stride for length in x.shape[2:])
        return F.pad(x, (0, columns, 0, rows))

    def _window(self, x: Tensor, window: int | None) -> int:
        if window is not None:
            if window % self.stride:
                raise UseError(f"window={window} is not a multiple of the stride {self.stride}")
            return window
        return self.config.data.view


def sine_positions(grid: Plane, dim: int, span: Plane | None = None) -> Tensor:
    """(rows · columns, dim) sines and cosines of column and row, as in MAE: columns in the first half.

    span: count positions as on a grid of this size (patch centres lie over those of that grid).
    """
    if dim % 4:
        raise UseError(f"{dim} channels cannot hold sines and cosines of rows and columns", expected="4 · n")
    rows, columns = (
        (torch.arange(n, dtype=torch.float64) + 0.5) * (s / n) - 0.5
        for n, s in zip(grid, span or grid, strict=True)
    )
    frequency = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [columns.repeat(grid[0]), rows.repeat_interleave(grid[1])]
    parts = [
        wave(place[:, None] * frequency) for place in angles for wave in (torch.sin, torch.cos)
    ]  # (N, dim / 4) each
    return torch.cat(parts, 1).float()


def start(module: nn.Module) -> None:
    """Initial weights as in MAE: Xavier for linear layers and patches, zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, PatchEmbed):
            nn.init.xavier_uniform_(part.proj.weight.view(part.proj.weight.shape[0], -1))
            nn.init.zeros_(part.proj.bias)  # type: ignore[arg-type]
