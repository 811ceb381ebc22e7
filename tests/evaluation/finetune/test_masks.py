"""A prediction lies on the voxels of the file it was made from: oblique, mirrored, NIfTI or DICOM."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartlab import read_volume
from smartlab.core.errors import DataError
from smartlab.data.images.dicom_masks import read_mask
from smartlab.data.images.readers import Volume, read_labels
from smartlab.data.images.resample import resample, target_grid
from smartlab.evaluation.finetune import masks
from tests.data.dicom_factory import AXIAL, scan, write_series

ORIENTATIONS = [
    (order, signs)
    for order in itertools.permutations(range(3))
    for signs in itertools.product((1, -1), repeat=3)
]
SPACING = (0.9, 1.3, 3.1)


def oblique(order, signs, degrees=0.0):
    """An affine with these axes, unequal voxels, turned about two axes."""
    a, b = np.radians(degrees), np.radians(degrees / 2)
    turn_z = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]])
    turn_x = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    affine = np.eye(4)
    affine[:3, :3] = turn_x @ turn_z @ np.eye(3)[:, order] * signs * SPACING
    affine[:3, 3] = (-40.0, 25.0, 60.0)
    return affine


def ellipsoid(shape, affine, radii=(8, 11, 13)):
    """(bool array, its world centre): an ellipsoid off the middle of a grid, defined in world mm."""
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    world = index @ affine[:3, :3].T + affine[:3, 3]
    centre = affine[:3, :3] @ (np.array(shape) * (0.54, 0.46, 0.52)) + affine[:3, 3]
    return (((world - centre) / radii) ** 2).sum(-1) <= 1, centre


def centre_of(path, value=1):
    """Centre of a label in RAS mm, by nibabel alone."""
    image = nib.load(path)
    index = np.argwhere(np.asanyarray(image.dataobj) == value)
    return nib.affines.apply_affine(image.affine, index).mean(0)


@settings(max_examples=25, deadline=None)
@given(orientation=st.sampled_from(ORIENTATIONS), degrees=st.floats(-25, 25))
def test_a_nifti_prediction_overlays_its_source_in_any_orientation(tmp_path_factory, orientation, degrees):
    folder = tmp_path_factory.mktemp("o")
    shape = (46, 40, 24)
    affine = oblique(*orientation, degrees)
    truth, centre = ellipsoid(shape, affine)
    nib.save(nib.Nifti1Image(np.where(truth, 60, -900).astype(np.int16), affine), folder / "scan.nii.gz")
    volume = read_volume(folder / "scan.nii.gz")
    # the store's view of it: 2 mm, cropped, and a network that is sure of what it sees
    grid, placed = target_grid(volume.shape, volume.affine, 2.0)
    share = resample((volume.array > 0).astype(np.float32), volume.affine, grid, placed, kernel="linear")
    crop = share[2:, 1:, :-1]
    placed[:3, 3] += placed[:3, :3] @ (2, 1, 0)
    labels = masks.to_source(np.stack([1 - crop, crop]), placed, volume, [7])
    masks.write_nifti(folder / "said.nii.gz", labels, volume)
    said = nib.load(folder / "said.nii.gz")
    assert said.shape == shape and said.header.get_xyzt_units()[0] == "mm"
    assert np.allclose(said.affine, nib.load(folder / "scan.nii.gz").affine, atol=1e-4)
    assert np.linalg.norm(centre_of(folder / "said.nii.gz", 7) - centre) < 0.7
    array = np.asanyarray(said.dataobj) == 7
    assert 2 * (array & truth).sum() / (array.sum() + truth.sum()) > 0.9  # at 3.1 mm voxels
    again = read_labels(folder / "said.nii.gz")
    assert np.array_equal(again.array, labels) and np.allclose(again.affine, volume.affine, atol=1e-4)


def test_labels_put_back_in_file_order_are_the_file(tmp_path):
    for order, signs in ORIENTATIONS:
        array = np.arange(4 * 5 * 6, dtype=np.int16).reshape(4, 5, 6)
        nib.save(nib.Nifti1Image(array, oblique(order, signs, 10)), tmp_path / "a.nii")
        volume = read_volume(tmp_path / "a.nii")
        assert np.array_equal(masks.in_file_order(volume.array, volume), array)


def test_a_scan_whose_file_has_other_voxels_is_refused():
    stored = np.diag([2.0, 2.0, 2.0, 1.0])
    volume = Volume(np.zeros((4, 4, 4), np.int16), np.eye(4), stored=stored)
    with pytest.raises(DataError, match="not the same"):
        masks.in_file_order(volume.array, volume)


@pytest.mark.parametrize("orientation", [AXIAL, (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)])
@pytest.mark.parametrize("step", [2.5, -2.5])
def test_a_dicom_seg_gives_back_the_labels_on_the_planes_of_the_scan(tmp_path, orientation, step):
    files = write_series(tmp_path / "ct", scan(), orientation=orientation, step=step)
    volume = read_volume(tmp_path / "ct")
    labels = np.zeros(volume.shape, np.uint8)
    labels[1:4, 2:5, 2:6], labels[5:7, 1:3, 1:4] = 3, 8
    path = masks.write_seg(tmp_path / "seg.dcm", labels, volume, {3: "liver", 5: "absent", 8: "tumour"})
    for value, name in ((3, "liver"), (8, "tumour")):
        assert np.array_equal(read_mask(path, volume, name).array, labels == value)
    seg = pydicom.dcmread(path)
    assert seg.SOPClassUID.name == "Segmentation Storage" and seg.Modality == "SEG"
    assert [s.SegmentLabel for s in seg.SegmentSequence] == ["liver", "tumour"]
    first = pydicom.dcmread(files[0])
    assert seg.StudyInstanceUID == first.StudyInstanceUID
    assert seg.FrameOfReferenceUID == first.FrameOfReferenceUID
    known = {pydicom.dcmread(f).SOPInstanceUID for f in files}
    referenced = {
        i.ReferencedSOPInstanceUID for i in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence
    }
    assert referenced and referenced <= known


def test_a_dicom_seg_repeats_no_names_dates_or_texts_of_the_scan(tmp_path):
    files = write_series(tmp_path / "ct", scan())
    secrets = {
        "PatientName": "Doe^Secretname",
        "PatientBirthDate": "19500203",
        "AccessionNumber": "ACC4711",
        "ReferringPhysicianName": "Brown^Referrer",
        "StudyDate": "20010203",
        "StudyDescription": "free text of a study",
        "SeriesDescription": "free text of a series",
        "InstitutionName": "Some Hospital",
        "PatientComments": "comments",
    }
    for file in files:
        header = pydicom.dcmread(file)
        for keyword, value in secrets.items():
            setattr(header, keyword, value)
        header.save_as(file)
    volume = read_volume(tmp_path / "ct")
    path = masks.write_seg(
        tmp_path / "seg.dcm", (volume.array > volume.array.mean()).astype(np.uint8), volume, {1: "x"}
    )
    content = path.read_bytes()
    for value in secrets.values():
        for part in value.split("^"):
            assert part.encode() not in content, part
    assert pydicom.dcmread(path).PatientID == pydicom.dcmread(files[0]).PatientID  # files it beside the scan


def test_an_empty_prediction_makes_no_seg(tmp_path):
    write_series(tmp_path / "ct", scan())
    volume = read_volume(tmp_path / "ct")
    with pytest.raises(DataError, match="empty prediction"):
        masks.write_seg(tmp_path / "seg.dcm", np.zeros(volume.shape, np.uint8), volume, {1: "liver"})
    assert not (tmp_path / "seg.dcm").exists()


def test_a_seg_of_an_enhanced_multiframe_scan(tmp_path):
    from tests.data.dicom_factory import write_enhanced

    file = write_enhanced(tmp_path / "ct.dcm", scan())
    volume = read_volume(file)
    labels = np.zeros(volume.shape, np.uint8)
    labels[2:5, 1:4, 1:5] = 1
    path = masks.write_seg(tmp_path / "seg.dcm", labels, volume, {1: "liver"})
    assert np.array_equal(read_mask(path, volume, "liver").array, labels)
