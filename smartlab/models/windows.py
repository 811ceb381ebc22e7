"""Attention inside windows of a 3D grid: their geometry, shift masks and position bias.

Windows tile the grid; every second block of a stage shifts them by half a window, so that tokens at a border
meet. What shifting brings together from opposite ends of the image is masked. A window as large as the grid
is clipped to it and never shifted.

Liu et al., "Swin Transformer" (2021).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smartlab.models.attend import attend, keyless

Grid = tuple[int, int, int]


class WindowAttention(nn.Module):
    """Multi-head attention inside windows with a learned relative position bias."""

    relative_position_index: Tensor

    def __init__(self, dim: int, heads: int, window_size: int, qkv_bias: bool) -> None:
        super().__init__()
        self.heads = heads
        span = 2 * window_size - 1
        self.relative_position_bias_table = nn.Parameter(torch.zeros(span**3, heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)
        self.register_buffer("relative_position_index", relative_position_index(window_size))
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, window: Grid, mask: Tensor | None, corner: bool = False) -> Tensor:
        """x (B, D, H, W, C), whole windows; mask (windows, n, n) or None."""
        batch, d, h, w, c = x.shape
        (nd, nh, nw), heads = (d // window[0], h // window[1], w // window[2]), self.heads
        qkv = self._split(x, window)
        bias = self.bias(window, corner)  # (heads, n, n)
        if mask is None:
            q, k, v = qkv.flatten(1, 2)  # (B·windows, heads, n, c)
            out = attend(q, k, v, bias.to(q.dtype)[None])
        else:
            q, k, v = qkv.flatten(2, 3)  # (B, windows·heads, n, c)
            folded = (bias[None] + mask[:, None]).flatten(0, 1)
            out = attend(q, k, v, folded.to(q.dtype)[None])
        out = out.reshape(batch, nd, nh, nw, heads, *window, c // heads)
        return self.proj(out.permute(0, 1, 5, 2, 6, 3, 7, 4, 8).reshape(batch, d, h, w, c))

    def _split(self, x: Tensor, window: Grid) -> Tensor:
        """3 × (B, windows, heads, n, head channels): the one copy that partitioning needs."""
        (batch, *size, c), (wd, wh, ww) = x.shape, window
        nd, nh, nw = size[0] // wd, size[1] // wh, size[2] // ww
        qkv = keyless(self.qkv, x).view(batch, nd, wd, nh, wh, nw, ww, 3, self.heads, c // self.heads)
        qkv = qkv.permute(7, 0, 1, 3, 5, 8, 2, 4, 6, 9)
        return qkv.reshape(3, batch, nd * nh * nw, self.heads, wd * wh * ww, c // self.heads)

    def looks(self, x: Tensor, window: Grid, mask: Tensor | None, corner: bool = False) -> Tensor:
        """What `forward` attends to: the mean over samples and windows, (heads, n, n) in float32."""
        q, k, _ = self._split(x, window).float()
        bias = self.bias(window, corner)[None].float()
        folded = bias if mask is None else bias + mask[:, None]  # (1 or windows, heads, n, n)
        rows = [
            (a @ b.transpose(-2, -1) * a.shape[-1] ** -0.5 + folded).softmax(-1).mean(0)
            for a, b in zip(q, k, strict=True)
        ]
        return torch.stack(rows).mean(0)

    def bias(self, window: Grid, corner: bool = False) -> Tensor:
        """Position bias (heads, n, n) for the n tokens of a window.

        A window clipped to a small grid takes the first n rows, as in MONAI; with `corner` those of the
        corner of the full window, which are the true relative positions.
        """
        n = window[0] * window[1] * window[2]
        index = self.relative_position_index
        if corner and n < len(index):
            side = round(len(index) ** (1 / 3))
            rows = torch.arange(len(index), device=index.device).view(side, side, side)
            rows = rows[: window[0], : window[1], : window[2]].flatten()
            index = index[rows][:, rows]
        return self.relative_position_bias_table[index[:n, :n]].permute(2, 0, 1)


class ShiftMasks:
    """Shift masks by grid, kept beside the parameters: not in the state dict, not rebuilt."""

    def __init__(self) -> None:
        self._cache: dict[tuple[Grid, torch.device], Tensor] = {}

    def __call__(self, grid: Grid, window: Grid, shift: Grid, device: torch.device) -> Tensor:
        key = (grid, device)
        if key not in self._cache:
            with torch.no_grad():
                self._cache[key] = shift_mask(grid, window, shift).to(device)
        return self._cache[key]

    def __deepcopy__(self, memo: dict) -> ShiftMasks:
        return self  # masks are constants: student and teacher share them

    def __getstate__(self) -> dict:
        return {"_cache": {}}


def clip_window(grid: Grid, window_size: int) -> tuple[Grid, Grid]:
    """Window and shift per axis: a window as large as the grid is clipped to it and not shifted."""
    window = tuple(min(size, window_size) for size in grid)
    shift = tuple(0 if size <= window_size else window_size // 2 for size in grid)
    return window, shift  # type: ignore[return-value]


def shift_mask(grid: Grid, window: Grid, shift: Grid) -> Tensor:
    """(windows, n, n): 0 where two tokens of a shifted window are neighbours in the image, else −100."""
    region = torch.zeros(1, 1, 1)
    for axis, (size, side, s) in enumerate(zip(grid, window, shift, strict=True)):
        padded = size + -size % side
        place = torch.arange(padded)
        part = (place >= padded - side).long() + (place >= padded - s).long() if s else torch.zeros(padded)
        view = [1, 1, 1]
        view[axis] = padded
        region = region * 3 + part.view(view)
    d, h, w = region.shape
    tiles = region.view(d // window[0], window[0], h // window[1], window[1], w // window[2], window[2])
    tiles = tiles.permute(0, 2, 4, 1, 3, 5).reshape(-1, window[0] * window[1] * window[2])
    return torch.where(tiles[:, None] == tiles[:, :, None], 0.0, -100.0)


def relative_position_index(window_size: int) -> Tensor:
    """(n, n) row of the bias table for each pair of tokens of a full window."""
    axis = torch.arange(window_size)
    place = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij")).flatten(1)  # (3, n)
    apart = place[:, :, None] - place[:, None, :] + window_size - 1  # 0 … 2·window − 2
    span = 2 * window_size - 1
    return (apart[0] * span + apart[1]) * span + apart[2]
