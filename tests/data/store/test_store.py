"""A store holds the cohort, all of it, in place, and nothing that identifies; and survives anything."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import asdict

import nibabel as nib
import numpy as np
import psutil
import pydicom
import pytest
from distributed import LocalCluster

import smartlab as sl
from smartlab.core import workers
from smartlab.core.errors import DataError, UseError
from smartlab.core.files import write_bytes
from smartlab.data.cohort.case import LabelSpec
from smartlab.data.images.readers import read_volume
from smartlab.data.store import build as building
from smartlab.data.store import index, store
from tests.conftest import REPO
from tests.data.dicom_factory import scan, write_series
from tests.data.images.test_dicom_masks import circle, write_rtstruct
from tests.data.store_cohort import make_cohort, manifest, person, save, snapshot


@pytest.fixture
def cohort(tmp_path):
    return make_cohort(tmp_path / "raw"), tmp_path / "raw", tmp_path / "store"


def build(cohort, **more):
    man, root, out = cohort
    return sl.build_store(man, root, out, **({"workers": 0, "progress": False} | more))


# ---- what is in it


def test_stores_of_ct_are_known_by_what_they_always_were(cohort):
    """So that those of before channels and MR are opened as they are, also where nothing may be written."""
    known = asdict(building.settings_for(cohort[0], 2))
    assert known == {"spacing": 2.0, "crop_body": True, "labels": True, "tilt": "refuse", "format": 1}
    assert building.settings_for(cohort[0], (3, 3, 3)).spacing == 3.0
    assert building.settings_for(cohort[0], (1, 1, 3)).spacing == [1.0, 1.0, 3.0]


def test_a_store_holds_every_image_and_case_in_manifest_order(cohort):
    report = build(cohort)
    man, _, out = cohort
    st = sl.open_store(out)
    assert (report.built, report.skipped, report.failed) == (4, 0, 0) and report.cases == 6
    assert len(st) == 4 and len(st.cases) == 6
    assert [st.key_of(case) for case in man.cases] == list(st.cases.index)
    assert [c["grade"] for c in st.cases.labels] == [0, 0, 1, 1, 2, 3]
    assert list(st.cases.image) == [0, 0, 1, 1, 2, 3]
    assert list(st.cases.split) == ["train", "train", "test", "test", "train", "test"]
    assert "4 images, 6 cases" in str(report) and report.as_json()["built"] == 4


def test_voxels_keep_their_world_position_and_value(tmp_path):
    """Markers of known place in an anisotropic scan are found at the same mm in the store."""
    array = person((60, 56, 40))
    markers = [(20, 20, 12), (34, 30, 25), (27, 22, 30)]
    for m in markers:
        array[tuple(slice(i - 1, i + 2) for i in m)] = 2500
    save(tmp_path / "a.nii.gz", array, spacing=(1.5, 1.7, 3.0))
    man = manifest([{"id": "a", "patient": "a", "image": "a.nii.gz"}])
    build((man, tmp_path, tmp_path / "store"))
    st = sl.open_store(tmp_path / "store")
    stored, affine = st.array(0)[:].astype(float), st.affine(0)
    source = read_volume(tmp_path / "a.nii.gz")
    assert stored.shape != source.shape and np.allclose(np.linalg.norm(affine[:3, :3], axis=0), 2.0)
    bright = np.argwhere(stored > 1200)
    places = bright @ affine[:3, :3].T + affine[:3, 3]
    for m in markers:
        at = source.to_world(np.array(m))
        near = np.linalg.norm(places - at, axis=1) < 5
        weights = stored[tuple(bright[near].T)]
        found = (places[near] * weights[:, None]).sum(0) / weights.sum()
        assert np.linalg.norm(found - at) < 0.5


def test_the_crop_loses_no_label_and_no_lesion(tmp_path):
    """A tumour beside the body (a limb the body search misses) stays in the store."""
    array = person((64, 64, 40), size=0.25)
    mask = np.zeros(array.shape, np.uint8)
    mask[2:4, 60:62, 36:38] = 1
    save(tmp_path / "a.nii.gz", array)
    save(tmp_path / "m.nii.gz", mask)
    plain = {"id": "a", "patient": "a", "image": "a.nii.gz"}
    build((manifest([plain]), tmp_path, tmp_path / "plain"))
    build((manifest([{**plain, "masks": {"limb": "m.nii.gz"}}]), tmp_path, tmp_path / "masked"))
    center = {"center_mm": [-80 + 3 * 61, -60 + 3 * 3, -50 + 4 * 1]}
    build((manifest([{**plain, "lesion": center}]), tmp_path, tmp_path / "lesion"))
    sizes = {}
    for name in ("plain", "masked", "lesion"):
        sizes[name] = np.array(sl.open_store(tmp_path / name).shape(0))
    assert (sizes["plain"] < sizes["masked"]).any() and (sizes["plain"] < sizes["lesion"]).any()
    st = sl.open_store(tmp_path / "masked")
    volume = (st.labels(0)[:] == 1).sum() * 8
    assert abs(volume / (8 * 36) - 1) < 0.35 and st.label_names == {1: "limb"}


def test_label_maps_and_masks_become_one_volume_with_names(tmp_path):
    array = person()
    organs = np.zeros(array.shape, np.uint8)
    organs[20:40, 15:35, 10:30] = 4
    organs[10:15, 20:25, 10:20] = 9
    tumour = np.zeros(array.shape, np.uint8)
    tumour[28:32, 22:26, 18:22] = 255
    for name, values in {"a": array, "organs": organs, "tumour": tumour}.items():
        save(tmp_path / f"{name}.nii.gz", values)
    case = {"id": "a", "patient": "a", "image": "a.nii.gz", "label_map": "organs.nii.gz"}
    case["masks"] = {"tumour": "tumour.nii.gz"}
    man = manifest([case], organs={4: "liver", 9: "spleen"})
    build((man, tmp_path, tmp_path / "store"), spacing=3.0)
    st = sl.open_store(tmp_path / "store")
    assert st.label_names == {4: "liver", 9: "spleen", 1: "tumour"}
    labels = st.labels(0)[:]
    assert set(np.unique(labels)) == {0, 1, 4, 9} and labels.shape == st.shape(0)
    counts = {int(k): v for k, v in st.rows[0]["labels"]["voxels"].items()}
    assert counts == {v: int((labels == v).sum()) for v in (1, 4, 9)}
    assert abs(counts[1] * 27 / (64 * 36) - 1) < 0.3  # painted over the liver it lies in
    unnamed = manifest([case], organs={4: "liver"})
    report = build((unnamed, tmp_path, tmp_path / "other"))
    assert report.failed == 1 and "holds values the manifest does not name" in report.failures[0]["reason"]


@pytest.mark.parametrize("surface", ["inside", "shared"])
def test_a_tumour_in_an_organ_keeps_its_voxels(tmp_path, surface):
    """At another voxel size than the scan's it is as large as with no organ around it."""
    array = person()
    x, y, z = np.indices(array.shape)
    tumour = (x - 27) ** 2 + (y - 23) ** 2 + (z - 20) ** 2 < 12
    organ = tumour | ((x < 40) if surface == "inside" else (x < 10))
    for name, values in {"a": array, "organ": organ, "tumour": tumour}.items():
        save(tmp_path / f"{name}.nii.gz", values.astype(np.int16))
    bare = {"id": "a", "patient": "a", "image": "a.nii.gz", "masks": {"tumour": "tumour.nii.gz"}}
    found = []
    for case in (bare, {**bare, "label_map": "organ.nii.gz"}):
        out = tmp_path / f"store-{len(found)}"
        build((manifest([case], organs={1: "liver"}), tmp_path, out), crop_body=False)
        store = sl.open_store(out)
        value = {name: value for value, name in store.label_names.items()}["tumour"]
        found.append(store.labels(0)[:] == value)
    assert found[0].sum() > 100 and (found[0] == found[1]).all()


def test_dicom_structures_are_stored_by_the_name_the_manifest_gives(tmp_path):
    uid = "1.9.8.7.1"
    write_series(tmp_path / "raw" / "ct", scan(12, 40, 40), uid=uid)
    volume = read_volume(tmp_path / "raw" / "ct")
    (tmp_path / "raw" / "rt").mkdir()
    gtv = [circle(volume, 2, k, (20, 22), 9) for k in (3, 4, 5, 6)]
    lung = [circle(volume, 2, k, (10, 10), 6) for k in (3, 4)]
    file = write_rtstruct(tmp_path / "raw" / "rt" / "rt.dcm", {"GTV-1": gtv, "Lung": lung})
    series = f"series:{pydicom.dcmread(file).SeriesInstanceUID}"
    case = {"id": "a", "patient": "a", "series_uid": uid, "masks": {"tumour": series}}
    source = {"kind": "local", "parameters": {"segments": {"tumour": "GTV*"}}}
    build((manifest([case], source=source), tmp_path / "raw", tmp_path / "out"), spacing=1.0)
    st = sl.open_store(tmp_path / "out")
    expected = 4 * np.pi * 9**2 * np.prod(volume.spacing)
    assert abs(st.rows[0]["labels"]["voxels"]["1"] / expected - 1) < 0.1
    center = np.argwhere(st.labels(0)[:] == 1).mean(0) @ st.affine(0)[:3, :3].T + st.affine(0)[:3, 3]
    assert np.abs(center - volume.to_world([20, 22, 4.5])).max() < 0.5


def test_a_tilted_series_is_stored_when_asked(tmp_path):
    write_series(tmp_path / "raw" / "ct", scan(8, 30, 30), uid="1.9.8.7.1", drift=(0.0, 0.6))
    man = manifest([{"id": "a", "patient": "a", "image": "ct"}])
    refused = build((man, tmp_path / "raw", tmp_path / "out"))
    assert refused.failed == 1 and "tilt" in refused.failures[0]["reason"]
    report = build((man, tmp_path / "raw", tmp_path / "out"), tilt="correct")
    assert (report.built, report.failed) == (1, 0)


def test_lesions_and_labels_without_geometry_change_no_voxel(cohort):
    """New labels or splits in the manifest are taken up without touching a volume."""
    build(cohort)
    man, root, out = cohort
    before = {name: data for name, data in snapshot(out).items() if name.startswith("volumes")}
    cases = [{**c.model_dump(), "labels": {"grade": 7}, "split": "val"} for c in man.cases]
    changed = manifest(cases, labels={"grade": {"kind": "number"}})
    report = build((changed, root, out))
    assert (report.built, report.skipped) == (0, 4)
    st = sl.open_store(out)
    assert set(st.cases.split) == {"val"} and st.cases.labels.iloc[0] == {"grade": 7}
    assert before == {name: data for name, data in snapshot(out).items() if name.startswith("volumes")}


# ---- again, changed, broken


def test_a_second_run_does_nothing_and_changes_no_byte(cohort):
    build(cohort)
    before = snapshot(cohort[2])
    report = build(cohort)
    assert (report.built, report.skipped, report.failed) == (0, 4, 0)
    assert snapshot(cohort[2]) == before


def test_workers_and_order_of_completion_do_not_matter(cohort, tmp_path):
    build(cohort)
    man, root, _ = cohort
    report = build((man, root, tmp_path / "two"), workers=2)
    assert report.built == 4
    assert snapshot(tmp_path / "two") == snapshot(cohort[2])


def test_only_what_changed_is_built_again(cohort, monkeypatch):
    build(cohort)
    _, root, out = cohort
    monkeypatch.setattr(building, "ingest", lambda *a: pytest.fail("read an unchanged image"))
    assert build(cohort).skipped == 4
    monkeypatch.undo()
    monkeypatch.setenv("SMARTLAB_SALT", "tests-only-no-secret")
    os.utime(root / "p0" / "ct.nii.gz", (1, 1))  # copied: other time, same content
    volumes = {f.name: f.stat().st_mtime_ns for f in (out / "volumes").iterdir()}
    build(cohort)
    assert volumes == {f.name: f.stat().st_mtime_ns for f in (out / "volumes").iterdir()}
    save(root / "p1" / "ct.nii.gz", person((52, 48, 40), seed=99))
    old = sl.open_store(out)
    report = build(cohort)
    assert (report.built, report.skipped) == (1, 3)
    new = sl.open_store(out)
    assert old.rows[1]["file"] != new.rows[1]["file"] and old.rows[0] == new.rows[0]
    assert len(list((out / "volumes").iterdir())) == 8  # the old volume is gone


def test_other_settings_build_everything_again(cohort):
    build(cohort)
    report = build(cohort, spacing=3.0, labels=False)
    st = sl.open_store(cohort[2])
    assert report.built == 4 and st.spacing == 3.0 and st.labels(0) is None
    assert len(list((cohort[2] / "volumes").iterdir())) == 4


def test_an_image_that_left_the_manifest_leaves_the_store(cohort):
    build(cohort)
    man, root, out = cohort
    report = build((man.select(["case-0", "case-2"]), root, out))
    assert report.removed == 2 and len(sl.open_store(out)) == 2
    assert len(list((out / "volumes").iterdir())) == 4


def break_images(root):
    (root / "p0" / "ct.nii.gz").write_bytes((root / "p0" / "ct.nii.gz").read_bytes()[:500])
    (root / "p1" / "tumour.nii.gz").unlink()


def test_bad_images_are_set_aside_with_their_reason_and_tried_again(cohort):
    man, root, out = cohort
    whole = snapshot(root)
    break_images(root)
    cases = [c.model_dump() for c in man.cases]
    cases[-1]["lesion"]["center_mm"] = [900.0, 0.0, 0.0]
    bad = manifest(cases, labels={"grade": {"kind": "number"}})
    report = build((bad, root, out))
    assert (report.built, report.failed, report.cases) == (2, 3, 1)
    table = (out / "failures.csv").read_text().splitlines()
    assert table[0] == "case_number,case,image,reason" and len(table) == 6
    reasons = {f["case_number"]: f["reason"] for f in report.failures}
    assert "cut" in reasons[0] and reasons[0] == reasons[1]
    assert "mask or label map is missing" in reasons[2]
    assert "lies outside the image" in reasons[5] and "mm beyond" in reasons[5]
    assert len(sl.open_store(out)) == 2
    for name, data in whole.items():
        (root / name).write_bytes(data)
    report = build(cohort)
    assert (report.built, report.skipped, report.failed, report.cases) == (3, 1, 0, 6)
    fresh = cohort[2].with_name("fresh")
    build((man, root, fresh))
    assert snapshot(fresh) == snapshot(out)


def test_a_damaged_volume_is_named_and_repaired(cohort):
    build(cohort)
    st = sl.open_store(cohort[2])
    file = cohort[2] / st.rows[2]["file"]
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="missing or damaged") as error:
        st.array(2)
    assert file.name in str(error.value)
    assert build(cohort).built == 1 and file.read_bytes() == whole


def test_silent_damage_on_the_disk_is_found(cohort):
    build(cohort)
    st = sl.open_store(cohort[2])
    assert st.verify() == []
    file = cohort[2] / st.rows[1]["file"]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.unlink()
    file.write_bytes(data)
    assert sl.open_store(cohort[2]).verify() == [st.rows[1]["file"]]


@pytest.mark.parametrize("end", [None, 10])
def test_a_line_of_the_journal_cut_by_a_kill_is_left_out(cohort, end):
    build(cohort)
    out = cohort[2]
    journal = index.Journal(out)
    journal.start([])
    journal.add({"key": "a"})
    journal.add({"key": "b"})
    if end:
        journal.path.write_bytes(journal.path.read_bytes()[:-end])
    assert [row["key"] for row in journal.read()] == (["a"] if end else ["a", "b"])


@pytest.mark.parametrize("old", [True, False], ids=["without checksums", "with checksums"])
def test_a_damaged_line_of_the_journal_costs_one_image_and_one_of_an_older_version_none(cohort, old):
    build(cohort)
    out = cohort[2]
    journal = index.Journal(out)
    journal.start(list(index.read_lines(out, index.read_header(out), "images")))
    (out / "store.json").unlink()  # as if that build had been killed
    lines = journal.path.read_bytes().splitlines()
    lines = [line.partition(b" ")[2] for line in lines] if old else lines
    journal.path.write_bytes(b"\n".join([lines[0][:-9], *lines[1:], b"garbage", b""]))
    report = build(cohort)
    assert (report.built, report.skipped, report.failed) == (1, 3, 0)
    assert sl.open_store(out).verify() == []


@pytest.mark.parametrize("moment", ["fsync", "replace"])
def test_a_write_that_breaks_off_leaves_the_old_file(tmp_path, monkeypatch, moment):
    file = tmp_path / "store.json"
    write_bytes(file, b"old")
    monkeypatch.setattr(os, moment, lambda *given: (_ for _ in ()).throw(OSError("cut")))
    with pytest.raises(OSError, match="cut"):
        write_bytes(file, b"new" * 1000)
    assert file.read_bytes() == b"old"


# ---- killed, stopped, full

SCRIPT = """
import sys
import smartlab as sl
# no main guard, as users write scripts
report = sl.build_store(sys.argv[1], sys.argv[2], sys.argv[3], workers=int(sys.argv[4]), progress=False)
print(report.built, report.skipped, report.failed, report.interrupted, report.remaining)
"""


def start_build(man_path, root, out, n_workers=2):
    command = [sys.executable, "-c", SCRIPT, str(man_path), str(root), str(out), str(n_workers)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=REPO, start_new_session=True, **pipes)


def wait_for(condition, process, timeout=60):
    until = time.monotonic() + timeout
    while not condition() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.005)


@pytest.fixture
def larger(tmp_path, request):
    """A cohort that takes some seconds: the same people at finer spacing."""
    n = getattr(request, "param", 10)
    root = tmp_path / "raw"
    man = make_cohort(root, n)
    for i in range(n):
        save(root / f"p{i}" / "ct.nii.gz", person((96, 80, 72), seed=i), spacing=(1.8, 1.8, 2.3))
        (root / f"p{i}" / "tumour.nii.gz").unlink()
    man = manifest([c.model_dump() | {"masks": {}, "lesion": None, "labels": {}} for c in man.cases])
    man.save(tmp_path / "manifest.json")
    return man, root, tmp_path / "store", tmp_path / "manifest.json"


def test_workers_end_with_a_parent_that_is_killed(larger):
    _, root, out, path = larger
    process = start_build(path, root, out)
    wait_for(lambda: len(psutil.Process(process.pid).children()) == 2, process)
    children = psutil.Process(process.pid).children()
    process.kill()
    assert process.communicate(timeout=10) and not psutil.wait_procs(children, timeout=10)[1]
    assert len(children) == 2


@pytest.mark.slow
@pytest.mark.parametrize("larger", [30], indirect=True)
def test_killed_at_random_moments_and_run_again_gives_the_same_store(larger, tmp_path):
    man, root, out, path = larger
    build((man, root, tmp_path / "whole"))
    rng = random.Random(0)
    journal, killed_inside = out / "journal.jsonl", 0

    def lines():
        return journal.read_bytes().count(b"\n") if journal.exists() else 0

    for attempt in range(4):
        process = start_build(path, root, out)
        goal = lines() + rng.randrange(3)
        wait_for(lambda goal=goal: lines() >= goal and (out / "volumes").exists(), process)
        time.sleep(rng.uniform(0, 0.1))
        killed_inside += process.poll() is None and (out / "journal.jsonl").exists()
        if attempt % 2:  # the whole group, as a cluster does; or the parent alone, its workers orphaned
            with contextlib.suppress(ProcessLookupError):  # it may have finished just before
                os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
        process.communicate(timeout=30)
    assert killed_inside >= 3
    final = start_build(path, root, out)
    text, _ = final.communicate(timeout=120)
    assert final.returncode == 0, text
    assert snapshot(out) == snapshot(tmp_path / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)])
def test_a_polite_stop_keeps_what_is_done_and_exits_in_order(larger, tmp_path, number):
    man, root, out, path = larger
    process = start_build(path, root, out)
    wait_for(lambda: (out / "journal.jsonl").exists() and (out / "journal.jsonl").stat().st_size, process)
    os.killpg(process.pid, number)  # Ctrl-C in a terminal reaches the workers too
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 0, text
    built, _, failed, interrupted, remaining = text.split()[-5:]
    assert int(built) >= 1 and failed == "0" and interrupted == "True" and int(remaining) >= 1
    with pytest.warns(UserWarning, match="interrupted"):
        assert len(sl.open_store(out)) == int(built)
    report = build((man, root, out))
    assert report.skipped == int(built) and not report.interrupted
    build((man, root, tmp_path / "whole"))
    assert snapshot(out) == snapshot(tmp_path / "whole")


def test_a_disk_too_small_is_told_early_and_nothing_built_is_lost(larger, monkeypatch):
    man, root, out, _ = larger
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda p: usage(1, 1, building.SPARE_BYTES + 1000))
    with pytest.raises(DataError, match=r"disk is too small.*images left"):
        build((man, root, out))
    monkeypatch.undo()
    monkeypatch.setenv("SMARTLAB_SALT", "tests-only-no-secret")
    report = build((man, root, out))
    assert (report.skipped, report.built) == (building.TRUSTED, 10 - building.TRUSTED)


def _die_on_two(job):
    if job == 2:
        os._exit(1)
    return job


@pytest.mark.slow
def test_a_running_dask_cluster_does_the_work(cohort, tmp_path):
    build(cohort)
    man, root, _ = cohort
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        report = build((man, root, tmp_path / "far"), scheduler=cluster.scheduler_address)
    assert report.built == 4 and snapshot(tmp_path / "far") == snapshot(cohort[2])
    with pytest.raises(UseError, match="not the address"):
        build((man, root, tmp_path / "none"), scheduler="somewhere")


@pytest.mark.slow
def test_a_worker_that_dies_costs_one_image(monkeypatch):
    with workers.draining() as stop:
        results = list(workers.run_bounded(_die_on_two, range(5), 2, stop=stop))
    lost = [r.job for r in results if isinstance(r, workers.Lost)]
    assert lost == [2] and sorted(r for r in results if not isinstance(r, workers.Lost)) == [0, 1, 3, 4]


def _slowly(job):
    time.sleep(2.0 * (job == "long"))
    return os.getpid()


def test_an_idle_worker_that_is_killed_holds_up_nobody():
    """It dies with the lock of the queue in its hand, and the others take the pool's SIGTERM for a wish to drain."""
    with workers.draining() as stop:
        results = workers.run_bounded(_slowly, ["short", "long"], 2, stop=stop)
        idle = next(results)
        os.kill(idle, signal.SIGKILL)
        assert next(results) not in (idle, os.getpid()) and list(results) == []


def _nap(job):
    time.sleep(0.005)
    return job


def test_few_jobs_are_in_flight_however_many_there_are():
    taken = []
    with workers.draining() as stop:
        jobs = (taken.append(i) or i for i in range(60))
        for done, _ in enumerate(workers.run_bounded(_nap, jobs, 2, stop=stop), 1):
            assert len(taken) - done <= 4
    assert done == 60


def test_one_build_at_a_time(cohort):
    out = cohort[2]
    context = multiprocessing.get_context("fork")
    ready, done = context.Event(), context.Event()

    def hold():
        with index.locked(out):
            ready.set()
            done.wait(20)

    other = context.Process(target=hold)
    other.start()
    ready.wait(20)
    with pytest.raises(DataError, match="another build"), index.locked(out, wait=0.2):
        pass
    done.set()
    other.join()
    with index.locked(out, wait=0.2):
        pass


# ---- nobody can be recognised

SECRETS = [
    "Doe",
    "Jane",
    "secret-id",
    "doe_jane",
    "9.8.7",
    "Smith Hospital",
    "Chest of J",
    "19560203",
    "MRN77",
]


def test_no_name_id_uid_date_or_path_is_anywhere_in_the_store(tmp_path):
    """Good and broken DICOM: a missing slice, a folder of two series, text in the pixel-less header."""
    root = tmp_path / "ward-7 doe_jane"

    def personal(ds, *_):
        ds.PatientBirthDate, ds.StudyDate = "19560203", "20240131"
        ds.InstitutionName, ds.SeriesDescription = "Smith Hospital", "Chest of Jane Doe MRN77"

    hu = scan(12, 24, 24)
    for name, uid in [("good", "1.9.8.7.1"), ("gap", "1.9.8.7.2"), ("mixed", "1.9.8.7.3")]:
        write_series(root / f"doe_jane {name}", hu, uid=uid, edit=lambda ds, *a: personal(ds))
    write_series(root / "doe_jane mixed" / "2", hu, uid="1.9.8.7.4", edit=lambda ds, *a: personal(ds))
    files = sorted((root / "doe_jane gap").iterdir())
    files[5].unlink()
    (root / "doe_jane.nii.gz").write_bytes(b"MRN77 not gzip")
    images = ["doe_jane good", "doe_jane gap", "doe_jane mixed", "doe_jane.nii.gz", "doe_jane lost"]
    cases = [{"id": f"MRN77-{i}", "patient": "Doe Jane", "image": image} for i, image in enumerate(images)]
    cases.append({"id": "secret-id", "patient": "Doe Jane", "series_uid": "1.9.8.7.99"})
    out = tmp_path / "out"
    report = build((manifest(cases), root, out), spacing=1.0)
    assert report.built == 1 and report.failed == 5
    for name, data in snapshot(out).items():
        for secret in [*SECRETS, "1.9.8.7", "20240131", "ward-7", str(tmp_path)]:
            assert secret.lower().encode() not in data.lower(), f"{secret} in {name}"
            assert secret.lower() not in name.lower()
    reasons = " ".join(f["reason"] for f in report.failures)
    for still_useful in ("missing", "2 series in one folder", "not found", "is not below this folder"):
        assert still_useful in reasons
    assert not any(secret.lower() in reasons.lower() for secret in SECRETS)


def test_keys_depend_on_the_salt_and_the_fingerprint_does_not(cohort, monkeypatch, tmp_path):
    build(cohort)
    man, root, out = cohort
    st = sl.open_store(out)
    monkeypatch.setenv("SMARTLAB_SALT", "another-long-enough")
    with pytest.raises(UseError, match="another salt"):
        st.key_of("case-0")
    with pytest.raises(UseError, match="another salt"):
        build(cohort)
    build((man, root, tmp_path / "other"))
    other = sl.open_store(tmp_path / "other")
    assert other.fingerprint == st.fingerprint
    assert not set(other.cases.index) & set(st.cases.index)
    assert not set(other.images.key) & set(st.images.key)


def test_the_salt_is_made_once_and_private(monkeypatch, tmp_path):
    monkeypatch.delenv("SMARTLAB_SALT")
    monkeypatch.setenv("HOME", str(tmp_path))
    from smartlab.data.cohort.privacy import salt

    first = salt()
    file = tmp_path / ".config" / "smartlab" / "salt"
    assert len(first) == 64 and salt() == first and file.stat().st_mode & 0o777 == 0o600


def test_the_fingerprint_sees_voxels_and_labels(cohort):
    build(cohort)
    first = sl.open_store(cohort[2]).fingerprint
    save(cohort[1] / "p3" / "ct.nii.gz", person((56, 48, 40), seed=77))
    build(cohort)
    assert sl.open_store(cohort[2]).fingerprint != first


# ---- opening and reading


def test_opening_ten_thousand_images_is_quick_and_touches_no_volume(cohort, monkeypatch):
    build(cohort)
    out = cohort[2]
    st = sl.open_store(out)
    cases = list(index.read_lines(out, st.header, "cases"))
    index.write_index(out, st.header, list(st.rows) * 2500, cases * 1700)
    shutil.rmtree(out / "volumes")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert len(sl.open_store(out)) == 10_000
        times.append(time.perf_counter() - start)
    assert min(times) < 0.2, times
    assert len(sl.open_store(out).cases) == 10_200


def _read_in_child(st, pipe):
    part = st.array(0)[10:20, 10:20, 10:20]
    pipe.send((len(st._open), part))


def test_handles_are_reopened_after_fork_and_a_store_travels_by_path(cohort, monkeypatch):
    build(cohort)
    st = sl.open_store(cohort[2])
    part = st.array(0)[10:20, 10:20, 10:20]
    st.array(1)
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    child = context.Process(target=_read_in_child, args=(st, theirs))
    child.start()
    assert mine.poll(60), "the child answers"
    opened, found = mine.recv()
    child.join()
    assert (found == part).all() and opened == 1  # its own, not the two of its parent
    again = pickle.loads(pickle.dumps(st))
    assert len(pickle.dumps(st)) < 500 and (again.array(0)[10:20, 10:20, 10:20] == part).all()
    monkeypatch.setattr(store, "OPEN_FILES", 2)
    for i in range(4):
        again.array(i)
    assert len(again._open) == 2


def test_reading_a_part_reads_that_part(cohort):
    build(cohort)
    st = sl.open_store(cohort[2])
    whole = st.array(1)[:]
    assert whole.dtype == np.int16 and whole.shape == st.shape(1)
    assert (st.array(1)[3:17, 5:30, 2:9] == whole[3:17, 5:30, 2:9]).all()
    hu = st.rows[1]["hu"]
    assert hu["min"] == whole.min() and hu["max"] == whole.max()
    assert abs(hu["p50"] - np.median(whole)) <= 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: (manifest([], source={"kind": "local"}), c[1], c[2]), "no cases"),
        (lambda c: (c[0], c[1] / "nowhere", c[2]), "no such folder"),
    ],
)
def test_impossible_requests_are_refused(cohort, change, match):
    with pytest.raises((DataError, UseError), match=match):
        build(change(cohort))


def test_a_folder_belongs_to_one_manifest(cohort):
    build(cohort)
    man, root, out = cohort
    with pytest.raises(UseError, match="another manifest"):
        build((man.model_copy(update={"name": "others"}), root, out))
    with pytest.raises(DataError, match="no store here"):
        sl.open_store(root)


@pytest.mark.slow
def test_every_real_scan_is_built_and_the_store_is_small(real_data, tmp_path):
    cases = [
        {"id": f.parent.name, "patient": f.parent.name, "image": str(f.relative_to(real_data))}
        | {"masks": {"tumour": str(f.with_name("CT_mask.nii.gz").relative_to(real_data))}}
        for f in sorted(real_data.glob("ct_sarcoma/*/CT_image.nii.gz"))
    ]
    cases += [
        {"id": n, "patient": n, "image": f"ct_series/{n}"} for n in ("LIDC-IDRI-0001", "Pancreas-CT-CB_001")
    ]
    segments = sorted(real_data.glob("ct_organs/example_seg/*.nii.gz"))
    masks = {f.name.removesuffix(".nii.gz"): str(f.relative_to(real_data)) for f in segments}
    cases.append(
        {"id": "organs", "patient": "organs", "image": "ct_organs/example_ct.nii.gz", "masks": masks}
    )
    report = build((manifest(cases), real_data, tmp_path), workers=2)
    assert (report.built, report.failed) == (27, 0), report
    st = sl.open_store(tmp_path)
    raw = sum(2 * np.prod(row["shape"]) for row in st.rows)
    assert sum(row["bytes"] for row in st.rows) <= 0.40 * raw
    assert len(st.rows[-1]["labels"]["voxels"]) == 59
    for i, case in enumerate(cases[:24]):  # the tumour keeps its volume
        mask = nib.load(real_data / case["masks"]["tumour"])
        mm3 = (np.asarray(mask.dataobj) != 0).sum() * np.prod(mask.header.get_zooms())
        value = next(v for v, name in st.label_names.items() if name == "tumour")
        assert abs(st.rows[i]["labels"]["voxels"][str(value)] * 8 / mm3 - 1) < 0.05


def test_free_text_stays_out_of_the_store(tmp_path):
    """What somebody wrote about a patient, and classes that nobody listed and that look like it."""
    man = make_cohort(tmp_path / "images", 1)
    cases = [c.model_copy(update={"labels": {"note": "Jane Doe, 3 May"}}) for c in man.cases]
    labels = {"note": LabelSpec(kind="text"), "seen": LabelSpec(kind="multiclass")}
    written = man.model_copy(update={"labels": labels, "all_cases": cases})
    sl.build_store(written, tmp_path / "images", tmp_path / "store", workers=0, spacing=4.0, progress=False)
    assert list(sl.open_store(tmp_path / "store").cases.labels) == [{}, {}]
    assert not any(b"Doe" in content for content in snapshot(tmp_path / "store").values())
    for values, words in ((["1970-05-03"], "a date"), ([f"name {i}" for i in range(30)], "30 values")):
        many = [c.model_copy(update={"labels": {"seen": v}}) for c in man.cases[:1] for v in values]
        telling = man.model_copy(update={"labels": labels, "all_cases": many})
        with pytest.raises(DataError, match=f"'seen' looks like text that could identify.*{words}"):
            sl.build_store(telling, tmp_path / "images", tmp_path / "other", workers=0, progress=False)
        assert not list((tmp_path / "other").glob("[!.]*"))
