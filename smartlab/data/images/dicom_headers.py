"""Which files below a folder are DICOM, which series each is of, and which are damaged.

A file is recognised by content. It counts as damaged when its header does not parse or breaks off,
and when it is called like a slice but is empty or not DICOM. Whose slice a damaged file is can be told
only while its header still holds the UID.
"""

from __future__ import annotations

import os
from collections.abc import Container, Iterator
from pathlib import Path

import pydicom
from pydicom.dataset import Dataset

from smartlab.core.errors import DataError

CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2",  # CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT
}
DICOMDIR = "1.2.840.10008.1.3.10"
SLICE_SUFFIXES = {".dcm", ".dicom", ".ima"}


def folders_in(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files) for every folder with files, hidden ones left out, in order."""
    if not root.is_dir():
        raise DataError("no such folder", path=root, fix="check the path, or fetch the data first")
    for folder, inside, names in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        names = sorted(name for name in names if not name.startswith("."))
        if names:
            yield Path(folder), names


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
        raise damaged(file, f"its header does not parse: {type(error).__name__}") from error
    return None if directory else header


def whole_header(file: Path, tags: list[str]) -> Dataset | None:
    """`header_of`, refused when it breaks off before it tells which series the file is of."""
    header = header_of(file, tags)
    if header is None:
        return None
    if not (header.get("SOPClassUID") and series_uid(header)):
        raise damaged(file, "its header has no SOPClassUID or SeriesInstanceUID")
    if str(header.SOPClassUID) in CT_CLASSES and "Rows" not in header:  # it follows the UID: that may be cut
        raise damaged(file, "its header has no Rows")
    return header


def series_uid(header: Dataset) -> str:
    return str(header.get("SeriesInstanceUID", "") or "")


def should_be_slice(file: Path, suffixes: set[str]) -> str:
    """What is wrong with a file that is not DICOM but is called as if it were, or ""."""
    suffix, empty = file.suffix.lower(), file.stat().st_size == 0
    if suffix in SLICE_SUFFIXES or (empty and suffix in suffixes):
        return "the file is empty" if empty else "its content is not DICOM"
    return ""


def owner(file: Path, known: Container[str]) -> str:
    """The series a damaged file says it is of, if there is such a series; else ""."""
    try:
        header = header_of(file, ["SeriesInstanceUID"])
    except (DataError, OSError):
        return ""
    uid = series_uid(header) if header is not None else ""
    return uid if uid in known else ""


def damaged(file: Path, what: str) -> DataError:
    return DataError(
        "damaged DICOM file",
        path=file,
        found=what,
        expected="a complete DICOM file",
        fix="fetch the series again, or move this file out of the folder if it is no slice",
    )
