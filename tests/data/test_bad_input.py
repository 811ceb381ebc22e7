"""Every kind of bad input gives its one clear error: where, what was found, what to do.

A row of the table: a name, a function that writes the bad input below a folder and returns what to
read, and words the message must hold besides the name of the file or folder.
"""

from __future__ import annotations

import pickle
import re
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
from pydicom.uid import JPEGLSLossless

from smartlab import read_volume
from smartlab.data.dicom import find_series
from smartlab.data.readers import read_labels
from smartlab.errors import DataError, UseError
from tests.data.dicom_factory import (
    SECONDARY,
    itk_image,
    scan,
    write_enhanced,
    write_nifti,
    write_series,
)

BAD = {}


def bad(*words, read=read_volume, **options):
    """Register a writer of bad input and the words its error must contain."""

    def register(write):
        BAD[write.__name__] = (write, words, lambda path: read(path, **options))
        return write

    return register


# ---- not a readable file -----------------------------------------------------------------------------


@bad("no such file or folder", "Check the path")
def missing_file(d):
    return d / "nowhere.nii.gz"


@bad("unknown file type", ".jpg", ".nii.gz")
def unknown_extension(d):
    (d / "scan.jpg").write_bytes(b"not a scan")
    return d / "scan.jpg"


@bad("empty", "0 bytes", "Fetch it again")
def empty_file(d):
    (d / "scan.nii.gz").touch()
    return d / "scan.nii.gz"


@bad("only the voxel data of a MetaImage", ".mhd header")
def raw_instead_of_header(d):
    sitk.WriteImage(itk_image(scan()), str(d / "a.mhd"))
    return d / "a.raw"


@bad("no DICOM files here", "empty folder")
def empty_folder(d):
    return d


@bad("no DICOM files here", "1 other files", "given as a file")
def folder_of_nifti(d):
    write_nifti(d / "a.nii", scan())
    return d


@bad("one slice of a series", "give its folder instead")
def one_slice_of_a_series(d):
    return write_series(d, scan())[2]


# ---- NIfTI -------------------------------------------------------------------------------------------


@bad("cut short or damaged", "Fetch it again")
def gzip_cut_short(d):
    file = write_nifti(d / "a.nii.gz", scan())
    file.write_bytes(file.read_bytes()[:-200])
    return file


@bad("cut short or damaged", "Fetch it again")
def gzip_with_a_wrong_bit(d):
    file = write_nifti(d / "a.nii.gz", scan())
    packed = bytearray(file.read_bytes())
    packed[-8] ^= 1  # the checksum, behind the last voxel
    file.write_bytes(packed)
    return file


@bad("cut short", "bytes where the header promises")
def nifti_cut_short(d):
    file = write_nifti(d / "a.nii", scan())
    file.write_bytes(file.read_bytes()[:-100])
    return file


@bad("cut short", "less than a header")
def nifti_header_cut_short(d):
    (d / "a.nii").write_bytes(b"\x5c\x01\x00\x00" + bytes(50))
    return d / "a.nii"


@bad("not a valid NIfTI")
def text_named_nifti(d):
    (d / "a.nii").write_text("<html>404 not found</html>" * 100)
    return d / "a.nii"


@bad("4D", "10 × 12 × 3", "one file per time point")
def nifti_4d(d):
    return write_nifti(d / "a.nii", np.zeros((6, 10, 12, 3), np.int16))


@bad("2D")
def nifti_2d(d):
    return write_nifti(d / "a.nii", np.zeros((6, 10), np.int16))


@bad("single slice", "6 × 10 × 1")
def nifti_single_slice(d):
    return write_nifti(d / "a.nii", np.zeros((6, 10, 1), np.int16))


@bad("not plain numbers", "colour")
def nifti_rgb(d):
    return write_nifti(d / "a.nii", np.zeros((6, 10, 12), [("R", "u1"), ("G", "u1"), ("B", "u1")]))


@bad("NaN", "2 of 720", "[1, 2, 3]", "-1024")
def nifti_nan_voxels(d):
    values = scan().astype(np.float32)
    values[1, 2, 3] = values[4, 4, 4] = np.nan
    return write_nifti(d / "a.nii.gz", values)


@bad("not Hounsfield units", "normalised")
def nifti_normalised(d):
    return write_nifti(d / "a.nii", np.random.default_rng(0).random((5, 5, 5)).astype(np.float32))


@bad("zero or NaN voxel spacing", "pixdim")
def nifti_zero_spacing(d):
    return write_nifti(d / "a.nii", scan(), pixdim=[1, 0.7, 0.8, 0, 0, 0, 0, 0])


@bad("zero or NaN voxel spacing")
def nifti_nan_spacing(d):
    return write_nifti(d / "a.nii", scan(), pixdim=[1, 0.7, np.nan, 2, 0, 0, 0, 0])


@bad("zero or NaN voxel spacing")
def nifti_zero_affine(d):
    return write_nifti(d / "a.nii", scan(), srow_x=0, srow_y=0, srow_z=0)


@bad("zero or NaN voxel spacing")
def nifti_nan_affine(d):
    return write_nifti(d / "a.nii", scan(), srow_x=[1, 0, 0, np.nan])


@bad("spacing is absurd", "0.0007", "unit")
def nifti_absurd_unit(d):
    return write_nifti(d / "a.nii", scan(), xyzt_units=3)


@bad("stores no orientation", "left and right", "set_sform")
def nifti_without_orientation(d):
    return write_nifti(d / "a.nii", scan(), sform_code=0, qform_code=0)


@bad("singular", "point the same way")
def nifti_singular_affine(d):
    return write_nifti(d / "a.nii", scan(), srow_x=[1, 1, 0, 0], srow_y=[1, 1, 0, 0], srow_z=[0, 0, 1, 0])


@bad("sheared", "right angle")
def nifti_sheared_affine(d):
    return write_nifti(d / "a.nii", scan(), srow_y=[0, 0.8, 0.5, 0])


@bad("not whole numbers", "nearest", read=read_labels)
def fractional_labels(d):
    return write_nifti(d / "a.nii", np.full((4, 4, 4), 0.5, np.float32))


@bad("read_mask", read=read_labels)
def labels_from_dicom(d):
    write_series(d, scan())
    return d


# ---- MetaImage and NRRD ------------------------------------------------------------------------------


def _edited_header(d, name, line, new):
    """An image of 0.7 × 0.8 × 2.5 mm whose header line starting with `line` becomes `new`."""
    sitk.WriteImage(itk_image(scan()), str(d / name))
    content, count = re.subn(rb"(?m)^" + line + rb".*$", new, (d / name).read_bytes())
    assert count == 1
    (d / name).write_bytes(content)
    return d / name


@bad("data file of this header is missing", "a.raw")
def metaimage_without_raw(d):
    sitk.WriteImage(itk_image(scan()), str(d / "a.mhd"))
    (d / "a.raw").unlink()
    return d / "a.mhd"


@bad("cut short or damaged")
def metaimage_raw_cut_short(d):
    sitk.WriteImage(itk_image(scan()), str(d / "a.mhd"))
    (d / "a.raw").write_bytes((d / "a.raw").read_bytes()[:-9])
    return d / "a.mhd"


@bad("cut short or damaged")
def metaimage_zraw_cut_short(d):
    sitk.WriteImage(itk_image(scan()), str(d / "a.mhd"), True)
    (d / "a.zraw").write_bytes((d / "a.zraw").read_bytes()[:-99])
    return d / "a.mhd"


@bad("zero or NaN voxel spacing")
def metaimage_zero_spacing(d):
    return _edited_header(d, "a.mhd", b"ElementSpacing", b"ElementSpacing = 0 1 1")


@bad("zero or NaN voxel spacing", "nan")
def metaimage_nan_spacing(d):
    return _edited_header(d, "a.mha", b"ElementSpacing", b"ElementSpacing = nan 1 1")


@bad("no voxel spacing", "ElementSpacing")
def metaimage_without_spacing(d):
    return _edited_header(d, "a.mhd", b"ElementSpacing", b"Comment = none")


@bad("singular")
def metaimage_singular(d):
    return _edited_header(d, "a.mhd", b"TransformMatrix", b"TransformMatrix = 0 0 0 0 1 0 0 0 1")


@bad("RGB", "3 values")
def metaimage_rgb(d):
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((4, 5, 6, 3), np.uint8), isVector=True), str(d / "a.mha"))
    return d / "a.mha"


@bad("4D", "one file per time point")
def nrrd_4d(d):
    sitk.WriteImage(
        sitk.GetImageFromArray(np.zeros((2, 4, 5, 6), np.int16), isVector=False), str(d / "a.nrrd")
    )
    return d / "a.nrrd"


@bad("cut short or damaged")
def nrrd_cut_short(d):
    sitk.WriteImage(itk_image(scan()), str(d / "a.nrrd"), True)
    (d / "a.nrrd").write_bytes((d / "a.nrrd").read_bytes()[:-99])
    return d / "a.nrrd"


@bad("stores no orientation", "space directions")
def nrrd_without_orientation(d):
    return _edited_header(d, "a.nrrd", b"space directions:", b"spacings: 0.7 0.8 2.5")


@bad("zero or NaN voxel spacing")
def nrrd_nan_spacing(d):
    return _edited_header(d, "a.nrrd", b"space directions:", b"space directions: (nan,0,0) (0,1,0) (0,0,1)")


@bad("sheared")
def nrrd_sheared(d):
    return _edited_header(d, "a.nrrd", b"space directions:", b"space directions: (1,0,0) (0,1,0) (0,1,2)")


@bad("data file of this header is missing", "a.raw")
def nrrd_without_data(d):
    sitk.WriteImage(itk_image(scan()), str(d / "a.nhdr"))
    (d / "a.raw").unlink()
    return d / "a.nhdr"


# ---- DICOM: slices that do not make a grid -----------------------------------------------------------


@bad("slices are missing", "2 missing", "z = 35, 37.5 mm", "every 2.5 mm", "Fetch the series again")
def dicom_missing_slices(d):
    for file in write_series(d, scan(9))[2:4]:
        file.unlink()
    return d


@bad("slices are missing", "3 missing", "z = 32.5, 37.5, 42.5 mm")
def dicom_every_other_slice_missing(d):
    for file in write_series(d, scan(9))[1:7:2]:
        file.unlink()
    return d


@bad("duplicated slices", "z = 35 mm", "Remove the copies")
def dicom_duplicated_slice(d):
    (d / "copy.dcm").write_bytes(write_series(d, scan())[2].read_bytes())
    return d


@bad("duplicated slices", "6 of 12", "several phases")
def dicom_two_phases(d):
    write_series(d, scan(), uid="1.2.3")
    write_series(d / "second", scan(seed=1), uid="1.2.3")
    return d


@bad("inconsistent slice spacing", "2.5 to 4 mm", "z = 37.5")
def dicom_two_spacings(d):
    write_series(d, scan(4), uid="1.2.3")
    write_series(d, scan(3), uid="1.2.3", origin=(-10, -20, 41.5), step=4, name="b{}.dcm".format)
    return d


@bad("inconsistent slice spacing", "2.3 to 2.7 mm")
def dicom_one_slice_off(d):
    def move(ds, i):
        if i == 3:
            ds.ImagePositionPatient[2] += 0.2

    write_series(d, scan(), edit=move)
    return d


@bad("gantry tilt of 11.3°", "tilt='correct'")
def dicom_gantry_tilt(d):
    write_series(d, scan(8), drift=(0, 0.5))
    return d


@bad("shifted sideways", "tilt='correct'")
def dicom_slices_shifted_sideways(d):
    def move(ds, i):
        ds.ImagePositionPatient[0] += [0, 3, -2, 4, 0, 5][i]

    write_series(d, scan(), edit=move)
    return d


def _one_slice(**values):
    def edit(ds, i):
        if i == 1:
            for key, value in values.items():
                setattr(ds, key, value)

    return edit


@bad("mixed slice orientations", "5 × (1, 0, 0, 0, 1, 0)", "1 × (1, 0, 0, 0, 0, -1)")
def dicom_mixed_orientations(d):
    write_series(d, scan(), edit=_one_slice(ImageOrientationPatient=[1, 0, 0, 0, 0, -1]))
    return d


@bad("mixed pixel spacings", "0.8×0.7 mm", "0.9×0.7 mm")
def dicom_mixed_pixel_spacings(d):
    write_series(d, scan(), edit=_one_slice(PixelSpacing=[0.9, 0.7]))
    return d


@bad("mixed image sizes", "10×12 pixels", "12×10 pixels")
def dicom_mixed_sizes(d):
    write_series(d, scan(), edit=_one_slice(Rows=12, Columns=10))
    return d


@bad("frames of reference", "2 frames")
def dicom_mixed_frames_of_reference(d):
    write_series(d, scan(), edit=_one_slice(FrameOfReferenceUID="1.2.3.5"))
    return d


@bad("single slice", "fetch the series again")
def dicom_single_slice_folder(d):
    write_series(d, scan(1))
    return d


@bad("2 series in one folder", "1.2.3.1", "1.2.3.2", "6 slices", "4 slices", "series=UID")
def dicom_several_series(d):
    write_series(d, scan(6), uid="1.2.3.1")
    write_series(d, scan(4), uid="1.2.3.2", name="b{}".format)
    return d


@bad("series 9.9 is not among", "1.2.3.1", series="9.9")
def dicom_series_not_there(d):
    write_series(d, scan(6), uid="1.2.3.1")
    return d


@bad("series 9.9 is not below", read=find_series, uid="9.9")
def series_not_below_the_root(d):
    write_series(d, scan())
    return d


# ---- DICOM: damaged or unsuitable files --------------------------------------------------------------


def _spoiled(d, spoil, **options):
    """Cut one slice of a series; the error must name that very file."""
    file = write_series(d, scan(6, 64, 64), **options)[3]
    file.write_bytes(spoil(file.read_bytes()))
    return d


@bad("003.dcm", "cannot be decoded", "truncated", "Fetch the series again")
def dicom_pixels_cut_short(d):
    return _spoiled(d, lambda content: content[:-500])


@bad("003.dcm", "cannot be decoded", "cut short")
def dicom_jpeg_cut_short(d):
    return _spoiled(d, lambda content: content[:-500], syntax=JPEGLSLossless)


@bad("003.dcm", "damaged DICOM file", "fetch the series again")
def dicom_header_cut_short(d):
    return _spoiled(d, lambda content: content[:350])


@bad("003.dcm", "damaged DICOM file", "empty")
def dicom_empty_slice(d):
    return _spoiled(d, lambda content: b"")


@bad("003.dcm", "damaged DICOM file", "not DICOM")
def dicom_slice_replaced_by_text(d):
    return _spoiled(d, lambda content: b"<html>503</html>" * 20)


@bad("001.dcm", "no pixel data")
def dicom_without_pixels(d):
    def drop(ds, i):
        if i == 1:
            del ds.PixelData

    write_series(d, scan(), edit=drop)
    return d


def _without(keyword):
    def drop(ds, i):
        if i == 1:
            delattr(ds, keyword)

    return drop


@bad("001.dcm", "ImagePositionPatient is missing", "not guessed")
def dicom_without_position(d):
    write_series(d, scan(), edit=_without("ImagePositionPatient"))
    return d


@bad("001.dcm", "ImageOrientationPatient is missing")
def dicom_without_orientation(d):
    write_series(d, scan(), edit=_without("ImageOrientationPatient"))
    return d


@bad("001.dcm", "PixelSpacing is missing")
def dicom_without_pixel_spacing(d):
    write_series(d, scan(), edit=_without("PixelSpacing"))
    return d


@bad("001.dcm", "RescaleSlope is missing")
def dicom_without_rescale(d):
    write_series(d, scan(), edit=_without("RescaleSlope"))
    return d


@bad("001.dcm", "zero pixel spacing")
def dicom_zero_pixel_spacing(d):
    write_series(d, scan(), edit=_one_slice(PixelSpacing=[0, 0.7]))
    return d


@bad("001.dcm", "PixelSpacing is not 2 finite numbers")
def dicom_nan_pixel_spacing(d):
    write_series(d, scan(), edit=_one_slice(PixelSpacing=["nan", "0.7"]))
    return d


@bad("001.dcm", "not two perpendicular unit vectors")
def dicom_skew_orientation(d):
    write_series(d, scan(), edit=_one_slice(ImageOrientationPatient=[1, 0, 0, 0.5, 1, 0]))
    return d


@bad("001.dcm", "cannot become Hounsfield units", "RescaleSlope 0")
def dicom_zero_slope(d):
    write_series(d, scan(), edit=_one_slice(RescaleSlope=0))
    return d


@bad("cannot become Hounsfield units", "MGML")
def dicom_iodine_map(d):
    write_series(d, scan(), edit=lambda ds, i: setattr(ds, "RescaleType", "MGML"))
    return d


@bad("colour (RGB)", "3 samples per pixel")
def dicom_rgb(d):
    def colour(ds, i):
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PlanarConfiguration = 3, "RGB", 0

    write_series(d, scan(), edit=colour)
    return d


@bad("no CT images here", "6 × MR object", "wrong modality")
def dicom_wrong_modality(d):
    write_series(d, scan(), modality="MR", sop_class="1.2.840.10008.5.1.4.1.1.4")
    return d


@bad("no CT images here", "2 × localizer")
def dicom_only_localizers(d):
    write_series(
        d, scan(2), edit=lambda ds, i: setattr(ds, "ImageType", ["ORIGINAL", "PRIMARY", "LOCALIZER"])
    )
    return d


@bad("no CT images here", "3 × secondary capture")
def dicom_only_screen_captures(d):
    write_series(d, scan(3), sop_class=SECONDARY)
    return d


@bad("duplicated slices", "z = 30 mm")
def enhanced_with_a_repeated_frame(d):
    return write_enhanced(d / "a.dcm", scan(4), order=[0, 1, 2, 3, 0])


@bad("slices are missing", "z = 35 mm")
def enhanced_with_a_missing_frame(d):
    return write_enhanced(d / "a.dcm", scan(5), order=[0, 1, 3, 4])


@bad("do not match", "4 frames")
def enhanced_with_too_few_descriptions(d):
    return write_enhanced(d / "a.dcm", scan(4), edit=lambda ds: ds.PerFrameFunctionalGroupsSequence.pop())


@bad("RescaleSlope is missing")
def enhanced_without_rescale(d):
    def drop(ds):
        del ds.PerFrameFunctionalGroupsSequence[2].PixelValueTransformationSequence

    return write_enhanced(d / "a.dcm", scan(4), edit=drop)


@bad("cannot be decoded")
def enhanced_cut_short(d):
    file = write_enhanced(d / "a.dcm", scan(4))
    file.write_bytes(file.read_bytes()[:-300])
    return file


# ---- the test ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_its_one_clear_error(tmp_path, name):
    write, words, read = BAD[name]
    folder = tmp_path / "case"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # writing nonsense warns
        path = write(folder)
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word.lower() in message.lower(), message
    assert "Doe" not in message and "secret-id" not in message  # the factory's patient


def test_the_table_is_long_enough():
    assert len(BAD) >= 30


def test_an_unknown_tilt_setting_is_bad_use(tmp_path):
    with pytest.raises(UseError, match="'refuse' or 'correct'"):
        read_volume(tmp_path, tilt="fix")


def test_errors_survive_the_trip_from_a_worker(tmp_path):
    write_series(tmp_path, scan(6), uid="1.2.3.1")
    write_series(tmp_path, scan(4), uid="1.2.3.2", name="b{}".format)
    with pytest.raises(DataError) as caught:
        read_volume(tmp_path)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.public == caught.value.public
