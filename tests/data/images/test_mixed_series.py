"""Series that share one flat folder: damage or change of one costs that one, and nothing shrinks silently."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict

import numpy as np
import pydicom
import pytest

import smartlab as sl
from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.privacy import salt
from smartlab.data.images.dicom_headers import series_files
from smartlab.data.images.readers import read_volume
from smartlab.data.store import build as building
from smartlab.data.store import ingest
from smartlab.data.store.request import Settings
from tests.data.dicom_factory import scan, write_series
from tests.data.images.test_dicom_masks import circle, write_rtstruct
from tests.data.store_cohort import manifest, snapshot

UIDS = [f"1.9.8.7.{i}" for i in range(1, 5)]


def add(folder, i):
    return write_series(folder, scan(8, 24, 24, seed=i), uid=UIDS[i], name=f"{i}-{{:02d}}.dcm".format)


def cohort(n):
    return manifest([{"id": f"c{i}", "patient": f"p{i}", "series_uid": UIDS[i]} for i in range(n)])


def build(folder, n, out, **more):
    return sl.build_store(cohort(n), folder, out, workers=0, progress=False, spacing=2.0, **more)


@pytest.fixture
def mixed(tmp_path):
    """(folder, files per series)"""
    return tmp_path / "raw", [add(tmp_path / "raw", i) for i in range(4)]


# ---- reading


def test_files_of_every_series_are_found_and_read_alone(mixed):
    folder, files = mixed
    (folder / "LICENSE").write_text("text")
    assert series_files(folder) == {"": (), **{uid: tuple(f) for uid, f in zip(UIDS, files, strict=True)}}
    whole = read_volume(folder, series=UIDS[1])
    alone = read_volume(folder, series=UIDS[1], files=series_files(folder)[UIDS[1]])
    assert np.array_equal(whole.array, alone.array) and np.array_equal(whole.affine, alone.affine)
    add(folder / "later", 0)
    files[0][2].write_bytes(files[1][2].read_bytes())  # in place: the folder's own time stays
    found = series_files(folder)
    assert len(found[UIDS[0]]) == 7 + 8 and files[0][2] in found[UIDS[1]]


def test_damage_of_one_series_is_noted_on_the_others(mixed):
    folder, files = mixed
    files[0][3].write_bytes(b"")
    files[1][2].write_bytes(files[1][2].read_bytes()[:-100])  # pixels cut, header whole: known to be its own
    for i in (2, 3):
        volume = read_volume(folder, series=UIDS[i])
        assert volume.shape == (24, 24, 8)
        assert "1 damaged file left out, of this or another series of the folder" in volume.notes
    with pytest.raises(DataError, match=r"0-03\.dcm.*may be of this series"):
        read_volume(folder, series=UIDS[0])
    with pytest.raises(DataError, match=r"1-02\.dcm"):
        read_volume(folder, series=UIDS[1])
    with pytest.raises(DataError, match="the file is empty"):  # which series was not said
        read_volume(folder)


def test_in_a_folder_of_one_series_damage_stays_an_error(tmp_path):
    files = add(tmp_path, 0)
    files[7].write_bytes(b"")  # the last slice: nothing else would tell
    with pytest.raises(DataError, match=r"0-07\.dcm: damaged"):
        read_volume(tmp_path, series=UIDS[0])


@pytest.mark.parametrize("every", [31, pytest.param(7, marks=pytest.mark.slow)])
def test_no_cut_of_a_header_shrinks_a_scan_silently(tmp_path, every):
    """The last slice cut at any byte of its header, UIDs among them: an error, or a note."""
    (_, *_, last), _ = add(tmp_path, 0), add(tmp_path, 1)
    whole = last.read_bytes()
    for length in range(0, whole.index(b"\x28\x00\x52\x10"), every):  # up to RescaleIntercept
        last.write_bytes(whole[:length])
        found = series_files(tmp_path)
        for files in (None, sorted((*found[UIDS[0]], *found[""]))):
            try:
                volume = read_volume(tmp_path, series=UIDS[0], files=files)
            except DataError:
                continue
            assert volume.shape[2] == 7 and any("damaged" in note for note in volume.notes), length
        other = read_volume(tmp_path, series=UIDS[1], files=sorted((*found[UIDS[1]], *found[""])))
        assert other.shape == (24, 24, 8) and read_volume(tmp_path, series=UIDS[1]).shape == (24, 24, 8)


# ---- building


def test_one_bad_file_fails_one_series(mixed, tmp_path):
    folder, files = mixed
    out = tmp_path / "out"
    assert build(folder, 4, out).built == 4
    whole = files[0][3].read_bytes()
    files[0][3].write_bytes(b"")
    report = build(folder, 4, out)
    assert (report.images, report.failed) == (3, 1) and "damaged" in report.failures[0]["reason"]
    assert all("damaged file" in str(row["notes"]) for row in sl.open_store(out).rows)
    assert build(folder, 4, tmp_path / "fresh").images == 3  # what happened before does not matter
    assert snapshot(tmp_path / "fresh") == snapshot(out)
    files[0][3].write_bytes(whole)
    report = build(folder, 4, out)
    assert (report.images, report.failed) == (4, 0)
    assert not any("damaged" in str(row["notes"]) for row in sl.open_store(out).rows)


def test_another_series_in_the_folder_costs_only_itself(tmp_path, monkeypatch):
    folder, out = tmp_path / "raw", tmp_path / "out"
    for i in range(3):
        add(folder, i)
    assert build(folder, 3, out).built == 3
    add(folder, 3)
    tried = []
    monkeypatch.setattr(building, "ingest", lambda job, *a: tried.append(job) or ingest.ingest(job, *a))
    report = build(folder, 4, out)
    assert (report.built, report.skipped) == (1, 3) and [job.series for job in tried] == [UIDS[3]]
    assert {f.name[0] for f in tried[0].files} == {"3"}
    for row in sl.open_store(out).rows:
        assert not any("other series" in note for note in row["notes"])
    build(folder, 4, tmp_path / "fresh")
    assert snapshot(tmp_path / "fresh") == snapshot(out)
    header = pydicom.dcmread(folder / "1-04.dcm")
    header.PixelData = header.PixelData[::-1]
    header.save_as(folder / "1-04.dcm")
    report = build(folder, 4, out)
    assert (report.built, report.skipped) == (1, 3)


def test_structures_in_the_same_folder_do_not_suffer_either(mixed, tmp_path):
    folder, files = mixed
    volume = read_volume(folder, series=UIDS[2])
    file = write_rtstruct(folder / "rt.dcm", {"GTV": [circle(volume, 2, k, (12, 12), 5) for k in (2, 3)]})
    place = f"series:{pydicom.dcmread(file).SeriesInstanceUID}"
    cases = [{"id": f"c{i}", "patient": "p", "series_uid": UIDS[i]} for i in range(4)]
    cases[2]["masks"] = {"tumour": place}
    files[0][3].write_bytes(b"")
    report = sl.build_store(manifest(cases), folder, tmp_path / "out", workers=0, progress=False, spacing=1.0)
    assert (report.images, report.failed) == (3, 1)
    st = sl.open_store(tmp_path / "out")
    assert [st.labels(i) is not None for i in range(3)] == [False, True, False]


# ---- nobody can test a guess


def test_no_hash_in_a_store_can_be_recomputed_without_the_salt(mixed, tmp_path):
    """Whoever guesses a UID, a path or a whole request still needs the salt to confirm it."""
    folder, files = mixed
    add(tmp_path / "raw" / "single", 0)
    out = tmp_path / "out"
    build(folder, 4, out)
    guesses = [*UIDS, str(folder), folder.name, *(f.name for row in files for f in row), "c0", "p0"]
    settings = asdict(Settings())
    facts: list = [[settings, uid, [], [], []] for uid in UIDS]
    facts += [[settings, uid, [], [], [], None] for uid in UIDS]
    for own in [*files, [f for row in files for f in row]]:
        facts.append([(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in own])
    guesses += [json.dumps(fact, sort_keys=True) for fact in facts]
    content = " ".join(data.decode("latin-1") + name for name, data in snapshot(out).items())
    for guess in guesses:
        for plain in (guess, f"request\0{guess}", f"stat\0{guess}", f"image\0{guess}"):
            for kind in ("sha256", "md5", "sha1"):
                assert hashlib.new(kind, plain.encode()).hexdigest()[:12] not in content
    for uid in UIDS:
        assert uid not in content
    assert str(folder) not in content and salt().decode() not in content


def test_everything_that_names_a_source_changes_with_the_salt(mixed, tmp_path, monkeypatch):
    folder, _ = mixed
    stores = []
    for word in ("one", "two", "one"):
        monkeypatch.setenv("SMARTLAB_SALT", f"{word}, a long text")
        out = tmp_path / f"out-{len(stores)}"
        build(folder, 4, out)
        stores.append(sl.open_store(out))
    one, two, again = stores
    assert one.fingerprint == two.fingerprint and list(one.rows) == list(again.rows)
    for a, b in zip(one.rows, two.rows, strict=True):
        assert a["array"] == b["array"]
        assert all(a[name] != b[name] for name in ("key", "file", "request", "stat"))


# ---- gantry tilt


def test_a_tilted_series_is_stored_when_asked(tmp_path):
    def drift(ds, i):
        ds.ImagePositionPatient = [-10, -20 + 0.9 * i, 30 + 2.5 * i]

    write_series(tmp_path / "raw" / "a", scan(8, 24, 24), uid=UIDS[0], edit=drift)
    refused = build(tmp_path / "raw", 1, tmp_path / "out")
    assert refused.failed == 1 and "gantry tilt" in refused.failures[0]["reason"]
    assert build(tmp_path / "raw", 1, tmp_path / "out", tilt="correct").built == 1
    with pytest.raises(UseError, match="unknown tilt"):
        Settings(tilt="Correct")


def test_a_slice_that_the_disk_does_not_give_is_an_error_and_no_shorter_scan(mixed, monkeypatch):
    """Which series it is of cannot be told: perhaps of the one that is wanted."""
    folder, files = mixed
    real = type(folder).open

    def failing(self, *given, **more):
        if self == files[1][-1]:
            raise OSError(5, "Input/output error")
        return real(self, *given, **more)

    monkeypatch.setattr(type(folder), "open", failing)
    with pytest.raises(DataError, match="Input/output error"):
        read_volume(folder, series=UIDS[1])
