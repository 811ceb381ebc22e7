"""A SEG or RTSTRUCT becomes exactly the voxels it was drawn on, whatever the orientation."""

from __future__ import annotations

from pathlib import Path

import highdicom as hd
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.path import Path as Outline
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sr.codedict import codes
from pydicom.uid import generate_uid

from smartlab import read_volume
from smartlab.core.errors import DataError
from smartlab.data.images.dicom import HeaderTextError
from smartlab.data.images.dicom_masks import fill_even_odd, read_mask
from tests.data.dicom_factory import AXIAL, _header, scan, write_series

SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"


def write_seg(file: Path, sources: list[Path], masks: dict[str, np.ndarray]) -> Path:
    """Masks (slices, rows, columns) in the order of `sources`."""
    algorithm = hd.AlgorithmIdentificationSequence("test", codes.cid7162.ArtificialIntelligence, "1")
    segments = [
        hd.seg.SegmentDescription(
            n, label, codes.SCT.Tissue, codes.SCT.Tissue, "AUTOMATIC", algorithm_identification=algorithm
        )
        for n, label in enumerate(masks, 1)
    ]
    pixels = np.stack(list(masks.values()), axis=-1).astype(np.uint8)
    datasets = [dcmread(f) for f in sources]
    uids = generate_uid(), 2, generate_uid(), 1
    hd.seg.Segmentation(datasets, pixels, "BINARY", segments, *uids, "m", "m", "1", "1").save_as(file)
    return file


def write_rtstruct(file: Path, structures: dict[str, list[np.ndarray]]) -> Path:
    """Structures as lists of closed contours, (n, 3) RAS mm each."""
    ds = _header(RTSTRUCT, generate_uid(), (1, 1), "RTSTRUCT")
    for keyword in ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"):
        delattr(ds, keyword)
    ds.StructureSetROISequence, ds.ROIContourSequence = [], []
    for number, (name, contours) in enumerate(structures.items(), 1):
        roi, outline = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, outline.ReferencedROINumber = number, name, number
        outline.ContourSequence = []
        for points in contours:
            contour = Dataset()
            contour.ContourGeometricType, contour.NumberOfContourPoints = "CLOSED_PLANAR", len(points)
            contour.ContourData = [f"{v:.6g}" for v in (points * (-1, -1, 1)).ravel()]
            outline.ContourSequence.append(contour)
        ds.StructureSetROISequence.append(roi)
        ds.ROIContourSequence.append(outline)
    ds.save_as(file, enforce_file_format=True)
    return file


def circle(volume, axis: int, level: int, centre, radius: float) -> np.ndarray:
    """A circle of `radius` voxels on one slice of the volume, in RAS mm."""
    angle = np.linspace(0, 2 * np.pi, 90, endpoint=False)
    flat = np.column_stack([np.cos(angle), np.sin(angle)]) * radius + centre
    return volume.to_world(np.insert(flat, axis, level, axis=1))


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL])
@pytest.mark.parametrize("step", [2.5, -2.5])
def test_seg_gives_back_exactly_the_voxels_it_was_made_from(tmp_path, orientation, step):
    hu = scan()
    hu[2:5, 3:6, 4:9] = -1000 + 5  # the object, recognisable in the scan itself
    hu[hu < -990] = -995
    tumour = hu == -995
    other = np.zeros_like(tumour)
    other[3, 5:7, 1:3] = True
    files = write_series(tmp_path / "ct", hu, orientation=orientation, step=step)
    (tmp_path / "seg").mkdir()
    seg = write_seg(tmp_path / "seg" / "a.dcm", files, {"Tumour": tumour, "Other": other})
    volume = read_volume(tmp_path / "ct")
    mask = read_mask(tmp_path / "seg", volume, "tumour")
    assert np.array_equal(mask.array.astype(bool), volume.array == -995)
    assert mask.array.dtype == np.uint8 and np.array_equal(mask.affine, volume.affine)
    assert read_mask(seg, volume, "other").array.sum() == 4
    assert read_mask(seg, volume, "*").array.sum() == (tumour | other).sum()


@pytest.mark.parametrize(("orientation", "axis"), [(AXIAL, 2), (SAGITTAL, 0)])
def test_contours_fill_their_slices_and_keep_holes(tmp_path, orientation, axis):
    write_series(tmp_path / "ct", scan(6, 40, 40), orientation=orientation)
    volume = read_volume(tmp_path / "ct")
    centre = (19.3, 20.4)
    ring = [circle(volume, axis, k, centre, r) for k in (1, 2, 3) for r in (12, 5)]
    disc = [circle(volume, axis, 4, centre, 7.5)]
    file = write_rtstruct(tmp_path / "rt.dcm", {"GTV-1": ring, "Heart": disc})
    mask = read_mask(file, volume, "gtv-1")
    far = np.linalg.norm(np.stack(np.mgrid[:40, :40], -1) - centre, axis=-1)
    sure = np.minimum(np.abs(far - 12), np.abs(far - 5)) > 0.05  # the polygon is not quite a circle
    for k in range(6):
        expected = (far < 12) & (far > 5) if k in (1, 2, 3) else np.zeros_like(sure)
        assert np.array_equal(np.take(mask.array, k, axis)[sure], expected[sure])
    assert read_mask(file, volume, "Heart").array.sum() == pytest.approx(np.pi * 7.5**2, rel=0.03)


@settings(deadline=None)
@given(seed=st.integers(0, 10_000), corners=st.integers(3, 40))
def test_filling_any_simple_polygon_agrees_with_matplotlib(seed, corners):
    rng = np.random.default_rng(seed)
    angle = np.sort(rng.random(corners)) * 2 * np.pi
    radius = rng.uniform(2, 14, corners)[:, None]  # star-shaped about the centre, may leave the image
    polygon = np.array([12.0, 9.0]) + rng.random(2) + radius * np.column_stack([np.cos(angle), np.sin(angle)])
    pixels = np.stack(np.mgrid[:24, :20], -1).reshape(-1, 2)
    ours = fill_even_odd([polygon], 24, 20).ravel()
    assert np.array_equal(ours, Outline(polygon).contains_points(pixels))


def test_a_keyhole_contour_and_a_separate_hole_are_the_same():
    outer = np.array([[2.5, 2.5], [2.5, 17.5], [17.5, 17.5], [17.5, 2.5]])
    inner = np.array([[6.5, 6.5], [6.5, 12.5], [12.5, 12.5], [12.5, 6.5]])
    keyhole = np.concatenate([outer, outer[:1], inner, inner[:1]])
    separate = fill_even_odd([outer, inner], 20, 20)
    assert separate.sum() == 15 * 15 - 6 * 6
    assert np.array_equal(fill_even_odd([keyhole], 20, 20), separate)


def test_structures_are_asked_for_by_name(tmp_path):
    write_series(tmp_path / "ct", scan())
    volume = read_volume(tmp_path / "ct")
    contour = [circle(volume, 2, 2, (5, 5), 3)]
    file = write_rtstruct(tmp_path / "rt.dcm", {"GTV-1": contour, "Jane's lung": contour})
    for roi in (None, "liver"):
        with pytest.raises(HeaderTextError, match=r"Jane's lung.*roi=") as caught:
            read_mask(file, volume, roi)
        assert "Jane" not in caught.value.public and "2 structures" in caught.value.public
    only = write_rtstruct(tmp_path / "one.dcm", {"GTV-1": contour})
    assert read_mask(only, volume).array.any()
    with pytest.raises(DataError, match="2 segmentations in one folder"):
        read_mask(tmp_path, volume)
    uid = str(dcmread(only).SeriesInstanceUID)
    assert read_mask(tmp_path, volume, series=uid).source == str(only)


def test_a_mask_of_another_scan_is_refused(tmp_path):
    files = write_series(tmp_path / "ct", scan())
    write_series(tmp_path / "thin", scan(), step=1.7, spacing=(0.5, 0.5))
    write_series(tmp_path / "away", scan(), origin=(60, 60, 280))
    volume, thin, away = (read_volume(tmp_path / name) for name in ("ct", "thin", "away"))
    rt = write_rtstruct(tmp_path / "rt.dcm", {"GTV": [circle(volume, 2, 1, (5, 5), 3)]})
    seg = write_seg(tmp_path / "seg.dcm", files, {"GTV": scan() > 0})
    for file in (rt, seg):
        with pytest.raises(DataError, match="does not lie on the voxels"):
            read_mask(file, thin)
        with pytest.raises(DataError, match="empty on this scan"):
            read_mask(file, away)
    with pytest.raises(DataError, match="no DICOM SEG or RTSTRUCT here"):
        read_mask(tmp_path / "ct", volume)


def test_a_damaged_structure_set_is_one_clear_error(tmp_path):
    write_series(tmp_path / "ct", scan())
    volume = read_volume(tmp_path / "ct")
    file = write_rtstruct(tmp_path / "rt.dcm", {"GTV": [circle(volume, 2, 1, (5, 5), 3)]})
    ds = dcmread(file)
    ds.ROIContourSequence[0].ContourSequence[0].ContourData = ["1", "2"]
    ds.save_as(file)
    with pytest.raises(DataError, match=r"rt\.dcm: this RTSTRUCT cannot be read"):
        read_mask(file, volume)


def test_a_segment_is_found_by_its_description_where_the_labels_say_nothing(tmp_path):
    hu = scan()
    files = write_series(tmp_path / "ct", hu)
    volume = read_volume(tmp_path / "ct")
    mask = np.zeros(hu.shape, bool)
    mask[1, 2:5, 3:6] = True
    seg = write_seg(tmp_path / "seg.dcm", files, {"Neoplasm": mask, "Neoplasm 2": ~mask})
    ds = dcmread(seg)
    for segment, name in zip(ds.SegmentSequence, ("GTV-1", "Body"), strict=True):
        segment.SegmentDescription = name
    ds.save_as(seg)
    assert int(read_mask(seg, volume, "gtv-*").array.sum()) == mask.sum()
    assert int(read_mask(seg, volume, "Neoplasm").array.sum()) == mask.sum()
    with pytest.raises(HeaderTextError, match="no structure named 'liver'"):
        read_mask(seg, volume, "liver")
