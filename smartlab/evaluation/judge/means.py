"""Many quantities of a cohort at once, with intervals over patients: means by t, others from draws.

A patient is drawn with all its rows; a row counts as often as its patient was drawn.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from smartlab.evaluation.judge.result import Estimate
from smartlab.evaluation.judge.stats import percentile_interval, t_interval

Interval = Callable[[float, np.ndarray, int], Estimate]


def patient_weights(
    patients: Sequence[str] | np.ndarray, draws: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """How often each patient is drawn, (draws, patients), and the position of each row's patient, (rows,)."""
    names, position = np.unique(np.asarray(patients).astype(str), return_inverse=True)
    rng = np.random.default_rng(seed)
    return rng.multinomial(len(names), np.full(len(names), 1 / len(names)), draws), position


def patient_means(values: np.ndarray, patients: Sequence[str] | np.ndarray) -> list[Estimate]:
    """Mean of every column of (rows, columns), each with its t interval; missing values are left out.

    With one patient there is no interval. A column without values is not-a-number with n = 0.
    """
    who, out = np.asarray(patients).astype(str), []
    for column in np.asarray(values, float).T:
        known = np.isfinite(column)
        if (number := len(set(who[known]))) > 1:
            out.append(t_interval(column[known], who[known]))
        else:
            out.append(Estimate(float(column[known].mean()) if number else np.nan, n=number))
    return out


def interval(value: float, drawn: np.ndarray, patients: int, of: Interval = percentile_interval) -> Estimate:
    """The interval of bootstrap draws; draws where the quantity is undefined are left out.

    Without a second patient, or defined draws, there is none.
    """
    drawn = drawn[np.isfinite(drawn)]
    return (
        of(value, drawn, patients) if patients > 1 and len(drawn) > 1 else Estimate(float(value), n=patients)
    )
