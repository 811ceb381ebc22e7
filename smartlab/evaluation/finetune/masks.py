"""Predictions for others to open: label volumes on the source scan's own voxels, as NIfTI and DICOM SEG.

The network works on the store's grid, whose axes are those of the scan as `read_volume` gives it.
Probabilities, not labels, are interpolated to the scan's voxels; then axes are put back into the order
of the file. So a prediction overlays the file it was made from, voxel by voxel, oblique or mirrored.

A SEG repeats nothing of the scan's headers but what files it beside the scan: the patient's ID, the
study, the frame of reference and the references to the images. Names, dates and free text stay empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from smartlab.core.errors import DataError
from smartlab.core.files import whole
from smartlab.data.images.grid import LPS_TO_RAS
from smartlab.data.images.readers import Volume
from smartlab.data.images.resample import resample

# What a SEG takes from an image: enough to reference it, and to say where its frames lie.
REFERENCE_TAGS = (
    "SOPClassUID",
    "SOPInstanceUID",
    "SeriesInstanceUID",
    "StudyInstanceUID",
    "FrameOfReferenceUID",
    "PatientID",
    "Modality",
    "Rows",
    "Columns",
    "NumberOfFrames",
    "ImagePositionPatient",
    "ImageOrientationPatient",
    "PixelSpacing",
    "SliceThickness",
    "SpacingBetweenSlices",
)
_GEOMETRY = {  # the same of an enhanced image, by functional group
    "PlanePositionSequence": ("ImagePositionPatient",),
    "PlaneOrientationSequence": ("ImageOrientationPatient",),
    "PixelMeasuresSequence": ("PixelSpacing", "SliceThickness", "SpacingBetweenSlices"),
}
# Required in a SEG, but allowed to be empty.
_EMPTY = (
    "PatientName",
    "PatientBirthDate",
    "PatientSex",
    "StudyDate",
    "StudyTime",
    "StudyID",
    "AccessionNumber",
    "ReferringPhysicianName",
)


def to_source(
    probability: np.ndarray, affine: np.ndarray, volume: Volume, values: Sequence[int]
) -> np.ndarray:
    """Class probabilities on the store's grid -> labels (X, Y, Z) uint8 on the voxels of `volume`.

    probability: (1 + len(values), X', Y', Z'), background first. values: label of each other class.
    Outside the store's crop of the body there is background. Classes are interpolated one by one:
    memory stays at three volumes.
    """
    best = resample(probability[0], affine, volume.shape, volume.affine, kernel="linear", fill=1.0)
    labels = np.zeros(volume.shape, np.uint8)
    for value, share in zip(values, probability[1:], strict=True):
        share = resample(share, affine, volume.shape, volume.affine, kernel="linear")
        wins = share > best
        labels[wins], best[wins] = value, share[wins]
    return labels


def in_file_order(array: np.ndarray, volume: Volume) -> np.ndarray:
    """An array on the voxels of `volume` (RAS+), with its axes as the file has them (`volume.stored`)."""
    stored = volume.affine if volume.stored is None else volume.stored
    turn = np.linalg.inv(stored) @ volume.affine  # RAS index -> index in the file: a signed permutation
    order = np.abs(turn[:3, :3]).argmax(axis=1)
    signs = np.sign(turn[range(3), order]).astype(int)
    flipped = [axis for axis in range(3) if signs[axis] < 0]
    whole = np.zeros((3, 3))
    whole[range(3), order] = signs
    start = [array.shape[order[axis]] - 1 if axis in flipped else 0 for axis in range(3)]
    if not np.allclose(turn[:3], np.column_stack([whole, start]), atol=1e-2):
        raise DataError(
            "the voxels of the scan and of its file are not the same",
            path=volume.source,
            found=np.round(turn[:3], 2).tolist(),
            expected="axes that are only flipped or permuted",
        )
    return np.flip(array.transpose(order), tuple(flipped))


def write_nifti(path: Path, labels: np.ndarray, volume: Volume) -> Path:
    """Labels on the voxels of `volume` -> a NIfTI file in the order and affine of the scan's own file."""
    import nibabel as nib

    stored = volume.affine if volume.stored is None else volume.stored
    image = nib.Nifti1Image(np.ascontiguousarray(in_file_order(labels, volume)), stored)
    image.set_sform(stored, code=1)
    image.set_qform(stored, code=1)
    image.header.set_xyzt_units("mm")
    with whole(path) as temporary:
        nib.save(image, temporary)
    return path


def write_seg(
    path: Path, labels: np.ndarray, volume: Volume, names: Mapping[int, str], series: str | None = None
) -> Path:
    """Labels on the voxels of a DICOM scan -> a DICOM SEG, one segment per structure that was found.

    Segment labels are the names; the frames lie on the scan's planes and reference its images.
    """
    import highdicom as hd
    from pydicom.sr.codedict import codes
    from pydicom.uid import generate_uid

    found = [value for value in names if (labels == value).any()]
    if not found:
        raise DataError(
            "an empty prediction makes no DICOM SEG", path=path, expected="a voxel of any structure"
        )
    images = [_reference(header) for header in _headers(Path(volume.source), series, volume.modality)]
    ordered = in_file_order(labels, volume)  # column, row, slice
    segments = np.zeros(ordered.shape, np.uint8)
    for number, value in enumerate(found, 1):
        segments[ordered == value] = number
    affine = LPS_TO_RAS @ (volume.affine if volume.stored is None else volume.stored)
    placed = hd.Volume(
        np.ascontiguousarray(segments.transpose(2, 1, 0)),
        affine[:, [2, 1, 0, 3]],
        coordinate_system="PATIENT",
        frame_of_reference_uid=images[0].FrameOfReferenceUID,
    )
    algorithm = hd.AlgorithmIdentificationSequence("smartlab", codes.cid7162.ArtificialIntelligence, "1")
    described = [
        hd.seg.SegmentDescription(
            number,
            names[value],
            codes.SCT.AnatomicalStructure,
            codes.SCT.AnatomicalStructure,
            "AUTOMATIC",
            algorithm_identification=algorithm,
        )
        for number, value in enumerate(found, 1)
    ]
    seg = hd.seg.Segmentation(
        images,
        placed,
        "BINARY",
        described,
        series_instance_uid=generate_uid(),
        series_number=900,
        sop_instance_uid=generate_uid(),
        instance_number=1,
        manufacturer="smartlab",
        manufacturer_model_name="smartlab finetune",
        software_versions="1",
        device_serial_number="1",
    )
    with whole(path) as temporary:
        seg.save_as(temporary)
    return path


def is_dicom(path: Path) -> bool:
    """Whether `read_volume` reads this source as DICOM."""
    from smartlab.data.images.readers import _format

    return _format(path) == "dicom"


def _headers(path: Path, series: str | None, modality: str) -> list[Dataset]:
    """The image headers of one series, without pixels."""
    import pydicom

    from smartlab.data.images.dicom import scan_headers

    volumes = scan_headers(path, modality, series).volumes
    chosen = volumes[series] if series in volumes else max(volumes.values(), key=len)
    return [pydicom.dcmread(str(header.filename), stop_before_pixels=True) for header in chosen]


def _reference(header: Dataset) -> Dataset:
    """Only what a SEG must know of an image."""
    kept = Dataset()
    kept.file_meta = header.file_meta
    for keyword in REFERENCE_TAGS:
        if keyword in header:
            setattr(kept, keyword, header.get(keyword))
    for keyword in _EMPTY:
        setattr(kept, keyword, "")
    if "PerFrameFunctionalGroupsSequence" in header:
        kept.SharedFunctionalGroupsSequence = [_groups(header.SharedFunctionalGroupsSequence[0])]
        kept.PerFrameFunctionalGroupsSequence = [_groups(g) for g in header.PerFrameFunctionalGroupsSequence]
    return kept


def _groups(group: Dataset) -> Dataset:
    kept = Dataset()
    for name, keywords in _GEOMETRY.items():
        if name in group:
            item = Dataset()
            for keyword in keywords:
                if keyword in group[name][0]:
                    setattr(item, keyword, group[name][0].get(keyword))
            setattr(kept, name, [item])
    return kept
