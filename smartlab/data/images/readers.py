"""Read any volumetric CT or MR file into one form: int16 on a RAS+ grid, of CT in HU.

- One function for every format: `dicom.py`, `nifti.py`, and `itk.py` for NRRD and MetaImage. All
  pass the same checks (`grid.py`), so a volume that is returned can be trusted downstream.
- World positions are those of SimpleITK for the same file, LPS turned to RAS. Axes are flipped and
  permuted, never resampled; an oblique scan keeps its oblique affine.
- Values of CT are HU. Below −1024 there is only padding, which becomes −1024. Values of MR, which have no unit,
  are normalised by percentiles (`mr.py`). What was changed or set aside is told in `Volume.notes`; what cannot be
  trusted is a `DataError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from smartlab.core.errors import DataError, SmartlabError, one_of, some
from smartlab.data.images import itk, mr, nifti
from smartlab.data.images.grid import AIR, by, check_affine, clip_notes, ras_grid, to_int16, to_ras, unopened

NIFTI, ITK = nifti.SUFFIXES, itk.SUFFIXES
TILTS = ("refuse", "correct")  # what is done with a gantry-tilted DICOM series


@dataclass(frozen=True)
class Volume:
    """One scan.

    array:   (X, Y, Z) int16 Hounsfield units, of MR 0 to 4095 between two percentiles; (C, X, Y, Z) where one
             patient has several images on one grid (`read_channels`). i grows to the patient's Right, j to Anterior,
             k to Superior (the closest such orientation for an oblique scan), C-contiguous.
    affine:  4×4 float64, voxel index -> RAS world mm, right-handed (det > 0).
    source:  the path it was read from.
    notes:   what was set aside or repaired on the way ("2 localizers set aside"), free of PHI.
    stored:  4×4 affine of the voxels in the order of the file (DICOM: column, row, slice), where known.
    scale:   of MR, by channel, the values of the file that became 0 and 4095.
    """

    array: np.ndarray
    affine: np.ndarray
    modality: str = "CT"
    source: str = ""
    notes: tuple[str, ...] = field(default=())
    stored: np.ndarray | None = None
    scale: tuple[tuple[float, float], ...] = ()

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along i, j, k."""
        sx, sy, sz = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(sx), float(sy), float(sz)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(X, Y, Z), of every channel."""
        return self.array.shape[-3:]  # type: ignore[return-value]

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
    modality:  what the file must hold. Only "CT" is clipped at −1024 and must have a rescale; "MR" is normalised.
    files:     those of `series` in a DICOM folder of many, to open no others (`dicom.series_files`).

    >>> read_volume("scan.nii.gz").spacing
    (5.0, 5.0, 5.0)
    """
    one_of("unknown tilt setting", tilt, TILTS)
    path = Path(path)
    with _opening(path):
        if _format(path) == "dicom":
            from smartlab.data.images.dicom import read_dicom

            array, affine, notes = read_dicom(path, series, tilt, modality, files)
            return _finish(array, affine, path, modality, notes)
        values, affine, notes = _read_file(path)
    if modality == "MR":
        return _finish(values, affine, path, modality, notes)
    floor = AIR if modality == "CT" else -32768
    if modality == "CT":
        notes += _check_hounsfield(values, path)
    array, below, above = to_int16(values, path, floor)
    return _finish(array, affine, path, modality, notes + clip_notes(below, above, floor))


def read_channels(paths: Sequence[str | Path], **how: Any) -> Volume:
    """Several images of one patient, all on the voxels of the first, as one volume (C, X, Y, Z).

    how: as for `read_volume`.

    >>> len(sl.read_channels(["scan.nii.gz", "scan.nii.gz"], modality="MR").array)
    2
    """
    first, *others = (read_volume(path, **how) for path in paths)
    for other in others:
        check_same_grid(other.source, other, first)
    if not others:
        return first
    every = [first, *others]
    return replace(
        first,
        array=np.stack([one.array for one in every]),
        notes=tuple(note for one in every for note in one.notes),
        scale=tuple(ends for one in every for ends in one.scale),
    )


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
            found=some(several.tolist(), 5),
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
        found, expected = (by(one.shape) for one in (labels, scan))
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
        shape, dtype, affine, notes = _kind(path).header(path)
    shape = _three_axes(shape, path)
    _check_grid(shape, affine, path)
    shape, affine = ras_grid(shape, affine)
    return Volume(empty(shape, dtype), affine, "", str(path), tuple(notes))


def files_of(source: Path) -> list[Path]:
    """The files a source is read from; a header with its data beside it is several."""
    if source.is_dir():
        return sorted(f for f in source.rglob("*") if f.is_file() and not f.name.startswith("."))
    if source.suffix.lower() in ITK and source.is_file():
        with suppress(DataError, OSError):  # what is wrong with it is said by who reads it
            return [source, *itk.data_files(source)]
    return [source]


def empty(shape: tuple[int, ...], dtype: Any = np.int16) -> np.ndarray:
    """Zeros that take no memory: a shape and a type, for a `Volume` whose voxels have not been read."""
    return np.broadcast_to(np.zeros((), dtype), shape)


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    """What the system and libraries raise on damage, as errors that name the path."""
    try:
        yield
    except OSError as error:
        raise unopened(path, error) from error
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
    volume = Volume(array, affine, modality, str(path), tuple(notes), stored)
    if modality != "MR":
        return volume
    array, ends, more = mr.normalise(array, volume.spacing, path)
    return replace(volume, array=array, notes=(*notes, *more), scale=(ends,))


def _check_grid(shape: tuple[int, ...], affine: np.ndarray, path: Path) -> None:
    if min(shape) < 2:
        raise DataError(
            "a single slice is not a volume",
            path=path,
            found=by(shape, " × ") + " voxels",
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
    values, affine, notes = _kind(path).read(path)
    return values.reshape(_three_axes(values.shape, path)), affine, notes


def _kind(path: Path) -> ModuleType:
    return nifti if path.name.lower().endswith(NIFTI) else itk


def _three_axes(shape: tuple[int, ...], path: Path) -> tuple[int, ...]:
    """The shape without trailing axes of one; refuses what is not a volume then."""
    whole = shape
    while len(shape) > 3 and shape[-1] == 1:
        shape = shape[:-1]
    if len(shape) != 3:
        raise DataError(
            f"a {len(shape)}D image, not a volume",
            path=path,
            found=by(whole, " × "),
            expected="three axes",
            fix="split a 4D image into one file per time point or phase",
        )
    return shape
