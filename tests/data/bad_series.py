"""Bad DICOM series. See test_bad_input.py; registered as in bad_files.py."""

from __future__ import annotations

from pydicom.uid import JPEGLSLossless

from smartlab.data.images.dicom_headers import find_series
from tests.data.bad_files import bad
from tests.data.dicom_factory import SECONDARY, scan, write_enhanced, write_series

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


@bad("001.dcm", "RescaleIntercept is not a finite number")
def dicom_text_for_a_number(d):
    file = write_series(d, scan())[1]
    file.write_bytes(file.read_bytes().replace(b"-1024 ", b"Jane  "))
    return d


@bad("001.dcm", "damaged DICOM file", "garbled header")
def dicom_garbled_padding(d):
    write_series(d, scan(), edit=_one_slice(PixelPaddingValue=[1, 2]))
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


@bad("one series UID", "several patients", "2 patient ids, 1 studies")
def dicom_two_patients_under_one_uid(d):
    write_series(d, scan(), edit=_one_slice(PatientID="another-id"))
    return d


@bad("one series UID", "1 patient ids, 2 studies")
def dicom_two_studies_under_one_uid(d):
    write_series(d, scan(), edit=_one_slice(StudyInstanceUID="1.2.99"))
    return d


@bad("slices of one series are of two kinds", "4 images and 4 × secondary capture")
def dicom_every_other_slice_of_another_class(d):
    def edit(ds, i):
        if i % 2:
            ds.SOPClassUID = SECONDARY

    write_series(d, scan(8), edit=edit)
    return d


@bad("frames and their descriptions do not match", "1000000 frames")
def dicom_of_a_million_frames(d):
    write_series(d, scan(), edit=_one_slice(NumberOfFrames=1_000_000))
    return d


@bad("no CT images here", "6 × unknown object")
def dicom_whose_modality_is_a_name(d):
    write_series(d, scan(), edit=lambda ds, i: setattr(ds, "Modality", "DOE JANE"))
    return d
