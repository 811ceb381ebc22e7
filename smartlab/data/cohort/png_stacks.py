"""Nodules as stacks of small grey PNG slices, in folders CLASS/EXAM/NODULE/k.png.

Such sets are cut from CT and segmented on black; size in mm, position and HU are lost. What is left
is listed as cases (one per nodule, patient = exam, so that nodules of one exam stay together) and
read as volumes. `load_manifest("nodules-png", root=...)` lists any folder of this layout: the classes
are the names of the first folders.

Every slice is read once while listing. A nodule that cannot be used (a slice missing, twice, of
another size, in colour, 16-bit or unreadable) stays in the manifest as an excluded case with the
reason; the others go on.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from smartlab.core.errors import DataError
from smartlab.data.cohort.case import Case, natural

BACKGROUND = -1000  # HU of what is black: air
_NUMBER = re.compile(r"[0-9]+")
_PNG_ERRORS = (OSError, SyntaxError, ValueError, EOFError, zlib.error, struct.error)
_DEPTH = {"I": "16-bit", "I;16": "16-bit", "I;16B": "16-bit", "F": "32-bit", "1": "1-bit"}


def list_stacks(name: str, label: str, root: Path) -> list[Case]:
    """One case for every CLASS/EXAM/NODULE folder below `root`, its class being `label`."""
    found = [(path, path.relative_to(root).parts) for path in _stacks(root)]
    if not found:
        raise DataError(
            f"no PNG stack of {name} found",
            path=root,
            expected="folders CLASS/EXAM/NODULE/ with slices 0.png, 1.png, …",
            fix="give as root the folder that holds the folders of the classes",
        )
    return [
        Case(
            id="/".join(parts),
            patient=parts[1],
            image="/".join(parts),
            labels={label: parts[0]},
            excluded=_problem(path),
        )
        for path, parts in found
    ]


def read_stack(folder: str | Path) -> np.ndarray:
    """The slices of one nodule in the order of their numbers -> (X, Y, Z) uint8, 0 outside the nodule.

    Pixels are taken to be laid out as CT is shown (columns to the patient's left, rows to the back),
    so both are flipped to grow right and forward as everywhere here.
    """
    folder = Path(folder)
    slices = [_read_slice(path) for path in _in_order(folder)]
    for number, pixels in enumerate(slices):
        if pixels.shape != slices[0].shape:
            raise DataError(
                "the slices have different sizes",
                path=folder,
                found=f"{_size(slices[0])} and {_size(pixels)} (slice at position {number})",
            )
    stack = np.stack(slices, axis=-1)  # (rows, columns, slices)
    if not stack.any():
        raise DataError(
            "every pixel is black", path=folder, expected="a nodule segmented on black background"
        )
    return np.ascontiguousarray(stack.transpose(1, 0, 2)[::-1, ::-1])


def to_hounsfield(stack: np.ndarray, grey_hu: tuple[float, float]) -> np.ndarray:
    """Grey values as int16 HU: 0 to 255 becomes `grey_hu`, linearly; black, the background, −1000."""
    low, high = grey_hu
    table = np.rint(low + np.arange(256) * (high - low) / 255).astype(np.int16)
    table[0] = BACKGROUND
    return table[stack]


def _stacks(root: Path) -> Iterator[Path]:
    """Folders three levels down, in natural order; hidden ones and those of archivers are not data."""
    if not root.is_dir():
        raise DataError(
            "no such folder", path=root, fix="set data.root to where the folders of the classes are"
        )
    folders = [root]
    for _ in range(3):
        folders = [below for folder in folders for below in _below(folder)]
    # of a class's own folders all must be nodules; elsewhere (notes, code) those with slices are
    classes = {f.relative_to(root).parts[0] for f in folders if _slices(f)}
    return (f for f in folders if f.relative_to(root).parts[0] in classes)


def _below(folder: Path) -> list[Path]:
    found = [p for p in folder.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))]
    return sorted(found, key=lambda p: natural(p.name))


def _slices(folder: Path) -> list[Path]:
    """PNG files of a folder; hidden ones, as some systems leave beside each file, are not slices."""
    files = (p for p in folder.iterdir() if p.suffix.lower() == ".png" and not p.name.startswith("."))
    return sorted(files, key=lambda p: natural(p.name))


def _in_order(folder: Path) -> list[Path]:
    """The slices by number; none missing, none twice."""
    by_number: dict[int, Path] = {}
    for path in _slices(folder):
        if not _NUMBER.fullmatch(path.stem):
            raise DataError("a slice has no number", path=folder, found=path.name, expected="such as 0.png")
        number = int(path.stem)
        if number in by_number:
            raise DataError(
                f"slice {number} is there twice",
                path=folder,
                found=f"{by_number[number].name} and {path.name}",
            )
        by_number[number] = path
    if not by_number:
        raise DataError("holds no PNG slices", path=folder, expected="0.png, 1.png, …")
    first, last = min(by_number), max(by_number)
    if missing := next((n for n in range(first, last) if n not in by_number), None):
        raise DataError(f"slice {missing} is missing", path=folder, found=f"slices {first} to {last}")
    return [by_number[n] for n in sorted(by_number)]


def _read_slice(path: Path) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(path, formats=("PNG",)) as image:
            mode, pixels = image.mode, np.asarray(image)
    except (*_PNG_ERRORS, Image.DecompressionBombError):
        raise DataError(
            f"slice {path.name} cannot be read", path=path.parent, expected="an 8-bit grey PNG"
        ) from None
    if mode != "L":
        raise DataError(
            f"slice {path.name} is not 8-bit grey",
            path=path.parent,
            found=_DEPTH.get(mode, f"colour ({mode})"),
            expected="an 8-bit grey PNG",
        )
    return pixels


def _problem(folder: Path) -> str | None:
    try:
        read_stack(folder)
    except DataError as error:
        return error.reason
    return None


def _size(pixels: np.ndarray) -> str:
    return f"{pixels.shape[1]}×{pixels.shape[0]}"
