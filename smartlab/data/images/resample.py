"""Resample a scan to another spacing without moving it.

- The new grid keeps the directions of the old one, lies inside it (nothing is extrapolated) and
  shares its centre; its affine is exact, so world positions mean the same before and after.
- Grids with parallel axes make resampling separable: three products with a small sparse matrix,
  one row of weights per output voxel, 0.2 s for 512×512×134 where SimpleITK takes 1.9 s (Gaussian,
  then linear) on two cores.
- The kernel is the cubic of Mitchell and Netravali (SIGGRAPH 1988). Where an axis is upsampled it
  is Keys' interpolating cubic (B = 0): leaving out every second slice of 7 scans and predicting it,
  the RMS error was 3% below linear's and 2% below Lanczos-3's. Where an axis is downsampled by s the
  kernel is widened s times (anti-aliasing) and B goes to 1/3 as s goes to 2. On 8 scans halved in
  plane, RMS HU against the ideal low-pass, (aliasing, lost detail, overshoot): without
  anti-aliasing linear (17, 13, 0); widened linear (6.0, 31, 0); widened Keys (8.6, 17, 11); widened
  Lanczos-3 (8.2, 12, 53); this one (6.3, 26, 0.1). So: as little aliasing as the triangle, sharper,
  and 2% overshoot at an ideal edge (Keys 5%), which a window would turn into texture.
- Rows of weights sum to one and have their centre of gravity on the output voxel: a constant stays
  constant, a ramp stays a ramp, at the borders too, and nothing shifts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from scipy import sparse

from smartlab.core.errors import DataError
from smartlab.data.images.grid import Spacing, three

PARALLEL = 1e-3  # as grid.SHEAR: cosine between axes that still counts as parallel
_COLUMNS = 1 << 22  # values converted to float32 at a time: bounds memory at 16 MB, still long rows


def target_grid(
    shape: tuple[int, ...], affine: np.ndarray, spacing: Spacing
) -> tuple[tuple[int, ...], np.ndarray]:
    """The grid of `spacing` mm that lies inside a grid and shares its centre -> (shape, affine)."""
    wanted = three(spacing)
    old = np.linalg.norm(affine[:3, :3], axis=0)
    extent = (np.array(shape) - 1) * old  # between the centres of the outer voxels
    count = np.floor(extent / wanted + 1e-6).astype(int) + 1
    step = np.where(np.abs(old - wanted) < 1e-4 * wanted, 1.0, wanted / old)
    count = np.where(step == 1.0, shape, count)
    start = (np.array(shape) - 1 - (count - 1) * step) / 2
    new = affine.astype(float).copy()
    new[:3, :3] = affine[:3, :3] * step
    new[:3, 3] = affine[:3, :3] @ start + affine[:3, 3]
    return tuple(int(n) for n in count), new


def at_spacing(array: np.ndarray, affine: np.ndarray, spacing: Spacing) -> tuple[np.ndarray, np.ndarray]:
    """A scan (…, X, Y, Z) with voxels of this size -> (array, affine); as it is where they are that to one percent."""
    if (np.abs(np.linalg.norm(affine[:3, :3], axis=0) / three(spacing) - 1) < 0.01).all():
        return array, affine
    shape, target = target_grid(array.shape[-3:], affine, spacing)
    return over_channels(lambda one: resample(one, affine, shape, target), array), target


def over_channels(change: Callable[[np.ndarray], np.ndarray], array: np.ndarray) -> np.ndarray:
    """What a function makes of a scan (X, Y, Z), or of each channel of several."""
    return change(array) if array.ndim == 3 else np.stack([change(one) for one in array])


def resample(
    array: np.ndarray,
    affine: np.ndarray,
    shape: tuple[int, ...],
    target: np.ndarray,
    *,
    kernel: str = "cubic",
    fill: float = 0.0,
) -> np.ndarray:
    """Values of a volume on another grid with parallel axes, float32 of `shape`.

    kernel: "cubic" for images, "linear" (never negative) for masks. Voxels whose centre lies
    outside the volume become `fill`.
    """
    steps, starts = _axis_maps(affine, target)
    if (steps == 1).all() and (starts == np.rint(starts)).all():
        return _moved(array, shape, starts.astype(int), fill)
    outside = []
    for axis in sorted(range(3), key=lambda a: shape[a] / array.shape[a]):  # shrink first
        positions = starts[axis] + steps[axis] * np.arange(shape[axis])
        n = array.shape[axis]
        outside.append((axis, (positions < -0.5 - 1e-6) | (positions > n - 0.5 + 1e-6)))
        weights = axis_weights(n, np.clip(positions, 0, n - 1), steps[axis], kernel)
        array = _apply(weights, array, axis)
    for axis, rows in outside:
        if rows.any():
            np.moveaxis(array, axis, 0)[rows] = fill
    return array


def _moved(array: np.ndarray, shape: tuple[int, ...], starts: np.ndarray, fill: float) -> np.ndarray:
    """What `resample` gives for equal voxels at whole distances: a copy from index `starts` on."""
    out = np.full(shape, fill, np.float32)
    low, high = np.maximum(-starts, 0), np.minimum(array.shape - starts, shape)
    if (low < high).all():
        place = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        out[place] = array[tuple(slice(a, b) for a, b in zip(low + starts, high + starts, strict=True))]
    return out


def _axis_maps(affine: np.ndarray, target: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Index on the target grid -> index on the source grid, per axis: start + step · index."""
    matrix = np.linalg.inv(affine) @ target
    steps = np.diag(matrix)[:3].copy()
    lengths = np.linalg.norm(matrix[:3, :3], axis=0)
    if (np.abs(matrix[:3, :3] - np.diag(steps)).max(axis=0) > PARALLEL * lengths).any() or (steps <= 0).any():
        raise DataError(
            "the two grids are rotated against each other",
            found=np.round(matrix[:3, :3], 3).tolist(),
            expected="parallel axes",
            fix="resample the mask onto the grid of its image first",
        )
    # equal voxels at whole distances are copied exactly, whatever rounding the affines went through
    starts, whole = matrix[:3, 3], np.rint(matrix[:3, 3])
    steps = np.where(np.abs(steps - 1) < 1e-6, 1.0, steps)
    return steps, np.where((steps == 1) & (np.abs(starts - whole) < 1e-4), whole, starts)


def axis_weights(n: int, positions: np.ndarray, step: float, kernel: str = "cubic") -> sparse.csr_matrix:
    """(len(positions), n) matrix whose row j gives the value at `positions[j]` on an axis of n samples."""
    scale = max(1.0, float(step))
    support = (2 if kernel == "cubic" else 1) * scale
    first = np.floor(positions - support).astype(int) + 1
    index = first[:, None] + np.arange(int(np.ceil(2 * support)))  # (out, taps)
    offset = index - positions[:, None]
    inside = (index >= 0) & (index < n)
    # positive weights that exist everywhere: used at the borders, and to correct a drifting centre
    near = _triangle(offset / scale) * inside
    near /= near.sum(1, keepdims=True)
    weights = near
    if kernel == "cubic":
        whole = inside.all(axis=1, keepdims=True)  # a cut-off cubic has no meaning
        weights = np.where(whole, _cubic(offset / scale, blur=min(1.0, scale - 1.0) / 3), near)
        weights = weights / weights.sum(1, keepdims=True)
    deviation = offset - (near * offset).sum(1, keepdims=True)
    spread = (near * deviation**2).sum(1, keepdims=True)
    drift = (weights * offset).sum(1, keepdims=True)
    weights = weights - np.where(spread > 1e-9, drift / np.maximum(spread, 1e-9), 0) * near * deviation
    rows = np.broadcast_to(np.arange(len(positions))[:, None], index.shape)
    used = inside & (weights != 0)
    values = weights[used].astype(np.float32)
    return sparse.csr_matrix((values, (rows[used], index[used])), shape=(len(positions), n))


def _triangle(t: np.ndarray) -> np.ndarray:
    return np.maximum(0.0, 1.0 - np.abs(t))


def _cubic(t: np.ndarray, blur: float) -> np.ndarray:
    """Mitchell–Netravali family with B = blur and C = (1 − B) / 2; blur 0 is Keys' cubic."""
    b, c, t = blur, (1 - blur) / 2, np.abs(t)
    near = ((12 - 9 * b - 6 * c) * t**3 + (-18 + 12 * b + 6 * c) * t**2 + 6 - 2 * b) / 6
    far = ((-b - 6 * c) * t**3 + (6 * b + 30 * c) * t**2 + (-12 * b - 48 * c) * t + 8 * b + 24 * c) / 6
    return np.where(t < 1, near, np.where(t < 2, far, 0.0))


def _apply(weights: sparse.csr_matrix, array: np.ndarray, axis: int) -> np.ndarray:
    """Weights along one axis, float32, converting a part of the volume at a time."""
    rows, n = weights.shape
    other = 1 if axis == 0 else 0  # the volume is cut along this axis
    out = np.empty([rows if a == axis else s for a, s in enumerate(array.shape)], np.float32)
    if rows == n and (weights != sparse.identity(n, np.float32)).nnz == 0:
        out[:] = array
        return out
    width = max(1, _COLUMNS // max(1, array.size // array.shape[other]))
    for start in range(0, array.shape[other], width):
        cut = tuple(slice(start, start + width) if a == other else slice(None) for a in range(3))
        part = np.moveaxis(array[cut], axis, 0)
        flat = np.ascontiguousarray(part, dtype=np.float32).reshape(n, -1)
        np.moveaxis(out[cut], axis, 0)[:] = (weights @ flat).reshape(rows, *part.shape[1:])
    return out


def to_hounsfield(values: np.ndarray, like: np.ndarray) -> np.ndarray:
    """Round to int16 within the range of the scan the values came from."""
    np.clip(np.rint(values, out=values), like.min(), like.max(), out=values)
    return values.astype(np.int16)


class LabelPainter:
    """Merges masks of many structures into one uint8 volume on a target grid.

    Every mask is resampled linearly to the share it has of each voxel; a voxel goes to the label
    with the largest share, background included. That keeps surfaces smooth where nearest-neighbour
    makes stairs. A structure too small to win any voxel keeps the one where its share is largest:
    nothing marked is lost. Where masks overlap, the one painted later wins the voxels it would win on
    background, if they were `uncovered` first: shares of a voxel do not tell how far they are the same part.
    """

    def __init__(self, shape: tuple[int, ...], affine: np.ndarray) -> None:
        self.affine = affine
        self.labels = np.zeros(shape, np.uint8)
        self._best = np.zeros(shape, np.float32)  # share of the winning label
        self._total = np.zeros(shape, np.float32)  # of all labels: the rest is background
        self._peak: dict[int, tuple[float, tuple[int, ...]]] = {}

    def paint(self, value: int, mask: np.ndarray, affine: np.ndarray) -> None:
        """Add a mask (its bounding box suffices) given on a grid with parallel axes."""
        mask = np.pad(mask != 0, 1)  # so that it ends inside its own box
        moved = affine.copy()
        moved[:3, 3] = affine[:3, :3] @ [-1, -1, -1] + affine[:3, 3]
        steps, starts = _axis_maps(self.affine, moved)  # source index -> target index
        low = np.floor(starts - 2).astype(int).clip(0, self.labels.shape)
        high = np.ceil(starts + steps * np.array(mask.shape) + 2).astype(int).clip(low, self.labels.shape)
        if (high == low).any():
            return
        box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        part = self.affine.copy()
        part[:3, 3] = self.affine[:3, :3] @ low + self.affine[:3, 3]
        share = resample(mask.astype(np.float32), moved, tuple(high - low), part, kernel="linear")
        share = np.rint(share * 65536) / 65536  # so that halves are equal, however they were summed
        wins = (share >= np.minimum(self._best[box], 1 - share)) & (share > 0)
        self.labels[box][wins] = value
        self._best[box][wins] = share[wins]
        self._total[box] += share
        top = np.unravel_index(int(share.argmax()), share.shape)
        if share[top] > self._peak.get(value, (0.0, ()))[0]:
            self._peak[value] = float(share[top]), tuple(int(i) for i in low + top)

    def finish(self) -> np.ndarray:
        """(X, Y, Z) uint8; 0 is background."""
        self.labels[self._best < 1 - self._total] = 0
        present = set(np.unique(self.labels).tolist())
        for value, (_, place) in sorted(self._peak.items()):
            if value not in present:
                self.labels[place] = value
        return self.labels


Mask = tuple[int, np.ndarray, np.ndarray]  # label, binary mask (its bounding box suffices), its affine


def uncovered(masks: Sequence[Mask]) -> Iterator[Mask]:
    """The boolean masks without what later ones of another label cover, each on its own grid."""
    for number, (value, mask, affine) in enumerate(masks):
        left = mask
        for other, later, placed in masks[number + 1 :]:
            steps, starts = _axis_maps(placed, affine)  # index in `mask` -> index in `later`
            low = np.ceil((-0.5 - starts) / steps).astype(int).clip(0, mask.shape)
            high = np.ceil((np.array(later.shape) - 0.5 - starts) / steps).astype(int).clip(low, mask.shape)
            if other == value or (low == high).any():
                continue
            box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
            if (steps == 1).all() and (starts == np.rint(starts)).all():
                ends = zip((low + starts).astype(int), (high + starts).astype(int), strict=True)
                covered = later[tuple(slice(a, b) for a, b in ends)]
            else:
                part = affine.copy()
                part[:3, 3] = affine[:3, :3] @ low + affine[:3, 3]
                covered = resample(later, placed, tuple(high - low), part, kernel="linear") >= 0.5
            if (left[box] & covered).any():
                left = left.copy() if left is mask else left
                left[box] &= ~covered
        yield value, left, affine
