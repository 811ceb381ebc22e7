"""Find, choose and decode DICOM series.

- Files are recognised by content, never by name; folders may be nested and hold stray files.
- Localizers, screen captures, reports and other objects are set aside with a note. A file that
  should be a slice but is empty or cut short is an error, since the scan would silently shrink. Where
  several series share a folder it fails its own alone; if it has lost its UID, it is noted on all.
- Headers are read first, only the tags needed; pixels one file at a time, so memory stays at one
  volume. Classic and enhanced multi-frame CT become the same planes (dicom_planes.py), and these
  one regular grid (dicom_geometry.py).
- SeriesDescription is free text and may name the patient: it appears only in the `HeaderTextError` message
  that a person reads, never in notes; its `.public` leaves it out.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

from smartlab.core.errors import DataError
from smartlab.data.images.dicom_geometry import Plane, stack_planes, straighten
from smartlab.data.images.dicom_headers import CT_CLASSES, damaged, folders_in, headers_of, owner, series_uid
from smartlab.data.images.dicom_planes import PLANE_TAGS, coded, decode, frame_count, planes_of
from smartlab.data.images.grid import LPS_TO_RAS

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and its multi-frame kinds, .7.1 to .7.4
SCREENS = {"SCREEN SAVE", "DOSE_INFO", "CT_SOM5 PROT"}  # ImageType of pages stored as CT images
SLICE_TAGS = [
    *("SOPClassUID", "SeriesInstanceUID", "SeriesDescription", "Modality", "ImageType", "GantryDetectorTilt"),
    *("LossyImageCompression", "PatientID", "StudyInstanceUID", *PLANE_TAGS),
]


class HeaderTextError(DataError):
    """An error that quotes free text of headers, for a person to read. Log `public`, which does not."""

    def __init__(self, problem: str, path: str | Path, found: str, quoted: str, fix: str) -> None:
        self.parts = (problem, path, found, quoted, fix)
        self.public = str(DataError(problem, path=path, found=found, fix=fix))
        super().__init__(problem, path=path, found=quoted, fix=fix)

    def __reduce__(self):
        return HeaderTextError, self.parts


def several_series(path: Path, series: Mapping[str, Sequence[Dataset]]) -> HeaderTextError:
    """More than one series could be meant: their UIDs, sizes and, for the reader, descriptions."""
    facts, quoted = [], []
    for uid, headers in series.items():
        kind = "\\".join(coded(value) for value in _values(headers[0], "ImageType")[:3])
        facts.append(f"\n  {uid}  {sum(map(frame_count, headers))} slices  {kind}")
        quoted.append(f"{facts[-1]}  {str(headers[0].get('SeriesDescription', '') or '')!r}")
    problem, fix = f"{len(series)} series in one folder", "pass series=UID to choose one"
    return HeaderTextError(problem, path, "".join(facts), "".join(quoted), fix)


@dataclass
class Scan:
    """The headers below a path, by what they are."""

    volumes: dict[str, list[Dataset]]  # series UID -> its image headers
    aside: dict[str, list[Dataset]]  # kind -> headers
    strays: int = 0  # files that are not DICOM
    lost: list[Path] = field(default_factory=list)  # damaged, of one of several series, unknown which


@disable_value_validation()  # its warnings would print header values
def read_dicom(
    path: Path,
    series: str | None = None,
    tilt: str = "refuse",
    modality: str = "CT",
    files: Sequence[Path] | None = None,
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """One DICOM series -> int16 array (columns, rows, slices), its RAS affine, and notes.

    Of a folder with several series only `files` are opened, where given; see `series_files`.
    """
    scan = scan_headers(path, modality, series, files)
    headers = _choose(scan, path, series, modality)
    _check_one_series(scan, headers, path)
    planes = [plane for header in headers for plane in planes_in(header, modality)]
    if path.is_file() and len(planes) == 1:
        raise DataError(
            "this is one slice of a series",
            path=path,
            expected="the folder of the series, or a multi-frame file",
            fix=f"give its folder instead: {path.parent}",
        )
    try:
        stack = stack_planes(planes, path, tilt)
    except DataError as error:
        raise _perhaps_lost(error, scan) from error
    array, notes = decode(stack.planes, path, modality)
    affine = stack.affine
    if stack.offsets is not None:
        array, affine = straighten(array, stack)
        notes.append(f"gantry tilt of {stack.tilt_degrees:.1f}° corrected by shifting slices in their planes")
    notes = _notes(scan, headers, stack.tilt_degrees) + notes
    return array.transpose(2, 1, 0), LPS_TO_RAS @ affine, notes


def scan_headers(
    path: Path, modality: str | None, series: str | None = None, files: Sequence[Path] | None = None
) -> Scan:
    """Read every header below a folder (or of one file, or of `files`) and sort them by what they are.

    Damage is an error; when one `series` of several is wanted, only if it is known to be its own. What the disk
    does not give is always one: read again, it may be of the series.
    """
    paths = files or (
        [path] if path.is_file() else [folder / name for folder, names in folders_in(path) for name in names]
    )
    scan = Scan(defaultdict(list), defaultdict(list))
    headers, damage, strays = headers_of(paths, SLICE_TAGS)
    scan.strays = len(strays)
    for header in headers:
        kind = kind_of(header, modality)
        (scan.volumes[series_uid(header)] if kind == "volume" else scan.aside[kind]).append(header)
    several = files is not None or len(scan.volumes) > 1
    for file, problem in damage:
        uid = owner(file, scan.volumes)
        if series in (None, uid) or not several or isinstance(problem.__cause__, OSError):
            raise problem
        scan.lost += [] if uid else [file]
    return scan


def _perhaps_lost(error: DataError, scan: Scan) -> DataError:
    """The same, and that a damaged file of the folder may be the reason."""
    if not scan.lost:
        return error
    lost = f"{len(scan.lost)} damaged in this folder, first {scan.lost[0].name}"
    found = f"{error.found}; {lost}" if error.found else lost
    fix = "fetch the damaged files again, they may be of this series"
    return DataError(error.problem, path=error.path, found=found, expected=error.expected, fix=fix)


def planes_in(header: Dataset, modality: str) -> list[Plane]:
    try:
        return planes_of(header, modality)
    except DataError:
        raise
    except Exception as error:  # a value of the wrong kind can fail anywhere in pydicom
        raise damaged(Path(str(header.filename)), f"garbled header: {type(error).__name__}") from error


def kind_of(header: Dataset, modality: str | None) -> str:
    """ "volume" for a slice of the wanted modality (any, if None), else why it is set aside."""
    sop_class, found = str(header.SOPClassUID), coded(header.get("Modality"))
    image_type = {str(value).upper() for value in _values(header, "ImageType")}
    if "LOCALIZER" in image_type:
        return "localizer"
    if sop_class.startswith(SECONDARY_CAPTURE) or image_type & SCREENS:
        return "secondary capture"
    image = sop_class in CT_CLASSES or (found not in ("CT", "SEG") and "Rows" in header)
    if image and modality in (None, found):
        return "volume"
    return f"{found} object"


def _values(header: Dataset, keyword: str) -> list:
    value = header.get(keyword)
    return [] if value is None else [value] if isinstance(value, str | bytes) else list(value)


def _choose(scan: Scan, path: Path, series: str | None, modality: str) -> list[Dataset]:
    """The headers of the one series meant, or an error that lists what there is."""
    if not scan.volumes and not scan.aside:
        raise DataError(
            "no DICOM files here",
            path=path,
            found=f"{scan.strays} other files" if scan.strays else "an empty folder",
            expected="the slices of one series",
            fix="give the folder that holds them; NIfTI, NRRD and MetaImage are given as a file",
        )
    if not scan.volumes:
        kinds = ", ".join(f"{len(headers)} × {kind}" for kind, headers in scan.aside.items())
        raise DataError(
            f"no {modality} images here",
            path=path,
            found=kinds,
            expected=f"{modality} slices",
            fix="wrong modality or series: choose another, or pass modality= if this is what you want",
        )
    if series is not None:
        if series in scan.volumes:
            return scan.volumes[series]
        raise DataError(
            f"series {series} is not among the {modality} images here",
            path=path,
            found=", ".join(scan.volumes),
            fix="choose one of these with series=",
        )
    if len(scan.volumes) > 1:
        raise several_series(path, scan.volumes)
    return next(iter(scan.volumes.values()))


def _check_one_series(scan: Scan, headers: list[Dataset], path: Path) -> None:
    """Refuse what one series UID holds of two patients or studies, and slices among which others were set aside."""
    owners = {(str(h.get("PatientID", "") or ""), str(h.get("StudyInstanceUID", "") or "")) for h in headers}
    if len(owners) > 1:
        patients, studies = (len(set(ids)) for ids in zip(*owners, strict=True))
        raise DataError(
            "one series UID for slices of several patients or studies",
            path=path,
            found=f"{patients} patient ids, {studies} studies",
            expected="one of each",
            fix="separate them, each with a series UID of its own; an anonymiser may have given them one",
        )
    first = headers[0]
    for kind, aside in scan.aside.items():
        like = [h for h in aside if kind != "localizer" and _looks_like(h, first)]
        if len(like) > max(2, len(headers) // 4):  # a page or two of screen shots are nothing unusual
            raise DataError(
                "slices of one series are of two kinds",
                path=path,
                found=f"{len(headers)} images and {len(like)} × {kind} of the same size",
                fix="export the series again: without the others the scan would have gaps",
            )


def _looks_like(header: Dataset, slice_: Dataset) -> bool:
    return all(header.get(name) == slice_.get(name) for name in ("SeriesInstanceUID", "Rows", "Columns"))


def _notes(scan: Scan, headers: list[Dataset], tilt_degrees: float) -> list[str]:
    counted = {kind: len(aside) for kind, aside in scan.aside.items()}
    notes = [f"{n} {kind}{'s' if n > 1 else ''} set aside" for kind, n in counted.items()]
    if len(scan.volumes) > 1:
        notes.append(f"{len(scan.volumes) - 1} other series in the folder not read")
    if scan.lost:
        n = len(scan.lost)
        notes.append(
            f"{n} damaged file{'s' if n > 1 else ''} left out, of this or another series of the folder"
        )
    if scan.strays:
        notes.append(f"{scan.strays} file{'s' if scan.strays > 1 else ''} that are not DICOM ignored")
    if any(str(header.get("LossyImageCompression", "")) == "01" for header in headers):
        notes.append("lossy compression")
    claimed = str(headers[0].get("GantryDetectorTilt", "") or 0)
    if re.fullmatch(r"-?\d+(\.\d*)?", claimed) and abs(float(claimed)) > 1 and tilt_degrees < 0.5:
        notes.append(f"the header claims a gantry tilt of {claimed}°, the slice positions show none")
    return notes
