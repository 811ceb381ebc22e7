"""Probe and kNN: right on known signals, at chance on shuffled labels, clear about what they cannot do."""

from __future__ import annotations

import json
import time

import numpy as np
import pandas as pd
import pytest

from smartlab.core.errors import DataError, UseError
from smartlab.evaluation.features.table import FeatureTable
from smartlab.evaluation.judge.compare import compare
from smartlab.evaluation.judge.metrics import auc, scores
from smartlab.evaluation.judge.predictions import from_table
from smartlab.evaluation.learn.probe import knn, probe, vote
from tests.evaluation.made_up import CLASSES, lesions, shuffled, with_features, with_labels

QUICK = {"draws": 200}


@pytest.mark.parametrize("task", [probe, knn])
@pytest.mark.parametrize(
    ("label", "metric", "least"),
    [("malignancy", "auc", 0.8), ("grade", "auc", 0.75), ("margin", "auc", 0.7), ("size", "pearson", 0.6)],
)
def test_every_kind_of_label_is_learned_from_a_signal(task, label, metric, least):
    result = task(lesions(), label, **QUICK)
    found = result.metrics[metric]
    assert found.value > least and found.low < found.value < found.high
    assert found.n == result.facts["patients"] == 80
    assert len(result.table) == len(lesions()) == result.facts["cases"]


@pytest.mark.parametrize("task", [probe, knn])
@pytest.mark.parametrize(("label", "metric", "chance"), [("malignancy", "auc", 0.5), ("grade", "auc", 0.5)])
def test_shuffled_labels_give_chance(task, label, metric, chance):
    found = [
        task(shuffled(lesions(seed=s), label, s), label, **QUICK).metrics[metric].value for s in range(4)
    ]
    assert abs(np.mean(found) - chance) < 0.08


def test_nothing_is_learned_from_the_cases_that_are_predicted():
    """A case whose features carry its own label, and no other's, must stay at chance."""
    table = lesions(60, signal=0)
    leak = np.zeros((len(table), len(table)), np.float32)
    leak[np.arange(len(table)), np.arange(len(table))] = 1  # a feature per case: memory, not knowledge
    found = probe(with_features(table, np.hstack([table.x, leak])), "malignancy", **QUICK)
    assert found.metrics["auc"].value < 0.62


@pytest.mark.slow
@pytest.mark.parametrize(("patients", "share", "width"), [(22, 0.5, 16), (24, 0.25, 64)])
def test_useless_features_have_an_auc_of_one_half_in_small_cohorts(patients, share, width):
    """Over all folds together it is below 0.45, for each fold is scored around a mean that leaves it out."""
    within, pooled, below = [], [], 0
    for seed in range(300):
        r = np.random.default_rng(seed)
        truth = r.permutation(np.arange(patients) < share * patients)
        names = [f"p{i}" for i in range(patients)]
        about = pd.DataFrame({"case": names, "patient": names, "split": None, "fold": np.nan})
        about["label:malignancy"] = np.where(truth, "malignant", "benign")
        x = r.normal(size=(patients, width)).astype(np.float32)
        features = FeatureTable(x, about, lesions(2).specs)
        result = probe(features, "malignancy", draws=100, seed=seed)
        table = result.table
        pooled.append(auc(truth[[names.index(c) for c in table.case]].astype(int), table["p:malignant"]))
        within.append(result.metrics["auc"].value)
        below += result.metrics["auc"].high < 0.5
    error = np.std(within) / np.sqrt(len(within))
    assert abs(np.mean(within) - 0.5) < 3 * error and below < 0.06 * 300
    assert np.mean(pooled) < 0.46  # the simulation is one in which pooling is wrong


def test_lesions_of_a_patient_do_not_give_each_other_away():
    """Features that know the patient and nothing else: at chance if patients stay together."""
    table = lesions(60, signal=0)
    names, owner = np.unique(table.about.patient, return_inverse=True)
    r = np.random.default_rng(1)
    of_patient = np.where(r.random(len(names)) < 0.5, "malignant", "benign")[owner]
    known = with_labels(
        with_features(table, r.normal(size=(len(names), 30))[owner]), label_malignancy=of_patient
    )
    assert abs(knn(known, "malignancy", neighbours=3, **QUICK).metrics["auc"].value - 0.5) < 0.2
    assert abs(probe(known, "malignancy", **QUICK).metrics["auc"].value - 0.5) < 0.2


def test_tables_beside_go_through_the_same_folds_and_are_compared():
    table = lesions()
    weak = with_features(table, table.x[:, :1]).take(np.random.default_rng(0).permutation(len(table)))
    result = probe(table, "malignancy", beside={"one": weak, "itself": table}, **QUICK)
    assert result.metrics["itself/auc"] == result.metrics["auc"]
    assert result.metrics["auc minus itself"][:3] == (0, 0, 0)
    difference = result.metrics["auc minus one"]
    assert difference.value == pytest.approx(result.metrics["auc"].value - result.metrics["one/auc"].value)
    rows = {(r["metric"], r["b"]): r for r in result.facts["comparisons"]}
    assert rows["auc", "one"]["p"] < 0.01 and rows["auc", "itself"]["p"] == 1
    assert rows["auc", "one"]["p_holm"] == pytest.approx(2 * rows["auc", "one"]["p"])


def test_predictions_are_kept_so_that_runs_can_be_compared_later():
    table = lesions()
    a = probe(table, "malignancy", beside={"one": with_features(table, table.x[:, :1])}, **QUICK)
    b = knn(table, "malignancy", **QUICK)
    again = from_table(a.table)
    found = scores("binary", again.truth, again.probability, CLASSES)
    assert found["brier"] == pytest.approx(a.metrics["brier"].value)
    assert set(compare({"a": a.table, "b": b}, metrics=["auc"]).columns) >= {"difference", "low", "p"}
    assert "one p:malignant" in a.table


@pytest.mark.parametrize("label", ["malignancy", "grade", "margin", "size"])
def test_results_are_saved_with_a_figure(label, tmp_path):
    table = lesions(40)
    result = probe(table, label, beside={"one": with_features(table, table.x[:, :1])}, folds=3, **QUICK)
    out = result.save(tmp_path / label)
    content = json.loads((out / "result.json").read_text())
    assert content["encoder"] == "made up" and content["seed"] == 0 and "cross-validation" in content["split"]
    assert (out / "figure.png").stat().st_size > 20_000


def test_the_same_seed_gives_the_same_numbers():
    one, two, other = (probe(lesions(40), "grade", seed=s, **QUICK).metrics["auc"] for s in (1, 1, 2))
    assert one == two != other


def test_the_official_test_split_is_what_is_predicted():
    table = lesions()
    held = {f"p{i:04d}" for i in range(25)}
    part = ["test" if p in held else "train" for p in table.about.patient]
    result = probe(with_labels(table, split=part), "malignancy", **QUICK)
    assert set(result.table.patient) == held and "official" in result.facts["split"]


def test_two_of_three_classes_present_are_treated_as_binary_and_the_third_is_told():
    table = lesions()
    kept = table.take((table.about["label:grade"] != "middle").to_numpy())
    result = probe(kept, "grade", **QUICK)
    assert result.facts["absent_classes"] == ["middle"] and result.facts["classes"] == ["low", "high"]
    assert "sensitivity" in result.metrics


def test_a_single_number_is_as_good_a_neighbour_as_many():
    table = lesions(100)
    alone = with_features(table, table.about["label:size"].to_numpy()[:, None])
    assert knn(alone, "malignancy", **QUICK).metrics["auc"].value > 0.95


def test_neighbours_are_those_of_the_definition():
    r = np.random.default_rng(0)
    x, x_test = r.normal(size=(30, 5)), r.normal(size=(7, 5))
    target = np.eye(3)[r.integers(0, 3, 30)]
    z, z_test = (x - x.mean(0)) / x.std(0), (x_test - x.mean(0)) / x.std(0)
    for row, found in zip(z_test, vote(x, target, x_test, 4, 0.1), strict=True):
        cosine = z @ row / np.linalg.norm(z, axis=1) / np.linalg.norm(row)
        near = np.argsort(-cosine)[:4]
        weight = np.exp(cosine[near] / 0.1)
        assert found == pytest.approx(weight @ target[near] / weight.sum(), abs=1e-4)


@pytest.mark.parametrize("task", [probe, knn])
def test_degenerate_input_is_one_clear_error(task):
    table = lesions(30)
    with pytest.raises(DataError, match="only one class"):
        task(with_labels(table, label_malignancy="benign"), "malignancy")
    with pytest.raises(DataError, match="fewer patients than folds"):
        task(with_labels(table, patient="only"), "malignancy")
    with pytest.raises(DataError, match="fewer patients than folds"):
        task(table.take(np.arange(4)), "malignancy")
    with pytest.raises(DataError, match="features are constant"):
        task(with_features(table, np.ones((len(table), 3))), "malignancy")
    with pytest.raises(DataError, match="'flat' is constant"):
        task(table, "malignancy", beside={"flat": with_features(table, np.ones((len(table), 1)))})
    with pytest.raises(DataError, match="1 cases without features"):
        task(table, "malignancy", beside={"short": table.take(np.arange(1, len(table)))})
    with pytest.raises(UseError, match="no label 'stage'"):
        task(table, "stage")


@pytest.mark.slow
def test_five_thousand_lesions_take_less_than_a_minute():
    r = np.random.default_rng(0)
    table = lesions(2000, width=3)
    n = len(table)
    x = np.hstack([table.x, r.normal(size=(n, 60))]) @ r.normal(size=(63, 768)) + 0.1 * r.normal(
        size=(n, 768)
    )
    start = time.process_time()
    probe(with_features(table, x), "malignancy", beside={"size": with_features(table, table.x[:, :1])})
    knn(with_features(table, x), "malignancy")
    assert n > 4500 and time.process_time() - start < 60
