"""Folders of PNG stacks: what is listed, in which order it is read, and what is refused with which words."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score

import smartlab as sl
from smartlab import DataError
from smartlab.data.cohort.case import natural
from smartlab.data.cohort.png_stacks import read_stack, to_hounsfield
from smartlab.evaluation.features.baselines import stack_baselines


def write(folder, slices, names=None):
    """Write arrays (rows, columns) as PNG, named 0.png, 1.png, … by default."""
    folder.mkdir(parents=True, exist_ok=True)
    for k, pixels in enumerate(slices):
        name = names[k] if names else f"{k}.png"
        Image.fromarray(pixels).save(folder / name)


def grey(value=100, size=64):
    pixels = np.zeros((size, size), np.uint8)
    pixels[20:30, 10:40] = value
    return pixels


@pytest.fixture
def folder(tmp_path):
    """Two classes, three exams; exam2 holds nodules of both classes."""
    for where in ("benign/exam1/Nodule 2", "benign/exam10/Nodule 10", "benign/exam2/1", "malignant/exam2/1"):
        write(tmp_path / where, [grey(50), grey(60)])
    return tmp_path


def test_the_manifest_lists_a_case_per_nodule_with_its_class_and_its_exam_as_patient(folder):
    man = sl.load_manifest("nodules-png", root=folder)
    assert [(c.id, c.patient, c.labels["malignancy"]) for c in man.cases] == [
        ("benign/exam1/Nodule 2", "exam1", "benign"),
        ("benign/exam2/1", "exam2", "benign"),
        ("benign/exam10/Nodule 10", "exam10", "benign"),
        ("malignant/exam2/1", "exam2", "malignant"),
    ]
    assert man.patients == ["exam1", "exam2", "exam10"]
    assert sl.load_manifest("nodules-png").listed(folder) == man
    assert all(case.locate(folder).is_dir() for case in man.cases)


def test_the_manifest_can_be_kept_and_loaded_without_scanning_again(folder, tmp_path):
    man = sl.load_manifest("nodules-png", root=folder)
    kept = sl.load_manifest(man.save(tmp_path / "kept" / "manifest.json"))
    assert kept.all_cases == man.all_cases
    assert sl.load_manifest(kept, root="elsewhere") is kept


def test_without_a_root_the_manifest_says_what_it_is_and_lists_nothing():
    man = sl.load_manifest("nodules-png")
    assert man.cases == [] and man.source.kind == "local" and "root" in man.notes[0]


def test_other_classes_are_taken_as_the_folders_name_them(tmp_path):
    for kind in ("grade 10", "grade 2", "grade 1"):
        write(tmp_path / kind / "exam" / "n", [grey()])
    spec = sl.load_manifest("nodules-png", root=tmp_path).labels["malignancy"]
    assert spec.kind == "multiclass" and spec.classes == ["grade 1", "grade 2", "grade 10"]


def test_what_is_not_a_nodule_is_not_listed(folder):
    write(folder / "__MACOSX" / "a" / "b", [grey()])
    write(folder / ".cache" / "a" / "b", [grey()])
    (folder / "notes" / "2020" / "drafts").mkdir(parents=True)
    (folder / "README.md").write_text("about")
    nodule = folder / "benign/exam1/Nodule 2"
    (nodule / "._0.png").write_bytes(b"left by a file manager")
    (nodule / "Thumbs.db").write_bytes(b"")
    man = sl.load_manifest("nodules-png", root=folder)
    assert len(man.cases) == len(man.all_cases) == 4
    assert read_stack(nodule).shape[2] == 2


@given(st.permutations(range(12)), st.integers(0, 3))
def test_slices_are_in_the_order_of_their_numbers_whatever_order_they_were_written_in(
    tmp_path_factory, order, first
):
    where = tmp_path_factory.mktemp("stack")
    for k in order:
        write(where, [grey(k + 1, 8 * 5)], [f"{k + first}.png"])
    stack = read_stack(where)
    assert stack.dtype == np.uint8
    assert stack.max((0, 1)).tolist() == list(range(1, 13))


def test_axes_grow_to_the_right_and_forward(tmp_path):
    """As CT is shown: the left of the picture is the patient's right, its top the front."""
    pixels = np.zeros((64, 48), np.uint8)
    pixels[5, 3] = 9  # near the top, near the left
    write(tmp_path, [pixels])
    stack = read_stack(tmp_path)
    assert stack.shape == (48, 64, 1)
    assert np.argwhere(stack).tolist() == [[47 - 3, 63 - 5, 0]]


BAD = {
    "missing": (lambda f: write(f, [grey()] * 3, ["0.png", "1.png", "3.png"]), "slice 2 is missing"),
    "twice": (lambda f: write(f, [grey()] * 2, ["1.png", "01.png"]), "slice 1 is there twice"),
    "unnumbered": (lambda f: write(f, [grey()] * 2, ["0.png", "mask.png"]), "has no number"),
    "sizes": (lambda f: write(f, [grey(), grey(size=50)]), "different sizes"),
    "16-bit": (lambda f: write(f, [grey().astype(np.uint16) * 200]), "not 8-bit grey.*16-bit"),
    "colour": (lambda f: write(f, [np.stack([grey()] * 3, -1)]), "not 8-bit grey.*colour"),
    "1-bit": (lambda f: write(f, [grey() > 0]), "not 8-bit grey.*1-bit"),
    "black": (lambda f: write(f, [grey(0)] * 2), "every pixel is black"),
    "empty": (lambda f: f.mkdir(parents=True), "holds no PNG"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_nodule_is_one_clear_error_and_the_others_go_on(folder, name):
    make, words = BAD[name]
    make(folder / "benign" / "bad exam" / "bad")
    with pytest.raises(DataError, match=words) as error:
        read_stack(folder / "benign" / "bad exam" / "bad")
    assert "bad exam" in str(error.value)
    man = sl.load_manifest("nodules-png", root=folder)
    (excluded,) = [c for c in man.all_cases if c.excluded]
    assert len(man.cases) == 4 and excluded.id == "benign/bad exam/bad"
    assert str(folder) not in excluded.excluded
    tables = stack_baselines(man, folder)
    assert len(tables["volume"]) == 4 and len(tables["volume"].facts["failed"]) == 1
    assert "bad" not in str(tables["volume"].facts["failed"])


@given(st.integers(0, 2000), st.integers(0, 255))
def test_a_damaged_file_is_refused_or_read_but_never_anything_else(tmp_path_factory, at, byte):
    where = tmp_path_factory.mktemp("damaged")
    write(where, [grey()])
    data = bytearray((where / "0.png").read_bytes())
    data[at % len(data)] = byte
    (where / "0.png").write_bytes(data[: len(data) - at % 3])
    try:
        assert read_stack(where).ndim == 3
    except DataError as error:
        assert "0.png" in str(error) or "black" in str(error)


def test_another_format_under_the_name_png_is_refused(tmp_path):
    Image.fromarray(grey()).save(tmp_path / "0.png", format="JPEG")
    with pytest.raises(DataError, match=r"0\.png cannot be read"):
        read_stack(tmp_path)


@pytest.mark.parametrize("wrong", ["above", "below", "absent"])
def test_a_wrong_root_is_told_with_the_layout(folder, wrong):
    root = {"above": folder.parent, "below": folder / "benign", "absent": folder / "no"}[wrong]
    if wrong == "above":  # nothing else may lie beside it
        root = folder / "deeper"
        shutil.copytree(folder / "malignant", root / "data" / "malignant")
    with pytest.raises(DataError, match="no such folder" if wrong == "absent" else "CLASS/EXAM/NODULE"):
        sl.load_manifest("nodules-png", root=root)


def test_a_link_out_of_the_root_is_not_followed_to_read(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    write(outside / "n", [grey()])
    (folder / "benign" / "exam9").mkdir()
    (folder / "benign" / "exam9" / "n").symlink_to(outside / "n")
    tables = stack_baselines(sl.load_manifest("nodules-png", root=folder), folder)
    assert len(tables["volume"]) == 4
    assert "link" in str(tables["volume"].facts["failed"])


def test_grey_is_linear_in_hu_and_black_is_air():
    every = np.arange(256, dtype=np.uint8)[:, None, None]
    hu = to_hounsfield(every, (-600, 420))[:, 0, 0]
    assert hu.dtype == np.int16 and hu[0] == -1000 and hu[255] == 420
    np.testing.assert_array_equal(np.diff(hu[1:]), 4)


@given(st.lists(st.integers(0, 10**6), unique=True))
def test_names_sort_by_the_numbers_in_them(numbers):
    names = [f"Nodule {n:03d}" for n in numbers]
    assert sorted(names, key=natural) == [f"Nodule {n:03d}" for n in sorted(numbers)]


def test_baselines_of_stacks_are_area_volume_and_grey(tmp_path):
    write(tmp_path / "benign" / "e" / "n", [grey(10), grey(30), np.zeros((64, 64), np.uint8)])
    tables = stack_baselines("nodules-png", tmp_path)
    assert {name: table.x.tolist() for name, table in tables.items()} == {
        "largest area": [[300]],
        "volume": [[600]],
        "mean grey": [[20]],
    }


def test_the_largest_area_of_real_nodules_alone_tells_malignancy(real_data):
    """531 nodules of 297 exams, 37 exams with both classes; the area alone has AUC 0.883."""
    tables = stack_baselines("nodules-png", real_data / "nodules")
    kept, y, classes = tables["largest area"].labelled("malignancy")
    assert len(kept) == 531 and classes == ["benign", "malignant"] and y.sum() == 162
    both = kept.about.groupby("patient")["label:malignancy"].nunique() == 2
    assert len(both) == 297 and both.sum() == 37
    assert kept.facts["failed"] == {}
    assert roc_auc_score(y, kept.x[:, 0]) == pytest.approx(0.883, abs=0.001)
    assert roc_auc_score(y, tables["mean grey"].x[:, 0]) < 0.65
