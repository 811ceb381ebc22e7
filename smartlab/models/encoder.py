"""The encoder that is pretrained, exported and evaluated: what every one can do, and the one of Swin.

In training `forward` runs on windowed views in [0, 1] and can hide mask units (student) or drop input
patches (noisy teacher). For use after training, `features` and `attention` take whole scans of any size
in HU (or images in grey values), through sliding windows where they are larger than the training view.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.core.config import Config
from smartlab.core.errors import UseError
from smartlab.masking import uniform, upsample
from smartlab.models.semantic import SemanticAttention
from smartlab.models.swin import Repeats, Swin

if TYPE_CHECKING:
    from smartlab.data.images.readers import Volume


class Encoded(NamedTuple):
    """One forward pass."""

    stages: list[Tensor]  # (B, D_i, H_i, W_i, C_i), channels last: five of scans, four of images
    cls: Tensor  # (B, C) image token: [CLS], or the mean token where there is none
    tokens: Tensor  # (B, N, C) one per mask unit, behind semantic attention where there is one
    attention: Tensor | None  # (B, heads, N) [CLS] row over the units; None where there is no [CLS]
    received: Tensor | None  # (B, N) attention received; None unless asked for
    grid: tuple[int, ...]  # of the N units
    units: Tensor | None = None  # (B, N, C) normalised tokens of the stage, before semantic attention
    pooled: Tensor | None = None  # (B, C_4) mean of the last stage's normalised tokens, if it was asked for
    strength: Tensor | None = None  # (B, heads) log of the mean weight of a unit, see `Look`
    share: Tensor | None = None  # (B, heads) log of how much of the [CLS] row is on the units

    @property
    def importance(self) -> Tensor | None:
        """(B, heads, N) whose mean guides masks: the softmax over all keys, where heads that look at [CLS] or registers
        count less; times what makes that mean sum to 1."""
        if self.attention is None or self.share is None:
            return None
        return self.attention * (self.share.softmax(-1) * self.share.shape[-1])[..., None]

    def rows(self, which: slice) -> Encoded:
        """What concerns these rows of the batch; what is behind the units is there for all, or not, as it was."""
        names = ("cls", "tokens", "attention", "received", "units", "strength", "share")
        kept = {name: getattr(self, name) for name in names}
        return self._replace(**{name: x[which] for name, x in kept.items() if x is not None})


class Mosaic:
    """The mean of overlapping windows, (B, …, C) on a grid of `stride`."""

    def __init__(self, size: tuple[int, ...] | torch.Size, stride: int) -> None:
        self.grid, self.stride = [length // stride for length in size], stride
        self.sum: Tensor | None = None

    def add(self, box: tuple[slice, ...], values: Tensor) -> None:
        """values: of the window whose voxels are `box`."""
        if self.sum is None:
            self.sum = values.new_zeros(len(values), *self.grid, values.shape[-1])
            self.count = self.sum.new_zeros(*self.grid, 1)
        part = tuple(slice(b.start // self.stride, b.stop // self.stride) for b in box)
        self.sum[(slice(None), *part)] += values
        self.count[part] += 1

    def mean(self) -> Tensor:
        assert self.sum is not None
        return self.sum / self.count


class AnyEncoder(nn.Module):
    """What every encoder can do: whole scans, or images, to features and attention.

    >>> enc = sl.load_encoder("runs/a")
    >>> enc.features(volume)["cls"].shape, enc.attention(volume).shape
    """

    config: Config
    stride: int  # voxels per side of a mask unit
    total: int  # stored voxels of which an input must be a whole multiple
    channels: int  # of [CLS] and of the tokens
    stage_channels: list[int]
    stage_strides: list[int]
    unit_patches: int  # patch tokens per side of a mask unit
    heads: int  # of [CLS] attention; 0: none
    dims: int = 3
    no_attention = "train with semantic.enabled=true"  # what to do about it

    @property
    def in_channels(self) -> int:
        return self.config.encoder.in_channels

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    def fresh(self) -> Self:
        """The same architecture with new weights, from torch's generator."""
        return type(self)(self.config)  # type: ignore[call-arg, arg-type]

    def about(self) -> dict[str, Any]:
        """What a result must tell beside where the encoder came from."""
        return {}

    def grid(self, size: tuple[int, ...] | torch.Size) -> tuple[int, ...]:
        """Mask units of an image of this size."""
        return tuple(length // self.stride for length in size[-self.dims :])

    def units(self, size: tuple[int, ...] | torch.Size) -> int:
        """How many mask units such an image has."""
        return math.prod(self.grid(size))

    @torch.no_grad()
    def features(
        self,
        image: Volume | np.ndarray | Tensor,
        *,
        window: int | None = None,
        overlap: float = 0.25,
        stages: Sequence[int] | None = None,
    ) -> dict[str, Any]:
        """Features of a scan: "cls" (B, C), "tokens" (B, N, C), "grid" (D, H, W), "stages" list of (B, C_i, …).

        image:  a `Volume`, resampled to the training spacing if it has another, or an array (D, H, W), of several
                channels (C, D, H, W), or tensor (B, C, D, H, W) at that spacing, in HU or what a store of MR holds;
                of an encoder of images (H, W) or (B, 1, H, W) grey values. Padded with air, or black, to whole strides.
        window: side of the sliding windows in voxels; None: the training view, whatever the scan's size.
        stages: only these are joined, others are None: the finest of a whole scan can be large.
        """
        x = self._prepare(image)
        cls: list[Tensor] = []
        every, tokens = range(len(self.stage_strides)), Mosaic(x.shape[2:], self.stride)
        joined = {
            i: Mosaic(x.shape[2:], self.stage_strides[i]) for i in (every if stages is None else stages)
        }
        for box, part in self._windows(x, window, overlap):
            out = self(part)
            cls.append(out.cls.float())
            tokens.add(box, out.tokens.unflatten(1, out.grid).float())
            levels = self._levels(out) if joined else []
            for i, mosaic in joined.items():
                mosaic.add(box, levels[i].float())
        return {
            "cls": sum(cls) / len(cls),
            "tokens": tokens.mean().flatten(1, -2),
            "grid": self.grid(x.shape),
            "stages": [joined[i].mean().movedim(-1, 1) if i in joined else None for i in every],
        }

    @torch.no_grad()
    def attention(
        self, image: Volume | np.ndarray | Tensor, *, window: int | None = None, overlap: float = 0.25
    ) -> Tensor:
        """[CLS] attention, (B, heads, D, H, W) or (B, heads, H, W) on the unit grid; each head sums to 1.

        Windows are joined by the weights of their units before each window's own softmax, as if one softmax
        ran over the scan: a window of air, where nothing is looked for, gets less than one with a tumour.
        """
        if not self.heads:
            raise UseError("this encoder has no semantic attention", fix=self.no_attention)
        x = self._prepare(image)
        mosaic = Mosaic(x.shape[2:], self.stride)
        for box, part in self._windows(x, window, overlap):
            out = self(part, deep=0)
            assert out.attention is not None and out.strength is not None
            mean_weight = out.strength.double().exp() * out.attention.shape[-1]
            weights = out.attention.double() * mean_weight[..., None]
            mosaic.add(box, weights.transpose(1, 2).unflatten(1, out.grid))
        mean = mosaic.mean().movedim(-1, 1)
        return (mean / mean.flatten(2).sum(2).view(*mean.shape[:2], *[1] * self.dims)).float()

    def _levels(self, out: Encoded) -> list[Tensor]:
        """The stages as `features` gives them."""
        return out.stages

    def _prepare(self, image: Volume | np.ndarray | Tensor) -> Tensor:
        """Values in any accepted form -> windowed (B, C, …), padded with air to whole strides."""
        many = self.in_channels
        one = "(D, H, W)" if many == 1 else f"({many}, D, H, W)"
        unit = "HU" if self.config.data.modality == "CT" else "0 to 4095"
        scans = f"{one} or (B, {many}, D, H, W) in {unit}"
        kinds = {2: "(H, W) or (B, 1, H, W) grey values", 3: scans}
        array = image if isinstance(image, np.ndarray | Tensor) else self._on_grid(image, kinds[self.dims])
        if isinstance(array, np.ndarray):
            array = torch.as_tensor(np.ascontiguousarray(array).astype(np.float32))
        x = array.to(self.device, torch.float32)
        x = x[None] if many == 1 and x.dim() == self.dims else x
        x = x[None] if x.dim() == self.dims + 1 else x
        if x.dim() != self.dims + 2 or x.shape[1] != many:
            raise UseError("cannot encode this array", found=tuple(x.shape), expected=kinds[self.dims])
        low, high = self.config.data.window
        x = ((x - low) / (high - low)).clamp(0, 1)
        padding = [end for length in reversed(x.shape[2:]) for end in (0, -length % self.total)]
        return F.pad(x, padding)

    def _on_grid(self, volume: Volume, expected: str) -> np.ndarray:
        """Voxels of the size of training, whose features these weights know."""
        from smartlab.data.images.resample import at_spacing

        if self.dims == 2 or not hasattr(volume, "affine"):
            raise UseError("cannot encode this", found=type(volume).__name__, expected=expected)
        trained = self.config.data.modality
        if "MR" in (trained, volume.modality) and trained != volume.modality:
            problem = f"an encoder of {trained} cannot encode {volume.modality}"
            fix = f'sl.read_volume(path, modality="{trained}")'
            raise UseError(problem, path=volume.source or None, fix=fix)
        return at_spacing(volume.array, volume.affine, self.config.data.spacing)[0]

    def _windows(
        self, x: Tensor, window: int | None, overlap: float
    ) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
        if window is not None and window % self.total:
            raise UseError(f"window={window} is not a multiple of the stride {self.total}")
        for box in boxes(x.shape[2:], window or self.config.data.view, overlap, self.total):
            yield box, x[(slice(None), slice(None), *box)]


class Encoder(AnyEncoder):
    """Swin with a learned mask token and, by setting, semantic attention."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        e, s = config.encoder, config.semantic
        self.config, self.stage, self.stride, self.total = config, s.stage, config.unit, e.stride(4)
        self.heads = s.heads if s.enabled else 0
        self.swin = Swin(e)
        self.unit_patches = self.stride // e.patch
        self.channels = self.swin.channels[self.stage]
        self.stage_channels = list(self.swin.channels)
        self.stage_strides = [e.stride(level) for level in range(5)]
        learned = config.mask.fill == "token"
        self.mask_token = nn.Parameter(torch.zeros(e.embed_dim)) if learned else None
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.semantic = SemanticAttention.of(config, self.channels, self.stride)

    def forward(
        self,
        x: Tensor,
        hidden: Tensor | None = None,
        dropped: Tensor | None = None,
        received: bool = False,
        visible: int | None = None,
        deep: int | None = None,
    ) -> Encoded:
        """Windowed images (B, C, D, H, W) -> `Encoded`.

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
        cls, outputs, attention, strength, share, incoming = self.semantic(stages[self.stage], received)
        return Encoded(stages, cls, outputs, attention, incoming, grid, units, pooled, strength, share)

    def _levels(self, out: Encoded) -> list[Tensor]:
        return [normed(stage.float()) for stage in out.stages]


def dropped_patches(
    encoder: AnyEncoder,
    x: Tensor,
    share: float,
    generator: torch.Generator,
    unit: str | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """What the noisy teacher does not see: (B, D/p, H/p, W/p) bool, as in training, or by another unit."""
    cell = encoder.unit_patches if (unit or encoder.config.teacher.dropout_unit) == "mask_unit" else 1
    d, h, w = (length // (encoder.stride // encoder.unit_patches) // cell for length in x.shape[2:])
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
