"""Phantoms: deterministic, plausible, labelled, and hard enough that size alone does not give the class away."""

from __future__ import annotations

import json
import subprocess
import sys
import time

import nibabel
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from smartlab.core.config import load_config
from smartlab.core.errors import UseError
from smartlab.data.cohort.manifest import load_manifest
from smartlab.data.cohort.verify import verify_manifest
from smartlab.data.images.mammography import read_mammogram
from smartlab.data.images.readers import read_labels, read_volume
from smartlab.data.phantoms import breast, canvas, ct, mammo
from smartlab.data.phantoms.curve import Curve
from smartlab.data.phantoms.grid import Grid
from smartlab.data.phantoms.lesions import BASELINE, reach, render_lump
from smartlab.data.phantoms.make import kept_in, make_phantom, phantom_manifest
from smartlab.data.phantoms.organs import ORGANS
from smartlab.data.phantoms.patient import DEFAULT, draw_patient
from smartlab.data.store.prepare import locate_images

SMALL = {"shape": (80, 80, 80), "spacing": 3.8}
FLAT = {"shape": (256, 192), "spacing": 1.0}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Six small CT patients as NIfTI."""
    root = tmp_path_factory.mktemp("ct")
    return root, make_phantom("ct", root, n=6, progress=False, **SMALL)


@pytest.fixture(scope="module")
def mammograms(tmp_path_factory):
    root = tmp_path_factory.mktemp("mammo")
    return root, make_phantom("mammo", root, n=8, progress=False, **FLAT)


@pytest.fixture(scope="module")
def full_size():
    return [ct.render(draw_patient(0, i)) for i in range(3)]


def _bytes(root, skip=("manifest.json", "phantom-ct.csv", "phantom-mammo.csv")):
    return {
        p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file() and p.name not in skip
    }


# ---- the manifest and the files agree ----


@pytest.mark.parametrize("kind", ["cohort", "mammograms"])
def test_manifest_without_images_equals_the_one_written(kind, request):
    root, manifest = request.getfixturevalue(kind)
    grid = SMALL if kind == "cohort" else FLAT
    n = manifest.source.parameters["n"]
    assert phantom_manifest(manifest.name, n, **grid) == manifest == load_manifest(root)


@pytest.mark.parametrize("kind", ["cohort", "mammograms"])
def test_every_image_passes_verification(kind, request):
    root, manifest = request.getfixturevalue(kind)
    report = verify_manifest(manifest, root, workers=0, progress=False)
    assert report.ok, str(report)


@pytest.mark.parametrize(("kind", "n"), [("ct", 128), ("mammo", 240)])
def test_shipped_manifest_is_what_the_generator_says(kind, n):
    assert load_manifest(f"phantom-{kind}") == phantom_manifest(kind, n)


@given(n=st.integers(1, 12), more=st.integers(1, 12), seed=st.integers(0, 1000))
@settings(max_examples=8, deadline=None)
def test_a_patient_is_the_same_in_any_cohort_size(n, more, seed):
    for kind in ("ct", "mammo"):
        few, many = phantom_manifest(kind, n, seed), phantom_manifest(kind, n + more, seed)
        assert many.all_cases[: len(few.all_cases)] == few.all_cases
        assert phantom_manifest(kind, n, seed + 1).all_cases != few.all_cases


@pytest.mark.parametrize(("kind", "grid"), [("ct", SMALL), ("mammo", FLAT)])
def test_files_do_not_depend_on_workers_or_cohort_size(kind, grid, tmp_path):
    make_phantom(kind, tmp_path / "alone", n=3, progress=False, workers=2, **grid)
    make_phantom(kind, tmp_path / "grown", n=1, progress=False, **grid)
    make_phantom(kind, tmp_path / "grown", n=3, progress=False, **grid)
    assert _bytes(tmp_path / "alone") == _bytes(tmp_path / "grown")


def test_an_interrupted_cohort_is_completed_not_redone(tmp_path):
    make_phantom("ct", tmp_path, n=2, progress=False, **SMALL)
    before = _bytes(tmp_path)
    kept, lost = tmp_path / "images/ct-0000.nii.gz", tmp_path / "images/ct-0001.nii.gz"
    stamp = kept.stat().st_mtime_ns
    lost.unlink()
    (tmp_path / "manifest.json").unlink()
    make_phantom("ct", tmp_path, n=2, progress=False, **SMALL)
    assert kept.stat().st_mtime_ns == stamp and _bytes(tmp_path) == before
    assert not list(tmp_path.rglob(".*")), "temporary files were left behind"


@pytest.mark.parametrize(
    ("kind", "change", "says"),
    [
        ("brain", {}, "one of ct, mammo, mr"),
        ("ct", {"n": 0}, "n=0"),
        ("ct", {"shape": (64, 64, 64)}, "128 mm"),
        ("ct", {"shape": (64, 64)}, "2 numbers"),
        ("mammo", {"format": "nifti"}, "dicom"),
        ("ct", {"seed": 1, **SMALL}, "another phantom"),
    ],
)
def test_a_bad_request_is_refused_in_words(kind, change, says, cohort):
    with pytest.raises(UseError, match=says):
        make_phantom(kind, cohort[0], progress=False, **({"n": 2} | change))


# ---- CT: anatomy ----

# median HU that a radiologist would accept, over all phases of contrast
_PLAUSIBLE = {
    "lung_left": (-900, -750),
    "lung_right": (-900, -750),
    "heart": (35, 320),
    "aorta": (30, 380),
    "liver": (15, 130),
    "spleen": (35, 165),
    "kidney_left": (20, 230),
    "kidney_right": (20, 230),
    "stomach": (-60, 170),
    "spine": (80, 350),
    "ribs": (150, 700),
    "trachea": (-1010, -850),
    "pancreas": (20, 130),
    "gallbladder": (-10, 60),
    "inferior_vena_cava": (25, 220),
}


@pytest.mark.parametrize("patient", range(3))
def test_organs_are_present_and_have_plausible_hu(patient, full_size):
    image = full_size[patient]
    present = {ORGANS[v] for v in np.unique(image.labels) if v}
    assert present == set(ORGANS.values())
    for value, name in ORGANS.items():
        if name in _PLAUSIBLE:
            low, high = _PLAUSIBLE[name]
            assert low <= np.median(image.array[image.labels == value]) <= high, name


def test_organs_lie_where_they_belong(full_size):
    """Right is +x, front is +y, head is +z."""
    for image in full_size:
        centre = {n: np.argwhere(image.labels == v).mean(0) for v, n in ORGANS.items()}
        assert centre["liver"][0] > centre["spleen"][0] and centre["lung_right"][0] > centre["lung_left"][0]
        assert centre["kidney_right"][0] > centre["spine"][0] > centre["kidney_left"][0]
        assert centre["heart"][1] > centre["aorta"][1] > centre["spine"][1]
        assert centre["lung_left"][2] > centre["liver"][2] > centre["kidney_right"][2]
        assert centre["heart"][0] < centre["spine"][0] + 2, "the heart leans to the left"


def test_air_surrounds_the_patient_and_lungs_are_closed(full_size):
    for image in full_size:
        edge = np.concatenate([image.array[:, -3:].ravel(), image.array[:3].ravel()])
        assert np.median(edge) < -900
        lung = (image.labels == 1) | (image.labels == 2)
        assert 1.0 < lung.sum() * 8e-6 < 3.5, "litres, of a small adult"
        assert not lung[:, :, 0].any() and not lung[0].any()


@pytest.mark.parametrize("grid", [Grid((96, 96, 96), 3.5, "nifti"), Grid((128, 112, 80), 3.0, "nifti")])
def test_a_smaller_image_still_holds_the_whole_anatomy(grid):
    labels = ct.render(draw_patient(3, 1, grid), grid).labels
    assert set(np.unique(labels)) == {0, *ORGANS}


# ---- CT: lesions ----


def test_lesions_are_found_at_the_centre_the_manifest_gives(cohort):
    root, manifest = cohort
    kinds = set()
    for case in manifest.cases:
        if case.lesion is None:
            continue
        volume, labels = read_volume(root / case.image), read_labels(root / case.label_map)
        ((kind, path),) = case.masks.items()
        mask = read_labels(root / path).array > 0
        at = tuple(np.rint(volume.to_index(case.lesion.world(volume))).astype(int))
        kinds.add(kind)
        assert mask[at], case.id
        organ = ORGANS[int(labels.array[at])]
        assert organ == "liver" if case.labels.get("tumour_site") == "liver" else organ.startswith("lung"), (
            case.id
        )
        if organ.startswith("lung"):
            around = volume.array[np.isin(labels.array, [1, 2]) & ~mask]
            assert volume.array[mask].mean() > np.median(around) + 250, case.id
        size = (6 / np.pi * mask.sum() * np.prod(volume.spacing)) ** (1 / 3)
        assert 0.7 < size / case.lesion.diameter_mm < 1.35, case.id
    assert kinds == {"nodule", "tumour"}


def test_each_kind_of_case_occurs_and_patients_stay_in_one_split():
    manifest = load_manifest("phantom-ct")
    assert len(manifest.patients) == 128 and len(manifest.images()) == 128
    by = {name: [c for c in manifest.cases if name in c.labels] for name in ("malignancy", "outcome")}
    bare = [c for c in manifest.cases if c.lesion is None]
    assert len(by["malignancy"]) > 200 and len(by["outcome"]) > 50 and len(bare) >= 5
    for name, low, high in (("malignancy", 0.35, 0.55), ("outcome", 0.3, 0.7)):
        share = np.mean([c.labels[name] == manifest.labels[name].classes[1] for c in by[name]])
        assert low < share < high, name
    assert len({c.patient for c in by["outcome"]}) == len(by["outcome"]), "one outcome per patient"
    for fold in range(5):
        classes = {c.labels["malignancy"] for c in by["malignancy"] if c.fold == fold}
        assert classes == {"benign", "malignant"}
    assert {c.split for c in manifest.cases} == {"train", "val", "test"}


@pytest.fixture(scope="module")
def nodule_table():
    """One row per nodule of 220 patients: patient, class, what is seen, what it was made from."""
    rows = []
    for index in range(220):
        for lump in draw_patient(0, index).nodules:
            half = np.arange(-reach(lump), reach(lump), 2.0)
            cover, hu, mask = render_lump(lump, (half, half, half), 2.0)
            seen = -850 + cover * (hu + 850)
            calcified, glass = lump.texture == "calcified", lump.texture == "part-solid"
            shape = (lump.spiculation, lump.heterogeneity, lump.lobulation, calcified, glass)
            rows.append(
                (
                    index,
                    lump.malignant,
                    lump.diameter,
                    seen[mask].mean(),
                    *shape,
                    calcified and lump.eccentric,
                )
            )
    return np.array(rows, float)


def _auc(table, columns):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score
    from sklearn.model_selection import GroupKFold, cross_val_predict
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = make_pipeline(StandardScaler(), LogisticRegression())
    patients, truth = table[:, 0], table[:, 1]
    score = cross_val_predict(
        model, table[:, columns], truth, groups=patients, cv=GroupKFold(5), method="predict_proba"
    )
    return roc_auc_score(truth, score[:, 1])


def test_size_and_density_do_not_tell_the_class_but_margin_and_texture_do(nodule_table):
    simple, shape, everything = (_auc(nodule_table, c) for c in ([2, 3], [4, 5], range(2, 10)))
    assert simple < 0.80
    assert shape > 0.88 and everything > 0.92
    assert simple > 0.6, "size should matter a little, as it does in patients"
    for name, value in (("0.68", simple), ("0.93", shape), ("0.95", everything)):
        assert name in BASELINE[0] and abs(float(name) - value) < 0.04, "the manifest states these figures"


def test_outcome_follows_tumour_heterogeneity_with_noise():
    from sklearn.metrics import roc_auc_score

    patients = [p for p in (draw_patient(0, i) for i in range(300)) if p.outcome is not None]
    truth = [p.outcome.responded for p in patients]
    auc = roc_auc_score(truth, [-p.tumour.heterogeneity for p in patients])
    assert 0.7 < auc < 0.95
    assert 0.2 < np.mean([p.outcome.event for p in patients]) < 0.9


# ---- CT: files ----


def test_nifti_reads_back_through_nibabel(cohort):
    root, manifest = cohort
    image = nibabel.load(root / manifest.cases[0].image)
    assert image.shape == SMALL["shape"] and image.get_data_dtype() == np.int16
    assert nibabel.aff2axcodes(image.affine) == ("R", "A", "S")
    volume = read_volume(root / manifest.cases[0].image)
    padded = np.asarray(image.dataobj)
    assert (volume.array == np.maximum(padded, -1024)).all()


def test_dicom_series_is_the_same_scan(tmp_path):
    manifest = make_phantom("ct", tmp_path / "dicom", n=1, seed=4, format="dicom", progress=False, **SMALL)
    make_phantom("ct", tmp_path / "nifti", n=1, seed=4, progress=False, **SMALL)
    folder = tmp_path / "dicom" / manifest.cases[0].image
    expected = read_volume(tmp_path / "nifti" / f"{manifest.cases[0].image}.nii.gz")
    volume = read_volume(folder)
    assert (volume.array == expected.array).all()
    assert np.allclose(volume.affine, expected.affine, atol=1e-4)
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    image = reader.Execute()
    array = sitk.GetArrayFromImage(image)[:, ::-1, ::-1].transpose(2, 1, 0)
    assert (np.maximum(array, -1024) == expected.array).all()
    corner = np.array(image.TransformIndexToPhysicalPoint((0, 0, 0))) * [-1, -1, 1]
    assert np.allclose(corner, expected.to_world(np.array([79, 79, 0])), atol=1e-4)


def test_dicom_headers_carry_nothing_personal_and_uids_are_reproducible(tmp_path):
    def one(seed, name):
        manifest = make_phantom(
            "ct", tmp_path / name, n=1, seed=seed, format="dicom", progress=False, **SMALL
        )
        return pydicom.dcmread(tmp_path / name / manifest.cases[0].image / "0001.dcm")

    first, again, other = one(1, "a"), one(1, "b"), one(2, "c")
    assert first == again
    assert first.SeriesInstanceUID != other.SeriesInstanceUID
    for keyword in ("PatientBirthDate", "StudyDate", "ReferringPhysicianName", "AccessionNumber"):
        assert not first.get(keyword)


def test_a_patient_is_drawn_and_written_in_half_a_second(tmp_path):
    """About that on a quiet core of the machine it was written on; the bound is generous for busy machines."""
    ct.write(tmp_path / "first", 0, 10, DEFAULT)
    times = []
    for number in range(3):
        start = time.process_time()
        ct.write(tmp_path / str(number), 0, 11, DEFAULT)
        times.append(time.process_time() - start)
    assert min(times) < 2.0


def test_drawing_imports_nothing_heavy():
    """So that a drawing worker that has to start anew is at work soon."""
    heavy = ("torch", "scipy.interpolate", "pandas", "sklearn", "matplotlib", "distributed")
    code = (
        "import sys, smartlab.data.phantoms.make, smartlab.data.phantoms.ct, smartlab.data.phantoms.mammo\n"
    )
    code += f"print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@given(
    st.lists(st.tuples(st.floats(0.5, 20), st.floats(-50, 50)), min_size=2, max_size=9),
    st.lists(st.floats(-0.2, 1.2), min_size=1, max_size=20),
)
@settings(max_examples=60, deadline=None)
def test_the_curve_is_that_of_scipy(steps, at):
    from scipy.interpolate import PchipInterpolator

    x = np.cumsum([step for step, _ in steps])
    y = np.array([[value, -np.round(value)] for _, value in steps])
    where = x[0] + np.array(at) * (x[-1] - x[0])
    expected = PchipInterpolator(x, y)(where)
    assert np.allclose(Curve(x, y)(where), expected, rtol=1e-12, atol=1e-9)


def test_thin_slabs_paint_what_the_whole_volume_does_at_once(monkeypatch):
    grid = Grid((96, 80, 80), 3.5, "nifti")
    patient = draw_patient(2, 0, grid)
    thin, whole = [], []
    for voxels, made in ((1, thin), (10**9, whole)):
        monkeypatch.setattr(canvas, "SLAB", voxels)
        image = ct.render(patient, grid)
        made += [image.array, image.labels, *image.masks]
    assert all((a == b).all() for a, b in zip(thin, whole, strict=True))


def test_the_small_preset_says_how_many_it_draws_and_has_every_split(tmp_path, capsys):
    data = load_config("tiny").data
    manifest = phantom_manifest("ct", data.phantom_cases)
    assert {case.split for case in manifest.cases} == {"train", "val", "test"}
    few = data.model_copy(update={"phantom_cases": 1, "root": str(tmp_path / "one"), "workers": 0})
    locate_images(few)
    assert "drawing 1 of 128 phantom patients; more: data.phantom_cases=128" in capsys.readouterr().err
    locate_images(few)
    assert "drawing" not in capsys.readouterr().err, "what is there is not drawn"


# ---- mammograms ----


def test_mammograms_have_all_margins_views_and_polarities():
    manifest = load_manifest("phantom-mammo")
    masses = [c for c in manifest.cases if c.lesion is not None]
    margins = [m for c in masses for m in c.labels["mass_margins"]]
    assert all(margins.count(m) > 25 for m in breast.MARGINS)
    assert any(len(c.labels["mass_margins"]) == 2 for c in masses), "some masses have two margins"
    assert {(c.labels["laterality"], c.labels["view"]) for c in masses} == {
        (side, view) for side in "LR" for view in ("CC", "MLO")
    }
    assert any(c.lesion is None for c in manifest.cases)
    risk = {
        m: np.mean([c.labels["pathology"] == "malignant" for c in masses if c.labels["mass_margins"] == [m]])
        for m in ("circumscribed", "spiculated")
    }
    assert 0 < risk["circumscribed"] < 0.35 < 0.65 < risk["spiculated"] < 1, "correlated, not decided"
    train, test = ({c.patient for c in manifest.cases if c.split == s} for s in ("train", "test"))
    assert train and test and not train & test


def test_reading_a_mammogram_undoes_monochrome1(mammograms):
    root, manifest = mammograms
    polarities = set()
    for group in manifest.images():
        case = group.cases[0]
        header, image = pydicom.dcmread(root / case.image), read_mammogram(root / case.image)
        polarities.add(header.PhotometricInterpretation)
        assert (image.laterality, image.view) == (case.labels["laterality"], case.labels["view"])
        assert image.array.shape == FLAT["shape"] and image.spacing_mm == (1.0, 1.0)
        assert image.array.dtype == np.uint16 and image.array.max() <= 4095
        wall, far = image.array[:, :20].mean(), image.array[:, -20:].mean()
        assert (wall > far + 200) == (image.laterality == "L"), "chest wall on its own side, air dark"
    assert polarities == {"MONOCHROME1", "MONOCHROME2"}


def test_a_mass_is_bright_and_lies_where_the_manifest_says(mammograms):
    root, manifest = mammograms
    brighter = []
    for case in manifest.cases:
        if case.lesion is None:
            continue
        image = read_mammogram(root / case.image)
        mask = np.array(Image.open(root / case.masks["lesion"]))
        assert set(np.unique(mask)) == {0, 255}
        column, row, _ = case.lesion.center_mm
        assert mask[round(row / image.spacing_mm[0]), round(column / image.spacing_mm[1])]
        rows, columns = np.nonzero(mask)
        assert abs(rows.mean() - row) < 2.5 and abs(columns.mean() - column) < 2.5
        inside, breast_tissue = image.array[mask > 0].mean(), np.median(image.array[image.array > 300])
        brighter.append(inside > breast_tissue)
    assert np.mean(brighter) > 0.9


def test_a_right_breast_is_a_mirrored_left_one():
    left = next(p for p in (breast.draw_patient(0, i) for i in range(50)) if p.laterality == "L" and p.masses)
    right = breast.Patient(**{**left.__dict__, "laterality": "R"})
    grid = Grid((192, 144), 1.3, "dicom")
    a, masks_a = mammo.render(left, "CC", grid)
    b, masks_b = mammo.render(right, "CC", grid)
    assert (a == b[:, ::-1]).all() and (masks_a[0] == masks_b[0][:, ::-1]).all()


def test_images_drawn_as_before_are_not_mixed_with_those_of_today(tmp_path):
    small = {"n": 1, "shape": (256, 192), "spacing": 1.0, "progress": False}
    make_phantom("mammo", tmp_path, **small)
    told = json.loads((tmp_path / "phantom.json").read_text())
    told.pop("drawing")  # as the first release wrote it
    (tmp_path / "phantom.json").write_text(json.dumps(told))
    with pytest.raises(UseError, match="another phantom"):
        make_phantom("mammo", tmp_path, **small)
    assert kept_in("phantom-mammo", 6).name != "phantom-mammo-6-seed0"
    assert kept_in("phantom-ct", 6).name == "phantom-ct-6-seed0"


def test_mr_phantoms_are_the_people_of_ct_in_two_contrasts(cohort, tmp_path):
    root, man = tmp_path / "mr", make_phantom("mr", tmp_path / "mr", n=2, progress=False, **SMALL)
    others = [case for case in cohort[1].cases if case.patient in man.patients]
    assert (man.modality, man.channels) == ("MR", ["t1", "t2"]) and len(man.cases) == len(others)
    assert [(c.id, c.labels, c.lesion, c.split) for c in man.cases] == [
        (c.id, c.labels, c.lesion, c.split) for c in others
    ]
    first, paths = man.cases[0], {p for c in man.cases for p in (c.label_map, *c.masks.values())}
    assert all((root / path).read_bytes() == (cohort[0] / path).read_bytes() for path in paths)
    t1, t2 = (nibabel.load(root / path).get_fdata() for path in first.channels.values())
    hu = read_volume(cohort[0] / others[0].image).array
    labels = read_labels(root / first.label_map).array
    assert t1.min() >= 0 and abs(np.corrcoef(t1.ravel(), t2.ravel())[0, 1]) < 0.95

    def bright(image, part):
        return np.median(image[part])

    fat, muscle = (hu > -115) & (hu < -85) & (labels == 0), (hu > 52) & (hu < 68) & (labels == 0)
    gall, lung = (labels == 14) & (abs(hu) < 15), np.isin(labels, (1, 2))
    assert bright(t1, fat) > 1.4 * bright(t1, muscle) > 2 * bright(t1, lung)
    assert bright(t2, gall) > 2 * bright(t2, muscle) and bright(t1, gall) < bright(t1, muscle)
    air = labels == 0
    air[10:-10, 10:-10] = False
    assert 0 < np.median(t1[air]) < 0.2 * bright(t1, fat)  # noise of a magnitude is never negative
    again = make_phantom("mr", tmp_path / "again", n=1, progress=False, **SMALL)
    assert all(
        (tmp_path / "again" / p).read_bytes() == (root / p).read_bytes()
        for p in again.cases[0].channels.values()
    )
    assert verify_manifest(man, root, workers=0, progress=False).ok
    with pytest.raises(UseError, match="cannot be written so"):
        phantom_manifest("mr", 1, format="dicom")
