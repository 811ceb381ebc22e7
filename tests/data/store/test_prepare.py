"""What `--data` means, the same at every door; nothing is drawn, built twice or lost on the way."""

from __future__ import annotations

import json
import shutil

import pytest
from typer.testing import CliRunner

import smartlab as sl
from smartlab.cli import app as cli
from smartlab.core.errors import UseError
from smartlab.core.settings import DataConfig
from smartlab.data.cohort import scan
from smartlab.data.store import prepare
from smartlab.data.store.prepare import find_data, locate_images, prepare_store
from tests.data.store_cohort import make_cohort, manifest, snapshot

QUICK = {"workers": 0, "spacing": 5.0}


@pytest.fixture
def scans(tmp_path):
    """A folder of four scans without a manifest.json, and the manifest that a scan of it would give."""
    return tmp_path / "scans", make_cohort(tmp_path / "scans")


@pytest.fixture
def archive(tmp_path):
    """Two scans of one's own in the layout of msd-lung, whose manifest lists no cases."""
    root = tmp_path / "msd"
    make_cohort(root / "own", n=2)
    for i in range(2):
        for name, place in (("ct", "imagesTr"), ("tumour", "labelsTr")):
            target = root / f"Task06_Lung/{place}/lung_{i:03d}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(root / f"own/p{i}/{name}.nii.gz", target)
    shutil.rmtree(root / "own")
    return root


def say(*words: object) -> dict:
    done = CliRunner().invoke(cli.app, [*map(str, words), "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


# ---- what is meant


def test_a_manifest_is_found_by_its_folder_its_file_and_from_elsewhere(scans, tmp_path):
    folder, man = scans
    man.save(folder / "manifest.json")
    told = man.model_copy(update={"source": man.source.model_copy(update={"location": str(folder)})})
    told.save(tmp_path / "elsewhere" / "m.json")
    for named in (folder, folder / "manifest.json", tmp_path / "elsewhere" / "m.json"):
        found, root = find_data(named)
        assert found.cases == man.cases and root == folder, named
    man.save(tmp_path / "elsewhere" / "m.json")  # which says nothing of where the images are
    assert find_data(tmp_path / "elsewhere" / "m.json")[1] is None
    assert find_data(tmp_path / "elsewhere" / "m.json", folder)[1] == folder
    with pytest.raises(UseError, match=r"where are the images of 'people'.*data\.root=DIR"):
        locate_images(DataConfig(manifest=str(tmp_path / "elsewhere" / "m.json")))


def test_a_folder_without_a_manifest_is_scanned(scans, monkeypatch):
    folder, man = scans
    asked = []
    monkeypatch.setattr(scan, "scan_folder", lambda place, progress: asked.append(place) or man)
    made, root = locate_images(DataConfig(manifest=str(folder)), progress=False)
    assert made.cases == man.cases and root == folder and asked == [folder]


def test_a_shipped_name_is_not_taken_for_a_folder_that_happens_to_be_here(tmp_path, monkeypatch):
    (tmp_path / "amos22").mkdir()
    monkeypatch.chdir(tmp_path)
    man, root = find_data("amos22")
    assert man.name == "amos22" and root is None


@pytest.mark.parametrize("how", ["name", "--data"])
def test_an_archive_of_scans_is_completed_at_every_door(archive, how, tmp_path):
    """`--manifest msd-lung --root DIR`: its cases are those that lie there."""
    named = ["--data", "msd-lung"] if how == "--data" else ["msd-lung"]
    where = ["--root", archive]
    assert say("data", "verify", *named, *where, "--workers", 0)["images"] == 2
    built = say("data", "build", *named, *where, "--workers", 0, "--spacing", 5, "--out", tmp_path / "s")
    assert built["images"] == 2
    man, store = prepare_store(DataConfig(manifest="msd-lung", root=str(archive), **QUICK), progress=False)
    assert [case.id for case in man.cases] == ["lung_000", "lung_001"] and len(store) == 2
    assert (
        sl.build_store("msd-lung", archive, tmp_path / "s", spacing=5, workers=0, progress=False).skipped == 2
    )
    assert sl.verify_manifest("msd-lung", archive, workers=0, progress=False).ok


def test_the_data_are_named_once(scans):
    folder, _ = scans
    for words in (["data", "verify", folder, "--data", folder], ["data", "build"], ["data", "verify"]):
        done = CliRunner().invoke(cli.app, list(map(str, words)))
        assert isinstance(done.exception, UseError), words
    words = ["pretrain", "tiny", f"data.manifest={folder}", "--data", str(folder)]
    assert "both name the data" in str(CliRunner().invoke(cli.app, words).exception)


# ---- phantoms


def test_no_phantom_is_drawn_among_files_of_the_users(scans, tmp_path):
    folder, _ = scans
    before = snapshot(folder)
    for draw in (
        lambda: locate_images(DataConfig(root=str(folder)), progress=False),
        lambda: sl.make_phantom("ct", folder, n=1, progress=False),
        lambda: sl.pretrain(
            sl.load_config("tiny", {"data.root": str(folder)}), tmp_path / "r", progress=False
        ),
    ):
        with pytest.raises(UseError, match=rf"holds files that are no phantom.*--data {folder}"):
            draw()
    assert snapshot(folder) == before and not (tmp_path / "r").exists()


def test_a_phantom_that_is_named_by_its_folder_is_left_as_it_is(tmp_path):
    """phantom_cases of a preset neither draws more patients there nor makes its manifest forget some."""
    sl.make_phantom("ct", tmp_path / "p", n=2, shape=(40, 40, 40), spacing=8.0, progress=False)
    before = snapshot(tmp_path / "p")
    for asked, found in ((1, 1), (16, 2), (None, 2)):
        data = DataConfig(manifest=str(tmp_path / "p"), phantom_cases=asked)
        assert len(locate_images(data, progress=False)[0].patients) == found
    assert snapshot(tmp_path / "p") == before


# ---- stores


def build(man, folder, out, **more):
    return sl.build_store(man, folder, out, workers=0, spacing=5.0, progress=False, **more)


def test_a_store_is_found_by_what_it_was_made_from(scans, tmp_path):
    """Wherever it was put, and with the crop it has; another voxel size or other scans make another store."""
    folder, man = scans
    build(man, folder, tmp_path / "my" / "store", crop_body=False)
    man.save(folder / "manifest.json")
    data = DataConfig(manifest=str(folder), **QUICK)
    assert prepare_store(data, progress=False)[1].path == tmp_path / "my" / "store"
    relabelled = man.model_copy(deep=True)
    for case in relabelled.all_cases:
        case.split, case.labels = None, {}
    relabelled.save(folder / "manifest.json")
    changed = prepare_store(data, progress=False)[1]
    assert changed.path == tmp_path / "my" / "store" and changed.cases.split.isna().all()
    assert not changed.header["settings"]["crop_body"]
    coarse = prepare_store(data.model_copy(update={"spacing": 6.0}), progress=False)[1]
    assert coarse.path == tmp_path / "scans-store-6mm"
    man.select(["case-2"]).save(folder / "manifest.json")
    assert len(prepare_store(data, progress=False)[1]) == 1 and len(sl.open_store(tmp_path / "my/store")) == 4


def test_two_datasets_of_one_folder_have_stores_of_their_own(scans):
    folder, man = scans
    first, second = man.select(["case-2"]), man.select(["case-3"]).model_copy(update={"name": "others"})
    places = [prepare.store_place(m, folder, 5.0) for m in (first, second)]
    assert places[0] == places[1]
    build(first, folder, places[0])
    build(second, folder, prepare.store_place(second, folder, 5.0))
    assert prepare.store_place(second, folder, 5.0).name == "scans-store-5mm-others"
    assert prepare.store_place(first, folder, 5.0) == places[0]


def test_a_store_that_is_gone_is_built_beside_the_images(scans, tmp_path, monkeypatch):
    folder, man = scans
    build(man, folder, tmp_path / "s")
    shutil.rmtree(tmp_path / "s")
    assert prepare.store_place(man, folder, 5.0) == tmp_path / "scans-store-5mm"
    monkeypatch.chdir(folder)
    assert prepare.store_place(man, ".", 5.0) == tmp_path / "scans-store-5mm"


def test_a_cache_that_cannot_be_written_stops_no_build(scans, tmp_path, monkeypatch):
    (tmp_path / "cache").touch()
    monkeypatch.setenv("SMARTLAB_CACHE", str(tmp_path / "cache"))
    folder, man = scans
    assert build(man, folder, tmp_path / "s").images == 4


def test_labels_and_splits_do_not_change_what_pretraining_sees(scans, tmp_path):
    folder, man = scans
    build(man, folder, tmp_path / "s")
    first, whole = (st := sl.open_store(tmp_path / "s")).voxels, st.fingerprint
    bare = manifest([{"id": c.id, "patient": c.patient, "image": c.image} for c in man.cases])
    build(bare, folder, tmp_path / "s")
    again = sl.open_store(tmp_path / "s")
    assert again.voxels == first and again.fingerprint != whole
    build(bare.select(["case-2"]), folder, tmp_path / "s")
    assert sl.open_store(tmp_path / "s").voxels != first
