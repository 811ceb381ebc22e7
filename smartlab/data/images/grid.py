"""The voxel conventions every reader ends in: RAS+ order, sane affines, int16 values.

Only axis flips and permutations happen here; nothing is resampled. A voxel keeps the world
position its file gave it.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import permutations, product
from pathlib import Path

import numpy as np

from smartlab.core.errors import DataError

AIR = -1024  # HU; the lowest value a CT keeps, and what padding outside the field of view becomes
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])  # DICOM and ITK count x to the Left and y to the back
Spacing = float | Sequence[float]  # mm: of all axes, or along x, y and z
SPACING_MM = (0.01, 100.0)  # outside this the unit is wrong, not the scanner
LARGEST_GB = 8.0  # of one image unpacked; SMARTLAB_LARGEST_GB overrides it
SHEAR = 1e-3  # cosine between two axes: half a voxel over 500 of them


def unopened(path: Path, error: OSError) -> DataError:
    """Permissions, broken disks, vanished mounts."""
    return DataError(
        "cannot be opened",
        path=path,
        found=error.strerror or type(error).__name__,
        fix="check its permissions and the disk it is on",
    )


def cut_short(path: Path, found: str) -> DataError:
    return DataError(
        "the file is cut short or damaged",
        path=path,
        found=found,
        expected="a complete file",
        fix="fetch it again",
    )


def check_size(needed: float, path: Path) -> None:
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


def check_affine(affine: np.ndarray, path: str | Path) -> None:
    """Refuse an affine that cannot place voxels: NaN, zero or absurd spacing, flat or sheared axes."""
    columns = affine[:3, :3]
    spacing = np.linalg.norm(columns, axis=0)
    if not np.isfinite(affine).all() or (spacing == 0).any():
        raise DataError(
            "zero or NaN voxel spacing",
            path=path,
            found=by(spacing, " × ") + " mm",
            expected="three positive sizes and a finite origin",
            fix="export the image again from its source; the header is damaged",
        )
    if spacing.min() < SPACING_MM[0] or spacing.max() > SPACING_MM[1]:
        raise DataError(
            "the voxel spacing is absurd",
            path=path,
            found=by(spacing, " × ") + " mm",
            expected=f"{SPACING_MM[0]:g} to {SPACING_MM[1]:g} mm",
            fix="check the unit in the header (mm, micron, metre)",
        )
    directions = columns / spacing
    if abs(np.linalg.det(directions)) < 0.1:
        raise DataError(
            "the affine is singular: two of its axes point the same way",
            path=path,
            found=np.round(directions, 3).tolist(),
            fix="export the image again from its source; the header is damaged",
        )
    cosines = np.abs(directions.T @ directions - np.eye(3))
    if cosines.max() > SHEAR:
        raise DataError(
            "the affine is sheared: its axes are not perpendicular",
            path=path,
            found=f"{np.degrees(np.arcsin(min(cosines.max(), 1.0))):.2f}° off a right angle",
            expected="perpendicular axes",
            fix="if this is a gantry tilt, read the DICOM series with tilt='correct'; else resample it",
        )


def three(spacing: Spacing) -> np.ndarray:
    """One voxel size, or three, in mm along x, y and z, (3,)."""
    return np.broadcast_to(np.asarray(spacing, float), 3)


def same_spacing(a: Spacing, b: Spacing) -> bool:
    return bool(np.abs(three(a) - three(b)).max() < 1e-4)


def in_mm(spacing: Spacing) -> str:
    """A voxel size in words, without the unit: 2, or 1×1×3."""
    return by(np.atleast_1d(spacing))


def by(values: Iterable[float], joint: str = "×", digits: str = "g") -> str:
    """Sizes in words: 512×512×134."""
    return joint.join(f"{v:{digits}}" for v in values)


def to_ras(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Reorder axes so that i, j, k grow closest to Right, Anterior, Superior.

    array (a, b, c) with its RAS affine -> C-contiguous (X, Y, Z) and its affine.
    """
    order, signs = _ras_axes(affine)
    _, result = ras_grid(array.shape, affine)
    return np.ascontiguousarray(array.transpose(order)[tuple(slice(None, None, s) for s in signs)]), result


def ras_grid(shape: tuple[int, ...], affine: np.ndarray) -> tuple[tuple[int, ...], np.ndarray]:
    """Shape and affine that `to_ras` gives an array of this shape, without the array."""
    order, signs = _ras_axes(affine)
    turned = tuple(shape[axis] for axis in order)
    result = affine.astype(float).copy()
    result[:3, :3] = affine[:3, order]
    for axis, sign in enumerate(signs):
        if sign < 0:
            result[:3, 3] += result[:3, axis] * (turned[axis] - 1)
            result[:3, axis] *= -1
    return turned, result


def _ras_axes(affine: np.ndarray) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which axis of the file each of i, j, k is, and its direction, 1 or -1.

    Of the 48 signed permutations, the one whose axes align best in sum; for a grid less than 45° oblique
    that is the usual "closest canonical" orientation. It is right-handed: the trace of a mirrored grid is
    at most 1, and one of the others always exceeds that.
    """
    directions = (affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)).tolist()

    def aligned(choice: tuple[tuple[int, ...], tuple[int, ...]]) -> float:
        return sum(directions[axis][choice[0][axis]] * choice[1][axis] for axis in range(3))

    return max(product(permutations(range(3)), product((1, -1), repeat=3)), key=aligned)


def check_numbers(values: np.ndarray, path: str | Path) -> None:
    """Refuse what is not one finite number in every voxel."""
    if values.dtype.kind == "f":
        bad = np.size(values) - int(np.isfinite(values).sum())
        if bad:
            first = np.argwhere(~np.isfinite(values))[0].tolist()
            raise DataError(
                "NaN or infinite voxels",
                path=path,
                found=f"{bad} of {values.size}, the first at index {first}",
                expected="a number in every voxel",
                fix=f"write {AIR} where there is no data, or fetch the file again",
            )
    elif values.dtype.kind not in "iub":
        raise DataError(
            "voxels are not plain numbers",
            path=path,
            found=str(values.dtype),
            expected="one integer or real value per voxel",
            fix="give the original scan, not a colour or complex rendering",
        )


def to_int16(values: np.ndarray, path: str | Path, floor: int = AIR) -> tuple[np.ndarray, int, int]:
    """Round and clip to int16. Returns the array and how many voxels lay below `floor` and above int16."""
    check_numbers(values, path)
    values = np.rint(values) if values.dtype.kind == "f" else values
    low, high = int(values.min()), int(values.max())
    below = int((values < floor).sum()) if low < floor else 0
    above = int((values > 32767).sum()) if high > 32767 else 0
    if below or above:
        values = np.clip(values, floor, 32767)
    return values.astype(np.int16), below, above


def clip_notes(below: int, above: int, floor: int = AIR) -> list[str]:
    """What `to_int16` changed, in words."""
    notes = [f"{below} padding voxels set to {floor}"] if below else []
    return notes + ([f"{above} voxels above 32767 clipped"] if above else [])


def told(notes: Iterable[Iterable[str]]) -> list[str]:
    """What was noted on each of many images as lines for a report: once each, the commonest first."""
    counts = Counter(note for one in notes for note in one)
    return [f"  note on {number} image(s): {note}" for note, number in counts.most_common(5)]
