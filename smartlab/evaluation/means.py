"""Means over a cohort with patient-bootstrap intervals, many quantities at once.

A patient is drawn with all its rows; a row counts as often as its patient was drawn. One matrix
product serves all draws and all columns, so that hundreds of quantities cost no more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from smartlab.evaluation.result import Estimate
from smartlab.evaluation.stats import percentile_interval

Interval = Callable[[float, np.ndarray, int], Estimate]


def patient_weights(
    patients: Sequence[str] | np.ndarray, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each patient is drawn, (draws, patients), and the position of each row's patient, (rows,)."""
    names, position = np.unique(np.asarray(patients).astype(str), return_inverse=True)
    rng = np.random.default_rng(seed)
    return rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws), position


def patient_means(
    values: np.ndarray, patients: Sequence[str] | np.ndarray, draws: int = 1000, seed: int = 0
) -> list[Estimate]:
    """Mean of every column of (rows, columns), each with its interval; missing values are left out.

    With one patient there is no interval. A column without values is not-a-number with n = 0.
    """
    values = np.asarray(values, float)
    known = np.isfinite(values)
    weights, position = patient_weights(patients, draws, seed)
    number = weights.shape[1]
    total, count = np.zeros((number, values.shape[1])), np.zeros((number, values.shape[1]))
    np.add.at(total, position, np.where(known, values, 0))
    np.add.at(count, position, known)
    with np.errstate(invalid="ignore", divide="ignore"):
        drawn = (weights @ total) / (weights @ count)
        mean = total.sum(0) / count.sum(0)
    return [
        interval(value, column, int((seen > 0).sum()))
        for value, column, seen in zip(mean, drawn.T, count.T, strict=True)
    ]


def interval(value: float, drawn: np.ndarray, patients: int, of: Interval = percentile_interval) -> Estimate:
    """The interval of bootstrap draws; draws where the quantity is undefined are left out.

    Without a second patient, or defined draws, there is none.
    """
    drawn = drawn[np.isfinite(drawn)]
    return (
        of(value, drawn, patients) if patients > 1 and len(drawn) > 1 else Estimate(float(value), n=patients)
    )
