"""The sheet the phantom is painted on: soft-edged shapes and tubes, in HU and in labels.

Shapes are signed distances; a voxel that an edge crosses gets a mixture (partial volume). Tubes
(vessels, airways, bowel) are lists of balls along a path, painted all at once by scattering each
ball's few voxels, so a tree of thousands of pieces costs some ten milliseconds.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from smartlab.data.phantoms.body import Array, Body, Frame, grid_frame

Box = tuple[slice, slice, slice]


class Canvas:
    """HU and labels of the part of the image that the body can reach.

    axes: voxel centres along x, y, z in reference mm of this body. hu starts as air.
    """

    def __init__(self, body: Body, axes: tuple[Array, Array, Array]) -> None:
        self.body = body
        self.frame: Frame = grid_frame(body, axes)
        self.shape = tuple(len(a) for a in axes)
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

    def cover(self, distance: Array) -> Array:
        """Share of each voxel inside the surface, 0 to 1."""
        share = distance * (-1.0 / self.voxel)
        share += 0.5
        return np.clip(share, 0.0, 1.0, out=share)

    def paint(self, box: Box, distance: Array, hu: float | Array, label: int | None = None) -> None:
        """Paint the inside of a surface; `label` None leaves the labels alone."""
        part = self.hu[box]
        change = hu - part
        change *= self.cover(distance)
        part += change
        if label is not None:
            self.labels[box][distance < 0] = label

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
            keep = np.isin(labels[voxels], only)
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
        for size in np.unique(reach):
            rows = np.flatnonzero(reach == size)
            span = np.arange(-size, size + 1)
            offsets = np.stack(np.meshgrid(span, span, span, indexing="ij"), -1).reshape(-1, 3)
            offsets = offsets[np.linalg.norm(offsets, axis=1) <= size + 0.9]
            for pick in np.array_split(rows, 1 + rows.size * len(offsets) // 4_000_000):  # bounds memory
                near = np.rint(position[pick]).astype(int)
                square = np.zeros((len(pick), len(offsets)), np.float32)
                flat, good = np.zeros(square.shape, int), np.ones(square.shape, bool)
                for k, n in enumerate(self.shape):
                    voxel = near[:, k, None] + offsets[:, k]  # (balls, offsets)
                    good &= (voxel >= 0) & (voxel < n)
                    flat = flat * n + voxel
                    apart = voxel.astype(np.float32)
                    apart -= position[pick, k, None]
                    square += (apart * self.step[k]) ** 2
                share = (0.5 + radii[pick, None] / self.voxel) - np.sqrt(square) / self.voxel
                good &= share > 0
                share = np.minimum(share, 1.0) * thin[pick, None]
                yield flat[good], share[good]


def path(points: list[tuple[float, ...]], spacing: float) -> Array:
    """A smooth curve through the rows of `points` (x, y, z, radius, …), resampled every `spacing` mm."""
    from scipy.interpolate import PchipInterpolator

    knots = np.asarray(points, float)
    along = np.concatenate([[0], np.cumsum(np.linalg.norm(np.diff(knots[:, :3], axis=0), axis=1))])
    steps = np.linspace(0, along[-1], max(2, int(along[-1] / spacing) + 1))
    return PchipInterpolator(along, knots)(steps).astype(np.float32)


def grow_tree(root: Array, targets: Array, leaf: float, rng: np.random.Generator) -> tuple[Array, Array]:
    """A branching tree from `root` to every target: points (N, 3) and radii (N,), closely spaced.

    Each target, nearest first, joins the tree where the way back to the root is short without the
    branch being long; radii follow Murray's law (r³ adds up at a fork), so branches taper.
    """
    targets = targets[np.argsort(np.linalg.norm(targets - root, axis=1))]
    count = len(targets)
    nodes = np.empty((count + 1, 3), np.float32)
    nodes[0], parent = root, np.zeros(count + 1, int)
    length = np.zeros(count + 1, np.float32)  # along the tree to the root
    for i, target in enumerate(targets, start=1):
        gap = np.linalg.norm(nodes[:i] - target, axis=1)
        join = int(np.argmin(gap + 0.45 * length[:i]))
        # branch off on the way, not exactly at the old node: forks look like Y, not like stars
        nodes[i], parent[i], length[i] = target, join, length[join] + gap[join]
    cubes = np.full(count + 1, leaf**3)
    for i in range(count, 0, -1):
        cubes[parent[i]] += cubes[i] if parent[i] else 0.0
    radius = np.cbrt(cubes)
    points, radii = [], []
    for i in range(1, count + 1):
        start, end = nodes[parent[i]], nodes[i]
        span = float(np.linalg.norm(end - start))
        first = min(radius[parent[i]], radius[i] * 1.25) if parent[i] else radius[i] * 1.15
        t = np.arange(0, 1, max(0.5 * radius[i], 0.5) / max(span, 0.6))[:, None]
        bow = rng.normal(0, 0.07 * span, 3)  # branches are slightly curved
        points.append(start + t * (end - start) + t * (1 - t) * bow)
        radii.append(first + t[:, 0] * (radius[i] - first))
    return np.concatenate(points).astype(np.float32), np.concatenate(radii).astype(np.float32)
