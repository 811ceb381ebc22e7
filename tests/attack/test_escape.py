"""No header leads out of its folder, however it is written."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk

import smartlab as sl
from smartlab.core.errors import DataError
from smartlab.data.images.itk import data_files
from smartlab.data.images.readers import read_labels
from tests.data.dicom_factory import itk_image, scan, write_nifti

SECRET = "secret.raw"


@pytest.fixture
def folder(tmp_path):
    """A folder with a header and its voxels, and beside it voxels that are nobody's business."""
    home = tmp_path / "home"
    home.mkdir()
    for name in ("a.mhd", "a.nhdr"):
        sitk.WriteImage(itk_image(scan()), str(home / name))
    (tmp_path / SECRET).write_bytes((home / "a.raw").read_bytes())
    return home


def rewritten(folder, name, line, new):
    path = folder / name
    text = path.read_bytes()
    assert line in text
    path.write_bytes(text.replace(line, new))
    return path


MHD, NRRD = b"ElementDataFile = a.raw", b"data file: a.raw"
WAYS = {
    "mhd-absolute": ("a.mhd", MHD, b"ElementDataFile = %s"),
    "mhd-colon": ("a.mhd", MHD, b"ElementDataFile : %s"),
    "mhd-colon-tight": ("a.mhd", MHD, b"ElementDataFile:%s"),
    "mhd-tab": ("a.mhd", MHD, b"\tElementDataFile = %s"),
    "mhd-longer-name": ("a.mhd", MHD, b"ElementDataFileName = %s"),
    "mhd-twice": ("a.mhd", MHD, b"junk\n" + MHD + b"\nElementDataFile = %s"),
    "mhd-carriage-return": ("a.mhd", MHD, b"Comment = x\rElementDataFile = %s\r"),
    "mhd-list": ("a.mhd", MHD, b"ElementDataFile = LIST\n%s"),
    "mhd-beyond-64-kB": ("a.mhd", MHD, b"Comment = " + b"x" * 70_000 + b"\nElementDataFile = %s"),
    "mhd-beyond-1-MB": ("a.mhd", MHD, b"Comment = " + b"x" * 1_100_000 + b"\nElementDataFile = %s"),
    "mhd-pattern": ("a.mhd", MHD, b"ElementDataFile = %s%%d 1 1 1"),
    "nrrd-absolute": ("a.nhdr", NRRD, b"data file: %s"),
    "nrrd-case": ("a.nhdr", NRRD, b"Data File: %s"),
    "nrrd-one-word": ("a.nhdr", NRRD, b"DATAFILE: %s"),
    "nrrd-twice": ("a.nhdr", NRRD, NRRD + b"\nDataFile: %s"),
    "nrrd-list": ("a.nhdr", NRRD, b"data file: LIST\n%s"),
    "nrrd-beyond-64-kB": ("a.nhdr", NRRD, b"# " + b"x" * 70_000 + b"\ndata file: %s"),
}


@pytest.mark.parametrize("where", ["absolute", "relative"])
@pytest.mark.parametrize("way", WAYS)
def test_a_header_that_names_a_file_elsewhere_is_refused(folder, way, where):
    name, line, new = WAYS[way]
    place = str(folder.parent / SECRET) if where == "absolute" else f"../{SECRET}"
    path = rewritten(folder, name, line, new % place.encode())
    for read in (sl.read_volume, read_labels):
        with pytest.raises(DataError, match=r"outside its own folder|not clear|too long|missing"):
            read(path)


@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr"])
def test_a_data_file_that_is_a_link_to_elsewhere_is_refused(folder, name):
    (folder / "a.raw").unlink()
    (folder / "a.raw").symlink_to(folder.parent / SECRET)
    with pytest.raises(DataError, match="outside its own folder"):
        sl.read_volume(folder / name)


@pytest.mark.parametrize("name", ["a.mhd", "a.nhdr"])
def test_header_and_data_may_be_links_together(folder, name):
    links = folder.parent / "links"
    links.mkdir()
    for part in (name, "a.raw"):
        (links / part).symlink_to(folder / part)
    assert np.array_equal(sl.read_volume(links / name).array, sl.read_volume(folder / name).array)


def test_slices_in_files_of_their_own_are_read_and_watched(folder):
    values = np.fromfile(folder / "a.raw", np.int16).reshape(6, -1)
    for number, plane in enumerate(values, 1):
        plane.tofile(folder / f"s{number:02d}.raw")
    whole = sl.read_volume(folder / "a.mhd").array
    for new in (
        b"ElementDataFile = s%02d.raw 1 6 1",
        b"ElementDataFile = LIST\n" + b"\n".join(b"s%02d.raw" % n for n in range(1, 7)),
    ):
        path = folder / "b.mhd"
        path.write_bytes((folder / "a.mhd").read_bytes().replace(MHD, new))
        assert np.array_equal(sl.read_volume(path).array, whole)
        assert [file.name for file in data_files(path)] == [f"s{n:02d}.raw" for n in range(1, 7)]


# ---- headers that promise more than there is


def test_a_small_file_that_unpacks_to_more_than_its_header_says_is_refused_early(tmp_path):
    import gzip

    file = write_nifti(tmp_path / "a.nii", scan())
    with gzip.open(tmp_path / "b.nii.gz", "wb") as packed:
        packed.write(file.read_bytes())
        for _ in range(64):
            packed.write(bytes(1 << 20))
    with pytest.raises(DataError, match="holds more than its header says"):
        sl.read_volume(tmp_path / "b.nii.gz")


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_a_header_that_asks_for_all_memory_is_refused_before_it_gets_any(tmp_path, suffix):
    file = write_nifti(tmp_path / f"a{suffix}", scan(), dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])
    with pytest.raises(DataError, match=r"larger than any scan .*SMARTLAB_LARGEST_GB"):
        sl.read_volume(file)


def test_the_largest_scan_is_a_setting(tmp_path, monkeypatch):
    file = write_nifti(tmp_path / "a.nii.gz", scan())
    monkeypatch.setenv("SMARTLAB_LARGEST_GB", "0.000001")
    with pytest.raises(DataError, match="larger than any scan"):
        sl.read_volume(file)


def test_a_metaimage_that_asks_for_all_memory_is_refused(folder):
    path = rewritten(folder, "a.mhd", b"DimSize = 12 10 6", b"DimSize = 30000 30000 30000")
    with pytest.raises(DataError, match="larger than any scan"):
        sl.read_volume(path)
