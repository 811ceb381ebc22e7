"""Folds: whole patients, every case predicted, labels spread evenly, and clear refusals."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartlab.core.errors import DataError, UseError
from smartlab.evaluation.learn.folds import deal, make_plan, nested, present_classes, splits
from tests.evaluation.made_up import CLASSES, GRADES, lesions, with_labels


@settings(max_examples=60, deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=6, max_size=40),
    folds=st.integers(2, 6),
    kind=st.sampled_from(["classes", "labels", "numbers"]),
    seed=st.integers(0, 1000),
)
def test_patients_never_straddle_folds_however_many_lesions_they_have(counts, folds, kind, seed):
    r = np.random.default_rng(seed)
    patients = r.permutation(np.repeat([f"p{i}" for i in range(len(counts))], counts))
    n = len(patients)
    y = {
        "classes": r.integers(0, 3, n),
        "labels": r.integers(0, 2, (n, 3)).astype(np.int8),
        "numbers": r.normal(size=n),
    }[kind]
    seen = []
    for train, test in splits(patients, y, folds, seed):
        assert not set(patients[train]) & set(patients[test])
        assert sorted([*train, *test]) == list(range(n))
        seen += list(test)
    assert sorted(seen) == list(range(n))
    sizes = [len(set(patients[deal(patients, y, folds, seed) == k])) for k in range(folds)]
    assert max(sizes) - min(sizes) <= 1


def test_a_rare_class_reaches_every_fold():
    y = np.zeros(100, int)
    y[:5] = 1
    fold = deal(np.arange(100), y, 5, seed=3)
    assert sorted(fold[:5]) == [0, 1, 2, 3, 4]


def test_numbers_are_spread_over_folds():
    y = np.linspace(0, 1, 100)
    fold = deal(np.arange(100), y, 5, seed=0)
    assert np.ptp([y[fold == k].mean() for k in range(5)]) < 0.12


def test_repeats_deal_anew_and_a_seed_deals_the_same():
    table = lesions(40)
    _, y, _ = table.labelled("malignancy")
    plan = make_plan(table.about, y, CLASSES, folds=4, repeats=3, seed=5)
    again = make_plan(table.about, y, CLASSES, folds=4, repeats=3, seed=5)
    assert len(plan.pairs) == 12 and not plan.official
    assert all((a[1] == b[1]).all() for a, b in zip(plan.pairs, again.pairs, strict=True))
    assert any(set(a[1]) != set(b[1]) for a, b in zip(plan.pairs[:4], plan.pairs[4:8], strict=True))


def test_predictions_are_averaged_over_repeats():
    table = lesions(30)
    _, y, _ = table.labelled("malignancy")
    plan = make_plan(table.about, y, CLASSES, folds=3, repeats=2)
    calls = iter(range(6))
    found = plan.predict(lambda train, test: np.full((len(test), 1), float(next(calls))))
    first, second = (np.empty(len(table)) for _ in range(2))
    for k in range(3):
        first[plan.pairs[k][1]], second[plan.pairs[3 + k][1]] = k, 3 + k
    assert found[:, 0] == pytest.approx((first + second) / 2)


def official(table, test_share=0.3):
    names = np.unique(table.about.patient)
    held = set(names[: int(len(names) * test_share)])
    part = ["test" if p in held else "val" if p.endswith("9") else "train" for p in table.about.patient]
    return with_labels(table, split=part)


def test_an_official_split_is_used_where_there_is_one():
    table = official(lesions(40))
    _, y, _ = table.labelled("malignancy")
    plan = make_plan(table.about, y, CLASSES)
    (train, test), part = plan.pairs[0], table.about.split
    assert len(plan.pairs) == 1 and plan.official and "official" in plan.how
    assert set(part.iloc[train]) == {"train", "val"} and set(part.iloc[test]) == {"test"}
    assert len(make_plan(table.about, y, CLASSES, split="cross").pairs) == 5


def test_official_folds_are_used_where_all_cases_have_one():
    table = lesions(40)
    fold = [int(p[1:]) % 4 for p in table.about.patient]
    _, y, _ = table.labelled("malignancy")
    plan = make_plan(with_labels(table, fold=fold).about, y, CLASSES)
    assert plan.how == "the manifest's 4 folds" and len(plan.predicted) == len(table)
    fold[0] = None
    assert "cross-validation" in make_plan(with_labels(table, fold=fold).about, y, CLASSES).how


def test_official_parts_that_share_a_patient_are_refused():
    table = lesions(40)
    _, y, _ = table.labelled("malignancy")
    leaky = with_labels(table, fold=np.arange(len(table)) % 3)
    with pytest.raises(DataError, match="both training and test"):
        make_plan(leaky.about, y, CLASSES)


@pytest.mark.parametrize(
    ("patients", "labels", "message"),
    [
        (["a"] * 20, [0, 1] * 10, r"fewer patients than folds \(found 1 patient"),
        (list("abcd"), [0, 1, 0, 1], r"fewer patients than folds \(found 4"),
        (list("abcdefgh"), [1, 1, 0, 0, 0, 0, 0, 0], r"2 patient\(s\) of class 'malignant'"),
    ],
)
def test_too_few_for_the_folds_is_one_clear_error(patients, labels, message):
    table = lesions(30).take(np.arange(len(patients)))
    about = with_labels(table, patient=patients).about
    with pytest.raises(DataError, match=message):
        make_plan(about, np.array(labels), CLASSES, folds=5)


def test_one_class_is_an_error_and_absent_classes_are_told():
    spec = lesions(5).specs["grade"]
    with pytest.raises(DataError, match="only one class"):
        present_classes(np.ones(9, int), GRADES, spec)
    y, classes, absent = present_classes(np.array([2, 0, 2]), GRADES, spec)
    assert list(y) == [1, 0, 1] and classes == ["low", "high"] and absent == ["middle"]


def test_a_class_without_training_cases_is_refused():
    table = official(lesions(40))
    _, y, _ = table.labelled("malignancy")
    y = np.where(table.about.split == "test", y, 0)
    with pytest.raises(DataError, match="no training case of class 'malignant'"):
        make_plan(table.about, y, CLASSES)


def test_dealing_to_more_folds_than_patients_is_refused():
    with pytest.raises(UseError, match="cannot deal"):
        deal(np.array(["a", "a", "b"]), np.array([0, 1, 0]), 3, seed=0)


@pytest.mark.parametrize("wrong", [{"split": "officail"}, {"repeats": 0}])
def test_an_unknown_way_to_split_is_refused_and_never_taken_for_another(wrong):
    table = official(lesions(40))
    _, y, _ = table.labelled("malignancy")
    with pytest.raises(UseError, match=next(iter(wrong))):
        make_plan(table.about, y, CLASSES, **wrong)


def test_smaller_parts_of_the_patients_lie_inside_larger_ones():
    patients, alike = np.repeat([f"p{i}" for i in range(20)], 2), np.zeros(40)
    rows = np.arange(10, 40)
    parts = [set(nested(patients, alike, rows, f, 5).tolist()) for f in (0.1, 0.25, 0.5, 1.0)]
    assert parts[0] < parts[1] < parts[2] < parts[3] == set(rows.tolist())
    assert [len({patients[i] for i in part}) for part in parts] == [2, 4, 8, 15]
    other = nested(patients, alike, rows, 0.5, 6)
    assert other.tolist() != nested(patients, alike, rows, 0.5, 5).tolist()
    assert len(nested(patients, alike, rows, 0.001, 5)) == 2  # one patient at least


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5])
def test_parts_of_the_patients_hold_every_class_in_its_share(fraction):
    """Whatever the seed: a class that a tenth of the patients have must not be missing from a quarter of them."""
    patients = np.array([f"p{i}" for i in range(80)])
    y = (np.arange(80) % 8 == 0).astype(int)
    for seed in range(20):
        part = nested(patients, y, np.arange(80), fraction, seed)
        assert len(part) == 80 * fraction and abs(y[part].sum() - 10 * fraction) <= 1


def test_a_held_out_test_is_predicted_by_a_model_for_each_fold_of_the_others():
    table = lesions(60)
    y = table.labelled("malignancy")[1]
    patients = table.about.patient.to_numpy()
    test, fold = np.isin(patients, np.unique(patients)[:20]), deal(patients, y, 3, 0)
    told = with_labels(
        table,
        split=np.where(test, "test", "train"),
        fold=np.where(test, None, fold),
    )
    plan = make_plan(told.about, y, CLASSES, split="held-out")
    assert len(plan.pairs) == 3 and plan.predicted.tolist() == np.flatnonzero(test).tolist()
    for k, (train, predicted) in enumerate(plan.pairs):
        assert predicted.tolist() == plan.predicted.tolist()
        assert train.tolist() == np.flatnonzero(~test & (fold != k)).tolist()
    with pytest.raises(UseError, match="no folds"):
        make_plan(with_labels(told, fold=None).about, y, CLASSES, split="held-out")
    with pytest.raises(DataError, match="nothing to predict"):
        make_plan(with_labels(told, split="train").about, y, CLASSES, split="held-out")
