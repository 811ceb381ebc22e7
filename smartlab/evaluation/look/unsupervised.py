"""Segmenting organs without labels: k-means on token features, matched to organs (patch-level clusters).

k-means is fitted on the tokens of some patients; its clusters are matched to organs one to one
(Hungarian algorithm, highest sum of Dice) on the same patients; both are then applied to patients that
neither has seen. Labels serve the matching and the scoring only. Every unit of a scan takes part; a
cluster without an organ is background, lesions count as background.

Dice is that of voxels, with every voxel taking its unit's cluster. Units are coarse, so `ceiling` says
what the best choice of units for each organ alone would reach. Four features are treated alike:
`encoder`; `random`, the same architecture with fresh weights; `intensity`, mean and spread of HU per
unit; `position`, the unit's place in the scan, which alone finds much of an anatomy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.case import LabelSpec
from smartlab.data.crops.regions import is_lesion
from smartlab.data.store.store import Store
from smartlab.evaluation.features.encoders import as_encoder, random_encoder
from smartlab.evaluation.features.grids import scans, unit_counts
from smartlab.evaluation.features.table import FeatureTable
from smartlab.evaluation.judge.means import patient_means
from smartlab.evaluation.judge.result import Estimate, Result
from smartlab.models.build import AnyEncoder

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from smartlab.evaluation.features.encoders import EncoderSource

FEATURES = ("encoder", "random", "intensity", "position")
FIT_TOKENS = 20_000  # k-means is fitted on a random sample of this many


class Units(NamedTuple):
    """The units of one scan that hold any of its voxels."""

    features: dict[str, np.ndarray]  # name -> (units, C) float32
    counts: np.ndarray  # (units, 1 + organs): voxels of background and of every organ


def organ_tokens(
    source: EncoderSource,
    store: Store,
    images: Iterable[int] | None = None,
    *,
    stage: int | None = None,
    minimum: float = 0.5,
    per_organ: int = 20,
    seed: int = 0,
) -> FeatureTable:
    """Token features of units that lie in one organ, for `clusters`: several rows per organ and scan.

    stage:     of the encoder, 0 to 4; by default its semantic tokens.
    minimum:   share of the unit's volume that is the organ.
    per_organ: rows per organ and scan at most, drawn at random.
    """
    import pandas as pd

    names, (encoder, origin) = organs_of(store), as_encoder(source)
    rng, rows, parts = np.random.default_rng(seed), [], []
    for _, scan in scans(store, images).iterrows():
        units = _units(encoder, None, store, int(scan.image), names, stage)
        if units is None:
            continue
        size = _stride(encoder, stage) ** 3
        for organ, name in enumerate(names.values(), 1):
            found = np.flatnonzero(units.counts[:, organ] >= minimum * size)
            found = rng.permutation(found)[:per_organ]
            parts.append(units.features["encoder"][found])
            about = {"case": scan.case, "patient": scan.patient, "image": scan.image, "split": scan.split}
            rows += [about | {"fold": scan.fold, "label:organ": name} for _ in found]
    if not rows:
        raise DataError(
            f"no unit of {_stride(encoder, stage)} voxels lies in an organ to {minimum:.0%}",
            path=store.path,
            fix="lower `minimum`, take an earlier `stage`, or build the store at a smaller spacing",
        )
    present = {row["label:organ"] for row in rows}
    spec = LabelSpec(kind="multiclass", classes=[name for name in names.values() if name in present])
    facts = origin | {"features": "tokens", "stage": stage, "minimum": minimum, "data": store.fingerprint}
    return FeatureTable(np.concatenate(parts), pd.DataFrame(rows), {"organ": spec}, facts)


def unsupervised(
    source: EncoderSource,
    store: Store,
    images: Iterable[int] | None = None,
    *,
    number: int | None = None,
    stage: int | None = None,
    folds: int = 5,
    draws: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Dice per organ of clusters of token features, on patients that the clusters were not fitted on.

    number: clusters; by default one more than there are organs in these scans.
    stage:  of the encoder, 0 to 4 (strides 2 to 32); by default its semantic tokens.
    draws:  not needed any more, since means have t intervals; plans that give it still run.

    With one patient there is nobody else to fit on: clusters and matching then come from the scan they are
    scored on, which facts["notes"] says, and there are no intervals.

    metrics: "dice" mean over the organs of a scan, then over scans; "dice:liver", …; "dice:random", … of the
             baselines; "dice minus random", … differences; "ceiling", "ceiling:liver", ….
    table:   a row per scan, organ and feature.
    """

    encoder, origin = as_encoder(source)
    about, units, names = _collect(encoder, store, images, stage, seed, progress)
    number = len(names) + 1 if number is None else number
    if number < 2:
        raise UseError(f"{number} clusters tell nothing apart", expected="two or more")
    pairs, notes = fold_pairs(about.patient.to_numpy(str), folds, seed)
    table = _score(about, units, names, pairs, number, seed, progress)
    metrics = _summarise(table)
    facts = origin | {"number": number, "stride_voxels": _stride(encoder, stage), "folds": len(pairs)}
    facts |= {"notes": notes, "images": len(about), "patients": about.patient.nunique()}
    facts |= {"seed": seed, "data": store.fingerprint}
    return Result("unsupervised", metrics, table, partial(_draw, metrics), facts)


def _collect(
    encoder: AnyEncoder,
    store: Store,
    images: Iterable[int] | None,
    stage: int | None,
    seed: int,
    progress: bool,
) -> tuple[pd.DataFrame, list[Units], list[str]]:
    """The scans that have organ labels, their units, and the names of the organs that occur."""
    names = organs_of(store)
    about = scans(store, images)
    untrained = random_encoder(encoder.config, seed).to(encoder.device)
    found: dict[int, Units] = {}
    for image in tqdm(about.image, desc="tokens", disable=not progress):
        units = _units(encoder, untrained, store, int(image), names, stage)
        if units is not None:
            found[image] = units
    if not found:
        raise DataError("no scan has labels of organs", path=store.path, fix="choose other images")
    present = np.flatnonzero(sum(u.counts.sum(0) for u in found.values())[1:])
    kept = [0, *(present + 1)]
    return (
        about[about.image.isin(found)].reset_index(drop=True),
        [u._replace(counts=u.counts[:, kept]) for u in found.values()],
        [list(names.values())[i] for i in present],
    )


def _score(
    about: pd.DataFrame,
    units: list[Units],
    names: list[str],
    pairs: list[tuple[np.ndarray, np.ndarray]],
    number: int,
    seed: int,
    progress: bool,
) -> pd.DataFrame:
    """Dice of every scan, organ and feature, with clusters fitted on the other part of the pair."""
    import pandas as pd

    rows = []
    for feature in tqdm([*FEATURES, "ceiling"], desc="clusters", disable=not progress):
        for fit, score in pairs:
            predict = (
                ceiling if feature == "ceiling" else _fit([units[i] for i in fit], feature, number, seed)
            )
            for i in score:
                scan, dice = about.iloc[i], predict(units[i])
                facts = {"image": scan.image, "case": scan.case, "patient": scan.patient, "feature": feature}
                rows += [facts | {"organ": n, "dice": d} for n, d in zip(names, dice, strict=True)]
    return pd.DataFrame(rows).dropna(subset="dice").reset_index(drop=True)


def organs_of(store: Store) -> dict[int, str]:
    names = {value: name for value, name in store.label_names.items() if not is_lesion(name)}
    if not names:
        raise DataError(
            "the store has no labels of organs", path=store.path, fix="give masks in the manifest"
        )
    return names


def _stride(encoder: AnyEncoder, stage: int | None) -> int:
    if stage is not None and not 0 <= stage <= 4:
        raise UseError(f"stage={stage}", expected="0 to 4, or None for the semantic tokens")
    return encoder.stride if stage is None else encoder.stage_strides[stage]


def _units(
    encoder: AnyEncoder,
    untrained: AnyEncoder | None,
    store: Store,
    image: int,
    names: dict[int, str],
    stage: int | None,
) -> Units | None:
    """Features and label counts of a scan's units; None without organ labels."""
    stored = store.labels(image)
    if stored is None:
        return None
    stride, hu = _stride(encoder, stage), store.array(image)[:]
    tokens, grid = _tokens(encoder, hu, stage)
    codes = np.zeros(256, np.int64)
    codes[list(names)] = np.arange(1, len(names) + 1)
    counts = unit_counts(stored[:], codes, len(names) + 1, stride, grid)
    if not counts[:, 1:].any():
        return None
    inside = counts.sum(1) > 0
    features = {"encoder": tokens}
    if untrained is not None:
        features["random"] = _tokens(untrained, hu, stage)[0]
        features |= plain(hu, stride, grid)
    return Units({k: v[inside].astype(np.float32) for k, v in features.items()}, counts[inside])


def plain(hu: np.ndarray, stride: int, grid: Sequence[int]) -> dict[str, np.ndarray]:
    """What needs no network: mean and spread of HU per unit, and its place as a share of the scan."""
    pad = [(0, g * stride - n) for g, n in zip(grid, hu.shape, strict=True)]
    padded = torch.from_numpy(np.pad(hu.astype(np.float32), pad, mode="edge"))[None, None]
    mean, square = (F.avg_pool3d(v, stride).numpy().ravel() for v in (padded, padded**2))
    ends = [np.arange(g) * stride / n for g, n in zip(grid, hu.shape, strict=True)]
    return {
        "intensity": np.stack([mean, np.sqrt(np.maximum(square - mean**2, 0))], 1),
        "position": np.stack(np.meshgrid(*ends, indexing="ij"), -1).reshape(-1, 3),
    }


def _tokens(encoder: AnyEncoder, hu: np.ndarray, stage: int | None) -> tuple[np.ndarray, tuple[int, ...]]:
    found = encoder.features(hu)
    if stage is None:
        return found["tokens"][0].float().cpu().numpy(), tuple(found["grid"])
    maps = found["stages"][stage][0].float().cpu()
    return maps.flatten(1).T.numpy(), tuple(maps.shape[1:])


def fold_pairs(
    patients: np.ndarray, folds: int, seed: int
) -> tuple[list[tuple[np.ndarray, np.ndarray]], list[str]]:
    """(scans to fit on, scans to score) with no patient in both, every scan scored once."""
    names = np.random.default_rng(seed).permutation(np.unique(patients))
    if len(names) == 1:
        every = np.arange(len(patients))
        return [(every, every)], [
            "one patient: clusters were fitted and matched on the patient they are scored on"
        ]
    if folds < 2:
        raise UseError(f"folds={folds}", expected="two or more")
    parts = np.array_split(names, min(folds, len(names)))
    return [(np.flatnonzero(~np.isin(patients, p)), np.flatnonzero(np.isin(patients, p))) for p in parts], []


def _fit(units: list[Units], feature: str, number: int, seed: int) -> Callable[[Units], np.ndarray]:
    """A function from a scan's units to the Dice of every organ."""
    from sklearn.cluster import KMeans

    x = np.concatenate([u.features[feature] for u in units])
    counts = np.concatenate([u.counts for u in units])
    mean, scale = x.mean(0), x.std(0) + 1e-6
    sample = np.random.default_rng(seed).permutation(len(x))[:FIT_TOKENS]
    if len(sample) < number:
        raise DataError(f"{len(sample)} units cannot form {number} clusters", fix="ask for fewer clusters")
    model = KMeans(number, n_init=3, random_state=seed).fit((x[sample] - mean) / scale)
    organ = match(model.predict((x - mean) / scale), counts, number)

    def predict(scan: Units) -> np.ndarray:
        return _dice(scan.counts, organ[model.predict((scan.features[feature] - mean) / scale)])

    return predict


def match(cluster: np.ndarray, counts: np.ndarray, number: int) -> np.ndarray:
    """Organ of each cluster (0: background), one to one, with the highest sum of Dice.

    cluster: (units,); counts: (units, 1 + organs) voxels.
    """
    from scipy.optimize import linear_sum_assignment

    table = np.zeros((number, counts.shape[1]))
    np.add.at(table, cluster, counts)
    total = table.sum(1, keepdims=True) + table.sum(0, keepdims=True)
    dice = (2 * table / np.maximum(total, 1))[:, 1:]
    organ = np.zeros(number, np.int64)
    chosen, to = linear_sum_assignment(dice, maximize=True)
    organ[chosen] = np.where(dice[chosen, to] > 0, to + 1, 0)
    return organ


def _dice(counts: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Voxel Dice of every organ; not-a-number where the scan has none of it."""
    organs = counts.shape[1] - 1
    table = np.zeros((organs + 1, organs + 1))
    np.add.at(table, predicted, counts)
    truth = table.sum(0)
    with np.errstate(invalid="ignore", divide="ignore"):
        dice = 2 * table.diagonal() / (table.sum(1) + truth)
    return np.where(truth > 0, dice, np.nan)[1:]


def ceiling(scan: Units) -> np.ndarray:
    """The highest Dice of any set of units, per organ: the best set is that of all units above some share."""
    volume = scan.counts.sum(1, keepdims=True)
    order = (scan.counts / volume)[:, 1:].argsort(0)[::-1]
    hit = np.take_along_axis(scan.counts[:, 1:], order, 0).cumsum(0)
    taken = volume[:, 0][order].cumsum(0)
    dice = (2 * hit / (taken + hit[-1])).max(0)
    return np.where(hit[-1] > 0, dice, np.nan)


def _summarise(table: pd.DataFrame) -> dict[str, Estimate]:
    """Means over scans, of every organ and of the mean over a scan's organs."""
    wide = {
        str(feature): part.pivot(index="image", columns="organ", values="dice")[[*dict.fromkeys(table.organ)]]
        for feature, part in table.groupby("feature", sort=False)
    }
    first = next(iter(wide.values()))
    patients = table.drop_duplicates("image").set_index("image").patient[first.index].to_numpy(str)
    columns: dict[str, np.ndarray] = {}
    for feature, part in wide.items():
        name = {"encoder": "dice", "ceiling": "ceiling"}.get(feature, f"dice:{feature}")
        columns[name] = part.mean(axis=1).to_numpy()
        if feature in ("encoder", "ceiling"):
            columns |= {f"{name}:{organ}": part[organ].to_numpy() for organ in part}
        else:
            columns[f"dice minus {feature}"] = (wide["encoder"] - part).mean(axis=1).to_numpy()
    found = dict(zip(columns, patient_means(np.stack([*columns.values()], 1), patients), strict=True))
    return {name: one if "minus" in name else one.clipped(0, 1) for name, one in found.items()}


def _draw(metrics: dict[str, Estimate]) -> Figure:
    """Dice per organ with its interval and ceiling; the mean beside those of the baselines."""
    import matplotlib.pyplot as plt

    organs = [n.removeprefix("ceiling:") for n in metrics if n.startswith("ceiling:")]
    organs.sort(key=lambda organ: metrics[f"dice:{organ}"].value)
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10.5, max(3.2, 0.24 * len(organs) + 1)), layout="constrained", width_ratios=(3, 2)
    )
    for place, organ in enumerate(organs):
        found = metrics[f"dice:{organ}"]
        left.plot([found.low, found.high], [place, place], color="#0072B2", lw=2)
        left.plot(found.value, place, "o", color="#0072B2", ms=5, label="clusters" if not place else None)
        left.plot(metrics[f"ceiling:{organ}"].value, place, "|", color="#333333", ms=11, mew=2,
                  label="best that units allow" if not place else None)  # fmt: skip
    left.set_yticks(range(len(organs)), [o.replace("_", " ") for o in organs], fontsize=8)
    left.set_xlabel("Dice")
    left.set_xlim(-0.02, 1)
    left.legend(frameon=False, fontsize=8, loc="lower right")
    bars = {"encoder": metrics["dice"]} | {f: metrics[f"dice:{f}"] for f in FEATURES[1:]}
    for place, (name, found) in enumerate(bars.items()):
        colour = "#D55E00" if name == "encoder" else "#777777"
        right.plot([place, place], [found.low, found.high], color=colour, lw=2)
        right.plot(place, found.value, "o", color=colour, ms=7)
    right.axhline(metrics["ceiling"].value, color="#333333", ls="--", lw=1, label="best that units allow")
    right.set_xticks(range(len(bars)), [*bars])
    right.set_xlim(-0.5, len(bars) - 0.5)
    right.set_ylim(0, None)
    right.set_ylabel("Dice, mean over organs")
    right.legend(frameon=False, fontsize=8)
    for ax in (left, right):
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure
