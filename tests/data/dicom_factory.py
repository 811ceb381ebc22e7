"""Write small synthetic scans, good and bad, for the reader tests.

Arrays here are (slices, rows, columns) in HU, as DICOM and SimpleITK order them.
"""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import SimpleITK as sitk
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

CT, ENHANCED_CT = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.2.1"
SECONDARY = "1.2.840.10008.5.1.4.1.1.7"
AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
ANGLES = st.tuples(*[st.floats(-180, 180)] * 3)  # degrees about x, y, z
tmp_ok = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])


def scan(slices: int = 6, rows: int = 10, columns: int = 12, seed: int = 0) -> np.ndarray:
    """A random int16 scan in HU: every voxel is recognisable."""
    shape = (slices, rows, columns)
    return np.random.default_rng(seed).integers(-1000, 2000, shape).astype(np.int16)


def _header(sop_class: str, series_uid: str, shape: tuple[int, ...], modality: str) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.file_meta.MediaStorageSOPClassUID = ds.SOPClassUID = UID(sop_class)
    ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPInstanceUID = generate_uid()
    ds.SeriesInstanceUID, ds.StudyInstanceUID, ds.FrameOfReferenceUID = series_uid, "1.2.3", "1.2.3.4"
    ds.PatientName, ds.PatientID, ds.StudyID = "Doe^Jane", "secret-id", ""
    ds.PatientBirthDate = ds.PatientSex = ds.StudyDate = ds.StudyTime = ds.AccessionNumber = ""
    ds.ReferringPhysicianName = ds.Manufacturer = ""
    ds.SeriesNumber, ds.InstanceNumber = 1, 1
    ds.Modality, ds.ImageType = modality, ["ORIGINAL", "PRIMARY", "AXIAL"]
    ds.Rows, ds.Columns = shape[-2:]
    ds.SamplesPerPixel, ds.PhotometricInterpretation = 1, "MONOCHROME2"
    ds.BitsAllocated, ds.BitsStored, ds.HighBit, ds.PixelRepresentation = 16, 16, 15, 1
    return ds


def _positions(n: int, orientation, origin, step: float, drift) -> np.ndarray:
    """(n, 3) along the slice normal from `origin`, drifting by mm (along rows, columns) per slice."""
    across, down = np.array(orientation[:3]), np.array(orientation[3:])
    each = step * np.cross(across, down) + drift[0] * across + drift[1] * down
    return np.array(origin) + np.arange(n)[:, None] * each


def _ds(values) -> list[str]:
    return [f"{v:.8g}" for v in np.atleast_1d(values)]


def write_series(
    folder: Path,
    hu: np.ndarray,
    *,
    uid: str | None = None,
    spacing=(0.8, 0.7),
    step: float = 2.5,
    orientation=AXIAL,
    origin=(-10.0, -20.0, 30.0),
    drift=(0.0, 0.0),
    intercept=-1024.0,
    slope=1.0,
    modality: str = "CT",
    sop_class: str = CT,
    syntax: str | None = None,
    name: Callable[[int], str] = "{:03d}.dcm".format,
    edit: Callable[[Dataset, int], None] | None = None,
) -> list[Path]:
    """A classic single-frame series; `edit(dataset, i)` may spoil a slice before it is saved."""
    folder.mkdir(parents=True, exist_ok=True)
    uid, files = uid or generate_uid(), []
    places = _positions(len(hu), orientation, origin, step, drift)
    for i, plane in enumerate(hu):
        ds = _header(sop_class, uid, plane.shape, modality)
        ds.InstanceNumber, ds.SliceThickness = i + 1, "9.0"  # thickness deliberately not the spacing
        ds.PixelSpacing, ds.ImageOrientationPatient = _ds(spacing), _ds(orientation)
        ds.ImagePositionPatient = _ds(places[i])
        per_slice = (np.broadcast_to(v, len(hu))[i] for v in (slope, intercept))
        ds.RescaleSlope, ds.RescaleIntercept = (_ds(v)[0] for v in per_slice)
        stored = (plane - float(ds.RescaleIntercept)) / float(ds.RescaleSlope)
        ds.PixelData = np.rint(stored).astype(np.int16).tobytes()
        if syntax is not None:
            ds.compress(UID(syntax), generate_instance_uid=False)
        if edit is not None:
            edit(ds, i)
        files.append(folder / name(i))
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        ds.save_as(files[-1], enforce_file_format=True)
    return files


def write_enhanced(
    file: Path,
    hu: np.ndarray,
    *,
    spacing=(0.8, 0.7),
    step: float = 2.5,
    orientation=AXIAL,
    origin=(-10.0, -20.0, 30.0),
    order=None,
    edit: Callable[[Dataset], None] | None = None,
) -> Path:
    """One enhanced multi-frame CT file, its frames stored in `order`."""

    def item(**values) -> list[Dataset]:
        ds = Dataset()
        for key, value in values.items():
            setattr(ds, key, value)
        return [ds]

    order = range(len(hu)) if order is None else order
    ds = _header(ENHANCED_CT, generate_uid(), hu.shape, "CT")
    ds.NumberOfFrames, ds.ImageType = len(order), ["ORIGINAL", "PRIMARY", "VOLUME", "NONE"]
    places = _positions(len(hu), orientation, origin, step, (0, 0))
    ds.SharedFunctionalGroupsSequence = item(
        PixelMeasuresSequence=item(PixelSpacing=_ds(spacing), SliceThickness="9.0"),
        PlaneOrientationSequence=item(ImageOrientationPatient=_ds(orientation)),
    )
    intercepts = [-1024 - i for i in range(len(hu))]  # differs from frame to frame
    ds.PerFrameFunctionalGroupsSequence = [
        item(
            PlanePositionSequence=item(ImagePositionPatient=_ds(places[i])),
            PixelValueTransformationSequence=item(
                RescaleSlope="1", RescaleIntercept=str(intercepts[i]), RescaleType="HU"
            ),
        )[0]
        for i in order
    ]
    ds.PixelData = b"".join((hu[i] - intercepts[i]).astype(np.int16).tobytes() for i in order)
    if edit is not None:
        edit(ds)
    ds.save_as(file, enforce_file_format=True)
    return file


def write_nifti(file: Path, values: np.ndarray, affine=None, **header) -> Path:
    """NIfTI with both forms set; `header` fields are written last, as a damaged header has them."""
    affine = np.diag([-0.7, -0.8, 2.5, 1.0]) if affine is None else affine
    image = nib.Nifti1Image(values, affine)
    image.set_qform(affine, 1)
    image.set_sform(affine, 1)
    raw = bytearray(image.to_bytes())
    damaged = nib.Nifti1Header(bytes(raw[:348]), check=False)
    for key, value in header.items():
        damaged[key] = value
    raw[:348] = damaged.binaryblock
    if file.suffix == ".gz":
        raw = bytearray(gzip.compress(bytes(raw)))
    file.write_bytes(raw)
    return file


def itk_image(hu: np.ndarray, spacing=(0.7, 0.8, 2.5), origin=(-10.0, -20.0, 30.0), direction=None):
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    if direction is not None:
        image.SetDirection(np.asarray(direction, float).ravel().tolist())
    return image


def itk_series(folder: Path):
    """The folder as SimpleITK's own series reader gives it."""
    reader = sitk.ImageSeriesReader()
    reader.SetFileNames(reader.GetGDCMSeriesFileNames(str(folder)))
    return reader.Execute()


def assert_same_world(image, volume, n: int = 300, tolerance: float = 1e-2) -> None:
    """Random voxels of an ITK image lie at the same world point in `volume`, with the same value."""
    rng = np.random.default_rng(1)
    assert sorted(image.GetSize()) == sorted(volume.shape)
    affine = np.eye(4)
    affine[:3, :3] = np.array(image.GetDirection()).reshape(3, 3) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    index = rng.integers(0, image.GetSize(), (n, 3))
    check = image.TransformIndexToPhysicalPoint(index[0].tolist())  # the affine above is ITK's own
    assert np.allclose(check, affine[:3, :3] @ index[0] + affine[:3, 3])
    world = index @ (LPS_TO_RAS @ affine)[:3, :3].T + (LPS_TO_RAS @ affine)[:3, 3]
    ours = volume.to_index(world)
    assert np.abs(ours - np.rint(ours)).max() < tolerance
    i, j, k = np.rint(ours).astype(int).T
    theirs = sitk.GetArrayViewFromImage(image)[index[:, 2], index[:, 1], index[:, 0]]
    expected = np.clip(np.rint(np.asarray(theirs, float)), -1024, 32767)
    assert np.array_equal(volume.array[i, j, k], expected)


def assert_ras(volume) -> None:
    """The contract of `Volume`: int16, C-contiguous, right-handed, closest to RAS+."""
    assert volume.array.dtype == np.int16 and volume.array.flags.c_contiguous
    assert np.linalg.det(volume.affine[:3, :3]) > 0
    directions = volume.affine[:3, :3] / np.array(volume.spacing)
    assert np.trace(directions) > 1.0 - 1e-9
