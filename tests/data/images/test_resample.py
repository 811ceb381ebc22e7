"""Resampling moves nothing and invents nothing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from smartlab.core.errors import DataError
from smartlab.data.images.body import body_box, find_body, occupancy
from smartlab.data.images.resample import LabelPainter, axis_weights, resample, target_grid, uncovered
from tests.data.store_cohort import person

spacings = st.tuples(*[st.floats(0.4, 6.0)] * 3)
shapes = st.tuples(*[st.integers(2, 24)] * 3)
fast = settings(max_examples=60, deadline=None)


def rotation(seed: int) -> np.ndarray:
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def grid(spacing, seed: int = 0) -> np.ndarray:
    """An oblique affine."""
    affine = np.eye(4)
    affine[:3, :3] = rotation(seed) * spacing
    affine[:3, 3] = np.random.default_rng(seed).uniform(-300, 300, 3)
    return affine


def world(shape, affine) -> np.ndarray:
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return index @ affine[:3, :3].T + affine[:3, 3]


@fast
@given(shapes, spacings, st.floats(0.5, 5.0), st.integers(0, 99), st.sampled_from(["cubic", "linear"]))
def test_a_ramp_in_world_coordinates_stays_that_ramp(shape, spacing, target, seed, kernel):
    affine = grid(spacing, seed)
    slope = np.random.default_rng(seed).normal(size=3)
    new_shape, new_affine = target_grid(shape, affine, target)
    values = resample(world(shape, affine) @ slope, affine, new_shape, new_affine, kernel=kernel)
    expected = world(new_shape, new_affine) @ slope
    # up to float32 rounding of values of some hundreds, borders included
    assert np.abs(values - expected).max() < 2e-2


@fast
@given(shapes, spacings, st.floats(0.5, 5.0), st.integers(-1024, 3000))
def test_a_constant_stays_constant(shape, spacing, target, value):
    affine = grid(spacing)
    new_shape, new_affine = target_grid(shape, affine, target)
    values = resample(np.full(shape, value, np.int16), affine, new_shape, new_affine)
    assert np.abs(values - value).max() < 1e-2


@fast
@given(shapes, spacings, st.floats(0.5, 5.0), st.integers(0, 99))
def test_the_new_grid_has_the_spacing_lies_inside_and_shares_the_centre(shape, spacing, target, seed):
    affine = grid(spacing, seed)
    new_shape, new_affine = target_grid(shape, affine, target)
    assert np.allclose(np.linalg.norm(new_affine[:3, :3], axis=0), target, rtol=2e-4)
    inverse = np.linalg.inv(affine) @ new_affine
    corners = np.array([[0, 0, 0], np.array(new_shape) - 1]) @ inverse[:3, :3].T + inverse[:3, 3]
    assert (corners > -1e-3).all() and (corners < np.array(shape) - 1 + 1e-3).all()
    assert np.allclose(corners.mean(axis=0), (np.array(shape) - 1) / 2, atol=1e-6)


def test_the_same_spacing_changes_no_voxel():
    array = person()
    affine = grid((2.0, 2.0, 2.0))
    shape, same = target_grid(array.shape, affine, 2.0)
    assert shape == array.shape and np.allclose(same, affine)
    assert (resample(array, affine, shape, same) == array).all()


@pytest.mark.parametrize("spacing", [(0.7, 0.9, 2.5), (1.4, 1.4, 5.0), (3.0, 2.0, 1.0)])
def test_a_blob_stays_where_it_is(spacing):
    """Half a voxel of shift is the classic resampling bug; here it would be 1 mm."""
    affine = grid(spacing, 5)
    shape = tuple(int(60 / s) for s in spacing)
    places = world(shape, affine)
    center = places.reshape(-1, 3).mean(axis=0) + np.array([1.3, -2.1, 0.7])
    blob = 1000 * np.exp(-((places - center) ** 2).sum(-1) / (2 * 5.0**2))
    new_shape, new_affine = target_grid(shape, affine, 2.0)
    new = resample(blob, affine, new_shape, new_affine)
    found = (world(new_shape, new_affine) * new[..., None]).sum((0, 1, 2)) / new.sum()
    assert np.linalg.norm(found - center) < 0.05


def test_downsampling_does_not_alias():
    """A pattern finer than the new grid can hold must vanish, not come back as a coarse one."""
    n = 128
    fine = np.cos(np.pi * 0.9 * np.arange(n))  # period 2.2 voxels, the new grid resolves 5
    weights = axis_weights(n, np.arange(2, n - 2, 2.5), 2.5)
    naive = axis_weights(n, np.arange(2, n - 2, 2.5), 1.0)
    assert np.abs(weights @ fine).max() < 0.06 and np.abs(naive @ fine).max() > 0.4


def test_bone_against_air_does_not_ring():
    edge = np.where(np.arange(200) < 100, -1000.0, 1500.0)
    halved = axis_weights(200, np.arange(10, 190, 2.0), 2.0) @ edge
    overshoot = max(-1000 - halved.min(), halved.max() - 1500)
    assert overshoot < 0.02 * 2500


def test_outside_the_scan_is_fill():
    affine = np.eye(4)
    shifted = np.eye(4)
    shifted[:3, 3] = [-3, 0, 0]
    values = resample(np.ones((5, 5, 5)), affine, (5, 5, 5), shifted, fill=-1024)
    assert (values[:3] == -1024).all() and np.allclose(values[3:], 1)


def test_rotated_grids_are_refused():
    with pytest.raises(DataError, match="rotated"):
        resample(np.ones((4, 4, 4)), grid((1, 1, 1), 1), (4, 4, 4), grid((1, 1, 1), 2))


# ---- labels


@fast
@given(st.integers(0, 1000))
def test_labels_on_the_same_grid_are_copied(seed):
    labels = np.random.default_rng(seed).integers(0, 4, (7, 6, 5)).astype(np.uint8)
    painter = LabelPainter(labels.shape, np.eye(4))
    for value in (1, 2, 3):
        painter.paint(value, labels == value, np.eye(4))
    assert (painter.finish() == labels).all()


def test_label_volume_is_kept_and_the_surface_is_smooth():
    affine = np.diag([1.0, 1.0, 4.0, 1.0])
    places = world((40, 40, 10), affine)
    ball = ((places - places.reshape(-1, 3).mean(0)) ** 2).sum(-1) < 14**2
    shape, target = target_grid(ball.shape, affine, 2.0)
    painter = LabelPainter(shape, target)
    painter.paint(7, ball, affine)
    labels = painter.finish()
    assert set(np.unique(labels)) == {0, 7}
    assert abs((labels == 7).sum() * 8 / (ball.sum() * 4) - 1) < 0.05


def test_a_structure_too_small_for_the_grid_keeps_a_voxel():
    mask = np.zeros((30, 30, 30), bool)
    mask[11, 13, 17] = True
    shape, target = target_grid(mask.shape, np.eye(4), 4.0)
    painter = LabelPainter(shape, target)
    painter.paint(3, mask, np.eye(4))
    labels = painter.finish()
    assert (labels == 3).sum() == 1
    at = target[:3, :3] @ np.argwhere(labels == 3)[0] + target[:3, 3]
    assert np.abs(at - [11, 13, 17]).max() <= 2.0


@pytest.mark.parametrize("around", ["inside", "surface", "flush"])
@pytest.mark.parametrize(("step", "spacing"), [(1.0, 1.0), (1.5, 2.0), (0.8, 2.0), (3.0, 2.0)])
def test_what_is_painted_later_is_in_an_organ_what_it_is_on_background(step, spacing, around):
    """Deep inside the organ, across its surface, and where both have the same surface."""
    shape, source = (30,) * 3, np.diag([step, step, step, 1.0])
    index = np.indices(shape) - np.array([15.2, 14.6, 14.9]).reshape(3, 1, 1, 1)
    lesion = (index**2).sum(0) < 6**2
    organ = {"inside": (index**2).sum(0) < 12**2, "surface": index[0] > 0, "flush": lesion & (index[1] > -3)}

    def painted(*masks: np.ndarray) -> np.ndarray:
        new, target = target_grid(shape, source, spacing)
        painter = LabelPainter(new, target)
        cut = [(value, mask, source) for value, mask in enumerate(masks, 1)]
        for value, mask, affine in uncovered(cut):
            painter.paint(value, mask, affine)
        return painter.finish()

    nothing = np.zeros_like(lesion)
    alone = painted(nothing, lesion) == 2
    both = painted(organ[around], lesion)
    gained = (both == 2) & ~alone
    assert alone.sum() > 20 and not (alone & (both != 2)).any()
    # where organ and background share the rest of a voxel, less than half of it is the largest part
    assert gained.sum() <= (0.02 * alone.sum() + 2 if around == "surface" else 0)
    organ_alone = painted(organ[around], nothing) == 1
    assert not (both == 1)[~organ_alone].any()  # nor does the organ grow where it gave way


def test_a_mask_on_a_grid_of_its_own_covers_too():
    """A finer outline, such as of a DICOM SEG, on an organ map of the scan's grid."""
    organ, fine = np.ones((20,) * 3, bool), np.zeros((60,) * 3, bool)
    fine[20:40, 20:40, 20:40] = True
    coarse, small = np.diag([3.0, 3, 3, 1]), np.diag([1.0, 1, 1, 1])
    shape, target = target_grid(organ.shape, coarse, 2.0)
    counts = []
    for first in (organ, ~organ):
        painter = LabelPainter(shape, target)
        for value, mask, affine in uncovered([(1, first, coarse), (2, fine, small)]):
            painter.paint(value, mask, affine)
        counts.append(int((painter.finish() == 2).sum()))
    assert counts[0] == counts[1] and counts[1] * 8 == pytest.approx(8000, rel=0.1)


# ---- the body


def test_the_body_is_found_without_the_table():
    array = person((80, 80, 40))
    spacing = (2.0, 2.0, 2.0)
    body = find_body(array, spacing)
    start, stop = body_box(body, array.shape, spacing)
    dense = np.argwhere(array[:, 8:] > -500) + np.array([0, 8, 0])  # all but the table
    assert (start <= dense.min(0)).all() and (stop > dense.max(0)).all()
    assert start[1] > 2  # the sheet at y = 2 is left out
    assert np.prod(stop - start) < 0.75 * array.size


def test_an_image_of_air_is_kept_whole():
    air = np.full((20, 20, 20), -1000, np.int16)
    body = find_body(air, (2.0, 2.0, 2.0))
    start, stop = body_box(body, air.shape, (2.0, 2.0, 2.0))
    assert not body.found and (start == 0).all() and tuple(stop) == air.shape
    assert (occupancy(body, start, air.shape) == 0).all()


def test_occupancy_tells_which_blocks_hold_body():
    array = np.full((96, 64, 70), -1000, np.int16)
    array[:40] = 50
    body = find_body(array, (2.0, 2.0, 2.0))
    share = occupancy(body, np.zeros(3, int), array.shape) / 255
    assert share.shape == (3, 2, 3)
    assert (share[0] == 1).all() and (share[2] == 0).all() and np.allclose(share[1], 8 / 32, atol=0.1)
