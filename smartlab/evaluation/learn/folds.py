"""Which rows a model learns from and which it predicts: always whole patients, every row predicted.

Where the manifest has an official test split, train and val learn and test is predicted; where it has
official folds, those are used; else patients are dealt to folds, stratified by their labels, and every
row is predicted by the model that did not see its patient. A cross-validation may be repeated with
other deals; predictions of a row are then averaged. Where a manifest has a test split and folds of the
rest, "held-out" predicts the test by a model for each fold, none of which saw it, and averages.

Models of different folds do not share a zero: each has learned the mean of the others' patients, so that a
patient is scored against a mean without itself. Over all folds together scores then lie on the wrong side
by chance alone, and an AUC of useless features is about 0.45. What counts an order counts it within
folds (`predictions.py`).

Labels come as `FeatureTable.labelled` gives them: (n,) integers are classes, (n, classes) is
multi-label, (n,) floats are numbers (stratified by quintile).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd

from smartlab.core.errors import DataError, UseError, one_of
from smartlab.data.cohort.case import LabelSpec
from smartlab.evaluation.judge.predictions import Part

Split = Literal["auto", "official", "folds", "cross", "held-out"]
Rows = np.ndarray  # positions of rows


@dataclass(frozen=True)
class Plan:
    """Pairs of (rows to learn from, rows to predict), and how they came about."""

    pairs: list[tuple[Rows, Rows]]
    how: str
    official: bool = True  # given by the manifest, not dealt here

    @property
    def predicted(self) -> Rows:
        """The rows that get a prediction, in order."""
        return np.unique(np.concatenate([test for _, test in self.pairs]))

    def run(self, fit_and_predict: Callable[[Rows, Rows], np.ndarray]) -> list[Part]:
        """Predictions of every pair, at the positions of its rows in `predicted`."""
        rows = self.predicted
        return [(np.searchsorted(rows, test), fit_and_predict(train, test)) for train, test in self.pairs]

    def predict(self, fit_and_predict: Callable[[Rows, Rows], np.ndarray]) -> np.ndarray:
        """Run every pair; predictions of the rows in `predicted`, averaged over repeats."""
        return averaged(self.run(fit_and_predict))


def averaged(parts: Sequence[Part]) -> np.ndarray:
    """One prediction a row, from those of every fold of every repeat."""
    rows, values = np.concatenate([at for at, _ in parts]), np.concatenate([found for _, found in parts])
    total = np.zeros((rows.max() + 1, *values.shape[1:]))
    np.add.at(total, rows, values)
    return total / np.bincount(rows).reshape(-1, *[1] * (total.ndim - 1))


def deal(patients: np.ndarray, y: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """A fold for each row, (n,) integers: patients shuffled, sorted by their labels, dealt like cards.

    Patients with the rarest labels come first, so that a label that fills a run of `folds` patients or
    more reaches every fold; fold sizes differ by at most one patient.
    """
    names, owner = np.unique(patients, return_inverse=True)
    if folds < 2 or len(names) < folds:
        raise UseError(
            "cannot deal patients to folds",
            found=f"{len(names)} patient(s), folds={folds}",
            expected="at least two folds, and at least one patient for each",
        )
    strata = _strata(owner, y)
    shuffled = np.random.default_rng(seed).permutation(len(names))
    order = sorted(shuffled, key=lambda patient: strata[patient])  # stable: random within a stratum
    fold = np.empty(len(names), int)
    fold[order] = np.arange(len(names)) % folds
    return fold[owner]


def splits(patients: np.ndarray, y: np.ndarray, folds: int, seed: int) -> Iterator[tuple[Rows, Rows]]:
    """(train, test) rows of every fold of one deal."""
    fold = deal(patients, y, folds, seed)
    for k in range(folds):
        yield np.flatnonzero(fold != k), np.flatnonzero(fold == k)


def learned_and_judged(patients: np.ndarray, folds: int, seed: int) -> list[tuple[Rows, Rows]]:
    """(rows to learn from, rows to judge) without labels: no patient in both, every row judged once."""
    if folds < 2:
        raise UseError(f"folds={folds}", expected="two or more")
    names = np.random.default_rng(seed).permutation(np.unique(patients))
    held = [np.isin(patients, part) for part in np.array_split(names, min(folds, len(names)))]
    return [(np.flatnonzero(~own), np.flatnonzero(own)) for own in held]


def nested(patients: np.ndarray, y: np.ndarray, rows: Rows, fraction: float, seed: int) -> Rows:
    """Rows of a share of the patients, stratified by their labels: a smaller share lies in every larger."""
    names, owner = np.unique(patients[rows], return_inverse=True)
    strata = _strata(owner, y[rows])
    members: dict[tuple[int, ...], int] = {}
    place = np.empty(len(names))  # of a patient in its stratum, 0 to 1
    order = np.random.default_rng(seed).permutation(len(names))
    for patient in order:
        members[strata[patient]] = members.get(strata[patient], 0) + 1
        place[patient] = members[strata[patient]] - 0.5
    place /= [members[stratum] for stratum in strata]
    first = order[np.argsort(place[order], kind="stable")][: max(1, round(fraction * len(names)))]
    return rows[np.isin(owner, first)]


def support(
    patients: np.ndarray, y: np.ndarray, classes: int, generator: np.random.Generator
) -> list[np.ndarray]:
    """For each class, rows of as many different patients as have it, one each, in random order.

    y: (n,) positions of classes, or (n, classes) 0 or 1. The first k of each are the support of k shots,
    for every k.
    """
    has = y == 1 if y.ndim == 2 else y[:, None] == np.arange(classes)
    order = generator.permutation(len(y))  # random rows, so a random row of each patient comes first
    chosen = []
    for k in range(classes):
        rows = order[has[order, k]]
        _, first = np.unique(patients[rows], return_index=True)
        chosen.append(generator.permutation(rows[first]))
    return chosen


def make_plan(
    about: pd.DataFrame,
    y: np.ndarray,
    classes: list[str],
    *,
    split: Split = "auto",
    folds: int = 5,
    repeats: int = 1,
    seed: int = 0,
) -> Plan:
    """The plan for rows with columns patient, split and fold; refuses what cannot be evaluated.

    split: "official" and "folds" are the manifest's, "cross" deals patients anew; "auto" takes the first
    of these that there is. "held-out" is both of the manifest's: its test, and its folds of the others.
    """
    one_of("no split", split, get_args(Split))
    if repeats < 1:
        raise UseError(f"repeats={repeats}", expected="at least 1")
    patients = about.patient.to_numpy()
    official = set(about["split"].dropna()) if "split" in about else set()
    fold = about["fold"] if "fold" in about else pd.Series(np.nan, about.index)
    if split == "official" or (split == "auto" and "test" in official and official - {"test"}):
        known = about["split"].to_numpy() if "split" in about else np.full(len(about), None, object)
        test = np.flatnonzero(known == "test")
        train = np.flatnonzero(np.isin(known.astype(str), ["train", "val"]))
        plan = Plan([(train, test)], "official split: learned on train and val, predicted test")
    elif split == "held-out":
        held = (about["split"] == "test").to_numpy()
        values = sorted(fold[~held].dropna().unique())
        pairs = [(np.flatnonzero(~held & (fold != k) & fold.notna()), np.flatnonzero(held)) for k in values]
        plan = Plan(
            pairs, f"test set held out, predicted by the mean of {len(values)} models, each without a fold"
        )
    elif split == "folds" or (split == "auto" and fold.notna().all() and fold.nunique() > 1):
        values = sorted(fold.dropna().unique())
        pairs = [(np.flatnonzero((fold != k) & fold.notna()), np.flatnonzero(fold == k)) for k in values]
        plan = Plan(pairs, f"the manifest's {len(values)} folds")
    else:
        check_classes(patients, y, classes, folds)
        pairs = [p for r in range(repeats) for p in splits(patients, y, folds, seed + r)]
        often = f", {repeats} times" if repeats > 1 else ""
        plan = Plan(pairs, f"{folds}-fold cross-validation by patient{often}", official=False)
    _check(plan, patients, y, classes)
    return plan


def check_classes(patients: np.ndarray, y: np.ndarray, classes: list[str], folds: int) -> None:
    """Every class, and in multi-label data its absence, needs as many patients as there are folds."""
    if len(set(patients)) < folds:
        raise DataError(
            "fewer patients than folds",
            found=f"{len(set(patients))} patient(s)",
            expected=f"at least {folds}",
            fix="use fewer folds or more patients",
        )
    for name, has in _memberships(y, classes):
        with_label = len(set(patients[has]))
        if with_label < folds:
            raise DataError(
                f"too few patients for {folds} folds",
                found=f"{with_label} patient(s) {name}",
                expected=f"at least {folds}",
                fix="use fewer folds, merge classes or add patients",
            )


def present_classes(
    y: np.ndarray, classes: list[str], spec: LabelSpec
) -> tuple[np.ndarray, list[str], list[str]]:
    """Leave out classes that no case has -> (labels, classes, absent classes). One class is an error."""
    if spec.kind == "number":
        return y, classes, []
    counts = y.sum(0) if y.ndim == 2 else np.bincount(y, minlength=len(classes))
    keep = counts > 0
    present = [name for name, here in zip(classes, keep, strict=True) if here]
    absent = [name for name, here in zip(classes, keep, strict=True) if not here]
    if y.ndim == 2:
        return y[:, keep], present, absent
    if len(present) < 2:
        raise DataError(
            "only one class in these cases",
            found=f"{len(y)} cases, all {present[0]!r}",
            expected=f"at least two of {', '.join(classes)}",
        )
    return (np.cumsum(keep) - 1)[y], present, absent


def _memberships(y: np.ndarray, classes: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """What must be on both sides of a split: (description, rows (n,) bool) of classes."""
    if y.ndim == 2:
        for k, name in enumerate(classes):
            yield f"with {name!r}", y[:, k] == 1
            yield f"without {name!r}", y[:, k] == 0
    elif y.dtype.kind in "iu":
        for k, name in enumerate(classes):
            yield f"of class {name!r}", y == k


def _check(plan: Plan, patients: np.ndarray, y: np.ndarray, classes: list[str]) -> None:
    if not plan.pairs:
        raise UseError("the manifest has no folds", fix='use split="cross"')
    for train, test in plan.pairs:
        if not len(train) or not len(test):
            raise DataError(
                f"nothing to {'predict' if len(train) else 'learn from'} in a split",
                found=f"{len(train)} training and {len(test)} test cases ({plan.how})",
                fix='use split="cross"',
            )
        if shared := set(patients[train]) & set(patients[test]):
            raise DataError("patients are in both training and test", found=f"{len(shared)} patient(s)")
        for name, has in _memberships(y, classes):
            if not has[train].any():
                raise DataError(
                    "a class cannot be learned",
                    found=f"no training case {name} ({plan.how})",
                    fix="use fewer folds, merge classes or another split",
                )
    rows = plan.predicted
    if y.ndim == 1 and len(classes) > 1 and len(set(y[rows])) < 2:
        raise DataError(
            "only one class among the cases to predict",
            found=f"{len(rows)} cases, all {classes[y[rows[0]]]!r} ({plan.how})",
            fix='use split="cross"',
        )


def _strata(owner: np.ndarray, y: np.ndarray) -> list[tuple[int, ...]]:
    """For each patient what labels it has, the rarest first, as a key to sort by."""
    if y.ndim == 1 and y.dtype.kind == "f":
        mean = np.bincount(owner, y) / np.bincount(owner)
        edges = np.quantile(mean, [0.2, 0.4, 0.6, 0.8])
        return [(int(k),) for k in np.searchsorted(edges, mean)]
    member = y > 0 if y.ndim == 2 else y[:, None] == np.arange(y.max() + 1)
    has = np.zeros((owner.max() + 1, member.shape[1]), bool)  # patient × class
    np.logical_or.at(has, owner, member)
    rank = np.argsort(np.argsort(has.sum(0), kind="stable"))
    return [tuple(sorted(rank[row])) or (len(rank),) for row in has]
