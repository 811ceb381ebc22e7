"""What frozen features already know: logistic regression (`probe`) and nearest neighbours (`knn`).

Both learn on some patients and predict the others (`folds.py`); everything learned from data, also the
standardisation and the strength of the penalty, is learned inside the training rows. Trivial features
and those of a random encoder go through the very same folds as `beside`, because a learned feature that
does not beat the size of a lesion is no news.

Labels: binary, multiclass, multilabel (one model per class) and number (ridge regression).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from smartlab.core.errors import UseError
from smartlab.evaluation.features.table import FeatureTable
from smartlab.evaluation.judge.predictions import to_table
from smartlab.evaluation.judge.report import align, check_varying, report
from smartlab.evaluation.judge.result import Result
from smartlab.evaluation.learn.folds import Split, averaged, make_plan
from smartlab.evaluation.learn.labels import KINDS, can_be_split, labelled
from smartlab.evaluation.learn.linear import fit_tuned, one_thread, standard, targets
from smartlab.evaluation.task import OnFeatures

# (training features, labels, classes, patients, test features) -> (predictions (n, k), what was chosen)
Learner = Callable[[np.ndarray, np.ndarray, list[str], np.ndarray, np.ndarray], tuple[np.ndarray, Any]]


@one_thread
def probe(
    table: FeatureTable,
    label: str,
    *,
    beside: dict[str, FeatureTable] | None = None,
    split: Split = "auto",
    folds: int = 5,
    repeats: int = 1,
    inner: int = 3,
    seed: int = 0,
    draws: int = 1000,
) -> Result:
    """Linear probe: logistic regression, or ridge for a number, its C chosen by `inner` patient folds.

    >>> probe(table, "malignancy", beside={"volume": volumes, "random": untrained}).metrics["auc"]
    """

    def learn(
        x: np.ndarray, y: np.ndarray, classes: list[str], patients: np.ndarray, x_test: np.ndarray
    ) -> tuple[np.ndarray, Any]:
        model = fit_tuned(x, y, classes, patients, inner=inner, seed=seed)
        return model.predict(x_test), [float(c) for c in np.unique(model.strength)]

    how = {"split": split, "folds": folds, "repeats": repeats, "seed": seed}
    what = f"logistic or ridge regression, C by {inner} inner folds"
    return _evaluate("probe", table, label, learn, what, beside, how, draws)


def knn(
    table: FeatureTable,
    label: str,
    *,
    neighbours: int = 20,
    temperature: float = 0.07,
    beside: dict[str, FeatureTable] | None = None,
    split: Split = "auto",
    folds: int = 5,
    repeats: int = 1,
    seed: int = 0,
    draws: int = 1000,
) -> Result:
    """Weighted nearest neighbours by cosine, as in DINO: weights exp(cosine / temperature).

    Features are standardised by the training rows first, so that no common offset or single large
    feature decides; fewer training rows than `neighbours` means all of them.
    """
    if neighbours < 1 or temperature <= 0:
        raise UseError("knn needs at least one neighbour and a positive temperature")

    def learn(
        x: np.ndarray, y: np.ndarray, classes: list[str], patients: np.ndarray, x_test: np.ndarray
    ) -> tuple[np.ndarray, Any]:
        return vote(x, targets(y, classes)[0], x_test, neighbours, temperature), min(neighbours, len(x))

    how = {"split": split, "folds": folds, "repeats": repeats, "seed": seed}
    what = f"{neighbours} nearest by cosine, T = {temperature}"
    return _evaluate("knn", table, label, learn, what, beside, how, draws)


def vote(
    x: np.ndarray, target: np.ndarray, x_test: np.ndarray, neighbours: int, temperature: float
) -> np.ndarray:
    """Weighted mean of the targets (n, k) of the nearest training rows, (n_test, k)."""
    mean, scale = standard(x)
    train, test = (_directions((part - mean) * scale) for part in (x, x_test))
    neighbours = min(neighbours, len(x))
    out = np.empty((len(x_test), target.shape[1]))
    for start in range(0, len(test), 1000):  # 1000 × 5000 cosines are 20 MB
        cosine = test[start : start + 1000] @ train.T
        near = np.argpartition(-cosine, neighbours - 1, axis=1)[:, :neighbours]
        close = np.take_along_axis(cosine, near, axis=1)
        weight = np.exp((close - close.max(1, keepdims=True)) / temperature)
        weight /= weight.sum(1, keepdims=True)
        out[start : start + 1000] = np.einsum("tn,tnk->tk", weight, target[near])
    return out


def _directions(z: np.ndarray) -> np.ndarray:
    """Rows of length one. One or two features (a volume) get a constant beside them: alone, a single
    number has only two directions, its signs."""
    if z.shape[1] < 3:
        z = np.hstack([z, np.ones((len(z), 1))])
    return (z / np.maximum(np.linalg.norm(z, axis=1, keepdims=True), 1e-12)).astype(np.float32)


def _evaluate(
    task: str,
    table: FeatureTable,
    label: str,
    learn: Learner,
    model: str,
    beside: dict[str, FeatureTable] | None,
    how: dict[str, Any],  # of `make_plan`
    draws: int,
) -> Result:
    """Every set of features through the same plan, then scores and comparisons."""
    kept, y, classes, absent = labelled(table, label)
    plan = make_plan(kept.about, y, classes, **how)
    kind, patients, rows = kept.specs[label].kind, kept.about.patient.to_numpy(), plan.predicted
    kind = "binary" if kind == "multiclass" and len(classes) == 2 else kind  # the others are absent
    predictions, chosen = {}, {}
    for name, x in align(beside, kept).items():
        check_varying(name, x)
        choices: list[Any] = []

        def step(
            train: np.ndarray, test: np.ndarray, x: np.ndarray = x, choices: list = choices
        ) -> np.ndarray:
            found, choice = learn(x[train], y[train], classes, patients[train], x[test])
            choices.append(choice)
            return found[:, 0] if kind in ("binary", "number") else found

        parts = plan.run(step)
        case, patient = kept.about.case.to_numpy()[rows], patients[rows]
        predictions[name] = to_table(kind, case, patient, y[rows], averaged(parts), classes, parts)
        chosen[name] = choices
    facts = kept.facts | {
        "label": label,
        "classes": classes,
        "cases": len(rows),
        "patients": len(set(patients[rows])),
        "split": plan.how,
        "unused_cases": len(kept) - len(np.unique(np.concatenate([np.r_[a, b] for a, b in plan.pairs]))),
        "seed": how["seed"],
        "chosen": chosen,
        "model": model,
        "absent_classes": absent,
    }
    return report(task, predictions, kind, facts, draws=draws, seed=how["seed"])


TASKS = {
    one.__name__: OnFeatures(one, headline="auc|mae", kinds=KINDS, ask=can_be_split) for one in (probe, knn)
}
