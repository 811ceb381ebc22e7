"""`verify` finds what would spoil hours of work, one row per image, and never stops at the first."""

from __future__ import annotations

import hashlib
import json
import os

import nibabel as nib
import numpy as np
import pydicom
import pytest
from typer.testing import CliRunner

from smartlab import DataError, build_store, read_volume, verify_manifest
from smartlab.cli.app import app
from smartlab.data.cohort.case import Case, LabelSpec, Lesion
from smartlab.data.cohort.manifest import Manifest, Source
from smartlab.data.cohort.verify import summary
from tests.data.dicom_factory import scan, write_series
from tests.data.images.test_dicom_masks import circle, write_rtstruct


def manifest(cases, **more):
    facts = {
        "name": "toy",
        "title": "Toy",
        "modality": "CT",
        "licence": "-",
        "citation": "-",
        "homepage": "-",
    }
    return Manifest(
        **(facts | {"source": Source(kind="local"), "cases": cases, "organs": {1: "liver"}} | more)
    )


def write(path, array, affine=None):
    nib.save(nib.Nifti1Image(array, np.diag([2.0, 2, 2, 1]) if affine is None else affine), path)
    return path.name


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    write(tmp_path / "scan.nii.gz", rng.integers(-1000, 400, (12, 10, 8)).astype(np.int16))
    write(tmp_path / "liver.nii.gz", np.eye(12, 10, dtype=np.uint8)[..., None].repeat(8, 2))
    return tmp_path


def problem(root, **fields):
    case = Case(**({"id": "a", "patient": "p", "image": "scan.nii.gz"} | fields))
    return verify_manifest(manifest([case]), root, workers=0, progress=False).table.problem[0]


def test_several_values_in_the_mask_of_one_structure_are_refused(root, tmp_path):
    """Not merged without a word: in checking and in building alike, and named with what to do."""
    several = np.zeros((12, 10, 8), np.uint8)
    several[2:4], several[6:8], several[9:11] = 1, 2, 7
    write(root / "several.nii.gz", several)
    write(root / "bright.nii.gz", np.where(several == 1, 255, 0).astype(np.uint8))
    assert "holds several values (found 1, 2, 7; expected 0 and one other)" in problem(
        root, masks={"x": "several.nii.gz"}
    )
    assert problem(root, masks={"x": "bright.nii.gz"}) == ""
    case = Case(id="a", patient="p", image="scan.nii.gz", masks={"x": "several.nii.gz"})
    report = build_store(manifest([case]), root, tmp_path / "s", workers=0, progress=False)
    assert report.failed == 1 and "holds several values" in report.failures[0]["reason"]


def test_grey_levels_in_place_of_hounsfield_units_are_told(root, tmp_path):
    grey = np.random.default_rng(0).integers(0, 256, (12, 10, 8)).astype(np.uint8)
    cases = [Case(id=name, patient=name, image=write(root / f"{name}.nii.gz", grey)) for name in "ab"]
    said = "note on 2 image(s): values from 0 to 255: grey levels, not Hounsfield units"
    assert said in str(verify_manifest(manifest(cases), root, workers=0, progress=False))
    assert said in str(build_store(manifest(cases), root, tmp_path / "s", workers=0, progress=False))
    assert "note" not in str(
        verify_manifest(manifest([Case(id="c", patient="c", image="scan.nii.gz")]), root, workers=0)
    )


def test_a_good_cohort_is_good(root):
    digest = hashlib.sha256((root / "scan.nii.gz").read_bytes()).hexdigest()
    lesion = Lesion(center_mm=(10, 10, 10))
    fields = {"label_map": "liver.nii.gz", "masks": {"x": "liver.nii.gz"}, "lesion": lesion, "sha256": digest}
    assert problem(root, **fields) == ""
    report = verify_manifest(manifest([Case(id="a", patient="p", image="scan.nii.gz")]), root, progress=False)
    assert report.ok and report.table["shape"][0] == "12×10×8" and "1 good" in str(report)


def test_each_fault_is_told_in_words(root):
    write(root / "small.nii.gz", np.zeros((12, 10, 7), np.uint8))
    write(
        root / "moved.nii.gz",
        np.zeros((12, 10, 8), np.uint8),
        np.array([[2.0, 0, 0, 9], [0, 2, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1]]),
    )
    write(root / "odd.nii.gz", np.full((12, 10, 8), 7, np.uint8))
    (root / "broken.nii.gz").write_bytes(b"not an image")
    outside = Lesion(center_mm=(500, 0, 0))
    faults = {
        "image not found": {"image": "absent.nii.gz"},
        "broken.nii.gz": {"image": "broken.nii.gz"},
        "checksum differs": {"sha256": "0" * 64},
        "lies outside the image": {"lesion": outside},
        "small.nii.gz: is not on the image's grid": {"label_map": "small.nii.gz"},
        "moved.nii.gz: does not lie where the image lies": {"masks": {"x": "moved.nii.gz"}},
        "values the manifest does not name": {"label_map": "odd.nii.gz"},
        "absent.nii.gz: not found": {"masks": {"x": "absent.nii.gz"}},
        "series 1.2.3 is not below this folder": {"image": None, "series_uid": "1.2.3"},
    }
    for hint, fields in faults.items():
        assert hint in problem(root, **fields), hint


def test_one_bad_image_does_not_stop_the_others(root):
    (root / "bad.nii.gz").write_bytes(b"")
    cases = [
        Case(id=str(i), patient=str(i), image=name)
        for i, name in enumerate(["bad.nii.gz", "scan.nii.gz", "absent.nii", "liver.nii.gz"])
    ]
    report = verify_manifest(manifest(cases), root, workers=2, progress=False)
    assert (report.table.problem != "").tolist() == [True, False, True, False] and not report.ok
    assert report.table.image.tolist() == [c.image for c in cases]


def test_the_command_reports_and_its_exit_code_tells(root):
    man = manifest(
        [Case(id="a", patient="p", image="scan.nii.gz"), Case(id="b", patient="q", image="no.nii")]
    )
    man.save(root / "manifest.json")
    result = CliRunner().invoke(
        app, ["data", "verify", str(root / "manifest.json"), "--root", str(root), "--json"]
    )
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert told["images"] == 2 and "not found" in told["rows"][1]["problem"]


def test_nothing_to_verify_is_an_error(root):
    with pytest.raises(DataError, match="lists no cases"):
        verify_manifest(manifest([]), root, progress=False)


def test_a_summary_counts_what_is_there(root):
    labels = {"malignancy": LabelSpec(kind="binary", classes=["benign", "malignant"])}
    cases = [
        Case(id=str(i), patient=str(i), image=f"{i}.nii.gz", labels={"malignancy": v}, split="train")
        for i, v in enumerate(["benign", "benign", "malignant"])
    ]
    facts = summary(manifest(cases, labels=labels))
    assert facts["labels"]["malignancy"] == "binary, benign 2, malignant 1" and facts["splits"] == {
        "train": 3
    }


@pytest.mark.slow
def test_every_real_scan_verifies(real_data):
    series = [
        Case(id=p.name, patient=p.name, image=f"ct_series/{p.name}")
        for p in sorted((real_data / "ct_series").iterdir())
    ]
    sarcoma = [
        Case(
            id=p.name,
            patient=p.name,
            image=f"ct_sarcoma/{p.name}/CT_image.nii.gz",
            masks={"tumour": f"ct_sarcoma/{p.name}/CT_mask.nii.gz"},
        )
        for p in sorted((real_data / "ct_sarcoma").iterdir())
    ]
    segments = {
        p.name.removesuffix(".nii.gz"): f"ct_organs/example_seg/{p.name}"
        for p in (real_data / "ct_organs" / "example_seg").iterdir()
    }
    organ = Case(id="organs", patient="organs", image="ct_organs/example_ct.nii.gz", masks=segments)
    report = verify_manifest(manifest([*series, *sarcoma, organ]), real_data, workers=2, progress=False)
    assert len(report.table) == 27 and report.ok, str(report)


def test_an_image_that_kills_its_process_does_not_stop_the_others(root, monkeypatch):
    from smartlab.data.images import readers

    read = readers.read_volume
    monkeypatch.setattr(  # forked workers inherit it
        readers, "read_volume", lambda path, **kw: os._exit(1) if "b.nii" in str(path) else read(path, **kw)
    )
    for name in "abc":
        (root / f"{name}.nii.gz").write_bytes((root / "scan.nii.gz").read_bytes())
    cases = [Case(id=name, patient=name, image=f"{name}.nii.gz") for name in "abc"]
    report = verify_manifest(manifest(cases), root, workers=1, progress=False)
    assert report.table.problem.str.contains("process died").tolist() == [False, True, False]
    assert report.table["shape"].tolist() == ["12×10×8", "", "12×10×8"]


def test_structures_of_one_file_are_chosen_as_building_chooses_them(tmp_path):
    uid = "1.9.8.7.1"
    write_series(tmp_path / "ct", scan(6, 40, 40), uid=uid)
    volume = read_volume(tmp_path / "ct")
    (tmp_path / "rt").mkdir()
    drawn = {name: [circle(volume, 2, 3, (20, 22), r)] for name, r in (("tumour", 6), ("lung", 9))}
    file = write_rtstruct(tmp_path / "rt" / "rt.dcm", drawn)
    place = f"series:{pydicom.dcmread(file).SeriesInstanceUID}"
    case = Case(id="a", patient="a", series_uid=uid, masks={"tumour": place, "lung": place})
    report = verify_manifest(manifest([case]), tmp_path, workers=0, progress=False)
    assert report.ok, str(report)
    absent = case.model_copy(update={"masks": {"tumour": place, "heart": place}})
    assert "heart" in verify_manifest(manifest([absent]), tmp_path, progress=False).table.problem[0]


def test_a_label_map_without_named_values_is_a_fault(root):
    case = Case(id="a", patient="p", image="scan.nii.gz", label_map="liver.nii.gz")
    report = verify_manifest(manifest([case], organs={}), root, progress=False)
    assert "does not name" in report.table.problem[0]
