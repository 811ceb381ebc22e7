"""Read a DICOM SEG or RTSTRUCT as a mask on the grid of the scan it was drawn on.

- The reference is that scan as `read_volume` gives it; nothing is resampled. A segmentation of
  another grid is refused rather than squeezed on.
- SEG frames are placed by highdicom. RTSTRUCT contours are filled by the even-odd rule per plane, so
  that a contour inside another, or a keyhole, is a hole. A voxel belongs if its centre does.
- Segment and ROI names are free text: shown in the error that asks for one, never stored.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pydicom
from highdicom.seg import segread
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset

from smartlab.core.errors import DataError
from smartlab.data.images.dicom import HeaderTextError, scan_headers
from smartlab.data.images.dicom_headers import series_uid
from smartlab.data.images.grid import LPS_TO_RAS, by
from smartlab.data.images.readers import Volume

OFF_GRID = 0.3  # voxels a mask may lie off the voxel centres before it is another scan's


@disable_value_validation()
def read_mask(
    path: str | Path, reference: Volume, roi: str | None = None, *, series: str | None = None
) -> Volume:
    """A segment or structure as uint8 0/1 on the voxels of `reference`.

    path:  a SEG or RTSTRUCT file, or a folder holding one (or the one named by `series`).
    roi:   segment label or ROI name, any case, `*` allowed ("GTV*"; several matches are united).

    >>> tumour = read_mask("case1/rtstruct", read_volume("case1/ct"), "GTV-1")
    """
    path = Path(path)
    file, modality = _mask_file(path, series)
    try:
        if modality == "SEG":
            index = _segment_voxels(file, reference, roi)
        else:
            index = _contour_voxels(pydicom.dcmread(file), file, reference, roi)
    except DataError:
        raise
    except Exception as error:
        raise DataError(
            f"this {modality} cannot be read",
            path=file,
            found=f"{type(error).__name__}: {error}",
            fix="fetch it again; if it stays, it breaks the DICOM standard",
        ) from error
    inside = ((index >= 0) & (index < reference.shape)).all(axis=1)
    if not inside.any():
        raise DataError(
            "the mask is empty on this scan",
            path=file,
            found=f"{len(index)} voxels, none inside",
            expected="a mask drawn on the reference",
            fix="check that mask and scan belong together",
        )
    mask = np.zeros(reference.shape, np.uint8)
    mask[tuple(index[inside].T)] = 1
    outside = int((~inside).sum())
    notes = (f"{outside} mask voxels outside the scan left out",) if outside else ()
    return Volume(mask, reference.affine.copy(), "SEG", str(file), notes)


def _mask_file(path: Path, series: str | None) -> tuple[Path, str]:
    """The one SEG or RTSTRUCT meant, and which of both it is."""
    if not path.exists():
        raise DataError("no such file or folder", path=path, fix="check the path, or fetch the data first")
    aside = scan_headers(path, "CT").aside
    found = [h for kind in ("SEG object", "RTSTRUCT object") for h in aside.get(kind, [])]
    found = [h for h in found if series in (None, series_uid(h))]
    if len(found) > 1:
        raise DataError(
            f"{len(found)} segmentations in one folder",
            path=path,
            found=", ".join(series_uid(h) for h in found),
            expected="one",
            fix="pass series=UID, or the file itself",
        )
    if not found:
        raise DataError(
            "no DICOM SEG or RTSTRUCT here",
            path=path,
            found=", ".join(aside) or "nothing else",
            expected="a segmentation" + (f" with series UID {series}" if series else ""),
            fix="fetch it, or read NIfTI label images with read_labels",
        )
    return Path(str(found[0].filename)), str(found[0].Modality)


def _match(names: Mapping[int, str], roi: str | None, file: Path) -> list[int]:
    """Numbers of the segments or structures called `roi`."""
    wanted = [n for n, name in names.items() if roi is None or fnmatch(name.lower(), roi.lower())]
    if not wanted or (roi is None and len(names) != 1):
        problem = "several structures, and none was chosen" if roi is None else f"no structure named {roi!r}"
        quoted = ", ".join(sorted(names.values()))
        raise HeaderTextError(problem, file, f"{len(names)} structures", quoted, "pass one of them as roi=")
    return wanted


def _segment_voxels(file: Path, reference: Volume, roi: str | None) -> np.ndarray:
    """(n, 3) reference indices of the voxels in the chosen segments."""
    seg = segread(file)
    about = {n: seg.get_segment_description(n) for n in seg.segment_numbers}
    names = {n: str(segment.segment_label) for n, segment in about.items()}
    # Some archives label every segment alike and keep the name ("GTV-1") in the description.
    described = {n: str(segment.get("SegmentDescription", "")) for n, segment in about.items()}
    by_label = roi is None or any(fnmatch(name.lower(), roi.lower()) for name in names.values())
    by_description = roi is not None and any(fnmatch(d.lower(), roi.lower()) for d in described.values())
    chosen = _match(described if by_description and not by_label else names, roi, file)
    volume = seg.get_volume(segment_numbers=chosen)
    # (slices, rows, columns, segments); a fractional segment belongs from one half upwards
    index = np.argwhere((volume.array >= 0.5).any(axis=-1))
    to_reference = np.linalg.inv(reference.affine) @ LPS_TO_RAS @ volume.affine
    turn = np.abs(to_reference[:3, :3])
    ours = index @ to_reference[:3, :3].T + to_reference[:3, 3]
    same_axes = np.allclose(turn.round(), turn, atol=0.01) and np.allclose(turn.round().sum(axis=0), 1)
    off = np.abs(ours - ours.round()).max(initial=0)
    if not same_axes or off > OFF_GRID:
        size = by(np.sort(np.linalg.norm(volume.affine[:3, :3], axis=0)), digits=".3g")
        raise _other_grid(file, f"voxels of {size} mm, {off:.2f} voxels off the grid", reference)
    return ours.round().astype(int)


def _contour_voxels(structures: Dataset, file: Path, reference: Volume, roi: str | None) -> np.ndarray:
    """(n, 3) reference indices of the voxels inside the chosen structures."""
    names = {int(r.ROINumber): str(r.ROIName) for r in structures.StructureSetROISequence}
    numbers = _match(names, roi, file)
    found = []
    for item in structures.ROIContourSequence:
        if int(item.ReferencedROINumber) in numbers:
            closed = [
                np.array(contour.ContourData, float).reshape(-1, 3) * (-1, -1, 1)  # LPS -> RAS
                for contour in item.get("ContourSequence") or []
                if "CLOSED" in contour.ContourGeometricType
            ]
            found += _fill_planes([reference.to_index(points) for points in closed], file, reference)
    return np.concatenate(found) if found else np.empty((0, 3), int)


def _fill_planes(contours: Sequence[np.ndarray], file: Path, reference: Volume) -> list[np.ndarray]:
    """Planar contours of one structure, (n, 3) fractional indices each -> voxel indices per plane."""
    planes = defaultdict(list)
    for points in contours:
        axis = int(np.ptp(points, axis=0).argmin())
        level = float(points[:, axis].mean())
        if np.ptp(points[:, axis]) > OFF_GRID or abs(level - round(level)) > OFF_GRID:
            raise _other_grid(file, f"a contour at slice {level:.2f} along axis {axis}", reference)
        planes[axis, round(level)].append(np.delete(points, axis, axis=1))
    shape = np.array(reference.shape)
    return [
        np.insert(np.argwhere(fill_even_odd(polygons, *np.delete(shape, axis))), axis, level, axis=1)
        for (axis, level), polygons in planes.items()
    ]


def fill_even_odd(polygons: Sequence[np.ndarray], width: int, height: int) -> np.ndarray:
    """(width, height) bool: pixel centres inside an odd number of polygons, each (n, 2) pixel indices.

    Along every line of pixels, each edge it crosses flips what is inside from there on.
    """
    flips = np.zeros((width, height + 1), int)
    for start in polygons:
        end = np.roll(start, -1, axis=0)
        low, high = (
            np.ceil(f(start[:, 0], end[:, 0])).astype(int).clip(0, width) for f in (np.minimum, np.maximum)
        )
        edge = np.repeat(np.arange(len(start)), high - low)  # one entry per crossing of an edge and a line
        line = np.concatenate([np.arange(a, b) for a, b in zip(low, high, strict=True)]).astype(int)
        step = end[edge] - start[edge]
        crossing = start[edge, 1] + (line - start[edge, 0]) * step[:, 1] / step[:, 0]
        np.add.at(flips, (line, np.ceil(crossing).astype(int).clip(0, height)), 1)
    return np.cumsum(flips, axis=1)[:, :height] % 2 == 1


def _other_grid(file: Path, found: str, reference: Volume) -> DataError:
    size = by(reference.spacing, digits=".3g")
    return DataError(
        "the mask does not lie on the voxels of this scan",
        path=file,
        found=found,
        expected=f"the grid of {reference.source or 'the reference'}, {size} mm",
        fix="pass the scan it was drawn on, as read_volume gives it",
    )
