"""Whether [CLS] attention falls on lesions and organs that nobody showed the encoder.

Attention lives on the unit grid (8 or 16 voxels a side). Per scan and region, with the mask as truth:

- share         part of the scan's volume that is the region
- inside        part of the attention that falls on it; a unit's attention is spread evenly over its voxels
- lift          inside / share; 1 is chance (as `smartlab.masking.lift`, with air padding left out)
- matched_lift  lesions only: attention per voxel on the lesion over that on the lesion-free part of the
                organ it lies in. An encoder that only finds the organ gets 1. The organ is the one most
                frequent around the lesion, if it is a quarter of what lies around; other lesions are
                left out.
- pointing      whether the unit with the most attention holds any of the region
- auc           of attention, interpolated trilinearly to voxels, as a score of "voxel is in the region"
- best_dice     Dice at the threshold that is best for this very mask: an upper bound, not a result
- quantile_dice Dice of the highest-scoring share of voxels, the same share for every scan

Beside the mean over heads and each head stand four baselines that any claim must beat: `random`, the
same architecture with fresh weights; `centre`, a Gaussian around the middle of the scan; `body`, even
over voxels of the body (of CT, above −500 HU); `uniform`. Intervals are by patient bootstrap, also those of the differences
from `random` and `centre`; that of pointing is Wilson's where every patient has one scan. Scans without the region are counted and left out.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from smartlab.core.errors import DataError, UseError
from smartlab.data.crops.regions import BODY, is_lesion
from smartlab.data.store.store import Store
from smartlab.evaluation.features import grids
from smartlab.evaluation.features.encoders import EncoderSource, as_encoder, random_encoder
from smartlab.evaluation.judge import figures
from smartlab.evaluation.judge.figures import GREY
from smartlab.evaluation.judge.means import patient_means
from smartlab.evaluation.judge.result import Estimate, Result
from smartlab.evaluation.judge.stats import wilson
from smartlab.evaluation.task import Task
from smartlab.models.encoder import Encoder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

MEASURES = ("lift", "matched_lift", "pointing", "auc", "best_dice", "quantile_dice", "inside", "share")
BASELINES = ("random", "centre", "body", "uniform")
COMPARED = ("random", "centre")  # baselines from which differences are estimated
CENTRE_WIDTH = 0.25  # standard deviation of the centre bias, in scan sides
SHELL = 2  # voxels around a lesion in which its organ is looked for
SKY = figures.OTHERS[4]  # of single heads
HOST = 0.25  # share of these that an organ must be


def localize(
    source: EncoderSource,
    store: Store,
    *,
    images: Iterable[int] | None = None,
    regions: str | Sequence[str] | None = None,
    quantile: float = 0.95,
    draws: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Attention against masks over a cohort.

    images:   scans to look at; by default the test split, else the validation split, else all.
    regions:  "lesion" (all labels that name a lesion, together), "organs" (each other label), or label
              names; by default lesions where the store has any, else organs.
    quantile: quantile_dice takes the voxels above it.
    draws:    not needed any more, since means have t intervals; plans that give it still run.

    metrics: "lesion/lift", … of the mean over heads; "lesion/lift:head 1", …; "lesion/lift:random", … of the
             baselines; "lesion/lift minus random", … differences on the same scans.
    table:   a row per scan, region and score.
    """
    encoder, origin = as_encoder(source)
    if encoder.config.flat or not encoder.heads:
        raise UseError("this encoder has no semantic attention", fix=encoder.no_attention)
    if not 0 < quantile < 1:
        raise UseError(f"quantile={quantile}", expected="a number between 0 and 1")
    wanted = _regions(store, regions)
    about = grids.scans(store, images, held_out=True)
    untrained = random_encoder(encoder, seed).to(encoder.device)
    table, maps, unlabelled = _collect(encoder, untrained, store, about, wanted, 1 - quantile, progress)
    metrics = _summarise(table)
    counts = {name: int((table[table.score == "mean"].region == name).sum()) for name in wanted}
    facts = origin | {"images": len(about), "unlabelled": unlabelled, "with_region": counts}
    facts |= {"empty": {name: len(about) - unlabelled - n for name, n in counts.items()}, "seed": seed}
    facts |= {"data": store.fingerprint, "stride_voxels": encoder.stride, "quantile": quantile}
    facts |= {"split": sorted(about.split.dropna().unique()), "interpolation": "trilinear, units to voxels"}
    region = max(counts, key=lambda name: counts[name])
    shown = {image: maps[image] for image in _examples(table, region)}
    draw = partial(_draw, table, metrics, region, store, wanted[region], shown, encoder.stride)
    return Result("localize", metrics, table, draw, facts)


def _collect(
    encoder: Encoder,
    untrained: Encoder,
    store: Store,
    about: pd.DataFrame,
    regions: dict[str, list[int]],
    top: float,
    progress: bool,
) -> tuple[pd.DataFrame, dict[int, np.ndarray], int]:
    """Every measure of every scan and score; the mean map of every scan; scans without labels."""
    import pandas as pd

    rows: list[dict[str, Any]] = []
    maps: dict[int, np.ndarray] = {}
    for _, scan in tqdm(about.iterrows(), total=len(about), desc="localize", disable=not progress):
        stored = store.labels(scan.image)
        if stored is None:
            continue
        names, unit_maps = _unit_maps(encoder, untrained, store.array(scan.image)[:])
        found = score_scan(unit_maps, stored[:], regions, store.label_names, encoder.stride, top)
        facts = {"image": scan.image, "case": scan.case, "patient": scan.patient}
        rows += [facts | row | {"score": names[row["score"]]} for row in found]
        maps[scan.image] = unit_maps[0]
    unlabelled = len(about) - len(maps)
    if not rows:
        raise DataError(
            f"none of the {len(about)} scans has a voxel of {' or '.join(regions)}",
            path=store.path,
            found=f"{unlabelled} scans without any labels",
            fix="choose other images or regions",
        )
    return pd.DataFrame(rows), maps, unlabelled


def _regions(store: Store, regions: str | Sequence[str] | None) -> dict[str, list[int]]:
    """Region name -> label values."""
    names = store.label_names
    lesions = [value for value, name in names.items() if is_lesion(name)]
    organs = {name: [value] for value, name in names.items() if not is_lesion(name)}
    if not names:
        raise DataError(
            "the store has no labels", path=store.path, fix="give masks in the manifest, build again"
        )
    if regions is None:
        regions = "lesion" if lesions else "organs"
    every = {name: [value] for value, name in names.items()} | ({"lesion": lesions} if lesions else {})
    given = [regions] if isinstance(regions, str) else list(regions)
    asked = [part for name in given for part in (organs if name == "organs" and organs else [name])]
    unknown = [name for name in asked if name not in every]
    if not asked or unknown:
        raise UseError(
            "no such region in the labels",
            found=", ".join(unknown) if asked else "no region",
            expected=f"organs, or some of {', '.join(every)}",
        )
    taken: set[int] = set()
    for name in asked:
        if taken & set(every[name]):
            raise UseError(f"region {name!r} overlaps another one asked for", found=", ".join(asked))
        taken |= set(every[name])
    return {name: every[name] for name in asked}


def _unit_maps(encoder: Encoder, untrained: Encoder, hu: np.ndarray) -> tuple[list[str], np.ndarray]:
    """Names and values (maps, D, H, W) of every score: mean, heads, baselines."""
    attention = encoder.attention(hu)[0].float().cpu().numpy()
    grid = attention.shape[1:]
    dense = hu.reshape(-1, *hu.shape[-3:]).max(0) > BODY[encoder.config.data.modality]
    body = grids.unit_counts(dense.view(np.uint8), np.arange(2), 2, encoder.stride, grid)[:, 1]
    other = untrained.attention(hu)[0].float().mean(0).cpu().numpy()
    baselines = [
        other,
        centre_map(dense.shape, grid, encoder.stride),
        body.reshape(grid) + 1e-6,
        np.ones(grid),
    ]
    names = ["mean", *(f"head {i + 1}" for i in range(len(attention))), *BASELINES]
    return names, np.stack([attention.mean(0), *attention, *baselines]).astype(np.float64)


def centre_map(shape: Sequence[int], grid: Sequence[int], stride: int) -> np.ndarray:
    """A Gaussian around the middle of the scan, per unit."""
    apart = [
        ((np.arange(units) + 0.5) * stride / voxels - 0.5) ** 2
        for voxels, units in zip(shape, grid, strict=True)
    ]
    far = apart[0][:, None, None] + apart[1][None, :, None] + apart[2][None, None, :]
    return np.exp(-far / (2 * CENTRE_WIDTH**2))


def score_scan(
    maps: np.ndarray,
    labels: np.ndarray,
    regions: dict[str, list[int]],
    names: dict[int, str],
    stride: int,
    top: float = 0.05,
) -> list[dict[str, Any]]:
    """Every measure of every map (maps, D, H, W) on every region present; "score" is the map's position."""
    present = {name: values for name, values in regions.items() if np.isin(labels, values).any()}
    if not present:
        return []
    codes = np.zeros(256, np.int64)
    for code, values in enumerate(present.values(), 1):
        codes[values] = code
    bins = grids.histograms(maps, labels, codes, len(present) + 1, stride)
    counts = grids.unit_counts(labels, np.arange(256), 256, stride, maps.shape[1:])
    flat, volume = maps.reshape(len(maps), -1), counts.sum(1)
    density = flat / (flat @ volume)[:, None]  # attention per voxel: sums to 1 over the scan
    rows = []
    for code, (name, values) in enumerate(present.items(), 1):
        voxels = counts[:, values].sum(1)
        share = float(voxels.sum() / volume.sum())
        lesions = all(is_lesion(names[value]) for value in values)
        matched = (
            matched_lift(density, counts, labels, values, names, stride, maps.shape[1:]) if lesions else None
        )
        for which in range(len(maps)):
            inside, outside = bins[which, code], bins[which].sum(0) - bins[which, code]
            mass = float(density[which] @ voxels)
            rows.append(
                {
                    "region": name,
                    "score": which,
                    "lift": mass / share,
                    "matched_lift": np.nan if matched is None else matched[which],
                    "pointing": grids.pointing(flat[which][volume > 0], voxels[volume > 0] > 0),
                    "auc": grids.auc(inside, outside),
                    "best_dice": grids.best_dice(inside, outside),
                    "quantile_dice": grids.quantile_dice(inside, outside, top),
                    "inside": mass,
                    "share": share,
                }
            )
    return rows


def matched_lift(
    density: np.ndarray,
    counts: np.ndarray,
    labels: np.ndarray,
    values: list[int],
    names: dict[int, str],
    stride: int,
    grid: Sequence[int],
) -> np.ndarray | None:
    """Attention per voxel on lesions over that on their organs' lesion-free part, per map; None if no organ is known.

    density: (maps, units) attention per voxel; counts: (units, 256) voxels of each label value.
    """
    from scipy import ndimage

    components, number = ndimage.label(np.isin(labels, values))
    on_lesion, on_organ = np.zeros(len(density)), np.zeros(len(density))
    for index, box in enumerate(ndimage.find_objects(components, number), 1):
        wide = tuple(slice(max(0, s.start - SHELL), s.stop + SHELL) for s in box)
        lesion = components[wide] == index
        around = labels[wide][ndimage.binary_dilation(lesion, iterations=SHELL) & ~lesion]
        near = np.bincount(around, minlength=256)
        near[[0, *(value for value, name in names.items() if is_lesion(name))]] = 0
        organ = int(near.argmax())
        if near[organ] <= HOST * len(around):
            continue
        # of each voxel
        units = [(place + s.start) // stride for place, s in zip(np.nonzero(lesion), wide, strict=True)]
        where = np.ravel_multi_index(units, tuple(grid))
        host = counts[:, organ]
        on_lesion += density[:, where].sum(1)
        on_organ += len(where) * (density @ host) / host.sum()
    known = on_organ > 0
    return np.where(known, on_lesion / np.where(known, on_organ, 1), np.nan) if known.any() else None


def _summarise(table: pd.DataFrame) -> dict[str, Estimate]:
    """Means over scans with intervals, and differences of the mean map from the baselines, by name."""
    metrics: dict[str, Estimate] = {}
    for region, part in table.groupby("region", sort=False):
        scores = {
            str(s): rows.set_index("image")[list(MEASURES)] for s, rows in part.groupby("score", sort=False)
        }
        patients = part[part.score == "mean"].patient.to_numpy(str)
        columns, values = [], []
        for score, frame in scores.items():
            kept = [m for m in MEASURES if frame[m].notna().any() and (m != "share" or score == "mean")]
            columns += [f"{region}/{m}" + ("" if score == "mean" else f":{score}") for m in kept]
            values += [frame[m].to_numpy(float) for m in kept]
        for baseline in COMPARED:
            apart = scores["mean"] - scores[baseline]
            kept = [m for m in MEASURES[:-2] if apart[m].notna().any()]
            columns += [f"{region}/{m} minus {baseline}" for m in kept]
            values += [apart[m].to_numpy(float) for m in kept]
        found = patient_means(np.stack(values, 1), patients)
        metrics |= dict(zip(columns, found, strict=True))
        # hits of independent scans: no hit at all has no variance
        if len(set(patients)) == len(patients) > 1:
            hits = {
                n: v for n, v in zip(columns, values, strict=True) if "/pointing" in n and "minus" not in n
            }
            metrics |= {n: wilson(int(v.sum()), len(v)) for n, v in hits.items() if np.isin(v, (0, 1)).all()}
    return metrics


def _examples(table: pd.DataFrame, region: str) -> dict[int, str]:
    """The scans with the highest, the median and the lowest lift: no choice of ours."""
    rows = table[(table.region == region) & (table.score == "mean")].sort_values("lift", ascending=False)
    places = {0: "highest lift", len(rows) // 2: "median lift", len(rows) - 1: "lowest lift"}
    if len(rows) < 3:
        places = dict.fromkeys(range(len(rows)), "lift")
    return {
        int(rows.image.iloc[place]): f"{name} {rows.lift.iloc[place]:.2f}".strip()
        for place, name in places.items()
    }


def _draw(
    table: pd.DataFrame,
    metrics: dict[str, Estimate],
    region: str,
    store: Store,
    values: list[int],
    maps: dict[int, np.ndarray],
    stride: int,
) -> Figure:
    """Attention on the slice with the most of the region, for three scans; measures against baselines."""
    import matplotlib.pyplot as plt

    titles = _examples(table, region)
    figure = plt.figure(figsize=(13, 6.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.15), squeeze=False)[:, 0]
    axes = above.subplots(1, 2 * len(maps), squeeze=False)[0]
    relative = {image: unit_map / unit_map.mean() for image, unit_map in maps.items()}
    high = max(2.0, *(float(np.quantile(r, 0.99)) for r in relative.values()))
    for (image, unit_map), pair in zip(relative.items(), axes.reshape(-1, 2), strict=True):
        picture = _example(pair, store, image, values, unit_map, stride, high)
        pair[0].set_title(titles[image], fontsize=9, loc="left")
    above.colorbar(picture, ax=list(axes), shrink=0.7, label="attention / uniform", pad=0.01, extend="max")
    above.suptitle(f"[CLS] attention, mean over heads; outline: {region}", fontsize=11)
    shown = [m for m in MEASURES[:-2] if f"{region}/{m}" in metrics]
    forests = below.subplots(1, len(shown), squeeze=False)[0]
    names = [*dict.fromkeys(table.score)]
    shades = [GREY if n in BASELINES else SKY if n.startswith("head") else figures.BLUE for n in names]
    for ax, name in zip(forests, shown, strict=True):
        found = {s: metrics.get(f"{region}/{name}" + ("" if s == "mean" else f":{s}")) for s in names}
        figures.listed(ax, found, shades)
        if (chance := found["uniform"]) is not None:
            ax.axvline(chance.value, color=GREY, ls="--", lw=1)
        figures.plain(ax, name.replace("_", " "))
        ax.set_yticklabels(["mean of heads", *names[1:]] if ax is forests[0] else [])
    return figure


def _example(
    axes: np.ndarray,
    store: Store,
    image: int,
    values: list[int],
    relative: np.ndarray,
    stride: int,
    high: float,
) -> Any:
    """The scan (its first channel) and attention overlay of one axial slice, both with the outline of the mask."""
    from smartlab.core.plots import draw_slice, slice_of

    labels = store.labels(image)
    assert labels is not None
    mask = np.isin(labels[:], values)
    index = int(mask.sum((0, 1)).argmax())
    first = (0,) * len(store.leading)
    hu, picture = store.array(image)[(*first, slice(None), slice(None), slice(index, index + 1))], None
    smooth = grids.interpolate(relative.astype(np.float32), mask.shape, stride)[:, :, index : index + 1]
    for ax in axes:
        draw_slice(ax, hu, "axial", 0, window=store.window)
        if ax is axes[1]:
            picture = ax.imshow(slice_of(smooth, "axial", 0), cmap="inferno", vmin=0, vmax=high, alpha=0.65)
        outline = slice_of(mask, "axial", index).astype(float)
        ax.contour(outline, levels=[0.5], colors=["#56B4E9"], linewidths=1.4)
        ax.axis("off")
    return picture


TASKS = {"localize": Task(localize, headline="*/lift", stored=True, inside=True)}
