"""What is random about one mammogram phantom: the breast, its masses, and where these lie in each view.

Geometry is in mm with the chest wall on the left: x from the wall, y downwards from the middle of the
image. Drawing makes no image; it depends on the seed and the patient's index only.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from smartlab.data.phantoms.curve import Array
from smartlab.data.phantoms.grid import Grid

DEFAULT = Grid((1024, 768), 0.25, "dicom")
STREAM = 2
MARGINS = ("circumscribed", "ill_defined", "spiculated", "obscured", "microlobulated")
_SHARE = (0.26, 0.24, 0.22, 0.16, 0.12)
# chance that a mass with this margin is malignant
_RISK = {
    "circumscribed": 0.12,
    "obscured": 0.3,
    "microlobulated": 0.5,
    "ill_defined": 0.6,
    "spiculated": 0.88,
}
_PAIRS = {
    "ill_defined": "spiculated",
    "circumscribed": "obscured",
    "microlobulated": "ill_defined",
    "obscured": "ill_defined",
    "spiculated": "ill_defined",
}


@dataclass(frozen=True)
class Mass:
    """One mass; its depth from the nipple is the same in both views, its height is not."""

    margins: tuple[str, ...]
    malignant: bool
    diameter: float  # mm, the longer one
    roundness: float  # shorter through longer diameter
    contrast: float  # grey values above the tissue
    depth: float  # share of the way from the nipple to the wall
    height: tuple[float, float]  # share of the half height, in CC and MLO
    seed: int


@dataclass(frozen=True)
class Patient:
    """One breast of one patient, mm; the views share it."""

    seed: int
    index: int
    laterality: str  # "L" or "R"
    views: tuple[str, ...]
    density: int  # 1 fatty … 4 extremely dense
    depth: float  # wall to nipple
    half_height: float
    sag: float  # the nipple lies this much below the middle in MLO
    muscle: float  # width of the pectoral muscle at the top of MLO, share of `depth`
    monochrome: tuple[int, ...]  # photometric interpretation of each view
    masses: tuple[Mass, ...]


@lru_cache(maxsize=1024)
def draw_patient(seed: int, index: int) -> Patient:
    """Patient `index` of the cohort `seed`."""
    rng = np.random.default_rng([seed, STREAM, index])
    views = [("CC", "MLO"), ("CC",), ("MLO",)][rng.choice(3, p=(0.84, 0.08, 0.08))]
    count = int(rng.choice(3, p=(0.08, 0.82, 0.1)))
    return Patient(
        seed=seed,
        index=index,
        laterality=str(rng.choice(("L", "R"))),
        views=views,
        density=int(rng.choice((1, 2, 3, 4), p=(0.15, 0.38, 0.34, 0.13))),
        depth=rng.uniform(78, 128),
        half_height=rng.uniform(72, 104),
        sag=rng.uniform(8, 30),
        muscle=rng.uniform(0.28, 0.41),
        monochrome=tuple(int(v) for v in rng.choice((1, 2), len(views), p=(0.3, 0.7))),
        masses=tuple(_draw_mass(rng) for _ in range(count)),
    )


def _draw_mass(rng: np.random.Generator) -> Mass:
    margin = str(rng.choice(MARGINS, p=_SHARE))
    margins = (margin, _PAIRS[margin]) if rng.random() < 0.16 else (margin,)
    malignant = bool(rng.random() < np.mean([_RISK[m] for m in margins]))
    return Mass(
        margins=tuple(sorted(margins)),
        malignant=malignant,
        diameter=float(np.clip((15.5 if malignant else 14.0) * np.exp(rng.normal(0, 0.32)), 7, 32)),
        roundness=rng.uniform(0.68, 0.98),
        contrast=rng.uniform(600, 1000) + 40 * malignant,
        depth=rng.uniform(0.22, 0.68),
        height=(rng.uniform(-0.5, 0.5), rng.uniform(-0.5, 0.5)),
        seed=int(rng.integers(2**31)),
    )


# ---- geometry of a view ----


def scale(grid: Grid) -> float:
    """Real mm per drawn mm: a smaller field of view holds a smaller breast."""
    return min(1.0, grid.shape[0] * grid.spacing / 256.0, grid.shape[1] * grid.spacing / 160.0)


def edge(patient: Patient, view: str, y: Array) -> Array:
    """Distance from the chest wall to the skin at each height, mm; negative outside the breast."""
    if view == "CC":
        t = np.abs(y) / patient.half_height
        return patient.depth * np.sign(1 - t) * np.abs(1 - t**2.3) ** (1 / 1.9)
    # MLO: reaches the top of the image towards the armpit, hangs below the middle
    t = (y - patient.sag) / patient.half_height
    lower = np.sign(1 - t) * np.abs(1 - np.abs(t) ** 2.4) ** (1 / 2.0)
    upper = 1.0 - 0.52 * (1 - np.exp(-((np.minimum(t, 0) / 0.85) ** 2)))
    return patient.depth * np.where(t > 0, lower, upper)


def pectoral(patient: Patient, view: str, y: Array) -> Array:
    """Width of the pectoral muscle at each height, mm."""
    if view == "CC":
        return np.full_like(y, -10.0)
    t = (y + 128.0) / (150.0 + patient.sag)  # 0 at the top of the image, 1 where it ends
    return patient.muscle * patient.depth * (1 - t) * (1 + 0.35 * t)


def mass_centre(patient: Patient, view: str, mass: Mass, grid: Grid) -> tuple[float, float]:
    """Column and row of the centre of a mass in the stored image, in pixels."""
    per_mm = scale(grid)
    middle = patient.sag if view == "MLO" else 0.0
    radius = 0.5 * mass.diameter / per_mm
    y = middle + mass.height[view == "MLO"] * patient.half_height
    inner = float(pectoral(patient, view, np.array([y]))[0])
    skin = float(edge(patient, view, np.array([y]))[0])
    low, high = max(inner, 0.0) + 0.6 * radius + 4.0, skin - radius - 5.0
    x = low + (1 - mass.depth) * max(high - low, 0.0)
    column = x * per_mm / grid.spacing - 0.5
    if patient.laterality == "R":
        column = grid.shape[1] - 1 - column
    return column, y * per_mm / grid.spacing + 0.5 * (grid.shape[0] - 1)
