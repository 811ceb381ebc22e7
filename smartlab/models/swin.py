"""A 3D Swin transformer: MONAI's in parameters, names and function, faster by design.

The state dict has the keys of `monai.networks.nets.swin_unetr.SwinTransformer` and the outputs are
equal, so weights move freely. Design choices:

- tokens stay channels-last, (B, D, H, W, C), from the embedding to the last stage: no transposes;
- attention is fused (`attend`), in training too. The shift mask depends on the
  window and the position bias on the head, never on the sample: windows are folded into the head
  dimension, so that the sum is (1, windows·heads, n, n) and is not repeated over the batch;
- shift masks depend on the grid only: built once per grid, shared by all blocks, never saved, and
  not built at all where a stage has no shifted block or a window covers the whole grid;
- masked units all look the same until windows shift: their share of the first block (of the whole first
  stage where it has one block) is computed once, `Repeats`; exact, and 70% of the highest resolution.
  With `apart` windows never cross a unit, and all stages up to the units are computed so: another function;
- checkpointing does a block again slab by slab of windows, so that backward never holds a whole block;
- plain tensors in and out, no data-dependent branches: `torch.compile(fullgraph=True)` works.

Liu et al., "Swin Transformer" (2021); Hatamizadeh et al., "Swin UNETR" (2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smartlab.core.settings import EncoderConfig
from smartlab.models.attend import paths
from smartlab.models.windows import Grid, ShiftMasks, WindowAttention, clip_window

# The eight corners of a 2×2×2 cell, in the order in which MONAI's "merging" stacks their channels.
MERGE_ORDER: tuple[Grid, ...] = (
    (0, 0, 0),
    (1, 0, 0),
    (0, 1, 0),
    (0, 0, 1),
    (1, 1, 0),
    (1, 0, 1),
    (0, 1, 1),
    (1, 1, 1),
)


class Swin(nn.Module):
    """Four stages of windowed attention over tokens of 2³ voxels.

    Output strides are 2, 4, 8, 16, 32 voxels with C, 2C, 4C, 8C, 16C channels.
    """

    def __init__(self, e: EncoderConfig) -> None:
        super().__init__()
        self.embed_dim, self.patch, self.window_size = e.embed_dim, e.patch, e.window_size
        self.channels = tuple(e.embed_dim * 2**stage for stage in range(5))
        self.patch_embed = PatchEmbed(e.in_channels, e.embed_dim, e.patch)
        rates = torch.linspace(0, e.drop_path, sum(e.depths)).tolist()
        for stage, (depth, heads) in enumerate(zip(e.depths, e.num_heads, strict=True)):
            stage_rates, rates = rates[:depth], rates[depth:]
            layer = Stage(self.channels[stage], heads, stage_rates, e)
            # MONAI keeps each stage in a list of one, under layers1 … layers4.
            setattr(self, f"layers{stage + 1}", nn.ModuleList([layer]))

    def embed(self, x: Tensor) -> Tensor:
        """Image (B, C_in, D, H, W) -> tokens (B, D/2, H/2, W/2, C)."""
        return self.patch_embed(x)

    def stages(
        self,
        tokens: Tensor,
        repeats: Repeats | None = None,
        upto: int = 4,
        apart: bool = False,
        done: int = 0,
    ) -> list[Tensor]:
        """Tokens (B, D, H, W, C) -> the five token grids, channels last, not normalised.

        repeats: which cells of the tokens are equal (masked units): computed once, until windows shift.
        upto:    the last stage wanted.
        done:    the stage that `tokens` come from; the grids are those from there on.
        apart:   keep every cell of `repeats` to itself until it is one token: windows end, and shift, within
                 a cell. Then all masked cells are one, in all those stages. Another function than without, and
                 without stochastic depth.
        """
        outputs = [tokens]
        for layer in self.layers()[done:upto]:
            x = outputs[-1]
            if apart and repeats is not None and repeats.side > 1:
                outputs.append(repeats.apply(cast(Stage, layer).apart, x))
                repeats = repeats._replace(side=repeats.side // 2)
            else:
                outputs.append(layer(x, repeats if len(outputs) == 1 else None))
        return outputs

    def layers(self) -> list[nn.Module]:
        return [cast(nn.ModuleList, getattr(self, f"layers{stage}"))[0] for stage in range(1, 5)]

    def forward(self, x: Tensor, normalize: bool = True) -> list[Tensor]:
        """Image (B, C_in, D, H, W) -> five feature maps (B, C_i, D_i, H_i, W_i), as MONAI gives."""
        maps = self.stages(self.embed(x))
        if normalize:
            maps = [F.layer_norm(m, m.shape[-1:]) for m in maps]
        return [m.permute(0, 4, 1, 2, 3) for m in maps]


class Repeats(NamedTuple):
    """Cells of side³ tokens of which many are equal, because they are masked: only one of these is computed.

    Exact as long as nothing crosses a cell: unshifted windows that tile it, perceptrons, norms, merging.
    """

    side: int
    rows: Tensor  # cells to compute, of all B·N: the visible ones, then one that is masked
    place: Tensor  # (B·N,) where each cell finds its result among these

    @classmethod
    def of(cls, hidden: Tensor, visible: int, side: int) -> Repeats:
        """hidden (B, N) with exactly `visible` units shown in all rows together."""
        flat = hidden.flatten()
        rows = flat.byte().argsort(stable=True)[: visible + 1]
        place = torch.where(flat, visible, (~flat).cumsum(0) - 1)
        return cls(side, rows, place)

    def apply(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """layer(x) for x (B, D, H, W, C), by way of the distinct cells."""
        (b, d, h, w, _), s = x.shape, self.side
        x = x.view(b, d // s, s, h // s, s, w // s, s, -1).permute(0, 1, 3, 5, 2, 4, 6, 7)
        cells = layer(x.reshape(-1, s, s, s, x.shape[-1])[self.rows])
        s = cells.shape[1]
        x = cells.index_select(0, self.place).view(b, *x.shape[1:4], s, s, s, -1)
        return x.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(b, *(n * s for n in x.shape[1:4]), -1)


class PatchEmbed(nn.Module):
    """Non-overlapping patches through one linear map; pads the image to whole patches."""

    def __init__(self, in_channels: int, embed_dim: int, patch: int) -> None:
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv3d(in_channels, embed_dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        d, h, w = (-size % self.patch for size in x.shape[2:])
        if d or h or w:
            x = F.pad(x, (0, w, 0, h, 0, d))
        return F.linear(self._patches(x), self.proj.weight.flatten(1), self.proj.bias)

    def _patches(self, x: Tensor) -> Tensor:
        """(B, C, D, H, W) -> (B, d, h, w, C·patch³). A convolution would take four times as long to train on a CPU."""
        (b, c, d, h, w), s = x.shape, self.patch
        x = x.reshape(b, c, d // s, s, h // s, s, w // s, s)
        return x.permute(1, 3, 5, 7, 0, 2, 4, 6).reshape(c * s**3, -1).t().view(b, d // s, h // s, w // s, -1)


class Stage(nn.Module):
    """`depth` blocks, every second one on shifted windows, then patch merging."""

    def __init__(self, dim: int, heads: int, drop_path: Sequence[float], e: EncoderConfig) -> None:
        super().__init__()
        self.window_size, self.checkpointing = e.window_size, e.checkpointing
        self.blocks = nn.ModuleList(Block(dim, heads, p, e) for p in drop_path)
        self.downsample = PatchMerging(dim)
        self._masks = ShiftMasks()

    def forward(self, x: Tensor, repeats: Repeats | None = None) -> Tensor:
        """(B, D, H, W, C) -> (B, D/2, H/2, W/2, 2C)."""
        if repeats is not None and repeats.side % self.window_size == 0 and not self.blocks[0].drop_path:
            if len(self.blocks) == 1:
                return repeats.apply(self._run, x)
            return self._run(repeats.apply(lambda cells: self._run(cells, 0, 1), x), 1)
        return self._run(x)

    def apart(self, cells: Tensor) -> Tensor:
        """Like `forward`, for cells (M, s, s, s, C) that see nothing outside themselves."""
        return self._run(cells, corner=True)

    def _run(self, x: Tensor, first: int = 0, stop: int | None = None, corner: bool = False) -> Tensor:
        """Blocks `first` to `stop`; without `stop` all that follow, and the merging."""
        grid: Grid = tuple(x.shape[1:4])  # type: ignore[assignment]
        window, shift = clip_window(grid, self.window_size)
        numbers = range(len(self.blocks))[first:stop]
        shifted = any(shift) and any(number % 2 for number in numbers)
        mask = self._masks(grid, window, shift, x.device) if shifted else None
        for number in numbers:
            block = cast(Block, self.blocks[number])
            by, near = (shift, mask) if number % 2 and shifted else (None, None)
            run = partial(in_slabs, block) if self.checkpointing and torch.is_grad_enabled() else block
            # cells are no samples: among them no path is dropped
            x = run(x, window, by, near, None if corner else block.draw(x), corner)
        return x if stop else self.downsample(x)


def in_slabs(
    block: Block,
    x: Tensor,
    window: Grid,
    shift: Grid | None,
    mask: Tensor | None,
    keep: Tensor | None,
    corner: bool,
) -> Tensor:
    """block(x), one row of windows at a time; backward does each row again instead of keeping what it needs.

    Everything in a block is done within windows or token by token, so after the shift rows are independent.
    """
    again = partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
    if any(size % side for size, side in zip(x.shape[1:4], window, strict=True)):  # windows with padding
        return again(x, window, shift, mask, keep, corner)
    if shift is not None:
        x = torch.roll(x, [-s for s in shift], (1, 2, 3))
    slabs = x.split(window[0], 1)
    masks = [None] * len(slabs) if mask is None else mask.chunk(len(slabs))
    x = torch.cat([again(s, window, None, m, keep, corner) for s, m in zip(slabs, masks, strict=True)], 1)
    return x if shift is None else torch.roll(x, shift, (1, 2, 3))


class Block(nn.Module):
    """Pre-norm attention inside windows, then a two-layer perceptron, both residual."""

    def __init__(self, dim: int, heads: int, drop_path: float, e: EncoderConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, heads, e.window_size, e.qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * e.mlp_ratio))
        self.drop_path = drop_path

    def forward(
        self,
        x: Tensor,
        window: Grid,
        shift: Grid | None,
        mask: Tensor | None,
        keep: Tensor | None = None,
        corner: bool = False,
    ) -> Tensor:
        """keep: what `draw` gave; corner: see `WindowAttention.bias`."""
        y = self._attend(self.norm1(x), window, shift, mask, corner)
        x = x + (y if keep is None else y * keep[0])
        y = self.mlp(self.norm2(x))
        return x + (y if keep is None else y * keep[1])

    def draw(self, x: Tensor) -> Tensor | None:
        return paths(x, self.drop_path, self.training)

    def _attend(
        self, x: Tensor, window: Grid, shift: Grid | None, mask: Tensor | None, corner: bool
    ) -> Tensor:
        grid = x.shape[1:4]
        padding = [-size % side for size, side in zip(grid, window, strict=True)]
        if any(padding):  # padded tokens take part in attention, as in MONAI
            x = F.pad(x, (0, 0, 0, padding[2], 0, padding[1], 0, padding[0]))
        if shift is not None:
            x = torch.roll(x, [-s for s in shift], (1, 2, 3))
        x = self.attn(x, window, mask, corner)
        if shift is not None:
            x = torch.roll(x, shift, (1, 2, 3))
        if any(padding):
            x = x[:, : grid[0], : grid[1], : grid[2]]
        return x


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear1, self.linear2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear2(F.gelu(self.linear1(x)))


class PatchMerging(nn.Module):
    """2×2×2 neighbours become one token of twice the channels."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(8 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(8 * dim)
        raster = [MERGE_ORDER.index((i, j, k)) for i in (0, 1) for j in (0, 1) for k in (0, 1)]
        self.register_buffer("raster", torch.tensor(raster), persistent=False)
        self.raster: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """The corners are taken as they lie in memory, and the (small) weights reordered to fit."""
        d, h, w = (size % 2 for size in x.shape[1:4])
        if d or h or w:
            x = F.pad(x, (0, 0, 0, w, 0, h, 0, d))
        b, d, h, w, c = x.shape
        x = x.reshape(b, d // 2, 2, h // 2, 2, w // 2, 2 * c).permute(0, 1, 3, 5, 2, 4, 6)
        x = x.reshape(b, d // 2, h // 2, w // 2, 8 * c)
        x = F.layer_norm(x, (8 * c,), self._fit(self.norm.weight), self._fit(self.norm.bias), self.norm.eps)
        return F.linear(x, self._fit(self.reduction.weight))

    def _fit(self, weight: Tensor) -> Tensor:
        """Weights (…, 8·C) in MERGE_ORDER, in the order in which the corners lie in memory."""
        return weight.unflatten(-1, (8, -1)).index_select(-2, self.raster).flatten(-2)
