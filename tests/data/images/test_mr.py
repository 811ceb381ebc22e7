"""MR has no unit: what is read is the scan on a scale of its own, whatever gain, offset or file type it came in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

import smartlab as sl
from smartlab.core.errors import DataError
from smartlab.data.images.mr import DENSE, find_tissue, normalise
from smartlab.data.images.readers import read_channels
from tests.data.dicom_factory import scan, write_nifti, write_series

MR = "1.2.840.10008.5.1.4.1.1.4"
MM = (3.0, 3.0, 4.0)
_X, _Y = np.meshgrid(np.linspace(-1, 1, 56), np.linspace(-1, 1, 48), indexing="ij")
BODY = np.repeat((np.hypot(_X / 0.7, _Y / 0.8) < 1)[:, :, None], 40, 2)


def head(background: float | None = None, seed: int = 0) -> np.ndarray:
    """Someone in air with the noise of a magnitude image, or on one background value; (X, Y, Z) float."""
    rng = np.random.default_rng(seed)
    values = np.where(BODY, rng.normal(600, 150, BODY.shape), np.abs(rng.normal(0, 8, BODY.shape)))
    return values if background is None else np.where(BODY, values, background)


@settings(deadline=None, max_examples=20)
@given(gain=st.floats(1e-6, 1e3), offset=st.floats(-2, 2), seed=st.integers(0, 50))
def test_gain_and_offset_of_a_scan_make_no_difference_and_can_be_had_back(gain, offset, seed):
    values = head(seed=seed)
    array, (low, high), _ = normalise(values, MM, "x")
    other, (least, most), _ = normalise((values + 600 * offset) * gain, MM, "x")
    assert array.dtype == other.dtype == np.int16
    assert np.abs(other.astype(int) - array).max() <= 1  # a rounding
    step = (high - low) / 4095
    assert np.abs(low + array * step - values).max() <= 0.51 * step
    assert (most - least) == pytest.approx((high - low) * gain, rel=1e-3)


@pytest.mark.parametrize("background", [None, 0.0, 500.0])
def test_the_percentiles_are_those_of_what_is_not_background(background):
    values = head(background)
    _, found, _ = normalise(values, MM, "x")
    wanted = np.percentile(values[BODY], [0.5, 99.5])
    assert np.abs(np.array(found) - wanted).max() < 0.06 * (wanted[1] - wanted[0])


@pytest.mark.parametrize("background", [None, 0.0, 500.0])
def test_tissue_is_found_on_any_background_and_in_any_channel(background):
    array, _, _ = normalise(head(background), MM, "x")
    found = find_tissue(np.stack([np.full_like(array, array[0, 0, 0]), array]), MM)
    assert (found.mask == BODY[tuple(slice(None, None, n) for n in found.step)]).mean() > 0.93
    assert find_tissue(np.zeros((20, 20, 20), np.int16), MM).found is False and DENSE > 0


def test_small_floats_keep_their_steps(tmp_path):
    values = (head() * 1e-6).astype(np.float32)
    volume = sl.read_volume(write_nifti(tmp_path / "small.nii.gz", values), modality="MR")
    assert len(np.unique(volume.array)) > 3000 and volume.modality == "MR"
    (low, high), text = volume.scale[0], " ".join(volume.notes)
    assert 0 <= low < high < 2e-3 and "0.5th to 99.5th percentile" in text


def test_dicom_without_rescale_or_with_large_unsigned_values_reads_as_nifti_does(tmp_path):
    planes = np.random.default_rng(0).integers(0, 60_000, (6, 20, 24))

    def raw(ds: Dataset, i: int) -> None:
        ds.PixelData, ds.PixelRepresentation = planes[i].astype(np.uint16).tobytes(), 0
        del ds.RescaleSlope, ds.RescaleIntercept

    write_series(tmp_path / "mr", scan(6, 20, 24), modality="MR", sop_class=MR, edit=raw)
    volume = sl.read_volume(tmp_path / "mr", modality="MR")
    # columns, rows and slices of the file, whose first two run to the left and to the back
    array, ends, _ = normalise(planes.transpose(2, 1, 0)[::-1, ::-1], volume.spacing, "x")
    assert np.array_equal(volume.array, array) and volume.scale == (ends,) and ends[1] > 50_000


def test_slices_with_slopes_of_their_own_and_padding(tmp_path):
    values = np.random.default_rng(0).integers(1, 400, (6, 20, 24)).astype(float)
    values[:, :3] = 0

    def pad(ds: Dataset, i: int) -> None:
        stored = np.frombuffer(ds.PixelData, np.int16).reshape(20, 24).copy()
        stored[:3] = -2000  # the value of padding, of a slope it does not have
        ds.PixelData = stored.tobytes()
        ds.add_new(0x00280120, "SS", -2000)

    slopes = [0.5, 1.0, 0.25, 0.5, 1.0, 0.25]
    write_series(tmp_path / "mr", values, modality="MR", sop_class=MR, slope=slopes, intercept=0.0, edit=pad)
    volume = sl.read_volume(tmp_path / "mr", modality="MR")
    low, high = volume.scale[0]
    back = low + volume.array * (high - low) / 4095
    expected = np.where(values == 0, 1, values).transpose(2, 1, 0)[::-1, ::-1]  # padding is the darkest
    assert np.abs(back - expected).max() < 0.51 * (high - low) / 4095


def test_what_is_far_beyond_the_range_is_clipped_and_said():
    values = head()
    values[0, 0, 0] = 1e6
    array, _, notes = normalise(values, MM, "x")
    assert array[0, 0, 0] == 32767 and "1 voxels beyond eight times" in notes[1]


def test_one_value_everywhere_is_no_scan(tmp_path):
    path = write_nifti(tmp_path / "flat.nii", np.full((6, 6, 6), 7, np.int16))
    with pytest.raises(DataError, match="one value only"):
        sl.read_volume(path, modality="MR")


def test_channels_lie_on_one_grid_or_the_file_that_does_not_is_named(tmp_path):
    t1, t2 = (write_nifti(tmp_path / f"{n}.nii", head(seed=s)) for s, n in enumerate(("t1", "t2")))
    both, alone = read_channels([t1, t2], modality="MR"), sl.read_volume(t2, modality="MR")
    assert both.shape == alone.shape and both.array.shape == (2, *alone.shape)
    assert np.array_equal(both.array[1], alone.array) and both.scale[1] == alone.scale[0]
    shifted = write_nifti(tmp_path / "other.nii", head(), np.diag([-0.7, -0.8, 2.6, 1.0]))
    with pytest.raises(DataError, match=r"other\.nii.*mm apart"):
        read_channels([t1, shifted], modality="MR")
