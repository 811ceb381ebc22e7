"""Which organ is this unit? A linear readout of token features, stage by stage: a yardstick for pretraining.

A softmax regression learns the organ (or background) of single units on some patients and names those of others.
It reads every stage on its own grid, and the semantic tokens, beside an untrained network of the same
architecture, mean and spread of HU, and the unit's place in the scan, which alone tells much of an anatomy.

- balanced accuracy   mean over classes of the share of units named right; a unit's class is what holds at least
                      `minimum` of its voxels, others are left out
- mIoU                mean over organs of units named right over units that are it or are called it

Both from the confusions of all judged patients together; intervals by patient bootstrap, differences paired.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from smartlab.core.errors import DataError, UseError
from smartlab.data.store.store import Store
from smartlab.evaluation.features.encoders import EncoderSource, as_encoder
from smartlab.evaluation.features.tokens import FEATURES, organs_of, stride_of, units_of_scans
from smartlab.evaluation.judge import figures
from smartlab.evaluation.judge.means import interval, patient_weights
from smartlab.evaluation.judge.result import Estimate, Result
from smartlab.evaluation.learn.folds import learned_and_judged
from smartlab.evaluation.learn.linear import fit_tuned, one_thread
from smartlab.evaluation.task import Task
from smartlab.models.encoder import AnyEncoder

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVELS = {"stage 1": 1, "stage 2": 2, "stage 3": 3, "stage 4": 4, "tokens": None}  # and their stage
MEASURES = ("balanced accuracy", "mIoU")


class Scan(NamedTuple):
    """One scan on the grid of one level."""

    features: dict[str, np.ndarray]  # name -> (units, C)
    organ: np.ndarray  # (units,) class, 0 is background


def units(
    source: EncoderSource,
    store: Store,
    images: Iterable[int] | None = None,
    *,
    levels: Sequence[str] = ("stage 2", "stage 3", "tokens"),
    labelled: int | None = None,
    minimum: float = 0.5,
    per_class: int = 60,
    folds: int = 5,
    draws: int = 1000,
    seed: int = 0,
    progress: bool = True,
) -> Result:
    """Balanced accuracy and mIoU of a linear readout of single units, on patients that it did not learn from.

    levels:    what is read: "stage 1" to "stage 4" (of Swin strides 4 to 32 with patches of 2), "tokens".
    labelled:  patients to learn from, drawn at random; by default all.
    minimum:   share of a unit's voxels that its class must hold.
    per_class: units per class and scan to learn from, at most.
    folds:     where the store has no split: by patient. Else the training part is learned from, the rest judged.

    metrics: "stage 2/balanced accuracy", "stage 2/balanced accuracy: random", "… minus random", …
    table:   a row per level, feature and class.

    >>> units("runs/a", store).metrics["stage 2/balanced accuracy minus random"]
    """
    if not levels or (unknown := set(levels) - {*LEVELS}):
        raise UseError(
            f"no level {sorted(unknown) if levels else ''}", expected=f"some of {', '.join(LEVELS)}"
        )
    encoder, origin = as_encoder(source)
    about, every, names = _collect(encoder, store, images, levels, minimum, seed, progress)
    patients, pairs = about.patient.to_numpy(str), _pairs(about, labelled, folds, seed)
    judged = np.unique(np.concatenate([judge for _, judge in pairs]))
    weights, _ = patient_weights(patients[judged], draws, seed)
    metrics: dict[str, Estimate] = {}
    rows = []
    for level in tqdm(levels, desc="readouts", disable=not progress):
        confused = {
            f: _confusions(every[level], f, patients, pairs, per_class, len(names), seed) for f in FEATURES
        }
        found = {f: _measures(weights, c) for f, c in confused.items()}
        for number, measure in enumerate(MEASURES):
            metrics |= _estimates(f"{level}/{measure}", {f: (v[number], d[number]) for f, (v, d) in found.items()},
                                  weights.shape[1])  # fmt: skip
        for feature, table in confused.items():
            right, union = table.sum(0).diagonal(), table.sum(0).sum(0) + table.sum(0).sum(1)
            rows += [
                {"level": level, "feature": feature, "class": name, "units": n, "right": r / max(n, 1), "iou": i}
                for name, n, r, i in zip(names, table.sum((0, 2)), right, right / np.maximum(union - right, 1), strict=True)
            ]  # fmt: skip
    facts = origin | {"labelled": labelled, "minimum": minimum, "per_class": per_class, "folds": len(pairs)}
    facts |= {"classes": names, "patients": weights.shape[1], "chance": 1 / len(names)}
    facts |= {"data": store.fingerprint, "seed": seed, "draws": draws}
    return Result(
        "units", metrics, pd.DataFrame(rows), partial(_draw, metrics, tuple(levels), 1 / len(names)), facts
    )


def _collect(
    encoder: AnyEncoder,
    store: Store,
    images: Iterable[int] | None,
    levels: Sequence[str],
    minimum: float,
    seed: int,
    progress: bool,
) -> tuple[pd.DataFrame, dict[str, list[Scan]], list[str]]:
    """The scans that have organ labels, their units by level, and the names of the classes that occur."""
    called = ["background", *organs_of(store).values()]
    stages = [LEVELS[level] for level in levels]
    about, scans = units_of_scans(encoder, store, images, stages, seed, progress)
    every: dict[str, list[Scan]] = {level: [] for level in levels}
    for scan in scans:
        for level, (features, counts) in zip(levels, scan, strict=True):
            clear = counts.max(1) >= minimum * stride_of(encoder, LEVELS[level]) ** 3
            kept = {name: one[clear] for name, one in features.items()}
            every[level].append(Scan(kept, counts.argmax(1)[clear]))
    present = {int(c) for level in every.values() for scan in level for c in np.unique(scan.organ)}
    if len(present) < 3:
        raise DataError("no scan has labels of two organs", path=store.path, fix="choose other images")
    order = sorted(present)
    recode = np.zeros(len(called), np.int64)
    recode[order] = range(len(order))
    every = {k: [s._replace(organ=recode[s.organ]) for s in v] for k, v in every.items()}
    return about, every, [called[i] for i in order]


def _pairs(
    about: pd.DataFrame, labelled: int | None, folds: int, seed: int
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(scans to learn from, scans to judge), no patient in both."""
    patients = about.patient.to_numpy(str)
    train = (about.split.fillna("").replace("", "train") == "train").to_numpy()  # as in pretraining
    if train.any() and not train.all():
        pairs = [(np.flatnonzero(train), np.flatnonzero(~train))]
    elif len(set(patients)) > 1:
        pairs = learned_and_judged(patients, folds, seed)
    else:
        raise DataError("one patient cannot be learned from and judged", fix="give scans of several patients")
    if labelled is None:
        return pairs
    few = []
    for learn, judge in pairs:
        known = np.random.default_rng(seed).permutation(np.unique(patients[learn]))
        if not 0 < labelled <= len(known):
            raise UseError(f"labelled={labelled}", expected=f"1 to {len(known)} patients")
        few.append((learn[np.isin(patients[learn], known[:labelled])], judge))
    return few


@one_thread
def _confusions(
    every: list[Scan],
    feature: str,
    patients: np.ndarray,
    pairs: list[tuple[np.ndarray, np.ndarray]],
    per_class: int,
    classes: int,
    seed: int,
) -> np.ndarray:
    """(judged patients, class, called) counts of units."""
    names = np.unique(patients[np.concatenate([judge for _, judge in pairs])])
    table = np.zeros((len(names), classes, classes))
    for learn, judge in pairs:
        rng = np.random.default_rng(seed)
        x, y, who = [], [], []
        for i in learn:
            scan = every[i]
            drawn = [rng.permutation(np.flatnonzero(scan.organ == c))[:per_class] for c in range(classes)]
            rows = np.concatenate(drawn)
            x.append(scan.features[feature][rows])
            y.append(scan.organ[rows])
            who.append(np.full(len(rows), patients[i]))
        labels = np.concatenate(y)
        # organs that no learning scan shows stay unnamed
        known, code = np.unique(labels, return_inverse=True)
        model = fit_tuned(np.concatenate(x), code, [str(c) for c in known], np.concatenate(who), seed=seed)
        for i in judge:
            said = model.predict(every[i].features[feature])
            called = known[said.argmax(1) if len(known) > 2 else (said[:, 0] > 0.5).astype(int)]
            np.add.at(table[np.searchsorted(names, patients[i])], (every[i].organ, called), 1)
    return table


def _measures(weights: np.ndarray, confused: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(2,) values and (2, draws) bootstrap draws of the two measures."""

    def both(table: np.ndarray) -> np.ndarray:
        right, truth, said = table.diagonal(axis1=-2, axis2=-1), table.sum(-1), table.sum(-2)
        with np.errstate(invalid="ignore", divide="ignore"):
            recall, iou = right / truth, right / (truth + said - right)
        iou[..., 0], iou[truth == 0] = np.nan, np.nan  # background; organs that nobody drawn shows
        return np.stack([np.nanmean(recall, -1), np.nanmean(iou, -1)])

    drawn = np.einsum("dp,pij->dij", weights.astype(float), confused)
    return both(confused.sum(0)), both(drawn)


def _estimates(name: str, found: dict[str, tuple[float, np.ndarray]], patients: int) -> dict[str, Estimate]:
    value, drawn = found["encoder"]
    metrics = {name: interval(value, drawn, patients)}
    for feature, (other, others) in found.items():
        if feature != "encoder":
            metrics[f"{name}: {feature}"] = interval(other, others, patients)
            metrics[f"{name} minus {feature}"] = interval(value - other, drawn - others, patients)
    return metrics


def _draw(metrics: dict[str, Estimate], levels: tuple[str, ...], chance: float) -> Figure:
    """Both measures by level, the encoder beside what it must beat."""
    figure, (axes,) = figures.panels(2, 5.25, 3.8)
    called = {"random": "random weights", "intensity": "mean and spread of HU"}
    for ax, measure in zip(axes, MEASURES, strict=True):
        for shift, (feature, shade) in enumerate(figures.colours(FEATURES).items()):
            of = f": {feature}" if shift else ""
            found = [metrics[f"{level}/{measure}{of}"] for level in levels]
            at = np.arange(len(levels)) + 0.14 * (shift - 1.5)
            figures.intervals(ax, at, found, shade, label=called.get(feature, feature))
        ax.set_xticks(range(len(levels)), levels)
        ax.set_ylim(0)
        figures.plain(ax, grid="y", ylabel=measure)
    axes[0].axhline(chance, **figures.DOTTED)
    figures.legend(axes[1], fontsize=9)
    return figure


TASKS = {"units": Task(units, headline="*/balanced accuracy", stored=True)}
