"""A build touches nothing but its own files, and says what to do when they are damaged."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from smartlab import DataError, UseError, build_store, open_store
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.manifest import Manifest, Source


@pytest.fixture
def cohort(tmp_path):
    """A manifest of one scan whose folder happens to be called as the store's own."""
    images = tmp_path / "images"
    (images / "volumes").mkdir(parents=True)
    scan = np.random.default_rng(0).integers(-1000, 400, (20, 20, 20)).astype(np.int16)
    nib.save(nib.Nifti1Image(scan, np.diag([2.0, 2, 2, 1])), images / "volumes" / "p1.nii.gz")
    (images / "images-of-patients.jsonl").write_text("mine", encoding="utf-8")
    facts = {
        "name": "toy",
        "title": "Toy",
        "modality": "CT",
        "licence": "-",
        "citation": "-",
        "homepage": "-",
    }
    case = Case(id="a", patient="p", image="volumes/p1.nii.gz")
    return Manifest(**facts, source=Source(kind="local"), cases=[case]), images


def build(cohort, out):
    return build_store(cohort[0], cohort[1], out, workers=0, progress=False)


def test_a_store_is_never_written_among_the_images(cohort):
    before = sorted(cohort[1].rglob("*"))
    with pytest.raises(UseError, match="among the images"):
        build(cohort, cohort[1])
    with pytest.raises(UseError, match="other files and no store"):
        build(cohort, cohort[1] / "volumes")
    assert sorted(cohort[1].rglob("*")) == before


def test_what_others_put_into_a_store_stays(cohort, tmp_path):
    build(cohort, tmp_path / "store")
    mine = [tmp_path / "store" / "volumes" / "notes.txt", tmp_path / "store" / "images-of-mine.jsonl"]
    for file in mine:
        file.write_text("mine", encoding="utf-8")
    build(cohort, tmp_path / "store")
    assert all(file.read_text(encoding="utf-8") == "mine" for file in mine)


def test_strays_of_a_killed_build_are_swept(cohort, tmp_path):
    build(cohort, tmp_path / "store")
    stored = next((tmp_path / "store" / "volumes").glob("*.b2nd"))
    stray = stored.with_name(stored.name[:-8] + "0.b2nd")
    stray.write_bytes(b"left over")
    build(cohort, tmp_path / "store")
    assert stored.exists() and not stray.exists()


def test_damage_to_the_store_s_own_files_says_what_to_do(cohort, tmp_path):
    out = tmp_path / "store"
    build(cohort, out)
    lines = next(out.glob("images-*.jsonl"))
    content = lines.read_bytes()
    lines.unlink()
    with pytest.raises(DataError, match=r"part of the index is missing.*store\.json"):
        build(cohort, out)
    (out / "store.json").unlink()  # as it says
    assert build(cohort, out).images == 1 and open_store(out).array(0).shape
    assert next(out.glob("images-*.jsonl")).read_bytes() == content
