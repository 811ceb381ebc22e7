"""What changed on the disk is seen, what did not is not looked at again, and nobody's store is pulled away."""

from __future__ import annotations

import os
import shutil
import stat

import numpy as np
import pytest
import SimpleITK as sitk

import smartlab as sl
from smartlab.batch.runs import data_digest
from smartlab.core.errors import UseError
from smartlab.core.settings import DataConfig
from smartlab.data.store import current, prepare
from smartlab.data.store.prepare import prepare_store
from tests.data.dicom_factory import itk_image, scan, write_series
from tests.data.store_cohort import make_cohort, manifest, person, save, snapshot


@pytest.fixture
def people(tmp_path):
    man = make_cohort(tmp_path / "raw", 2)
    man.save(tmp_path / "raw" / "manifest.json")
    return DataConfig(manifest=str(tmp_path / "raw"), store=str(tmp_path / "store"), workers=0)


def no_build(monkeypatch):
    def refuse(*given, **more):
        raise AssertionError("a store that is up to date was built again")

    monkeypatch.setattr(prepare, "build_store", refuse)


def test_a_store_that_is_up_to_date_is_opened_without_a_build(people, monkeypatch):
    prepare_store(people, False)
    no_build(monkeypatch)
    assert len(prepare_store(people, False)[1]) == 2


def test_a_bad_scan_does_not_keep_a_store_from_being_up_to_date(people, tmp_path, monkeypatch, capsys):
    bad = tmp_path / "raw" / "p1" / "ct.nii.gz"
    whole = bad.read_bytes()
    bad.write_bytes(whole[:100])
    prepare_store(people, False)
    with monkeypatch.context() as patch:
        no_build(patch)
        assert len(prepare_store(people, True)[1]) == 1
    assert "images that failed: 1, see failures.csv" in capsys.readouterr().err
    bad.write_bytes(whole)
    assert len(prepare_store(people, False)[1]) == 2


def test_so_is_one_that_may_only_be_read(people, tmp_path, monkeypatch):
    prepare_store(people, False)
    before = snapshot(tmp_path / "store")
    no_build(monkeypatch)
    monkeypatch.setattr(
        prepare.index, "locked", no_build
    )  # root may write anywhere: what counts is that nobody does
    for path in [*(tmp_path / "store").rglob("*"), tmp_path / "store"]:
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    prepare_store(people, False)
    assert snapshot(tmp_path / "store") == before


def _other_voxels(folder):
    save(folder / "p1" / "ct.nii.gz", person(seed=77))


def _other_time(folder):
    os.utime(folder / "p0" / "tumour.nii.gz", ns=(1, 1))


def _missing_volume(folder):
    next((folder.parent / "store" / "volumes").glob("*.b2nd")).unlink()


def _other_label(folder):
    text = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(text.replace('"grade": 1', '"grade": 3'))


@pytest.mark.parametrize("change", [_other_voxels, _other_time, _missing_volume, _other_label])
def test_a_store_that_is_not_is_brought_up_to_date(people, tmp_path, change, monkeypatch):
    _, before = prepare_store(people, False)
    grades, voxels = [c["grade"] for c in before.cases.labels], before.voxels
    change(tmp_path / "raw")
    built, original = [], prepare.build_store
    monkeypatch.setattr(prepare, "build_store", lambda *a, **k: built.append(1) or original(*a, **k))
    looked, state = [], current.cohort_state
    monkeypatch.setattr(current, "cohort_state", lambda *given: looked.append(1) or state(*given))
    _, after = prepare_store(people, False)
    assert built and len(looked) == 1 and after.verify() == []
    if change is _other_voxels:
        assert after.voxels != voxels
    if change is _other_label:
        assert [c["grade"] for c in after.cases.labels] != grades


def _new_slice(series):
    shutil.copy(sorted(series.iterdir())[1], series / "another.dcm")


def _slice_gone(series):
    sorted(series.iterdir())[1].unlink()


def _slice_replaced(series):
    slices = sorted(series.iterdir())
    shutil.copy(slices[2], series / "new")
    os.replace(series / "new", slices[1])


def _all_written_over(series):
    for file in series.iterdir():
        file.write_bytes(file.read_bytes())


@pytest.mark.parametrize("change", [None, _new_slice, _slice_gone, _slice_replaced, _all_written_over])
def test_what_changes_in_a_series_is_seen_without_a_look_at_every_file(tmp_path, change, monkeypatch):
    write_series(tmp_path / "s", scan(6))
    man = manifest([{"id": "a", "patient": "a", "image": "s"}])
    looked, facts = [], current._facts
    monkeypatch.setattr(current, "_facts", lambda *given: looked.append(given) or facts(*given))
    before = current.cohort_state(man, tmp_path)
    if change:
        change(tmp_path / "s")
    assert (current.cohort_state(man, tmp_path) == before) == (change is None)
    assert len(looked) == 4


def test_another_voxel_size_does_not_pull_a_store_away_from_who_reads_it(people, tmp_path):
    _, store = prepare_store(people, False)
    before = snapshot(tmp_path / "store")
    with pytest.raises(
        UseError, match=r"another spacing .*found 2\.0.*data\.spacing=2\.0, or another data\.store"
    ):
        prepare_store(people.model_copy(update={"spacing": 3.0}), False)
    assert snapshot(tmp_path / "store") == before and store.verify() == []


def test_voxels_in_a_file_with_a_name_of_its_own_are_watched(tmp_path):
    raw = tmp_path / "raw"
    raw.mkdir()
    sitk.WriteImage(itk_image(scan(8, 40, 40)), str(raw / "a.mhd"))
    (raw / "a.raw").rename(raw / "voxels.bin")
    (raw / "a.mhd").write_text((raw / "a.mhd").read_text().replace("= a.raw", "= voxels.bin"))
    man = manifest([{"id": "a", "patient": "a", "image": "a.mhd"}])
    first = sl.build_store(man, raw, tmp_path / "store", workers=0, progress=False)
    voxels = sl.open_store(tmp_path / "store").array(0)[:]
    values = np.fromfile(raw / "voxels.bin", np.int16)
    values[:] = 500
    values.tofile(raw / "voxels.bin")
    again = sl.build_store(man, raw, tmp_path / "store", workers=0, progress=False)
    assert (first.built, again.built) == (1, 1)
    assert not np.array_equal(sl.open_store(tmp_path / "store").array(0)[:], voxels)


def test_a_batch_sees_that_images_of_the_same_size_changed(tmp_path):
    make_cohort(tmp_path / "raw", 2).save(tmp_path / "raw" / "manifest.json")
    given = {"manifest": str(tmp_path / "raw" / "manifest.json")}
    from smartlab.batch import runs

    def digest():
        runs._cohort.cache_clear()
        return data_digest(given)

    before = digest()
    assert digest() == before
    image = tmp_path / "raw" / "p0" / "ct.nii.gz"
    image.write_bytes(image.read_bytes()[:-1] + b"\0")
    assert digest() != before
