"""Scores of predictions: pure functions on arrays, each equal to scikit-learn, MONAI or a closed form.

`scores` gives the right set for a kind of label and is what every task reports; the rest can be used
alone. Ties count half wherever order matters. What is undefined is not-a-number, never a guess: AUC with
one class only, a correlation with a constant. Masks are the exception (see `dice`): there every case has
a finite score, so that a mean over cases never drops one.

In the names of scores a colon leads to one class ("auc:benign"); a plain name is the macro mean over the
classes for which the score is defined. `scores` takes about 0.3 ms for 5,000 binary rows, so that it can
be bootstrapped as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from smartlab.core.errors import DataError, UseError, one_of

_CLASSED = ["auc", "average_precision", "accuracy", "balanced_accuracy", "brier"]
HEADLINES = {  # scores that are compared and drawn, by kind of label
    "binary": _CLASSED,
    "multiclass": _CLASSED,
    "multilabel": [*_CLASSED, "exact_match"],
    "number": ["mae", "rmse", "r2", "pearson", "spearman"],
}
KINDS = tuple(HEADLINES)


def scores(
    kind: str, truth: np.ndarray, probability: np.ndarray, classes: Sequence[str] = ()
) -> dict[str, float]:
    """Every score of one kind of label, by name.

    binary:     truth (n,) 0 or 1; probability (n, 2), or (n,) of class 1
    multiclass: truth (n,) positions in `classes`; probability (n, classes), rows summing to 1
    multilabel: truth (n, classes) 0 or 1; probability (n, classes), each on its own
    number:     truth (n,); probability (n,) holds the predicted numbers

    >>> scores("binary", np.array([0, 0, 1, 1]), np.array([0.1, 0.4, 0.35, 0.8]))["auc"]
    0.75
    """
    truth, probability = check(kind, truth, probability, classes)
    if kind == "binary":
        return _binary(truth, probability)
    if kind == "multiclass":
        return _multiclass(truth, probability, classes)
    if kind == "multilabel":
        return _multilabel(truth, probability, classes)
    return _number(truth, probability)


def check(
    kind: str, truth: np.ndarray, probability: np.ndarray, classes: Sequence[str] = ()
) -> tuple[np.ndarray, np.ndarray]:
    """The arrays in the form that `scores` computes with, or an error that says what does not fit."""
    truth, probability = np.asarray(truth), np.asarray(probability, float)
    one_of("labels of kind", kind, KINDS, " have no scores")
    if kind == "binary" and probability.ndim == 2 and probability.shape[1] == 2:
        probability = probability[:, 1]
    wide = kind in ("multiclass", "multilabel")
    expected = (len(truth), len(classes)) if wide else (len(truth),)
    if probability.shape != expected or truth.shape != (expected if kind == "multilabel" else expected[:1]):
        raise UseError(
            f"{kind} predictions do not fit their truth",
            found=f"truth {truth.shape}, predictions {probability.shape}",
            expected=f"predictions {expected}",
        )
    if len(truth) == 0:
        raise DataError("there are no predictions to score")
    if not np.isfinite(probability).all() or not np.isfinite(truth).all():
        raise DataError("truth or predictions are not finite")
    if kind == "number":
        return truth.astype(float), probability
    if probability.min() < 0 or probability.max() > 1 + 1e-6:
        found = f"{probability.min():.3g} to {probability.max():.3g}"
        raise DataError("probabilities must lie between 0 and 1", found=found)
    if kind == "multiclass" and np.abs(probability.sum(1) - 1).max() > 1e-3:
        raise DataError("probabilities of a row must sum to 1", found=f"{probability.sum(1).min():.3g}")
    highest = len(classes) - 1 if kind == "multiclass" else 1
    if truth.min() < 0 or truth.max() > highest or (truth != truth.astype(np.int64)).any():
        raise DataError("truth must hold positions of classes", expected=f"0 to {highest}")
    return truth.astype(np.int64), probability


def _binary(truth: np.ndarray, p: np.ndarray) -> dict[str, float]:
    area, precision = _areas(truth == 1, p)
    said, positives = p > 0.5, truth.sum()  # a tie goes to class 0, as with argmax over both columns
    sensitivity = _ratio((said & (truth == 1)).sum(), positives)
    specificity = _ratio((~said & (truth == 0)).sum(), len(truth) - positives)
    return {
        "auc": area,
        "average_precision": precision,
        "accuracy": float((said == truth).mean()),
        "balanced_accuracy": (sensitivity + specificity) / 2,
        "sensitivity": sensitivity,
        "specificity": specificity,
        "brier": brier(truth, p),
        "calibration_error": calibration(truth, p).error,
    }


def _multiclass(truth: np.ndarray, p: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    each = [_areas(truth == c, p[:, c]) for c in range(len(classes))]
    said = p.argmax(1)
    counts = np.bincount(truth, minlength=len(classes))
    hits = np.bincount(truth[said == truth], minlength=len(classes))
    recall = np.array([_ratio(h, n) for h, n in zip(hits, counts, strict=True)])
    return {
        "auc": _mean([a for a, _ in each]),
        "average_precision": _mean([b for _, b in each]),
        "accuracy": float((said == truth).mean()),
        "balanced_accuracy": _mean(recall) if (counts > 0).sum() > 1 else np.nan,
        "brier": brier(truth, p),
        "calibration_error": calibration(said == truth, p.max(1)).error,
        **_by_class("auc", [a for a, _ in each], classes),
        **_by_class("average_precision", [b for _, b in each], classes),
        **_by_class("sensitivity", recall, classes),
    }


def _multilabel(truth: np.ndarray, p: np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    each = [_binary(truth[:, c], p[:, c]) for c in range(len(classes))]
    macro = {name: _mean([one[name] for one in each]) for name in each[0]}
    macro["exact_match"] = float(((p > 0.5) == truth).all(1).mean())
    named = ("auc", "average_precision", "balanced_accuracy")
    return macro | {
        k: v for name in named for k, v in _by_class(name, [o[name] for o in each], classes).items()
    }


def _number(truth: np.ndarray, prediction: np.ndarray) -> dict[str, float]:
    from scipy.stats import rankdata

    error = prediction - truth
    spread = float(((truth - truth.mean()) ** 2).sum())
    return {
        "mae": float(np.abs(error).mean()),
        "rmse": float(np.sqrt((error**2).mean())),
        "r2": 1 - float((error**2).sum()) / spread if spread > 0 else np.nan,
        "pearson": _correlation(truth, prediction),
        "spearman": _correlation(rankdata(truth), rankdata(prediction)),
    }


def errors(kind: str, truth: np.ndarray, probability: np.ndarray) -> dict[str, np.ndarray]:
    """The scores that are means over cases, case by case (n,); truth and probability as `check` gives them."""
    if kind == "number":
        return {"mae": np.abs(probability - truth)}
    if kind == "multiclass":
        truth = truth[:, None] == np.arange(probability.shape[1])
    square = (probability - truth) ** 2
    return {
        "brier": square if kind == "binary" else square.mean(1) if kind == "multilabel" else square.sum(1)
    }


def auc(truth: np.ndarray, score: np.ndarray) -> float:
    """Area under the ROC curve; ties count half; not-a-number with one class only."""
    return _areas(np.asarray(truth) == 1, np.asarray(score))[0]


def _areas(positive: np.ndarray, score: np.ndarray) -> tuple[float, float]:
    """AUC and average precision from one sort."""
    total = int(positive.sum())
    if total in (0, len(positive)):
        return np.nan, np.nan
    order = np.argsort(-score)
    ordered = score[order]
    last = np.append(np.flatnonzero(ordered[1:] != ordered[:-1]), len(score) - 1)  # ends of runs of ties
    hits = np.cumsum(positive[order])[last]
    false = last + 1 - hits
    gained = np.diff(hits, prepend=0)
    area = (np.diff(false, prepend=0) * (hits - gained / 2)).sum() / (total * (len(score) - total))
    return float(area), float((gained * hits / (last + 1)).sum() / total)


def brier(truth: np.ndarray, probability: np.ndarray) -> float:
    """Mean squared error of probabilities: (n,) of class 1, or (n, classes) summed over classes (0 to 2)."""
    if probability.ndim == 1:
        return float(((probability - truth) ** 2).mean())
    of_truth = probability[np.arange(len(truth)), truth]
    return float(((probability**2).sum(1) - 2 * of_truth + 1).mean())


class Calibration(NamedTuple):
    """Bins of equal width over [0, 1]; empty bins are not-a-number."""

    error: float  # expected calibration error: mean |observed - predicted|, weighted by count
    cases: np.ndarray  # in each bin
    predicted: np.ndarray
    observed: np.ndarray


def calibration(truth: np.ndarray, probability: np.ndarray, bins: int = 10) -> Calibration:
    """How often an event happens (truth 0 or 1) where its probability says p.

    The error is positive for a perfect model too, by chance: about sqrt(bins / n) / 3.
    """
    where = np.minimum((probability * bins).astype(int), bins - 1)
    count = np.bincount(where, minlength=bins)
    said = np.bincount(where, probability, bins)
    seen = np.bincount(where, truth, bins)
    with np.errstate(invalid="ignore"):
        return Calibration(float(np.abs(seen - said).sum() / len(truth)), count, said / count, seen / count)


def dice(prediction: np.ndarray, truth: np.ndarray) -> float:
    """Overlap of two masks of the same shape, 0 to 1.

    Both empty is 1: nothing to find, nothing claimed. Exactly one empty is 0.
    """
    prediction, truth = _masks(prediction, truth)
    total = int(prediction.sum()) + int(truth.sum())
    return 2 * int((prediction & truth).sum()) / total if total else 1.0


def hd95(prediction: np.ndarray, truth: np.ndarray, spacing: Sequence[float]) -> float:
    """95th percentile of the distances in mm between two surfaces, the larger of both directions.

    Both empty is 0. Exactly one empty is the diagonal of the image: the largest error possible, so
    that a missed structure counts as a bad one.
    """
    from scipy.ndimage import binary_erosion, distance_transform_edt, find_objects

    prediction, truth = _masks(prediction, truth)
    if len(spacing) != truth.ndim:
        raise UseError("spacing and masks differ", found=f"{len(spacing)} spacings, {truth.ndim} axes")
    if not prediction.any() or not truth.any():
        missed = prediction.any() or truth.any()
        return float(np.linalg.norm(np.multiply(truth.shape, spacing))) if missed else 0.0
    box = find_objects((prediction | truth).astype(np.uint8))[0]  # both surfaces lie in it
    surfaces = [mask[box] & ~binary_erosion(mask[box]) for mask in (prediction, truth)]
    far = [
        np.percentile(distance_transform_edt(~to, sampling=spacing)[of], 95)
        for of, to in (surfaces, surfaces[::-1])
    ]
    return float(max(far))


def _masks(prediction: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    prediction, truth = np.asarray(prediction) != 0, np.asarray(truth) != 0
    if prediction.shape != truth.shape:
        raise UseError("masks differ in shape", found=f"{prediction.shape} and {truth.shape}")
    return prediction, truth


def in_order(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each patient (n,): how many of its pairs have the right order, and how many there are, for Harrell's
    concordance: how often who fares worse first had the higher risk.

    time (n,); event (n,) true where it was seen, false where follow-up ended; risk (n,). A pair counts
    where the one with the shorter time had the event; follow-up that ends at the time of an event counts
    as longer. Equal risks count half.
    """
    # row before column
    first = event[:, None] & ((time[:, None] < time) | ((time[:, None] == time) & ~event))
    right = first * ((risk[:, None] > risk) + (risk[:, None] == risk) / 2)
    return right.sum(0) + right.sum(1), (first.sum(0) + first.sum(1)).astype(float)


def _by_class(name: str, values: Sequence[float] | np.ndarray, classes: Sequence[str]) -> dict[str, float]:
    return {f"{name}:{c}": float(v) for c, v in zip(classes, values, strict=True)}


def _mean(values: Sequence[float] | np.ndarray) -> float:
    known = np.asarray(values)[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _ratio(part: int, whole: int) -> float:
    return float(part / whole) if whole else np.nan


def _correlation(a: np.ndarray, b: np.ndarray) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a**2).sum() * (b**2).sum()))
    return float((a * b).sum()) / size if size > 0 else np.nan
