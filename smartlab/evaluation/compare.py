"""Tables of predictions: every score with its interval, and every pair of runs compared."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from smartlab.errors import DataError, UseError
from smartlab.evaluation import metrics as scoring
from smartlab.evaluation import stats
from smartlab.evaluation.predictions import Predictions, from_table

COLUMNS = [
    "metric",
    "a",
    "b",
    "value_a",
    "value_b",
    "difference",
    "low",
    "high",
    "p",
    "p_holm",
    "test",
    "patients",
]


def estimate(
    table: pd.DataFrame, kind: str | None = None, draws: int = 2000, seed: int = 0
) -> stats.Estimates:
    """Every score of a table of predictions, with intervals over patients."""
    one = from_table(table, kind=kind)
    return stats.bootstrap(_scorer(one), one.patient, one.truth, one.probability, draws=draws, seed=seed)


def compare(
    runs: Mapping[str, pd.DataFrame],
    metrics: Sequence[str] | None = None,
    kind: str | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Every pair of runs on the same cases, a row per metric and pair.

    runs: tables of predictions by name; rows may be in any order, cases must be the same.
    metrics: names of scores; left out, all that are not of one class. p_holm corrects for all rows of
    the table, so name the few metrics that matter.

    Columns: metric, a, b, value_a, value_b, difference (a - b), low, high, p, p_holm, test, patients.
    The AUC of a binary label is tested by DeLong's method, everything else by bootstrap.

    >>> compare({"smart": first, "random": second}, metrics=["auc"])
    """
    tables = _aligned(runs, kind)
    names, first = list(tables), next(iter(tables.values()))
    values = [_scorer(one)(one.truth, one.probability) for one in tables.values()]
    wanted = [m for m in values[0] if ":" not in m] if metrics is None else list(metrics)
    unknown = [m for m in wanted if m not in values[0]]
    if unknown:
        raise UseError(f"no score {unknown[0]!r} of {first.kind} labels", expected=", ".join(values[0]))
    probability = [one.probability for one in tables.values()]
    by_delong = first.kind == "binary" and "auc" in wanted and math.isfinite(values[0]["auc"])
    drawn = [m for m in wanted if not (m == "auc" and by_delong)]

    def measure(truth: np.ndarray, p: np.ndarray) -> dict[str, float]:
        scores = _scorer(first)(truth, p)
        return {m: scores[m] for m in drawn}

    tested = stats.paired_differences(measure, first.patient, first.truth, probability, draws, seed)
    rows = []
    for metric in wanted:
        for i, j in combinations(range(len(names)), 2):
            if metric in drawn:
                found = tested[metric, i, j]
            else:
                found = stats.delong_test(first.truth, probability[i], probability[j], first.patient)
            test = "bootstrap" if metric in drawn else "DeLong"
            one, other = values[i][metric], values[j][metric]
            rows.append((metric, names[i], names[j], one, other, *found[:4], math.nan, test, found.n))
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["p_holm"] = stats.holm(table.p.to_numpy())
    return table


def _aligned(runs: Mapping[str, pd.DataFrame], kind: str | None) -> dict[str, Predictions]:
    """Tables of predictions with their rows in the same order, refused unless they are of the same cases."""
    if len(runs) < 2:
        raise UseError("a comparison needs at least two runs", found=", ".join(runs) or "none")
    tables = {}
    for name, table in runs.items():
        one = from_table(table, name, kind)
        order = np.argsort(one.case)
        tables[name] = Predictions(one.kind, one.classes, *(a[order] for a in one[2:]))
    first_name, first = next(iter(tables.items()))
    for name, one in tables.items():
        if (one.kind, one.classes) != (first.kind, first.classes):
            raise DataError(
                f"{name} and {first_name} predict different labels",
                found=f"{one.kind} {one.classes}",
                expected=f"{first.kind} {first.classes}",
            )
        differing = set(one.case) ^ set(first.case)
        if differing:
            raise DataError(
                f"{name} and {first_name} predict different cases",
                found=f"{len(differing)} cases in only one of them",
                fix="keep the cases that both have",
            )
        if (one.patient != first.patient).any() or (one.truth != first.truth).any():
            raise DataError(f"{name} and {first_name} disagree on the patient or the truth of a case")
    return tables


def _scorer(one: Predictions) -> Callable[[np.ndarray, np.ndarray], dict[str, float]]:
    return lambda truth, probability: scoring.scores(one.kind, truth, probability, one.classes)
