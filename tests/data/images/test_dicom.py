"""A DICOM folder becomes one volume whatever its files are called, or says what else it holds."""

from __future__ import annotations

import time
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
from highdicom.image import get_volume_from_series
from hypothesis import given
from hypothesis import strategies as st
from pydicom import dcmread
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid
from scipy.ndimage import gaussian_filter
from scipy.spatial.transform import Rotation

from smartlab import read_volume
from smartlab.core.errors import DataError
from smartlab.data.images.dicom import HeaderTextError, scan_headers
from smartlab.data.images.dicom_headers import find_series, index_series
from tests.data.dicom_factory import (
    ANGLES,
    SECONDARY,
    assert_ras,
    assert_same_world,
    itk_series,
    scan,
    tmp_ok,
    write_enhanced,
    write_series,
)

# ---- geometry: any series ----------------------------------------------------------------------------


@tmp_ok
@given(seed=st.integers(0, 1000), angles=ANGLES, step=st.floats(0.4, 6), downwards=st.booleans())
def test_dicom_does_not_care_about_names_order_or_obliqueness(tmp_path, seed, angles, step, downwards):
    rng = np.random.default_rng(seed)
    turn = Rotation.from_euler("xyz", angles, degrees=True).as_matrix()
    orientation = (*turn[:, 0], *turn[:, 1])
    folder, hu, names = tmp_path / generate_uid(), scan(seed=seed), rng.permutation(len(scan()))
    plain = {"step": step, "orientation": orientation}
    ascending = write_series(folder / "ordered", hu, **plain)
    origin = [float(v) for v in dcmread(ascending[-1]).ImagePositionPatient]
    if downwards:  # the same scan, last slice first
        write_series(
            folder / "other",
            hu[::-1],
            step=-step,
            orientation=orientation,
            origin=origin,
            name=lambda i: f"IM{names[i]}",
        )
    else:
        write_series(folder / "other", hu, **plain, name=lambda i: f"{names[i]}/{names[i]}.IMA")
    reference, volume = read_volume(folder / "ordered"), read_volume(folder / "other")
    assert_ras(volume)
    assert np.array_equal(reference.array, volume.array)
    assert np.allclose(reference.affine, volume.affine, atol=1e-4)
    assert_same_world(itk_series(folder / "ordered"), reference)


def test_agrees_with_highdicom(tmp_path):
    files = write_series(tmp_path, scan(), orientation=(0, 1, 0, 0, 0, -1))
    theirs = get_volume_from_series([dcmread(f) for f in files]).to_patient_orientation("LPH")
    volume = read_volume(tmp_path)  # highdicom's world is LPS
    back = volume.to_index((theirs.affine[:3, 3]) * (-1, -1, 1))
    assert np.allclose(back, (volume.shape[0] - 1, volume.shape[1] - 1, 0), atol=1e-4)
    assert np.array_equal(volume.array[::-1, ::-1], theirs.array)


def test_slice_thickness_is_never_the_spacing(tmp_path):
    write_series(tmp_path, scan(), step=1.25)  # the factory writes SliceThickness 9
    assert read_volume(tmp_path).spacing == pytest.approx((0.7, 0.8, 1.25))


def test_rounded_positions_are_still_one_grid(tmp_path):
    def rounded(ds, i):
        ds.ImagePositionPatient = [-10, -20, round(float(ds.ImagePositionPatient[2]), 1)]

    write_series(tmp_path, scan(40), step=0.625, edit=rounded)
    assert read_volume(tmp_path).spacing[2] == pytest.approx(0.625, abs=2e-3)


# ---- DICOM: what a folder may hold -------------------------------------------------------------------


def test_stray_files_localizers_and_captures_are_set_aside_and_told(tmp_path):
    hu = scan()
    write_series(tmp_path, hu, uid="1.2.9", name="{:d}".format)
    (tmp_path / "LICENSE").write_text("free text")
    (tmp_path / ".DS_Store").write_bytes(b"")
    scout = {"orientation": (1, 0, 0, 0, 0, -1), "name": "scout{}.dcm".format}
    write_series(
        tmp_path, scan(2), **scout, edit=lambda ds, i: setattr(ds, "ImageType", ["O", "P", "LOCALIZER"])
    )
    write_series(tmp_path / "more", scan(1), sop_class=SECONDARY, modality="OT")

    def report(ds, i):
        for keyword in ("PixelData", "Rows", "Columns", "ImagePositionPatient"):
            delattr(ds, keyword)

    write_series(
        tmp_path,
        scan(1),
        sop_class="1.2.840.10008.5.1.4.1.1.88.67",
        modality="SR",
        edit=report,
        name="dose{}".format,
    )
    volume = read_volume(tmp_path)
    assert np.array_equal(np.sort(volume.array.ravel()), np.sort(hu.ravel()))
    notes = "; ".join(volume.notes)
    for told in (
        "2 localizers set aside",
        "1 secondary capture set aside",
        "1 SR object set aside",
        "1 file",
    ):
        assert told in notes
    found = scan_headers(tmp_path, None)
    assert [len(own) for own in found.volumes.values()] == [6]
    aside = {kind: len(own) for kind, own in found.aside.items()}
    assert aside == {"localizer": 2, "secondary capture": 1, "SR object": 1}


def test_several_series_are_listed_and_one_can_be_chosen(tmp_path):
    write_series(tmp_path, scan(6), uid="1.2.3.1", name="a{}".format, edit=_describe("Thin lung"))
    write_series(tmp_path, scan(4, seed=1), uid="1.2.3.2", name="b{}".format, edit=_describe("Doe, soft"))
    with pytest.raises(HeaderTextError) as caught:
        read_volume(tmp_path)
    for told in ("1.2.3.1", "1.2.3.2", "6 slices", "4 slices", "Thin lung", "Doe, soft", "series="):
        assert told in str(caught.value)
    assert "1.2.3.1" in caught.value.public
    assert "lung" not in caught.value.public and "Doe" not in caught.value.public
    volume = read_volume(tmp_path, series="1.2.3.2")
    assert volume.shape == (12, 10, 4)
    assert "Doe" not in repr(volume.notes)
    with pytest.raises(DataError, match=r"1\.2\.3\.1, 1\.2\.3\.2"):
        read_volume(tmp_path, series="9.9")


def _describe(text):
    return lambda ds, i: setattr(ds, "SeriesDescription", text)


def test_no_personal_data_reaches_notes_errors_or_warnings(tmp_path):
    def free_text(ds, i):
        ds.Modality, ds.SeriesDescription = "DOE^JANE", "Doe " * 30

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # writing it warns
        write_series(tmp_path, scan(), edit=free_text)
    with warnings.catch_warnings(record=True) as warned, pytest.raises(DataError) as caught:
        warnings.simplefilter("always")
        read_volume(tmp_path)
    assert not warned
    assert "DOE" not in str(caught.value) and "secret" not in str(caught.value)


def test_series_are_found_by_content_whatever_the_folders_are_called(tmp_path):
    for number in range(3):
        write_series(tmp_path / f"p{number}" / "x", scan(), uid=f"1.2.{number}")
    write_series(tmp_path / "p1" / "x", scan(), uid="1.2.77", name="z{}".format)  # second in a mixed folder
    assert find_series(tmp_path, "1.2.2") == tmp_path / "p2" / "x"
    assert find_series(tmp_path, "1.2.77") == tmp_path / "p1" / "x"
    assert index_series(tmp_path)["1.2.0"] == tmp_path / "p0" / "x"
    with pytest.raises(DataError, match=r"1\.2\.3 is not below"):
        find_series(tmp_path, "1.2.3")
    write_series(tmp_path / "late", scan(), uid="1.2.3")  # fetched after the root was indexed
    assert find_series(tmp_path, "1.2.3") == tmp_path / "late"
    write_series(tmp_path / "split", scan(), uid="1.2.4", name="part{0}/{0}".format)
    assert find_series(tmp_path, "1.2.4") == tmp_path / "split"
    assert read_volume(tmp_path, series="1.2.4").shape == (12, 10, 6)


# ---- DICOM: values -----------------------------------------------------------------------------------


@pytest.mark.parametrize("syntax", [RLELossless, JPEGLSLossless, JPEG2000Lossless])
def test_lossless_compressions_decode_exactly(tmp_path, syntax):
    hu = gaussian_filter(scan(4, 64, 64).astype(float), 2).astype(np.int16)
    write_series(tmp_path / "plain", hu)
    write_series(tmp_path / "packed", hu, syntax=syntax)
    assert np.array_equal(read_volume(tmp_path / "plain").array, read_volume(tmp_path / "packed").array)


def test_jpeg_lossless_decodes_exactly(tmp_path):
    def twelve_bits(ds, i):
        ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 12, 11, 0

    files = write_series(tmp_path / "plain", scan(4, 64, 64), edit=twelve_bits)
    (tmp_path / "packed").mkdir()
    writer = sitk.ImageFileWriter()
    writer.SetUseCompression(True)
    writer.SetCompressor("JPEG")  # ITK's name for JPEG Lossless, process 14
    writer.KeepOriginalImageUIDOn()
    for file in files:
        writer.SetFileName(str(tmp_path / "packed" / file.name))
        writer.Execute(sitk.ReadImage(str(file)))
    assert "JPEG Lossless" in dcmread(tmp_path / "packed" / "000.dcm").file_meta.TransferSyntaxUID.name
    assert np.array_equal(read_volume(tmp_path / "plain").array, read_volume(tmp_path / "packed").array)


def test_each_slice_has_its_own_rescale(tmp_path):
    hu = scan()
    write_series(tmp_path, hu, intercept=np.linspace(-1024, -500, 6).round(), slope=[1, 2, 0.5, 1, 1, 0.25])
    assert np.abs(read_volume(tmp_path).array.T[:, ::-1, ::-1] - hu).max() <= 1  # slope 2 stores even HU only


def test_padding_becomes_air(tmp_path):
    hu = scan()
    hu[:, :2] = 3000  # padding above the tissue, told by the tag
    hu[:, -2:] = -2000  # padding below air, told by its value

    def pad(ds, i):
        ds.add_new("PixelPaddingValue", "SS", 3000 + 1024)

    write_series(tmp_path, hu, edit=pad)
    volume = read_volume(tmp_path)
    assert (volume.array[:, :2] == -1024).all() and (volume.array[:, -2:] == -1024).all()
    assert volume.array[:, 2:-2].max() < 3000 and (volume.array[:, 2:-2] > -1024).all()
    assert any("padding" in note for note in volume.notes)


def test_unsigned_padding_of_signed_pixels_is_wrapped(tmp_path):
    hu = scan()
    hu[:, :2] = -999
    hu[:, 2:] = hu[:, 2:].clip(-998)
    write_series(
        tmp_path, hu, intercept=0, edit=lambda ds, i: ds.add_new("PixelPaddingValue", "US", 65536 - 999)
    )
    volume = read_volume(tmp_path)
    assert (volume.array[:, -2:] == -1024).all() and (volume.array[:, :-2] >= -998).all()


def test_files_without_preamble_are_read(tmp_path):
    hu = scan()
    for file in write_series(tmp_path, hu):
        file.write_bytes(file.read_bytes()[132:])
    assert np.array_equal(np.sort(read_volume(tmp_path).array.ravel()), np.sort(hu.ravel()))


def test_gantry_tilt_is_corrected_to_where_things_are(tmp_path):
    """A ball scanned with a 20° tilt keeps its world centre and its shape."""
    rows = columns = 48
    centre, turn = np.array([3.0, -2.0, 40.0]), np.radians(20)
    orientation = (1.0, 0.0, 0.0, 0.0, float(np.cos(turn)), float(-np.sin(turn)))
    across, down = np.array(orientation[:3]), np.array(orientation[3:])
    step = 2.0  # table feed along z: slices drift in their planes
    origins = np.array([-24.0, -24.0, 10.0]) + np.arange(30)[:, None] * np.array([0, 0, step])
    r, c = np.mgrid[:rows, :columns]
    world = origins[:, None, None] + r[..., None] * down + c[..., None] * across  # LPS
    hu = np.where(np.linalg.norm(world - centre, axis=-1) < 10, 100, -1000).astype(np.int16)

    def place(ds, i):
        ds.ImagePositionPatient = [f"{v:.6f}" for v in origins[i]]

    write_series(tmp_path, hu, spacing=(1, 1), orientation=orientation, edit=place)
    with pytest.raises(DataError, match=r"gantry tilt of 20\.0°.*tilt='correct'"):
        read_volume(tmp_path)
    volume = read_volume(tmp_path, tilt="correct")
    ball = volume.to_world(np.argwhere(volume.array > -450))
    assert np.allclose(ball.mean(axis=0), centre * (-1, -1, 1), atol=0.15)
    assert np.linalg.norm(ball - ball.mean(axis=0), axis=1).max() < 11.5
    assert np.prod(volume.spacing) * len(ball) == pytest.approx(4 / 3 * np.pi * 1000, rel=0.03)
    assert any("20.0°" in note for note in volume.notes)
    axes = volume.affine[:3, :3] / volume.spacing
    assert np.allclose(axes.T @ axes, np.eye(3), atol=1e-6)


def test_enhanced_multiframe_equals_the_classic_series(tmp_path):
    hu = scan()
    write_series(tmp_path / "classic", hu)
    file = write_enhanced(tmp_path / "enhanced", hu, order=[3, 0, 5, 1, 4, 2])
    classic, enhanced = read_volume(tmp_path / "classic"), read_volume(file)
    assert np.array_equal(classic.array, enhanced.array)
    assert np.allclose(classic.affine, enhanced.affine)


# ---- real data ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slices", "spacing"), [("LIDC-IDRI-0001", 16, 2.5), ("Pancreas-CT-CB_001", 134, 3.0)]
)
def test_real_series_agree_with_simpleitk(real_data, name, slices, spacing):
    folder = real_data / "ct_series" / name
    start = time.perf_counter()
    volume = read_volume(folder)
    assert time.perf_counter() - start < 8
    assert volume.shape == (512, 512, slices) and volume.spacing[2] == pytest.approx(spacing)
    assert_ras(volume)
    assert_same_world(itk_series(folder), volume, 3000)


def test_real_series_is_found_quickly_below_the_root(real_data):
    (uid,) = index_series(real_data / "ct_series" / "Pancreas-CT-CB_001")
    start = time.perf_counter()
    assert find_series(real_data / "ct_series", uid).name == "Pancreas-CT-CB_001"
    assert time.perf_counter() - start < 1
