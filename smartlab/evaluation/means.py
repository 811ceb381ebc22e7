"""Means over a cohort with patient-bootstrap intervals, many quantities at once.

A patient is drawn with all its rows; a row counts as often as its patient was drawn. One matrix
product serves all draws and all columns, so that hundreds of quantities cost no more than one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats as distributions

from smartlab.evaluation.result import Estimate


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


def interval(value: float, drawn: np.ndarray, patients: int) -> Estimate:
    """The 95% percentile interval of bootstrap draws; draws where the quantity is undefined are left out.

    Percentiles are taken as much further out as t is wider than normal for so many patients (Hesterberg
    2015), as `stats.bootstrap` does.
    """
    drawn = drawn[np.isfinite(drawn)]
    if patients < 2 or not len(drawn):
        return Estimate(float(value), n=patients)
    reach = float(distributions.t.ppf(0.975, patients - 1)) * math.sqrt(patients / (patients - 1))
    tail = float(distributions.norm.cdf(-reach))
    low, high = np.quantile(drawn, (tail, 1 - tail))
    return Estimate(float(value), float(low), float(high), patients)


def error_interval(value: float, drawn: np.ndarray, patients: int) -> Estimate:
    """The 95% interval value ± t standard errors, for quantities that a bootstrap draw shifts."""
    drawn = drawn[np.isfinite(drawn)]
    if patients < 2 or len(drawn) < 2:
        return Estimate(float(value), n=patients)
    half = float(distributions.t.ppf(0.975, patients - 1) * drawn.std(ddof=1))
    return Estimate(float(value), float(value - half), float(value + half), patients)
