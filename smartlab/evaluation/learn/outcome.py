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

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import pandas as pd
from scipy.special import expit
from scipy.stats import rankdata

from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.clinical import Covariates, read_covariates
from smartlab.evaluation.features.table import FeatureTable
from smartlab.evaluation.judge import metrics, stats
from smartlab.evaluation.judge.compare import COLUMNS
from smartlab.evaluation.judge.predictions import areas, from_table, to_table
from smartlab.evaluation.judge.report import Pairs, align, check_varying, differences, holm_by_metric, report
from smartlab.evaluation.judge.result import Estimate, Result
from smartlab.evaluation.learn.folds import make_plan, present_classes, splits
from smartlab.evaluation.learn.linear import fit, fit_tuned, one_thread
from smartlab.evaluation.learn.survival import fit_cox, fit_cox_tuned

Pool = Literal["mean", "max"]
Rows = np.ndarray  # positions of patients
Folds = list[list[Rows]]  # of every repeat, the patients of every fold


class Scorer(Protocol):
    """A fitted model, and the C it was fitted with."""

    @property
    def strength(self) -> Any: ...

    def score(self, x: np.ndarray) -> np.ndarray: ...  # log odds or log hazards, (n,)


class Target(Protocol):
    """What is predicted: how to stratify it, and how to learn it from features of some patients."""

    @property
    def stratum(self) -> np.ndarray: ...  # (n,) int

    def tuned(self, x: np.ndarray, rows: Rows, seed: int) -> Scorer: ...

    def fixed(self, x: np.ndarray, rows: Rows, strength: Any) -> Scorer: ...


@dataclass(frozen=True)
class Binary:
    """One of two classes, by logistic regression."""

    stratum: np.ndarray

    def tuned(self, x: np.ndarray, rows: Rows, seed: int) -> Scorer:
        return fit_tuned(x, self.stratum[rows], ["0", "1"], rows, seed=seed)

    def fixed(self, x: np.ndarray, rows: Rows, strength: Any) -> Scorer:
        return fit(x, self.stratum[rows, None].astype(float), "sigmoid", strength)


@dataclass(frozen=True)
class FollowUp:
    """Time to an event (stratum 1) or to the end of follow-up (0), by Cox regression."""

    stratum: np.ndarray
    time: np.ndarray

    def tuned(self, x: np.ndarray, rows: Rows, seed: int) -> Scorer:
        return fit_cox_tuned(x, self.time[rows], self.stratum[rows], seed=seed)

    def fixed(self, x: np.ndarray, rows: Rows, strength: Any) -> Scorer:
        return fit_cox(x, self.time[rows], self.stratum[rows], strength)


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
    kept, patients, target, classes = target_of(table, label, event)
    features = {name: _pooled(x, kept, pool) for name, x in align(beside, kept).items()}
    for name, x in features.items():
        check_varying(name, x)
    if taken := {"covariates", "both"} & set(features):
        raise UseError("these names stand for our own models", found=", ".join(sorted(taken)))
    clinic = None if covariates is None else read_covariates(covariates, list(patients), columns)
    found, tests = _cross_validate(target, features, clinic, classes, folds, repeats, seed)
    facts = kept.facts | {
        "label": label,
        "unit": kept.specs[label].unit or "time",
        "classes": classes,
        "cases": len(kept),
        "patients": len(patients),
        "pool": f"{pool} over a patient's labelled rows",
        "covariates": clinic.summary() if clinic else None,
        "split": f"{folds}-fold cross-validation by patient, {repeats} times",
        "seed": seed,
    }
    pairs = [("features", name) for name in features if name != "features"]
    if clinic:
        pairs += [("both", "covariates"), ("both", "features")]
    if isinstance(target, Binary):
        return _report_binary(target, patients, found, tests, classes, facts, pairs, draws, seed)
    assert isinstance(target, FollowUp)
    return _report_follow_up(target, patients, found, tests, facts, pairs)


def target_of(
    table: FeatureTable, label: str, event: str | None
) -> tuple[FeatureTable, np.ndarray, Target, list[str]]:
    """Rows with the label, their patients in order, what to predict of these, and its classes."""
    kept, y, classes = table.labelled(label)
    kind = kept.specs[label].kind
    if kind == "time":
        kept, y, seen = _follow_up(kept, y, event)
        patients, values = _one_per_patient(kept, np.column_stack([y, seen]), label)
        target = FollowUp(values[:, 1].astype(int), values[:, 0])
        return kept, patients, target, ["censored", "event"]
    if kind in ("binary", "multiclass"):
        y, classes, _ = present_classes(y, classes, kept.specs[label])
    if len(classes) != 2 or y.ndim > 1:
        fix = "give the label of the time instead" if kind == "event" else "use `probe`"
        raise UseError("outcome needs two classes or a time", found=f"{label!r} of kind {kind}", fix=fix)
    patients, values = _one_per_patient(kept, y[:, None], label)
    return kept, patients, Binary(values[:, 0].astype(int)), classes


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
    if event not in named:
        raise UseError(f"label {event!r} is not of kind event", expected=f"one of {', '.join(named)}")
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
    classes: list[str],
    folds: int,
    repeats: int,
    seed: int,
) -> tuple[dict[str, np.ndarray], Folds]:
    """Scores of every patient by each model, (repeats, n), never by a model that saw the patient; and the folds."""
    n = len(target.stratum)
    about = pd.DataFrame({"patient": np.arange(n)})
    names = [*features, *(["covariates", "both"] if clinic else [])]
    scores = {name: np.empty((repeats, n)) for name in names}
    tests: Folds = []
    for r in range(repeats):
        plan = make_plan(about, target.stratum, classes, split="cross", folds=folds, seed=seed + r)
        tests.append([test for _, test in plan.pairs])
        for train, test in plan.pairs:
            models = {name: target.tuned(x[train], train, seed) for name, x in features.items()}
            for name, x in features.items():
                scores[name][r, test] = models[name].score(x[test])
            if clinic:
                known, asked = clinic.encode(train, train), clinic.encode(train, test)
                scores["covariates"][r, test] = target.tuned(known, train, seed).score(asked)
                learned = _out_of_fold(target, features["features"], train, models["features"].strength, seed)
                joint = target.tuned(np.column_stack([known, learned]), train, seed)
                scores["both"][r, test] = joint.score(np.column_stack([asked, scores["features"][r, test]]))
    return scores, tests


def _out_of_fold(target: Target, x: np.ndarray, train: Rows, strength: Any, seed: int) -> np.ndarray:
    """Image scores of the training patients, each by a model that did not see the patient."""
    out = np.empty(len(train))
    for a, b in splits(train, target.stratum[train], 3, seed):
        out[b] = target.fixed(x[train[a]], train[a], strength).score(x[train[b]])
    return out


def _in_order(target: FollowUp, scores: dict[str, np.ndarray], tests: Folds) -> np.ndarray:
    """(2, models, n): right and all pairs of every patient, within folds, over all repeats."""
    out = np.zeros((2, len(scores), len(target.time)))
    for k, found in enumerate(scores.values()):
        for one, own in zip(found, tests, strict=True):
            for test in own:
                out[:, k, test] += metrics.in_order(target.time[test], target.stratum[test] == 1, one[test])
    return out


def _standing(found: np.ndarray, tests: Folds) -> np.ndarray:
    """Between 0 and 1, (n,): the rank of each patient's risk within its fold, mean over repeats."""
    out = np.zeros(found.shape[1])
    for one, own in zip(found, tests, strict=True):
        for test in own:
            out[test] += rankdata(one[test]) / (len(test) + 1) / len(found)
    return out


def _report_binary(
    target: Binary,
    patients: np.ndarray,
    scores: dict[str, np.ndarray],
    tests: Folds,
    classes: list[str],
    facts: dict[str, Any],
    pairs: Pairs,
    draws: int,
    seed: int,
) -> Result:
    probability = {name: expit(found) for name, found in scores.items()}
    who, truth = list(patients), target.stratum
    predictions, ranges = {}, {}
    for name, found in probability.items():
        parts = [[(test, one[test]) for test in own] for one, own in zip(found, tests, strict=True)]
        each = [from_table(to_table("binary", who, who, truth, found.mean(0), classes, p)) for p in parts]
        aucs = [float(areas(one).auc[0]) for one in each]
        ranges[name] = [min(aucs), max(aucs)]
        predictions[name] = to_table(
            "binary", who, who, truth, found.mean(0), classes, [p for own in parts for p in own]
        )
    facts = facts | {"auc_over_repeats": ranges}
    return report("outcome", predictions, "binary", facts, pairs=pairs, draws=draws, seed=seed)


def _report_follow_up(
    target: FollowUp,
    patients: np.ndarray,
    scores: dict[str, np.ndarray],
    tests: Folds,
    facts: dict[str, Any],
    pairs: Pairs,
) -> Result:
    """Concordance of each model with its interval, differences, and a log-rank test of risk halves."""
    from scipy.stats import CensoredData, logrank

    standing = {name: _standing(found, tests) for name, found in scores.items()}
    right, pairs_of = _in_order(target, scores, tests)
    shares = stats.pair_shares(right, pairs_of, fewest=int(target.stratum.sum()))
    place = {name: i for i, name in enumerate(scores)}
    estimates: dict[str, dict[str, Estimate]] = {}
    results: dict[str, Estimate] = {}
    table = pd.DataFrame(
        {"case": patients, "patient": patients, "time": target.time, "event": target.stratum}
    )
    for name, one in standing.items():
        found = stats.mean_area(shares, [place[name]])
        high = one > np.median(one)
        halves = [
            CensoredData(target.time[h & e], right=target.time[h & ~e])
            for h in (high, ~high)
            for e in [target.stratum == 1]
        ]
        p = float(logrank(*halves).pvalue) if high.any() else np.nan
        prefix = "" if name == "features" else f"{name}/"
        estimates[name] = {"concordance": found}
        results |= {f"{prefix}concordance": found, f"{prefix}log_rank_p": Estimate(p, n=len(patients))}
        table[f"{prefix}risk"] = scores[name].mean(0)
    rows = []
    for a, b in pairs:
        d = stats.area_difference(shares, [place[a]], [place[b]])
        values = estimates[a]["concordance"].value, estimates[b]["concordance"].value
        rows.append(("concordance", a, b, *values, *d[:4], np.nan, "pairs", d.n))
    compared = holm_by_metric(pd.DataFrame(rows, columns=COLUMNS))
    facts = facts | {
        "events": int(target.stratum.sum()),
        "interval": "95%, over patients; the fitted models are kept as they are",
        "comparisons": compared.to_dict("records"),
    }

    def draw() -> Any:
        from smartlab.evaluation.judge.figures import follow_up

        shown = ["features", "both"] if "both" in scores else ["features"]
        p = {name: results[("" if name == "features" else f"{name}/") + "log_rank_p"].value for name in shown}
        return follow_up(
            target.time, target.stratum == 1, {n: standing[n] for n in shown}, p, estimates, compared, facts
        )

    return Result("outcome", results | differences(compared, "features"), table, draw, facts)
