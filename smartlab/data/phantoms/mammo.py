"""Render a phantom mammogram, and write it as DICOM with PNG masks and its cases.

Painted with the chest wall on the left and mirrored at the end for a right breast. Tissue follows
power-law noise (Burgess 1999: anatomical noise falls as 1/f³), gathered towards the nipple and
streaked along the ducts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from scipy import fft, ndimage

from smartlab.core.files import whole
from smartlab.data.cohort.case import Case, LabelSpec, Lesion
from smartlab.data.phantoms.breast import (
    DEFAULT,
    MARGINS,
    STREAM,
    Mass,
    Patient,
    draw_patient,
    edge,
    mass_centre,
    pectoral,
    scale,
)
from smartlab.data.phantoms.curve import Array
from smartlab.data.phantoms.dicom import write_mammogram
from smartlab.data.phantoms.grid import Grid

FORMATS = ("dicom",)
FIELD_MM = (150, 330)
DESCRIPTION: dict[str, Any] = {
    "title": "Phantom mammograms with masses of five margin classes",
    "modality": "MG",
    "description": (
        "Procedural mammograms (CC and MLO views of one breast per patient). A case per mass and view; a view "
        "without a mass is a case without a lesion. Lesion centres are in the image frame: mm from the centre of "
        "the first pixel, columns then rows."
    ),
    "labels": {
        "pathology": LabelSpec(
            kind="binary", classes=["benign", "malignant"], description="of the mass, as drawn"
        ),
        "mass_margins": LabelSpec(kind="multilabel", classes=list(MARGINS)),
        "abnormality": LabelSpec(kind="multiclass", classes=["mass"]),
        "breast_density": LabelSpec(
            kind="number", minimum=1, maximum=4, description="1 fatty, 4 extremely dense"
        ),
        "laterality": LabelSpec(kind="multiclass", classes=["L", "R"]),
        "view": LabelSpec(kind="multiclass", classes=["CC", "MLO"]),
    },
    "notes": [
        "Chance of malignancy by margin: circumscribed 0.12, obscured 0.30, microlobulated 0.50, ill-defined 0.60, "
        "spiculated 0.88; the mean where a mass has two margins. Size and brightness hardly differ.",
        "Synthetic: numbers on this data show that the software works, nothing about patients.",
    ],
}


def megabytes(grid: Grid) -> float:
    """Of one image on disk, roughly."""
    return float(np.prod(grid.shape)) * 2.0 / 1e6


def render(patient: Patient, view: str, grid: Grid = DEFAULT) -> tuple[Array, list[Array]]:
    """The image (rows, columns) uint16 0 to 4095, bright where dense, and a uint8 mask per mass."""
    rng = np.random.default_rng([patient.seed, STREAM, patient.index, 1 + (view == "MLO")])
    per_mm = scale(grid)
    rows, columns = grid.shape
    y = ((np.arange(rows) - 0.5 * (rows - 1)) * grid.spacing / per_mm).astype(np.float32)[:, None]
    x = ((np.arange(columns) + 0.5) * grid.spacing / per_mm).astype(np.float32)[None, :]
    outline = ndimage.gaussian_filter1d(rng.normal(0, 1, rows), 14 / grid.spacing * per_mm)
    skin = edge(patient, view, y) + (1.2 / max(outline.std(), 1e-6) * outline).astype(np.float32)[:, None]
    tip = (float(edge(patient, view, np.array([_tip(patient, view)]))[0]), _tip(patient, view))
    nipple = np.hypot(x - tip[0] + 2.0, (y - tip[1]) * 0.75) < 4.2
    breast = (x < skin) | nipple
    depth = ndimage.distance_transform_edt(breast, sampling=grid.spacing / per_mm).astype(np.float32)
    depth[:, 0] = np.maximum(depth[:, 0], 1e-3)
    image = _tissue(patient, view, rng, x, y, depth, tip, grid.spacing / per_mm)
    image += 450 * nipple * np.clip(depth / 4, 0, 1)
    masks = [_paint_mass(image, patient, view, mass, grid) for mass in patient.masses]
    # the compressed breast thins towards the skin, which itself is a fine bright line
    roll = np.clip(depth / 24.0, 0, 1)
    image *= 0.5 + 0.5 * np.sqrt(1 - (1 - roll) ** 2)
    image += 330 * np.exp(-(((depth - 0.9) / 0.7) ** 2))
    image = np.where(breast, image, 0)
    image = ndimage.gaussian_filter(image, 0.6) + rng.normal(0, 1, image.shape) * (
        8 + 0.35 * np.sqrt(np.maximum(image, 0))
    )
    image = np.clip(np.rint(image + 30 * ~breast), 0, 4095).astype(np.uint16)
    return (image[:, ::-1] if patient.laterality == "R" else image), masks


def _tip(patient: Patient, view: str) -> float:
    return patient.sag if view == "MLO" else 0.0


def _power_noise(rng: np.random.Generator, shape: tuple[int, int], beta: float, low: float = 0.0) -> Array:
    """Noise with power ∝ 1/f^beta, zero mean, unit variance; frequencies below `low` (cycles/image) are flat."""
    white = fft.rfft2(rng.standard_normal(shape, dtype=np.float32))
    f = np.hypot(np.fft.fftfreq(shape[0])[:, None] * shape[0], np.fft.rfftfreq(shape[1]) * shape[0])
    noise = fft.irfft2(white * np.maximum(f, max(low, 1.0)).astype(np.float32) ** (-beta / 2), shape)
    noise -= noise.mean()
    return (noise / noise.std()).astype(np.float32)


def _ducts(rng: np.random.Generator, x: Array, y: Array, tip: tuple[float, float]) -> Array:
    """Noise streaked along the rays from the nipple, unit variance."""
    texture = ndimage.gaussian_filter(rng.normal(0, 1, (256, 360)), (7, 1.6))
    r, angle = np.hypot(x - tip[0] - 12, y - tip[1]), np.arctan2(y - tip[1], tip[0] + 12 - x)
    bend = angle + 0.25 * np.sin(r / 22.0)
    at = np.stack([np.clip(r * 1.4, 0, 254), (bend / np.pi + 1) * 179])
    streaks = ndimage.map_coordinates(texture.astype(np.float32), at, order=1, mode="nearest")
    return streaks / texture.std()


def _tissue(
    patient: Patient,
    view: str,
    rng: np.random.Generator,
    x: Array,
    y: Array,
    depth: Array,
    tip: tuple[float, float],
    pixel: float,
) -> Array:
    """Fat, fibroglandular tissue, ligaments and the pectoral muscle, in grey values."""
    shape = depth.shape
    coarse, fine = _power_noise(rng, shape, 3.2, 2.0), _power_noise(rng, shape, 2.6, 6.0)
    ducts = _ducts(rng, x, y, tip)
    # glandular tissue is a cone from the nipple, behind a rim of fat
    along = (tip[0] - x) / tip[0]
    cone = np.exp(
        -(((y - tip[1]) / (patient.half_height * (0.22 + 0.5 * along.clip(0, 1)))) ** 2)
        - ((along - 0.42) / 0.42) ** 2
    )
    level = {1: -1.15, 2: -0.35, 3: 0.35, 4: 1.15}[patient.density]
    field = 2.6 * (cone - 0.52) + 0.75 * coarse + 0.34 * fine + 0.34 * ducts + level
    field -= 2.2 * np.exp(-depth / 5.0)
    gland = 1.0 / (1.0 + np.exp(-2.6 * field))
    image = 880.0 + 75.0 * coarse + 55.0 * fine
    image += gland * (820.0 + 150.0 * patient.density + 120.0 * fine + 110.0 * ducts)
    # Cooper's ligaments: thin curved sheets where slow noises change sign
    for _ in range(2):
        wave = _power_noise(rng, shape, 3.6, 5.0) + 0.45 * ducts
        slope = np.hypot(*np.gradient(wave, pixel)) + 0.01
        line = np.exp(-((wave / slope / 0.42) ** 2))
        image += line * (150.0 + 90.0 * fine.clip(-1, 2)) * np.clip(depth / 3, 0, 1)
    inside = pectoral(patient, view, y) - x
    muscle = 1.0 / (1.0 + np.exp(-np.clip((inside + 0.9 * coarse) / 1.4, -30, 30)))
    strands = np.sin(inside / 2.3 + 2.0 * coarse) * fine
    image += muscle * (1650.0 + 5.0 * inside.clip(0, 60) + 110.0 * coarse + 60.0 * strands - image)
    return image.astype(np.float32)


def _paint_mass(image: Array, patient: Patient, view: str, mass: Mass, grid: Grid) -> Array:
    """Add one mass to the (unmirrored) image; returns its mask in the stored image."""
    rng = np.random.default_rng([mass.seed, view == "MLO"])
    column, row = mass_centre(patient, view, mass, grid)
    if patient.laterality == "R":
        column = grid.shape[1] - 1 - column
    radius = 0.5 * mass.diameter
    reach = int(3.2 * radius / grid.spacing) + 2
    top, left = max(int(row) - reach, 0), max(int(column) - reach, 0)
    box = (slice(top, int(row) + reach + 1), slice(left, int(column) + reach + 1))
    patch = image[box]
    y = ((np.arange(patch.shape[0]) + top - row) * grid.spacing)[:, None]
    x = ((np.arange(patch.shape[1]) + left - column) * grid.spacing)[None, :]
    added, inside = _mass_profile(mass, rng, x, y, radius)
    behind = ndimage.gaussian_filter(patch, 0.7 * radius / grid.spacing)  # a mass takes the place of tissue
    patch += (0.75 * added.clip(0, 1) * (behind - patch) + mass.contrast * added).astype(np.float32)
    mask = np.zeros(grid.shape, np.uint8)
    mask[box][inside] = 255
    return mask[:, ::-1] if patient.laterality == "R" else mask


def _mass_profile(
    mass: Mass, rng: np.random.Generator, x: Array, y: Array, radius: float
) -> tuple[Array, Array]:
    """Brightness added by a mass (about 1 in its middle), and its inside."""
    turn = rng.uniform(0, np.pi)
    u, v = np.cos(turn) * x + np.sin(turn) * y, np.cos(turn) * y - np.sin(turn) * x
    v = v / mass.roundness
    r, angle = np.hypot(u, v), np.arctan2(v, u)
    wave = rng.uniform(0, 2 * np.pi, 8)
    bound = 1 + 0.05 * np.sin(2 * angle + wave[0]) + 0.04 * np.sin(3 * angle + wave[1])
    if "microlobulated" in mass.margins:
        lobes = rng.integers(8, 13)
        bound = (
            bound + 0.13 * np.abs(np.sin(0.5 * lobes * angle + wave[2])) + 0.04 * np.sin(5 * angle + wave[3])
        )
    if {"ill_defined", "spiculated"} & set(mass.margins):
        bound = bound + 0.09 * np.sin(4 * angle + wave[4]) + 0.07 * np.sin(7 * angle + wave[5])
    rho = r / (radius * bound)
    blur = 0.035 + 0.2 * ("ill_defined" in mass.margins) + 0.06 * ("spiculated" in mass.margins)
    shade = 1.0 / (1.0 + np.exp(np.clip((rho - 1.0) / blur, -40, 40)))
    body = 0.55 + 0.45 * np.sqrt(np.clip(1 - rho * rho, 0, 1))  # a lump is thickest in its middle
    added = shade * body
    if "circumscribed" in mass.margins:
        added = added - 0.13 * np.exp(-(((rho - 1.1) / 0.07) ** 2))  # a fine dark halo
    if "obscured" in mass.margins:  # the margin is lost in dense tissue on one side
        side = np.cos(angle - wave[6])
        veil = np.exp(
            -(
                ((u - 0.95 * radius * np.cos(wave[6])) ** 2 + (v - 0.95 * radius * np.sin(wave[6])) ** 2)
                / (0.95 * radius) ** 2
            )
        )
        soft = 1.0 / (1.0 + np.exp(np.clip((rho - 1.0) / 0.3, -40, 40)))
        hidden = 1.0 / (1.0 + np.exp(-5.0 * (side - 0.1)))
        added = added * (1 - hidden) + soft * body * hidden + 0.6 * veil
    if "spiculated" in mass.margins:
        added = added + _spicules(rng, u, v, r, radius)
    return added, rho < 1.0


def _spicules(rng: np.random.Generator, u: Array, v: Array, r: Array, radius: float) -> Array:
    """Straight, tapering strands around a spiculated mass."""
    total = np.zeros(r.shape)
    for angle in rng.uniform(0, 2 * np.pi, int(rng.integers(22, 36))):
        length = radius * rng.uniform(1.5, 2.9)
        along = np.cos(angle) * u + np.sin(angle) * v
        across = np.cos(angle) * v - np.sin(angle) * u + rng.normal(0, 0.004) * along**2
        fade = np.clip(1 - along / length, 0, 1) * (along > 0)
        width = 0.28 + 0.55 * fade
        total = np.maximum(total, rng.uniform(0.3, 0.6) * np.sqrt(fade) * np.exp(-((across / width) ** 2)))
    return total * np.clip(r / radius - 0.3, 0, 1)


# ---- files and cases ----


def _images(patient: Patient) -> list[tuple[str, str]]:
    """Name and view of each image."""
    return [(f"mg-{patient.index:04d}-{patient.laterality}-{view}", view) for view in patient.views]


def cases(seed: int, index: int, grid: Grid) -> list[Case]:
    """A case per mass and view; a view without a mass is one case without a lesion."""
    patient = draw_patient(seed, index)
    found = []
    for name, view in _images(patient):
        shared: dict[str, Any] = {
            "patient": f"mg-{index:04d}",
            "image": f"images/{name}.dcm",
            "fold": index % 5,
            "split": "train" if index % 10 < 8 else "test",
        }
        scan = {"breast_density": float(patient.density), "laterality": patient.laterality, "view": view}
        for k, mass in enumerate(patient.masses, start=1):
            labels = {
                "pathology": "malignant" if mass.malignant else "benign",
                "mass_margins": list(mass.margins),
                "abnormality": "mass",
            }
            column, row = mass_centre(patient, view, mass, grid)
            side = round(mass.diameter, 2)
            lesion = Lesion(
                center_mm=(round(column * grid.spacing, 2), round(row * grid.spacing, 2), 0.0),
                box_mm=(side, side, 0.0),
                diameter_mm=side,
                frame="image",
            )
            mask = {"lesion": f"masks/{name}-m{k}.png"}
            found.append(Case(id=f"{name}-m{k}", labels=scan | labels, masks=mask, lesion=lesion, **shared))
        if not patient.masses:
            found.append(Case(id=name, labels=scan, **shared))
    return found


def write(root: Path, seed: int, index: int, grid: Grid) -> None:
    """Render one patient and write the files, each appearing whole or not at all."""
    patient = draw_patient(seed, index)
    for (name, view), monochrome in zip(_images(patient), patient.monochrome, strict=True):
        image, masks = render(patient, view, grid)
        for k, mask in enumerate(masks, start=1):
            with whole(root / f"masks/{name}-m{k}.png") as temporary:
                Image.fromarray(mask).save(temporary, format="PNG")
        with whole(root / f"images/{name}.dcm") as temporary:
            write_mammogram(
                temporary,
                image,
                patient=f"mg-{index:04d}",
                key=grid.key("mammo", seed, index),
                laterality=patient.laterality,
                view=view,
                spacing=grid.spacing,
                monochrome=monochrome,
            )
