"""From int16 HU to network input, on the device and for the whole batch at once.

All randomness comes from the `torch.Generator` that is passed; draws differ between samples. The
set is small on purpose: CT has calibrated values and a known scale, and masking is the main
augmentation of masked image modelling.

    x = window(batch["views"], -175, 250)           # (B, V, D, H, W) in [0, 1]
    x = augment(x, generator)

Several channels of one scan are mirrored together, and vary in brightness and contrast each by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def window(hu: torch.Tensor, low: float, high: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Clip HU, or MR, to [low, high] and scale to [0, 1]; any shape, float32 inside so that bf16 only rounds once."""
    return ((hu.float() - low) / (high - low)).clamp_(0, 1).to(dtype)


def augment(
    x: torch.Tensor,
    generator: torch.Generator,
    *,
    flip: bool = True,
    intensity: float = 0.1,
    noise: float = 0.0,
    channels: bool = False,
    shard: tuple[int, int] = (0, 1),
) -> torch.Tensor:
    """Random mirrors, contrast and brightness, and noise for (..., D, H, W) in [0, 1].

    flip:       mirror each axis with probability one half.
    intensity:  scale by 1 ± intensity around the sample's mean and shift by ± intensity, uniform.
    noise:      standard deviation of Gaussian noise, per sample uniform between 0 and this.
    channels:   of (B, C, D, H, W), C are channels of one scan, and not samples.
    shard:      (rank, world) where x is one rank's share of a batch: draws as for the whole batch.
    """
    if flip:
        one = x[:, :1] if channels and x.dim() == 5 else x
        x = mirror(x, draw_mirrors(one, generator, shard))
    if intensity > 0:
        scale = 1 + intensity * (2 * _draw(x, generator, shard) - 1)
        shift = intensity * (2 * _draw(x, generator, shard) - 1)
        mean = x.mean(dim=(-3, -2, -1), keepdim=True)
        x = ((x - mean) * scale + mean + shift).clamp(0, 1)
    if noise > 0:
        white = _rows(torch.randn, x.shape, x, generator, shard).to(x.dtype)
        x = (x + noise * _draw(x, generator, shard) * white).clamp(0, 1)
    return x


def draw_mirrors(
    x: torch.Tensor, generator: torch.Generator, shard: tuple[int, int] = (0, 1)
) -> torch.Tensor:
    """(..., 3) bool: which axes of each sample to mirror."""
    return _rows(torch.rand, (*x.shape[:-3], 3), x, generator, shard) < 0.5


def mirror(x: torch.Tensor, mirrors: torch.Tensor) -> torch.Tensor:
    """Mirror each (..., D, H, W) sample along its own axes; the same call does its labels."""
    for axis in range(3):
        chosen = mirrors[..., axis, None, None, None]
        x = torch.where(chosen, x.flip(axis - 3), x)
    return x


def _draw(x: torch.Tensor, generator: torch.Generator, shard: tuple[int, int]) -> torch.Tensor:
    """One uniform number per sample, ready to broadcast."""
    return _rows(torch.rand, (*x.shape[:-3], 1, 1, 1), x, generator, shard).to(x.dtype)


def _rows(
    draw: Callable[..., torch.Tensor],
    shape: Sequence[int],
    x: torch.Tensor,
    generator: torch.Generator,
    shard: tuple[int, int],
) -> torch.Tensor:
    """Random numbers for this rank's rows of the whole batch, drawn where the generator lives."""
    rank, world = shard
    every = draw((shape[0] * world, *shape[1:]), generator=generator, device=generator.device)
    return every[rank * shape[0] : (rank + 1) * shape[0]].to(x.device)
