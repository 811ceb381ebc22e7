"""How much a few labelled patients already teach: linear probes on k cases per class, many times.

Each draw sets patients aside for testing (the official test split where there is one), puts the others
in a random order and takes, for each class, one case of each of the first k patients that have it. So
supports grow: those of k = 1 are in those of k = 2; within a draw every k, and every set of features, is
tested on the same patients, and no patient is ever in both support and test.

Where a case may carry several classes, the k cases of each class are drawn in the same way and put
together, each counted once: fewer cases where some serve several classes. One model per class learns from
all of them; a class that all of them carry is not learned, every case gets the same probability.

The interval of a mean is the middle 95% of the draws: where a single study with k cases per class would
land. It is not a confidence interval of the mean: draws share patients and are not independent. For the
same reason differences come with the share of draws that one set of features wins, not with a p-value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from smartlab.core.errors import DataError, UseError
from smartlab.evaluation.features.table import FeatureTable
from smartlab.evaluation.judge import figures, metrics
from smartlab.evaluation.judge.report import align, check_varying
from smartlab.evaluation.judge.result import Estimate, Result
from smartlab.evaluation.learn.folds import Split, make_plan, support
from smartlab.evaluation.learn.labels import CLASSED, can_be_split, labelled
from smartlab.evaluation.learn.linear import fit, one_thread, standard, targets
from smartlab.evaluation.task import OnFeatures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SHOTS = (1, 2, 5, 10, 20, 50)
SCORES = ("auc", "average_precision", "accuracy", "balanced_accuracy", "brier")


@one_thread
def fewshot(
    table: FeatureTable,
    label: str,
    *,
    shots: Sequence[int] = SHOTS,
    draws: int = 50,
    test_folds: int = 3,
    strength: float = 1.0,
    beside: dict[str, FeatureTable] | None = None,
    split: Split = "auto",
    seed: int = 0,
) -> Result:
    """Scores over draws, for each k that the classes allow; a row per draw, k and set of features.

    Without an official test split, one of `test_folds` stratified folds of patients is the test of a
    draw. Features are standardised with the mean and spread of the patients not in the test, without
    their labels, and scaled to a mean square length of one; C (`strength`) is fixed, because a few
    cases cannot choose it.
    """
    kept, y, classes, absent = labelled(table, label)
    kind = kept.specs[label].kind
    if kind not in CLASSED:
        raise UseError(f"few-shot needs classes, and label {label!r} is of kind {kind}")
    if len(classes) < 2:
        raise DataError("few-shot needs at least two classes", found=", ".join(classes))
    if draws < 20:
        raise UseError("too few draws to tell how much they differ", found=draws, expected="at least 20")
    features = align(beside, kept)
    for name, x in features.items():
        check_varying(name, x)
    patients = kept.about.patient.to_numpy()
    if not shots or min(shots) < 1:
        raise UseError("shots count cases per class, from 1 on", found=list(shots))
    how, tests = _tests(kept, y, classes, split, test_folds, draws, seed)
    results = _score(kind, features, y, patients, classes, tests, shots, strength, seed)
    possible = set(results.k)
    if not len(results):
        raise DataError(f"a class has fewer than {min(shots)} patients to learn from")
    facts = kept.facts | {
        "label": label,
        "label_kind": kind,
        "classes": classes,
        "absent_classes": absent,
        "cases": len(kept),
        "patients": len(set(patients)),
        "shots": sorted(possible),
        "shots_left_out": sorted(set(shots) - possible),
        "shots_left_out_because": "a class has fewer patients than k outside the test",
        "test": how,
        "draws": draws,
        "seed": seed,
        "model": f"logistic regression, C = {strength} on features of unit length",
        "interval": "middle 95% of draws: where one study of this size may land; draws share patients",
        "comparisons": _wins(results),
    }
    return Result("fewshot", _summary(results), results, lambda: _draw(results, facts), facts)


def _score(
    kind: str,
    features: dict[str, np.ndarray],
    y: np.ndarray,
    patients: np.ndarray,
    classes: list[str],
    tests: list[tuple[np.ndarray, np.ndarray]],
    shots: Sequence[int],
    strength: float,
    seed: int,
) -> pd.DataFrame:
    """A row per draw, k and set of features, for every k that all draws allow."""
    kind = "binary" if kind == "multiclass" and len(classes) == 2 else kind  # the others are absent
    rows: list[dict[str, Any]] = []
    possible = set(shots)
    for draw, (pool, test) in enumerate(tests):
        chosen = support(patients[pool], y[pool], len(classes), np.random.default_rng([seed, draw]))
        possible &= {k for k in shots if k <= min(map(len, chosen))}
        for name, x in features.items():
            z_pool, z_test = _scaled(x[pool], x[test])
            for k in sorted(possible):
                few = np.unique(np.concatenate([rows_of_class[:k] for rows_of_class in chosen]))
                found = _predict(z_pool[few], y[pool][few], classes, z_test, strength)
                scored = metrics.scores(kind, y[test], found, classes)
                rows.append({"features": name, "k": k, "draw": draw} | {m: scored[m] for m in SCORES})
    results = pd.DataFrame(rows, columns=["features", "k", "draw", *SCORES])
    return results[results.k.isin(possible)].reset_index(drop=True)


def _tests(
    table: FeatureTable, y: np.ndarray, classes: list[str], split: Split, folds: int, draws: int, seed: int
) -> tuple[str, list[tuple[np.ndarray, np.ndarray]]]:
    """How patients are set aside, and (pool, test) of every draw; official folds take turns."""
    plan = make_plan(table.about, y, classes, split=split, folds=folds, seed=seed)
    if plan.official:
        return plan.how, [plan.pairs[draw % len(plan.pairs)] for draw in range(draws)]
    dealt = [
        make_plan(table.about, y, classes, split="cross", folds=folds, seed=seed + d) for d in range(draws)
    ]
    how = f"one of {folds} stratified parts of the patients, dealt anew for each draw"
    return how, [plan.pairs[d % folds] for d, plan in enumerate(dealt)]


def _scaled(pool: np.ndarray, test: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Standardised by the pool, and divided by the root of the number of features."""
    mean, scale = standard(pool)
    scale = scale / np.sqrt(pool.shape[1])
    return (pool - mean) * scale, (test - mean) * scale


def _predict(
    z: np.ndarray, y: np.ndarray, classes: list[str], z_test: np.ndarray, strength: float
) -> np.ndarray:
    target, family = targets(y, classes)
    found = np.tile(target.mean(0), (len(z_test), 1))
    varied = target.min(0) < target.max(0)  # one class of several may be in every case of a small support
    if varied.any():
        found[:, varied] = fit(z, target[:, varied], family, strength, standardise=False).predict(z_test)
    return found[:, 0] if y.ndim == 1 and len(classes) == 2 else found


def _summary(results: pd.DataFrame) -> dict[str, Estimate]:
    """Means over draws: "auc@5" for the features in question, "volume/auc@5" for others."""
    out = {}
    for name, of_name in results.groupby("features", sort=False):
        for metric in SCORES:
            for k, part in of_name.groupby("k"):
                key = f"{metric}@{k}" if name == "features" else f"{name}/{metric}@{k}"
                out[key] = _middle(part[metric].to_numpy())
    return out


def _middle(values: np.ndarray) -> Estimate:
    known = values[np.isfinite(values)]
    if not len(known):
        return Estimate(np.nan)
    low, high = np.quantile(known, [0.025, 0.975])
    return Estimate(float(known.mean()), float(low), float(high), len(known))


def _wins(results: pd.DataFrame) -> list[dict[str, Any]]:
    """For every k and other set of features: mean difference of AUC, its middle 95%, share of draws won."""
    wide = results.pivot(index=["k", "draw"], columns="features", values="auc")
    out = []
    for name in [n for n in results.features.unique() if n != "features"]:
        for k, difference in (wide["features"] - wide[name]).groupby(level="k"):
            one = _middle(difference.to_numpy())
            won = float((difference > 0).mean() + (difference == 0).mean() / 2)
            out.append({"metric": "auc", "k": int(k), "b": name} | one._asdict() | {"draws_won": won})
    return out


def _draw(results: pd.DataFrame, facts: dict[str, Any]) -> Figure:
    """AUC and balanced accuracy against cases per class: mean, and the middle 95% of draws as bars."""
    shade = figures.colours(list(results.features.unique()))
    figure, (axes,) = figures.panels(2, 5, 4.4)
    for ax, metric in zip(axes, ("auc", "balanced_accuracy"), strict=True):
        alone = metric == "auc" or facts["label_kind"] == "multilabel"
        ax.axhline(0.5 if alone else 1 / len(facts["classes"]), **figures.DOTTED)
        for i, (name, part) in enumerate(results.groupby("features", sort=False)):
            found = [_middle(p[metric].to_numpy()) for _, p in part.groupby("k")]
            at = np.array(sorted(part.k.unique())) * (1 + 0.035 * (i - (len(shade) - 1) / 2))
            style: dict[str, Any] = {"linewidth": 1.5 if i else 2.6, "elinewidth": 1, "zorder": 3 - i / 10}
            figures.intervals(ax, at, found, shade[str(name)], fmt="o-", markersize=5, label=name, **style)
        ax.set_xscale("log")
        ax.set_xticks(facts["shots"], [str(k) for k in facts["shots"]])
        ax.minorticks_off()
        title, about = figures.title_of(metric), "labelled cases per class, each of another patient"
        figures.plain(ax, title, grid="both", xlabel=about)
    figures.legend(axes[0], fontsize=9)
    figure.suptitle(
        f"few-shot: {facts['label']}, mean and middle 95% of {facts['draws']} draws\n"
        f"{facts['cases']} cases of {facts['patients']} patients; test: {facts['test']}",
        fontsize=11,
    )
    return figure


def _ask(table: FeatureTable, label: str, settings: Mapping[str, Any]) -> None:
    can_be_split(table, label, {**settings, "folds": settings.get("test_folds", 3)})


TASKS = {"fewshot": OnFeatures(fewshot, headline="auc@*", kinds=CLASSED, ask=_ask)}
