"""Distances follow their definition, separate organs are found, shuffled organs are not."""

from __future__ import annotations

import os
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from matplotlib import pyplot as plt

from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.case import LabelSpec
from smartlab.evaluation.features.table import FeatureTable
from smartlab.evaluation.look.clusters import clusters, style
from smartlab.evaluation.look.separation import estimates, knn_purity, separation, spread, standardised

ORGANS = ["heart", "liver", "spleen", "aorta"]


def features(x: np.ndarray, y: np.ndarray, patients: np.ndarray) -> FeatureTable:
    n = len(y)
    about = pd.DataFrame({"case": [f"c{i}" for i in range(n)], "patient": patients.astype(str), "image": 0})
    about["split"] = None
    about["label:organ"] = [ORGANS[i] for i in y]
    spec = {"organ": LabelSpec(kind="multiclass", classes=ORGANS)}
    return FeatureTable(x.astype(np.float32), about, spec, {"encoder": "made up"})


def blobs(apart: float, seed: int = 0, patients: int = 20) -> FeatureTable:
    """One row per organ and patient, organs `apart` standard deviations from each other."""
    rng = np.random.default_rng(seed)
    y, who = np.tile(np.arange(4), patients), np.repeat(np.arange(patients), 4)
    return features(apart * np.eye(4)[y] + rng.normal(size=(4 * patients, 4)), y, who)


def test_distances_by_hand():
    x = np.array([[0.0, 1.0], [0.0, -1.0], [6.0, 8.0], [6.0, 8.0]])
    inter, intra, ratio = spread(x, np.array([0, 0, 1, 1]), np.ones((1, 4)))[0]
    assert (inter, intra, ratio) == pytest.approx((10, 0.5, 20))
    doubled = spread(x, np.array([0, 0, 1, 1]), np.array([[1, 3, 1, 0]]))[0]  # weights: rows drawn so often
    assert doubled == pytest.approx(spread(x[[0, 1, 1, 1, 2]], np.array([0, 0, 0, 0, 1]), np.ones((1, 5)))[0])


def test_separate_organs_are_found():
    result = clusters(blobs(12), embeddings=("pca",), draws=100)
    m = result.metrics
    assert m["ari"].value == m["nmi"].value == m["features/knn_purity"].value == 1
    assert m["features/ratio"].value > 2 and m["features/silhouette"].value > 0.5
    assert m["features/ratio"].low < m["features/ratio"].value < m["features/ratio"].high
    assert m["features/ratio"].n == 20
    assert m["knn_purity_chance"].value == pytest.approx(0.25)
    assert {"case", "patient", "image", "organ", "cluster", "pca_x", "pca_y"} <= set(result.table)
    assert len(result.table) == 80 and result.facts["encoder"] == "made up"
    plt.close(result.figure())


def test_shuffled_organs_give_chance():
    table = blobs(12, patients=60)
    about = table.about.assign(
        **{"label:organ": np.random.default_rng(1).permutation(table.about["label:organ"])}
    )
    m = clusters(FeatureTable(table.x, about, table.specs), embeddings=("pca",), draws=100).metrics
    assert abs(m["ari"].value) < 0.05
    assert m["features/knn_purity"].value == pytest.approx(m["knn_purity_chance"].value, abs=0.06)
    assert m["features/silhouette"].value < 0.05


def test_neighbours_are_of_other_patients():
    """Each patient's rows are one point, organs mixed at random: own rows would look pure."""
    y, who = np.repeat(np.arange(4), 10), np.repeat(np.arange(4), 10)  # a patient has one organ only
    x = np.eye(4)[who] + 1e-3 * np.random.default_rng(0).normal(size=(40, 4))
    purity, chance = knn_purity(x, y, who.astype(str), 5)
    assert not purity.any() and not chance.any()


def test_constant_features_are_chance_not_an_error():
    y, who = np.tile(np.arange(4), 10), np.repeat(np.arange(10), 4)
    result = clusters(features(np.ones((40, 3)), y, who), embeddings=("pca", "tsne"), draws=50)
    assert result.metrics["features/knn_purity"].value == pytest.approx(0.25)
    assert result.metrics["ari"].value == 0
    assert result.metrics["features/intra"].value == 0
    assert "features/ratio" not in result.metrics
    assert any("constant" in note for note in result.facts["notes"])
    plt.close(result.figure())


def test_standardising_is_by_dimension():
    x = standardised(np.array([[1.0, 1e4, 7.0], [2.0, 3e4, 7.0], [3.0, 2e4, 7.0]]))
    assert x.std(0) == pytest.approx([1, 1, 0])


def test_one_patient_has_no_intervals_and_says_so():
    y = np.tile(np.arange(4), 10)
    x = np.eye(4)[y] + 0.1 * np.random.default_rng(0).normal(size=(40, 4))
    result = clusters(features(x, y, np.zeros(40)), embeddings=("pca",), draws=50)
    assert np.isnan(result.metrics["features/ratio"].low)
    assert "features/knn_purity" not in result.metrics
    assert "one patient" in result.facts["notes"][0]


def test_organs_with_one_row_are_left_out_and_too_few_are_refused():
    x, who = np.random.default_rng(0).normal(size=(5, 3)), np.arange(5)
    result = clusters(features(x, np.array([0, 0, 1, 1, 2]), who), embeddings=("pca",), draws=50)
    assert result.facts["left_out"] == ["spleen"] and len(result.table) == 4
    with pytest.raises(DataError, match="two classes of two rows"):
        clusters(features(x[:4], np.array([0, 1, 2, 3]), who[:4]))
    with pytest.raises(UseError, match="no embedding"):
        clusters(blobs(1), embeddings=("isomap",))
    with pytest.raises(UseError, match="no label"):
        clusters(blobs(1), label="tissue")


def test_without_umap_there_is_pca_and_a_note(monkeypatch):
    monkeypatch.setitem(sys.modules, "umap", None)
    result = clusters(blobs(3), embeddings=("umap",), draws=50)
    assert "pca/ratio" in result.metrics and "umap_x" not in result.table
    assert any("PCA instead" in note for note in result.facts["notes"])


def test_other_features_stand_beside_on_the_same_rows():
    good, bad = blobs(3), blobs(0.5, seed=5)
    bad = FeatureTable(bad.x, good.about, good.specs)
    result = clusters(good, beside={"random": bad, "same": good}, embeddings=("pca",), draws=200)
    alone = clusters(bad, embeddings=("pca",), draws=200)
    for name in ("features/ratio", "features/silhouette", "features/knn_purity", "ari"):
        assert result.metrics[f"random {name}"] == alone.metrics[name]
    ratio = result.metrics["features/ratio minus random"]
    assert ratio.value == pytest.approx(
        result.metrics["features/ratio"].value - alone.metrics["features/ratio"].value
    )
    assert 0 < ratio.low < ratio.value < ratio.high
    assert set(result.metrics["features/knn_purity minus same"][:3]) == {0}
    turned = FeatureTable(bad.x[::-1], good.about[::-1].reset_index(drop=True), good.specs)
    with pytest.raises(DataError, match="cannot put 'random' beside"):
        clusters(good, beside={"random": turned}, embeddings=("pca",), draws=100)


@pytest.mark.slow
def test_umap_leaves_the_number_of_threads_alone_and_keeps_what_it_compiled():
    """numba sets it for the whole process, which made encoders many times slower where cores were shared."""
    code = (
        "import numpy as np, torch; from smartlab.evaluation.look.clusters import umap_layouts\n"
        "before = torch.get_num_threads(); umap_layouts(np.random.rand(32, 24), 2, 0); assert torch.get_num_threads() == before\n"
        "from umap.umap_ import smooth_knn_dist as compiled; assert compiled.stats.cache_path"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


@pytest.mark.slow  # numba compiles UMAP where it has not before
def test_umap_beside_the_others():
    result = clusters(blobs(12), draws=50, umap_seeds=2)
    assert {"umap_x", "pca_x", "tsne_x"} <= set(result.table)
    assert result.metrics["umap/knn_purity"].value > 0.95
    assert 0 < result.metrics["umap/stability"].value <= 1
    again = clusters(blobs(12), draws=50, umap_seeds=2)
    assert np.array_equal(again.table.umap_x, result.table.umap_x)
    plt.close(result.figure())


@pytest.mark.slow
def test_the_interval_of_the_ratio_covers_it():
    """Nominal 95%: over 300 cohorts of 80 patients, the expected ratio of such cohorts lies in 92% to 98%."""
    found = []
    for seed in range(300):
        table = blobs(3, seed=seed, patients=80)
        y = table.about["label:organ"].map(ORGANS.index).to_numpy()
        patients = table.about.patient.to_numpy()
        found.append(estimates(separation(table.x, y, patients, 5, 200, seed), patients)["ratio"])
    expected = np.mean([e.value for e in found])
    assert 0.92 <= np.mean([e.low <= expected <= e.high for e in found]) <= 0.98


def test_many_organs_look_different():
    looks = [(s["color"], s["marker"]) for s in map(style, range(64))]
    assert len(set(looks)) == 64
