"""Tables of predictions survive their trip to a file, and runs are compared only on the same cases."""

from __future__ import annotations

import io

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from smartlab.core.errors import DataError, UseError
from smartlab.evaluation.judge import stats
from smartlab.evaluation.judge.compare import COLUMNS, compare, estimate
from smartlab.evaluation.judge.predictions import from_table, to_table
from smartlab.evaluation.judge.result import Result
from tests.evaluation.judge.test_stats import auc_interval, delong_test

N = 120
CASES = [f"case{i:03d}" for i in range(N)]
PATIENTS = [f"p{i // 2}" for i in range(N)]
BINARY = ["benign", "malignant"]


def run(seed: int, skill: float = 1.0) -> pd.DataFrame:
    truth = np.random.default_rng(0).integers(0, 2, N)
    r = np.random.default_rng(seed)
    p = 1 / (1 + np.exp(-(r.normal(size=N) + skill * (2 * truth - 1))))
    return to_table("binary", CASES, PATIENTS, truth, p, BINARY)


def arrays(kind: str):
    r = np.random.default_rng(1)
    p = r.random((N, 3))
    return {
        "binary": (r.integers(0, 2, N), r.random(N), BINARY),
        "multiclass": (r.integers(0, 3, N), p / p.sum(1, keepdims=True), ["1", "2", "10"]),
        "multilabel": (r.integers(0, 2, (N, 3)), p, ["round", "spiculated", "ill-defined"]),
        "number": (r.normal(size=N), r.normal(size=N), []),
    }[kind]


@pytest.mark.parametrize("kind", ["binary", "multiclass", "multilabel", "number"])
def test_predictions_survive_a_file_with_their_kind_and_classes(kind):
    truth, probability, classes = arrays(kind)
    text = to_table(kind, CASES, PATIENTS, truth, probability, classes).to_csv(index=False)
    found = from_table(pd.read_csv(io.StringIO(text)))
    assert (found.kind, found.classes) == (kind, classes)
    assert found.case.tolist() == CASES and found.patient.tolist() == PATIENTS
    assert (found.truth == truth).all()
    assert found.probability == pytest.approx(probability)


def test_positions_are_read_where_they_are_no_names():
    table = run(0)
    positions = table.assign(truth=table.truth.map(BINARY.index))
    assert (from_table(positions).truth == from_table(table).truth).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.drop(columns="patient"), "not a table of predictions"),
        (lambda t: t.drop(columns=["p:benign", "p:malignant"]), "not a table of predictions"),
        (lambda t: t.assign(truth="unsure"), "unknown class .*unsure"),
        (lambda t: t.assign(truth=["benign"] * (N - 1) + ["1"]), "unknown class"),
        (lambda t: t.assign(case="one"), "appears twice"),
        (lambda t: t.assign(patient=None), "patient is missing"),
    ],
)
def test_a_table_that_is_not_predictions_gives_one_clear_error(change, words):
    with pytest.raises(DataError, match=words):
        from_table(change(run(0)), "run a")


def test_estimate_gives_every_score_over_patients():
    found = estimate(run(1), draws=200)
    assert {e.n for e in found.values()} == {N // 2}
    assert all(e.low <= e.value <= e.high for e in found.values())
    one = from_table(run(1))
    assert found["auc"] == auc_interval(one.truth, one.probability, one.patient)
    assert found["brier"] == stats.log_interval((one.probability - one.truth) ** 2, one.patient)


def test_pairs_are_compared_within_folds_and_the_table_remembers_it():
    """Each fold in perfect order, and useless if all are mixed: offsets of models say nothing of a case."""
    truth, fold = np.tile([0, 1], N // 2), np.arange(N) // 2 % 5
    p = 0.1 + 0.15 * fold + 0.1 * truth
    folds = [(np.flatnonzero(fold == k), p[fold == k]) for k in range(5)]
    table = to_table("binary", CASES, CASES, truth, p, BINARY, folds)
    found = estimate(pd.read_csv(io.StringIO(table.to_csv(index=False))), draws=100)
    assert found["auc"] == stats.wilson(N // 2, N // 2)._replace(n=N) and found["auc"].low < 1
    assert estimate(to_table("binary", CASES, CASES, truth, p, BINARY), draws=100)["auc"].value < 0.8
    whole = [(np.arange(N), p)] * 2  # two repeats of one fold are as many pairs, twice
    once, twice = (to_table("binary", CASES, CASES, truth, p, BINARY, parts) for parts in ([], whole))
    assert estimate(twice, draws=100)["auc"] == pytest.approx(estimate(once, draws=100)["auc"])
    row = compare({"within": table, "over": once}, metrics=["auc"], draws=100).iloc[0]
    assert row.value_a == 1 and row.value_b < 0.8 and row.test == "DeLong" and row.p < 0.001


@pytest.mark.parametrize("kind", ["multiclass", "multilabel"])
def test_the_mean_over_classes_has_the_variance_of_a_mean(kind):
    """Three times the same class is as uncertain as that class alone, not less."""
    truth, p, _ = arrays("binary")
    p = 0.05 + 0.3 * p  # three times at most one
    if kind == "multilabel":
        table = to_table(
            kind, CASES, PATIENTS, np.tile(truth[:, None], 3), np.tile(p[:, None], 3), list("abc")
        )
        found = estimate(table, kind, draws=100)
        assert found["auc"] == pytest.approx(auc_interval(truth, p, PATIENTS))
        return
    found = estimate(
        to_table(kind, CASES, PATIENTS, truth, np.column_stack([1 - p, p]), BINARY), kind, draws=100
    )
    alone = auc_interval(truth, p, PATIENTS)
    assert found["auc"] == pytest.approx(alone, abs=0.002) and found["auc:malignant"] == pytest.approx(alone)
    assert found["auc:benign"] == pytest.approx(found["auc:malignant"])


def test_twenty_separated_patients_are_not_certainty():
    truth = np.repeat([0, 1], 10)
    p = np.where(truth == 1, 0.9, 0.1)
    found = estimate(to_table("binary", CASES[:20], CASES[:20], truth, p, BINARY), draws=100)
    for name in ("auc", "average_precision", "accuracy", "balanced_accuracy", "sensitivity", "specificity"):
        assert found[name].value == 1 and found[name].low < 0.85 and found[name].high == 1, name


def test_compare_tests_every_pair_on_patients_and_corrects_for_all():
    runs = {"good": run(1, 1.5), "fair": run(2, 0.7), "poor": run(3, 0.0)}
    table = compare(runs, metrics=["auc", "brier"], draws=300)
    assert list(table.columns) == COLUMNS and len(table) == 6
    assert set(table.patients) == {N // 2}
    assert table.p_holm.to_numpy() == pytest.approx(stats.holm(table.p.to_numpy()))
    assert table.difference.to_numpy() == pytest.approx((table.value_a - table.value_b).to_numpy())
    first = table[(table.metric == "auc") & (table.a == "good") & (table.b == "poor")].iloc[0]
    a, b = from_table(runs["good"]), from_table(runs["poor"])
    exact = delong_test(a.truth, a.probability, b.probability, a.patient)
    assert first.test == "DeLong" and first.p == pytest.approx(exact.p)
    assert first.low > 0 and first.p_holm < 0.001
    assert set(table[table.metric == "brier"].test) == {"bootstrap"}


def test_the_order_of_cases_does_not_matter_and_equal_runs_do_not_differ():
    a, b = run(1), run(2)
    shuffled = b.sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(
        compare({"a": a, "b": b}, draws=100), compare({"a": a, "b": shuffled}, draws=100)
    )
    same = compare({"a": a, "again": a.iloc[::-1]}, draws=100)
    assert (same.difference == 0).all() and (same.p == 1).all()


@pytest.mark.parametrize("kind", ["multiclass", "multilabel", "number"])
def test_every_kind_of_label_can_be_compared(kind):
    truth, probability, classes = arrays(kind)
    runs = {
        name: to_table(kind, CASES, PATIENTS, truth, p, classes)
        for name, p in (("a", probability), ("b", probability[::-1]))
    }
    table = compare(runs, draws=100)
    assert np.isfinite(table[["difference", "low", "high", "p", "p_holm"]].to_numpy()).all()
    assert set(table.test[table.metric != "auc"]) == {"bootstrap"}
    assert set(table.test[table.metric == "auc"]) <= {"DeLong"} and not table.metric.str.contains(":").any()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.iloc[5:], "5 cases in only one"),
        (lambda t: t.assign(truth=t.truth.to_numpy()[::-1]), "disagree"),
        (lambda t: t.assign(patient=t.patient.to_numpy()[::-1]), "disagree"),
        (
            lambda t: t.rename(columns={"p:benign": "p:malignant", "p:malignant": "p:benign"}),
            "different labels",
        ),
    ],
)
def test_runs_on_different_cases_are_not_compared(change, words):
    with pytest.raises(DataError, match=words):
        compare({"a": run(1), "b": change(run(2))})


def test_a_comparison_that_cannot_be_made_says_why():
    with pytest.raises(UseError, match="two runs"):
        compare({"a": run(1)})
    with pytest.raises(UseError, match="no score 'f1'"):
        compare({"a": run(1), "b": run(2)}, metrics=["f1"])
    one_class = {k: run(k).assign(truth="benign") for k in (1, 2)}
    table = compare(one_class, draws=100)
    assert table[table.metric == "auc"].p.isna().all() and table[table.metric == "brier"].p.notna().all()


def test_results_are_compared_from_their_folders_as_from_memory(tmp_path):
    tables = {"a": run(1), "b": run(2, skill=0.2)}
    for name, table in tables.items():
        folder = tmp_path / name / "evaluation" / "probe"
        Result("probe", {}, table, plt.figure).save(folder)
    here = compare(tables, metrics=["auc", "brier"], draws=200)
    there = compare({n: tmp_path / n for n in tables}, "probe", metrics=["auc", "brier"], draws=200)
    pd.testing.assert_frame_equal(here, there)
    named = {
        n: t.replace({"truth": {"benign": "None"}}).rename(columns=lambda c: c.replace("benign", "None"))
        for n, t in tables.items()
    }
    for name, table in named.items():
        Result("probe", {}, table, plt.figure).save(tmp_path / name / "evaluation" / "probe")
    again = compare({n: tmp_path / n for n in tables}, "probe", metrics=["auc", "brier"], draws=200)
    pd.testing.assert_frame_equal(here, again)
    (tmp_path / "b" / "evaluation" / "probe" / "result.json").unlink()  # written last: broken off
    with pytest.raises(DataError, match="b holds no result"):
        compare({n: tmp_path / n for n in tables}, "probe")


def test_what_a_result_says_of_its_label_is_not_guessed_from_its_table(tmp_path):
    """Labels of which every case happens to have one, with probabilities that sum to 1, look like classes."""
    truth, p, _ = arrays("multiclass")
    table = to_table("multilabel", CASES, PATIENTS, np.eye(3, dtype=int)[truth], p, ["a", "b", "c"])
    told = Result("probe", {}, table, plt.figure, {"label_kind": "multilabel"})
    told.save(tmp_path / "x")
    assert from_table(table).kind == "multiclass"
    for results in ({"x": told, "y": told}, {"x": tmp_path / "x", "y": told}):
        assert "exact_match" in set(compare(results, draws=100).metric)


def dice(shift: float, seed: int) -> pd.DataFrame:
    """Dice of two structures in one or two scans of 20 patients, for two ways to start."""
    r, rows = np.random.default_rng(seed), []
    for i in range(30):
        for organ in ("liver", "spleen"):
            hard = 0.1 * np.sin(i)
            rows += [
                {"case": f"c{i}", "patient": f"p{i % 20}", "structure": organ, "mode": mode, "fraction": 1.0,
                 "dice": 0.7 + hard + (shift if mode == "full" else 0) + 0.02 * r.normal(), "hd95": 5 + r.random()}
                for mode in ("full", "scratch")
            ]  # fmt: skip
    return pd.DataFrame(rows)


def test_scores_of_cases_are_compared_by_patient():
    results = {
        n: Result("segment", {}, dice(shift, s), plt.figure) for n, shift, s in [("a", 0.05, 1), ("b", 0, 2)]
    }
    found = compare(results).set_index("metric")
    assert found.loc["dice", "patients"] == 20 and found.loc["dice", "test"] == "paired t"
    a, b = (r.table[r.table["mode"] == "full"].groupby("case").dice.mean() for r in results.values())
    expected = stats.paired_mean(a, b, [f"p{int(c[1:]) % 20}" for c in a.index])
    assert found.loc["dice", ["difference", "low", "high", "p"]].tolist() == pytest.approx(expected[:4])
    assert found.loc["dice", "p"] < 1e-6 < 0.05 < found.loc["hd95", "p"]
    half = Result("segment", {}, dice(0, 3).iloc[4:], plt.figure)
    with pytest.raises(DataError, match="different cases or structures"):
        compare({"a": results["a"], "half": half})
    with pytest.raises(UseError, match="no score 'auc' of segment"):
        compare(results, "segment", metrics=["auc"])
