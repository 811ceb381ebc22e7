"""DICOM headers to `Plane`s, and planes to Hounsfield units.

A classic file is one plane; an enhanced multi-frame file is one per frame, its attributes taken from
the frame's own functional groups, then the shared ones. Rescale slope and intercept are applied
frame by frame. Nothing is assumed: a missing position, spacing or rescale is an error.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

from smartlab.core.errors import DataError
from smartlab.data.images.dicom_geometry import Plane
from smartlab.data.images.grid import AIR, check_numbers, clip_notes, to_int16

# fmt: off
PLANE_TAGS = [
    "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PixelRepresentation", "NumberOfFrames",
    "ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing", "FrameOfReferenceUID", "RescaleSlope",
    "RescaleIntercept", "RescaleType", "PixelPaddingValue", "PixelPaddingRangeLimit",
    "SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence",
]
_PIXEL_TAGS = [
    "SOPClassUID", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "PlanarConfiguration",
    "NumberOfFrames", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PixelData",
    "FloatPixelData", "ExtendedOffsetTable", "ExtendedOffsetTableLengths",
]
_CODES = {  # of modalities, ImageType, PhotometricInterpretation, RescaleType; anything else may be somebody's name
    "CT", "MR", "PT", "NM", "US", "CR", "DX", "MG", "XA", "RF", "OT", "SC", "SEG", "RTSTRUCT", "RTDOSE", "RTPLAN",
    "RTIMAGE", "SR", "PR", "KO", "REG", "DOC", "ES", "SM", "PX", "IO",
    "ORIGINAL", "DERIVED", "PRIMARY", "SECONDARY", "AXIAL", "LOCALIZER", "VOLUME", "NONE", "OTHER", "MIXED",
    "RESAMPLED", "MPR", "MIP", "REFORMATTED", "HELIX", "SUBTRACTION", "AVERAGE", "PROJECTION_IMAGE",
    "MONOCHROME1", "MONOCHROME2", "RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT",
    "HU", "HU_MOD", "MGML", "Z_EFF", "ED", "EDW", "OD", "PCT", "TOMOSYNTHESIS",
}
# fmt: on
_GROUPS = {  # where an enhanced file keeps what a classic file has at the top
    "ImagePositionPatient": "PlanePositionSequence",
    "ImageOrientationPatient": "PlaneOrientationSequence",
    "PixelSpacing": "PixelMeasuresSequence",
    "RescaleSlope": "PixelValueTransformationSequence",
    "RescaleIntercept": "PixelValueTransformationSequence",
    "RescaleType": "PixelValueTransformationSequence",
}
_HU_TYPES = {
    "",
    "HU",
    "HU_MOD",
    "US",
}  # US is "unspecified", common on plain CT; a dose or iodine map is not HU


def coded(value: object) -> str:
    """A header value if it is a code that is known, else "unknown": it may be free text."""
    return text if (text := str(value or "")) in _CODES else "unknown"


def is_multiframe(header: Dataset) -> bool:
    return "PerFrameFunctionalGroupsSequence" in header


def frame_count(header: Dataset) -> int:
    return int(header.get("NumberOfFrames", 1) or 1)


def planes_of(header: Dataset, modality: str) -> list[Plane]:
    """Every plane of one file, checked."""
    file = Path(str(header.filename))
    samples, colour = header.get("SamplesPerPixel", 1), header.get("PhotometricInterpretation", "")
    if samples != 1 or not str(colour).startswith("MONOCHROME"):
        raise DataError(
            "a colour (RGB) image, not a scan",
            path=file,
            found=f"{samples} samples per pixel, {coded(colour)}",
            expected="one MONOCHROME value per pixel",
            fix="give the original series, not a screen capture",
        )
    frames, described = frame_count(header), len(header.get("PerFrameFunctionalGroupsSequence") or [])
    if frames != described and (frames > 1 or is_multiframe(header)):
        raise DataError(
            "the frames and their descriptions do not match",
            path=file,
            found=f"{described} descriptions",
            expected=f"{frames} frames",
            fix="fetch the file again",
        )
    return [_plane(header, file, frame, modality) for frame in range(frames)]


def _plane(header: Dataset, file: Path, frame: int, modality: str) -> Plane:
    def numbers(keyword: str, count: int) -> tuple[float, ...]:
        value = _attribute(header, frame, keyword)
        try:
            values = [] if value is None else np.atleast_1d(np.array(value, float)).tolist()
        except (TypeError, ValueError):  # text where a number belongs; it may be anything, so not shown
            values = [np.nan]
        if len(values) != count or not np.isfinite(values).all():
            what = "a finite number" if count == 1 else f"{count} finite numbers"
            raise DataError(
                f"{keyword} is missing" if not values else f"{keyword} is not {what}",
                path=file,
                found=values or "nothing",
                expected=f"{what} in every slice",
                fix="export the series again with full geometry and rescale tags; they are not guessed",
            )
        return tuple(values)

    position, orientation = numbers("ImagePositionPatient", 3), numbers("ImageOrientationPatient", 6)
    spacing = numbers("PixelSpacing", 2)
    if min(spacing) <= 0:
        raise DataError(
            "zero pixel spacing",
            path=file,
            found=f"{spacing[0]:g} × {spacing[1]:g} mm",
            expected="two positive sizes",
            fix="export the series again; the header is damaged",
        )
    axes = np.array(orientation).reshape(2, 3)
    if np.abs(axes @ axes.T - np.eye(2)).max() > 1e-3:
        raise DataError(
            "ImageOrientationPatient is not two perpendicular unit vectors",
            path=file,
            found=list(orientation),
            fix="export the series again; the header is damaged",
        )
    slope, intercept = 1.0, 0.0
    if modality == "CT" or _attribute(header, frame, "RescaleSlope") is not None:
        (slope,), (intercept,) = numbers("RescaleSlope", 1), numbers("RescaleIntercept", 1)
    unit = str(_attribute(header, frame, "RescaleType") or "").upper()
    if slope == 0 or (modality == "CT" and unit not in _HU_TYPES):
        raise DataError(
            "the stored values cannot become Hounsfield units",
            path=file,
            found=f"RescaleSlope {slope:g}, RescaleType {coded(unit)}",
            expected="a non-zero slope and HU",
            fix="choose the plain CT series of this study, not a derived map",
        )
    return Plane(
        file=file,
        frame=frame,
        size=(int(header.get("Rows", 0)), int(header.get("Columns", 0))),
        position=position,
        orientation=orientation,
        pixel_spacing=spacing,
        frame_of_reference=str(header.get("FrameOfReferenceUID", "")),
        slope=slope,
        intercept=intercept,
        padding=_padding(header),
    )


def _attribute(header: Dataset, frame: int, keyword: str) -> Any:
    """A value of one frame: its own functional group, the shared one, or the top of the header."""
    if is_multiframe(header):
        shared = header.get("SharedFunctionalGroupsSequence") or [Dataset()]
        for group in (header.PerFrameFunctionalGroupsSequence[frame], shared[0]):
            items = group.get(_GROUPS[keyword])
            if items and items[0].get(keyword) is not None:
                return items[0].get(keyword)
        return None
    value = header.get(keyword)
    return None if value is None or value == "" else value


def _padding(header: Dataset) -> tuple[int, int] | None:
    """PixelPaddingValue to its range limit, in the signedness of the stored pixels.

    Scanners write −2000 as the unsigned 63536 (and LIDC has it so): wrap it back.
    """
    if header.get("PixelPaddingValue") is None:
        return None
    signed = header.get("PixelRepresentation", 0) == 1
    ends = [
        int(header.PixelPaddingValue),
        int(header.get("PixelPaddingRangeLimit", header.PixelPaddingValue)),
    ]
    wrapped = [(v - 65536 if v > 32767 else v) if signed else v % 65536 for v in ends]
    return min(wrapped), max(wrapped)


def decode(planes: Sequence[Plane], path: Path, modality: str) -> tuple[np.ndarray, list[str]]:
    """Stored pixels of ordered planes -> (slices, rows, columns) and notes: int16 HU, or of MR float32 as rescaled."""
    is_mr = modality == "MR"
    floor = AIR if modality == "CT" else -32768
    array = np.empty((len(planes), *planes[0].size), np.float32 if is_mr else np.int16)
    padded = np.zeros(array.shape if is_mr else 0, bool)
    below = above = 0
    by_file = sorted(range(len(planes)), key=lambda i: (str(planes[i].file), planes[i].frame))
    for file, group in groupby(by_file, key=lambda i: planes[i].file):
        stored = _stored(file)
        for i in group:
            frame, plane = stored[planes[i].frame], planes[i]
            if frame.shape != plane.size:
                raise _undecodable(file, f"an image of {frame.shape}, not {plane.size}")
            values = frame * plane.slope + plane.intercept if plane.slope != 1 else frame + plane.intercept
            pad = np.zeros(frame.shape, bool)
            if plane.padding is not None:
                pad = (frame >= plane.padding[0]) & (frame <= plane.padding[1])
            if is_mr:
                check_numbers(values, file)
                array[i], padded[i] = values, pad
                continue
            array[i], low, high = to_int16(values, file, floor)
            if plane.padding is not None:
                low += int((array[i][pad] != floor).sum())
                array[i][pad] = floor
            below, above = below + low, above + high
    if padded.any() and not padded.all():
        array[padded] = array[~padded].min()
    return array, clip_notes(below, above, floor)


def _stored(file: Path) -> np.ndarray:
    """The stored values of a file, (frames, rows, columns), whatever its compression."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what pydicom warns of here, the checks below refuse
            data = pydicom.dcmread(file, specific_tags=_PIXEL_TAGS, force=True)
        if "TransferSyntaxUID" not in data.file_meta:  # an old file without its meta header
            implicit, little = data.original_encoding
            explicit = ExplicitVRLittleEndian if little else ExplicitVRBigEndian
            data.file_meta.TransferSyntaxUID = ImplicitVRLittleEndian if implicit else explicit
        # pydicom drops an encapsulated element whose end is missing, so a cut JPEG ends here too.
        if not any(keyword in data for keyword in ("PixelData", "FloatPixelData")):
            raise _undecodable(file, "no pixel data, or pixel data cut short")
        pixels = data.pixel_array
    except DataError:
        raise
    except Exception as error:  # whatever a decoder raises, the user needs to know which file
        raise _undecodable(file, f"{type(error).__name__}: {str(error).strip().splitlines()[0]}") from error
    return pixels if pixels.ndim == 3 else pixels[None]


def _undecodable(file: Path, what: str) -> DataError:
    return DataError(
        "the pixel data cannot be decoded",
        path=file,
        found=what,
        expected="complete pixel data",
        fix="the file is probably truncated; fetch the series again",
    )
