"""Tables of predictions: every score with its interval, and every pair of runs compared."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from smartlab.core.errors import DataError, UseError, one_of
from smartlab.evaluation.judge import metrics as scoring
from smartlab.evaluation.judge import stats
from smartlab.evaluation.judge.nnunet import dice_table
from smartlab.evaluation.judge.predictions import Predictions, areas, from_table
from smartlab.evaluation.judge.result import Estimate, Result

Source = pd.DataFrame | Result | str | Path  # of a table: itself, a result, or a folder that holds one
PER_CASE = {  # tasks whose table holds scores of cases: columns of a case, and the scores
    "segment": (["case", "structure"], ["dice", "hd95"]),
    "localize": (["case", "region"], ["lift", "matched_lift", "pointing", "auc", "quantile_dice"]),
    "unsupervised": (["case", "organ"], ["dice"]),
}
ONLY = {"localize": ("score", "mean"), "unsupervised": ("feature", "encoder")}  # rows that count

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
) -> dict[str, Estimate]:
    """Every score of a table of predictions, with intervals over patients.

    AUC within folds, after DeLong; means of errors by t on the log scale; other scores between 0 and 1 on the logit scale, by
    the variance of a bootstrap; the rest by the percentiles of one.
    """
    one = from_table(table, kind=kind)
    errors = scoring.errors(one.kind, one.truth, one.probability)
    known = _areas(one) | {n: stats.log_interval(e, one.patient) for n, e in errors.items()}

    def others(truth: np.ndarray, probability: np.ndarray) -> dict[str, float]:
        return {n: v for n, v in _scorer(one)(truth, probability).items() if n not in known}

    scores = _scorer(one)(one.truth, one.probability)
    bounded = _fewest(one, list(scores))
    drawn = stats.bootstrap(
        others, one.patient, one.truth, one.probability, draws=draws, seed=seed, bounded=bounded
    )
    return {name: known.get(name) or drawn[name] for name in scores}


def score(table: pd.DataFrame, kind: str | None = None) -> dict[str, float]:
    """Every score of a table of predictions."""
    return _values(from_table(table, kind=kind))


def _values(one: Predictions) -> dict[str, float]:
    return _scorer(one)(one.truth, one.probability) | {n: area.value for n, area in _areas(one).items()}


def _areas(one: Predictions) -> dict[str, Estimate]:
    """AUC, and where there are several that of each class."""
    if not one.ranked:
        return {}
    found = areas(one)
    each = [] if one.kind == "binary" else one.ranked
    return {"auc": stats.mean_area(found)} | {
        f"auc:{c}": stats.mean_area(found, [k]) for k, c in enumerate(each)
    }


def _fewest(one: Predictions, scores: Sequence[str]) -> dict[str, int]:
    """Scores between 0 and 1, and the patients of the rarest class that each counts; all for shares of cases."""
    if not one.classes:
        return {}
    member = one.truth == 1 if one.truth.ndim == 2 else one.truth[:, None] == np.arange(len(one.classes))
    of_class = {c: len(set(one.patient[m])) or 1 for c, m in zip(one.classes, member.T, strict=True)}
    fewest = dict.fromkeys(scores, min(of_class.values()))
    fewest |= {n: of_class[n.partition(":")[2]] for n in scores if ":" in n}
    return fewest | dict.fromkeys(("accuracy", "exact_match"), len(set(one.patient)))


def compare(
    runs: Mapping[str, Source],
    task: str | None = None,
    metrics: Sequence[str] | None = None,
    kind: str | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """Every pair of runs on the same cases, a row per metric and pair.

    runs: by name a result, its folder, its table, or with `task` a run folder, where the result is that of
    RUN/evaluation/TASK (or RUN/finetune/TASK); rows may be in any order, cases must be the same.
    task: also says that tables hold scores per case ("segment", "localize", "unsupervised"), whose means
    over cases are compared by a paired t-test over patients; else tables hold predictions.
    metrics: names of scores; left out, all that are not of one class. p_holm corrects for all rows of
    the table, so name the few metrics that matter.

    Columns: metric, a, b, value_a, value_b, difference (a - b), low, high, p, p_holm, test, patients.
    AUC is tested within folds, by DeLong's method, everything else by bootstrap.

    >>> compare({"smart": first, "random": second}, metrics=["auc"])
    >>> compare({"smart": "runs/smart", "smit": "runs/smit"}, "probe", metrics=["auc"])
    """
    read = {name: _read(name, source, task) for name, source in runs.items()}
    if len(read) < 2:
        raise UseError("a comparison needs at least two runs", found=", ".join(read) or "none")
    told = {str(facts.get("task")) for _, facts in read.values()}
    # "probe-malignancy" is a probe
    task = task.split("-")[0] if task else told.pop() if len(told) == 1 else None
    if task in PER_CASE:
        return _per_case({name: table for name, (table, _) in read.items()}, task, metrics)
    tables = _aligned(
        {n: from_table(table, n, kind or facts.get("label_kind")) for n, (table, facts) in read.items()}
    )
    names, first = list(tables), next(iter(tables.values()))
    values = [_values(one) for one in tables.values()]
    wanted = [m for m in values[0] if ":" not in m] if metrics is None else list(metrics)
    for m in wanted:
        one_of("no score", m, values[0], f" of {first.kind} labels")
    probability = [one.probability for one in tables.values()]
    drawn = [m for m in wanted if m.split(":")[0] != "auc"]

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
                found = _area_difference(tables[names[i]], tables[names[j]], metric)
            test = "bootstrap" if metric in drawn else "DeLong"
            one, other = values[i][metric], values[j][metric]
            rows.append((metric, names[i], names[j], one, other, *found[:4], math.nan, test, found.n))
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["p_holm"] = stats.holm(table.p.to_numpy())
    return table


def _area_difference(a: Predictions, b: Predictions, metric: str) -> stats.Difference:
    """An AUC of `a` less that of `b`: of one class, or the mean over those for which both are defined."""
    found, k, name = areas(a, b), len(a.ranked), metric.partition(":")[2]
    both = np.isfinite(found.auc[:k] + found.auc[k:])
    which = [a.ranked.index(name)] if name else np.flatnonzero(both).tolist()
    if not which:
        return stats.Difference(math.nan, math.nan, math.nan, math.nan, found.n)
    return stats.area_difference(found, which, [k + i for i in which])


def _read(name: str, source: Source, task: str | None) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The table of a result and what it says about it, wherever it is."""
    if isinstance(source, pd.DataFrame):
        return source, {}
    if isinstance(source, Result):
        return _first_training(source.table), source.facts | {"task": source.task}
    folder = Path(source)
    if folder.name == "summary.json":
        return dice_table(folder), {"task": "segment"}
    for place in [folder, *(folder / kind / task for kind in ("evaluation", "finetune") if task)]:
        if (place / "result.json").is_file():  # written last: the result is whole
            facts = json.loads((place / "result.json").read_text(encoding="utf-8"))
            text = {"case": str, "patient": str}
            # a class may be called "None"
            table = pd.read_csv(place / "table.csv", dtype=text, keep_default_na=False, na_values=[""])
            return _first_training(table), facts
    expected = f"result.json in it{f', or in evaluation/{task} or finetune/{task}' if task else ''}"
    raise DataError(f"{name} holds no result", path=folder, expected=expected, fix="evaluate it first")


def _first_training(table: pd.DataFrame) -> pd.DataFrame:
    """Of several trainings of fine-tuning, the first way to start with the most cases."""
    if "mode" not in table:
        return table
    table = table[table["mode"] == table["mode"].iloc[0]]
    if "shots" in table:
        table = table[table.shots == "all"]
    return table[table.fraction == table.fraction.max()] if "fraction" in table else table


def _per_case(tables: dict[str, pd.DataFrame], task: str, metrics: Sequence[str] | None) -> pd.DataFrame:
    """Paired differences of mean scores per case; a case of several structures counts by their mean."""
    keys, known = PER_CASE[task]
    wanted = [m for m in known if all(m in t for t in tables.values())] if metrics is None else list(metrics)
    for m in wanted:
        one_of("no score", m, known, f" of {task}")
    first, *others = (_scores(name, table, task, [*keys]) for name, table in tables.items())
    for name, one in zip(list(tables)[1:], others, strict=True):
        if not one.index.equals(first.index):
            raise DataError(f"{name} and {next(iter(tables))} hold different cases or structures")
    found, rows = dict(zip(tables, [first, *others], strict=True)), []
    for metric in wanted:
        for a, b in combinations(found, 2):
            both = pd.DataFrame({"a": found[a][metric], "b": found[b][metric]}).dropna()
            means = both.groupby(level=["case", "patient"]).mean()
            if means.empty:  # such as a lift within organs that have no label
                continue
            patients = means.index.get_level_values("patient").to_numpy()
            d = stats.paired_mean(means.a.to_numpy(), means.b.to_numpy(), patients)
            rows.append((metric, a, b, means.a.mean(), means.b.mean(), *d[:4], math.nan, "paired t", d.n))
    table = pd.DataFrame(rows, columns=COLUMNS)
    table["p_holm"] = stats.holm(table.p.to_numpy(float))
    return table


def _scores(name: str, table: pd.DataFrame, task: str, keys: list[str]) -> pd.DataFrame:
    """Rows by case, patient and structure, in order."""
    if missing := {*keys, "patient"} - set(table):
        raise DataError(f"{name} is not a table of {task}", found=f"no column {min(missing)!r}")
    if task in ONLY:
        column, value = ONLY[task]
        table = table[table[column] == value]
    return table.set_index([*keys, "patient"]).sort_index()


def _aligned(tables: dict[str, Predictions]) -> dict[str, Predictions]:
    """The same with their rows in the same order, refused unless they are of the same cases."""
    tables = {
        name: Predictions(one.kind, one.classes, *(a[np.argsort(one.case)] for a in one[2:]))
        for name, one in tables.items()
    }
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
