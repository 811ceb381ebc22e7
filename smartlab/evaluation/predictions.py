"""The table of predictions that every task writes and every comparison reads.

One row per case, columns: case, patient, truth, then for each class its probability as `p:<class>`
(binary: both classes), or for a number the one column `prediction`. Truth is the name of the class;
for multilabel the names joined by "|" (none: empty); for a number the number. Positions of classes are
read as well where none of them is the name of a class.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from smartlab.errors import DataError
from smartlab.evaluation import metrics


class Predictions(NamedTuple):
    """A table as arrays, in the form that `metrics.scores` takes."""

    kind: str
    classes: list[str]
    case: np.ndarray
    patient: np.ndarray
    truth: np.ndarray
    probability: np.ndarray


def to_table(
    kind: str,
    case: Sequence[str],
    patient: Sequence[str],
    truth: np.ndarray,
    probability: np.ndarray,
    classes: Sequence[str] = (),
) -> pd.DataFrame:
    """The table of these arrays; truth and probability as in `metrics.scores`."""
    truth, probability = metrics.check(kind, truth, probability, classes)
    table = pd.DataFrame({"case": list(case), "patient": list(patient)})
    if kind == "number":
        return table.assign(truth=truth, prediction=probability)
    if kind == "multilabel":
        table["truth"] = ["|".join(c for c, yes in zip(classes, row, strict=True) if yes) for row in truth]
    else:
        table["truth"] = [classes[t] for t in truth]
    columns = np.column_stack([1 - probability, probability]) if kind == "binary" else probability
    return table.assign(**{f"p:{c}": columns[:, i] for i, c in enumerate(classes)})


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
        return Predictions("number", [], case, patient, truth, probability)
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
    return Predictions(kind, classes, case, patient, truth, probability)


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
