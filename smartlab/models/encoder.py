"""The encoder that is pretrained, exported and evaluated: Swin, mask token, semantic attention.

In training `Encoder.forward` runs on windowed views in [0, 1] and can hide mask units (student) or
drop input patches (noisy teacher). For use after training, `features` and `attention` take whole
scans of any size in HU, through sliding windows where the scan is larger than the training view.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.core.config import Config
from smartlab.core.errors import UseError
from smartlab.masking import uniform, upsample
from smartlab.models.semantic import SemanticAttention
from smartlab.models.swin import Repeats, Swin
from smartlab.models.windows import Grid

if TYPE_CHECKING:
    from smartlab.data.images.readers import Volume


class Encoded(NamedTuple):
    """One forward pass."""

    stages: list[Tensor]  # five (B, D_i, H_i, W_i, C_i), channels last, not normalised
    cls: Tensor  # (B, C) image token: [CLS], or the mean token without semantic attention
    tokens: Tensor  # (B, N, C) one per mask unit, behind semantic attention where there is one
    attention: Tensor | None  # (B, heads, N) [CLS] row over the units; None without semantic attention
    received: Tensor | None  # (B, N) attention received; None unless asked for
    grid: tuple[int, ...]  # of the N units
    units: Tensor | None = None  # (B, N, C) normalised tokens of the stage, before semantic attention
    pooled: Tensor | None = None  # (B, C_4) mean of the last stage's normalised tokens, if it was asked for
    strength: Tensor | None = None  # (B, heads) log of the mean weight of a unit, see `Semantic`

    def rows(self, which: slice) -> Encoded:
        """What concerns these rows of the batch; what is behind the units is there for all, or not, as it was."""
        names = ("cls", "tokens", "attention", "received", "units", "strength")
        kept = {name: getattr(self, name) for name in names}
        return self._replace(**{name: x[which] for name, x in kept.items() if x is not None})


class Encoder(nn.Module):
    """Swin with a learned mask token and, by setting, semantic attention.

    >>> enc = Encoder(sl.load_config("tiny"))
    >>> enc.features(volume)["cls"].shape, enc.attention(volume).shape
    """

    def __init__(self, config: Config) -> None:
        super().__init__()
        e, s = config.encoder, config.semantic
        self.config, self.stage, self.stride = config, s.stage, config.unit
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
        self.unit_patches = self.stride // e.patch  # patch tokens per side of a mask unit
        self.channels = self.swin.channels[self.stage]
        self.stage_channels = list(self.swin.channels)
        learned = config.mask.fill == "token"
        self.mask_token = nn.Parameter(torch.zeros(e.embed_dim)) if learned else None
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        base = (config.data.view // self.stride,) * 3
        self.semantic = (
            SemanticAttention(
                self.channels, base, s.blocks, s.heads, s.kind, s.similarity, s.position, s.registers
            )
            if s.enabled
            else None
        )

    @property
    def device(self) -> torch.device:
        return self.swin.patch_embed.proj.weight.device

    def grid(self, size: tuple[int, ...] | torch.Size) -> Grid:
        """Mask units of an image of this size."""
        d, h, w = (length // self.stride for length in size[-3:])
        return d, h, w

    def units(self, size: tuple[int, ...] | torch.Size) -> int:
        """How many mask units such an image has."""
        return math.prod(self.grid(size))

    def forward(
        self,
        x: Tensor,
        hidden: Tensor | None = None,
        dropped: Tensor | None = None,
        received: bool = False,
        visible: int | None = None,
        deep: int | None = None,
    ) -> Encoded:
        """Windowed images (B, 1, D, H, W) -> `Encoded`.

        hidden:  (B, N) bool, mask units whose patch embeddings become zero, or the mask token (the student).
        dropped: (B, D/2, H/2, W/2) bool, patch embeddings set to zero (the noisy teacher).
        visible: units that `hidden` or `dropped` leave, in all rows together, where that is known (and
                 whole units are dropped): saves time.
        deep: only for so many of the last rows go on behind the stage of the mask units.
        """
        tokens = self.swin.embed(x)
        grid = self.grid(x.shape)
        sparse = self.config.student.encode == "sparse" and hidden is not None
        if hidden is not None:
            visible = int((~hidden).sum()) if sparse and visible is None else visible
            where = upsample(hidden, grid, self.unit_patches)[..., None]
            fill = 0.0 if self.mask_token is None else self.mask_token.to(tokens.dtype)
            tokens = torch.where(where, fill, tokens)
        if dropped is not None:
            tokens = tokens.masked_fill(dropped[..., None], 0.0)
        repeats, same = None, hidden
        if hidden is None and dropped is not None:  # one patch stands for its unit
            same = dropped[:, :: self.unit_patches, :: self.unit_patches, :: self.unit_patches].flatten(1)
        if same is not None and visible is not None and (sparse or visible < same.numel()):
            repeats = Repeats.of(same, visible, self.unit_patches)
        stages = self.swin.stages(tokens, repeats, self.stage, sparse)
        rows, pooled = len(x) if deep is None else deep, None
        if rows:
            stages += self.swin.stages(stages[-1][-rows:], done=self.stage)[1:]
            pooled = normed(stages[-1][-rows:]).mean((1, 2, 3))
        units = normed(stages[self.stage]).flatten(1, 3)
        if self.semantic is None:
            return Encoded(stages, units.mean(1), units, None, None, grid, units, pooled)
        cls, outputs, attention, strength, incoming = self.semantic(stages[self.stage], received)
        return Encoded(stages, cls, outputs, attention, incoming, grid, units, pooled, strength)

    # ---- use after training: whole scans in HU ----

    @torch.no_grad()
    def features(
        self, volume: Volume | np.ndarray | Tensor, *, window: int | None = None, overlap: float = 0.25
    ) -> dict[str, Any]:
        """Features of a scan: "cls" (B, C), "tokens" (B, N, C), "grid" (D, H, W), "stages" list of (B, C_i, …).

        volume: a `Volume` in HU, resampled to the training spacing if it has another, or an array (D, H, W)
                or tensor (B, 1, D, H, W) of HU at that spacing. Padded with air to whole strides.
        window: side of the sliding windows in voxels; None: the training view, whatever the scan's size.
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
                sums[level][(slice(None), *place)] += normed(stage.float())
                counts[level][place] += 1
        stages = [(s / c).permute(0, 4, 1, 2, 3) for s, c in zip(sums, counts, strict=True)]
        tokens = (token_sum / token_count).flatten(1, 3)
        return {"cls": cls / number, "tokens": tokens, "grid": grid, "stages": stages}

    @torch.no_grad()
    def attention(
        self, volume: Volume | np.ndarray | Tensor, *, window: int | None = None, overlap: float = 0.25
    ) -> Tensor:
        """[CLS] attention of a scan, (B, heads, D, H, W) on the unit grid; each head sums to 1.

        Windows are joined by the weights of their units before each window's own softmax, as if one softmax
        ran over the scan: a window of air, where nothing is looked for, gets less than one with a tumour.
        """
        if self.semantic is None:
            raise UseError("this encoder has no semantic attention", fix="train with semantic.enabled=true")
        x, device = self._prepare(volume)
        side, grid = self._window(x, window), self.grid(x.shape)
        total = self.config.encoder.stride(4)
        heads = self.config.semantic.heads
        summed = torch.zeros(x.shape[0], heads, *grid, device=device, dtype=torch.float64)
        count = torch.zeros(*grid, device=device)
        for box in boxes(x.shape[2:], side, overlap, total):
            out = self(x[(slice(None), slice(None), *box)], deep=0)
            part = tuple(slice(b.start // self.stride, b.stop // self.stride) for b in box)
            assert out.attention is not None and out.strength is not None
            weights = (
                out.attention.double() * (out.strength.double().exp() * out.attention.shape[-1])[..., None]
            )
            summed[(slice(None), slice(None), *part)] += weights.view(x.shape[0], heads, *out.grid)
            count[part] += 1
        mean = summed / count
        return (mean / mean.sum((2, 3, 4), keepdim=True)).float()

    def _prepare(self, volume: Volume | np.ndarray | Tensor) -> tuple[Tensor, torch.device]:
        """HU in any accepted form -> windowed (B, 1, D, H, W) padded with air to whole strides."""
        device = self.device
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
        from smartlab.data.images.resample import at_spacing

        return at_spacing(volume.array, volume.affine, self.config.data.spacing)[0]

    def _window(self, x: Tensor, window: int | None) -> int:
        if window is not None:
            if window % self.config.encoder.stride(4):
                raise UseError(
                    f"window={window} is not a multiple of the stride {self.config.encoder.stride(4)}"
                )
            return window
        return self.config.data.view


def dropped_patches(
    encoder: Encoder,
    x: Tensor,
    share: float,
    generator: torch.Generator,
    unit: str | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """What the noisy teacher does not see: (B, D/2, H/2, W/2) bool, as in training, or by another unit."""
    cell = encoder.unit_patches if (unit or encoder.config.teacher.dropout_unit) == "mask_unit" else 1
    d, h, w = (length // encoder.config.encoder.patch // cell for length in x.shape[2:])
    units = uniform((x.shape[0], d * h * w), x.device, generator, shard) < share
    return upsample(units, (d, h, w), cell)


def normed(x: Tensor) -> Tensor:
    """Tokens of any stage on one scale, as SwinUNETR's decoder takes them."""
    return F.layer_norm(x, x.shape[-1:])


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
