"""Read mammograms: one DICOM, PNG or TIFF image -> 12-bit grey values, brighter where tissue is denser.

- DICOM of 8 to 16 bit, plain or compressed (JPEG 2000, lossless JPEG, JPEG-LS, RLE), MONOCHROME1
  (inverted, so that all images mean the same) and MONOCHROME2. How stored values become grey values is in
  `grey.py`.
- Colour images are taken where all channels are equal, as exports of grey images are; a coloured one
  has marks burnt in and is refused. So are stacks (tomosynthesis), other modalities and files without pixels.
- Nothing is erased: the pectoral muscle, labels, tape and clips stay in the image.
- Spacing is that at the detector, which every digital mammogram states; scanned film, PNG and TIFF often
  have none. Magnified views are not corrected.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from PIL import Image, UnidentifiedImageError
from pydicom.dataset import Dataset
from pydicom.errors import InvalidDicomError

from smartlab.core.errors import DataError, one_of
from smartlab.data.images import grey as levels

PICTURES = (".png", ".tif", ".tiff")
_WHITE_IS_ZERO, _PHOTOMETRIC = 0, 262  # of TIFF
_PIXEL_FAULTS = (AttributeError, ValueError, RuntimeError, NotImplementedError, KeyError, TypeError, EOFError)


@dataclass(frozen=True)
class Mammogram:
    """One view.

    array:       (rows, columns) uint16, brighter = denser; 0 to 4095 unless read as "stored".
    spacing_mm:  between rows, between columns; NaN where the file gives none.
    laterality:  "L", "R" or "" where the header does not say; view: "CC", "MLO", … or "".
    notes:       what was changed on the way, free of PHI.
    """

    array: np.ndarray
    spacing_mm: tuple[float, float]
    laterality: str
    view: str
    notes: tuple[str, ...] = ()


def read_mammogram(path: str | Path, grey: str = "voi") -> Mammogram:
    """Read one mammogram.

    grey: "voi"         the display window of the file, its VOI LUT; percentiles where it has none;
          "percentile"  black and white at the 0.5th and 99.5th percentile of the breast;
          "stored"      no window: the stored values, inverted where they are MONOCHROME1.

    >>> read_mammogram("images/mg-0000-L-CC.dcm").spacing_mm
    (1.0, 1.0)
    """
    one_of("unknown grey setting", grey, levels.MODES)
    pixels, header, notes = read_pixels(path)
    modality = header.get("Modality", "MG")
    if modality != "MG":
        raise DataError("is not a mammogram", path=path, found=f"modality {modality}", expected="MG")
    if header.get("PresentationIntentType") == "FOR PROCESSING":
        notes.append("raw detector values (FOR PROCESSING), not made for display")
    array, more = levels.to_grey(pixels, header, grey, path)
    spacing, about = _spacing(header, path)
    return Mammogram(
        array=array,
        spacing_mm=spacing,
        laterality=_word(header, "ImageLaterality", "Laterality"),
        view=_word(header, "ViewPosition"),
        notes=(*notes, *more, *about),
    )


def only(source: Path, files: Sequence[Path]) -> Path:
    """The one image of a mammogram; a folder is a series."""
    if len(files) != 1:
        raise DataError(
            "the series should be one mammogram", path=source, found=f"{len(files)} files", expected="one"
        )
    return files[0]


def read_pixels(path: str | Path) -> tuple[np.ndarray, Dataset, list[str]]:
    """The stored values (rows, columns) of one image, its header (empty for PNG and TIFF), and notes."""
    path = Path(path)
    if not path.is_file():
        raise DataError("no such file", path=path, expected="one mammogram: DICOM, PNG or TIFF")
    if path.suffix.lower() in PICTURES:
        return _read_picture(path)
    try:
        header = pydicom.dcmread(path)
    except (InvalidDicomError, EOFError, ValueError) as error:
        raise DataError(
            "cannot be read as DICOM", path=path, found=error, fix="fetch the file again"
        ) from None
    _refuse_stack(int(header.get("NumberOfFrames") or 1), path)
    if not any(word in header for word in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise DataError(
            "has no pixels",
            path=path,
            found=f"a DICOM object of modality {header.get('Modality', 'unknown')} without pixel data",
            expected="one image",
            fix="leave it out of the manifest, or fetch the image itself",
        )
    photometric = str(header.get("PhotometricInterpretation", "missing"))
    if not photometric.startswith(("MONOCHROME", "RGB", "YBR")):
        raise DataError(
            "has a photometric interpretation that no mammogram has",
            path=path,
            found=photometric,
            expected="MONOCHROME1 or MONOCHROME2",
            fix="export the image again as grey values",
        )
    try:
        pixels = header.pixel_array  # colour comes as RGB
    except _PIXEL_FAULTS as error:
        raise DataError(
            "has no readable pixels",
            path=path,
            found=f"{header.file_meta.get('TransferSyntaxUID', pydicom.uid.UID('')).name}: {error}",
            fix="fetch the file again, or install the decoder the message names",
        ) from None
    pixels, notes = _one_channel(pixels, path)
    if notes:
        header.PhotometricInterpretation = "MONOCHROME2"
    return pixels, header, notes


def _read_picture(path: Path) -> tuple[np.ndarray, Dataset, list[str]]:
    """PNG or TIFF of 8 or 16 bit."""
    try:
        with Image.open(path) as image:
            _refuse_stack(getattr(image, "n_frames", 1), path)
            inverted = getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO
            inverted = inverted and image.mode.startswith("I")  # PIL inverts those of 8 bit itself
            pixels = np.asarray(image.convert("RGB") if image.mode in ("P", "CMYK", "YCbCr") else image)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            "cannot be read as an image", path=path, found=type(error).__name__, fix="fetch the file again"
        ) from None
    if pixels.dtype == bool:
        pixels = pixels.astype(np.uint8) * 255
    pixels, notes = _one_channel(pixels, path)
    if pixels.dtype.kind not in "ui" or pixels.min() < 0 or pixels.max() > 65535:
        raise DataError(
            "grey values do not fit 16 bits",
            path=path,
            found=f"{pixels.dtype}, {pixels.min():g} to {pixels.max():g}",
            expected="whole numbers from 0 to 65535",
        )
    header = Dataset()
    header.BitsStored = 8 if pixels.dtype == np.uint8 else 16
    header.PhotometricInterpretation = "MONOCHROME1" if inverted else "MONOCHROME2"
    return pixels.astype(np.uint16), header, notes


def _refuse_stack(frames: int, path: Path) -> None:
    if frames > 1:
        raise DataError(
            "is a stack of images, such as tomosynthesis",
            path=path,
            found=f"{frames} frames",
            expected="one image",
            fix="use the full-field or the synthetic 2D view of the same exam",
        )


def _one_channel(pixels: np.ndarray, path: Path) -> tuple[np.ndarray, list[str]]:
    """(rows, columns) of grey or equal colour channels; an alpha channel says nothing about tissue."""
    if pixels.ndim == 2:
        return pixels, []
    colours = pixels[..., : 3 if pixels.shape[-1] > 2 else 1] if pixels.ndim == 3 else pixels
    if pixels.ndim != 3 or pixels.shape[-1] > 4:
        raise DataError(
            "is not one grey image", path=path, found=f"shape {pixels.shape}", expected="rows × columns"
        )
    apart = int(np.ptp(colours.astype(np.int32), axis=-1).max())
    if apart > 2:  # lossy YBR rounds grey by one or two
        raise DataError(
            "is a colour image",
            path=path,
            found=f"channels that differ by up to {apart}",
            expected="one grey channel, or equal ones",
            fix="export it without coloured marks",
        )
    return colours[..., 0], [f"{pixels.shape[-1]} equal colour channels taken as grey"]


def _spacing(header: Dataset, path: str | Path) -> tuple[tuple[float, float], list[str]]:
    value: Any = header.get("ImagerPixelSpacing") or header.get("PixelSpacing")
    if not value:
        return (np.nan, np.nan), ["no pixel spacing in the file"]
    rows, columns = (float(v) for v in value)
    if not (0 < rows < np.inf and 0 < columns < np.inf):
        raise DataError(
            "has an impossible pixel spacing", path=path, found=list(value), expected="mm above zero"
        )
    return (rows, columns), []


def _word(header: Dataset, *names: str) -> str:
    """A coded value from a short list of codes; anything else could be free text."""
    value = next((str(header[name].value or "") for name in names if name in header), "").upper()
    return value if value in ("L", "R", "CC", "MLO", "ML", "LM", "LMO", "XCCL", "XCCM", "FB", "SIO") else ""
