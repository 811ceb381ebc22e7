"""Outcome of a patient from images, with or without clinical covariates, in small cohorts.

A patient's features are the mean or maximum over the patient's rows that carry the label. Every model is
cross-validated several times with other deals of patients: "features" alone, "covariates" alone, "both", and
whatever stands `beside`. AUC and concordance are means over the repeats, each scored within its folds
(`folds.py`); other scores are of a patient's predictions, averaged over the repeats. For "both"
the image is one more covariate: its score, made out of fold for the patients that the second model learns
from, so that hundreds of features do not drown three covariates.

Intervals are over patients; they do not hold how much other deals of the
folds would change them, which stands in the facts as the range over repeats.

A label of kind "binary" gives logistic regression and the scores of `probe`; a label of kind "time" with
one of kind "event" gives Cox regression, Harrell's concordance and Kaplan–Meier curves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import CensoredData, logrank, rankdata

from smartlab.core.errors import DataError, UseError, one_of
from smartlab.data.cohort.clinical import Covariates, read_covariates
from smartlab.evaluation.features.table import FeatureTable
from smartlab.evaluation.judge import metrics, stats
from smartlab.evaluation.judge.compare import COLUMNS
from smartlab.evaluation.judge.figures import follow_up
from smartlab.evaluation.judge.predictions import Part, areas, from_table, to_table
from smartlab.evaluation.judge.report import Pairs, align, check_varying, differences, holm_by_metric, report
from smartlab.evaluation.judge.result import Estimate, Result
from smartlab.evaluation.learn.folds import make_plan, present_classes, splits
from smartlab.evaluation.learn.linear import Linear, fit, fit_tuned, one_thread
from smartlab.evaluation.learn.survival import Cox, fit_cox, fit_cox_tuned
from smartlab.evaluation.task import OnFeatures

Pool = Literal["mean", "max"]
Rows = np.ndarray  # positions of patients
Folds = list[list[Rows]]  # of every repeat, the patients of every fold


@dataclass(frozen=True)
class Target:
    """What is predicted: one of two classes by logistic regression, or the time to an event by Cox regression."""

    stratum: np.ndarray  # (n,) int: the class, or whether there was an event
    classes: list[str]
    time: np.ndarray | None = None  # to the event, or to the end of follow-up

    def fit(self, x: np.ndarray, rows: Rows, seed: int = 0, strength: Any = None) -> Linear | Cox:
        """Learn from the features of some patients; C is chosen by folds of them, unless given."""
        y = self.stratum[rows]
        if self.time is not None:
            time = self.time[rows]
            return fit_cox_tuned(x, time, y, seed=seed) if strength is None else fit_cox(x, time, y, strength)
        if strength is None:
            return fit_tuned(x, y, self.classes, rows, seed=seed)
        return fit(x, y[:, None].astype(float), "sigmoid", strength)


class Study(NamedTuple):
    """What was predicted: scores (log odds or log hazards) of every patient by each model, (repeats, n), never
    by a model that saw the patient; the folds of every repeat; which models are compared."""

    target: Target
    patients: np.ndarray
    scores: dict[str, np.ndarray]
    tests: Folds
    pairs: Pairs


@one_thread
def outcome(
    table: FeatureTable,
    label: str,
    *,
    event: str | None = None,
    covariates: str | Path | None = None,
    columns: Sequence[str] | None = None,
    pool: Pool = "mean",
    beside: dict[str, FeatureTable] | None = None,
    folds: int = 5,
    repeats: int = 20,
    seed: int = 0,
    draws: int = 1000,
) -> Result:
    """Predict a label of patients by repeated stratified cross-validation.

    covariates: a CSV with a column "patient"; columns: which of its columns (all, if left out). event:
    the label that says whether a time ended in an event, where the manifest has several.

    >>> outcome(table, "time_months", covariates="clinic.csv").metrics["concordance"]
    """
    if pool not in ("mean", "max") or repeats < 1:
        raise UseError("pool must be mean or max, repeats at least 1", found=f"{pool}, {repeats}")
    kept, patients, target = target_of(table, label, event)
    features = {name: _pooled(x, kept, pool) for name, x in align(beside, kept).items()}
    for name, x in features.items():
        check_varying(name, x)
    if taken := {"covariates", "both"} & set(features):
        raise UseError("these names stand for our own models", found=", ".join(sorted(taken)))
    clinic = None if covariates is None else read_covariates(covariates, list(patients), columns)
    pairs = [("features", name) for name in features if name != "features"]
    if clinic:
        pairs += [("both", "covariates"), ("both", "features")]
    scores, tests = _cross_validate(target, features, clinic, folds, repeats, seed)
    facts = kept.facts | {
        "label": label,
        "unit": kept.specs[label].unit or "time",
        "classes": target.classes,
        "cases": len(kept),
        "patients": len(patients),
        "pool": f"{pool} over a patient's labelled rows",
        "covariates": clinic.summary() if clinic else None,
        "split": f"{folds}-fold cross-validation by patient, {repeats} times",
        "seed": seed,
    }
    study = Study(target, patients, scores, tests, pairs)
    if target.time is not None:
        return _report_follow_up(study, target.time, facts)
    return _report_binary(study, facts, draws, seed)


def target_of(table: FeatureTable, label: str, event: str | None) -> tuple[FeatureTable, np.ndarray, Target]:
    """Rows with the label, their patients in order, and what to predict of these."""
    kept, y, classes = table.labelled(label)
    kind = kept.specs[label].kind
    if kind == "time":
        kept, y, seen = _follow_up(kept, y, event)
        patients, values = _one_per_patient(kept, np.column_stack([y, seen]), label)
        return kept, patients, Target(values[:, 1].astype(int), ["censored", "event"], values[:, 0])
    if kind in ("binary", "multiclass"):
        y, classes, _ = present_classes(y, classes, kept.specs[label])
    if len(classes) != 2 or y.ndim > 1:
        fix = "give the label of the time instead" if kind == "event" else "use `probe`"
        raise UseError("outcome needs two classes or a time", found=f"{label!r} of kind {kind}", fix=fix)
    patients, values = _one_per_patient(kept, y[:, None], label)
    return kept, patients, Target(values[:, 0].astype(int), classes)


def _follow_up(
    kept: FeatureTable, time: np.ndarray, event: str | None
) -> tuple[FeatureTable, np.ndarray, np.ndarray]:
    """Rows whose event is known too, their times and events (0 or 1)."""
    named = [name for name, spec in kept.specs.items() if spec.kind == "event"]
    if event is None and len(named) != 1:
        raise UseError(
            "which label says whether follow-up ended in an event?",
            found=f"{len(named)} labels of kind event{': ' + ', '.join(named) if named else ''}",
            fix="name it: event=…" if named else "add one to the manifest",
        )
    event = event or named[0]
    one_of("label", event, named, " is not of kind event")
    column = pd.to_numeric(kept.about[f"label:{event}"], errors="coerce").to_numpy(float)
    known = np.isfinite(column)
    kept, time, seen = kept.take(known), time[known], column[known]
    if not np.isin(seen, [0, 1]).all() or (time < 0).any():
        raise DataError("follow-up needs times from 0 on, and events that are 0 or 1")
    if len(set(seen)) < 2:
        raise DataError(
            "follow-up cannot be evaluated",
            found=f"{len(seen)} cases, {'all' if len(seen) and seen[0] else 'none'} with an event",
            expected="both events and censored patients",
        )
    return kept, time, seen


def _one_per_patient(kept: FeatureTable, values: np.ndarray, label: str) -> tuple[np.ndarray, np.ndarray]:
    """Patients in order and the values (n, k) that all of a patient's rows agree on."""
    patients, first, owner = np.unique(
        kept.about.patient.to_numpy(str), return_index=True, return_inverse=True
    )
    if (differing := (values != values[first][owner]).any(1)).any():
        raise DataError(
            f"patients have more than one value of {label!r}",
            found=f"{len(set(owner[differing]))} patients",
            expected="one outcome per patient",
            fix="use `probe` for labels of single lesions",
        )
    return patients, values[first]


def _pooled(x: np.ndarray, kept: FeatureTable, pool: Pool) -> np.ndarray:
    """Features of patients (n, d), in the order of `_one_per_patient`."""
    groups = pd.DataFrame(x).groupby(kept.about.patient.to_numpy(str), sort=True)
    return (groups.mean() if pool == "mean" else groups.max()).to_numpy()


def _cross_validate(
    target: Target,
    features: dict[str, np.ndarray],
    clinic: Covariates | None,
    folds: int,
    repeats: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], Folds]:
    """The scores and folds of a `Study`."""
    n = len(target.stratum)
    about = pd.DataFrame({"patient": np.arange(n)})
    names = [*features, *(["covariates", "both"] if clinic else [])]
    scores = {name: np.empty((repeats, n)) for name in names}
    tests: Folds = []
    for r in range(repeats):
        plan = make_plan(about, target.stratum, target.classes, split="cross", folds=folds, seed=seed + r)
        tests.append([test for _, test in plan.pairs])
        for train, test in plan.pairs:
            models = {name: target.fit(x[train], train, seed) for name, x in features.items()}
            for name, x in features.items():
                scores[name][r, test] = models[name].score(x[test])
            if clinic:
                known, asked = clinic.encode(train, train), clinic.encode(train, test)
                scores["covariates"][r, test] = target.fit(known, train, seed).score(asked)
                learned = _out_of_fold(target, features["features"], train, models["features"].strength, seed)
                joint = target.fit(np.column_stack([known, learned]), train, seed)
                scores["both"][r, test] = joint.score(np.column_stack([asked, scores["features"][r, test]]))
    return scores, tests


def _out_of_fold(target: Target, x: np.ndarray, train: Rows, strength: Any, seed: int) -> np.ndarray:
    """Image scores of the training patients, each by a model that did not see the patient."""
    out = np.empty(len(train))
    for a, b in splits(train, target.stratum[train], 3, seed):
        out[b] = target.fit(x[train[a]], train[a], strength=strength).score(x[train[b]])
    return out


def _standing(found: np.ndarray, tests: Folds) -> np.ndarray:
    """Between 0 and 1, (n,): the rank of each patient's risk within its fold, mean over repeats."""
    out = np.zeros(found.shape[1])
    for one, own in zip(found, tests, strict=True):
        for test in own:
            out[test] += rankdata(one[test]) / (len(test) + 1) / len(found)
    return out


def _report_binary(study: Study, facts: dict[str, Any], draws: int, seed: int) -> Result:
    def table(found: np.ndarray, parts: list[Part]) -> pd.DataFrame:
        who, truth = list(study.patients), study.target.stratum
        return to_table("binary", who, who, truth, found.mean(0), study.target.classes, parts)

    predictions, ranges = {}, {}
    for name, scores in study.scores.items():
        found = expit(scores)
        parts = [[(rows, one[rows]) for rows in own] for one, own in zip(found, study.tests, strict=True)]
        aucs = [float(areas(from_table(table(found, each))).auc[0]) for each in parts]
        ranges[name] = [min(aucs), max(aucs)]
        predictions[name] = table(found, [part for each in parts for part in each])
    facts = facts | {"auc_over_repeats": ranges}
    return report("outcome", predictions, "binary", facts, pairs=study.pairs, draws=draws, seed=seed)


def _report_follow_up(study: Study, time: np.ndarray, facts: dict[str, Any]) -> Result:
    """Concordance of each model with its interval, differences, and a log-rank test of risk halves."""
    event, names = study.target.stratum == 1, list(study.scores)
    counts = np.zeros((2, len(names), len(time)))  # right and all pairs of every patient, within folds
    for k, scores in enumerate(study.scores.values()):
        for one, own in zip(scores, study.tests, strict=True):
            for rows in own:
                counts[:, k, rows] += metrics.in_order(time[rows], event[rows], one[rows])
    shares = stats.pair_shares(counts[0], counts[1], fewest=int(event.sum()))
    standing = {name: _standing(scores, study.tests) for name, scores in study.scores.items()}
    estimates = {name: {"concordance": stats.mean_area(shares, [k])} for k, name in enumerate(names)}
    results: dict[str, Estimate] = {}
    table = pd.DataFrame({"case": study.patients, "patient": study.patients, "time": time})
    table["event"] = study.target.stratum
    for name, one in standing.items():
        prefix = "" if name == "features" else f"{name}/"
        results |= {f"{prefix}concordance": estimates[name]["concordance"]}
        results |= {f"{prefix}log_rank_p": Estimate(_log_rank(time, event, one), n=len(time))}
        table[f"{prefix}risk"] = study.scores[name].mean(0)
    found = []
    for a, b in study.pairs:
        d = stats.area_difference(shares, [names.index(a)], [names.index(b)])
        values = estimates[a]["concordance"].value, estimates[b]["concordance"].value
        found.append(("concordance", a, b, *values, *d[:4], np.nan, "pairs", d.n))
    compared = holm_by_metric(pd.DataFrame(found, columns=COLUMNS))
    facts = facts | {
        "events": int(event.sum()),
        "interval": "95%, over patients; the fitted models are kept as they are",
        "comparisons": compared.to_dict("records"),
    }
    shown = {name: one for name, one in standing.items() if name in ("features", "both")}
    p = {name: results["both/log_rank_p" if name == "both" else "log_rank_p"].value for name in shown}
    draw = partial(follow_up, time, event, shown, p, estimates, compared, facts)
    return Result("outcome", results | differences(compared, "features"), table, draw, facts)


def _log_rank(time: np.ndarray, event: np.ndarray, risk: np.ndarray) -> float:
    """p of the log-rank test of the patients above the median risk and the others."""
    high = risk > np.median(risk)
    halves = [CensoredData(time[half & event], right=time[half & ~event]) for half in (high, ~high)]
    return float(logrank(*halves).pvalue) if high.any() else np.nan


def _ask(table: FeatureTable, label: str, settings: Mapping[str, Any]) -> None:
    _, patients, target = target_of(table, label, settings.get("event"))
    about, folds = pd.DataFrame({"patient": patients}), settings.get("folds", 5)
    make_plan(about, target.stratum, target.classes, folds=folds, split="cross")


TASKS = {
    "outcome": OnFeatures(
        outcome, headline="auc|concordance", kinds=("binary", "multiclass", "time"), ask=_ask
    )
}
