"""Reading mammograms: every way a grey value can be stored means the same in the end, odd files are named as such."""

from __future__ import annotations

import warnings

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

import smartlab as sl
from smartlab.core.errors import DataError, UseError
from smartlab.data.images import grey
from smartlab.data.images.mammography import read_mammogram, read_pixels
from tests.data import mammograms as mg


@pytest.fixture
def file(tmp_path):
    """A 12-bit mammogram on disk, and its header to be changed and saved again."""
    return tmp_path / "a.dcm", mg.write(tmp_path / "a.dcm")


def save(path, header):
    header.save_as(path, enforce_file_format=True)
    return path


# ---- what is stored differs, what is seen does not


@pytest.mark.parametrize("bits", [12, 14, 16])
@pytest.mark.parametrize("monochrome", [1, 2])
@pytest.mark.parametrize("syntax", ["plain", "jpeg2000", "jpegls", "rle", "jpeg lossless"])
def test_any_depth_polarity_and_encoding_gives_the_same_image(tmp_path, bits, monochrome, syntax):
    truth = mg.image()
    path, header = tmp_path / "a.dcm", mg.write(tmp_path / "a.dcm", truth, monochrome)
    top = (1 << bits) - 1
    scaled = truth.astype(np.int64) * top // 4095
    mg.rewrite(header, top - scaled if monochrome == 1 else scaled, bits)
    header.WindowCenter, header.WindowWidth = str((top + 1) // 2), str(top + 1)
    if syntax == "plain":
        save(path, header)
    elif syntax == "jpeg lossless":
        mg.jpeg_lossless(path, header)
    else:
        mg.compressed(path, header, syntax)
    assert pydicom.dcmread(path).file_meta.TransferSyntaxUID.is_compressed == (syntax != "plain")
    found = read_mammogram(path)
    assert found.array.dtype == np.uint16 and found.array.shape == truth.shape
    assert np.abs(found.array.astype(int) - truth).max() <= 1
    assert ("MONOCHROME1 inverted" in found.notes) == (monochrome == 1)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("MR_small_jp2klossless.dcm", "MR_small.dcm"),
        ("MR_small_RLE.dcm", "MR_small.dcm"),
        ("MR_small_jpeg_ls_lossless.dcm", "MR_small.dcm"),
    ],
)
def test_files_encoded_by_others_decode_to_what_they_were(name, plain):
    assert (read_pixels(get_testdata_file(name))[0] == read_pixels(get_testdata_file(plain))[0]).all()


@pytest.mark.parametrize("name", ["693_J2KI.dcm", "JPEG2000.dcm", "J2K_pixelrep_mismatch.dcm"])
def test_jpeg2000_of_real_scanners_is_decoded_and_windowed(tmp_path, name):
    """No mammograms, but real JPEG 2000 of 13 to 16 bits: only the modality is changed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        header = pydicom.dcmread(get_testdata_file(name))
        header.Modality = "MG"
        save(tmp_path / "a.dcm", header)
        found, stored = read_mammogram(tmp_path / "a.dcm").array, read_pixels(tmp_path / "a.dcm")[0]
    assert found.max() > 3000 and found.min() == 0
    order = np.argsort(stored, axis=None)
    assert (np.diff(found.ravel()[order].astype(int)) >= 0).all(), "windowing keeps the order of grey values"


@pytest.mark.parametrize("monochrome", [1, 2])
def test_a_12_bit_jpeg2000_mammogram_is_shown_as_it_is(tmp_path, monochrome):
    """From the file to the pixels on the screen: 256 greys, denser is brighter, neither turned nor mirrored."""
    header = mg.write(tmp_path / "a.dcm", mg.image("R"), monochrome, "R")
    mg.compressed(tmp_path / "a.dcm", header, "jpeg2000")
    seen = sl.read_mammogram(tmp_path / "a.dcm")
    viewer = sl.view(seen)
    shown = viewer.figure().axes[0].images[0].get_array()[..., 0].astype(float)
    assert shown.shape == mg.image("R").shape
    assert np.abs(shown - mg.image("R") * (255 / seen.array.max())).max() <= 1
    assert viewer.scene.spacing[:2] == (1.0, 1.0)
    del header.ImagerPixelSpacing, header.PixelSpacing
    assert sl.view(sl.read_mammogram(save(tmp_path / "b.dcm", header))).scene.value_name == "value"


def test_signed_values_and_a_rescale_are_windowed_in_their_own_units(file):
    path, header = file
    truth = mg.image()
    mg.rewrite(header, truth.astype(int) // 2 - 1000, 12, signed=True)
    header.RescaleSlope, header.RescaleIntercept = "2", "2000"
    assert np.abs(read_mammogram(save(path, header)).array.astype(int) - truth).max() <= 1


def test_eight_bit_images_use_the_whole_range(file):
    path, header = file
    truth = mg.image() // 16
    mg.rewrite(header, truth, 8)
    header.WindowCenter, header.WindowWidth = "128", "256"
    assert np.abs(read_mammogram(save(path, header)).array / 4095 - truth / 255).max() < 1e-3


# ---- windows


def test_a_window_of_the_file_is_applied_as_the_standard_says(file):
    path, header = file
    header.WindowCenter, header.WindowWidth = ["1000", "500"], ["1000", "300"]  # the first of several
    found, truth = read_mammogram(save(path, header)).array, mg.image().astype(float)
    expected = np.clip((truth - 999.5) / 999 + 0.5, 0, 1) * 4095
    assert np.abs(found - expected).max() <= 0.5


@pytest.mark.parametrize("function", ["LINEAR_EXACT", "SIGMOID"])
def test_other_window_functions_follow_their_formula(file, function):
    path, header = file
    header.WindowCenter, header.WindowWidth, header.VOILUTFunction = "1000", "900", function
    found, x = read_mammogram(save(path, header)).array, (mg.image() - 1000.0) / 900
    expected = np.clip(x + 0.5, 0, 1) if function == "LINEAR_EXACT" else 1 / (1 + np.exp(-4 * x))
    assert np.abs(found - 4095 * expected).max() <= 0.51


@pytest.mark.parametrize("packed", [False, True])
def test_luts_of_eight_bits_are_read_packed_or_not(file, packed):
    path, header = file
    lut = Dataset()
    lut.LUTDescriptor = [4096, 0, 8]
    lut.add_new(0x00283006, "OW", (np.arange(4096) // 16).astype("u1" if packed else "<u2").tobytes())
    header.VOILUTSequence = Sequence([lut])
    found = read_mammogram(save(path, header))
    assert np.abs(found.array / 4095 - (mg.image() // 16) / 255).max() < 1e-3 and not found.notes
    lut.LUTDescriptor = [9000, 0, 8]  # more than there are
    assert any("unusable VOI LUT" in note for note in read_mammogram(save(path, header)).notes)


@pytest.mark.parametrize("claimed", [10, 16])
def test_a_lut_wins_over_the_window_and_its_own_white_is_white(file, claimed):
    path, header = file
    lut = Dataset()
    values = np.rint(1023 * (np.arange(4096) / 4095) ** 2).astype("<u2")
    lut.LUTDescriptor = [4096, 0, claimed]
    lut.add_new(0x00283006, "OW", values.tobytes())
    header.VOILUTSequence = Sequence([lut])
    found, truth = read_mammogram(save(path, header)).array, mg.image() / 4095
    assert np.abs(found / 4095 - truth**2).max() < 1e-3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"WindowCenter": None, "WindowWidth": None}, "no window in the file"),
        ({"WindowWidth": "0"}, "unusable window"),
        ({"VOILUTFunction": "CUBIC"}, "unusable window"),
        ({"WindowCenter": "50000", "WindowWidth": "100"}, "black and white only"),
    ],
)
def test_a_missing_or_useless_window_is_replaced_by_percentiles_and_said(file, change, said):
    path, header = file
    for name, value in change.items():
        if value is None:
            delattr(header, name)
        else:
            setattr(header, name, value)
    found = read_mammogram(save(path, header))
    assert any(said in note and "percentiles" in note for note in found.notes)
    inside = mg.image() > 300
    assert np.percentile(found.array[inside], 2) > 0 and np.percentile(found.array[inside], 98) < 4095
    assert np.median(found.array[~inside]) == 0, "air is black"


@settings(max_examples=20, deadline=None)
@given(gain=st.floats(0.05, 7), offset=st.integers(0, 8000))
def test_percentile_windowing_forgets_gain_and_offset(gain, offset):
    truth = mg.image()
    header = Dataset()
    header.BitsStored, header.PhotometricInterpretation = 16, "MONOCHROME2"
    plain, _ = grey.to_grey(truth, header, "percentile", "a")
    scaled, _ = grey.to_grey(np.rint(truth * gain + offset).astype(np.uint16), header, "percentile", "a")
    assert np.abs(plain.astype(int) - scaled).max() <= 4095 * (
        2.5 / (gain * np.ptp(truth[truth > 300])) + 0.002
    )


def test_padding_becomes_air_whatever_value_it_has(file):
    path, header = file
    truth = mg.image()
    truth[:20] = 4000
    mg.rewrite(header, truth, 12)
    header.add_new(0x00280120, "US", 4000)
    assert (read_mammogram(save(path, header)).array[:20] == 0).all()


# ---- odd files


def test_a_negative_that_says_it_is_a_positive_is_turned_and_said(file):
    path, header = file
    header.PhotometricInterpretation = "MONOCHROME1"  # the values are those of MONOCHROME2
    found = read_mammogram(save(path, header))
    assert any("photometric interpretation was wrong" in note for note in found.notes)
    assert (found.array == mg.image()).all()


@pytest.mark.parametrize("mode", ["voi", "percentile"])
def test_a_negative_without_a_window_is_turned_as_well(file, mode):
    """Its air is the largest bright part: taken for the breast, it would leave nothing of the breast."""
    path, header = file
    del header.WindowCenter, header.WindowWidth
    noise = np.random.default_rng(0).normal(0, 20, mg.image().shape)
    noisy = np.clip(np.where(mg.image() > 0, mg.image(), 60) + noise, 0, 4095).astype(np.uint16)
    mg.rewrite(header, noisy, 12)
    right = read_mammogram(save(path, header), grey=mode)
    assert not any("photometric" in note for note in right.notes)
    header.PhotometricInterpretation = "MONOCHROME1"
    wrong = read_mammogram(save(path, header), grey=mode)
    assert any("photometric interpretation was wrong" in note for note in wrong.notes)
    assert np.abs(wrong.array.astype(int) - right.array).max() <= 1


@pytest.mark.parametrize("side", ["L", "R"])
@pytest.mark.parametrize("view", ["CC", "MLO"])
def test_no_true_positive_is_taken_for_a_negative(tmp_path, side, view):
    for index in range(3):
        mg.write(tmp_path / "a.dcm", mg.image(side, view, index), side=side)
        assert read_mammogram(tmp_path / "a.dcm").notes == ()
        notes = read_mammogram(tmp_path / "a.dcm", grey="percentile").notes
        assert not any("photometric" in note for note in notes)


@pytest.mark.parametrize("photometric", ["PALETTE COLOR", "HSV"])
def test_other_photometric_interpretations_are_refused(file, photometric):
    path, header = file
    header.PhotometricInterpretation = photometric
    with pytest.raises(DataError, match=f"photometric interpretation.*{photometric}.*MONOCHROME2"):
        read_mammogram(save(path, header))


def rgb(header, array):
    header.SamplesPerPixel, header.PlanarConfiguration = 3, 0
    header.PhotometricInterpretation = "RGB"
    mg.rewrite(header, array, 8)


def test_equal_colour_channels_are_grey_and_coloured_marks_are_refused(file):
    path, header = file
    small = (mg.image() // 16).astype(np.uint8)
    rgb(header, np.stack([small] * 3, -1))
    header.WindowCenter, header.WindowWidth = "128", "256"
    found = read_mammogram(save(path, header))
    assert "3 equal colour channels taken as grey" in found.notes
    assert np.abs(found.array / 4095 - small / 255).max() < 1e-3
    marked = np.stack([small] * 3, -1)
    marked[10:20, 10:20] = (255, 0, 0)
    rgb(header, marked)
    with pytest.raises(DataError, match=r"is a colour image.*255"):
        read_mammogram(save(path, header))


def test_tomosynthesis_is_refused_and_the_2d_view_is_asked_for(file):
    path, header = file
    header.NumberOfFrames = 5
    header.PixelData = np.repeat(mg.image()[None], 5, 0).astype("<u2").tobytes()
    with pytest.raises(DataError, match=r"stack.*5 frames.*synthetic 2D view"):
        read_mammogram(save(path, header))


def test_one_frame_of_a_multi_frame_object_is_an_image(file):
    path, header = file
    header.NumberOfFrames = 1
    assert (read_mammogram(save(path, header)).array == mg.image()).all()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda h: setattr(h, "Modality", "CT"), "is not a mammogram.*modality CT"),
        (lambda h: delattr(h, "PixelData"), "has no pixels"),
        (lambda h: setattr(h, "PixelData", h.PixelData[:1000]), "no readable pixels"),
        (lambda h: setattr(h, "PixelData", b"\0" * len(h.PixelData)), "same value everywhere"),
        (lambda h: setattr(h, "ImagerPixelSpacing", ["0", "0.1"]), "impossible pixel spacing"),
    ],
)
def test_unusable_files_say_what_is_wrong(file, spoil, message):
    path, header = file
    spoil(header)
    with pytest.raises(DataError, match=message):
        read_mammogram(save(path, header))


def test_broken_compression_names_the_syntax(file):
    path, header = file
    mg.compressed(path, header, "jpeg2000")
    header = pydicom.dcmread(path)
    header.PixelData = header.PixelData[:120] + b"\0" * (len(header.PixelData) - 120)
    with pytest.raises(DataError, match=r"no readable pixels.*JPEG 2000"):
        read_mammogram(save(path, header))


def test_unprocessed_images_and_missing_spacing_are_noted(file):
    path, header = file
    header.PresentationIntentType = "FOR PROCESSING"
    del header.ImagerPixelSpacing, header.PixelSpacing
    found = read_mammogram(save(path, header))
    assert np.isnan(found.spacing_mm).all()
    assert any("FOR PROCESSING" in n for n in found.notes) and "no pixel spacing in the file" in found.notes


def test_free_text_in_coded_fields_never_gets_through(file):
    path, header = file
    header.ViewPosition, header.ImageLaterality = "JANE DOE", "X"
    found = read_mammogram(save(path, header))
    assert (found.view, found.laterality) == ("", "")


def test_unknown_grey_setting_and_missing_files(file, tmp_path):
    with pytest.raises(UseError, match="one of voi, percentile, stored"):
        read_mammogram(file[0], grey="auto")
    with pytest.raises(DataError, match="no such file"):
        read_mammogram(tmp_path / "none.dcm")
    (tmp_path / "text.dcm").write_text("not an image")
    with pytest.raises(DataError, match="cannot be read as DICOM"):
        read_mammogram(tmp_path / "text.dcm")


# ---- PNG and TIFF


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
@pytest.mark.parametrize("deep", [False, True])
def test_png_and_tiff_of_8_and_16_bits_keep_every_value(tmp_path, name, deep):
    truth = mg.image() if deep else (mg.image() // 16).astype(np.uint8)
    Image.fromarray(truth).save(tmp_path / name)
    assert (read_mammogram(tmp_path / name, grey="stored").array == truth).all()
    found = read_mammogram(tmp_path / name)
    assert any("percentiles" in note for note in found.notes) and np.isnan(found.spacing_mm).all()
    assert found.array.max() == 4095


def test_a_tiff_that_counts_from_white_is_inverted(tmp_path):
    truth = mg.image()
    Image.fromarray(65535 - truth).save(tmp_path / "a.tif", tiffinfo={262: 0})
    with Image.open(tmp_path / "a.tif") as image:
        assert image.tag_v2[262] == 0, "else this tests nothing"
    found = read_mammogram(tmp_path / "a.tif", grey="stored")
    assert (found.array == truth).all() and "MONOCHROME1 inverted" in found.notes


def test_stacks_colours_and_broken_pictures_are_refused(tmp_path):
    small = Image.fromarray((mg.image() // 16).astype(np.uint8))
    small.save(tmp_path / "stack.tif", save_all=True, append_images=[small, small])
    with pytest.raises(DataError, match=r"stack.*3 frames"):
        read_mammogram(tmp_path / "stack.tif")
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "c.png")
    with pytest.raises(DataError, match="colour image"):
        read_mammogram(tmp_path / "c.png")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n1234")
    with pytest.raises(DataError, match="cannot be read as an image"):
        read_mammogram(tmp_path / "cut.png")


# ---- the breast in the image


@pytest.mark.parametrize("view", ["CC", "MLO"])
@pytest.mark.parametrize("side", ["L", "R"])
def test_the_breast_and_its_chest_wall_are_found_without_the_header(side, view):
    for index in range(3):
        array = mg.image(side, view, index)
        body = grey.find_breast(array, 2)
        truth = array[::2, ::2] > 300
        overlap = (body.mask[:, :, 0] & truth).sum() / (body.mask[:, :, 0] | truth).sum()
        assert overlap > 0.9 and grey.wall_on_right(body) == (side == "R")


def test_a_film_label_in_the_air_is_not_the_breast():
    array = mg.image("L", "CC")
    array[20:60, -60:-10] = 3900  # a label with letters
    body = grey.find_breast(array, 2)
    assert not body.mask[:35, -35:].any() and not grey.wall_on_right(body)
