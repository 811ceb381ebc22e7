"""What a ruler and a histogram know: trivial features that every learned one must beat.

Each is a `FeatureTable` over the same cases in the same order as `lesion_features` (or
`stack_features`), to be probed alone by the same code: a feature that does not beat "size" is not
news.

    "size"          equivalent diameter in mm (of the ball of the same volume; on a mammogram, of the disc of
                    the same area) and volume in ml, from the
                    lesion's mask where the store has one, else from the annotated diameter or box;
                    then the annotated diameter itself, where every case has it
    "mean HU"       inside the mask, else in a central ball
    "HU histogram"  there, shares of 16 even bins of the window; values beyond it count in the outer bins

Of MR, which has no HU, these are "mean intensity" and "intensity histogram"; of several channels, all side by side.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import ndimage
from tqdm.auto import tqdm

from smartlab.data.cohort.manifest import Manifest, load_manifest
from smartlab.data.crops.flat import is_flat, lesion_crops
from smartlab.data.crops.regions import is_lesion
from smartlab.data.crops.views import read_crop
from smartlab.data.images.grid import AIR, three
from smartlab.data.store.store import Store
from smartlab.evaluation.features.cases import lesion_rows, read_stacks
from smartlab.evaluation.features.table import FeatureTable

BINS = 16
BALL_MM = 5.0  # radius of the central ball where there is no mask: inside most nodules
_NEAR_MM = 6.0  # how far from the given centre the mask may begin: centres are rounded, lesions are hollow


def lesion_baselines(
    store: Store,
    manifest: Manifest | str | Path,
    *,
    cases: Iterable[str] | None = None,
    window: tuple[float, float] = (-1000.0, 400.0),
    progress: bool = True,
) -> dict[str, FeatureTable]:
    """Trivial features of the lesions of a store: name -> table.

    cases: keys of `store.cases`, as for `lesion_features`; by default every case with a lesion.
    `facts["size_from"]` counts where sizes come from. A size that is not known becomes the mean of the
    others, marked by a column of its own; where none is known, "size" is left out.
    """
    man = load_manifest(manifest)
    keys = list(lesion_crops(store, 64, cases=cases).table.index)
    wanted = [value for value, name in store.label_names.items() if is_lesion(name)]
    sizes, sources, means, histograms = [], [], [], []
    for key in tqdm(keys, desc="trivial features", disable=not progress, mininterval=1):
        row = store.cases.loc[key]
        volume, values = _lesion(store, row, wanted)
        diameter, source = _diameter(row, volume)
        sizes.append(diameter)
        sources.append(source)
        channels = values.reshape(-1, values.shape[-1])
        means.append([one.mean() for one in channels])
        histograms.append(np.concatenate([histogram(one, window) for one in channels]))
    about = lesion_rows(store, keys, man)
    facts = {"encoder": "none", "manifest": man.name, "data": store.fingerprint, "window": list(window)}

    def table(x: list | np.ndarray, **more: object) -> FeatureTable:
        return FeatureTable(np.asarray(x, np.float32), about, man.labels, facts | more)

    unit = "intensity" if store.modality == "MR" else "HU"
    tables = {f"mean {unit}": table(means), f"{unit} histogram": table(histograms)}
    if (known := np.isfinite(sizes)).any():
        columns = _size_columns(np.array(sizes), known)
        if np.isfinite(given := about.diameter_mm.astype(float).to_numpy()[:, None]).all():
            columns = np.hstack([columns, given])  # small masks lose volume on a coarse grid
        tables = {"size": table(columns, size_from=dict(Counter(sources)))} | tables
    return tables


def stack_baselines(manifest: Manifest | str | Path, root: str | Path) -> dict[str, FeatureTable]:
    """Trivial features of PNG stacks: "largest area" (pixels), "volume" (voxels), "mean grey" of the nodule."""
    stacks = read_stacks(manifest, root)
    rows = []
    for k in range(len(stacks)):
        inside = (stack := stacks[k]) > 0
        rows.append([inside.sum((0, 1)).max(), inside.sum(), stack[inside].mean()])
    facts = {"encoder": "none", "data": stacks.fingerprint} | stacks.facts
    columns = np.array(rows, np.float32)
    return {
        name: FeatureTable(columns[:, [k]], stacks.about, stacks.manifest.labels, facts)
        for k, name in enumerate(("largest area", "volume", "mean grey"))
    }


def histogram(values: np.ndarray, window: tuple[float, float]) -> np.ndarray:
    """Shares of the values in even bins of the window, (16,), summing to 1."""
    counts, _ = np.histogram(np.clip(values, *window), BINS, window)
    return counts / counts.sum()


def _diameter(row: pd.Series, volume: float | None) -> tuple[float, str]:
    """Equivalent diameter in mm and where it is from."""
    if volume is not None:
        return (6 * volume / np.pi) ** (1 / 3), "mask"
    if row.diameter_mm is not None and np.isfinite(row.diameter_mm):
        return float(row.diameter_mm), "diameter_mm"
    if row.box_mm is not None:
        return float(np.prod(row.box_mm) ** (1 / 3)), "box_mm"
    return np.nan, "not known"


def _size_columns(diameter: np.ndarray, known: np.ndarray) -> np.ndarray:
    """Diameter and volume; where some are not known, also which."""
    filled = np.where(known, diameter, diameter[known].mean())
    columns = [filled, np.pi / 6 * filled**3 / 1000]
    return np.stack(columns if known.all() else [*columns, known.astype(float)], 1)


def _lesion(store: Store, row: pd.Series, wanted: list[int]) -> tuple[float | None, np.ndarray]:
    """Volume in mm³ of a lesion's mask (None without one) and the values (…, n) in it, else in the central ball.

    The mask on a mammogram counts as a ball of the same cross-section.
    """
    flat = is_flat(store)
    affine, shape = store.affine(row.image), np.array(store.shape(row.image))
    center = np.linalg.inv(affine)[:3] @ [*row.center_mm, 1.0]
    labels = store.labels(row.image) if wanted else None
    mm = three(store.spacing)
    fine = float(mm.min())
    reach = int(np.ceil(max(_NEAR_MM + BALL_MM, row.diameter_mm or 0.0, *(row.box_mm or [0.0])) / fine))
    while labels is not None:
        start, size = _box(center, reach, flat)
        mask = _component(np.isin(read_crop(labels, start, size, 0)[0], wanted), center - start, mm)
        if mask is None:
            break
        index = np.argwhere(mask)
        cut = ((index.min(0) == 0) & (start > 0)) | (
            (index.max(0) == 2 * reach) & (start + 2 * reach + 1 < shape)
        )
        if not cut.any():
            values = read_crop(store.array(row.image), start, size, AIR)[0][..., mask]
            if flat:
                return np.pi / 6 * (4 / np.pi * values.shape[-1] * fine**2) ** 1.5, values
            return values.shape[-1] * store.voxel_mm3, values
        reach *= 2  # it goes on beyond the box
    start, size = _box(center, int(np.ceil(BALL_MM / fine)), flat)
    crop = read_crop(store.array(row.image), start, size, AIR)[0]
    ball = _distance(crop.shape[-3:], center - start, mm) <= max(BALL_MM, fine)
    return None, crop[..., ball]


def _box(center: np.ndarray, reach: int, flat: bool) -> tuple[np.ndarray, tuple[int, ...]]:
    """Start and size of a cube around a voxel, of a square around a pixel."""
    start, size = np.rint(center).astype(int) - reach, (2 * reach + 1,) * 3
    return (np.array([*start[:2], 0]), (*size[:2], 1)) if flat else (start, size)


def _component(mask: np.ndarray, center: np.ndarray, mm: np.ndarray) -> np.ndarray | None:
    """The connected part of a mask that is nearest to the centre, unless that is too far."""
    away = np.where(mask, _distance(mask.shape, center, mm), np.inf)
    nearest = np.unravel_index(int(away.argmin()), mask.shape)
    if away[nearest] > _NEAR_MM:
        return None
    parts, _ = ndimage.label(mask, np.ones((3, 3, 3)))
    return parts == parts[nearest]


def _distance(shape: tuple[int, ...], center: np.ndarray, mm: np.ndarray) -> np.ndarray:
    """Distance in mm from a point, on a grid of voxels of this size."""
    axes, by_first = np.ogrid[tuple(slice(n) for n in shape)], mm / mm[0]
    every = zip(axes, center, by_first, strict=True)
    return np.sqrt(sum(((axis - c) * step) ** 2 for axis, c, step in every)) * mm[0]
