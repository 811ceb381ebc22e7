"""The table of predictions that every task writes and every comparison reads.

One row per case, columns: case, patient, truth, then for each class its probability as `p:<class>`
(binary: both classes), or for a number the one column `prediction`. Truth is the name of the class;
for multilabel the names joined by "|" (none: empty); for a number the number. Positions of classes are
read as well where none of them is the name of a class.

Where several models predicted, one a fold, the scores of two folds have no common zero, and pairs are
compared within folds only. The table then says for each case and class how many pairs it is in
(`pairs:<class>`) and how many of these have the right order (`right:<class>`, ties half), over all
repeats; binary: of the second class only. AUC is the sum of the one over the sum of the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from smartlab.core.errors import DataError
from smartlab.evaluation.judge import metrics, stats

Part = tuple[np.ndarray, np.ndarray]  # one fold: positions of rows, and their predictions by one model


class Predictions(NamedTuple):
    """A table as arrays, in the form that `metrics.scores` takes."""

    kind: str
    classes: list[str]
    case: np.ndarray
    patient: np.ndarray
    truth: np.ndarray
    probability: np.ndarray
    right: np.ndarray  # (n, k) pairs of each case that have the right order, for each AUC
    pairs: np.ndarray  # (n, k) pairs that each case is in

    @property
    def ranked(self) -> list[str]:
        """The classes that have an AUC."""
        return self.classes[1:] if self.kind == "binary" else self.classes

    @property
    def positive(self) -> np.ndarray:
        """(k, n) whether a case has each class of `ranked`."""
        return _ranking(self.kind, self.truth, self.probability)[0]

    @property
    def within_folds(self) -> bool:
        """Whether not every two cases are a pair."""
        several = self.positive.sum(1) if self.ranked else np.zeros(0)
        return bool((self.pairs.sum(0) / 2 != several * (len(self.truth) - several)).any())


def areas(*runs: Predictions) -> stats.Areas:
    """The AUCs of every class of `ranked`, of one run after the other, all of the same cases in one order."""
    right, pairs = (np.hstack([getattr(run, name) for run in runs]).T for name in ("right", "pairs"))
    return stats.areas(np.concatenate([run.positive for run in runs]), right, pairs, runs[0].patient)


def to_table(
    kind: str,
    case: Sequence[str],
    patient: Sequence[str],
    truth: np.ndarray,
    probability: np.ndarray,
    classes: Sequence[str] = (),
    parts: Sequence[Part] = (),
) -> pd.DataFrame:
    """The table of these arrays; truth and probability as in `metrics.scores`.

    parts: the predictions of each fold, where there were several.
    """
    truth, probability = metrics.check(kind, truth, probability, classes)
    table = pd.DataFrame({"case": list(case), "patient": list(patient)})
    if kind == "number":
        return table.assign(truth=truth, prediction=probability)
    if kind == "multilabel":
        table["truth"] = ["|".join(c for c, yes in zip(classes, row, strict=True) if yes) for row in truth]
    else:
        table["truth"] = [classes[t] for t in truth]
    columns = np.column_stack([1 - probability, probability]) if kind == "binary" else probability
    table = table.assign(**{f"p:{c}": columns[:, i] for i, c in enumerate(classes)})
    if len(parts) > 1:
        right, pairs = _count(kind, truth, parts)
        for i, c in enumerate(classes[1:] if kind == "binary" else classes):
            table[f"right:{c}"], table[f"pairs:{c}"] = right[:, i], pairs[:, i]
    return table


def _ranking(kind: str, truth: np.ndarray, probability: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Who is positive and by what score, (k, n) each, for every AUC of this kind of label."""
    if kind == "binary":
        return (truth == 1)[None], probability.reshape(len(truth), -1)[:, -1][None]
    positive = truth == 1 if kind == "multilabel" else truth[:, None] == np.arange(probability.shape[1])
    return positive.T, probability.T


def _count(kind: str, truth: np.ndarray, parts: Sequence[Part]) -> np.ndarray:
    """(2, n, k): right and all pairs of every case, summed over folds and repeats."""
    total: np.ndarray | float = 0.0
    for rows, probability in parts:
        found = np.stack(stats.in_order(*_ranking(kind, truth[rows], probability)))  # (2, k, rows)
        one = np.zeros((2, len(truth), found.shape[1]))
        one[:, rows] = found.transpose(0, 2, 1)
        total = total + one
    return np.asarray(total)


def from_table(table: pd.DataFrame, name: str = "predictions", kind: str | None = None) -> Predictions:
    """The arrays of a table. The kind is told by its columns and its truth, unless given.

    Say `kind="multilabel"` where no case carries two classes and the rows happen to sum to 1.
    """
    missing = [c for c in ("case", "patient", "truth") if c not in table]
    classes = [str(c)[2:] for c in table.columns if str(c).startswith("p:")]
    if missing or not (classes or "prediction" in table):
        raise DataError(
            f"{name} is not a table of predictions",
            found=f"columns {', '.join(map(str, table.columns))}",
            expected="case, patient, truth and p:<class> for every class, or prediction",
        )
    if table[["case", "patient"]].isna().any(axis=None):
        raise DataError(f"{name}: a case or its patient is missing")
    if table.case.duplicated().any():
        raise DataError(f"{name}: a case appears twice", fix="average or number its predictions first")
    case, patient = table.case.astype(str).to_numpy(), table.patient.astype(str).to_numpy()
    if not classes:
        truth, probability = metrics.check("number", table.truth.to_numpy(), table.prediction.to_numpy())
        none = np.zeros((len(table), 0))
        return Predictions("number", [], case, patient, truth, probability, none, none)
    probability = table[[f"p:{c}" for c in classes]].to_numpy(float)
    kind = kind or _kind(table, probability)
    if kind == "multilabel":
        named = [set(str(v).split("|")) - {"", "nan"} for v in table.truth]
        unknown = set().union(*named) - set(classes)
        if unknown:
            raise DataError(f"{name}: truth holds an unknown class", found=min(unknown), expected=classes)
        truth = np.array([[c in row for c in classes] for row in named], int)
    else:
        truth = _positions(table.truth, classes, name)
    truth, probability = metrics.check(kind, truth, probability, classes)
    ranked = classes[1:] if kind == "binary" else classes
    if all(f"{n}:{c}" in table for n in ("right", "pairs") for c in ranked):
        right, pairs = (table[[f"{n}:{c}" for c in ranked]].to_numpy(float) for n in ("right", "pairs"))
    else:
        right, pairs = _count(kind, truth, [(np.arange(len(truth)), probability)])
    return Predictions(kind, classes, case, patient, truth, probability, right, pairs)


def _kind(table: pd.DataFrame, probability: np.ndarray) -> str:
    sums_to_one = np.abs(probability.sum(1) - 1).max() < 1e-3
    if table.truth.isna().any() or table.truth.isin([""]).any() or not sums_to_one:
        return "multilabel"
    if table.truth.astype(str).str.contains("|", regex=False).any():
        return "multilabel"
    return "binary" if probability.shape[1] == 2 else "multiclass"


def _positions(truth: pd.Series, classes: list[str], name: str) -> np.ndarray:
    """Positions of the classes that truth names."""
    values = [str(int(v)) if isinstance(v, float) and v.is_integer() else str(v) for v in truth]
    named = [v in classes for v in values]
    if all(named):
        return np.array([classes.index(v) for v in values])
    if not any(named) and all(v.isdigit() and int(v) < len(classes) for v in values):
        return np.array([int(v) for v in values])
    unknown = values[named.index(False)]
    raise DataError(f"{name}: truth holds an unknown class", found=unknown, expected=classes)
