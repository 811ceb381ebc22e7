"""Any supported file becomes the same volume, at the place SimpleITK gives it."""

from __future__ import annotations

import gzip

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given
from hypothesis import strategies as st
from scipy.spatial.transform import Rotation

from smartlab import read_volume
from smartlab.core.errors import DataError
from smartlab.data.images.readers import read_grid, read_labels
from tests.data.dicom_factory import (
    ANGLES,
    assert_ras,
    assert_same_world,
    itk_image,
    scan,
    tmp_ok,
    write_nifti,
)

SIDES = st.permutations([0, 1, 2]), st.tuples(*[st.sampled_from([1, -1])] * 3)
SIZES = st.tuples(*[st.floats(0.3, 5.0)] * 3)


# ---- geometry: any grid ------------------------------------------------------------------------------


@tmp_ok
@given(
    order=SIDES[0], flips=SIDES[1], angles=ANGLES, sizes=SIZES, suffix=st.sampled_from([".nii", ".nii.gz"])
)
def test_every_world_point_of_a_nifti_keeps_its_value(tmp_path, order, flips, angles, sizes, suffix):
    signed = np.eye(3)[:, order] * flips
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ signed * sizes
    affine[:3, 3] = 11, -22, 33
    values = scan(5, 6, 7)
    volume = read_volume(write_nifti(tmp_path / f"oblique{suffix}", values, affine))
    assert_ras(volume)
    index = np.argwhere(np.ones(values.shape))
    ours = volume.to_index(nib.affines.apply_affine(affine, index))
    assert np.abs(ours - np.rint(ours)).max() < 1e-3
    assert np.array_equal(volume.array[tuple(np.rint(ours).astype(int).T)], values.ravel())
    assert_same_world(sitk.ReadImage(str(tmp_path / f"oblique{suffix}")), volume)


@tmp_ok
@given(order=SIDES[0], flips=SIDES[1])
def test_orientation_is_the_closest_canonical_one(tmp_path, order, flips):
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", [8, -6, 5], degrees=True).as_matrix() @ (
        np.eye(3)[:, order] * flips
    )
    file = write_nifti(tmp_path / "a.nii", scan(5, 6, 7), affine)
    canonical = nib.as_closest_canonical(nib.load(file))
    volume = read_volume(file)
    assert np.array_equal(volume.array, np.asarray(canonical.dataobj))
    assert np.allclose(volume.affine, canonical.affine, atol=1e-5)


@tmp_ok
@given(
    angles=ANGLES,
    sizes=SIZES,
    kind=st.sampled_from([".nrrd", ".mha", ".mhd"]),
    packed=st.booleans(),
    mirror=st.booleans(),
)
def test_nrrd_and_metaimage_lie_where_simpleitk_puts_them(tmp_path, angles, sizes, kind, packed, mirror):
    direction = Rotation.from_euler("xyz", angles, degrees=True).as_matrix() @ np.diag(
        [-1 if mirror else 1, 1, 1]
    )
    image = itk_image(scan(5, 6, 7), sizes, (1, -2, 3), direction)
    sitk.WriteImage(image, str(tmp_path / f"a{kind}"), packed)
    volume = read_volume(tmp_path / f"a{kind}")
    assert_ras(volume)
    assert_same_world(image, volume)


def test_detached_nrrd(tmp_path):
    image = itk_image(scan())
    sitk.WriteImage(image, str(tmp_path / "a.nhdr"))
    assert_same_world(image, read_volume(tmp_path / "a.nhdr"))


# ---- other formats: values ---------------------------------------------------------------------------


def test_float_nifti_is_rounded_and_clipped(tmp_path):
    values = np.full((4, 4, 4), 10.6, np.float32)
    values[0, 0, 0], values[1, 0, 0], values[2, 0, 0] = -3000.2, 1e6, -999.5001
    volume = read_volume(write_nifti(tmp_path / "a.nii.gz", values, np.eye(4)))
    assert volume.array[:, 0, 0].tolist() == [-1024, 32767, -1000, 11]
    assert any("clipped" in note for note in volume.notes) and any("padding" in note for note in volume.notes)


def test_scaled_nifti_applies_slope_and_intercept(tmp_path):
    hu = scan()
    image = nib.Nifti1Image(hu.astype(np.float32), np.diag([1, 1, 2, 1]))
    image.header.set_data_dtype(np.uint8)
    image.header.set_slope_inter(20, -1000)
    nib.save(image, tmp_path / "a.nii")
    expected = np.rint(nib.load(tmp_path / "a.nii").get_fdata())
    assert np.array_equal(read_volume(tmp_path / "a.nii").array, expected)


@pytest.mark.parametrize(("unit", "scale"), [(1, 1000.0), (2, 1.0), (3, 0.001), (0, 1.0)])
def test_nifti_units_become_millimetres(tmp_path, unit, scale):
    affine = np.diag([1.0, 2, 3, 1])
    affine[:3, :] /= scale
    file = write_nifti(tmp_path / "a.nii", scan(), affine, xyzt_units=unit)
    volume = read_volume(file)
    assert volume.spacing == pytest.approx((1, 2, 3))
    assert_same_world(sitk.ReadImage(str(file)), volume)


def test_contradicting_forms_are_told(tmp_path):
    file = write_nifti(tmp_path / "a.nii", scan(), np.diag([1.0, 2, 3, 1]), qoffset_x=40)
    volume = read_volume(file)
    assert np.allclose(volume.affine, nib.load(file).affine)
    assert any("40.0 mm apart; sform used" in note for note in volume.notes)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_long_extensions_and_padding_with_zeros_change_no_voxel(tmp_path, suffix):
    image = nib.Nifti1Image(scan(), np.diag([2.0, 2, 3, 1]))
    image.header.extensions.append(nib.nifti1.Nifti1Extension("comment", bytes(range(256)) * 1000))
    raw = image.to_bytes() + bytes(100)
    (tmp_path / f"a{suffix}").write_bytes(gzip.compress(raw) if suffix == ".nii.gz" else raw)
    volume = read_volume(tmp_path / f"a{suffix}")
    assert np.array_equal(volume.array, image.dataobj)
    assert np.array_equal(read_grid(tmp_path / f"a{suffix}").affine, volume.affine)


def test_only_smartlab_says_what_is_wrong_with_a_header(tmp_path, caplog):
    with pytest.raises(DataError, match="not a valid NIfTI"):
        read_grid(write_nifti(tmp_path / "a.nii", scan(), datatype=-9812))
    assert not caplog.records


def test_an_unreadable_disk_is_told_with_the_path(tmp_path, monkeypatch):
    file = write_nifti(tmp_path / "a.nii", scan())

    def denied(self, mode):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(file), "open", denied)
    with pytest.raises(DataError, match=r"cannot be opened .*Permission denied"):
        read_volume(file)


@pytest.mark.parametrize("suffix", [".nii.gz", ".nrrd", ".mha"])
def test_labels_keep_their_values_and_lie_on_the_image(tmp_path, suffix):
    labels = np.random.default_rng(0).integers(0, 105, (6, 7, 8)).astype(np.uint8)
    direction = np.diag([-1.0, -1, 1])
    for name, values in (
        ("image", labels.astype(np.int16)),
        ("labels", labels),
        ("float", labels.astype(float)),
    ):
        sitk.WriteImage(itk_image(values, direction=direction), str(tmp_path / f"{name}{suffix}"))
    image = read_volume(tmp_path / f"image{suffix}")
    for name in ("labels", "float"):
        volume = read_labels(tmp_path / f"{name}{suffix}")
        assert volume.array.dtype == np.uint8
        assert np.array_equal(volume.array, image.array) and np.allclose(volume.affine, image.affine)


def test_large_labels_are_int16(tmp_path):
    values = np.arange(27, dtype=np.int32).reshape(3, 3, 3) * 1000
    assert read_labels(write_nifti(tmp_path / "a.nii", values, np.eye(4))).array.dtype == np.int16


# ---- real data ---------------------------------------------------------------------------------------


def test_real_sarcoma_scans_and_masks_agree_with_simpleitk(real_data):
    patients = sorted((real_data / "ct_sarcoma").glob("STS_*"))
    assert len(patients) == 24
    for folder in patients:
        image, mask = read_volume(folder / "CT_image.nii.gz"), read_labels(folder / "CT_mask.nii.gz")
        assert_ras(image)
        assert_same_world(sitk.ReadImage(str(folder / "CT_image.nii.gz")), image)
        assert_same_world(sitk.ReadImage(str(folder / "CT_mask.nii.gz")), mask)
        assert image.shape == mask.shape and np.allclose(image.affine, mask.affine)
        assert set(np.unique(mask.array)) == {0, 1}


def test_real_organ_case_and_labels_agree_with_simpleitk(real_data):
    folder = real_data / "ct_organs"
    image, liver = (
        read_volume(folder / "example_ct.nii.gz"),
        read_labels(folder / "example_seg" / "liver.nii.gz"),
    )
    assert_ras(image)
    assert_same_world(sitk.ReadImage(str(folder / "example_ct.nii.gz")), image)
    assert 0 < np.median(image.array[liver.array > 0]) < 200  # liver tissue in HU
