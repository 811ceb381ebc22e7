"""Attention on a mask scores one, uniform attention scores chance, empty masks are counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt

from smartlab.core.errors import DataError, UseError
from smartlab.data.crops.regions import is_lesion
from smartlab.evaluation.look.localize import centre_map, localize, score_scan
from smartlab.masking import lift
from tests.evaluation.attention_store import made_store, small_encoder

NAMES = {1: "liver", 2: "liver_tumour"}
REGION = {"lesion": [2]}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Four patients: a liver with a tumour in it, but for the last, who has no tumour."""
    rng, scans = np.random.default_rng(0), {}
    for i in range(4):
        hu = rng.normal(40, 20, (32, 32, 32))
        liver, tumour = np.zeros((2, 32, 32, 32), bool)
        liver[6:28, 6:28, 6:28] = True
        tumour[12 + i : 18 + i, 12:20, 14:22] = i < 3
        scans[f"p{i}"] = (hu, {"liver": liver & ~tumour, "tumour": tumour})
    return made_store(tmp_path_factory.mktemp("localize"), scans)


def slab() -> tuple[np.ndarray, np.ndarray]:
    """A mask of whole units (a quarter of the scan), and attention on exactly these."""
    labels = np.zeros((32, 16, 16), np.uint8)
    labels[8:16] = 2
    unit_map = np.zeros((4, 2, 2))
    unit_map[1] = 1 / 4
    return labels, unit_map


def test_attention_equal_to_the_mask():
    labels, unit_map = slab()
    row = score_scan(unit_map[None], labels, REGION, NAMES, 8, top=0.25)[0]
    assert row["lift"] == pytest.approx(1 / row["share"]) == pytest.approx(4)
    assert row["inside"] == pytest.approx(1)
    assert row["auc"] == row["pointing"] == 1
    assert row["best_dice"] == 1
    assert row["quantile_dice"] == pytest.approx(1)


def test_uniform_attention_is_chance_also_where_air_pads_the_scan():
    labels, _ = slab()
    row = score_scan(np.full((1, 8, 4, 4), 1 / 128), labels[:29, :13], REGION, NAMES, 8, top=0.25)[0]
    assert row["lift"] == pytest.approx(1, abs=1e-5)
    assert row["inside"] == pytest.approx(row["share"])
    assert row["auc"] == 0.5
    assert row["pointing"] == pytest.approx(0.25)


def test_lift_is_that_of_masking_on_whole_units():
    rng = np.random.default_rng(3)
    labels = (2 * (rng.random((32, 16, 24)) < 0.2)).astype(np.uint8)
    a = rng.random((4, 2, 3))
    a /= a.sum()
    share = (labels.reshape(4, 8, 2, 8, 3, 8) > 0).mean((1, 3, 5))
    expected = lift(torch.tensor(a).reshape(1, -1), torch.tensor(share).reshape(1, -1))
    assert score_scan(a[None], labels, REGION, NAMES, 8)[0]["lift"] == pytest.approx(
        float(expected), rel=1e-5
    )


def test_finding_only_the_organ_has_a_matched_lift_of_one():
    labels = np.zeros((32, 32, 32), np.uint8)
    labels[8:24, 8:24, 8:24] = 1
    labels[8:16, 8:16, 8:16] = 2  # one unit of the liver
    organ = np.full((4, 4, 4), 1e-3)
    organ[1:3, 1:3, 1:3] = 1.0
    lesion = organ.copy()
    lesion[1, 1, 1] = 3.0
    found = score_scan(np.stack([organ, lesion]), labels, REGION, NAMES, 8)
    assert found[0]["lift"] > 5
    assert [row["matched_lift"] for row in found] == pytest.approx([1, 3])


def test_a_lesion_in_unlabelled_tissue_has_no_matched_lift():
    labels, unit_map = slab()
    assert np.isnan(score_scan(unit_map[None], labels, REGION, NAMES, 8)[0]["matched_lift"])


def test_masks_moved_at_random_give_chance():
    rng = np.random.default_rng(4)
    attention = rng.random((1, 6, 6, 6)) ** 4
    rows = []
    for _ in range(60):
        labels = np.zeros((48, 48, 48), np.uint8)
        x, y, z = rng.integers(0, 40, 3)
        labels[x : x + 8, y : y + 8, z : z + 8] = 2
        rows += score_scan(attention, labels, REGION, NAMES, 8)
    assert np.mean([row["auc"] for row in rows]) == pytest.approx(0.5, abs=0.08)
    assert np.mean([row["lift"] for row in rows]) == pytest.approx(1, abs=0.25)


def test_centre_map_is_highest_in_the_middle_of_the_scan():
    found = centre_map((40, 40, 40), (8, 5, 5), 8)  # three units of padding along the first axis
    assert np.unravel_index(found.argmax(), found.shape) == (2, 2, 2)


def test_over_a_cohort(store):
    result = localize(small_encoder(), store, progress=False, draws=200)
    assert result.facts["with_region"] == {"lesion": 3}
    assert result.facts["empty"] == {"lesion": 1}
    assert set(result.table.score) == {
        "mean",
        "head 1",
        "head 2",
        "head 3",
        "random",
        "centre",
        "body",
        "uniform",
    }
    assert result.metrics["lesion/lift:uniform"].value == pytest.approx(1, abs=1e-5)
    assert result.metrics["lesion/auc:uniform"].value == 0.5
    assert result.metrics["lesion/matched_lift:uniform"].value == pytest.approx(1, abs=1e-5)
    pointing = result.metrics["lesion/pointing"]
    assert 0 <= pointing.low < pointing.high <= 1  # wide also where all three or none were hit
    for name in ("auc", "lift"):
        value, low, high, n = result.metrics[f"lesion/{name}"]
        assert low <= value <= high and n == 3
        apart = result.metrics[f"lesion/{name}"].value - result.metrics[f"lesion/{name}:random"].value
        assert result.metrics[f"lesion/{name} minus random"].value == pytest.approx(apart)
    plt.close(result.figure())


def test_an_encoder_that_is_its_own_baseline_differs_by_nothing(store):
    from smartlab.evaluation.features.encoders import random_encoder

    encoder = random_encoder(small_encoder().config, 5)
    result = localize(encoder, store, progress=False, draws=50, seed=5)
    assert result.metrics["lesion/auc minus random"][:3] == (0, 0, 0)


def test_organs_and_named_regions(store):
    result = localize(small_encoder(), store, regions="organs", progress=False, draws=50)
    assert set(result.table.region) == {"liver"} and result.facts["empty"] == {"liver": 0}
    assert not any("matched" in name for name in result.metrics)
    both = localize(small_encoder(), store, regions=["liver", "tumour"], images=[0], progress=False)
    assert set(both.table.region) == {"liver", "tumour"}
    assert np.isnan(both.metrics["liver/auc"].low)  # one patient: no interval
    assert all(is_lesion(name) == (name == "tumour") for name in store.label_names.values())


def test_bad_requests_say_what_is_wrong(store):
    with pytest.raises(DataError, match="none of the 1 scans has a voxel of lesion"):
        localize(small_encoder(), store, images=[3], progress=False)
    with pytest.raises(UseError, match="no such region"):
        localize(small_encoder(), store, regions="spleen", progress=False)
    with pytest.raises(UseError, match="overlaps"):
        localize(small_encoder(), store, regions=["lesion", "tumour"], progress=False)
    with pytest.raises(UseError, match="no semantic attention"):
        localize(small_encoder(semantic__enabled=False, mask__strategy="random"), store, progress=False)
    with pytest.raises(UseError, match="no such image"):
        localize(small_encoder(), store, images=[9], progress=False)
