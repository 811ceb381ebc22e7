"""From loose DICOM planes to one regular grid, or one clear reason why not.

The slice order and spacing come from ImagePositionPatient projected on the slice normal, never
from SliceThickness, SliceLocation, InstanceNumber or file names. All positions here are DICOM
patient millimetres (LPS). The grid's affine and normal are highdicom's.

What counts as regular: no slice lies more than 0.1 mm (or a fifth of the spacing, if less) from where the
affine puts it along the normal, nor more than half a pixel sideways.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from highdicom.spatial import create_affine_matrix_from_attributes, get_normal_vector
from scipy import ndimage

from smartlab.core.errors import DataError
from smartlab.data.images.grid import AIR, by

SAME_PLACE_MM = 0.01  # two slices closer than this are the same slice twice


@dataclass(frozen=True)
class Plane:
    """One slice image: where it lies, and how its stored values become Hounsfield units."""

    file: Path
    frame: int  # 0 in a single-frame file
    size: tuple[int, int]  # rows, columns
    position: tuple[float, ...]  # (3,) centre of the first pixel
    orientation: tuple[float, ...]  # (6,) direction along a row, then down a column
    pixel_spacing: tuple[float, ...]  # (2,) between rows, between columns
    frame_of_reference: str
    slope: float
    intercept: float
    padding: tuple[int, int] | None  # stored values in this closed range are no data


@dataclass(frozen=True)
class Stack:
    """Planes in order of the normal, and the affine (column, row, slice) -> LPS mm.

    offsets: (n, 2) sideways shift of each plane in pixels (rows, columns) that `straighten` must
    undo for the affine to hold; None where the planes already line up.
    """

    planes: tuple[Plane, ...]
    affine: np.ndarray
    offsets: np.ndarray | None
    tilt_degrees: float


def stack_planes(planes: Sequence[Plane], path: Path, tilt: str = "refuse") -> Stack:
    """Order the planes and find their affine; refuse anything that is not one regular grid."""
    _check_uniform(planes, path)
    first = planes[0]
    normal = get_normal_vector(first.orientation)
    positions = np.array([p.position for p in planes])
    order = np.argsort(positions @ normal, kind="stable")
    planes = [planes[i] for i in order]
    positions = positions[order]
    depth = (positions - positions[0]) @ normal
    _check_regular(positions, depth, normal, path)

    rows_mm, columns_mm = first.pixel_spacing
    across, down = np.array(first.orientation[:3]), np.array(first.orientation[3:])
    offsets = np.column_stack([(positions - positions[0]) @ down, (positions - positions[0]) @ across])
    degrees = float(np.degrees(np.arctan2(np.linalg.norm(offsets[-1]), depth[-1])))
    aligned = np.abs(offsets).max() <= 0.5 * min(first.pixel_spacing)
    if not aligned and tilt != "correct":
        straight = np.abs(offsets - np.outer(depth / depth[-1], offsets[-1])).max() <= rows_mm
        raise DataError(
            f"gantry tilt of {degrees:.1f}°" if straight else "slices are shifted sideways in their planes",
            path=path,
            found=f"a drift of up to {np.abs(offsets).max():.1f} mm across the slice normal",
            expected="slices stacked along their normal",
            fix="pass tilt='correct' to shift every slice back in its plane (linear interpolation)",
        )
    affine = create_affine_matrix_from_attributes(
        image_position=list(planes[0].position),
        image_orientation=list(first.orientation),
        pixel_spacing=list(first.pixel_spacing),
        spacing_between_slices=float(depth[-1] / (len(planes) - 1)),
        index_convention="RD",  # index = (column, row, slice)
    )
    return Stack(tuple(planes), affine, None if aligned else offsets / (rows_mm, columns_mm), degrees)


def straighten(array: np.ndarray, stack: Stack) -> tuple[np.ndarray, np.ndarray]:
    """Undo the sideways offsets: array (n, rows, columns) -> a wider array and its LPS affine.

    The canvas grows so that no voxel is lost; what it adds is air. Only in-plane interpolation:
    no value crosses from one slice to another.
    """
    assert stack.offsets is not None
    low = np.floor(stack.offsets.min(axis=0)).astype(int)
    grow = np.ceil(stack.offsets.max(axis=0)).astype(int) - low
    air = AIR if array.dtype == np.int16 else float(array.min())  # of MR, which has no unit, the darkest
    wide = np.pad(array, ((0, 0), (0, grow[0]), (0, grow[1])), constant_values=air)
    for plane, offset in zip(wide, stack.offsets - low, strict=True):
        moved = ndimage.shift(plane.astype(np.float32), offset, order=1, mode="constant", cval=air)
        plane[:] = np.rint(moved) if array.dtype == np.int16 else moved
    affine = stack.affine.copy()
    affine[:3, 3] += affine[:3, 0] * low[1] + affine[:3, 1] * low[0]
    return wide, affine


def _check_uniform(planes: Sequence[Plane], path: Path) -> None:
    """One image size, pixel spacing, orientation and frame of reference for all planes."""
    for what, unit, tolerance, values in (
        ("image sizes", " pixels", 0, [p.size for p in planes]),
        ("pixel spacings", " mm", 1e-3, [p.pixel_spacing for p in planes]),
        ("slice orientations", "", 1e-3, [p.orientation for p in planes]),
    ):
        if np.ptp(np.array(values, float), axis=0).max() > tolerance:
            kinds = Counter(tuple(round(float(v), 3) + 0.0 for v in value) for value in values)
            raise DataError(
                f"mixed {what} in one series",
                path=path,
                found=", ".join(f"{n} × {_numbers(k)}{unit}" for k, n in kinds.most_common(4)),
                expected=f"the same {what[:-1]} in every slice",
                fix="keep one reformat of the series in the folder and move the others out",
            )
    if len({p.frame_of_reference for p in planes}) > 1:
        raise DataError(
            "slices of different frames of reference in one series",
            path=path,
            found=f"{len({p.frame_of_reference for p in planes})} frames of reference",
            expected="one, so that positions can be compared",
            fix="the patient was repositioned between them; keep one acquisition in the folder",
        )
    if len(planes) < 2:
        raise DataError(
            "a single slice is not a volume",
            path=path,
            found="1 slice",
            expected="the whole series, at least 2 slices",
            fix="give the folder that holds all slices, or fetch the series again",
        )


def _check_regular(positions: np.ndarray, depth: np.ndarray, normal: np.ndarray, path: Path) -> None:
    """Refuse duplicated, missing or unevenly spaced slices, giving their positions."""
    axis = int(np.abs(normal).argmax())
    gaps = np.diff(depth)
    again = np.flatnonzero(gaps < SAME_PLACE_MM)
    if len(again):
        raise DataError(
            "duplicated slices",
            path=path,
            found=f"{len(again)} of {len(positions)} lie on another one, at {_places(positions[again], axis)}",
            expected="one slice per position",
            fix="remove the copies; if every position repeats, the series holds several phases: split it",
        )
    count = len(depth) - 1
    even = np.arange(count + 1) * depth[-1] / count
    if np.abs(depth - even).max() <= min(0.1, 0.2 * depth[-1] / count):
        return
    middle = float(np.percentile(gaps, 50, method="lower"))
    spacing = middle if middle < 1.5 * gaps.min() else float(gaps.min())  # more than half may be missing
    steps = np.rint(gaps / spacing).astype(int)
    if (steps > 1).any() and np.abs(gaps - steps * spacing).max() <= 0.2 * spacing:
        holes = [
            positions[i] + (positions[i + 1] - positions[i]) * (j / steps[i])
            for i in np.flatnonzero(steps > 1)
            for j in range(1, steps[i])
        ]
        raise DataError(
            "slices are missing",
            path=path,
            found=f"{len(positions)} slices with {len(holes)} missing, at {_places(np.array(holes), axis)}",
            expected=f"one slice every {spacing:.4g} mm",
            fix="fetch the series again; missing slices are never made up",
        )
    odd = np.flatnonzero(np.abs(gaps - spacing) > min(0.1, 0.2 * spacing))
    odd = odd if len(odd) else np.array([int(np.abs(gaps - spacing).argmax())])
    raise DataError(
        "inconsistent slice spacing",
        path=path,
        found=f"{gaps.min():.4g} to {gaps.max():.4g} mm; "
        f"{len(odd)} steps differ, after {_places(positions[odd], axis)}",
        expected=f"one slice every {spacing:.4g} mm",
        fix="keep only the evenly spaced slices of one acquisition in the folder, or resample it first",
    )


def _places(positions: np.ndarray, axis: int) -> str:
    """'z = -12.5, -10 mm', at most eight of them."""
    values = sorted({round(float(p[axis]), 3) + 0.0 for p in positions})
    more = f" and {len(values) - 8} more" if len(values) > 8 else ""
    return f"{'xyz'[axis]} = " + ", ".join(f"{v:g}" for v in values[:8]) + f" mm{more}"


def _numbers(values: Sequence[float]) -> str:
    return by(values) if len(values) == 2 else f"({by(values, ', ')})"
