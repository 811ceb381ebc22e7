"""From the tokens of an image to one row of numbers.

    "cls"     the image token: [CLS], or the mean token of an encoder without semantic attention
    "tokens"  the mean of the semantic tokens (one per mask unit)
    "center"  the mean of the tokens that touch the centre: one, or eight where the grid is even
    "stages"  the spatial means of all five Swin stages, each layer-normed, side by side

and any of them side by side, in the order written: "cls+stages".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smartlab.core.errors import UseError
from smartlab.models.encoder import AnyEncoder

if TYPE_CHECKING:
    from smartlab.models.encoder import Encoded

POOLINGS = ("cls", "tokens", "center", "stages")


def parts(pooling: str, allowed: tuple[str, ...] = POOLINGS) -> list[str]:
    """The parts of a pooling such as "cls+stages", checked."""
    found = pooling.split("+")
    if unknown := [p for p in found if p not in allowed]:
        raise UseError(
            f"no pooling {unknown[0]!r} here",
            found=repr(pooling),
            expected=f"{', '.join(allowed)}, or several joined by +",
        )
    if len(set(found)) < len(found):
        raise UseError("a pooling is named twice", found=repr(pooling))
    return found


def width(encoder: AnyEncoder, pooling: str) -> int:
    """Numbers per row."""
    wide = sum(encoder.stage_channels)
    return sum(wide if p == "stages" else encoder.channels for p in pooling.split("+"))


def pool_crops(out: Encoded, pooling: str) -> Tensor:
    """Rows of one forward pass over a batch of crops, (B, C) float32."""
    tokens = out.tokens.float().unflatten(1, out.grid)  # (B, D, H, W, C), or (B, H, W, C) of images
    space = tuple(range(1, tokens.dim() - 1))
    rows = {
        "cls": lambda: [out.cls.float()],
        "tokens": lambda: [tokens.mean(space)],
        "center": lambda: [_middle(tokens, out.grid).mean(space)],
        "stages": lambda: [F.layer_norm(s.float(), s.shape[-1:]).mean(space) for s in out.stages],
    }
    return torch.cat([row for part in parts(pooling) for row in rows[part]()], 1)


def _middle(tokens: Tensor, grid: tuple[int, ...]) -> Tensor:
    for axis, n in enumerate(grid, 1):
        index = torch.tensor(sorted({(n - 1) // 2, n // 2}), device=tokens.device)
        tokens = tokens.index_select(axis, index)
    return tokens


def pool_scan(encoder: AnyEncoder, volume: np.ndarray, pooling: str) -> np.ndarray:
    """The row of one scan (X, Y, Z) or (C, X, Y, Z), or mammogram (H, W), by sliding window, (C,); air added to fill strides counts not."""
    wanted, rows = parts(pooling, ("cls", "tokens", "stages")), []
    features = encoder.features(volume, stages=None if "stages" in wanted else ())
    for part in wanted:
        if part == "cls":
            rows.append(features["cls"][0])
        else:
            for stride, level in _levels(encoder, features, part):
                within = tuple(slice(-(-n // stride)) for n in volume.shape[-encoder.dims :])
                rows.append(level[(slice(None), *within)].flatten(1).mean(1))
    return torch.cat(rows).float().cpu().numpy()


def pool_regions(
    encoder: AnyEncoder, volume: np.ndarray, regions: list[np.ndarray], pooling: str
) -> list[np.ndarray]:
    """Per region of a scan, the mean over its voxels of the tokens they lie in, (C,) each.

    regions: (n, 3) voxel positions each.
    """
    allowed = parts(pooling, ("tokens", "stages"))
    features = encoder.features(volume, stages=None if "stages" in allowed else ())
    return [_pool_region(encoder, features, index, allowed) for index in regions]


def _pool_region(encoder: AnyEncoder, features: dict, index: np.ndarray, wanted: list[str]) -> np.ndarray:
    rows = []
    for part in wanted:
        for stride, level in _levels(encoder, features, part):
            place = np.ravel_multi_index(tuple((index // stride).T), tuple(level.shape[1:]))
            units, voxels = np.unique(place, return_counts=True)
            chosen = level.flatten(1)[:, torch.from_numpy(units).to(level.device)]  # (C, units)
            rows.append(chosen @ torch.from_numpy(voxels / len(index)).to(chosen))
    return torch.cat(rows).float().cpu().numpy()


def _levels(encoder: AnyEncoder, features: dict, part: str) -> list[tuple[int, Tensor]]:
    """(voxels per token side, tokens (C, D, H, W)) of every grid that a part pools over."""
    if part == "stages":
        strides = encoder.stage_strides
        return [(stride, stage[0]) for stride, stage in zip(strides, features["stages"], strict=True)]
    return [(encoder.stride, features["tokens"][0].T.unflatten(1, features["grid"]))]
