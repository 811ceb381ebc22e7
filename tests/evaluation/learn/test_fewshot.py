"""Few-shot: supports grow with k, by patient, and never touch the test of their draw."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartlab.core.errors import DataError, UseError
from smartlab.evaluation.learn import fewshot as module
from smartlab.evaluation.learn.fewshot import fewshot
from smartlab.evaluation.learn.folds import support
from tests.evaluation.made_up import lesions, shuffled, with_features, with_labels


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 6), min_size=4, max_size=30), seed=st.integers(0, 1000))
def test_each_class_gets_one_case_of_each_of_its_patients(counts, seed):
    r = np.random.default_rng(seed)
    patients = np.repeat(np.arange(len(counts)), counts)
    y = r.integers(0, 2, len(patients))
    for k, rows in enumerate(support(patients, y, 2, r)):
        assert (y[rows] == k).all()
        assert sorted(patients[rows]) == sorted(set(patients[y == k]))


@settings(max_examples=60, deadline=None)
@given(counts=st.lists(st.integers(1, 6), min_size=4, max_size=30), seed=st.integers(0, 1000))
def test_cases_of_several_classes_may_serve_each_of_them(counts, seed):
    r = np.random.default_rng(seed)
    patients = np.repeat(np.arange(len(counts)), counts)
    y = r.integers(0, 2, (len(patients), 3))
    for k, rows in enumerate(support(patients, y, 3, r)):
        assert y[rows, k].all()
        assert sorted(patients[rows]) == sorted(set(patients[y[:, k] == 1]))


@pytest.fixture
def spied(monkeypatch):
    """(table whose features say which row it is, what was learned from and predicted: rows, rows, labels)."""
    table = lesions(60)
    table = with_features(table, np.arange(len(table))[:, None])
    monkeypatch.setattr(module, "_scaled", lambda pool, test: (pool, test))
    seen, predict = [], module._predict

    def spy(z, y, classes, z_test, strength):
        seen.append((z[:, 0].astype(int), z_test[:, 0].astype(int), y))
        return predict(z, y, classes, z_test, strength)

    monkeypatch.setattr(module, "_predict", spy)
    return table, seen


def test_supports_of_several_classes_hold_k_patients_of_each_and_every_case_once(spied):
    table, seen = spied
    fewshot(table, "margin", shots=(1, 5), draws=20)
    patient = table.about.patient.to_numpy()
    for one, five in zip(seen[::2], seen[1::2], strict=True):
        assert set(one[0]) < set(five[0]) and (one[1] == five[1]).all()
        assert not set(patient[five[0]]) & set(patient[five[1]])
        for k, (rows, _, y) in ((1, one), (5, five)):
            assert k <= len(set(rows)) == len(rows) <= 3 * k
            assert y.any(1).all(), "a case of no class is nobody's example"
            assert all(len(set(patient[rows[has == 1]])) >= k for has in y.T)
    assert min(len(one[0]) for one in seen[::2]) < 3, "some case was drawn for two classes, and is one"


def test_no_patient_is_in_support_and_test_and_the_test_is_the_same_for_every_k(spied):
    table, seen = spied
    fewshot(table, "malignancy", shots=(1, 2, 5), draws=20)
    patient = table.about.patient.to_numpy()
    tests = set()
    for draw in range(20):
        one, two, five = seen[3 * draw : 3 * draw + 3]
        assert set(one[0]) < set(two[0]) < set(five[0])
        assert (one[1] == two[1]).all() and (one[1] == five[1]).all()
        assert not set(patient[five[0]]) & set(patient[five[1]])
        assert [np.bincount(part[2]).tolist() for part in (one, two, five)] == [[1, 1], [2, 2], [5, 5]]
        assert all(len(set(patient[five[0][five[2] == k]])) == 5 for k in (0, 1))
        tests.add(tuple(five[1]))
    assert len(tests) == 20


def test_a_class_that_the_whole_support_carries_is_not_learned():
    """Every case gets the same probability, so its AUC is that of chance; the other class is learned."""
    x = np.array([[-1.0], [1.0], [2.0]])
    found = module._predict(x, np.array([[1, 0], [1, 1], [1, 1]]), ["a", "b"], np.array([[-3.0], [3.0]]), 1.0)
    assert found[:, 0].tolist() == [1.0, 1.0] and found[0, 1] < 0.5 < found[1, 1]


@pytest.mark.parametrize("label", ["malignancy", "margin"])
def test_more_cases_teach_more_and_a_signal_beats_noise(label):
    table = lesions(150)
    noise = with_features(table, np.random.default_rng(0).normal(size=table.x.shape))
    result = fewshot(table, label, draws=30, beside={"noise": noise})
    auc = [result.metrics[f"auc@{k}"].value for k in result.facts["shots"]]
    assert result.facts["shots"] == [1, 2, 5, 10, 20, 50] and auc[0] + 0.1 < auc[-1] > 0.8
    assert abs(result.metrics["noise/auc@20"].value - 0.5) < 0.07
    last = result.facts["comparisons"][-1]
    assert last["k"] == 50 and last["draws_won"] == 1 and last["low"] > 0
    assert len(result.table) == 2 * 6 * 30


def test_the_interval_is_the_middle_of_the_draws():
    result = fewshot(lesions(60), "grade", shots=(2,), draws=40)
    values, found = result.table.auc.to_numpy(), result.metrics["auc@2"]
    assert found[:3] == pytest.approx((values.mean(), *np.quantile(values, [0.025, 0.975])))
    assert found.n == 40 and "draws share patients" in result.facts["interval"]


def test_shuffled_labels_give_chance():
    result = fewshot(shuffled(lesions(100), "malignancy"), "malignancy", shots=(10,), draws=40)
    assert abs(result.metrics["auc@10"].value - 0.5) < 0.08


def test_shots_that_the_classes_do_not_allow_are_left_out_and_told():
    result = fewshot(lesions(30), "malignancy", draws=20)
    assert result.facts["shots_left_out"] == [k for k in (20, 50) if k not in result.facts["shots"]] != []
    assert 1 in result.facts["shots"]


def test_an_official_test_split_is_the_test_of_every_draw():
    table = lesions(80)
    part = ["test" if p < "p0020" else "train" for p in table.about.patient]
    result = fewshot(with_labels(table, split=part), "malignancy", shots=(5,), draws=20)
    assert "official" in result.facts["test"] and result.table.auc.nunique() > 10


@pytest.mark.parametrize("label", ["malignancy", "margin"])
def test_the_curves_are_drawn(label, tmp_path):
    table = lesions(60)
    beside = {"one": with_features(table, table.x[:, :1])}
    out = fewshot(table, label, draws=20, beside=beside).save(tmp_path)
    assert (out / "figure.png").stat().st_size > 20_000


def test_what_cannot_be_drawn_is_one_clear_error():
    table = lesions(30)
    with pytest.raises(UseError, match=r"few-shot needs classes.*kind number"):
        fewshot(table, "size")
    single = with_labels(table, label_margin=[["smooth"]] * len(table))
    with pytest.raises(DataError, match="at least two classes"):
        fewshot(single, "margin")
    with pytest.raises(UseError, match="too few draws"):
        fewshot(table, "malignancy", draws=3)
    with pytest.raises(DataError, match="fewer than 200 patients"):
        fewshot(table, "malignancy", shots=(200,), draws=20)
    with pytest.raises(DataError, match="only one class"):
        fewshot(with_labels(table, label_malignancy="benign"), "malignancy")
    with pytest.raises(DataError, match="features are constant"):
        fewshot(with_features(table, np.ones((len(table), 3))), "malignancy")
