"""Bad NIfTI, NRRD and MetaImage files, and paths that are no scan. See test_bad_input.py.

Each function writes the bad input below a folder and returns what to read; its decorator holds the
words that the one error must contain, besides that path.
"""

from __future__ import annotations

import re

import numpy as np
import SimpleITK as sitk

from smartlab import read_volume
from smartlab.data.images.readers import read_labels
from tests.data.dicom_factory import itk_image, scan, write_nifti, write_series

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


@bad("not a valid NIfTI", "-10")
def nifti_negative_size(d):
    return write_nifti(d / "a.nii", scan(), dim=[3, 6, -10, 12, 1, 1, 1, 1])


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


@bad("not Hounsfield units", "normalised")
def nifti_z_scored(d):
    return write_nifti(d / "a.nii", np.random.default_rng(0).normal(size=(9, 9, 9)).astype(np.float32))


@bad("voxels begin inside the header", "vox_offset 0")
def nifti_voxels_from_the_first_byte(d):
    file = write_nifti(d / "a.nii", scan(), vox_offset=0)
    file.write_bytes(file.read_bytes()[:-352])
    return file


@bad("holds more than its header says", "bytes or more behind the last voxel")
def nifti_with_padding_that_is_not_zero(d):
    file = write_nifti(d / "a.nii", scan())
    file.write_bytes(file.read_bytes() + b"\0\1")
    return file


@bad("holds more than its header says", "bytes or more behind the last voxel")
def nifti_with_more_than_its_header_says(d):
    return write_nifti(d / "a.nii", scan(), dim=[3, 6, 10, 11, 1, 1, 1, 1])


@bad("larger than any scan", "SMARTLAB_LARGEST_GB")
def nifti_of_terabytes(d):
    return write_nifti(d / "a.nii.gz", scan(), dim=[3, 30000, 30000, 30000, 1, 1, 1, 1])


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


@bad("outside its own folder", "/etc/hostname", "beside the header")
def metaimage_of_another_file(d):
    sitk.WriteImage(itk_image(scan()), str(d / "a.mhd"))
    return _edited_header(d, "a.mhd", b"ElementDataFile", b"ElementDataFile = /etc/hostname")


@bad("outside its own folder", "../x.raw", "beside the header")
def nrrd_list_that_climbs_out(d):
    sitk.WriteImage(itk_image(scan()), str(d / "a.nhdr"))
    return _edited_header(d, "a.nhdr", b"data file:", b"data file: LIST\n../x.raw")


@bad("does not say which way is left", "3D-left-handed", "left-posterior-superior")
def nrrd_in_a_space_without_left_and_right(d):
    return _edited_header(d, "a.nrrd", b"space:", b"space: 3D-left-handed")
