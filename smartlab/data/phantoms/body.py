"""Geometry of the phantom body: where the cavity, diaphragm, mediastinum, lungs and liver are.

Everything is described in *reference millimetres*: a small adult who fills a 320 mm cube, x to the
patient's right, y anterior, z superior, origin at the centre of the cube. A field of view of another
size scales the person, so the whole anatomy is always in the image.

Each function takes a `Frame` and returns a signed distance (negative inside), roughly in mm. A frame
holds either the voxels of a grid or a list of points, so the renderer and the drawing of lesion
positions (which makes no volume) ask the very same geometry. Individual shape comes from a smooth
displacement made of a few cosines; profiles along one axis use the coordinate before displacement
(`x0`, `y0`, `z0`), which keeps them one- or two-dimensional and the renderer fast.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from smartlab.data.phantoms.curve import Array, Curve

REFERENCE_MM = 320.0
WARP_TERMS = 4
FAR = np.float32(1e3)


def _profile(points: dict[float, tuple[float, ...]]) -> Curve:
    """Smooth curve(s) of z through the given values."""
    heights = sorted(points)
    return Curve(np.array(heights), np.array([points[z] for z in heights]))


# z -> half width, half depth, centre y of the rib cage and abdominal cavity
_CAVITY = _profile(
    {
        -170: (101, 62, 4),
        -110: (105, 65, 4),
        -60: (109, 69, 3),
        -10: (110, 71, 2),
        30: (106, 69, 0),
        70: (98, 62, -4),
        100: (86, 53, -9),
        122: (70, 42, -14),
        138: (54, 30, -19),
        147: (38, 17, -22),
        152: (16, 3, -24),
        155: (4, 1, -24),
        170: (1, 1, -24),
    }
)
# z -> half width and half depth of the body without its fat, then share of the fat that lies here
_BODY = _profile(
    {
        -170: (113, 72, 1.15),
        -110: (114, 74, 1.1),
        -60: (118, 79, 1.0),
        -10: (121, 82, 0.85),
        30: (121, 83, 0.8),
        70: (122, 80, 0.75),
        100: (124, 75, 0.7),
        130: (125, 66, 0.65),
        150: (122, 57, 0.6),
        170: (112, 50, 0.55),
    }
)
# z -> y of the centre of the vertebral bodies (kyphosis, lordosis) and their radius
_SPINE = _profile(
    {
        -170: (-23, 20),
        -120: (-23, 19),
        -70: (-28, 17.5),
        0: (-35, 16),
        70: (-38, 14.5),
        120: (-34, 13),
        150: (-27, 12),
        170: (-22, 11.5),
    }
)
# z -> vertebral level: T1 = 1 … T12 = 12, L1 = 13 …
_LEVEL = _profile({-170: (15.75,), -147: (15.0,), -100: (13.0,), -77: (12.0,), 140: (1.0,), 170: (-0.75,)})
_LEVEL_KNOTS = np.linspace(-190, 190, 96)
_MEDIASTINUM = _profile(
    {-170: (16,), 0: (15,), 40: (19,), 70: (23,), 95: (25,), 120: (23,), 145: (24,), 170: (28,)}
)


@dataclass(frozen=True)
class Body:
    """What makes one body differ from another, in reference mm unless said otherwise."""

    size: float = 1.0
    fat: float = 10.0
    breast: float = 0.0
    dome_right: float = 6.0  # height of the diaphragm
    dome_left: float = -6.0
    heart: float = 1.0  # scale of the heart
    shift: tuple[float, float, float] = (0.0, 0.0, 0.0)  # of the patient in the scanner
    warp: Array = field(default_factory=lambda: np.zeros((3, *[WARP_TERMS] * 3), np.float32))


@dataclass
class Frame:
    """Coordinates in reference mm: before (`x0` …, broadcastable) and after displacement (`x` …)."""

    x0: Array
    y0: Array
    z0: Array
    x: Array
    y: Array
    z: Array

    def __getitem__(self, box: tuple[slice, ...]) -> Frame:
        a, b, c = box
        return Frame(self.x0[a], self.y0[:, b], self.z0[:, :, c], self.x[box], self.y[box], self.z[box])


def _cosines(t: Array) -> Array:
    """(…,) reference mm -> (…, WARP_TERMS)."""
    phase = (np.asarray(t, np.float32) / np.float32(REFERENCE_MM) + np.float32(0.5)) * np.float32(np.pi)
    return np.cos(phase[..., None] * np.arange(WARP_TERMS, dtype=np.float32))


def grid_frame(body: Body, axes: tuple[Array, Array, Array]) -> Frame:
    """Frame of a grid given its three axes in reference mm of this body."""
    bx, by, bz = (_cosines(a) for a in axes)
    x0, y0, z0 = (a.astype(np.float32).reshape(s) for a, s in zip(axes, _SHAPES, strict=True))
    bz, moved = np.ascontiguousarray(bz.T), []
    for k, start in enumerate((x0, y0, z0)):
        waves = np.einsum("klm,xk,yl->xym", body.warp[k], bx, by, optimize=True).astype(np.float32)
        whole = np.empty([len(a) for a in axes], np.float32)
        for i, plane in enumerate(waves):  # a plane at a time stays in the cache
            # not a matrix product, whose rounding may depend on the number of threads
            np.multiply(plane[:, :1], bz[0], out=whole[i])
            for m in range(1, WARP_TERMS):
                whole[i] += plane[:, m : m + 1] * bz[m]
            whole[i] += start[i if k == 0 else 0]
        moved.append(whole)
    return Frame(x0, y0, z0, *moved)


_SHAPES = ((-1, 1, 1), (1, -1, 1), (1, 1, -1))


def point_frame(body: Body, points: Array) -> Frame:
    """Frame of N points, (N, 3) reference mm before displacement."""
    points = np.asarray(points, np.float32).reshape(-1, 3)
    moved = points + _displacement(body, points)
    return Frame(*points.T.reshape(3, -1), *moved.T.reshape(3, -1))


def _displacement(body: Body, points: Array) -> Array:
    bx, by, bz = (_cosines(points[:, k]) for k in range(3))
    if len(points) > 12:  # numpy would look for a better order of the products, and end at this one
        return np.einsum("nm,nl,nk,cklm->nc", bz, by, bx, body.warp)
    order = _order(len(points))
    return np.einsum("cklm,nk,nl,nm->nc", body.warp, bx, by, bz, optimize=order).astype(np.float32)


@lru_cache
def _order(n: int) -> list[Any]:
    waves = np.empty((n, WARP_TERMS))
    return np.einsum_path("cklm,nk,nl,nm->nc", np.empty((3, *[WARP_TERMS] * 3)), waves, waves, waves)[0]


def undisplace(body: Body, points: Array) -> Array:
    """Where anatomy described at `points` (N, 3) lies before displacement: the inverse of the frame."""
    goal = np.asarray(points, np.float32).reshape(-1, 3)
    found = goal
    for _ in range(4):  # the displacement is gentle, so this fixed point converges fast
        found = goal - _displacement(body, found)
    return found


def radial(x: Array, y: Array, a: Array, b: Array, square: float | Array = 0.42) -> Array:
    """Distance along the ray from the centre to a slightly squared ellipse with half axes a, b."""
    x2, y2 = np.square(x / a), np.square(y / b)
    corner = x2 * y2
    np.minimum(corner, 1.0, out=corner)
    rho = x2 + y2
    rho -= square * corner
    rho += 1e-6
    np.sqrt(rho, out=rho)
    np.subtract(1.0, np.reciprocal(rho, out=rho), out=rho)
    rho *= np.sqrt(x * x + y * y)
    return rho


def ellipsoid(
    f: Frame, centre: tuple[float, ...], radii: tuple[float, ...], turn: float = 0.0, lean: float = 0.0
):
    """Distance to an ellipsoid; `turn` rotates in the axial plane, `lean` in the coronal one (radians)."""
    x, y, z = f.x - centre[0], f.y - centre[1], f.z - centre[2]
    if lean:
        c, s = math.cos(lean), math.sin(lean)
        x, z = c * x + s * z, c * z - s * x
    if turn:
        c, s = math.cos(turn), math.sin(turn)
        x, y = c * x + s * y, c * y - s * x
    for part, radius in zip((x, y, z), radii, strict=True):
        part *= 1.0 / radius
        part *= part
    x += y
    x += z
    rho = np.sqrt(x, out=x)
    rho -= 1.0
    rho *= float(np.mean(radii))
    return rho


def smooth_min(a: Array, b: Array, k: float) -> Array:
    """Union of two shapes with a fillet of width k."""
    h = a - b  # in place from here: these few lines take a third of the time of a volume
    np.abs(h, out=h)
    np.subtract(k, h, out=h)
    np.maximum(h, 0.0, out=h)
    h *= h
    h *= 0.25 / k
    return np.subtract(np.minimum(a, b), h, out=h)


def smooth_max(a: Array, b: Array, k: float) -> Array:
    """Intersection of two shapes with rounded edges."""
    d = smooth_min(-a, -b, k)
    return np.negative(d, out=d)


def _at(profile: Curve, z0: Array, column: int) -> Array:
    return _columns(profile, z0.tobytes(), z0.dtype)[column].reshape(z0.shape)


@lru_cache(maxsize=64)  # every slab of a volume asks for the same heights
def _columns(profile: Curve, z0: bytes, kind: np.dtype) -> Array:
    return profile(np.frombuffer(z0, kind)).astype(np.float32).T


def ramp(t: Array, low: float, high: float) -> Array:
    """0 below `low`, 1 above `high`, smooth between."""
    s = np.clip((t - low) / (high - low), 0.0, 1.0)
    return s * s * (3.0 - 2.0 * s)


def spine_y(z0: Array) -> Array:
    return _at(_SPINE, z0, 0)


def spine_radius(z0: Array) -> Array:
    return _at(_SPINE, z0, 1)


def level(z: Array) -> Array:
    """Vertebral level of a height: T1 = 1 … T12 = 12, L1 = 13 …, as a real number."""
    return np.interp(z, _LEVEL_KNOTS, _LEVEL(_LEVEL_KNOTS)[:, 0]).astype(np.float32)


def cavity_distance(f: Frame) -> Array:
    """To the inner surface of the rib cage and of the abdominal wall."""
    a, b, yc = (_at(_CAVITY, f.z0, k) for k in range(3))
    d = radial(f.x, f.y - yc, a, b)
    # the spine and its muscles push the cavity forward in the midline
    return d + 24.0 * np.exp(-((f.x0 / 23.0) ** 2)) * ramp(-f.y0, 5.0, 45.0)


def cavity_angle(f: Frame) -> Array:
    """Around the rib cage: 0 posterior midline, π/2 lateral, π anterior midline."""
    return np.arctan2(np.abs(f.x), cavity_y(f.z0) - f.y)


def cavity_y(z0: Array) -> Array:
    return _at(_CAVITY, z0, 2)


def body_distance(f: Frame, body: Body) -> Array:
    """To the skin."""
    share = body.fat * _at(_BODY, f.z0, 2)
    d = radial(
        f.x,
        f.y,
        _at(_BODY, f.z0, 0) + share,
        _at(_BODY, f.z0, 1) + 0.75 * share,
        0.4 + 0.26 * ramp(-f.y0, -10.0, 40.0),
    )
    d = d + 6.0 * np.exp(-((f.x0 / 13.0) ** 2)) * ramp(-f.y0, 30.0, 70.0)  # furrow of the back
    if body.breast:
        hill = np.exp(-(((np.abs(f.x0) - 58) / 34) ** 2) - ((f.z0 - 34) / 34) ** 2)
        d = d - body.breast * hill * ramp(f.y0, 25.0, 75.0)
    return d


def diaphragm(f: Frame, body: Body) -> Array:
    """Height of the diaphragm above each (x, y)."""
    x, y = f.x0, f.y0
    # fall towards the wall: deep behind, shallow in front (costophrenic recess)
    depth = 42.0 + 42.0 * ramp(-y, -25.0, 55.0)
    right = ((x - 56) / 57) ** 2 + ((y - 6) / 72) ** 2
    left = ((x + 58) / 55) ** 2 + ((y - 4) / 72) ** 2
    domes = [
        top - depth * (0.35 * q + 0.65 * q * q)
        for top, q in ((body.dome_right, right), (body.dome_left, left))
    ]
    tendon = min(body.dome_right, body.dome_left) - 5.0 - 0.012 * x * x - 30.0 * ramp(-y, -5, 40)
    return smooth_max(smooth_max(domes[0], domes[1], 10.0), tendon, 8.0)


def heart_distance(f: Frame, body: Body) -> Array:
    """To the surface of the heart: the union of its chambers."""
    d = None
    for centre, radii, turn, lean in heart_chambers(body).values():
        part = ellipsoid(f, centre, radii, turn, lean)
        d = part if d is None else smooth_min(d, part, 14.0)
    assert d is not None
    return d


def heart_chambers(
    body: Body,
) -> dict[str, tuple[tuple[float, float, float], tuple[float, ...], float, float]]:
    """Outer ellipsoids: centre, radii, turn, lean."""
    s, low = body.heart, min(body.dome_left, body.dome_right) + 6.0
    place = {
        "left_ventricle": ((-36, 12, 14), (38, 25, 26), 0.75, 0.35),
        "right_ventricle": ((-12, 36, 14), (35, 20, 26), 0.35, 0.25),
        "right_atrium": ((25, 20, 24), (20, 22, 26), 0.0, 0.0),
        "left_atrium": ((-2, -4, 34), (28, 16, 20), 0.0, 0.0),
    }
    return {
        name: ((s * c[0], 18 + s * (c[1] - 18), low + 2 + s * c[2]), tuple(s * r for r in radii), turn, lean)
        for name, (c, radii, turn, lean) in place.items()
    }


def mediastinum_distance(f: Frame, body: Body) -> Array:
    """Between the lungs: a column that thins in front, the heart with its fat, the spine."""
    width = _at(_MEDIASTINUM, f.z0, 0) * (1.0 - 0.75 * ramp(f.y0, 22.0, 50.0) * ramp(120.0 - f.z0, 0.0, 30.0))
    column = np.abs(f.x + 1.0) - width
    spine = np.hypot(f.x0 * 0.92, f.y0 - spine_y(f.z0)) - (spine_radius(f.z0) + 3.0)
    column = smooth_min(column, spine.astype(np.float32), 8.0)
    return smooth_min(column, heart_distance(f, body) - 4.0, 10.0)


def lung_distance(f: Frame, body: Body, cavity: Array) -> Array:
    """To both lungs (x > 0 is the right one). Great vessels and bronchi are painted over them."""
    d = np.maximum(cavity + 1.5, -mediastinum_distance(f, body))
    return smooth_max(d, 0.75 * (diaphragm(f, body) + 1.5 - f.z), 5.0)


def liver_distance(f: Frame, body: Body, cavity: Array) -> Array:
    """Under the right dome, against the wall, its lower edge rising to the left."""
    lower = -112.0 + 0.57 * (104.0 - f.x0) - 0.3 * f.y0
    lower = lower - 16.0 * ramp(f.x0, 40.0, 95.0)
    d = smooth_max(cavity + 3.5, 0.85 * (f.z - diaphragm(f, body) + 2.5), 8.0)
    d = smooth_max(d, 0.8 * (lower - f.z), 16.0)
    back = 27.0 - np.hypot(f.x0 * 0.8 + 8.0, f.y0 - spine_y(f.z0))  # spine, aorta, crura
    return smooth_max(d, smooth_max(back, -70.0 - f.x, 10.0), 8.0)


def gallbladder_distance(f: Frame) -> Array:
    """Below the right lobe of the liver."""
    return ellipsoid(f, (46, 36, -66), (11, 13, 17), 0.4, 0.2)
