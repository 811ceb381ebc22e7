"""How well classes are told apart in a space of features; what is measured is said in `clusters.py`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from smartlab.evaluation.judge.means import interval, patient_means, patient_weights
from smartlab.evaluation.judge.result import Estimate
from smartlab.evaluation.judge.stats import error_interval

SPREADS = ("inter", "intra", "ratio")
CHANCE = "knn_purity_chance"  # the same in every space


class Separation(NamedTuple):
    """Measures of one space, row by row and draw by draw, so that spaces can be compared in pairs."""

    rows: dict[str, np.ndarray]  # silhouette, knn_purity, knn_purity_chance of every row
    spread: np.ndarray  # (3,) inter, intra, ratio
    drawn: np.ndarray  # (draws, 3), the same of draws of patients


def separation(
    x: np.ndarray, y: np.ndarray, patients: np.ndarray, k: int, draws: int, seed: int
) -> Separation:
    """Everything measured in a space x (rows, C) with classes y and neighbours of other patients."""
    from sklearn.metrics import silhouette_samples

    flat = not np.ptp(x, axis=0).any()
    purity, chance = knn_purity(x, y, patients, k)
    alone = np.zeros(len(y)) if flat else silhouette_samples(x, y)
    weights, position = patient_weights(patients, draws, seed)
    drawn = [spread(x, y, part[:, position]) for part in np.array_split(weights, max(1, draws // 50))]
    rows = {"silhouette": alone, "knn_purity": purity, CHANCE: chance}
    return Separation(rows, spread(x, y, np.ones((1, len(y))))[0], np.concatenate(drawn))


def estimates(found: Separation, patients: np.ndarray) -> dict[str, Estimate]:
    """Every measure with its interval."""
    return _intervals(found.rows, found.spread, found.drawn, patients)


def differences(a: Separation, b: Separation, patients: np.ndarray) -> dict[str, Estimate]:
    """Measures of `a` less those of `b`, on the same rows and draws; distances of two spaces have no
    common scale, so only their ratios are compared."""
    rows = {name: a.rows[name] - b.rows[name] for name in ("silhouette", "knn_purity")}
    found = _intervals(rows, a.spread - b.spread, a.drawn - b.drawn, patients)
    return {name: one for name, one in found.items() if name not in ("inter", "intra")}


def _intervals(
    rows: dict[str, np.ndarray], value: np.ndarray, drawn: np.ndarray, patients: np.ndarray
) -> dict[str, Estimate]:
    number = len(set(patients))
    out = {name: interval(value[i], drawn[:, i], number, error_interval) for i, name in enumerate(SPREADS)}
    means = patient_means(np.stack([*rows.values()], 1), patients)
    return out | dict(zip(rows, means, strict=True))


def standardised(x: np.ndarray) -> np.ndarray:
    """Zero mean and unit variance per dimension; constant dimensions become zero."""
    x = x.astype(np.float64) - x.mean(0, dtype=np.float64)
    scale = x.std(0)
    constant = scale <= 1e-7 * np.abs(x).max(initial=1e-30)
    return np.where(constant, 0, x / np.where(constant, 1, scale)).astype(np.float32)


def spread(x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """inter, intra and ratio, (draws, 3), for every row of weights (draws, rows).

    A class of which a draw has no row is left out of that draw.
    """
    number = int(y.max()) + 1
    centres = np.full((len(weights), number, x.shape[1]), np.nan, np.float32)
    intra = np.full((len(weights), number), np.nan)
    for c in range(number):
        part, w = x[y == c], weights[:, y == c].astype(np.float32)
        middle = part.mean(0)  # sums of squares around it keep their digits
        apart, total = part - middle, w.sum(1)
        with np.errstate(invalid="ignore", divide="ignore"):
            moved = (w @ apart) / total[:, None]
            square = (w @ (apart**2).sum(1)) / total - (moved**2).sum(1)
        centres[:, c], intra[:, c] = middle + moved, np.sqrt(np.maximum(square, 0))
    first, second = np.triu_indices(number, 1)
    inter = np.empty(len(weights))
    for draw, centre in enumerate(centres):
        far = np.linalg.norm(centre[first] - centre[second], axis=1)
        inter[draw] = far[np.isfinite(far)].mean() if np.isfinite(far).any() else np.nan
    within = np.nanmean(intra, axis=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([inter, within, np.where(within > 0, inter / within, np.nan)], 1)


def knn_purity(x: np.ndarray, y: np.ndarray, patients: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Per row: share of its k nearest rows of other patients that are of its class, and the same by chance.

    Where the k-th distance is shared by several rows, they count in equal parts. Not-a-number where
    there is no other patient.
    """
    size = (x**2).sum(1)
    purity, chance = np.full(len(y), np.nan), np.full(len(y), np.nan)
    for start in range(0, len(y), 512):
        rows = slice(start, start + 512)
        far = np.maximum(size[rows, None] + size[None] - 2 * (x[rows] @ x.T), 0)
        other = patients[rows, None] != patients[None]
        same = y[rows, None] == y[None]
        number = other.sum(1)
        far[~other] = np.inf
        for i, count in enumerate(number):
            if count == 0:
                continue
            taken = min(k, int(count))
            edge = np.partition(far[i], taken - 1)[taken - 1]
            below, tied = far[i] < edge, far[i] == edge
            part = (taken - below.sum()) / tied.sum()
            purity[start + i] = (same[i, below].sum() + part * same[i, tied].sum()) / taken
            chance[start + i] = (same[i] & other[i]).sum() / count
    return purity, chance


def kmeans(x: np.ndarray, number: int, seed: int) -> np.ndarray:
    """The cluster of every row, (rows,)."""
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():  # fewer distinct rows than clusters: fewer clusters, which is right
        warnings.simplefilter("ignore", ConvergenceWarning)
        return KMeans(number, n_init=10, random_state=seed).fit_predict(x)


def agreement(
    y: np.ndarray, found: np.ndarray, patients: np.ndarray, draws: int, seed: int
) -> dict[str, Estimate]:
    """ARI and NMI of two partitions with patient-bootstrap intervals."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    weights, position = patient_weights(patients, min(draws, 500), seed)
    scores: dict[str, Callable[..., float]] = {
        "ari": adjusted_rand_score,
        "nmi": normalized_mutual_info_score,
    }
    estimates = {}
    rows = [np.repeat(np.arange(len(y)), w[position]) for w in weights]
    for name, score in scores.items():
        drawn = np.array([score(y[r], found[r]) for r in rows])
        estimates[name] = interval(float(score(y, found)), drawn, weights.shape[1])
    return estimates
