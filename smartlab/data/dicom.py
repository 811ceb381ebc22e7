"""Find, choose and decode DICOM series.

- Files are recognised by content, never by name; folders may be nested and hold stray files.
- Localizers, screen captures, reports and other objects are set aside with a note. A file that
  should be a slice but is empty or cut short is an error, since the scan would silently shrink.
- Headers are read first, only the tags needed; pixels one file at a time, so memory stays at one
  volume. Classic and enhanced multi-frame CT become the same planes (dicom_planes.py), and these
  one regular grid (dicom_geometry.py).
- SeriesDescription is free text and may name the patient: it appears only in `SeriesInfo` and in the
  `HeaderTextError` message a person reads, never in notes; its `.public` leaves it out.
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from itertools import groupby
from pathlib import Path

import numpy as np
import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

from smartlab.data.dicom_geometry import Plane, stack_planes, straighten
from smartlab.data.dicom_planes import PLANE_TAGS, coded, decode, frame_count, planes_of
from smartlab.data.grid import LPS_TO_RAS
from smartlab.errors import DataError

CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2",  # CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT
}
SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"  # and its multi-frame kinds, .7.1 to .7.4
DICOMDIR = "1.2.840.10008.1.3.10"
SCREENS = {"SCREEN SAVE", "DOSE_INFO", "CT_SOM5 PROT"}  # ImageType of pages stored as CT images
SLICE_SUFFIXES = {".dcm", ".dicom", ".ima"}
_TAGS = [
    "SOPClassUID",
    "SeriesInstanceUID",
    "SeriesDescription",
    "Modality",
    "ImageType",
    "GantryDetectorTilt",
    "LossyImageCompression",
]


@dataclass(frozen=True)
class SeriesInfo:
    """What a folder holds under one SeriesInstanceUID.

    kind is "volume", "localizer", "secondary capture" or "<MODALITY> object"; slices counts files,
    or frames of multi-frame files. `description` is header free text: show it, never store it.
    """

    uid: str
    modality: str
    kind: str
    slices: int
    image_type: str
    description: str = field(default="", repr=False)


class HeaderTextError(DataError):
    """An error that quotes free text of headers, for a person to read. Log `public`, which does not."""

    def __init__(self, problem: str, path: str | Path, found: str, quoted: str, fix: str) -> None:
        self.parts = (problem, path, found, quoted, fix)
        self.public = str(DataError(problem, path=path, found=found, fix=fix))
        super().__init__(problem, path=path, found=quoted, fix=fix)

    def __reduce__(self):
        return HeaderTextError, self.parts


def several_series(path: Path, series: Sequence[SeriesInfo]) -> HeaderTextError:
    """More than one series could be meant: their UIDs, sizes and, for the reader, descriptions."""
    facts = [f"\n  {s.uid}  {s.slices} slices  {s.image_type}" for s in series]
    quoted = [f"{fact}  {s.description!r}" for fact, s in zip(facts, series, strict=True)]
    problem, fix = f"{len(series)} series in one folder", "pass series=UID to choose one"
    return HeaderTextError(problem, path, "".join(facts), "".join(quoted), fix)


@dataclass
class Scan:
    """The headers below a path, by what they are."""

    volumes: dict[str, list[Dataset]]  # series UID -> its image headers
    aside: dict[str, list[Dataset]]  # kind -> headers
    strays: int  # files that are not DICOM


@disable_value_validation()  # its warnings would print header values
def read_dicom(
    path: Path, series: str | None = None, tilt: str = "refuse", modality: str = "CT"
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """One DICOM series -> int16 array (columns, rows, slices), its RAS affine, and notes."""
    scan = scan_headers(path, modality)
    headers = _choose(scan, path, series, modality)
    planes = [plane for header in headers for plane in _planes(header, modality)]
    if path.is_file() and len(planes) == 1:
        raise DataError(
            "this is one slice of a series",
            path=path,
            expected="the folder of the series, or a multi-frame file",
            fix=f"give its folder instead: {path.parent}",
        )
    stack = stack_planes(planes, path, tilt)
    array, notes = decode(stack.planes, path, modality)
    affine = stack.affine
    if stack.offsets is not None:
        array, affine = straighten(array, stack)
        notes.append(f"gantry tilt of {stack.tilt_degrees:.1f}° corrected by shifting slices in their planes")
    notes = _notes(scan, headers, stack.tilt_degrees) + notes
    return array.transpose(2, 1, 0), LPS_TO_RAS @ affine, notes


@disable_value_validation()
def series_in(folder: str | Path) -> list[SeriesInfo]:
    """Every series below a folder (or in a file), volumes with the most slices first."""
    scan = scan_headers(Path(folder), None)
    found = [_info(headers, "volume") for headers in scan.volumes.values()]
    for kind, headers in scan.aside.items():
        by_uid = groupby(sorted(headers, key=series_uid), key=series_uid)
        found += [_info(list(group), kind) for _, group in by_uid]
    return sorted(found, key=lambda s: (s.kind != "volume", -s.slices, s.uid))


def index_series(root: str | Path, thorough: bool = False) -> dict[str, Path]:
    """Series UID -> the folder below `root` that holds it, whatever the folders are called.

    From the first DICOM header of every folder (thousands in seconds), or of every file if
    `thorough`, for folders that mix series. A series spread over several folders gets their common
    parent. Folders that have not changed since the last call are not opened again.
    """
    index: dict[str, Path] = {}
    for folder, _ in _folders(Path(root)):
        for uid in _uids_in(folder, folder.stat().st_mtime_ns, thorough):
            index[uid] = Path(os.path.commonpath([index.get(uid, folder), folder]))
    return index


def find_series(root: str | Path, uid: str) -> Path:
    """The folder below `root` that holds a series; read it with `read_volume(folder, series=uid)`.

    The first call indexes the root, later ones look the series up; a series that is not in the index
    makes it anew, first from one header per folder, then from every file.
    """
    root = Path(root).absolute()
    for thorough in (None, False, True):
        if thorough is not None:
            _indexes[root] = index_series(root, thorough)
        folder = _indexes.get(root, {}).get(uid)
        if folder is not None and folder.is_dir():
            return folder
    raise DataError(
        f"series {uid} is not below this folder",
        path=root,
        found=f"{len(_indexes[root])} other series",
        fix="fetch it, or check the data root",
    )


_indexes: dict[Path, dict[str, Path]] = {}


# ---- headers -------------------------------------------------------------------------------------


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files) for every folder with files, hidden ones left out, in order."""
    if not root.is_dir():
        raise DataError("no such folder", path=root, fix="check the path, or fetch the data first")
    for folder, inside, names in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        if names:
            yield Path(folder), names


@cache
def _uids_in(folder: Path, modified_ns: int, thorough: bool) -> tuple[str, ...]:
    """Series UIDs of the files directly in a folder; of its first DICOM file only, unless `thorough`."""
    uids: dict[str, None] = {}
    for file in sorted(folder.iterdir()):
        if not file.is_file() or file.name.startswith("."):
            continue
        try:
            header = header_of(file, ["SeriesInstanceUID"])
        except (DataError, OSError):  # reading that series will say so; finding the others must go on
            continue
        if header is not None and series_uid(header):
            uids[series_uid(header)] = None
            if not thorough:
                break
    return tuple(uids)


def header_of(file: Path, tags: list[str]) -> Dataset | None:
    """The named tags of a DICOM file; None if its content is not DICOM."""
    with file.open("rb") as stream:
        start = stream.read(132)
    # Old archives omit the preamble; their files begin with group 0002 or 0008 directly.
    if start[128:] != b"DICM" and start[:2] not in (b"\x08\x00", b"\x02\x00", b"\x00\x08"):
        return None
    try:
        header = pydicom.dcmread(file, stop_before_pixels=True, specific_tags=tags, force=True)
        for _ in header.iterall():
            pass  # elements parse lazily; a garbled one fails here
        directory = header.file_meta.get("MediaStorageSOPClassUID", "") == DICOMDIR
    except Exception as error:
        raise _damaged(file, f"its header does not parse: {type(error).__name__}") from error
    return None if directory else header


def scan_headers(path: Path, modality: str | None) -> Scan:
    """Read every header below a folder (or of one file) and sort them by what they are."""
    files = (
        [path] if path.is_file() else [folder / name for folder, names in _folders(path) for name in names]
    )
    scan = Scan(defaultdict(list), defaultdict(list), 0)
    others: list[Path] = []
    suffixes = set(SLICE_SUFFIXES)
    for file in files:
        header = header_of(file, _TAGS + PLANE_TAGS)
        if header is None:
            others.append(file)
            continue
        if not (header.get("SOPClassUID") and series_uid(header)):
            raise _damaged(file, "its header has no SOPClassUID or SeriesInstanceUID")
        suffixes.add(file.suffix.lower())
        kind = _kind(header, modality)
        (scan.volumes[series_uid(header)] if kind == "volume" else scan.aside[kind]).append(header)
    for file in others:
        suffix, empty = file.suffix.lower(), file.stat().st_size == 0
        if suffix in SLICE_SUFFIXES or (empty and suffix in suffixes):
            raise _damaged(file, "the file is empty" if empty else "its content is not DICOM")
    scan.strays = len(others)
    return scan


def _planes(header: Dataset, modality: str) -> list[Plane]:
    try:
        return planes_of(header, modality)
    except DataError:
        raise
    except Exception as error:  # a value of the wrong kind can fail anywhere in pydicom
        raise _damaged(Path(str(header.filename)), f"garbled header: {type(error).__name__}") from error


def _damaged(file: Path, what: str) -> DataError:
    return DataError(
        "damaged DICOM file",
        path=file,
        found=what,
        expected="a complete DICOM file",
        fix="fetch the series again, or move this file out of the folder if it is no slice",
    )


def _kind(header: Dataset, modality: str | None) -> str:
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


def series_uid(header: Dataset) -> str:
    return str(header.get("SeriesInstanceUID", "") or "")


def _info(headers: list[Dataset], kind: str) -> SeriesInfo:
    first = headers[0]
    return SeriesInfo(
        uid=series_uid(first),
        modality=coded(first.get("Modality")),
        kind=kind,
        slices=sum(map(frame_count, headers)),
        image_type="\\".join(coded(value) for value in _values(first, "ImageType")[:3]),
        description=str(first.get("SeriesDescription", "") or ""),
    )


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
        raise several_series(path, [_info(headers, "volume") for headers in scan.volumes.values()])
    return next(iter(scan.volumes.values()))


def _notes(scan: Scan, headers: list[Dataset], tilt_degrees: float) -> list[str]:
    counted = {kind: len(aside) for kind, aside in scan.aside.items()}
    notes = [f"{n} {kind}{'s' if n > 1 else ''} set aside" for kind, n in counted.items()]
    if len(scan.volumes) > 1:
        notes.append(f"{len(scan.volumes) - 1} other series in the folder not read")
    if scan.strays:
        notes.append(f"{scan.strays} file{'s' if scan.strays > 1 else ''} that are not DICOM ignored")
    if any(str(header.get("LossyImageCompression", "")) == "01" for header in headers):
        notes.append("lossy compression")
    claimed = str(headers[0].get("GantryDetectorTilt", "") or 0)
    if re.fullmatch(r"-?\d+(\.\d*)?", claimed) and abs(float(claimed)) > 1 and tilt_degrees < 0.5:
        notes.append(f"the header claims a gantry tilt of {claimed}°, the slice positions show none")
    return notes
