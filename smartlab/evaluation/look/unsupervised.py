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

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from smartlab.core.errors import DataError, UseError
from smartlab.data.store.store import Store
from smartlab.evaluation.features.encoders import EncoderSource, as_encoder
from smartlab.evaluation.features.tokens import FEATURES, Units, organs_of, stride_of, units_of_scans
from smartlab.evaluation.judge import figures
from smartlab.evaluation.judge.means import patient_means
from smartlab.evaluation.judge.result import Estimate, Result
from smartlab.evaluation.learn.folds import learned_and_judged
from smartlab.evaluation.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FIT_TOKENS = 20_000  # k-means is fitted on a random sample of this many


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
    patients, notes = about.patient.to_numpy(str), []
    if len(set(patients)) > 1:
        pairs = learned_and_judged(patients, folds, seed)
    else:
        pairs = [(np.arange(len(patients)),) * 2]
        notes.append("one patient: clusters were fitted and matched on the patient they are scored on")

    def predictor(feature: str, fit: np.ndarray) -> Callable[[Units], np.ndarray]:
        return ceiling if feature == "ceiling" else _fit([units[i] for i in fit], feature, number, seed)

    rows = []
    for feature in tqdm([*FEATURES, "ceiling"], desc="clusters", disable=not progress):
        for fit, judged in pairs:
            predict = predictor(feature, fit)
            for i in judged:
                scan = about.loc[i, ["image", "case", "patient"]].to_dict() | {"feature": feature}
                rows += [
                    scan | {"organ": n, "dice": d} for n, d in zip(names, predict(units[i]), strict=True)
                ]
    table = pd.DataFrame(rows).dropna(subset="dice").reset_index(drop=True)
    metrics = _summarise(table)
    facts = origin | {"number": number, "stride_voxels": stride_of(encoder, stage), "folds": len(pairs)}
    facts |= {"notes": notes, "images": len(about), "patients": about.patient.nunique()}
    facts |= {"seed": seed, "data": store.fingerprint}
    return Result("unsupervised", metrics, table, partial(_draw, metrics), facts)


def _collect(
    encoder: Any, store: Store, images: Iterable[int] | None, stage: int | None, seed: int, progress: bool
) -> tuple[pd.DataFrame, list[Units], list[str]]:
    """The scans that have an organ, their units, and the names of the organs that occur."""
    stride_of(encoder, stage)  # refuses what there is not
    names = [*organs_of(store).values()]
    about, every = units_of_scans(encoder, store, images, [stage], seed, progress)
    shown = [bool(units.counts[:, 1:].any()) for (units,) in every]
    found = [units for (units,), yes in zip(every, shown, strict=True) if yes]
    if not found:
        raise DataError("no scan has labels of organs", path=store.path, fix="choose other images")
    present = np.flatnonzero(sum(units.counts[:, 1:].sum(0) for units in found))
    kept = [units._replace(counts=units.counts[:, [0, *(present + 1)]]) for units in found]
    return about.loc[shown].reset_index(drop=True), kept, [names[i] for i in present]


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
    organs = [n.removeprefix("ceiling:") for n in metrics if n.startswith("ceiling:")]
    organs.sort(key=lambda organ: -metrics[f"dice:{organ}"].value)
    height, best = max(3.2, 0.24 * len(organs) + 1), "best that units allow"
    figure, ((left, right),) = figures.panels(2, 5.25, height, width_ratios=(3, 2))
    shown = {organ.replace("_", " "): metrics[f"dice:{organ}"] for organ in organs}
    figures.listed(left, shown, [figures.BLUE] * len(organs))
    left.plot([], [], "o", color=figures.BLUE, label="clusters")
    most = [metrics[f"ceiling:{organ}"].value for organ in organs]
    left.plot(most, range(len(organs)), "|", color="#333333", ms=11, mew=2, label=best)
    left.set(xlabel="Dice", xlim=(-0.02, 1))
    bars = {"encoder": metrics["dice"]} | {f: metrics[f"dice:{f}"] for f in FEATURES[1:]}
    figures.listed(right, bars, [figures.BLUE, *[figures.GREY] * (len(bars) - 1)], across=False)
    right.axhline(metrics["ceiling"].value, color="#333333", ls="--", lw=1, label=best)
    right.set_ylim(0, None)
    right.set_ylabel("Dice, mean over organs")
    for ax in (left, right):
        figures.legend(ax)
    return figure


TASKS = {"unsupervised": Task(unsupervised, headline="dice", stored=True)}
