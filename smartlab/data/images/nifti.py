"""NIfTI by nibabel, after its header has been checked and its length compared with what the header promises."""

from __future__ import annotations

import gzip
import math
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from smartlab.core.errors import DataError
from smartlab.data.images.grid import check_size, cut_short, to_int16

SUFFIXES = (".nii", ".nii.gz")
_START = 540  # bytes of the longer of the two headers of NIfTI
_UNIT_MM = {1: 1000.0, 3: 0.001}  # codes for metre and micron; 2 is mm, 0 unknown and taken as mm


def read(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """sform, else qform, as nibabel does; units as SimpleITK does."""
    with _opened(path) as stream:
        raw = stream.read(_START)
        image = _parse(raw, path, alone=True)[0]  # what the header promises and some padding, never more
        raw += stream.read(_bytes_of(image) + _step(image) - len(raw))
    image, affine, notes = _parse(raw, path)
    dtype = image.get_data_dtype()
    _check_length(image, len(raw), path, raw[_bytes_of(image) :])
    if dtype.kind not in "iuf":  # RGB is a structured type, complex is complex: to_int16 says so
        return np.zeros((2, 2, 2), dtype), affine, notes
    values = np.asanyarray(image.dataobj) if _plain(image) else image.get_fdata(dtype=np.float32)
    return values, affine, notes


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO | gzip.GzipFile]:
    """The file, unpacked as it is read and its checksums compared."""
    with path.open("rb") as plain:
        packed = plain.read(2) == b"\x1f\x8b"
        plain.seek(0)
        try:
            yield gzip.GzipFile(fileobj=plain) if packed else plain
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise cut_short(path, f"gzip data that do not unpack ({error})") from error


def _bytes_of(image: Any) -> int:
    """Bytes of a NIfTI file with this header, unpacked."""
    return int(image.dataobj.offset) + math.prod(image.shape) * image.get_data_dtype().itemsize


def _step(image: Any) -> int:
    """The fewest bytes by which the file changes where an axis is one longer."""
    return math.prod(image.shape) // max(image.shape) * image.get_data_dtype().itemsize


def _check_length(image: Any, size: int, path: Path, behind: bytes = b"") -> None:
    """Refuse less than the header promises, and more than padding: were a size in the header damaged, all slices would be cut wrong."""
    needed = _bytes_of(image)
    if size < needed:
        raise cut_short(path, f"{size} bytes where the header promises {needed}")
    if size - needed >= _step(image) or behind.strip(b"\0"):
        raise DataError(
            "holds more than its header says",
            path=path,
            found=f"{size - needed} bytes or more behind the last voxel",
            fix="fetch it again, or correct the sizes in its header",
        )


def header(path: Path) -> tuple[tuple[int, ...], Any, np.ndarray, list[str]]:
    """(shape, type of the values, RAS affine in mm, notes) from the start of the file."""
    with _opened(path) as stream:
        image, affine, notes = _parse(stream.read(_START), path, alone=True)
    dtype = image.get_data_dtype()
    if not isinstance(stream, gzip.GzipFile):
        _check_length(image, path.stat().st_size, path)
    if dtype.kind not in "iuf":
        to_int16(np.zeros((2, 2, 2), dtype), path)  # says what is wrong with it
    return image.shape, dtype if _plain(image) else np.float32, affine, notes


def _plain(image: Any) -> bool:
    """Whether the stored values are meant as they are, without a slope."""
    return (image.dataobj.slope, image.dataobj.inter) == (1.0, 0.0)


def _parse(raw: bytes, path: Path, alone: bool = False) -> tuple[Any, np.ndarray, list[str]]:
    """(nibabel image whose voxels are not looked at, RAS affine in mm, notes), the header checked.

    alone: leave out what is behind the header: its extensions, which may be of any length, and the voxels.
    """
    import nibabel as nib

    kind = nib.Nifti2Image if raw[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nib.Nifti1Image
    size = kind.header_class.sizeof_hdr
    if len(raw) < size:
        raise cut_short(path, f"{len(raw)} bytes, less than a header")
    try:
        header = kind.header_class(raw[:size], check=False)  # before nibabel repairs it
        pixdim = np.array(header["pixdim"][1:4], float)
        codes = int(header["sform_code"]), int(header["qform_code"])
        with _silent():
            image: Any = kind.from_bytes(raw[:size] + bytes(4) if alone else raw)
        affine = np.array(image.affine, float)
        apart = _forms_apart(image) if all(codes) else 0.0
        if min(image.shape, default=0) < 1:
            raise ValueError(f"its shape is {image.shape}")
    except Exception as error:
        raise DataError("not a valid NIfTI file", path=path, found=error, fix="fetch it again") from error
    _check_header(path, pixdim, codes)
    check_size(_bytes_of(image), path)
    if (first := int(image.dataobj.offset)) < size + 4:
        raise DataError(
            "the voxels begin inside the header",
            path=path,
            found=f"vox_offset {first}",
            expected=f"at least {size + 4}",
            fix="fetch it again, or correct vox_offset",
        )
    notes = []
    if not apart <= 0.5 * np.abs(pixdim).min():
        notes.append(f"sform and qform place the image up to {apart:.1f} mm apart; sform used")
    scale = _UNIT_MM.get(int(header["xyzt_units"]) & 7, 1.0)
    affine[:3] *= scale
    notes += [f"header unit converted to mm (× {scale:g})"] if scale != 1 else []
    return image, affine, notes


@contextmanager
def _silent() -> Iterator[None]:
    """nibabel prints what it finds wrong with a header; here it is said in words of our own."""
    from nibabel.imageglobals import logger

    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _check_header(path: Path, pixdim: np.ndarray, codes: tuple[int, int]) -> None:
    """Refuse zero sizes and unknown orientation."""
    if not np.isfinite(pixdim).all() or (pixdim == 0).any():
        raise DataError(
            "zero or NaN voxel spacing",
            path=path,
            found="pixdim " + ", ".join(f"{v:g}" for v in pixdim),
            expected="three positive sizes",
            fix="correct the header (pixdim) from the original scan",
        )
    if codes == (0, 0):
        raise DataError(
            "the file stores no orientation, so left and right are unknown",
            path=path,
            found="sform_code and qform_code both 0",
            expected="at least one above 0",
            fix="once you know the orientation, store it: image.set_sform(affine, code=1)",
        )


def _forms_apart(image: Any) -> float:
    """Largest distance between where sform and qform put a corner, in the header's unit."""
    ends = [(0, n - 1) for n in (*image.shape, 1, 1)[:3]]
    corners = np.array(list(product(*ends, (1,))), float)
    shift = image.get_sform() - image.get_qform()
    return float(np.linalg.norm((corners @ shift.T)[:, :3], axis=1).max())
