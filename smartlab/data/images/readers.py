"""Read any volumetric CT file into one form: int16 HU on a RAS+ grid.

- One function for every format; DICOM lives in `dicom.py`, NIfTI, NRRD and MetaImage here. All
  pass the same checks (`grid.py`), so a volume that is returned can be trusted downstream.
- World positions are those of SimpleITK for the same file, LPS turned to RAS. Axes are flipped and
  permuted, never resampled; an oblique scan keeps its oblique affine.
- Values are HU. Below −1024 there is only padding, which becomes −1024. What was changed or set
  aside is told in `Volume.notes`; what cannot be trusted is a `DataError`.
"""

from __future__ import annotations

import gzip
import math
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from smartlab.core.errors import DataError, SmartlabError, UseError
from smartlab.data.images.grid import AIR, LPS_TO_RAS, check_affine, clip_notes, ras_grid, to_int16, to_ras

NIFTI, ITK = (".nii", ".nii.gz"), (".nrrd", ".nhdr", ".mhd", ".mha")
_NIFTI_START = 540  # bytes of the longer of the two headers of NIfTI
LARGEST_GB = 8.0  # of one image unpacked; SMARTLAB_LARGEST_GB overrides it
_USUAL_HEADER, LONGEST_HEADER = 1 << 14, 1 << 20  # bytes of the text header of a NRRD or MetaImage
_UNIT_MM = {1: 1000.0, 3: 0.001}  # NIfTI codes for metre and micron; 2 is mm, 0 unknown and taken as mm
_SPACES = {
    "left-posterior-superior",
    "lps",
    "right-anterior-superior",
    "ras",
    "left-anterior-superior",
    "las",
}


@dataclass(frozen=True)
class Volume:
    """One scan.

    array:   (X, Y, Z) int16 Hounsfield units; i grows to the patient's Right, j to Anterior,
             k to Superior (the closest such orientation for an oblique scan), C-contiguous.
    affine:  4×4 float64, voxel index -> RAS world mm, right-handed (det > 0).
    source:  the path it was read from.
    notes:   what was set aside or repaired on the way ("2 localizers set aside"), free of PHI.
    stored:  4×4 affine of the voxels in the order of the file (DICOM: column, row, slice), where known.
    """

    array: np.ndarray
    affine: np.ndarray
    modality: str = "CT"
    source: str = ""
    notes: tuple[str, ...] = field(default=())
    stored: np.ndarray | None = None

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along i, j, k."""
        sx, sy, sz = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(sx), float(sy), float(sz)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.array.shape  # type: ignore[return-value]

    def to_index(self, world_mm: np.ndarray) -> np.ndarray:
        """World RAS mm (…, 3) -> fractional voxel index (…, 3)."""
        inverse = np.linalg.inv(self.affine)
        return np.asarray(world_mm, float) @ inverse[:3, :3].T + inverse[:3, 3]

    def to_world(self, index: np.ndarray) -> np.ndarray:
        """Voxel index (…, 3) -> world RAS mm (…, 3)."""
        return np.asarray(index, float) @ self.affine[:3, :3].T + self.affine[:3, 3]

    def from_image_frame(self, position_mm: tuple[float, float, float]) -> np.ndarray:
        """In-plane mm from the first pixel (along columns, along rows) and patient z -> world RAS mm.

        For axial scans only: the annotation's z is the slice's, whatever way the slices are stacked.
        """
        stored = self.affine if self.stored is None else self.stored
        along = stored[:3, :3] / np.linalg.norm(stored[:3, :3], axis=0)
        if abs(along[2, 2]) < 0.999:
            raise DataError(
                "a position on the image's own pixels needs an axial scan",
                path=self.source,
                found=f"slices {np.degrees(np.arccos(min(1.0, abs(along[2, 2])))):.0f}° from axial",
            )
        dx, dy, z = position_mm
        world = stored[:3, 3] + along[:, 0] * dx + along[:, 1] * dy
        return np.array([world[0], world[1], z])


def read_volume(
    path: str | Path,
    *,
    series: str | None = None,
    tilt: str = "refuse",
    modality: str = "CT",
    files: Sequence[Path] | None = None,
) -> Volume:
    """Read NIfTI, NRRD, MetaImage, a DICOM folder or an enhanced multi-frame DICOM file.

    series:    which SeriesInstanceUID to take where a DICOM folder holds several; no effect elsewhere.
    tilt:      "refuse" a gantry-tilted DICOM series, or "correct" it by shifting slices in-plane.
    modality:  what the file must hold. Only "CT" is clipped at −1024 and must have a rescale.
    files:     those of `series` in a DICOM folder of many, to open no others (`dicom.series_files`).

    >>> read_volume("scan.nii.gz").spacing
    (5.0, 5.0, 5.0)
    """
    if tilt not in ("refuse", "correct"):
        raise UseError("unknown tilt setting", found=tilt, expected="'refuse' or 'correct'")
    path = Path(path)
    with _opening(path):
        if _format(path) == "dicom":
            from smartlab.data.images.dicom import read_dicom

            array, affine, notes = read_dicom(path, series, tilt, modality, files)
            return _finish(array, affine, path, modality, notes)
        values, affine, notes = _read_file(path)
    floor = AIR if modality == "CT" else -32768
    if modality == "CT":
        notes += _check_hounsfield(values, path)
    array, below, above = to_int16(values, path, floor)
    return _finish(array, affine, path, modality, notes + clip_notes(below, above, floor))


def read_labels(path: str | Path, *, binary: bool = False, on: Volume | None = None) -> Volume:
    """Read a label image (any of the non-DICOM formats) on the same RAS+ convention.

    Values are kept: uint8 where they fit, else int16. Whole numbers stored as floats are accepted.
    binary: it is the mask of one structure; several values are refused rather than taken for one.
    on:     the scan it was drawn on; a grid that is not that scan's is refused.
    """
    path = Path(path)
    with _opening(path):
        if _format(path) == "dicom":
            raise DataError(
                "label images are NIfTI, NRRD or MetaImage",
                path=path,
                fix="for DICOM SEG or RTSTRUCT use smartlab.data.images.dicom_masks.read_mask",
            )
        values, affine, notes = _read_file(path)
    if values.dtype.kind == "f" and np.isfinite(values).all() and (values != np.rint(values)).any():
        raise DataError(
            "label values are not whole numbers",
            path=path,
            found=f"{values[values != np.rint(values)][0]:g} among others",
            expected="0, 1, 2 …",
            fix="resample label images with nearest-neighbour interpolation",
        )
    array, below, above = to_int16(values, path, floor=-32768)
    if below or above:
        raise DataError("label values do not fit 16 bits", path=path, expected="at most 32767 labels")
    if binary and len(several := np.setdiff1d(np.unique(array), [0])) > 1:
        raise DataError(
            "the mask of one structure holds several values",
            path=path,
            found=", ".join(map(str, several[:5])) + (f" … of {len(several)}" if len(several) > 5 else ""),
            expected="0 and one other",
            fix="give it as `label_map`, with a name for every value under `organs`, or split it into masks",
        )
    if array.min() >= 0 and array.max() <= 255:
        array = array.astype(np.uint8)
    labels = _finish(array, affine, path, "SEG", notes)
    if on is not None:
        check_same_grid(path, labels, on)
    return labels


def check_same_grid(place: str | Path, labels: Volume, scan: Volume) -> None:
    """Refuse labels that do not lie, voxel on voxel, where the scan lies."""
    if labels.shape != scan.shape:
        found, expected = ("×".join(map(str, one.shape)) for one in (labels, scan))
        raise DataError("is not on the image's grid", path=place, found=found, expected=expected)
    corners = np.array([[0, 0, 0], scan.shape])
    apart = np.abs(labels.to_world(corners) - scan.to_world(corners)).max()
    if apart > 0.5 * min(scan.spacing):
        raise DataError(
            "does not lie where the image lies",
            path=place,
            found=f"{apart:.2f} mm apart",
            expected="the same affine",
        )


def read_grid(path: str | Path) -> Volume:
    """Where the voxels of a NIfTI, NRRD or MetaImage lie, from its header: milliseconds, any size.

    What the header can tell is checked as `read_volume` does. The array is zeros of the stored type that
    take no memory (floating where values are rescaled).
    """
    path = Path(path)
    with _opening(path):
        if _format(path) == "dicom":
            raise DataError("is DICOM, not a single image file", path=path)
        nifti = path.name.lower().endswith(NIFTI)
        shape, dtype, affine, notes = (_nifti_header if nifti else _itk_header)(path)
    shape = _three_axes(shape, path)
    _check_grid(shape, affine, path)
    shape, affine = ras_grid(shape, affine)
    return Volume(empty(shape, dtype), affine, "", str(path), tuple(notes))


def empty(shape: tuple[int, ...], dtype: Any = np.int16) -> np.ndarray:
    """Zeros that take no memory: a shape and a type, for a `Volume` whose voxels have not been read."""
    return np.broadcast_to(np.zeros((), dtype), shape)


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """Permissions, broken disks, vanished mounts and what libraries raise on damage, as errors that name the path."""
    try:
        yield
    except OSError as error:
        raise DataError(
            "cannot be opened",
            path=path,
            found=error.strerror or type(error).__name__,
            fix="check its permissions and the disk it is on",
        ) from error
    except (SmartlabError, MemoryError):
        raise
    except Exception as error:  # its words may be those of a header: only its kind is told
        raise DataError(
            "damaged in a way that is not foreseen",
            path=path,
            found=type(error).__name__,
            fix="fetch it again, or export it again from its source",
        ) from error


def _format(path: Path) -> str:
    """ "dicom" for folders and DICOM files, "file" for the other formats; refuses the rest."""
    if path.is_dir():
        return "dicom"
    if not path.exists():
        raise DataError("no such file or folder", path=path, fix="check the path, or fetch the data first")
    if path.stat().st_size == 0:
        raise DataError("the file is empty", path=path, found="0 bytes", fix="fetch it again")
    name = path.name.lower()
    if name.endswith(NIFTI + ITK):
        return "file"
    with path.open("rb") as stream:
        if stream.read(132)[128:] == b"DICM" or path.suffix.lower() in (".dcm", ".dicom", ".ima"):
            return "dicom"
    header = name.endswith((".raw", ".zraw"))
    raise DataError(
        "this is only the voxel data of a MetaImage" if header else "unknown file type",
        path=path,
        found=f"extension {path.suffix!r}",
        expected=", ".join(NIFTI + ITK) + ", a DICOM folder or a multi-frame DICOM file",
        fix="give its .mhd header instead" if header else "convert it to one of these",
    )


def _finish(array: np.ndarray, affine: np.ndarray, path: Path, modality: str, notes: list[str]) -> Volume:
    _check_grid(array.shape, affine, path)
    stored = affine
    array, affine = to_ras(array, affine)
    return Volume(array, affine, modality, str(path), tuple(notes), stored)


def _check_grid(shape: tuple[int, ...], affine: np.ndarray, path: Path) -> None:
    if min(shape) < 2:
        raise DataError(
            "a single slice is not a volume",
            path=path,
            found=" × ".join(map(str, shape)) + " voxels",
            expected="at least 2 along every axis",
            fix="give the whole scan",
        )
    check_affine(affine, path)


def _check_hounsfield(values: np.ndarray, path: Path) -> list[str]:
    """Refuse fractions within a few HU (scaled to 0–1, or z-scored); note images without any negative value."""
    if values.dtype.kind not in "fiu":
        return []
    low, high = values.min(), values.max()
    if values.dtype.kind == "f" and -20 <= low < high <= 20 and (values != np.rint(values)).any():
        raise DataError(
            "values are not Hounsfield units",
            path=path,
            found=f"fractions between {low:g} and {high:g}: a normalised image",
            expected="HU, about −1000 for air and 0 for water",
            fix="give the scan before intensity normalisation",
        )
    if low >= 0 and high <= 255:
        return [
            f"values from {low:g} to {high:g}: grey levels, not Hounsfield units; set data.window to these"
        ]
    return ["no value below 0: these may not be Hounsfield units"] if low >= 0 else []


def _read_file(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """(values in the file's own order and type, RAS affine in mm, notes)."""
    values, affine, notes = (_read_nifti if path.name.lower().endswith(NIFTI) else _read_itk)(path)
    return values.reshape(_three_axes(values.shape, path)), affine, notes


def _three_axes(shape: tuple[int, ...], path: Path) -> tuple[int, ...]:
    """The shape without trailing axes of one; refuses what is not a volume then."""
    whole = shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise DataError(
            f"a {len(shape)}D image, not a volume",
            path=path,
            found=" × ".join(map(str, whole)),
            expected="three axes",
            fix="split a 4D image into one file per time point or phase",
        )
    return shape


def _read_nifti(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """sform, else qform, as nibabel does; units as SimpleITK does."""
    raw = path.read_bytes()
    if raw[:2] == b"\x1f\x8b":
        try:
            raw = _unpack(raw, path)
        except zlib.error as error:
            raise _cut(path, f"gzip data that do not unpack ({error})") from error
    image, affine, notes = _parse_nifti(raw, path)
    dtype = image.get_data_dtype()
    _check_length(image, len(raw), path, raw[_bytes_of(image) :])
    if dtype.kind not in "iuf":  # RGB is a structured type, complex is complex: to_int16 says so
        return np.zeros((2, 2, 2), dtype), affine, notes
    return (
        (np.asanyarray(image.dataobj) if _plain(image) else image.get_fdata(dtype=np.float32)),
        affine,
        notes,
    )


def _unpack(packed: bytes, path: Path) -> bytes:
    """A gzip file unpacked whole, its checksum compared; never more than the header in it promises and some padding."""
    start = zlib.decompressobj(31).decompress(packed, _NIFTI_START)
    image = _parse_nifti(start, path, alone=True)[0]
    room, parts = _bytes_of(image) + _step(image), []
    while packed and room > 0:  # a file that was packed in parallel has several members
        member = zlib.decompressobj(31)
        parts.append(member.decompress(packed, room))
        room -= len(parts[-1])
        if room > 0 and not member.eof:
            raise zlib.error("they break off")
        packed = member.unused_data.lstrip(b"\0")
    return b"".join(parts)


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
        raise _cut(path, f"{size} bytes where the header promises {needed}")
    if size - needed >= _step(image) or behind.strip(b"\0"):
        raise DataError(
            "holds more than its header says",
            path=path,
            found=f"{size - needed} bytes or more behind the last voxel",
            fix="fetch it again, or correct the sizes in its header",
        )


def _check_size(needed: float, path: Path) -> None:
    """Refuse what a damaged header makes of a small file before memory is asked for it."""
    most = float(os.environ.get("SMARTLAB_LARGEST_GB", LARGEST_GB))
    if needed > most * 1e9:
        raise DataError(
            "is larger than any scan",
            path=path,
            found=f"{needed / 1e9:.1f} GB by its header",
            expected=f"at most {most:g} GB",
            fix=f"if it is that large and the memory suffices, set SMARTLAB_LARGEST_GB={needed / 1e9:.0f}",
        )


def _nifti_header(path: Path) -> tuple[tuple[int, ...], Any, np.ndarray, list[str]]:
    """(shape, type of the values, RAS affine in mm, notes) from the start of the file."""
    compressed = path.open("rb").read(2) == b"\x1f\x8b"
    try:
        with (gzip.open if compressed else open)(path, "rb") as stream:
            raw = stream.read(_NIFTI_START)
    except (EOFError, OSError, zlib.error) as error:
        raise _cut(path, f"gzip data that do not unpack ({error})") from error
    image, affine, notes = _parse_nifti(raw, path, alone=True)
    dtype = image.get_data_dtype()
    if not compressed:
        _check_length(image, path.stat().st_size, path)
    if dtype.kind not in "iuf":
        to_int16(np.zeros((2, 2, 2), dtype), path)  # says what is wrong with it
    return image.shape, dtype if _plain(image) else np.float32, affine, notes


def _plain(image: Any) -> bool:
    """Whether the stored values are meant as they are, without a slope."""
    return (image.dataobj.slope, image.dataobj.inter) == (1.0, 0.0)


def _parse_nifti(raw: bytes, path: Path, alone: bool = False) -> tuple[Any, np.ndarray, list[str]]:
    """(nibabel image whose voxels are not looked at, RAS affine in mm, notes), the header checked.

    alone: leave out what is behind the header: its extensions, which may be of any length, and the voxels.
    """
    import nibabel as nib

    kind = nib.Nifti2Image if raw[:4] in (b"\x1c\x02\x00\x00", b"\x00\x00\x02\x1c") else nib.Nifti1Image
    size = kind.header_class.sizeof_hdr
    if len(raw) < size:
        raise _cut(path, f"{len(raw)} bytes, less than a header")
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
    _check_nifti_header(path, pixdim, codes)
    _check_size(_bytes_of(image), path)
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


def _check_nifti_header(path: Path, pixdim: np.ndarray, codes: tuple[int, int]) -> None:
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


def _read_itk(path: Path) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """NRRD and MetaImage, by SimpleITK."""
    import SimpleITK as sitk

    reader = _itk_reader(path)
    try:
        image = reader.Execute()
    except RuntimeError as error:
        raise _itk_error(path, str(error)) from error
    return sitk.GetArrayFromImage(image).T, _itk_affine(image), []


def _itk_header(path: Path) -> tuple[tuple[int, ...], Any, np.ndarray, list[str]]:
    """(shape, type of the values, RAS affine in mm, notes) without the voxels."""
    import SimpleITK as sitk

    reader = _itk_reader(path)
    small = reader.GetPixelID() in (sitk.sitkUInt8, sitk.sitkInt8)
    return reader.GetSize(), np.int8 if small else np.int16, _itk_affine(reader), []


def _itk_reader(path: Path) -> Any:
    """SimpleITK's reader of this file, its header read and checked."""
    import SimpleITK as sitk

    _check_text_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    reader.SetImageIO("NrrdImageIO" if path.suffix.lower() in (".nrrd", ".nhdr") else "MetaImageIO")
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise _itk_error(path, str(error)) from error
    components, dimension = reader.GetNumberOfComponents(), reader.GetDimension()
    if components != 1 or dimension != 3:
        raise DataError(
            "a colour (RGB) or vector image" if components != 1 else f"a {dimension}D image, not a volume",
            path=path,
            found=" × ".join(map(str, reader.GetSize())) + f" voxels of {components} values",
            expected="three axes, one value per voxel",
            fix="give the original scan; split a 4D image into one file per time point",
        )
    bits = re.search(r"(\d+)-bit", sitk.GetPixelIDValueAsString(reader.GetPixelID()))
    _check_size(math.prod(reader.GetSize()) * int(bits[1] if bits else 64) / 8, path)
    return reader


def _itk_affine(image: Any) -> np.ndarray:
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    return LPS_TO_RAS @ affine


def data_files(path: Path) -> list[Path]:
    """The files beside a NRRD or MetaImage header that hold its voxels; none where they follow the header."""
    return _text_header(path)[1]


def _text_header(path: Path) -> tuple[str, list[Path]]:
    """(header, its data files), every way to name other files refused that SimpleITK would take.

    MetaIO takes any field whose name begins with ElementDataFile, behind "=" or ":"; teem takes "data file" in
    any case. So the field must be there once, in its plain form, before the header ends.
    """
    meta = path.suffix.lower() in (".mhd", ".mha")
    with path.open("rb") as stream:
        raw = stream.read(_USUAL_HEADER)
        ends = re.search(rb"(?i)elementdatafile" if meta else rb"\n\r?\n", raw) and b"LIST" not in raw
        if not ends or path.suffix.lower() == ".mhd":
            raw += stream.read(LONGEST_HEADER)
        more = bool(stream.read(1))
    start = raw.decode("latin-1").replace("\r\n", "\n").replace("\r", "\n")
    text, blank, _ = (start, "", "") if meta else start.partition("\n\n")
    named = list(
        re.finditer("ElementDataFile" if meta else r"^[ \t]*data ?file", text, re.IGNORECASE | re.MULTILINE)
    )
    plain = re.compile(r"^ElementDataFile *=(.*)$" if meta else r"^data ?file:(.*)$", re.MULTILINE)
    field = plain.search(text)
    header = text[: field.start()] if field and meta else text
    strange = [line for line in header.splitlines() if meta and line.strip() and not re.search("[=:]", line)]
    if strange or len(named) > 1 or (named and (field is None or field.start() != named[0].start())):
        raise DataError(
            "the header names its voxel data in a way that is not clear",
            path=path,
            found="; ".join(text[one.start() :].splitlines()[0][:60] for one in named) or strange[0][:60],
            expected=f"one line {'ElementDataFile = …' if meta else 'data file: …'}",
            fix="write the header again",
        )
    if more and not (field if meta else blank):
        raise DataError(
            "the header is too long",
            path=path,
            expected=f"its end within {LONGEST_HEADER} bytes",
            fix="fetch it again",
        )
    name = field.group(1).strip() if field else ""
    if field is None or (meta and name in ("LOCAL", "Local", "local")):
        return text, []
    listed = name.split()[:1] == ["LIST"]
    names = [line.strip() for line in text[field.end() :].splitlines() if line.strip()] if listed else [name]
    return text, [file for one in names for file in _beside(path, one)]


def _beside(path: Path, name: str) -> list[Path]:
    """The data files that a header means by a name; links are followed, and none may leave the header's folder."""
    away = Path(name).is_absolute() or ".." in Path(name).parts or "\0" in name
    pattern, *numbers = name.split() or [""]
    files = [] if away else [path.parent / name]
    if not away and "%" in pattern and numbers:  # slices by number: name%03d.raw 1 20 1
        slices = re.compile(re.sub(r"%\d*d", r"\\d+", re.escape(pattern)))
        files = sorted(file for file in path.parent.iterdir() if slices.fullmatch(file.name)) or files
    homes = {
        path.parent.resolve(),
        path.resolve().parent,
    }  # a header that is a link has its data where it leads
    if away or not all(any(file.resolve().is_relative_to(home) for home in homes) for file in files):
        raise DataError(  # it could be any file of the machine
            "the header names voxel data outside its own folder",
            path=path,
            found=name,
            expected="a file beside the header",
            fix="put the data file beside the header and name it there",
        )
    if missing := [file for file in files if not file.is_file()]:
        raise DataError(
            "the data file of this header is missing",
            path=path,
            expected=str(missing[0]),
            fix="put it beside the header; header and data are moved together",
        )
    return files


def _check_text_header(path: Path) -> None:
    """What SimpleITK would silently default or report obscurely: orientation, spacing, data file."""
    text, _ = _text_header(path)
    meta = path.suffix.lower() in (".mhd", ".mha")
    needed = r"Element(Spacing|Size)\s*=" if meta else r"space directions:"
    line = re.search(rf"^\s*{needed}(.*)$", text, re.MULTILINE)
    if line is None:
        raise DataError(
            "the header stores no voxel spacing" if meta else "the header stores no orientation",
            path=path,
            expected="ElementSpacing" if meta else "space directions",
            fix="write it again from the original scan; defaults are not guessed",
        )
    if re.search(r"\bnan\b", line.group(), re.IGNORECASE):
        raise DataError(
            "zero or NaN voxel spacing", path=path, found=line.group().strip(), fix="correct the header"
        )
    space = re.search(r"^space:\s*(.*?)\s*$", text, re.MULTILINE | re.IGNORECASE)
    flat = re.search(
        r"^space dimension:\s*([0-24-9])", text, re.MULTILINE
    )  # no volume, which is said elsewhere
    if not (meta or flat) and (
        space is None or space[1].lower() not in _SPACES
    ):  # SimpleITK takes any other for LPS
        raise DataError(
            "the header does not say which way is left",
            path=path,
            found=f"space {space[1][:40]}" if space else "no space",
            expected=", ".join(sorted(_SPACES)),
            fix="once you know the orientation, write it into the header",
        )


def _itk_error(path: Path, message: str) -> DataError:
    if "Zero-valued spacing" in message:
        return DataError("zero or NaN voxel spacing", path=path, fix="correct the header")
    if "determinant is 0" in message:
        return DataError("the direction matrix is singular", path=path, fix="correct the header")
    reason = message.strip().splitlines()[-1].split(str(path))[-1].strip(" :")
    if reason.startswith("Reason:"):  # MetaIO gives the last system error, whatever that was
        reason = "header and voxel data do not fit together"
    return _cut(path, f"SimpleITK: {reason}")


def _cut(path: Path, found: str) -> DataError:
    return DataError(
        "the file is cut short or damaged",
        path=path,
        found=found,
        expected="a complete file",
        fix="fetch it again",
    )
