"""Trivial features: exact on lesions of known size and density."""

from __future__ import annotations

import os

import nibabel
import numpy as np
import pytest

import smartlab as sl
from smartlab import DataError
from smartlab.data.cohort.case import Case, LabelSpec, Lesion
from smartlab.data.cohort.manifest import Manifest, Source
from smartlab.evaluation.features.baselines import histogram, lesion_baselines
from smartlab.evaluation.features.encoders import random_encoder
from smartlab.evaluation.features.features import lesion_features

QUIET = {"progress": False}
RADII, HU = (6, 9, 15), (-300, 0, 60)  # mm (voxels of 1 mm), density


def ball(shape, center, radius):
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    return sum((a - c) ** 2 for a, c in zip(axes, center, strict=True)) <= radius**2


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """(manifest, store): three patients with a ball each, a second ball apart, and one lesion without a mask."""
    os.environ["SMARTLAB_SALT"] = "tests-only-no-secret"
    root, shape = tmp_path_factory.mktemp("balls"), (80, 70, 60)
    cases = []
    for k, (radius, hu) in enumerate(zip(RADII, HU, strict=True)):
        image, mask = np.full(shape, -400, np.int16), np.zeros(shape, np.uint8)
        for center, r, value in (((30, 35, 30), radius, hu), ((53, 48, 40), 4, 500)):
            inside = ball(shape, center, r)
            image[inside], mask[inside] = value, 1
        affine = np.diag([1.0, 1.0, 1.0, 1.0])
        affine[:3, 3] = (-40, -30, 100 * k)
        nibabel.save(nibabel.Nifti1Image(image, affine), root / f"{k}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(mask, affine), root / f"{k}-mask.nii.gz")
        common = {"patient": f"p{k}", "image": f"{k}.nii.gz", "masks": {"nodule": f"{k}-mask.nii.gz"}}
        for name, index, diameter in (
            ("main", (30.4, 35, 30), None),
            ("small", (53, 48, 40), 8.0),
            ("unmarked", (10, 10, 10), 11.0 if k else None),
        ):
            center = np.array(index) + affine[:3, 3]
            lesion = Lesion(center_mm=tuple(center.tolist()), diameter_mm=diameter)
            cases.append(Case(id=f"{k}-{name}", lesion=lesion, labels={"kind": name}, **common))
    man = Manifest(
        name="balls", title="t", modality="CT", licence="l", citation="c", homepage="h",
        source=Source(kind="local"), cases=cases, labels={"kind": LabelSpec(kind="multiclass")},
    )  # fmt: skip
    sl.build_store(man, root, root / "store", workers=0, spacing=1.0, progress=False)
    return man, sl.open_store(root / "store")


def rows(table, kind):
    return table.x[(table.about["label:kind"] == kind).to_numpy()]


def test_sizes_and_densities_are_those_of_the_lesion_at_the_centre(cohort):
    man, store = cohort
    keys = [store.key_of(case) for case in man.cases if case.labels["kind"] == "main"]
    tables = lesion_baselines(store, man, cases=keys, **QUIET)
    volumes = np.array([ball((80, 70, 60), (30, 35, 30), r).sum() for r in RADII])
    np.testing.assert_allclose(tables["size"].x[:, 1], volumes / 1000, rtol=1e-5)
    np.testing.assert_allclose(tables["size"].x[:, 0], (6 * volumes / np.pi) ** (1 / 3), rtol=1e-5)
    np.testing.assert_allclose(tables["mean HU"].x[:, 0], HU)
    assert tables["size"].facts["size_from"] == {"mask": 3}


def test_a_second_lesion_of_the_same_scan_is_measured_apart(cohort):
    man, store = cohort
    tables = lesion_baselines(store, man, **QUIET)
    np.testing.assert_allclose(rows(tables["mean HU"], "small"), 500)
    volume = ball((80, 70, 60), (53, 48, 40), 4).sum() / 1000
    np.testing.assert_allclose(rows(tables["size"], "small")[:, 1], volume, rtol=1e-5)


def test_without_a_mask_a_central_ball_and_the_given_diameter_stand_in(cohort):
    man, store = cohort
    tables = lesion_baselines(store, man, **QUIET)
    np.testing.assert_allclose(rows(tables["mean HU"], "unmarked"), -400)
    assert tables["size"].facts["size_from"] == {"mask": 6, "diameter_mm": 2, "not known": 1}
    size = rows(tables["size"], "unmarked")
    np.testing.assert_allclose(size[1:, 0], 11.0)
    np.testing.assert_array_equal(size[:, 2], [0, 1, 1])  # said, not hidden
    known = tables["size"].x[tables["size"].x[:, 2] == 1, 0]
    assert size[0, 0] == pytest.approx(known.mean())


def test_the_given_diameter_stands_beside_the_masks_where_every_case_has_one(cohort):
    man, store = cohort
    keys = [store.key_of(case) for case in man.cases if case.labels["kind"] == "small"]
    size = lesion_baselines(store, man, cases=keys, **QUIET)["size"]
    np.testing.assert_array_equal(size.x[:, 2], 8.0)


def test_where_no_size_is_known_there_is_no_size_baseline(cohort):
    man, store = cohort
    (key,) = [store.key_of(case) for case in man.cases if case.id == "0-unmarked"]
    tables = lesion_baselines(store, man, cases=[key], **QUIET)
    assert list(tables) == ["mean HU", "HU histogram"]


def test_a_histogram_has_its_mass_where_the_densities_are(cohort):
    man, store = cohort
    table = lesion_baselines(store, man, window=(-800.0, 800.0), **QUIET)["HU histogram"]
    assert table.x.shape[1] == 16
    np.testing.assert_allclose(table.x.sum(1), 1, rtol=1e-6)
    for row, hu in zip(rows(table, "main"), HU, strict=True):
        assert row.argmax() == (hu + 800) // 100 and row.max() == 1
    assert (histogram(np.array([-5000, 5000]), (-1, 1))[[0, -1]] == 0.5).all()


def test_rows_are_those_of_the_features_so_that_both_are_probed_alike(cohort):
    man, store = cohort
    config = sl.load_config("tiny", {"data.view": 32, "data.region": 48, "data.spacing": 1.0})
    features = lesion_features(random_encoder(config), store, man, cache=False, **QUIET)
    for table in lesion_baselines(store, man, **QUIET).values():
        assert table.about.equals(features.about) and table.specs == features.specs
        assert table.facts["data"] == features.facts["data"]


def test_no_lesion_is_one_clear_error(cohort):
    man, store = cohort
    with pytest.raises(DataError, match="no case has a lesion"):
        lesion_baselines(store, man, cases=[], **QUIET)
