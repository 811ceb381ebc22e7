"""Read mammograms: one DICOM image -> grey values, brighter where tissue is denser.

MONOCHROME1 images (bright where little was absorbed) are inverted, so that all images mean the same.
Pixel spacing is that at the detector, which every digital mammogram states; scanned film may have none.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pydicom
from pydicom.errors import InvalidDicomError

from smartlab.errors import DataError


@dataclass(frozen=True)
class Mammogram:
    """One view.

    array:       (rows, columns) uint16, brighter = denser.
    spacing_mm:  between rows, between columns; NaN where the header gives none (scanned film).
    laterality:  "L", "R" or "" where the header does not say; view: "CC", "MLO", … or "".
    notes:       what was changed on the way, free of PHI.
    """

    array: np.ndarray
    spacing_mm: tuple[float, float]
    laterality: str
    view: str
    notes: tuple[str, ...] = ()


def read_mammogram(path: str | Path) -> Mammogram:
    """Read one DICOM mammogram.

    >>> read_mammogram("images/mg-0000-L-CC.dcm").spacing_mm          # doctest: +SKIP
    (0.25, 0.25)
    """
    path = Path(path)
    if not path.is_file():
        raise DataError("no such file", path=path, expected="one DICOM mammogram")
    try:
        header = pydicom.dcmread(path)
    except (InvalidDicomError, EOFError) as error:
        raise DataError(
            "cannot be read as DICOM", path=path, found=error, fix="fetch the file again"
        ) from None
    if header.get("Modality") != "MG":
        raise DataError(
            "is not a mammogram", path=path, found=f"modality {header.get('Modality')}", expected="MG"
        )
    try:
        pixels = header.pixel_array
    except (AttributeError, ValueError, RuntimeError) as error:
        raise DataError(
            "has no readable pixels", path=path, found=error, fix="fetch the file again"
        ) from None
    if pixels.ndim != 2 or (pixels.dtype != np.uint16 and pixels.dtype != np.uint8):
        raise DataError(
            "is not one grey image",
            path=path,
            found=f"{pixels.dtype} {pixels.shape}",
            expected="uint16 rows × columns",
        )
    notes = []
    if header.PhotometricInterpretation == "MONOCHROME1":
        pixels = (1 << int(header.BitsStored)) - 1 - pixels.astype(np.int32)
        notes.append("MONOCHROME1 inverted")
    spacing = header.get("ImagerPixelSpacing") or header.get("PixelSpacing")
    if not spacing:
        spacing = (np.nan, np.nan)
        notes.append("no pixel spacing in the header")
    elif min(float(v) for v in spacing) <= 0:
        raise DataError(
            "has an impossible pixel spacing", path=path, found=list(spacing), expected="mm above zero"
        )
    return Mammogram(
        array=np.ascontiguousarray(pixels, np.uint16),
        spacing_mm=(float(spacing[0]), float(spacing[1])),
        laterality=str(header.get("ImageLaterality") or header.get("Laterality") or ""),
        view=str(header.get("ViewPosition") or ""),
        notes=tuple(notes),
    )
