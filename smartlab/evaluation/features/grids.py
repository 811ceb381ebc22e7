"""Between scans and the unit grid of an encoder: counting labels per unit, scoring unit maps per voxel.

A unit map (attention, or a baseline) has one value per mask unit. `unit_counts` says how many voxels
of every label each unit holds, from which shares, masses and Dice of whole units follow exactly.
`histograms` interpolates maps trilinearly to voxels and counts the voxels of every label per score
bin: AUC, Dice at any threshold and quantiles follow from these counts (`auc`, `best_dice`,
`quantile_dice`). Both go through the scan in slabs one unit thick, so that memory stays near the size of
the labels. Bins are even in the logarithm of the score, over the map's own range: 4096 of them are
fine enough that ties within a bin, which count half, do not move an AUC in the third digit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from smartlab.core.errors import DataError, UseError
from smartlab.data.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

BINS = 4096
FLOOR = 1e-9  # scores below this share of the highest are one bin
EVEN = 1e-5  # maps whose scores differ by less than this share are uniform


def scans(store: Store, images: Iterable[int] | None = None, held_out: bool = False) -> pd.DataFrame:
    """One row per image: image (position), case (key of its first case), patient, split, fold.

    images:   positions to take; by default every image, or with `held_out` those of the test split,
              else of the validation split, else every image.
    """
    first = store.cases.reset_index(names="case").drop_duplicates("image").set_index("image", drop=False)
    first = first[["image", "case", "patient", "split", "fold"]].sort_index()
    if images is None:
        kept = [first[first.split == name] for name in ("test", "val")] if held_out else []
        return next((part for part in kept if len(part)), first).reset_index(drop=True)
    wanted = list(images)
    if unknown := [i for i in wanted if i not in first.index]:
        raise UseError(
            "no such image in the store", path=store.path, found=unknown[0], expected=f"0 to {len(store) - 1}"
        )
    if not wanted:
        raise DataError("no images to evaluate", path=store.path, fix="check the split and failures.csv")
    return first.loc[wanted].reset_index(drop=True)


def unit_counts(
    labels: np.ndarray, codes: np.ndarray, regions: int, stride: int, grid: Sequence[int]
) -> np.ndarray:
    """Voxels of every region in every unit, (units, regions) float32; voxels outside the scan count nowhere.

    labels: (X, Y, Z) integers; codes: region 0 … regions − 1 of each label value.
    """
    _, h, w = grid
    y, z = (np.arange(n) // stride for n in labels.shape[1:])
    place = (y[:, None] * w + z[None, :]) * regions
    counts = np.zeros((grid[0], h * w * regions), np.float32)
    for i, start in enumerate(range(0, labels.shape[0], stride)):
        index = place[None] + codes[labels[start : start + stride]]
        counts[i] = np.bincount(index.ravel(), minlength=h * w * regions)
    return counts.reshape(-1, regions)


def histograms(
    maps: np.ndarray, labels: np.ndarray, codes: np.ndarray, regions: int, stride: int
) -> np.ndarray:
    """Voxels per map, region and score bin, (maps, regions, BINS) int64; scores rise with the bin.

    maps: (maps, D, H, W) values per unit, at least 0.
    """
    counts = np.zeros((len(maps), regions * BINS), np.int64)
    across = [_neighbours(n, d, stride) for n, d in zip(labels.shape, maps.shape[1:], strict=True)]
    for which, unit_map in enumerate(maps.astype(np.float32)):
        plane = _along(_along(unit_map, 1, *across[1]), 2, *across[2])  # (D, Y, Z)
        highest = max(float(plane.max()), 1e-30)
        low, high = np.log(max(float(plane.min()), FLOOR * highest)), np.log(highest)
        scale = (BINS - 1) / (high - low) if high - low > EVEN else 0.0
        for start in range(0, labels.shape[0], stride):
            rows = slice(start, start + stride)
            score = _along(plane, 0, *(part[rows] for part in across[0]))
            score = (np.log(np.maximum(score, FLOOR * highest)) - low) * scale
            index = codes[labels[rows]] * BINS + np.clip(score, 0, BINS - 1).astype(np.int64)
            counts[which] += np.bincount(index.ravel(), minlength=regions * BINS)
    return counts.reshape(len(maps), regions, BINS)


def interpolate(unit_map: np.ndarray, shape: Sequence[int], stride: int) -> np.ndarray:
    """A unit map (D, H, W) at every voxel of a scan of this shape, trilinear between unit centres."""
    for axis, (voxels, units) in enumerate(zip(shape, unit_map.shape, strict=True)):
        unit_map = _along(unit_map, axis, *_neighbours(voxels, units, stride))
    return unit_map


def _neighbours(voxels: int, units: int, stride: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For every voxel along an axis: the two nearest units and the weight of the second."""
    place = np.clip((np.arange(voxels) + 0.5) / stride - 0.5, 0, units - 1)
    low = np.floor(place).astype(int)
    return low, np.minimum(low + 1, units - 1), (place - low).astype(np.float32)


def _along(x: np.ndarray, axis: int, low: np.ndarray, high: np.ndarray, weight: np.ndarray) -> np.ndarray:
    shape = [1] * x.ndim
    shape[axis] = -1
    first = x.take(low, axis)
    return first + (x.take(high, axis) - first) * weight.reshape(shape)


def auc(inside: np.ndarray, outside: np.ndarray) -> float:
    """Chance that a voxel inside scores higher than one outside, from counts per bin; ties count half."""
    pairs = float(inside.sum()) * float(outside.sum())
    below = np.cumsum(outside) - outside
    return float(inside @ (below + outside / 2)) / pairs if pairs else float("nan")


def best_dice(inside: np.ndarray, outside: np.ndarray) -> float:
    """The highest Dice of any threshold on the score: what the score could do if the threshold were known."""
    hit, predicted = np.cumsum(inside[::-1]), np.cumsum((inside + outside)[::-1])
    return float((2 * hit / (predicted + inside.sum())).max())


def quantile_dice(inside: np.ndarray, outside: np.ndarray, share: float) -> float:
    """Dice of the highest-scoring `share` of all voxels; the bin at the border is taken in part."""
    every = (inside + outside)[::-1]
    wanted = share * every.sum()
    before = np.cumsum(every) - every
    part = np.clip((wanted - before) / np.maximum(every, 1), 0, 1)
    return float(2 * (part @ inside[::-1]) / (wanted + inside.sum()))


def pointing(unit_map: np.ndarray, touched: np.ndarray) -> float:
    """The pointing game on units: 1 if the highest unit holds any of the region; with ties, the share that do.

    (Zhang et al., "Top-down neural attention by excitation backprop", 2016, with one unit as tolerance.)
    """
    top = unit_map >= unit_map.max() * (1 - EVEN)
    return float(touched[top].mean())
