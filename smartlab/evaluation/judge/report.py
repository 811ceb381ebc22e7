"""From predictions to a `Result`: scores with intervals, and each comparison with its difference and p-value.

Several sets of features predict the same cases on the same folds: first the one in question, beside it
whatever it must beat. Metrics of the first keep their names ("auc"); those of the others are
"<name>/auc", and the difference is "auc minus <name>".
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import pandas as pd

from smartlab.core.errors import DataError
from smartlab.evaluation.features.table import FeatureTable
from smartlab.evaluation.judge import metrics as scoring
from smartlab.evaluation.judge.compare import COLUMNS, compare, estimate
from smartlab.evaluation.judge.figures import performance
from smartlab.evaluation.judge.predictions import from_table
from smartlab.evaluation.judge.result import Estimate, Result
from smartlab.evaluation.judge.stats import holm

Pairs = Sequence[tuple[str, str]]


def report(
    task: str,
    predictions: dict[str, pd.DataFrame],
    kind: str,
    facts: dict[str, Any],
    *,
    pairs: Pairs | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Result:
    """The result of tables of predictions (see `predictions.py`) of the same cases, by name of features.

    pairs: which to compare; left out, the first with every other. The result's table is that of the
    first, with the probabilities of the others beside it, so that `compare` takes it as it is.
    """
    main, *others = predictions
    estimates = {name: estimate(one, kind, draws, seed) for name, one in predictions.items()}
    metrics: dict[str, Estimate] = dict(estimates[main])
    for name in others:
        metrics |= {f"{name}/{metric}": value for metric, value in estimates[name].items()}
    within = from_table(predictions[main], kind=kind).within_folds
    compared = comparisons(predictions, kind, pairs or [(main, o) for o in others], draws, seed)
    metrics |= differences(compared, main)
    facts = facts | {
        "label_kind": kind,
        "interval": f"95%, over patients ({draws} bootstrap draws); the fitted models are kept as they are",
        "auc": "pairs of cases within folds" if within else "all pairs of cases",
        "comparisons": compared.to_dict("records"),
    }

    draw = partial(performance, task, predictions, kind, estimates, compared, facts)
    return Result(task, metrics, _side_by_side(predictions), draw, facts)


def comparisons(
    predictions: dict[str, pd.DataFrame], kind: str, pairs: Pairs, draws: int, seed: int
) -> pd.DataFrame:
    """Rows of `compare` for these pairs; p_holm corrects each metric for the number of pairs."""
    found = [
        compare({n: predictions[n] for n in pair}, None, scoring.HEADLINES[kind], kind, draws, seed)
        for pair in pairs
    ]
    return holm_by_metric(pd.concat(found, ignore_index=True) if found else pd.DataFrame(columns=COLUMNS))


def holm_by_metric(compared: pd.DataFrame) -> pd.DataFrame:
    """The same rows with p_holm over the comparisons of each metric."""
    for metric in compared.metric.unique():
        rows = compared.metric == metric
        compared.loc[rows, "p_holm"] = holm(compared.p[rows].to_numpy(float))
    return compared


def differences(compared: pd.DataFrame, main: str) -> dict[str, Estimate]:
    """Differences as metrics: "auc minus volume", or "auc of both minus covariates" where not of the main."""
    out = {}
    for row in compared.to_dict("records"):
        of = "" if row["a"] == main else f" of {row['a']}"
        name = f"{row['metric']}{of} minus {row['b']}"
        out[name] = Estimate(row["difference"], row["low"], row["high"], row["patients"])
    return out


def align(beside: dict[str, FeatureTable] | None, table: FeatureTable) -> dict[str, np.ndarray]:
    """Features of every table for the cases of `table`, in its order; a missing case is an error."""
    features = {"features": table.x}
    for name, other in (beside or {}).items():
        place = pd.Series(np.arange(len(other)), index=other.about.case.to_numpy())
        if place.index.has_duplicates:
            raise DataError(f"{name}: a case appears twice in its features")
        missing = ~table.about.case.isin(place.index)
        if name in features or missing.any():
            raise DataError(
                f"cannot put {name!r} beside the features",
                found="a name already taken"
                if name in features
                else f"{missing.sum()} cases without features",
                expected="other names, and features of the same cases",
            )
        features[name] = other.x[place[table.about.case].to_numpy()]
    return features


def check_varying(name: str, x: np.ndarray) -> None:
    """Constant features predict nothing but how common a class is in each fold: refused."""
    if not len(x) or not (np.ptp(x, axis=0) > 1e-6 * np.abs(x).max(0)).any():
        raise DataError(
            f"{name} are constant" if name == "features" else f"{name!r} is constant",
            found=f"{len(x)} cases with the same {x.shape[1]} values",
            fix="check the encoder or the baseline that made them",
        )


def _side_by_side(predictions: dict[str, pd.DataFrame]) -> pd.DataFrame:
    main, *others = predictions
    table = predictions[main].copy()
    for name in others:
        columns = [c for c in map(str, predictions[name]) if c.startswith("p:") or c == "prediction"]
        for column in columns:
            table[f"{name} {column}"] = predictions[name][column].to_numpy()
    return table
