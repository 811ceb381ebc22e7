"""Write phantoms as DICOM: a CT as a series of slices, a mammogram as one image.

The headers carry what readers use and nothing about a person: names and identifiers are synthetic,
there are no dates. UIDs follow from a `key` (seed, patient, grid): the same phantom has the same UIDs
on every machine, another phantom has others.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import (
    UID,
    CTImageStorage,
    DigitalMammographyXRayImageStorageForPresentation,
    ExplicitVRLittleEndian,
    generate_uid,
)

from smartlab.data.phantoms.curve import Array


def uid(*parts: object) -> UID:
    """A DICOM UID that follows from its parts."""
    return UID(generate_uid(entropy_srcs=["smartlab phantom", *map(str, parts)]))


def write_ct_series(
    folder: Path, array: Array, affine: Array, *, patient: str, key: str, kernel: str, padding: int | None
) -> None:
    """One file per slice of a (X, Y, Z) RAS+ int16 volume, head first, supine."""
    folder.mkdir(parents=True)
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    columns, rows, slices = array.shape
    # DICOM counts columns to the patient's left and rows to the back: both run against RAS
    corner = affine @ [columns - 1, rows - 1, 0, 1]
    stored = array[::-1, ::-1].transpose(2, 1, 0)
    for k in range(slices):
        ds = _common(CTImageStorage, patient, key, uid(key, k), uid(key, "series"))
        ds.Modality, ds.ImageType, ds.BodyPartExamined = "CT", ["ORIGINAL", "PRIMARY", "AXIAL"], "CHEST"
        ds.SeriesNumber, ds.InstanceNumber, ds.AcquisitionNumber = 1, slices - k, 1
        ds.FrameOfReferenceUID, ds.PositionReferenceIndicator = uid(key, "frame"), ""
        ds.PatientPosition, ds.ImageOrientationPatient = "HFS", [1, 0, 0, 0, 1, 0]
        ds.ImagePositionPatient = [_ds(-corner[0]), _ds(-corner[1]), _ds(corner[2] + k * spacing[2])]
        ds.PixelSpacing, ds.SliceThickness = [_ds(spacing[1]), _ds(spacing[0])], _ds(spacing[2])
        ds.KVP, ds.ConvolutionKernel = "120", "B30f" if kernel == "soft" else "B60f"
        ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "HU"
        ds.WindowCenter, ds.WindowWidth = "40", "400"
        _pixels(ds, stored[k], bits=16, signed=True)
        if padding is not None:
            ds.add_new(0x00280120, "SS", padding)  # PixelPaddingValue
        ds.save_as(folder / f"{slices - k:04d}.dcm", enforce_file_format=True)


def write_mammogram(
    path: Path,
    image: Array,
    *,
    patient: str,
    key: str,
    laterality: str,
    view: str,
    spacing: float,
    monochrome: int,
) -> None:
    """A 12-bit mammogram for presentation; `image` (rows, columns) bright where tissue is dense."""
    ds = _common(
        DigitalMammographyXRayImageStorageForPresentation,
        patient,
        key,
        uid(key, view),
        uid(key, view, "series"),
    )
    ds.Modality, ds.ImageType, ds.BodyPartExamined = "MG", ["DERIVED", "PRIMARY"], "BREAST"
    ds.SeriesNumber, ds.InstanceNumber, ds.PatientSex = 1, 1, "F"
    ds.PresentationIntentType, ds.ViewPosition, ds.ImageLaterality = "FOR PRESENTATION", view, laterality
    towards = "P" if laterality == "R" else "A"  # the chest wall is on the right of a right breast
    down = ("F" if view == "MLO" else "L") if laterality == "R" else ("F" if view == "MLO" else "R")
    ds.PatientOrientation = [towards, down]
    ds.ImagerPixelSpacing, ds.PixelSpacing = [_ds(spacing)] * 2, [_ds(spacing)] * 2
    ds.PixelIntensityRelationship, ds.PixelIntensityRelationshipSign = "LOG", 1 if monochrome == 1 else -1
    ds.RescaleIntercept, ds.RescaleSlope, ds.RescaleType = "0", "1", "US"
    ds.PresentationLUTShape = "INVERSE" if monochrome == 1 else "IDENTITY"
    ds.BurnedInAnnotation, ds.LossyImageCompression = "NO", "00"
    ds.WindowCenter, ds.WindowWidth = "2048", "4096"
    _pixels(ds, 4095 - image if monochrome == 1 else image, bits=12, signed=False, monochrome=monochrome)
    path.parent.mkdir(parents=True, exist_ok=True)
    ds.save_as(path, enforce_file_format=True)


def _ds(value: float) -> str:
    """A decimal string of at most 16 characters."""
    return f"{float(value):.6f}".rstrip("0").rstrip(".")


def _common(storage: UID, patient: str, key: str, instance: UID, series: UID) -> Dataset:
    ds, meta = Dataset(), FileMetaDataset()
    meta.MediaStorageSOPClassUID = ds.SOPClassUID = storage
    meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = instance
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta = meta
    ds.PatientID, ds.PatientName = patient, "phantom"
    ds.PatientBirthDate = ds.PatientSex = ds.StudyDate = ds.StudyTime = ds.StudyID = ds.AccessionNumber = ""
    ds.ReferringPhysicianName = ""
    ds.StudyInstanceUID, ds.SeriesInstanceUID = uid(key, "study"), series
    ds.Manufacturer, ds.ManufacturerModelName = "smartlab", "phantom"
    return ds


def _pixels(ds: Dataset, image: Array, *, bits: int, signed: bool, monochrome: int = 2) -> None:
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, f"MONOCHROME{monochrome}"
    ds.Rows, ds.Columns = image.shape
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, bits, bits - 1, int(signed)
    ds.PixelData = np.ascontiguousarray(image, "<i2" if signed else "<u2").tobytes()
