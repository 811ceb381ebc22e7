"""Every score equals scikit-learn's, MONAI's or a closed form, and says what it does at the edges."""

from __future__ import annotations

import itertools
import math
import time

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from monai.metrics import DiceMetric, HausdorffDistanceMetric
from scipy import stats as distributions
from sklearn import metrics as reference

from smartlab.core.errors import DataError, UseError
from smartlab.evaluation.judge import metrics

CLASSES = ["a", "b", "c", "d"]


def rows(seed: int, n: int = 60, classes: int = 4, coarse: bool = True):
    """Truth and probabilities with ties (rounded) where `coarse`."""
    r = np.random.default_rng(seed)
    p = r.random((n, classes))
    p = np.round(p, 1) + 0.05 if coarse else p
    truth = r.integers(0, classes, n)
    truth[:classes] = np.arange(classes)
    return truth, p / p.sum(1, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6))
def test_binary_scores_equal_scikit_learn(seed):
    r = np.random.default_rng(seed)
    truth, p = np.append([0, 1], r.integers(0, 2, 40)), np.round(r.random(42), 1)
    said = p > 0.5
    expected = {
        "auc": reference.roc_auc_score(truth, p),
        "average_precision": reference.average_precision_score(truth, p),
        "accuracy": reference.accuracy_score(truth, said),
        "balanced_accuracy": reference.balanced_accuracy_score(truth, said),
        "sensitivity": reference.recall_score(truth, said),
        "specificity": reference.recall_score(truth, said, pos_label=0),
        "brier": reference.brier_score_loss(truth, p),
    }
    found = metrics.scores("binary", truth, p)
    assert {k: found[k] for k in expected} == pytest.approx(expected)
    assert metrics.scores("binary", truth, np.column_stack([1 - p, p])) == found
    assert metrics.auc(truth, p) == found["auc"]


@pytest.mark.parametrize("seed", range(5))
def test_multiclass_scores_equal_scikit_learn(seed):
    truth, p = rows(seed)
    said = p.argmax(1)
    found = metrics.scores("multiclass", truth, p, CLASSES)
    one_hot = np.eye(4)[truth]
    expected = {
        "auc": reference.roc_auc_score(truth, p, multi_class="ovr"),
        "average_precision": reference.average_precision_score(one_hot, p),
        "accuracy": reference.accuracy_score(truth, said),
        "balanced_accuracy": reference.balanced_accuracy_score(truth, said),
        "brier": ((p - one_hot) ** 2).sum(1).mean(),
    }
    for i, c in enumerate(CLASSES):
        expected[f"auc:{c}"] = reference.roc_auc_score(truth == i, p[:, i])
        expected[f"average_precision:{c}"] = reference.average_precision_score(truth == i, p[:, i])
        expected[f"sensitivity:{c}"] = reference.recall_score(truth == i, said == i)
    assert {k: found[k] for k in expected} == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(5))
def test_multilabel_scores_equal_scikit_learn(seed):
    r = np.random.default_rng(seed)
    truth, p = r.integers(0, 2, (50, 4)), np.round(r.random((50, 4)), 1)
    said = p > 0.5
    found = metrics.scores("multilabel", truth, p, CLASSES)
    each = range(4)
    expected = {
        "auc": reference.roc_auc_score(truth, p),
        "average_precision": reference.average_precision_score(truth, p),
        "accuracy": 1 - reference.hamming_loss(truth, said),
        "balanced_accuracy": np.mean(
            [reference.balanced_accuracy_score(truth[:, i], said[:, i]) for i in each]
        ),
        "brier": np.mean([reference.brier_score_loss(truth[:, i], p[:, i]) for i in each]),
        "exact_match": reference.accuracy_score(truth, said),
        "auc:c": reference.roc_auc_score(truth[:, 2], p[:, 2]),
        "average_precision:d": reference.average_precision_score(truth[:, 3], p[:, 3]),
    }
    assert {k: found[k] for k in expected} == pytest.approx(expected)


def test_number_scores_equal_scikit_learn_and_scipy():
    r = np.random.default_rng(0)
    truth = np.round(r.normal(size=50), 1)
    said = np.round(truth + r.normal(size=50), 1)
    assert metrics.scores("number", truth, said) == pytest.approx(
        {
            "mae": reference.mean_absolute_error(truth, said),
            "rmse": reference.root_mean_squared_error(truth, said),
            "r2": reference.r2_score(truth, said),
            "pearson": distributions.pearsonr(truth, said)[0],
            "spearman": distributions.spearmanr(truth, said)[0],
        }
    )


@pytest.mark.parametrize("kind", metrics.KINDS)
def test_the_order_of_rows_does_not_matter(kind):
    r = np.random.default_rng(1)
    truth, p = rows(1)
    if kind == "multilabel":
        truth = np.eye(4, dtype=int)[truth]
    elif kind in ("binary", "number"):
        truth, p = truth % 2, p[:, 0]
    shuffle = r.permutation(len(truth))
    before = metrics.scores(kind, truth, p, CLASSES)
    assert metrics.scores(kind, truth[shuffle], p[shuffle], CLASSES) == pytest.approx(before)


def test_calibration_by_hand_and_for_a_perfect_model():
    found = metrics.calibration(np.array([0, 1, 1, 1]), np.array([0.12, 0.18, 0.95, 1.0]))
    assert found.error == pytest.approx(2 / 4 * abs(0.5 - 0.15) + 2 / 4 * abs(1 - 0.975))
    assert found.cases.tolist() == [0, 2, 0, 0, 0, 0, 0, 0, 0, 2]
    assert found.predicted[[1, 9]] == pytest.approx([0.15, 0.975])
    assert found.observed[[1, 9]] == pytest.approx([0.5, 1.0])
    assert np.isnan(found.observed[0])
    r = np.random.default_rng(0)
    p = r.random((200, 500))  # 200 perfect models of 500 rows
    by_chance = np.mean([metrics.calibration(r.random(500) < row, row).error for row in p])
    assert by_chance == pytest.approx(math.sqrt(10 / 500) / 3, rel=0.15)


@pytest.mark.parametrize("value", [0, 1])
def test_one_class_only_leaves_ranking_undefined_and_the_rest_known(value):
    found = metrics.scores("binary", np.full(4, value), np.array([0.1, 0.4, 0.6, 0.9]))
    undefined = {"auc", "average_precision", "balanced_accuracy", "specificity" if value else "sensitivity"}
    assert {k for k, v in found.items() if math.isnan(v)} == undefined


def test_a_class_that_never_occurs_is_left_out_of_macro_means():
    truth, p = rows(2)
    truth = np.where(truth == 3, 0, truth)
    found = metrics.scores("multiclass", truth, p, CLASSES)
    assert math.isnan(found["auc:d"]) and math.isnan(found["sensitivity:d"])
    assert found["auc"] == pytest.approx(np.mean([found[f"auc:{c}"] for c in "abc"]))


def test_constant_scores_are_chance_and_constant_numbers_have_no_correlation():
    truth = np.array([0, 1, 1, 0, 1])
    found = metrics.scores("binary", truth, np.full(5, 0.5))
    assert found["auc"] == 0.5 and found["average_precision"] == pytest.approx(0.6)
    number = metrics.scores("number", truth, np.full(5, 0.6))
    assert math.isnan(number["pearson"]) and math.isnan(number["spearman"])
    assert number["r2"] == pytest.approx(0)
    assert math.isnan(metrics.scores("number", np.ones(3), np.arange(3))["r2"])


@pytest.mark.parametrize(
    ("kind", "truth", "p", "words"),
    [
        ("ordinal", [0, 1], [0.1, 0.2], "ordinal"),
        ("binary", [0, 1], [0.1, 0.2, 0.3], "do not fit"),
        ("binary", [0, 2], [0.1, 0.2], "positions of classes"),
        ("binary", [0, 1], [0.1, 1.2], "between 0 and 1"),
        ("binary", [0, 1], [0.1, np.nan], "not finite"),
        ("binary", [], [], "no predictions"),
        ("multiclass", [0, 1], [[0.4, 0.4], [0.5, 0.5]], "sum to 1"),
        ("multilabel", [0, 1], [[0.4, 0.4], [0.5, 0.5]], "do not fit"),
    ],
)
def test_input_that_does_not_fit_gives_one_clear_error(kind, truth, p, words):
    with pytest.raises((UseError, DataError), match=words):
        metrics.scores(kind, np.array(truth), np.array(p), ["a", "b"])


def test_scores_are_fast_enough_to_be_bootstrapped():
    r = np.random.default_rng(0)
    truth, p = r.integers(0, 2, 5000), r.random(5000)
    metrics.scores("binary", truth, p)
    times = []
    for _ in range(20):
        start = time.perf_counter()
        metrics.scores("binary", truth, p)
        times.append(time.perf_counter() - start)
    assert min(times) < 3e-3  # measured: 0.5 ms


def ball(shape, centre, radius):
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return ((grid - np.array(centre)) ** 2).sum(-1) <= radius**2


@pytest.mark.parametrize("centre", [(10, 10, 10), (12, 9, 11), (2, 20, 1), (22, 10, 10)])
def test_dice_and_hd95_equal_monai(centre):
    shape, spacing = (24, 22, 20), (0.7, 1.5, 3.0)
    truth, said = ball(shape, (10, 10, 10), 6), ball(shape, centre, 4)
    said[3, 3, 3] = True  # a stray voxel, which the 95th percentile forgives
    as_monai = [torch.tensor(m[None, None].astype(np.float32)) for m in (said, truth)]
    assert metrics.dice(said, truth) == pytest.approx(float(DiceMetric()(*as_monai)))
    theirs = HausdorffDistanceMetric(percentile=95)(*as_monai, spacing=spacing)
    assert metrics.hd95(said, truth, spacing) == pytest.approx(float(theirs), abs=1e-4)
    assert metrics.hd95(truth, said, spacing) == metrics.hd95(said, truth, spacing)


def test_hd95_is_in_millimetres():
    truth, said = np.zeros((2, 9, 9, 9), bool)
    truth[2, 4, 4] = said[7, 4, 4] = True
    assert metrics.hd95(said, truth, (2.0, 1.0, 1.0)) == 10.0
    with pytest.raises(UseError, match="spacing"):
        metrics.hd95(said, truth, (1.0, 1.0))


def test_empty_masks_have_stated_scores():
    full, empty = np.ones((3, 4, 12), bool), np.zeros((3, 4, 12), bool)
    assert metrics.dice(empty, empty) == 1 and metrics.dice(full, empty) == metrics.dice(empty, full) == 0
    assert metrics.hd95(empty, empty, (1, 1, 1)) == 0
    assert metrics.hd95(full, empty, (1, 1, 1)) == metrics.hd95(empty, full, (1, 1, 1)) == 13.0
    with pytest.raises(UseError, match="shape"):
        metrics.dice(full, empty[:2])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6))
@example(34097)  # the highest risk has no event
def test_concordance_equals_its_definition_over_pairs(seed):
    r = np.random.default_rng(seed)
    n = 25
    when, event, risk = r.integers(1, 9, n), r.random(n) < 0.6, r.integers(0, 6, n)
    pairs, good = 0, 0.0
    for i, j in itertools.permutations(range(n), 2):
        if event[i] and (when[i] < when[j] or (when[i] == when[j] and not event[j])):
            pairs += 1
            good += 1.0 if risk[i] > risk[j] else 0.5 if risk[i] == risk[j] else 0.0
    right, all_pairs = metrics.in_order(when, event, risk)
    assert (right.sum(), all_pairs.sum()) == (2 * good, 2 * pairs)  # a pair is one of both of its patients


def test_concordance_of_a_fixed_horizon_is_auc_and_its_edges_are_stated():
    r = np.random.default_rng(0)
    event, risk = r.random(3000) < 0.4, np.round(r.normal(size=3000), 1)
    when = np.where(event, 1.0, 2.0)

    def concordance(event, risk):
        right, pairs = metrics.in_order(when, event, risk)
        return right.sum() / pairs.sum()

    assert concordance(event, risk) == pytest.approx(metrics.auc(event, risk))
    assert concordance(event, np.zeros(3000)) == 0.5
    assert not metrics.in_order(when, np.zeros(3000, bool), risk)[1].any()
