"""The sheet the phantom is painted on: soft-edged shapes and tubes, in HU and in labels.

Shapes are signed distances; a voxel that an edge crosses gets a mixture (partial volume). Tubes
(vessels, airways, bowel) are lists of balls along a path, painted all at once by scattering each
ball's few voxels, so a tree of thousands of pieces costs some ten milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np

from smartlab.data.phantoms.body import Body, Frame, grid_frame
from smartlab.data.phantoms.curve import Array

Box = tuple[slice, slice, slice]
SLAB = 96_000  # voxels


class Canvas:
    """HU and labels of the part of the image that the body can reach.

    axes: voxel centres along x, y, z in reference mm of this body. hu starts as air.
    """

    def __init__(self, body: Body, axes: tuple[Array, Array, Array]) -> None:
        self.body = body
        self.frame: Frame = grid_frame(body, axes)
        self.shape = tuple(len(a) for a in axes)
        self.whole: Box = tuple(slice(0, n) for n in self.shape)  # type: ignore[assignment]
        self.origin = np.array([a[0] for a in axes], np.float32)
        self.step = np.array([a[1] - a[0] for a in axes], np.float32)
        self.voxel = float(self.step.mean())
        self.hu = np.full(self.shape, -1000.0, np.float32)
        self.labels = np.zeros(self.shape, np.uint8)
        self._cover = np.zeros(self.hu.size, np.float32)  # scratch for tubes

    def box(
        self, low: tuple[float, float, float], high: tuple[float, float, float], margin: float = 9.0
    ) -> Box:
        """Voxels between two corners, with room for the displacement."""
        a = np.floor((np.array(low) - margin - self.origin) / self.step).astype(int)
        b = np.ceil((np.array(high) + margin - self.origin) / self.step).astype(int) + 1
        a, b = np.clip(a, 0, self.shape), np.clip(b, 0, self.shape)
        return tuple(slice(int(i), int(j)) for i, j in zip(a, b, strict=True))  # type: ignore[return-value]

    def slabs(self, box: Box, bound: Array | None = None, most: float = 0.0) -> Iterator[tuple[Box, Frame]]:
        """The box in slices along x, so thin that the arrays of a shape stay in the cache; their frames.

        bound, most: leave out rows and columns where the distance `bound` is nowhere below `most`,
        or below what an edge covers.
        """
        x, y, z = box
        thick = max(1, SLAB // max(1, (y.stop - y.start) * (z.stop - z.start)))
        for start in range(x.start, x.stop, thick):
            slab = slice(start, min(start + thick, x.stop)), y, z
            if bound is not None:
                near = bound[slab] < most + 0.51 * self.voxel
                slab = slab[0], _used(near, 1, y.start), _used(near, 2, z.start)
            if slab[1].stop:
                yield slab, self.frame[slab]

    def cover(self, distance: Array) -> Array:
        """Share of each voxel inside the surface, 0 to 1."""
        share = distance * (-1.0 / self.voxel)
        share += 0.5
        return np.clip(share, 0.0, 1.0, out=share)

    def paint(self, box: Box, distance: Array, hu: float | Array, label: int | None = None) -> None:
        """Paint the inside of a surface; `label` None leaves the labels alone."""
        share = self.cover(distance)
        if not share.size or not share.max():
            return
        part = self.hu[box]
        change = hu - part
        change *= share
        part += change
        if label is not None:
            np.copyto(self.labels[box], label, where=distance < 0)

    def paint_tubes(
        self,
        points: Array,
        radii: Array | float,
        hu: float,
        label: int | None = None,
        only: Array | None = None,
    ) -> None:
        """Paint balls at `points` (N, 3 reference mm before displacement); `only` restricts by label."""
        touched = []
        for voxels, share in self._balls(points, radii):
            np.maximum.at(self._cover, voxels, share)
            touched.append(voxels)
        if not touched:
            return
        voxels = np.concatenate(touched)
        share, hu_flat, labels = self._cover[voxels], self.hu.reshape(-1), self.labels.reshape(-1)
        self._cover[voxels] = 0
        if only is not None:
            keep = np.flatnonzero(np.isin(np.arange(256), only)[labels[voxels]])
            voxels, share = voxels[keep], share[keep]
        old = hu_flat[voxels]
        hu_flat[voxels] = old + share * (hu - old)
        if label is not None:
            labels[voxels[share > 0.5]] = label

    def _balls(self, points: Array, radii: Array | float) -> Iterator[tuple[Array, Array]]:
        """Flat voxel indices and coverage of each ball, a batch per radius class."""
        position = (np.asarray(points, np.float32) - self.origin) / self.step
        radii = np.broadcast_to(np.asarray(radii, np.float32), len(position))
        # a ball thinner than a voxel cannot fill it: keep its cross-section instead of its width
        thin = np.minimum(1.0, (radii / (0.6 * self.voxel)) ** 2)
        reach = np.ceil((radii + 0.5 * self.voxel) / self.step.min()).astype(int)
        stride = np.array([self.shape[1] * self.shape[2], self.shape[2], 1])
        for size in np.unique(reach):
            rows = np.flatnonzero(reach == size)
            span = np.arange(-size, size + 1)
            offsets = _ball(int(size))
            for pick in np.array_split(rows, 1 + rows.size * len(offsets) // 250_000):  # stays in the cache
                near = np.rint(position[pick]).astype(int)
                square = np.zeros((len(offsets), len(pick)), np.float32)
                for k, n in enumerate(self.shape):  # along one axis the voxels of a ball have few distances
                    voxel = near[:, k] + span[:, None]
                    apart = ((voxel.astype(np.float32) - position[pick, k]) * self.step[k]) ** 2
                    apart[(voxel < 0) | (voxel >= n)] = np.inf
                    square += apart.take(offsets[:, k] + size, axis=0)
                share = np.sqrt(square, out=square)
                share /= self.voxel
                np.subtract(0.5 + radii[pick] / self.voxel, share, out=share)
                good = np.flatnonzero(share > 0)
                np.minimum(share, 1.0, out=share)
                share *= thin[pick]
                flat = (offsets @ stride)[:, None] + near @ stride
                yield flat.reshape(-1)[good], share.reshape(-1)[good]


@lru_cache
def _ball(size: int) -> Array:
    """Voxels (N, 3) from the middle of a ball."""
    span = np.arange(-size, size + 1)
    offsets = np.stack(np.meshgrid(span, span, span, indexing="ij"), -1).reshape(-1, 3)
    return offsets[np.square(offsets).sum(1) <= (size + 0.9) ** 2]


def _used(near: Array, axis: int, start: int) -> slice:
    """From the first to the last place along an axis where anything is near; empty at 0 where nothing is."""
    used = np.flatnonzero(near.any((0, 3 - axis)))
    return slice(start + int(used[0]), start + int(used[-1]) + 1) if len(used) else slice(0, 0)


def grow_tree(root: Array, targets: Array, leaf: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """A branching tree from `root` to every target: points (N, 3) and radii (N,), closely spaced.

    Each target, nearest first, joins the tree where the way back to the root is short without the
    branch being long; radii follow Murray's law (r³ adds up at a fork), so branches taper.
    """
    targets = targets[np.argsort(np.linalg.norm(targets - root, axis=1))]
    count = len(targets)
    nodes = np.concatenate([root[None], targets])
    gaps = np.sqrt(sum(np.square(line[:, None] - line) for line in nodes.T))
    parent = np.zeros(count + 1, int)
    length = np.zeros(count + 1, np.float32)  # along the tree to the root
    for i in range(1, count + 1):
        # branch off on the way, not exactly at the old node: forks look like Y, not like stars
        parent[i] = join = int(np.argmin(gaps[i, :i] + 0.45 * length[:i]))
        length[i] = length[join] + gaps[i, join]
    cubes = np.full(count + 1, leaf**3)
    for i in range(count, 0, -1):
        cubes[parent[i]] += cubes[i] if parent[i] else 0.0
    radius = np.cbrt(cubes)
    start, end, grown = nodes[parent[1:]], nodes[1:], radius[1:]
    first = np.where(parent[1:] > 0, np.minimum(radius[parent[1:]], grown * 1.25), grown * 1.15)
    span = np.sqrt(np.square(end - start).sum(1, dtype=float).astype(np.float32)).astype(float)
    bow = rng.normal(0, 0.07 * span[:, None], (count, 3))  # branches are slightly curved
    step = np.maximum(0.5 * grown, 0.5) / np.maximum(span, 0.6)
    pieces = np.ceil(1 / step).astype(int)  # of each branch
    which = np.repeat(np.arange(count), pieces)
    t = ((np.arange(len(which)) - np.repeat(np.cumsum(pieces) - pieces, pieces)) * step[which])[:, None]
    points = start[which] + t * (end - start)[which] + t * (1 - t) * bow[which]
    radii = first[which] + t[:, 0] * (grown - first)[which]
    return points.astype(np.float32), radii.astype(np.float32)
