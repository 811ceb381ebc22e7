"""The encoder that is pretrained, exported and evaluated: Swin, mask token, semantic attention.

In training `Encoder.forward` runs on windowed views in [0, 1] and can hide mask units (student) or
drop input patches (noisy teacher). For use after training, `features` and `attention` take whole
scans of any size in HU, through sliding windows where the scan is larger than the training view.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.config import Config
from smartlab.errors import UseError
from smartlab.masking import upsample
from smartlab.models.semantic import SemanticAttention
from smartlab.models.swin import Repeats, Swin
from smartlab.models.windows import Grid

if TYPE_CHECKING:
    from smartlab.data.readers import Volume


class Encoded(NamedTuple):
    """One forward pass."""

    stages: list[Tensor]  # five (B, D_i, H_i, W_i, C_i), channels last, not normalised
    cls: Tensor  # (B, C) image token: [CLS], or the mean token without semantic attention
    tokens: Tensor  # (B, N, C) one per mask unit
    attention: Tensor | None  # (B, heads, N) [CLS] row over the units; None without semantic attention
    received: Tensor | None  # (B, N) attention received; None unless asked for
    grid: tuple[int, ...]  # of the N units


class Encoder(nn.Module):
    """Swin with a learned mask token and, by setting, semantic attention.

    >>> enc = Encoder(sl.load_config("tiny"))
    >>> enc.features(volume)["cls"].shape, enc.attention(volume).shape
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        e, s = config.encoder, config.semantic
        self.config = config
        self.swin = Swin(
            e.in_channels,
            e.embed_dim,
            e.depths,
            e.num_heads,
            e.window_size,
            e.patch,
            e.mlp_ratio,
            e.qkv_bias,
            e.drop_path,
            e.checkpointing,
        )
        self.stride = s.stride
        self.stage = [e.stride(i) for i in range(5)].index(s.stride)
        self.unit_patches = s.stride // e.patch  # patch tokens per side of a mask unit
        self.channels = self.swin.channels[self.stage]
        self.stage_channels = list(self.swin.channels)
        self.mask_token = nn.Parameter(torch.zeros(e.embed_dim))
        nn.init.trunc_normal_(self.mask_token, std=0.02)
        base = (config.data.view // s.stride,) * 3
        self.semantic = (
            SemanticAttention(
                self.channels, base, s.blocks, s.heads, s.kind, s.similarity, s.position, s.registers
            )
            if s.enabled
            else None
        )

    @property
    def device(self) -> torch.device:
        return self.mask_token.device

    def grid(self, size: tuple[int, ...] | torch.Size) -> Grid:
        """Mask units of an image of this size."""
        d, h, w = (length // self.stride for length in size[-3:])
        return d, h, w

    def forward(
        self,
        x: Tensor,
        hidden: Tensor | None = None,
        dropped: Tensor | None = None,
        received: bool = False,
        visible: int | None = None,
        units_only: bool = False,
    ) -> Encoded:
        """Windowed images (B, 1, D, H, W) -> `Encoded`.

        hidden:  (B, N) bool, mask units whose patch embeddings become the mask token (the student).
        dropped: (B, D/2, H/2, W/2) bool, patch embeddings set to zero (the noisy teacher).
        visible: units that `hidden` or `dropped` leave, in all rows together, where that is known (and
                 whole units are dropped): saves time.
        units_only: stop at the stage of the mask units, which is all that a teacher is asked for.
        """
        tokens = self.swin.embed(x)
        grid = self.grid(x.shape)
        sparse = self.config.student.encode == "sparse" and hidden is not None
        if hidden is not None:
            visible = int((~hidden).sum()) if sparse and visible is None else visible
            where = upsample(hidden, grid, self.unit_patches)[..., None]
            tokens = torch.where(where, self.mask_token.to(tokens.dtype), tokens)
        if dropped is not None:
            tokens = tokens.masked_fill(dropped[..., None], 0.0)
        repeats, same = None, hidden
        if hidden is None and dropped is not None:  # one patch stands for its unit
            same = dropped[:, :: self.unit_patches, :: self.unit_patches, :: self.unit_patches].flatten(1)
        if same is not None and visible is not None and (sparse or visible < same.numel()):
            repeats = Repeats.of(same, visible, self.unit_patches)
        stages = self.swin.stages(tokens, repeats, self.stage if units_only else 4, sparse)
        units = stages[self.stage]
        if self.semantic is None:
            normed = F.layer_norm(units, units.shape[-1:]).flatten(1, 3)
            return Encoded(stages, normed.mean(1), normed, None, None, grid)
        seen = self.semantic(units, received)
        return Encoded(stages, seen.cls, seen.tokens, seen.attention, seen.received, grid)

    # ---- use after training: whole scans in HU ----

    @torch.no_grad()
    def features(
        self, volume: Volume | np.ndarray | Tensor, *, window: int | None = None, overlap: float = 0.25
    ) -> dict[str, Any]:
        """Features of a scan: "cls" (B, C), "tokens" (B, N, C), "grid" (D, H, W), "stages" list of (B, C_i, …).

        volume: a `Volume` in HU, resampled to the training spacing if it has another, or an array (D, H, W)
                or tensor (B, 1, D, H, W) of HU at that spacing. Padded with air to whole strides.
        window: side of the sliding windows in voxels; None: the training view where the scan is larger
                than twice that, else the scan at once.
        """
        x, device = self._prepare(volume)
        total, side = self.config.encoder.stride(4), self._window(x, window)
        grid = self.grid(x.shape)
        sums: list[Tensor] = []
        counts: list[Tensor] = []
        cls, number = torch.zeros(x.shape[0], self.channels, device=device), 0
        token_sum = torch.zeros(x.shape[0], *grid, self.channels, device=device)
        token_count = torch.zeros(*grid, 1, device=device)
        for box in boxes(x.shape[2:], side, overlap, total):
            out = self(x[(slice(None), slice(None), *box)])
            cls, number = cls + out.cls.float(), number + 1
            part = tuple(slice(b.start // self.stride, b.stop // self.stride) for b in box)
            token_sum[(slice(None), *part)] += out.tokens.float().view(x.shape[0], *out.grid, -1)
            token_count[part] += 1
            for level, stage in enumerate(out.stages):
                stride = self.config.encoder.stride(level)
                if len(sums) <= level:
                    shape = [length // stride for length in x.shape[2:]]
                    sums.append(torch.zeros(x.shape[0], *shape, stage.shape[-1], device=device))
                    counts.append(torch.zeros(*shape, 1, device=device))
                place = tuple(slice(b.start // stride, b.stop // stride) for b in box)
                sums[level][(slice(None), *place)] += F.layer_norm(stage.float(), stage.shape[-1:])
                counts[level][place] += 1
        stages = [(s / c).permute(0, 4, 1, 2, 3) for s, c in zip(sums, counts, strict=True)]
        tokens = (token_sum / token_count).flatten(1, 3)
        return {"cls": cls / number, "tokens": tokens, "grid": grid, "stages": stages}

    @torch.no_grad()
    def attention(
        self, volume: Volume | np.ndarray | Tensor, *, window: int | None = None, overlap: float = 0.25
    ) -> Tensor:
        """[CLS] attention of a scan, (B, heads, D, H, W) on the unit grid; each head sums to 1."""
        if self.semantic is None:
            raise UseError("this encoder has no semantic attention", fix="train with semantic.enabled=true")
        x, device = self._prepare(volume)
        side, grid = self._window(x, window), self.grid(x.shape)
        total = self.config.encoder.stride(4)
        heads = self.config.semantic.heads
        summed = torch.zeros(x.shape[0], heads, *grid, device=device)
        count = torch.zeros(*grid, device=device)
        for box in boxes(x.shape[2:], side, overlap, total):
            out = self(x[(slice(None), slice(None), *box)])
            part = tuple(slice(b.start // self.stride, b.stop // self.stride) for b in box)
            assert out.attention is not None
            # a window of n units gives each 1/n on average: weigh by n, so that windows are comparable
            units = out.attention.shape[-1]
            summed[(slice(None), slice(None), *part)] += (
                out.attention.view(x.shape[0], heads, *out.grid) * units
            )
            count[part] += 1
        mean = summed / count
        return mean / mean.sum((2, 3, 4), keepdim=True)

    def _prepare(self, volume: Volume | np.ndarray | Tensor) -> tuple[Tensor, torch.device]:
        """HU in any accepted form -> windowed (B, 1, D, H, W) padded with air to whole strides."""
        device = self.mask_token.device
        array = volume if isinstance(volume, (np.ndarray, Tensor)) else self._on_grid(volume)
        x = torch.as_tensor(array).to(device, torch.float32)
        if x.dim() == 3:
            x = x[None, None]
        if x.dim() != 5 or x.shape[1] != self.config.encoder.in_channels:
            raise UseError(
                "cannot encode this array",
                found=tuple(x.shape),
                expected="(D, H, W) or (B, 1, D, H, W) in HU",
            )
        low, high = self.config.data.window
        x = ((x - low) / (high - low)).clamp_(0, 1)
        total = self.config.encoder.stride(4)
        d, h, w = (-length % total for length in x.shape[2:])
        return F.pad(x, (0, w, 0, h, 0, d)), device

    def _on_grid(self, volume: Volume) -> np.ndarray:
        """HU at the voxel size of training, whose features these weights know."""
        spacing = self.config.data.spacing
        if all(abs(s - spacing) < 0.01 * spacing for s in volume.spacing):
            return volume.array
        from smartlab.data.grid import AIR
        from smartlab.data.resample import resample, target_grid

        shape, affine = target_grid(volume.array.shape, volume.affine, spacing)
        return resample(volume.array, volume.affine, shape, affine, fill=AIR)

    def _window(self, x: Tensor, window: int | None) -> int:
        if window is not None:
            if window % self.config.encoder.stride(4):
                raise UseError(
                    f"window={window} is not a multiple of the stride {self.config.encoder.stride(4)}"
                )
            return window
        view = self.config.data.view
        return view if max(x.shape[2:]) > 2 * view else max(x.shape[2:])


def boxes(
    size: torch.Size | tuple[int, ...], side: int, overlap: float, stride: int
) -> Iterator[tuple[slice, ...]]:
    """Boxes of at most `side` a side that cover an image of any dimensions, from multiples of `stride` on."""
    starts = []
    for length in size:
        step = max(stride, int(side * (1 - overlap)) // stride * stride)
        last = max(0, length - side)
        starts.append(sorted({*range(0, last, step), last}))
    for corner in itertools.product(*starts):
        yield tuple(slice(a, min(a + side, length)) for a, length in zip(corner, size, strict=True))
