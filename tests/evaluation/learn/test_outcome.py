"""Outcome of patients: binary and follow-up, with covariates; by patient, at chance when shuffled."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.clinical import Covariates, read_covariates
from smartlab.data.cohort.privacy import hashed, salt
from smartlab.evaluation.learn.outcome import outcome
from tests.evaluation.made_up import cohort, lesions, with_features, with_labels

QUICK = {"repeats": 2, "draws": 200}


def written(clinic: pd.DataFrame, folder) -> str:
    clinic.to_csv(folder / "clinic.csv", index=False)
    return str(folder / "clinic.csv")


@pytest.mark.parametrize(("label", "metric"), [("response", "auc"), ("months", "concordance")])
def test_images_and_covariates_together_know_more_than_either(label, metric, tmp_path):
    table, clinic = cohort(120)
    result = outcome(table, label, covariates=written(clinic, tmp_path), **QUICK)
    image, clinical, both = (result.metrics[f"{n}{metric}"] for n in ("", "covariates/", "both/"))
    assert image.value > 0.62 and clinical.value > 0.57 and both.value > max(image.value, clinical.value)
    assert both.low < both.value < both.high and both.n == 120 == len(result.table)
    difference = result.metrics[f"{metric} of both minus covariates"]
    assert difference.value == pytest.approx(both.value - clinical.value)
    assert result.facts["covariates"] == {"age": "numeric", "stage": "categorical"}


@pytest.mark.parametrize(("label", "metric"), [("response", "auc"), ("months", "concordance")])
def test_hundreds_of_useless_features_do_not_drown_two_covariates(label, metric, tmp_path):
    table, clinic = cohort(100)
    noise = with_features(table, np.random.default_rng(5).normal(size=(len(table), 300)))
    found = outcome(noise, label, covariates=written(clinic, tmp_path), **QUICK).metrics
    assert found[f"both/{metric}"].value > found[f"covariates/{metric}"].value - 0.04


@pytest.mark.parametrize(("label", "metric"), [("response", "auc"), ("months", "concordance")])
def test_shuffled_outcomes_give_chance(label, metric, tmp_path):
    found = []
    for seed in range(3):
        table, clinic = cohort(80, seed=seed)
        names = np.unique(table.about.patient)
        other = dict(zip(names, np.random.default_rng(seed).permutation(names), strict=True))
        labels = [c for c in table.about if c.startswith("label:")]
        first = table.about.drop_duplicates("patient").set_index("patient")[labels]
        swapped = {c: first.loc[[other[p] for p in table.about.patient], c].to_numpy() for c in labels}
        table = with_labels(table, **swapped)
        found.append(
            [
                outcome(table, label, covariates=written(clinic, tmp_path), **QUICK).metrics[name].value
                for name in (metric, f"both/{metric}")
            ]
        )
    assert np.abs(np.mean(found, axis=0) - 0.5).max() < 0.1


def test_follow_up_has_risks_a_log_rank_test_and_curves(tmp_path):
    table, clinic = cohort(90)
    result = outcome(table, "months", covariates=written(clinic, tmp_path), **QUICK)
    assert 0 <= result.metrics["both/log_rank_p"].value < 0.05
    assert {"time", "event", "risk", "both/risk"} <= set(result.table)
    assert result.facts["events"] == int(result.table.event.sum()) and result.facts["unit"] == "months"
    assert (result.save(tmp_path).joinpath("figure.png")).stat().st_size > 20_000


def test_binary_outcome_tells_how_much_the_repeats_differ(tmp_path):
    table, _ = cohort(60)
    volume = with_features(table, table.x[:, :1])
    result = outcome(table, "response", beside={"volume": volume}, **QUICK)
    low, high = result.facts["auc_over_repeats"]["features"]
    assert 0.4 < low <= high < 1
    assert result.metrics["auc minus volume"].n == 60
    assert (result.save(tmp_path).joinpath("figure.png")).stat().st_size > 20_000


@pytest.mark.parametrize("pool", ["mean", "max"])
def test_a_patient_is_the_mean_or_maximum_of_its_rows(pool):
    table, _ = cohort(40)
    by_hand = getattr(pd.DataFrame(table.x).groupby(table.about.patient.to_numpy()), pool)().to_numpy()
    first = table.about.drop_duplicates("patient").index.to_numpy()
    single = with_features(table.take(first), by_hand)
    a, b = outcome(table, "response", pool=pool, **QUICK), outcome(single, "response", **QUICK)
    assert a.table["p:yes"].to_numpy() == pytest.approx(b.table["p:yes"].to_numpy(), abs=1e-6)


def test_covariates_are_imputed_from_training_patients_only():
    frame = pd.DataFrame({"patient": list("abcdef"), "age": [1, 2, 6, None, 1000, None]})
    frame["stage"] = ["I", "I", "II", None, "IV", "II"]
    covariates = Covariates(frame[["age", "stage"]])
    found = covariates.encode(np.array([0, 1, 2]), np.arange(6))
    assert found[:, 0] == pytest.approx([1, 2, 6, 2, 1000, 2])  # the median of a, b and c
    assert found[:, 1:].tolist() == [[1, 0], [1, 0], [0, 1], [1, 0], [0, 0], [0, 1]]  # I, II; IV unseen


def test_covariates_with_missing_values_are_used_and_told(tmp_path):
    table, clinic = cohort(60)
    clinic.loc[3:9, "age"] = None
    clinic.loc[12:13, "stage"] = None
    result = outcome(table, "response", covariates=written(clinic, tmp_path), **QUICK)
    assert result.facts["covariates"] == {"age": "numeric, 7 missing", "stage": "categorical, 2 missing"}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda c: c.iloc[4:], DataError, "4 of 40 patients have no row"),
        (lambda c: pd.concat([c, c.iloc[:1]]), DataError, "a patient has two rows"),
        (lambda c: c.rename(columns={"patient": "id"}), DataError, "no column 'patient'"),
        (lambda c: c[["patient"]], UseError, "has no covariates"),
        (lambda c: c.assign(note=[f"text {i}" for i in range(len(c))]), DataError, "'note' is neither"),
        (lambda c: c.assign(grade=np.nan), DataError, "column 'grade' is empty"),
    ],
)
def test_a_bad_table_of_covariates_is_one_clear_error(change, error, message, tmp_path):
    _, clinic = cohort(40)
    with pytest.raises(error, match=message) as caught:
        read_covariates(written(change(clinic), tmp_path), list(clinic.patient))
    assert "clinic.csv" in str(caught.value) and "text 1" not in str(caught.value)


def test_patients_known_by_their_salted_keys_are_found_by_their_names(tmp_path):
    _, clinic = cohort(40)
    keys = [hashed(salt(), "patient", name) for name in ("p003", "p001")]
    frame = read_covariates(written(clinic, tmp_path), keys, ["age"]).frame
    assert frame.age.tolist() == pytest.approx([clinic.age[3], clinic.age[1]])
    clinic.loc[5, "patient"] = None
    with pytest.raises(DataError, match="names no patient"):
        read_covariates(written(clinic, tmp_path), keys)


def test_columns_can_be_named(tmp_path):
    _, clinic = cohort(40)
    path = written(clinic.assign(note=[f"text {i}" for i in range(40)]), tmp_path)
    assert read_covariates(path, ["p003", "p001"], ["age"]).frame.age.tolist() == pytest.approx(
        [clinic.age[3], clinic.age[1]]
    )
    with pytest.raises(UseError, match="no column 'sex'"):
        read_covariates(path, ["p003"], ["sex"])
    with pytest.raises(UseError, match="no such file"):
        read_covariates(tmp_path / "none.csv", ["p003"])


def test_what_cannot_be_an_outcome_is_one_clear_error():
    table, _ = cohort(40)
    with pytest.raises(UseError, match=r"[Gg]ive the label of the time"):
        outcome(table, "progressed")
    with pytest.raises(UseError, match="two classes or a time"):
        outcome(lesions(20), "grade")
    with pytest.raises(DataError, match="more than one value of 'malignancy'"):
        outcome(lesions(20), "malignancy")
    with pytest.raises(DataError, match="only one class"):
        outcome(with_labels(table, label_response="yes"), "response")
    with pytest.raises(DataError, match="none with an event"):
        outcome(with_labels(table, label_progressed=0.0), "months")
    with pytest.raises(DataError, match="fewer patients than folds"):
        outcome(table.take((table.about.patient <= "p003").to_numpy()), "months", folds=5)
    with pytest.raises(DataError, match="features are constant"):
        outcome(with_features(table, np.ones((len(table), 3))), "response")
    with pytest.raises(UseError, match="found 0 labels of kind event"):
        specs = {n: s for n, s in table.specs.items() if n != "progressed"}
        outcome(type(table)(table.x, table.about, specs), "months")
