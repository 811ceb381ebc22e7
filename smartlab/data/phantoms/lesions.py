"""Nodules and tumours: what is drawn for each, and how it looks.

Size and density alone must not give the class away, margin and texture should: benign and malignant
nodules overlap widely in diameter and mean HU, less in spiculation, heterogeneity and calcification.
`BASELINE` states how far each description gets; a test measures it again.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from smartlab.data.phantoms.curve import Array

BASELINE = (
    "Nodule malignancy, AUC of a logistic regression cross-validated by patient (1,106 nodules of 500 patients): "
    "diameter and mean HU 0.68; spiculation and heterogeneity 0.93; all generating parameters 0.95. On the images "
    "of this manifest's first 128 patients at the default seed, diameter and mean HU inside the mask give 0.66.",
)
MARGINS = ("smooth", "lobulated", "spiculated")
TEXTURES = ("solid", "part-solid", "calcified")


@dataclass(frozen=True)
class Lump:
    """One nodule or tumour. `place` is in reference mm of the body; everything else in real mm or HU."""

    kind: str  # "nodule", "lung tumour" or "liver tumour"
    place: tuple[float, float, float]
    diameter: float
    malignant: bool
    spiculation: float  # 0 to 1
    lobulation: float  # 0 to 1
    heterogeneity: float  # 0 to 1
    texture: str
    hu: float
    calcium: float  # HU added inside calcifications
    eccentric: bool  # calcification off centre
    core: float  # solid share of the radius, part-solid only
    seed: int

    @property
    def margin(self) -> str:
        """What a reader would write down."""
        if self.spiculation > 0.45:
            return "spiculated"
        return "lobulated" if self.lobulation > 0.5 else "smooth"


def draw_nodule(rng: np.random.Generator, place: Array, diameter: float, malignant: bool) -> Lump:
    """The look of one nodule given its class; distributions of the classes overlap on purpose."""
    spiculation = rng.beta(3.0, 2.2) if malignant else rng.beta(1.6, 4.5)
    heterogeneity = rng.beta(3.0, 2.2) if malignant else rng.beta(2.0, 3.6)
    lobulation = rng.beta(2.4, 2.0) if malignant else rng.beta(1.8, 2.4)
    texture = str(rng.choice(TEXTURES, p=(0.62, 0.27, 0.11) if malignant else (0.64, 0.15, 0.21)))
    return Lump(
        kind="nodule",
        place=tuple(float(v) for v in place),  # type: ignore[arg-type]
        diameter=diameter,
        malignant=malignant,
        spiculation=float(spiculation),
        lobulation=float(lobulation),
        heterogeneity=float(heterogeneity),
        texture=texture,
        hu=float(rng.normal(38, 22)),
        calcium=float(rng.uniform(180, 520)) if texture == "calcified" else 0.0,
        eccentric=bool(rng.random() < (0.8 if malignant else 0.2)),
        core=float(rng.uniform(0.42, 0.75)),
        seed=int(rng.integers(2**31)),
    )


def draw_diameter(rng: np.random.Generator, malignant: bool) -> float:
    middle = 14.6 if malignant else 12.0
    return float(np.clip(middle * np.exp(rng.normal(0, 0.32)), 6.0, 30.0))


def draw_tumour(rng: np.random.Generator, kind: str, place: Array, diameter: float, hu: float) -> Lump:
    """A large mass; its heterogeneity (necrosis) later drives the outcome."""
    return Lump(
        kind=kind,
        place=tuple(float(v) for v in place),  # type: ignore[arg-type]
        diameter=diameter,
        malignant=True,
        spiculation=float(rng.beta(2, 3)) if kind == "lung tumour" else 0.0,
        lobulation=float(rng.beta(3, 2)),
        heterogeneity=float(rng.beta(1.3, 1.3)),
        texture="solid",
        hu=hu,
        calcium=0.0,
        eccentric=False,
        core=1.0,
        seed=int(rng.integers(2**31)),
    )


def reach(lump: Lump) -> float:
    """Half width in mm of the cube that holds all of the lump."""
    return 0.5 * lump.diameter * (1.2 + 0.4 * lump.lobulation) + _strand(lump) * 1.35 + 3.0


def _strand(lump: Lump) -> float:
    """Typical length of a spicule beyond the margin, mm."""
    return (5.0 + 0.625 * lump.diameter) * max(0.0, lump.spiculation - 0.08)


def _directions(rng: np.random.Generator, count: int) -> Array:
    v = rng.normal(0, 1, (count, 3))
    return (v / np.linalg.norm(v, axis=1, keepdims=True)).astype(np.float32)


def _dot(points: Array, directions: Array) -> Array:
    """(N, 3), (M, 3) -> (N, M). Not a matrix product, whose rounding may depend on the number of threads."""
    return np.einsum("nk,mk->nm", points, directions)


def render_lump(lump: Lump, offsets: tuple[Array, Array, Array], voxel: float) -> tuple[Array, Array, Array]:
    """Coverage (0 to 1), HU and mask of one lump on a small grid.

    offsets: mm from the lump's centre along x, y, z (1D each); voxel: mean voxel size in mm, the
    width of soft edges. The mask is the lump without its strands, as a reader would outline it.
    """
    rng = np.random.default_rng(lump.seed)
    p = np.stack(np.meshgrid(*offsets, indexing="ij"), -1).astype(np.float32)
    shape, p = p.shape[:3], p.reshape(-1, 3)
    squash = np.exp(rng.normal(0, 0.09, 3))
    p = p * (squash / squash.prod() ** (1 / 3)).astype(np.float32)
    r = np.linalg.norm(p, axis=1) + 1e-3
    radius = 0.5 * lump.diameter
    unit = p / r[:, None]
    bumps = np.exp(4.5 * (_dot(unit, _directions(rng, 9)) - 1.0)) @ rng.normal(0.25, 0.75, 9).astype(
        np.float32
    )
    edge = radius * (1.0 + 0.45 * lump.lobulation * (bumps - 0.25))
    inner = r / edge  # 0 at the centre, 1 at the margin
    cover = np.clip(0.5 + (edge - r) / voxel, 0, 1)
    mask = cover > 0.5
    if lump.spiculation > 0.05:
        spikes = _spikes(rng, lump, p, r, radius, voxel)
        cover = np.maximum(cover, spikes)
    hu = _inside(rng, lump, inner, p, radius, shape)
    return cover.reshape(shape), hu.reshape(shape), mask.reshape(shape)


def _spikes(rng: np.random.Generator, lump: Lump, p: Array, r: Array, radius: float, voxel: float) -> Array:
    """Tapering strands that radiate from the margin into the lung."""
    count = 18 + round(26 * lump.spiculation)
    length = radius + _strand(lump) * rng.uniform(0.5, 1.35, count).astype(np.float32)
    directions = _directions(rng, count)
    shell = np.flatnonzero((r > 0.6 * radius) & (r < length.max()))  # the rest is the lump itself, or too far
    along = _dot(p[shell], directions)  # (voxels, spikes)
    across = np.sqrt(np.maximum(r[shell, None] ** 2 - along**2, 0))
    # as wide as a strand at the margin, a thread at its tip
    width = (1.5 + 0.05 * radius) * np.clip((length - along) / (length - 0.8 * radius), 0, 1) ** 0.7 + 0.1
    share = np.clip(0.5 + (width - across) / voxel, 0, 1) * np.clip(2.4 * width / voxel, 0, 1)
    share[(along <= 0) | (along > length)] = 0
    cover = np.zeros(len(r), np.float32)
    cover[shell] = share.max(1)
    return cover


def _inside(
    rng: np.random.Generator, lump: Lump, inner: Array, p: Array, radius: float, shape: tuple[int, ...]
) -> Array:
    """HU of the substance: solid or with a ground-glass rim, necrosis and lucencies, calcium."""
    grain = ndimage.gaussian_filter(rng.normal(0, 1, shape).astype(np.float32), 1.1, truncate=2)
    waves = np.sin(_dot(p / (0.42 * radius + 1.0), _directions(rng, 4)) + rng.uniform(0, 6.3, 4)).mean(1)
    uneven = 0.6 * grain.reshape(-1) / max(float(grain.std()), 1e-3) * 0.5 + 1.9 * waves
    hu = lump.hu + lump.heterogeneity * 75.0 * uneven
    if lump.kind == "nodule":  # bubbles of air inside uneven nodules
        hu = hu - 330.0 * np.clip(lump.heterogeneity - 0.35, 0, 1) * (uneven < -0.75)
    else:  # a dark, necrotic core whose size follows heterogeneity
        core = np.clip((lump.heterogeneity * 1.05 - inner + 0.12 * uneven) * 4.0, 0, 1)
        hu = hu - (30.0 + 35.0 * lump.heterogeneity) * core
    if lump.texture == "part-solid":
        glass = np.clip((inner - lump.core) * radius / 1.5 + 0.5, 0, 1)
        hu = hu + glass * (-520.0 - hu)
    if lump.calcium:
        middle = _directions(rng, 1)[0] * radius * (0.48 if lump.eccentric else 0.08)
        size = radius * (0.26 if lump.eccentric else 0.42)
        grains = np.clip(1.0 - (np.linalg.norm(p - middle, axis=1) - size) / 1.5, 0, 1)
        hu = hu + lump.calcium * grains
    return hu.astype(np.float32)
