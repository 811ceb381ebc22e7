"""What is random about one CT phantom: body, scanner settings, lesions and where they lie, outcome.

Drawing makes no volume. It costs some ten milliseconds, fixes everything that a manifest says about
the patient, and depends on the seed, the patient's index and the grid, never on the cohort's size.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from smartlab.data.phantoms import body as geo
from smartlab.data.phantoms.body import Body
from smartlab.data.phantoms.curve import Array
from smartlab.data.phantoms.grid import Grid
from smartlab.data.phantoms.lesions import Lump, draw_diameter, draw_nodule, draw_tumour
from smartlab.data.phantoms.organs import PHASES, great_vessels, tissue_hu

DEFAULT = Grid((160, 160, 160), 2.0, "nifti")
STREAM = 1  # separates the random numbers of CT phantoms from those of mammograms


@dataclass(frozen=True)
class Outcome:
    """Driven by the heterogeneity of the tumour, with noise."""

    responded: bool
    months: float
    event: bool


@dataclass(frozen=True)
class Patient:
    """Everything that is random about one CT phantom, except grain and noise."""

    seed: int
    index: int
    body: Body
    phase: str
    kernel: str  # "soft" or "sharp"
    noise: float  # HU, standard deviation at the centre
    padding: int | None  # value outside the circular field of view
    hu: dict[str, float]
    position: tuple[float, float, float]  # world mm of the centre of the image
    nodules: tuple[Lump, ...]
    tumour: Lump | None
    outcome: Outcome | None


def scale(body: Body, grid: Grid) -> Array:
    """Reference mm per real mm along each axis."""
    return geo.REFERENCE_MM / (np.array(grid.shape) * grid.spacing * body.size)


@lru_cache(maxsize=1024)
def draw_patient(seed: int, index: int, grid: Grid = DEFAULT) -> Patient:
    """Patient `index` of the cohort `seed`. The grid matters only for how much room a lesion needs."""
    rng = np.random.default_rng([seed, STREAM, index])
    body = _draw_body(rng)
    phase = str(rng.choice(PHASES, p=(0.35, 0.2, 0.45)))
    kernel = str(rng.choice(("soft", "sharp"), p=(0.6, 0.4)))
    noise = float(rng.uniform(9, 22) * (1.9 if kernel == "sharp" else 1.0))
    padding = int(rng.choice((-1024, -2000))) if rng.random() < 0.25 else None
    hu = tissue_hu(phase, rng)
    position = (rng.uniform(-12, 12), rng.uniform(-12, 12) - 160, rng.uniform(-400, -100))
    lesions = np.random.default_rng([seed, STREAM, index, 1])
    tumour, outcome = _draw_tumour(lesions, body, hu, grid)
    nodules = _draw_nodules(lesions, body, grid, tumour)
    return Patient(seed, index, body, phase, kernel, noise, padding, hu, position, nodules, tumour, outcome)


def _draw_body(rng: np.random.Generator) -> Body:
    terms = np.arange(geo.WARP_TERMS)
    order = terms[:, None, None] + terms[None, :, None] + terms
    warp = rng.normal(0, 2.4, (3, *order.shape)) / (1.0 + order) ** 1.1
    dome = rng.uniform(-14, 10)
    return Body(
        size=float(rng.uniform(0.92, 1.04)),
        fat=float(np.clip(rng.gamma(3.2, 3.2), 3.0, 24.0)),
        breast=float(rng.uniform(8, 22)) if rng.random() < 0.45 else 0.0,
        dome_right=float(dome + rng.uniform(8, 16)),
        dome_left=float(dome),
        heart=float(rng.uniform(0.9, 1.1)),
        shift=(float(rng.normal(0, 2)), float(rng.normal(3, 2)), 0.0),
        warp=warp.astype(np.float32),
    )


# ---- lesions ----


def _free_places(
    rng: np.random.Generator, body: Body, organ: str, depth: tuple[float, float], room: float
) -> Array:
    """Random points (N, 3) in reference mm, `depth` (least, most) inside an organ, clear of great vessels."""
    # of the liver, the right lobe above kidney and gallbladder: what lies left of it is close to the stomach
    low, high = ((-108, -75, -70), (108, 75, 148)) if organ == "lung" else ((5, -65, -62), (105, 70, 10))
    f = geo.point_frame(body, rng.uniform(low, high, (1500, 3)))
    points = np.stack([f.x0, f.y0, f.z0], -1)
    d = (geo.lung_distance if organ == "lung" else geo.liver_distance)(f, body, geo.cavity_distance(f))
    ok = (d < -depth[0]) & (d > -depth[1]) & (geo.gallbladder_distance(f) > room)
    moved = np.stack([f.x, f.y, f.z], -1)
    vessels = np.concatenate(list(great_vessels(body).values()))[::3]
    gap = np.linalg.norm(moved[ok, None] - vessels[:, :3], axis=-1) - vessels[:, 3]
    return points[ok][gap.min(1) > room]


def _draw_tumour(
    rng: np.random.Generator, body: Body, hu: dict[str, float], grid: Grid
) -> tuple[Lump | None, Outcome | None]:
    """A mass of the lung or the liver in three patients of five."""
    present, in_lung = rng.random() < 0.6, rng.random() < 0.6
    diameter = float(np.clip(36 * np.exp(rng.normal(0, 0.25)), 24, 58))
    child = np.random.default_rng(rng.integers(2**63))
    if not present:
        return None, None
    organ = "lung" if in_lung else "liver"
    for _ in range(6):
        radius = 0.5 * diameter * scale(body, grid).mean()
        places = _free_places(child, body, organ, (0.62 * radius, 80.0), 0.6 * radius)
        if len(places):
            value = 45 + 0.35 * (hu["muscle"] - 50) if in_lung else hu["liver"] - child.uniform(18, 45)
            lump = draw_tumour(child, f"{organ} tumour", places[0], diameter, float(value))
            risk = 1.0 / (1.0 + np.exp(-(6.0 * (lump.heterogeneity - 0.5))))
            responded = bool(child.random() > risk)
            months = child.exponential(22.0 * np.exp(-1.6 * (lump.heterogeneity - 0.4)))
            censored = child.uniform(6, 60)
            return lump, Outcome(responded, round(float(min(months, censored)), 1), bool(months <= censored))
        diameter *= 0.8
    return None, None


def _draw_nodules(rng: np.random.Generator, body: Body, grid: Grid, tumour: Lump | None) -> tuple[Lump, ...]:
    """None to six nodules, apart from each other, some of them touching the pleura."""
    count = int(rng.choice(7, p=(0.2, 0.2, 0.2, 0.16, 0.12, 0.08, 0.04)))
    per_mm = float(scale(body, grid).mean())
    taken = [] if tumour is None else [(np.array(tumour.place), 0.75 * tumour.diameter * per_mm)]
    found: list[Lump] = []
    for _ in range(count):
        malignant = bool(rng.random() < 0.45)
        diameter = draw_diameter(rng, malignant)
        radius = 0.5 * diameter * per_mm
        deep = (radius + 1.5, 60.0) if rng.random() < 0.8 else (0.7 * radius, radius + 1.5)
        places = _free_places(rng, body, "lung", deep, radius + 2.5)
        clear = [p for p in places if all(np.linalg.norm(p - q) > 2.0 * radius + r + 6 for q, r in taken)]
        if clear:
            taken.append((clear[0], radius))
            found.append(draw_nodule(rng, clear[0], diameter, malignant))
    return tuple(found)


def world(patient: Patient, place: tuple[float, ...], grid: Grid) -> Array:
    """Reference mm of the body -> RAS world mm."""
    return (np.array(place) + patient.body.shift) / scale(patient.body, grid) + patient.position


def affine(patient: Patient, grid: Grid) -> Array:
    """Voxel index -> RAS world mm."""
    matrix = np.diag([grid.spacing] * 3 + [1.0])
    matrix[:3, 3] = np.array(patient.position) - 0.5 * grid.spacing * (np.array(grid.shape) - 1)
    return matrix
