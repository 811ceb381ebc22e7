"""From a folder of one's own to a manifest: what belongs together is found, and nothing goes wrong without a word."""

from __future__ import annotations

import json
import shutil
import time

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image
from pydicom import dcmread
from pydicom.dataset import Dataset
from typer.testing import CliRunner

import smartlab as sl
from smartlab.cli.app import app
from smartlab.data.cohort.privacy import hashed, salt
from smartlab.data.cohort.scan import scan
from smartlab.data.cohort.scan_names import patients_by_name
from smartlab.data.cohort.verify import verify_manifest
from tests.data import mammograms
from tests.data.dicom_factory import itk_image, write_nifti, write_series
from tests.data.dicom_factory import scan as voxels
from tests.data.images.test_dicom_masks import circle, write_rtstruct, write_seg

SHAPE = (12, 10, 6)


class Folder:
    """A folder of scans under construction: every image is of its own, grids are alike."""

    def __init__(self, path):
        self.path, self.count = path, 0

    def ct(self, name, shape=SHAPE, kind=np.int16, **header):
        self.count += 1
        values = np.random.default_rng(self.count).integers(-1000, 1000, shape).astype(kind)
        return write_nifti(self._at(name), values, **header)

    def mask(self, name, shape=SHAPE, values=(0, 1), shift=0.0):
        affine = np.diag([-0.7, -0.8, 2.5, 1.0])
        affine[0, 3] = shift
        array = np.resize(np.array(values, np.uint8), shape)
        return write_nifti(self._at(name), array, affine)

    def series(self, name, patient="secret-id", **more):
        def edit(ds, i):
            ds.PatientID = patient
            more.get("edit", lambda ds, i: None)(ds, i)

        return write_series(self._at(name), voxels(4), **(more | {"edit": edit}))

    def csv(self, text, encoding="utf-8"):
        path = self.path.parent / "labels.csv"
        path.write_bytes(text.encode(encoding))
        return path

    def _at(self, name):
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "scans").mkdir()
    return Folder(tmp_path / "scans")


def three(folder):
    for name in ("p1", "p2", "p3"):
        folder.ct(f"{name}.nii.gz")
    return folder


def with_table(folder, text, **more):
    """Four scans and a table; `text` is of its rows."""
    three(folder).ct("p4.nii.gz")
    return ["--labels", folder.csv(text, **more)]


# ---- ways to be wrong: what is done -> what is said, and whether a manifest is written all the same ----

WRONG = {}


def wrong(*words, code=0):
    def add(make):
        WRONG[make.__name__] = (make, words, code)
        return make

    return add


@wrong("no scan below this folder", "no file", code=1)
def an_empty_folder(folder):
    pass


@wrong("is a file, not a folder", code=2)
def a_file_as_folder(folder):
    folder.path.rmdir()
    folder.path.write_text("x")


@wrong("no such folder", code=2)
def no_folder(folder):
    folder.path.rmdir()


@wrong("bad.nii.gz", "do not unpack", "empty.nii", "0 bytes", "words.nrrd", "no orientation")
def unreadable_files_among_good(folder):
    three(folder)
    (folder.path / "bad.nii.gz").write_bytes((folder.path / "p1.nii.gz").read_bytes()[:40])
    (folder.path / "empty.nii").touch()
    (folder.path / "words.nrrd").write_text("NRRD0004\n")


@wrong("notes.txt", "not an image (.txt)")
def stray_files(folder):
    (three(folder).path / "notes.txt").write_text("x")


@wrong("flat.nii.gz", "4D image")
def a_scan_over_time(folder):
    three(folder).ct("flat.nii.gz", (*SHAPE, 3))


@wrong("lost.nii.gz", "no orientation", "sform_code and qform_code both 0")
def a_scan_without_orientation(folder):
    three(folder).ct("lost.nii.gz", sform_code=0, qform_code=0)


@wrong("small.nii.gz", "8-bit values are no Hounsfield units", "--masks")
def an_eight_bit_image(folder):
    three(folder).ct("small.nii.gz", kind=np.uint8)


@wrong("b", "004.dcm: damaged DICOM file", "the file is empty")
def a_damaged_slice(folder):
    folder.series("a", "one")
    folder.series("b", "two")
    (folder.path / "b" / "004.dcm").touch()


@wrong("b", "slices are missing", "1 missing")
def a_missing_slice(folder):
    folder.series("a", "one")
    folder.series("b", "two")[1].unlink()


@wrong("DICOM series      1", "b/one/000.dcm, b/one/001.dcm", "a copy of a slice in a/one")
def a_series_copied(folder):
    three(folder).series("a/one")
    shutil.copytree(folder.path / "a", folder.path / "b")


@wrong("a", "duplicated slices", "Remove the copies")
def a_slice_copied_beside(folder):
    files = three(folder).series("a")
    shutil.copy(files[0], folder.path / "a" / "again.dcm")


@wrong("copy.nii.gz", "the same image as anna.nii.gz")
def one_scan_of_two_patients(folder):
    shutil.copy(folder.ct("anna.nii.gz"), folder.path / "copy.nii.gz")


@wrong("patients", "most scans: 2, of P1")
def one_patient_in_two_spellings(folder):
    folder.ct("baseline/P1/ct.nii.gz")
    folder.ct("followup/p1/ct.nii.gz")


@wrong(
    "mr: MR among CT: for these, scan with --modality MR",
    "us: DICOM of modality US: only CT, MR and mammograms",
)
def another_modality(folder):
    three(folder).series("mr", modality="MR", sop_class="1.2.840.10008.5.1.4.1.1.4")
    folder.series("us", modality="US", sop_class="1.2.840.10008.5.1.4.1.1.3.1")


@wrong("only_0000.nii.gz: p9_only has no t2", "p3.nii.gz: no channel", "p8_0000.nii.gz, p8_0001.nii.gz: t2: ")
def channels_that_are_not_complete(folder):
    for name in ("p1_0000", "p1_0001", "p2_0000", "p2_0001", "p3", "p9_only_0000", "p8_0000"):
        folder.ct(f"{name}.nii.gz")
    folder.ct("p8_0001.nii.gz", (12, 10, 5))
    return ["--modality", "MR", "--channels", "t1,t2"]


@wrong("a mammogram among CT", "scan its folder by itself", "shot.png", "a picture, not a scan")
def a_mammogram_and_a_picture_among_ct(folder):
    mammograms.write(three(folder).path / "mg.dcm")
    Image.new("L", (9, 9)).save(folder.path / "shot.png")


@wrong("away.nii.gz", "leads out of the folder", "there", "a link to a folder")
def links_that_lead_out(folder):
    three(folder)
    (folder.path / "p1.nii.gz").rename(folder.path.parent / "away.nii.gz")
    (folder.path / "away.nii.gz").symlink_to(folder.path.parent / "away.nii.gz")
    (folder.path / "there").symlink_to(folder.path.parent)


@wrong("p1_mask.nii.gz", "not on the grid of p1.nii.gz", "12×10×5")
def a_mask_of_another_size(folder):
    three(folder).mask("p1_mask.nii.gz", (12, 10, 5))


@wrong("p1_mask.nii.gz", "does not lie where the image lies", "4.00 mm apart")
def a_mask_that_was_moved(folder):
    three(folder).mask("p1_mask.nii.gz", shift=4.0)


@wrong("p1_mask.nii.gz, p1_seg.nii.gz", "2 masks 'mask' for one scan")
def two_masks_for_one_scan(folder):
    three(folder).mask("p1_mask.nii.gz")
    folder.mask("p1_seg.nii.gz")


@wrong("p9_mask.nii.gz", "a mask without a scan")
def a_mask_without_scan(folder):
    three(folder).mask("p9_mask.nii.gz")


@wrong("no scan below this folder", "2 named like masks, such as a_mask.nii.gz", code=1)
def masks_alone(folder):
    folder.mask("a_mask.nii.gz")
    folder.mask("b_mask.nii.gz")


@wrong("labels/p1.nii.gz", "a label map", "holds 1, 2, 3", "dataset.json")
def a_label_map_without_names(folder):
    for name in ("p1", "p2"):
        folder.ct(f"images/{name}.nii.gz")
        folder.mask(f"labels/{name}.nii.gz", values=(0, 1, 2, 3))


@wrong("dataset.json", "does not name the values", code=1)
def a_dataset_json_that_is_none(folder):
    a_label_map_without_names(folder)
    (folder.path / "dataset.json").write_text("{}")


@wrong("SEG of a series that is not among the scans", "seg.dcm")
def a_segmentation_of_another_series(folder):
    files = write_series(folder.path.parent / "other", voxels(4))
    mask = np.zeros(voxels(4).shape, bool)
    mask[1, 2:5, 2:5] = True
    write_seg(three(folder).path / "seg.dcm", files, {"tumour": mask})


@wrong("structures.dcm", "has 2 structures, choose with --masks: GTV-1, Lung")
def structures_without_a_choice(folder):
    contours(folder, "GTV-1", "Lung")


@wrong("--masks 'tumour*' fits no mask of these scans", code=2)
def a_pattern_that_fits_nothing(folder):
    three(folder).mask("p1_mask.nii.gz")
    return ["--masks", "tumour*"]


@wrong("no such table", "absent.csv", code=2)
def a_table_that_is_not_there(folder):
    three(folder)
    return ["--labels", "absent.csv"]


@wrong("no row fits a scan", "'x1'", "such as 'p1'", code=1)
def ids_that_match_nothing(folder):
    return with_table(folder, "id,y\nx1,0\nx2,1\n")


@wrong("labels.csv line 4", "no scan of this name", "p3, p4: no row in labels.csv")
def some_ids_that_match_nothing(folder):
    return with_table(folder, "id,y\np1,0\np2,1\np9,1\n")


@wrong("line 2: 'p1' fits 2 scans (p1/a, p1/b)", "call the column `patient`", code=1)
def two_scans_for_one_id(folder):
    folder.ct("p1/a.nii.gz")
    folder.ct("p1/b.nii.gz")
    folder.ct("p2/a.nii.gz")
    return ["--labels", folder.csv("id,y\np1,0\np2,1\n")]


@wrong("lines 2 and 3 are both of p1 and disagree", code=1)
def two_rows_for_one_scan(folder):
    return with_table(folder, "id,y\np1,0\np1,1\np2,0\n")


@wrong("column 'y' is there 2 times", code=1)
def a_column_twice(folder):
    return with_table(folder, "id,y,y\np1,0,1\np2,1,1\n")


@wrong("line 3 has 3 cells for 2 columns", code=1)
def a_row_with_too_many_cells(folder):
    return with_table(folder, "id,y\np1,0\np2,1,high\n")


@wrong("a column has no name", code=1)
def a_column_without_name(folder):
    return with_table(folder, "id,,y\np1,5,0\np2,6,1\n")


@wrong("spells one word in two ways, 'Yes' and 'yes'", code=1)
def a_label_in_two_spellings(folder):
    return with_table(folder, "id,y\np1,Yes\np2,yes\np3,no\np4,no\n")


@wrong("column 'y' mixes numbers and words, such as 'high', line 4", code=1)
def mixed_kinds(folder):
    return with_table(folder, "id,y\np1,3\np2,4.5\np3,high\np4,2\n")


@wrong("column scanned", "holds dates")
def a_column_of_dates(folder):
    return with_table(folder, "id,scanned,y\np1,2020-03-01,0\np2,1.4.2021,1\n")


@wrong("column remark", "column what", "names, identifiers or free text")
def free_text(folder):
    return with_table(folder, "id,remark,what,y\np1,x,a b,0\np2,y,c d,1\np3,z,e f,1\np4,z,g,0\n")


@wrong("column number", "identifiers are not taken")
def a_number_that_is_an_identifier(folder):
    return with_table(folder, "id,number,y\np1,483920,0\np2,483921,1\np3,911111,0\n")


@wrong("column site", "has one value only", "no column is a label", code=1)
def no_column_that_is_a_label(folder):
    return with_table(folder, "id,site\np1,A\np2,A\n")


@wrong("line 3: '../away.nii.gz' is outside the folder", code=1)
def a_path_outside(folder):
    table = with_table(folder, "path,y\np1.nii.gz,0\n../away.nii.gz,1\n")
    (folder.path.parent / "away.nii.gz").touch()
    return table


@wrong("appear in more than one split", "'p-", code=1)
def a_patient_in_two_splits(folder):
    return with_table(folder, "id,patient,split,y\np1,A,train,0\np2,A,test,1\np3,B,test,0\n")


@wrong("line 3: split 'tset' is not train, val or test", code=1)
def a_split_misspelt(folder):
    return with_table(folder, "id,split,y\np1,train,0\np2,tset,1\n")


@wrong("is a workbook, not a CSV", "CSV UTF-8", code=1)
def a_workbook(folder):
    return with_table(folder, "PK\3\4", encoding="latin-1")


@wrong("is not a CSV in UTF-8", "line 2", "CSV UTF-8", code=1)
def another_encoding(folder):
    return with_table(folder, "id,y\np1,für\n", encoding="latin-1")


@wrong("no table of labels", code=1)
def a_table_without_rows(folder):
    return with_table(folder, "id,y\n\n")


@wrong("cannot be written here", "--out", code=2)
def an_output_that_cannot_be_written(folder):
    three(folder)
    return ["--out", "/proc/none/manifest.json"]


@wrong("the manifest is a .json file", "manifest.json", code=2)
def a_folder_as_output(folder):
    three(folder)
    return ["--out", folder.path]


@wrong("a manifest with other content is here", "--replace", code=2)
def another_manifest(folder):
    (three(folder).path / "manifest.json").write_text('{"name": "by-hand", "cases": []}')


def contours(folder, *names):
    """A series with an RTSTRUCT drawn on it."""
    files = folder.series("p1")
    volume = sl.read_volume(folder.path / "p1")
    drawn = {name: [circle(volume, 2, 1, (5, 4), 3)] for name in names}
    file = write_rtstruct(folder.path / "structures.dcm", drawn)
    ds, referenced, study, series = dcmread(file), Dataset(), Dataset(), Dataset()
    series.SeriesInstanceUID = dcmread(files[0]).SeriesInstanceUID
    study.RTReferencedSeriesSequence, referenced.RTReferencedStudySequence = [series], [study]
    ds.ReferencedFrameOfReferenceSequence = [referenced]
    ds.save_as(file)


def call(folder, *words):
    return CliRunner().invoke(app, ["data", "scan", str(folder.path), *map(str, words)])


@pytest.mark.parametrize("name", WRONG)
def test_every_way_to_be_wrong_is_told_in_seconds(folder, name):
    make, words, code = WRONG[name]
    more = make(folder) or []
    before = (folder.path / "manifest.json").exists()
    start = time.monotonic()
    done = call(folder, *more)
    assert time.monotonic() - start < 5
    said = (
        done.output
        if done.exception is None or isinstance(done.exception, SystemExit)
        else str(done.exception)
    )
    code_found = getattr(done.exception, "exit_code", done.exit_code)
    assert code_found == code, said
    for word in words:
        assert word in said, said
    assert "secret-id" not in said and "Doe" not in said  # the factory's patient
    assert (folder.path / "manifest.json").exists() == (code == 0 or before)


def test_the_table_of_wrong_ways_is_long_enough():
    assert len(WRONG) >= 40


# ---- what is right ----


def test_a_mixed_folder_opens_verifies_and_builds(folder, tmp_path):
    folder.series("dicom/A", "one")
    folder.series("dicom/B", "two")
    for patient in ("p1", "p2"):
        folder.ct(f"nifti/{patient}/ct.nii.gz")
        folder.mask(f"nifti/{patient}/segmentations/liver.nii.gz")
    sitk.WriteImage(itk_image(voxels()), str(folder._at("other/q.nrrd")))
    sitk.WriteImage(itk_image(voxels(seed=2)), str(folder._at("other/r.mhd")))
    table = folder.csv("\ufeffid;outcome;age\np1;dead;3,5\nq;alive;70\n;;\nr;alive;61\n\n")
    done = call(folder, "--labels", table)
    assert done.exit_code == 0, done.output
    man = sl.load_manifest(folder.path)
    assert [case.id for case in man.cases] == [
        "dicom/A", "dicom/B", "nifti/p1/ct", "nifti/p2/ct", "other/q", "other/r",
    ]  # fmt: skip
    assert [case.masks for case in man.cases][2] == {"liver": "nifti/p1/segmentations/liver.nii.gz"}
    assert man.labels["outcome"].kind == "binary" and man.labels["age"].kind == "number"
    assert {c.id: c.labels for c in man.cases if c.labels}["nifti/p1/ct"] == {"outcome": "dead", "age": 3.5}
    assert sl.verify_manifest(man, folder.path, workers=0, progress=False).ok
    store = sl.build_store(man, folder.path, tmp_path / "store", workers=0, progress=False)
    assert (store.images, store.failed) == (6, 0)
    assert call(folder, "--labels", table).exit_code == 0  # again: the same manifest


def test_no_patient_id_is_written_but_its_salted_hash(folder):
    folder.series("A", "DOE-4711")
    folder.series("B", "DOE-4711")
    folder.ct("A/extra.nii.gz")  # in the folder of that patient
    report = scan(folder.path, out=folder.path / "manifest.json", progress=False)
    text = (folder.path / "manifest.json").read_text() + str(report) + json.dumps(report.as_json())
    assert "4711" not in text and "Jane" not in text
    assert report.manifest.patients == ["p-" + hashed(salt(), "patient", "DOE-4711")[:12]]
    table = folder.csv("patient_id,y\nDOE-4711,1\n")
    folder.ct("B/b.nii.gz")
    folder.ct("other.nii.gz")
    table.write_text(table.read_text() + "other,0\n")
    found = {case.id: case.labels for case in sl.scan_folder(folder.path, table, progress=False).cases}
    assert found["A"] == found["B"] == found["B/b"] == {"y": "1"} != found["other"]


def test_a_table_by_dicom_patient_series_path_and_number(folder):
    uid = dcmread(folder.series("A", "MRN1")[0]).SeriesInstanceUID
    folder.series("B", "MRN2")
    folder.ct("007.nii.gz")
    for keys in (("MRN1", "MRN2", "7"), (uid, "B", "scans/007.nii.gz"), ("A", "b", "007.nii.gz")):
        rows = "".join(f"{key},{y}\n" for key, y in zip(keys, (0, 1, 1), strict=True))
        man = sl.scan_folder(folder.path, folder.csv(f"who,y\n{rows}"), progress=False)
        assert {case.id: case.labels["y"] for case in man.cases} == {"A": "0", "B": "1", "007": "1"}, keys


def test_kinds_of_labels_follow_from_their_values(folder):
    text = "id,hpv,arm,grade,size,event,time\n"
    for k in range(8):
        folder.ct(f"p{k}.nii.gz")
        text += f"p{k},{k % 2},{'AB'[k % 2]},{['low', 'mid', 'high'][k % 3]},{k + 0.5},{k % 2},{k}\n"
    man = sl.scan_folder(folder.path, folder.csv(text), progress=False)
    kinds = {name: spec.kind for name, spec in man.labels.items()}
    expected = {"hpv": "binary", "arm": "binary", "grade": "multiclass", "size": "number"}
    assert kinds == expected | {"event": "event", "time": "time"}
    assert man.labels["hpv"].classes == ["0", "1"] and man.cases[1].labels["event"] == 1.0


def test_what_spreadsheets_save_is_read(folder):
    """A byte order mark before the first name, semicolons, decimal commas, and rows that are empty."""
    three(folder)
    table = folder.csv("\ufeffsize;id\n1,5;p1\n70;p2\n;;\n2;p3;\n\n;;\n")
    report = scan(folder.path, table, progress=False)
    assert [case.labels for case in report.manifest.cases] == [{"size": 1.5}, {"size": 70.0}, {"size": 2.0}]
    assert not report.left


def test_the_keys_that_results_wrote_beside_the_scans_are_no_stray_file(folder):
    folder.ct("p1.nii.gz")
    (folder.path / "smartlab_keys.csv").write_text("case_key,case\n")
    assert not scan(folder.path, progress=False).left


def test_missing_values_are_no_class(folder):
    with_table(folder, "id,y\np1,0\np2,1\np3,NA\np4,\n")
    man = sl.scan_folder(folder.path, folder.path.parent / "labels.csv", progress=False)
    assert man.labels["y"].classes == ["0", "1"] and [bool(c.labels) for c in man.cases] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("ct", "mask", "name"),
    [
        ("p1.nii.gz", "p1_mask.nii.gz", "mask"),
        ("p1_ct.nii", "p1_seg.nii.gz", "mask"),
        ("p1.nii.gz", "p1_liver_mask.nii.gz", "liver"),
        ("imagesTr/la_003_0000.nii.gz", "labelsTr/la_003.nii.gz", "mask"),
        ("s1/ct.nii.gz", "s1/segmentations/aorta.nii.gz", "aorta"),
        ("images/s1/ct.nii.gz", "labels_final/s1/tumour.nii.gz", "tumour"),
        ("volume-7.nii", "segmentation-7.nii", "mask"),
        ("example_ct.nii.gz", "example_seg/liver.nii.gz", "liver"),
        ("P1/thorax.nii.gz", "P1/tumour_mask.nii.gz", "tumour"),
        ("my-seg-study/p1.nii.gz", "my-seg-study/p1_mask.nii.gz", "mask"),
    ],
)
def test_a_mask_finds_the_scan_whose_name_it_continues(folder, ct, mask, name):
    folder.ct(ct)
    folder.mask(mask)
    report = scan(folder.path, progress=False)
    assert [case.masks for case in report.manifest.cases] == [{name: mask}] and not report.left


def test_names_that_begin_alike_are_told_apart(folder):
    for name in ("p1", "p1_b", "p10"):
        folder.ct(f"{name}.nii.gz")
        folder.mask(f"{name}_mask.nii.gz")
    man = sl.scan_folder(folder.path, progress=False)
    assert {case.id: case.masks["mask"] for case in man.cases} == {
        name: f"{name}_mask.nii.gz" for name in ("p1", "p1_b", "p10")
    }


def test_a_label_map_takes_the_names_of_a_dataset_json(folder, tmp_path):
    a_label_map_without_names(folder)
    names = {"labels": {"background": 0, "liver": 1, "spleen": 2, "cyst": 3}}
    (folder.path / "dataset.json").write_text(json.dumps(names))
    man = sl.scan_folder(folder.path, progress=False)
    assert man.organs == {1: "liver", 2: "spleen", 3: "cyst"} and man.cases[0].label_map == "labels/p1.nii.gz"
    assert sl.verify_manifest(man, folder.path, workers=0, progress=False).ok


def test_a_pattern_says_which_files_and_structures_are_masks(folder, tmp_path):
    contours(folder, "GTV-1", "Lung")
    folder.ct("p2.nii.gz")
    folder.mask("p2_gtv.nii.gz")
    folder.mask("p2_seg.nii.gz")
    report = scan(folder.path, masks="*GTV*", progress=False)
    masks = {case.id: case.masks for case in report.manifest.cases}
    assert masks["p2"] == {"gtv": "p2_gtv.nii.gz"} and masks["p1"]["gtv"].startswith("series:")
    assert report.manifest.segments == {"gtv": "*GTV*"}
    assert report.left == [("p2_seg.nii.gz", "named like a mask, and --masks asks for others")]
    assert sl.verify_manifest(report.manifest, folder.path, workers=0, progress=False).ok


def test_a_seg_is_of_the_series_it_refers_to_and_lies_on_its_voxels(folder):
    files = folder.series("a/ct")
    folder.series("b/ct")
    mask = np.zeros(voxels(4).shape, bool)
    mask[1, 2:5, 2:5] = True
    write_seg(folder._at("b/seg.dcm"), files, {"tumour": mask})
    report = scan(folder.path, progress=False)
    assert [bool(case.masks) for case in report.manifest.cases] == [True, False] and not report.left
    ds = dcmread(folder.path / "b" / "seg.dcm")
    ds.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].PixelSpacing = [0.9, 0.7]
    ds.save_as(folder.path / "b" / "seg.dcm")
    report = scan(folder.path, progress=False)
    assert not report.manifest.cases[0].masks and "not on the voxels of its scan" in report.left[0][1]


@pytest.mark.parametrize(
    ("paths", "patients"),
    [
        (["a.nii", "b.nii"], ["a", "b"]),
        (["a_pre.nii.gz", "a_post.nii.gz", "b_2019.nii.gz"], ["a", "a", "b"]),
        (["P1/thorax.nii", "P1/abdomen.nii", "P2/thorax.nii"], ["P1", "P1", "P2"]),
        (["P1/study-3/ct.nii", "P1/study-9/ct.nii", "P2/s/ct.nii"], ["P1", "P1", "P2"]),
        (["train/P1/ct.nii", "test/P2/ct.nii", "test/P1/ct.nii"], ["P1", "P2", "P1"]),
        (["sub-01/ses-1/sub-01_ct.nii", "sub-01/ses-2/sub-01_ct.nii", "sub-02/a.nii"], ["sub-01", "sub-01", "sub-02"]),
        (["study/P1/ct.nii", "study/P2/ct.nii"], ["P1", "P2"]),
        (["imagesTr/la_003_0000.nii", "imagesTr/la_004_0000.nii"], ["la_003", "la_004"]),
        ([f"site/P{k}/ct.nii" for k in range(11)] + ["x/ct.nii"], [f"P{k}" for k in range(11)] + ["x"]),
        (["LIDC-IDRI-0001/ct.nii", "LIDC-IDRI-0002/ct.nii"], ["LIDC-IDRI-0001", "LIDC-IDRI-0002"]),
        (["P7/ct.nii"], ["P7"]),
    ],
)  # fmt: skip
def test_in_doubt_scans_are_of_one_patient(paths, patients):
    found = patients_by_name(paths, "root")
    assert [found[path] for path in paths] == patients


def test_a_column_patient_says_who_is_who(folder):
    with_table(folder, "id,patient,y\np1,A,0\np2,A,1\np3,B,1\n")
    man = sl.scan_folder(folder.path, folder.path.parent / "labels.csv", progress=False)
    one, two, three_, four = (case.patient for case in man.cases)
    assert one == two != three_ and len({one, three_, four}) == 3


def test_mammograms_are_images_of_their_own(folder, tmp_path):
    for k, side in enumerate("LR"):
        mammograms.write(folder._at(f"p{k}/{side}.dcm"), side=side)
    man = sl.scan_folder(folder.path, progress=False)
    assert man.modality == "MG" and [case.image for case in man.cases] == ["p0/L.dcm", "p1/R.dcm"]
    assert len(man.patients) == 1  # the factory's
    assert sl.verify_manifest(man, folder.path, workers=0, progress=False).ok


def test_png_stacks_are_listed_with_their_class(folder):
    for k, place in enumerate(("benign/e1/n1", "benign/e1/n2", "malignant/e2/n1")):
        for z in range(2):
            Image.fromarray(np.full((6, 6), 9 + k, np.uint8)).save(folder._at(f"{place}/{z}.png"))
    man = sl.scan_folder(folder.path, progress=False)
    assert [(c.patient, c.labels["class"]) for c in man.cases] == [
        ("e1", "benign"),
        ("e1", "benign"),
        ("e2", "malignant"),
    ]
    assert man.licence == "own data" and sl.verify_manifest(man, folder.path, workers=0, progress=False).ok
    with pytest.raises(sl.UseError, match="have no store"):
        sl.build_store(man, folder.path, folder.path.parent / "store", progress=False)


def test_a_manifest_elsewhere_says_where_the_images_are(three_scans, tmp_path):
    out = tmp_path / "elsewhere" / "m.json"
    man = sl.scan_folder(three_scans.path, out=out, progress=False)
    assert sl.load_manifest(out) == man and man.source.location == str(three_scans.path.resolve())


def test_the_printed_command_works(three_scans):
    done = call(three_scans)
    command = next(line for line in done.output.splitlines() if line.startswith("next: smartlab data verify"))
    checked = CliRunner().invoke(app, command.removeprefix("next: smartlab ").split())
    assert checked.exit_code == 0 and "3 good" in checked.output


@pytest.fixture
def three_scans(folder):
    return three(folder)


def test_a_thousand_files_take_seconds(folder):
    first = write_nifti(folder._at("p0.nii"), np.zeros(SHAPE, np.int16)).read_bytes()
    for k in range(1, 1000):
        (folder.path / f"p{k}.nii").write_bytes(first[:-4] + k.to_bytes(4, "little"))
    start = time.monotonic()
    assert len(sl.scan_folder(folder.path, progress=False).cases) == 1000
    assert time.monotonic() - start < 20


def test_real_folders(real_data, tmp_path):
    report = scan(real_data / "ct_sarcoma", progress=False)
    assert len(report.manifest.cases) == len(report.manifest.patients) == 24 and not report.left
    assert all(set(case.masks) == {"mask"} for case in report.manifest.cases)
    series = scan(real_data / "ct_series", progress=False)
    assert len(series.manifest.cases) == 2 and {path for path, _ in series.left} == {
        "Pancreas-CT-CB_001/Citations", "Pancreas-CT-CB_001/LICENSE",
    }  # fmt: skip
    organs = scan(real_data / "ct_organs", progress=False)
    assert len(organs.manifest.cases[0].masks) > 50 and not organs.left


@pytest.mark.parametrize("ends", [("_0000", "_0001"), ("_T1", "_t2")])
def test_images_of_one_patient_on_one_grid_are_its_channels(folder, ends):
    for name in ("imagesTr/la_003", "imagesTr/la_004"):
        for end in ends:
            folder.ct(f"{name}{end}.nii.gz", kind=np.float32)
    folder.mask("labelsTr/la_003.nii.gz")
    arguments = ["data", "scan", str(folder.path), "--modality", "MR", "--channels", "t1,t2"]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    man = sl.load_manifest(folder.path / "manifest.json")
    assert (man.modality, man.channels, [c.id for c in man.cases]) == (
        "MR",
        ["t1", "t2"],
        ["imagesTr/la_003", "imagesTr/la_004"],
    )
    first = man.cases[0]
    assert first.channels == {
        n: f"imagesTr/la_003{e}.nii.gz" for n, e in zip(("t1", "t2"), ends, strict=True)
    }
    assert first.image == first.channels["t1"] and first.masks == {"mask": "labelsTr/la_003.nii.gz"}
    assert len(man.patients) == 2 and verify_manifest(man, folder.path, workers=0, progress=False).ok
    store = sl.build_store(
        man, folder.path, folder.path.parent / "s", workers=0, progress=False, spacing=(1, 1, 2.5)
    )
    assert (store.built, store.failed) == (2, 0)


def test_a_second_file_for_a_channel_is_told(folder):
    for end in ("_0000", "_0001", "_t1"):
        folder.ct(f"p1{end}.nii.gz", kind=np.float32)
    report = scan(folder.path, progress=False, modality="MR", channels=["t1", "t2"])
    assert report.left == [("p1_t1.nii.gz", "a second t1 of one patient, beside p1_0000.nii.gz")]
    assert len(report.manifest.cases) == 1


def test_a_folder_of_mr_series_is_mr(folder):
    for name in ("a", "b"):
        folder.series(name, patient=name, modality="MR", sop_class="1.2.840.10008.5.1.4.1.1.4")
    assert scan(folder.path, progress=False).manifest.modality == "MR"
