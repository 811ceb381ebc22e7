"""Which files below a folder are DICOM, which series each is of, and which are damaged.

A file is recognised by content. It counts as damaged when its header does not parse or breaks off,
and when it is called like a slice but is empty or not DICOM. Whose slice a damaged file is can be told
only while its header still holds the UID.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import pydicom
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

from smartlab.core.errors import DataError
from smartlab.data.images.grid import unopened

CT_CLASSES = {
    "1.2.840.10008.5.1.4.1.1.2",  # CT Image Storage
    "1.2.840.10008.5.1.4.1.1.2.1",  # Enhanced CT
    "1.2.840.10008.5.1.4.1.1.2.2",  # Legacy Converted Enhanced CT
}
Headers = tuple[list[Dataset], list[tuple[Path, DataError]], list[Path]]
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
    try:
        with file.open("rb") as stream:
            start = stream.read(132)
    except OSError as error:
        raise unopened(file, error) from error
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


def headers_of(files: Iterable[Path], tags: list[str], first: bool = False) -> Headers:
    """The headers among files, those that are damaged and why, and those that are not DICOM.

    A file that is called as if it were DICOM, or is empty and called like the others, counts as damaged.
    first: stop at the first header.
    """
    headers: list[Dataset] = []
    damage: list[tuple[Path, DataError]] = []
    others: list[Path] = []
    suffixes = set(SLICE_SUFFIXES)
    for file in files:
        try:
            header = whole_header(file, tags)
        except DataError as error:
            damage.append((file, error))
            continue
        if header is None:
            others.append(file)
            continue
        suffixes.add(file.suffix.lower())
        headers.append(header)
        if first:
            break
    for file in list(others):
        suffix, empty = file.suffix.lower(), file.stat().st_size == 0
        if suffix in SLICE_SUFFIXES or (empty and suffix in suffixes):
            others.remove(file)
            damage.append((file, damaged(file, "the file is empty" if empty else "its content is not DICOM")))
    return headers, damage, others


def series_uid(header: Dataset) -> str:
    return str(header.get("SeriesInstanceUID", "") or "")


def owner(file: Path, known: Container[str]) -> str:
    """The series a damaged file says it is of, if there is such a series; else ""."""
    try:
        header = header_of(file, ["SeriesInstanceUID"])
    except DataError:
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


# ---- series below a folder ------------------------------------------------------------------------


@disable_value_validation()
def index_series(root: str | Path, thorough: bool = False) -> dict[str, Path]:
    """Series UID -> the folder below `root` that holds it, whatever the folders are called.

    From the first DICOM header of every folder (thousands in seconds), or of every file if
    `thorough`, for folders that mix series. A series spread over several folders gets their common
    parent. Folders that have not changed since the last call are not opened again.
    """
    index: dict[str, Path] = {}
    for folder, names in folders_in(Path(root)):
        for uid in filter(None, _uids_in(folder, _state(folder, names, thorough), thorough)):
            index[uid] = Path(os.path.commonpath([index.get(uid, folder), folder]))
    return index


@disable_value_validation()
def series_files(root: str | Path) -> dict[str, tuple[Path, ...]]:
    """Series UID -> its files below `root`, in order, for folders that mix series.

    Opens every file, but none again while the names, sizes and times in its folder stay. Under "" are
    damaged files that have lost their UID: each could be a slice of any of the series.
    """
    found: dict[str, list[Path]] = defaultdict(list)
    for folder, names in folders_in(Path(root)):
        for uid, own in _uids_in(folder, _state(folder, names, True), True).items():
            found[uid] += [folder / name for name in own]
    return {uid: tuple(files) for uid, files in found.items()}


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


def _state(folder: Path, names: Sequence[str], thorough: bool) -> int:
    """Changes when the folder does; if `thorough`, also when one of its files does."""
    if not thorough:
        return folder.stat().st_mtime_ns
    facts = ((folder / name).stat() for name in names)
    return hash(tuple((n, s.st_size, s.st_mtime_ns) for n, s in zip(names, facts, strict=True)))


@cache
def _uids_in(folder: Path, state: int, thorough: bool) -> dict[str, tuple[str, ...]]:
    """Series UID -> names of its files directly in a folder; "" -> damaged files that lost theirs.

    Of its first DICOM file only, unless `thorough`. Damage is told by reading that series; finding
    the others must go on."""
    found: dict[str, list[str]] = defaultdict(list, {"": []})
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and not file.name.startswith(".")]
    headers, damage, _ = headers_of(files, ["SOPClassUID", "SeriesInstanceUID", "Rows"], first=not thorough)
    for header in headers:
        found[series_uid(header)].append(Path(str(header.filename)).name)
    for file, _ in damage:
        found[owner(file, found)].append(file.name)
    return {uid: tuple(names) for uid, names in found.items()}
