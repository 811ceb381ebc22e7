"""From a loader's batch to the input of a step: windowed, mirrored, augmented, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from smartlab.core.config import Config
from smartlab.data.crops.augment import augment, draw_mirrors, mirror, window
from smartlab.data.crops.regions import BODY, unit_shares


def prepare(
    batch: dict[str, Tensor],
    config: Config,
    device: torch.device,
    generator: torch.Generator,
    shard: tuple[int, int],
    label_names: dict[int, str] | None = None,
) -> tuple[Tensor, dict[str, Tensor] | None]:
    """int16 HU or MR (B, 2, D, H, W), of several channels (B, 2, C, D, H, W) -> views (B, 2, C, D, H, W) in [0, 1].

    With `label_names` also, by region, the part (2B, N) of each mask unit that lies in it.
    """
    d = config.data
    hu = batch["views"].to(device, non_blocking=True)
    hu = hu if hu.dim() == 6 else hu[:, :, None]
    x = window(hu, *d.window)
    mirrors = draw_mirrors(x[:, :, :1], generator, shard) if d.flip else None  # the same of all channels
    if mirrors is not None:
        x = mirror(x, mirrors)
    x = augment(x, generator, flip=False, intensity=d.intensity, shard=shard)
    if label_names is None:
        return x, None
    labels = batch["view_labels"].to(device, non_blocking=True) if "view_labels" in batch else None
    if mirrors is not None:
        hu = mirror(hu, mirrors)
        labels = labels if labels is None else mirror(labels, mirrors[:, :, 0])
    flat = None if labels is None else labels.flatten(0, 1)
    brightest = hu.amax(2).flatten(0, 1)
    return x, unit_shares(brightest, flat, label_names, config.unit, BODY[d.modality])


def prepare_images(
    batch: dict[str, Tensor],
    config: Config,
    device: torch.device,
    generator: torch.Generator,
    shard: tuple[int, int],
    label_names: dict[int, str] | None = None,
) -> tuple[Tensor, None]:
    """int16 grey values (B, 1, H, W) -> views (B, 1, H, W) in [0, 1]; mirrored by the dataset already."""
    x = window(batch["views"].to(device, non_blocking=True), *config.data.window)
    return augment(x, generator, flip=False, intensity=config.data.intensity, shard=shard), None
