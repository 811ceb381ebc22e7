"""The store of mammograms and the views drawn from it: positions hold, outlines are told by content, nothing is lost."""

from __future__ import annotations

import os
import re
import shutil
import time

import numpy as np
import pydicom
import pytest
import torch
from PIL import Image
from pydicom.uid import generate_uid

import smartlab as sl
from smartlab.core.errors import DataError, UseError
from smartlab.core.settings import DataConfig
from smartlab.data.cohort.cbis import find_outline
from smartlab.data.cohort.manifest import Manifest
from smartlab.data.crops.augment import augment
from smartlab.data.crops.flat import ImageDataset, cut, lesion_crops
from smartlab.data.crops.loader import CropLoader
from smartlab.data.images.mammography import read_mammogram
from smartlab.data.phantoms.make import make_phantom
from smartlab.data.store.prepare import prepare_store
from tests.data import mammograms as mg
from tests.data.store_cohort import snapshot
from tests.processes import Child

FLAT = {"shape": (256, 192), "spacing": 1.0}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Eight small patients, their store, and their files."""
    os.environ["SMARTLAB_SALT"] = "tests-only-no-secret"
    root = tmp_path_factory.mktemp("mammo")
    man = make_phantom("mammo", root / "raw", n=8, progress=False, **FLAT)
    sl.build_store(man, root / "raw", root / "store", spacing=1.0, workers=0, progress=False)
    return man, root / "raw", sl.open_store(root / "store")


def row_of(store, case):
    return store.cases.loc[store.key_of(case)]


# ---- the store


def test_every_image_is_stored_as_grey_values_with_the_chest_wall_on_the_left(cohort):
    man, root, store = cohort
    assert len(store) == len(man.images()) and len(store.cases) == len(man.cases)
    sides = set()
    for group in man.images():
        case, image = group.cases[0], int(row_of(store, group.cases[0]).image)
        array, seen = store.array(image)[:], read_mammogram(root / case.image).array
        sides.add(case.labels["laterality"])
        assert array.dtype == np.int16 and array.shape[2] == 1 and array.min() >= 0 and array.max() <= 4095
        assert array[:, :8].mean() > array[:, -8:].mean() + 100, "the breast is at its left border"
        assert array.size < seen.size, "cropped to the breast"
        inside = np.linalg.inv(store.affine(image)) @ [0, 0, 0, 1]
        rows, columns = np.argwhere(seen > 300).min(0), np.argwhere(seen > 300).max(0)
        to_index = np.linalg.inv(store.affine(image))
        for r, c in (rows, columns):  # no bright pixel was cut off
            at = to_index @ [c, r, 0, 1]
            assert (at[:2] >= -0.5).all() and (at[:2] <= np.array(array.shape[:2]) - 0.5).all(), inside
    assert sides == {"L", "R"}


def test_positions_in_the_file_lead_to_the_same_pixel_in_the_store(cohort):
    man, root, store = cohort
    rng = np.random.default_rng(0)
    for group in man.images():
        image = int(row_of(store, group.cases[0]).image)
        seen, array = read_mammogram(root / group.cases[0].image).array, store.array(image)[:][:, :, 0]
        at = np.column_stack([rng.integers(0, n, 50) for n in array.shape])
        xy = (store.affine(image) @ np.c_[at, np.zeros(50), np.ones(50)].T)[:2].T  # column mm, row mm
        column, line = np.rint(xy).astype(int).T
        assert (seen[line, column] == array[at[:, 0], at[:, 1]]).all()


def test_lesions_and_outlines_lie_on_each_other(cohort):
    man, _, store = cohort
    assert store.label_names == {1: "lesion"}
    for case in man.cases:
        if case.lesion is None:
            continue
        row = row_of(store, case)
        labels = store.labels(row.image)[:][:, :, 0]
        at = (np.linalg.inv(store.affine(row.image)) @ [*row.center_mm, 1])[:2]
        away = np.sqrt(((np.argwhere(labels) - at) ** 2).sum(1)).min()
        assert away < 2 and row.box_mm[0] == case.lesion.box_mm[0]


def test_a_lesion_without_a_stated_place_gets_that_of_its_outline(cohort, tmp_path):
    man, root, _ = cohort
    bare = man.model_copy(
        update={"all_cases": [c.model_copy(update={"lesion": None}) for c in man.all_cases]}
    )
    sl.build_store(bare, root, tmp_path / "s", spacing=1.0, workers=0, progress=False)
    found = sl.open_store(tmp_path / "s")
    for case in man.cases:
        if case.lesion:
            mask = np.argwhere(np.array(Image.open(root / case.masks["lesion"])))
            row, low, high = row_of(found, case), mask.min(0), mask.max(0)
            assert np.allclose(row.center_mm[:2], ((low + high) / 2)[::-1], atol=1e-3)
            assert np.allclose(row.box_mm[:2], (high - low + 1)[::-1]) and row.diameter_mm == max(row.box_mm)


def test_resampling_keeps_places_and_brightness(cohort, tmp_path):
    man, root, store = cohort
    some = man.select(c.id for c in man.cases if c.patient in man.patients[:2])
    sl.build_store(some, root, tmp_path / "s", spacing=1.5, workers=0, progress=False)
    coarse = sl.open_store(tmp_path / "s")
    for case in some.cases:
        a, b = row_of(store, case), row_of(coarse, case)
        assert a.center_mm == b.center_mm
        fine, rough = store.array(a.image)[:], coarse.array(b.image)[:]
        assert abs(fine.sum() - rough.sum() * 1.5**2) < 0.03 * fine.sum()


def test_no_name_or_path_is_in_the_store(cohort):
    man, root, store = cohort
    text = b"".join(data for name, data in snapshot(store.path).items() if not name.endswith("b2nd"))
    for word in [str(root), *man.patients, *(c.id for c in man.cases), "phantom\\x00"]:
        assert word.encode() not in text


def build(manifest_path, root, out):
    sl.build_store(manifest_path, root, out, spacing=1.0, workers=0, progress=False)


def test_killed_while_building_and_run_again_gives_the_same_store(cohort, tmp_path):
    _, root, store = cohort
    out = tmp_path / "store"
    killed = 0
    for lines in (1, 4):
        child = Child(build, root / "manifest.json", root, out)
        journal, until = out / "journal.jsonl", time.monotonic() + 120
        while child.running and time.monotonic() < until:
            if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
                break
            time.sleep(0.002)
        killed += child.running
        child.kill()
    assert killed == 2 and not (out / "store.json").exists()
    report = sl.build_store(root / "manifest.json", root, out, spacing=1.0, workers=0, progress=False)
    assert report.skipped >= 4
    assert snapshot(out) == snapshot(store.path)


def test_the_spacing_of_a_ct_is_refused_with_a_usable_one(cohort, tmp_path):
    man, root, _ = cohort
    with pytest.raises(UseError, match=r"0\.02 to 1\.5 mm for MG.*data\.spacing=0\.2"):
        sl.build_store(man, root, tmp_path / "s", spacing=2.0, progress=False)


def test_a_configuration_is_enough_to_get_a_store():
    config = DataConfig(manifest="phantom-mammo", spacing=1.0, phantom_cases=1, workers=0, grey="percentile")
    _, store = prepare_store(config, progress=False)
    assert len(store) in (1, 2) and store.header["settings"]["grey"] == "percentile"


def test_pixel_size_comes_from_the_manifest_where_files_have_none(tmp_path):
    path = tmp_path / "raw" / "a.dcm"
    header = mg.write(path)
    del header.ImagerPixelSpacing, header.PixelSpacing
    header.save_as(path)
    man = one_case({"image": "a.dcm"})
    report = sl.build_store(man, tmp_path / "raw", tmp_path / "a", spacing=1.0, workers=0, progress=False)
    assert report.failed == 1 and "pixel_mm" in report.failures[0]["reason"]
    man.source.parameters["pixel_mm"] = 0.5
    sl.build_store(man, tmp_path / "raw", tmp_path / "b", spacing=1.0, workers=0, progress=False)
    store = sl.open_store(tmp_path / "b")
    assert store.images.source_spacing[0][:2] == [0.5, 0.5]
    assert any("0.5 mm per pixel taken from the manifest" in note for note in store.images.notes[0])


# ---- outlines, by content


def one_case(case, **more):
    about = {"title": "t", "modality": "MG", "licence": "-", "citation": "-", "homepage": "-"}
    labels = {"pathology": {"kind": "binary", "classes": ["benign", "malignant"]}}
    cases = [{"id": "c", "patient": "p", "labels": {"pathology": "benign"}, **case}]
    return Manifest.model_validate(
        {"name": "one", **about, "source": {"kind": "local"}, "labels": labels, "cases": cases, **more}
    )


def dicom(path, array, uid, bits):
    """A derived image as CBIS-DDSM has them: no spacing, no window."""
    header = mg.write(path, mg.image())
    for name in ("ImagerPixelSpacing", "PixelSpacing", "WindowCenter", "WindowWidth"):
        delattr(header, name)
    mg.rewrite(header, array, bits)
    header.SeriesInstanceUID = uid
    header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    header.save_as(path, enforce_file_format=True)


@pytest.fixture
def cbis(tmp_path):
    """A mammogram with its outline and its cut-out, as in CBIS-DDSM; files named so that names mislead."""
    image, mask = mg.image().astype(np.uint16) * 16, np.zeros((256, 192), np.uint8)
    mask[100:130, 40:75] = 255
    crop = image[90:140, 30:85]
    uids = {name: generate_uid() for name in ("image", "outline", "other")}
    root = tmp_path / "raw"
    dicom(root / "x" / "1-1.dcm", image, uids["image"], 16)

    def put(where, array, uid="outline"):
        dicom(root / where, array, uids[uid], 8 if array.dtype == np.uint8 else 16)

    def build(masks=("outline",)):
        places = dict(zip(("lesion", "crop"), (f"series:{uids[m]}" for m in masks), strict=False))
        man = one_case({"series_uid": uids["image"], "masks": places}, name="cbis")
        man.source.parameters["pixel_mm"] = 1.0
        report = sl.build_store(man, root, tmp_path / "store", spacing=1.0, workers=0, progress=False)
        return report, sl.open_store(tmp_path / "store")

    return put, build, mask, crop


@pytest.mark.parametrize(("first", "second"), [("mask", "crop"), ("crop", "mask")])
def test_the_outline_is_found_whichever_file_it_is(cbis, first, second):
    put, build, mask, crop = cbis
    arrays = {"mask": mask, "crop": crop}
    put("y/1-1.dcm", arrays[first])
    put("y/1-2.dcm", arrays[second])
    report, store = build()
    row = store.cases.iloc[0]
    assert report.failed == 0 and not any("cut-out" in note for note in store.images.notes[0])
    assert row.center_mm[:2] == [57.0, 114.5] and row.box_mm == [35.0, 30.0, 0.0]


def test_the_outline_is_found_in_the_series_called_cut_out(cbis):
    put, build, mask, crop = cbis
    put("y/1-1.dcm", crop, "outline")  # the two series are exchanged
    put("z/1-1.dcm", mask, "other")
    report, store = build(("outline", "other"))
    assert report.failed == 0 and store.cases.iloc[0].center_mm[:2] == [57.0, 114.5]


def test_all_series_in_one_folder_are_told_apart(cbis):
    put, build, mask, crop = cbis
    put("x/1-2.dcm", mask)
    put("x/1-3.dcm", crop)
    report, store = build()
    assert report.failed == 0 and store.cases.iloc[0].center_mm[:2] == [57.0, 114.5]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda mask, crop: [crop], r"no file is the outline.*grey image of 50×55"),
        (lambda mask, crop: [mask[:-1], crop], r"no file is the outline.*two-valued image of 255×192"),
        (lambda mask, crop: [mask, mask[:, ::-1]], r"several files could be the outline"),
        (lambda mask, crop: [255 - mask, crop], r"not one of a lesion.*marked"),
        (lambda mask, crop: [mask * 0 + 255], r"no file is the outline.*same value|no file is the outline"),
        (lambda mask, crop: [], r"outline is not below the data root"),
    ],
)
def test_what_does_not_fit_is_reported_and_replaced_by_nothing(cbis, change, reason):
    put, build, mask, crop = cbis
    for number, array in enumerate(change(mask, crop)):
        put(f"y/1-{number}.dcm", np.ascontiguousarray(array))
    report, store = build()
    assert report.failed == 1 and len(store) == 1 and len(store.cases) == 0, "the image stays, the case goes"
    assert re.search(reason, report.failures[0]["reason"])
    assert "outline" in (store.path / "failures.csv").read_text()


def test_a_cut_out_of_another_place_is_noted(cbis):
    put, build, mask, _ = cbis
    put("y/1-1.dcm", mask)
    put("y/1-2.dcm", (mg.image("R", "CC", 2)[60:110, 100:155] * 16).astype(np.uint16))
    report, store = build()
    assert report.failed == 0 and any("shows something else" in note for note in store.images.notes[0])


def test_a_lesion_beside_its_outline_is_refused(cohort, tmp_path):
    man, root, _ = cohort
    case = next(c for c in man.cases if c.lesion)
    x, y, z = case.lesion.center_mm
    moved = case.model_copy(
        update={
            "lesion": case.lesion.model_copy(update={"center_mm": (x + 40 * (1 if x < 60 else -1), y, z)})
        }
    )
    only = man.model_copy(update={"all_cases": [moved]})
    report = sl.build_store(only, root, tmp_path / "s", spacing=1.0, workers=0, progress=False)
    assert report.failed == 1 and "lies elsewhere" in report.failures[0]["reason"]


def test_an_unreadable_file_beside_the_outline_does_not_hide_it(tmp_path):
    mask = np.zeros((64, 48), np.uint8)
    mask[20:30, 20:30] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    (tmp_path / "other.dcm").write_text("no image")
    found, _ = find_outline([tmp_path / "other.dcm", tmp_path / "mask.png"], np.ones((64, 48)))
    assert found.sum() == 100


# ---- views


@pytest.mark.parametrize("crop", ["lesion", "image", "random"])
def test_a_view_depends_on_seed_epoch_and_index_only(cohort, crop):
    store = cohort[2]
    a, b = (ImageDataset(store, view=48, crop=crop, flip=True, seed=3) for _ in range(2))
    for index in (0, len(a) - 1):
        assert (a[1, index]["views"] == b[1, index]["views"]).all()
    assert a[0]["views"].shape == (1, 48, 48) and a[0]["views"].dtype == np.int16
    others = [a[2, 0], ImageDataset(store, view=48, crop=crop, flip=True, seed=4)[1, 0]]
    if crop != "image":
        assert any((a[1, 0]["views"] != other["views"]).any() for other in others)


def test_workers_give_the_same_batches(cohort):
    def batches(workers):
        loader = CropLoader(ImageDataset(cohort[2], view=32, flip=True), 3, workers=workers, seed=1)
        found = [batch["views"] for batch in loader]
        loader.close()
        return found

    for a, b in zip(batches(0), batches(2), strict=True):
        assert a.shape == (3, 1, 32, 32) and (a == b).all()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("view", [24, 48])
def test_the_affine_of_a_view_leads_back_to_the_image(cohort, flip, view):
    store = cohort[2]
    data = ImageDataset(store, view=view, flip=flip, seed=5)
    for index in range(len(data)):
        item = data[index]
        row = store.cases.loc[item["case"]]
        at = (np.linalg.inv(item["affine"]) @ [*row.center_mm, 1])[:2]
        assert (at > 0.15 * view).all() and (at < 0.85 * view).all(), "the lesion is inside the view"
        whole = store.array(row.image)[:][:, :, 0]
        to_store = np.linalg.inv(store.affine(row.image)) @ item["affine"]
        middle = np.rint((to_store @ [view // 2, view // 2, 0, 1])[:2]).astype(int)
        step = round(abs(to_store[:2, :2]).max())
        around = whole[middle[0] - step : middle[0] + step + 1, middle[1] - step : middle[1] + step + 1]
        assert around.min() - 60 <= item["views"][0, view // 2, view // 2] <= around.max() + 60


def test_a_margin_gives_context_and_small_lesions_are_not_magnified(cohort):
    store = cohort[2]
    row = store.cases[store.cases.center_mm.notna()].iloc[0]
    for margin in (0.0, 1.0, 3.0):
        data = ImageDataset(store, view=8, margin=margin, jitter=0, cases=[row.name])
        side = np.linalg.norm(data[0]["affine"][:3, 0]) * 8
        assert side == pytest.approx(max(row.box_mm) * (1 + 2 * margin))
    large = ImageDataset(store, view=128, margin=0.0, jitter=0, cases=[row.name])[0]
    assert np.allclose(np.linalg.norm(large["affine"][:3, :2], axis=0), store.spacing)


def test_whole_images_keep_their_form_and_random_views_show_breast(cohort):
    store = cohort[2]
    for index in range(len(store)):
        item = ImageDataset(store, view=64, crop="image")[index]
        steps = np.linalg.norm(item["affine"][:3, :2], axis=0)
        assert steps[0] == pytest.approx(steps[1]) == pytest.approx(max(store.shape(index)[:2]) / 64)
        item = ImageDataset(store, view=64, crop="random", seed=1)[index]
        assert (item["views"] > 300).mean() > 0.15


def test_what_lies_beyond_the_image_is_black(cohort):
    view, _, padded = cut(cohort[2], 0, np.array([-100.0, -100.0]), 40.0, 40)
    assert padded and not view.any()
    view, _, padded = cut(cohort[2], 0, np.array([-100.0, -100.0]), 80.0, 40)
    assert padded and not view.any()


def test_requests_that_make_no_sense_are_refused(cohort):
    man, _, store = cohort
    for wrong in ({"crop": "breast"}, {"view": 0}, {"jitter": 1.5}, {"cases": ["x"]}):
        with pytest.raises(UseError):
            ImageDataset(store, **wrong)
    without = next((c for c in man.cases if c.lesion is None), None)
    if without is not None:
        with pytest.raises(DataError, match="have no lesion"):
            ImageDataset(store, cases=[store.key_of(without)])
    with pytest.raises(DataError, match="no images to draw from"):
        ImageDataset(store, crop="image", images=[])


def test_evaluation_gets_the_lesions_in_the_order_asked_for_and_nothing_random(cohort):
    store = cohort[2]
    keys = list(store.cases.index[store.cases.center_mm.notna()])[::-1]
    data = lesion_crops(store, 40, cases=keys)
    assert [data[i]["case"] for i in range(len(keys))] == keys
    assert data[0]["crop"].shape == (1, 40, 40) and (data[0]["crop"] == data[7, 0]["crop"]).all()


def test_moving_the_files_rebuilds_nothing(cohort, tmp_path):
    man, root, store = cohort
    shutil.copytree(root, tmp_path / "raw")
    shutil.copytree(store.path, tmp_path / "store")
    report = sl.build_store(man, tmp_path / "raw", tmp_path / "store", spacing=1.0, workers=0, progress=False)
    assert report.built == 0 and report.skipped == len(store)
    header = pydicom.dcmread(tmp_path / "raw" / man.cases[0].image)
    header.PixelData = bytes(header.PixelData[2:]) + b"\0\0"
    header.save_as(tmp_path / "raw" / man.cases[0].image)
    report = sl.build_store(man, tmp_path / "raw", tmp_path / "store", spacing=1.0, workers=0, progress=False)
    assert report.built == 1


def test_images_of_a_batch_are_mirrored_each_by_itself():
    """Also where scans of several channels would be mirrored together."""
    x = torch.rand(16, 1, 24, 24)
    whole = augment(x, torch.Generator().manual_seed(0), intensity=0, channels=True)
    assert torch.equal(whole, augment(x, torch.Generator().manual_seed(0), intensity=0))
    ways = {
        tuple(axes)
        for before, after in zip(x, whole, strict=True)
        for axes in ((), (1,), (2,), (1, 2))
        if torch.equal(after, before.flip(axes))
    }
    assert len(ways) == 4
