"""Clusters are matched as they should, Dice is that of voxels, and no patient helps to score itself."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt

from smartlab.core.errors import DataError, UseError
from smartlab.evaluation.features.tokens import Units, organ_tokens
from smartlab.evaluation.learn.folds import learned_and_judged
from smartlab.evaluation.look.clusters import clusters
from smartlab.evaluation.look.unsupervised import _dice, ceiling, match, unsupervised
from tests.evaluation.attention_store import made_store, small_encoder


def scan(rng: np.random.Generator, shuffled: bool = False) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Two organs of whole units that differ in density; shuffled: labels at random places instead."""
    hu = rng.normal(0, 5, (32, 32, 32))
    liver, spleen = np.zeros((2, 32, 32, 32), bool)
    liver[:16, :16], spleen[16:, 16:] = True, True
    hu[liver] += 100
    hu[spleen] += 200
    if shuffled:
        units = rng.permutation(64).reshape(4, 4, 4).repeat(8, 0).repeat(8, 1).repeat(8, 2)
        liver, spleen = units < 16, (units >= 16) & (units < 32)
    return hu, {"liver": liver, "spleen": spleen}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    return made_store(tmp_path_factory.mktemp("unsupervised"), {f"p{i}": scan(rng) for i in range(4)})


def test_matching_is_one_to_one_and_best_in_total():
    counts = np.array([[0, 10, 0], [0, 10, 8], [0, 0, 2], [30, 0, 0]], float)
    organ = match(np.array([0, 1, 1, 2]), counts, 4)
    assert organ.tolist() == [1, 2, 0, 0]  # the second cluster would rather be organ 1, but that is taken


def test_dice_is_that_of_voxels():
    counts = np.array([[2, 6, 0], [0, 4, 4], [8, 0, 0]], float)
    dice = _dice(counts, np.array([1, 2, 0]))
    assert dice == pytest.approx([2 * 6 / (8 + 10), 2 * 4 / (8 + 4)])
    assert np.isnan(_dice(np.array([[8.0, 0.0]]), np.array([0]))[0])


def test_no_choice_of_units_exceeds_the_ceiling():
    counts = np.random.default_rng(0).integers(0, 9, (7, 3)).astype(float)
    sets = [np.array([(n >> i) & 1 for i in range(7)]) for n in range(1, 2**7)]
    for organ in (1, 2):
        best = max(_dice(counts, organ * chosen)[organ - 1] for chosen in sets)
        assert ceiling(Units({}, counts))[organ - 1] == pytest.approx(best)


def test_no_patient_is_on_both_sides():
    patients = np.array(["a", "b", "a", "c", "d", "d", "e"])
    pairs = learned_and_judged(patients, 3, seed=1)
    for fit, score in pairs:
        assert not set(patients[fit]) & set(patients[score])
    assert sorted(np.concatenate([score for _, score in pairs])) == list(range(7))


def test_organs_that_differ_in_density_are_found_by_density(store):
    result = unsupervised(small_encoder(), store, number=3, folds=2, draws=100, progress=False)
    m = result.metrics
    assert m["ceiling"].value == 1 and m["dice:intensity"].value > 0.9
    wide = result.table.pivot(index=["image", "organ"], columns="feature", values="dice")
    assert (wide.drop(columns="ceiling").max(axis=1) <= wide.ceiling + 1e-9).all()
    assert m["dice"].n == 4 and 0 <= m["dice"].value <= 1
    assert m["dice"].value == pytest.approx((m["dice:liver"].value + m["dice:spleen"].value) / 2)
    assert m["dice minus intensity"].value == pytest.approx(m["dice"].value - m["dice:intensity"].value)
    assert set(result.table.feature) == {"encoder", "random", "intensity", "position", "ceiling"}
    plt.close(result.figure())


def test_shuffled_labels_give_chance(tmp_path):
    """Labels of a quarter of the units each, at random: with three clusters Dice cannot rise far above that."""
    rng = np.random.default_rng(1)
    shuffled = made_store(tmp_path, {f"p{i}": scan(rng, shuffled=True) for i in range(6)})
    result = unsupervised(small_encoder(), shuffled, number=3, folds=3, draws=50, progress=False)
    for name in ("dice", "dice:intensity", "dice:random"):
        assert result.metrics[name].value < 0.4


def test_one_patient_is_said(store):
    result = unsupervised(small_encoder(), store, images=[0], draws=50, progress=False)
    assert "one patient" in result.facts["notes"][0]
    assert np.isnan(result.metrics["dice"].low)
    plt.close(result.figure())


def test_tokens_of_organs_are_rows_for_clusters(store):
    table = organ_tokens(small_encoder(), store, per_organ=5)
    assert len(table) == 4 * 2 * 5
    assert table.about.groupby(["image", "label:organ"]).size().eq(5).all()
    assert table.about.patient.nunique() == 4
    result = clusters(table, embeddings=("pca",), draws=50)
    assert np.isfinite(result.metrics["features/ratio"].value)
    early = organ_tokens(small_encoder(), store, stage=1)
    assert early.x.shape[1] == 24  # channels of the stage at stride 4


def test_bad_requests_say_what_is_wrong(store, tmp_path):
    with pytest.raises(UseError, match="tell nothing apart"):
        unsupervised(small_encoder(), store, number=1, progress=False)
    with pytest.raises(UseError, match="0 to 4"):
        unsupervised(small_encoder(), store, stage=7, progress=False)
    with pytest.raises(DataError, match="no unit of 8 voxels"):
        organ_tokens(small_encoder(), store, minimum=1.1)
    bare = made_store(tmp_path, {"p": (np.zeros((32, 32, 32)), {})})
    with pytest.raises(DataError, match="no labels of organs"):
        unsupervised(small_encoder(), bare, progress=False)


def test_scans_without_labels_are_left_out_and_none_with_any_is_told(tmp_path):
    rng = np.random.default_rng(0)
    scans = {f"p{i}": scan(rng) for i in range(3)} | {"q": (scan(rng)[0], {})}
    store = made_store(tmp_path, scans)
    result = unsupervised(small_encoder(), store, number=3, folds=2, progress=False)
    assert result.facts["images"] == result.facts["patients"] == 3
    bare = next(i for i in range(4) if store.labels(i) is None)
    with pytest.raises(DataError, match="no scan has labels of organs"):
        unsupervised(small_encoder(), store, images=[bare], progress=False)
