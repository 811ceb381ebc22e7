"""Mammograms for tests: phantom images written as the DICOM, PNG and TIFF files that clinics and archives have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless

from smartlab.data.phantoms import breast, mammo
from smartlab.data.phantoms.dicom import write_mammogram
from smartlab.data.phantoms.grid import Grid

GRID = Grid((256, 192), 1.0, "dicom")
ENCODED = {"jpeg2000": JPEG2000Lossless, "jpegls": JPEGLSLossless, "rle": RLELossless}


def image(side: str = "L", view: str = "MLO", index: int = 0) -> np.ndarray:
    """A rendered phantom of one side, (256, 192) uint16 0 to 4095."""
    found = [p for p in (breast.draw_patient(0, i) for i in range(60)) if p.laterality == side and p.masses]
    return mammo.render(found[index], view, GRID)[0]


def write(
    path: Path, array: np.ndarray | None = None, monochrome: int = 2, side: str = "L"
) -> pydicom.Dataset:
    """A phantom mammogram as DICOM on disk, and its dataset to be changed and saved again."""
    array = image(side) if array is None else array
    about: dict[str, Any] = {"patient": "p", "key": "test", "laterality": side, "view": "MLO", "spacing": 1.0}
    write_mammogram(path, array, monochrome=monochrome, **about)
    return pydicom.dcmread(path)


def rewrite(header: pydicom.Dataset, array: np.ndarray, bits: int, signed: bool = False) -> None:
    """Replace the pixels, in so many bits."""
    header.Rows, header.Columns = array.shape[-2:] if array.shape[-1] != 3 else array.shape[:2]
    header.BitsAllocated = 8 if bits == 8 else 16
    header.BitsStored, header.HighBit, header.PixelRepresentation = bits, bits - 1, int(signed)
    kind = "u1" if bits == 8 else "<i2" if signed else "<u2"
    header.PixelData = np.ascontiguousarray(array, kind).tobytes()
    if bits == 8:
        header["PixelData"].VR = "OB"


def compressed(path: Path, header: pydicom.Dataset, syntax: str) -> Path:
    """The same image, encoded."""
    header.compress(ENCODED[syntax])
    header.save_as(path, enforce_file_format=True)
    return path


def jpeg_lossless(path: Path, header: pydicom.Dataset) -> Path:
    """The same image in JPEG lossless, encoded by ITK, under the mammogram's own header."""
    import SimpleITK as sitk

    encoded = path.with_name("itk.dcm")
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(encoded))
    writer.SetUseCompression(True)
    writer.SetCompressor("JPEG")
    writer.Execute(sitk.GetImageFromArray(header.pixel_array[None]))
    from_itk = pydicom.dcmread(encoded)
    header.PixelData = from_itk.PixelData
    header["PixelData"].is_undefined_length = True
    header.file_meta.TransferSyntaxUID = from_itk.file_meta.TransferSyntaxUID
    header.save_as(path, enforce_file_format=True)
    return path
