"""Render a CT phantom, and write it as ordinary files with its cases.

Rendering paints the body, the organs and the lesions in HU, then does what a scanner does: blur,
correlated noise by kernel and dose, a table, padding outside the circular field of view.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

from smartlab.core.files import whole
from smartlab.data.cohort.case import Case, LabelSpec, Lesion
from smartlab.data.phantoms import body as geo
from smartlab.data.phantoms.abdomen import paint_abdomen
from smartlab.data.phantoms.canvas import Canvas
from smartlab.data.phantoms.curve import Array
from smartlab.data.phantoms.dicom import write_ct_series
from smartlab.data.phantoms.grid import Grid
from smartlab.data.phantoms.lesions import BASELINE, MARGINS, TEXTURES, Lump, reach, render_lump
from smartlab.data.phantoms.organs import (
    ORGANS,
    PHASES,
    great_vessels,
    paint_bones,
    paint_great_vessels,
    paint_heart,
    paint_lung_trees,
    paint_lungs,
    paint_wall,
)
from smartlab.data.phantoms.patient import DEFAULT, STREAM, Patient, affine, draw_patient, scale, world

FORMATS = ("nifti", "dicom")
FIELD_MM = (240, 520)
_UNIT: dict[str, Any] = {"kind": "number", "minimum": 0, "maximum": 1}
DESCRIPTION: dict[str, Any] = {
    "title": "Phantom chest and abdomen CT with nodules, tumours and organ labels",
    "modality": "CT",
    "description": (
        "Procedural CT of synthetic patients. A case per lung nodule (benign or malignant), a case per tumour "
        "(with an outcome), and a case without a lesion for scans that have neither."
    ),
    "organs": ORGANS,
    "labels": {
        "malignancy": LabelSpec(
            kind="binary", classes=["benign", "malignant"], description="of the nodule, as drawn"
        ),
        "margin": LabelSpec(kind="multiclass", classes=list(MARGINS)),
        "texture": LabelSpec(kind="multiclass", classes=list(TEXTURES)),
        "spiculation": LabelSpec(**_UNIT, description="generating parameter"),
        "lobulation": LabelSpec(**_UNIT, description="generating parameter"),
        "heterogeneity": LabelSpec(**_UNIT, description="generating parameter; of a tumour, its necrosis"),
        "tumour_site": LabelSpec(kind="multiclass", classes=["lung", "liver"]),
        "outcome": LabelSpec(
            kind="binary",
            classes=["no_response", "response"],
            description="one per patient with a tumour, likelier to respond when it is homogeneous",
        ),
        "time_months": LabelSpec(
            kind="time", unit="months", minimum=0, description="to the event or last follow-up"
        ),
        "event": LabelSpec(kind="event", minimum=0, maximum=1, description="1 progression, 0 censored"),
        "phase": LabelSpec(kind="multiclass", classes=list(PHASES), description="contrast phase"),
        "kernel": LabelSpec(
            kind="multiclass", classes=["soft", "sharp"], description="reconstruction kernel"
        ),
    },
    "notes": [
        *BASELINE,
        "Synthetic: numbers on this data show that the software works, nothing about patients.",
    ],
}


def megabytes(grid: Grid) -> float:
    """Of one patient on disk, roughly."""
    voxels = float(np.prod(grid.shape))
    return voxels * (1.05 if grid.format == "nifti" else 2.1) / 1e6


@dataclass(frozen=True)
class Rendered:
    """Images of one patient, all (X, Y, Z) RAS+ on one grid."""

    array: Array  # int16 HU
    labels: Array  # uint8, see organs.ORGANS
    masks: tuple[Array, ...]  # uint8, of the nodules in order, then of the tumour
    affine: Array


def render(patient: Patient, grid: Grid = DEFAULT) -> Rendered:
    """Paint one patient."""
    rng = np.random.default_rng([patient.seed, STREAM, patient.index, 2])
    shape, spacing = grid.shape, grid.spacing
    per_mm = scale(patient.body, grid)
    axes = [
        ((np.arange(n) - (n - 1) / 2) * spacing * per_mm[k] - patient.body.shift[k]).astype(np.float32)
        for k, n in enumerate(shape)
    ]
    # only the columns that the body can reach are painted
    reached = [(np.abs(axes[0]) < 158), (axes[1] > -116) & (axes[1] < 124), np.ones(shape[2], bool)]
    part = tuple(slice(int(np.flatnonzero(r)[0]), int(np.flatnonzero(r)[-1]) + 1) for r in reached)
    canvas = Canvas(patient.body, tuple(a[s] for a, s in zip(axes, part, strict=True)))  # type: ignore[arg-type]
    _paint_patient(canvas, patient, rng)
    hu = np.empty(shape, np.float32)
    hu[:] = _table(axes)[:, :, None]
    np.maximum(hu[part], canvas.hu, out=hu[part])
    masks = [_paint_lump(hu, patient, lump, grid) for lump in _lumps(patient)]
    labels = np.zeros(shape, np.uint8, order="F")
    labels[part] = canvas.labels
    array = _scan(hu, patient, axes, rng)
    if patient.padding is not None:
        x, y = np.meshgrid(np.arange(shape[0]), np.arange(shape[1]), indexing="ij")
        outside = np.hypot((x + 0.5) / shape[0] - 0.5, (y + 0.5) / shape[1] - 0.5) > 0.5
        array[outside] = patient.padding
    return Rendered(array, labels, tuple(masks), affine(patient, grid))


def _lumps(patient: Patient) -> list[Lump]:
    return [*patient.nodules, *([patient.tumour] if patient.tumour is not None else [])]


def _paint_patient(canvas: Canvas, patient: Patient, rng: np.random.Generator) -> None:
    hu, vessels = patient.hu, great_vessels(patient.body)
    cavity = paint_wall(canvas, hu, rng)
    paint_abdomen(canvas, hu, cavity, rng)
    paint_lungs(canvas, hu, cavity, rng)
    paint_heart(canvas, hu)
    paint_great_vessels(canvas, hu, vessels)
    paint_lung_trees(canvas, hu, vessels, rng)
    paint_bones(canvas, hu, cavity)


def _paint_lump(hu: Array, patient: Patient, lump: Lump, grid: Grid) -> Array:
    """Blend one lesion into the image; returns its mask."""
    shape, spacing = grid.shape, grid.spacing
    centre = (world(patient, lump.place, grid) - affine(patient, grid)[:3, 3]) / spacing
    half = reach(lump) / spacing
    low = np.maximum(np.floor(centre - half), 0).astype(int)
    high = np.minimum(np.ceil(centre + half) + 1, shape).astype(int)
    box = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
    offsets = tuple((np.arange(a, b) - c) * spacing for a, b, c in zip(low, high, centre, strict=True))
    cover, value, inside = render_lump(lump, offsets, spacing)  # type: ignore[arg-type]
    # ground glass veils what lies behind; it never darkens vessels or the pleura
    target = np.maximum(value, hu[box]) if lump.texture == "part-solid" else value
    hu[box] += cover * (target - hu[box])
    mask = np.zeros(shape, np.uint8, order="F")  # as NIfTI files are
    mask[box] = inside
    return mask


def _table(axes: list[Array]) -> Array:
    """HU (X, Y) of air and a curved couch below the patient: two thin skins round light foam."""
    x, y = axes[0][:, None], axes[1][None, :]
    top = -112.0 + 0.0011 * x * x
    depth = top - y
    inside = (depth > 0) & (depth < 13) & (np.abs(x) < 132)
    skin = inside & ((depth < 2.2) | (depth > 10.8))
    return np.where(skin, -320.0, np.where(inside, -920.0, -1000.0)).astype(np.float32)


def _scan(hu: Array, patient: Patient, axes: list[Array], rng: np.random.Generator) -> Array:
    """Blur by the kernel and add its noise, stronger in the middle and at the shoulders: int16 HU."""
    soft = patient.kernel == "soft"
    _smooth(hu, (0.12, 0.12, 0.12) if soft else (0.04, 0.04, 0.04))
    noise = rng.standard_normal(hu.shape, dtype=np.float32)
    _smooth(noise, (0.24, 0.24, 0.16) if soft else (0.1, 0.1, 0.08))
    x, y, z = axes[0][:, None, None], axes[1][None, :, None], axes[2][None, None, :]
    attenuation = np.exp(-((x / 120) ** 2) - (y / 90) ** 2)
    across, along = 0.35 + 0.75 * attenuation, 1.0 + 0.35 * geo.ramp(z, 95.0, 150.0)
    level = patient.noise / float(noise[::4, ::4, ::4].std())
    array = np.empty(hu.shape, np.int16)
    for i, plane in enumerate(hu):
        plane += noise[i] * (level * (across[i] * along[0]))
        array[i] = np.rint(np.clip(plane, -1024, 3071))
    return array


def _smooth(a: Array, shares: tuple[float, float, float]) -> None:
    """Three-tap filter (share, 1 − 2·share, share) along each axis, in place, plane by plane in the cache."""
    before = a[0]
    for i, plane in enumerate(a):
        raw = plane.copy()
        if 0 < i < len(a) - 1:
            _taps(plane, before, a[i + 1], shares[0])
        before = raw
        _taps(plane[1:-1], plane[:-2], plane[2:], shares[1])
        _taps(plane[:, 1:-1], plane[:, :-2], plane[:, 2:], shares[2])


def _taps(middle: Array, before: Array, after: Array, share: float) -> None:
    total = middle * (1 - 2 * share)
    total += share * before
    total += share * after
    middle[:] = total


# ---- files and cases ----


def name_of(index: int) -> str:
    return f"ct-{index:04d}"


def cases(seed: int, index: int, grid: Grid) -> list[Case]:
    """A case per nodule and one for a tumour; a scan with neither is one case without a lesion."""
    patient, name = draw_patient(seed, index, grid), name_of(index)
    suffix = "" if grid.format == "dicom" else ".nii.gz"
    shared: dict[str, Any] = {
        "patient": name,
        "image": f"images/{name}{suffix}",
        "label_map": f"labels/{name}.nii.gz",
        "fold": index % 5,
        "split": "train" if index % 10 < 7 else "val" if index % 10 == 7 else "test",
    }
    scan = {"phase": patient.phase, "kernel": patient.kernel}
    found = []
    for k, nodule in enumerate(patient.nodules, start=1):
        labels = {
            "malignancy": "malignant" if nodule.malignant else "benign",
            "margin": nodule.margin,
            "texture": nodule.texture,
            **{n: round(getattr(nodule, n), 3) for n in ("spiculation", "lobulation", "heterogeneity")},
        }
        mask = {"nodule": f"masks/{name}-n{k}.nii.gz"}
        lesion = _lesion(patient, nodule, grid)
        found.append(Case(id=f"{name}-n{k}", labels=scan | labels, masks=mask, lesion=lesion, **shared))
    if patient.tumour is not None and patient.outcome is not None:
        labels = {
            "tumour_site": patient.tumour.kind.split()[0],
            "outcome": "response" if patient.outcome.responded else "no_response",
            "time_months": patient.outcome.months,
            "event": float(patient.outcome.event),
            "heterogeneity": round(patient.tumour.heterogeneity, 3),
        }
        mask = {"tumour": f"masks/{name}-t.nii.gz"}
        lesion = _lesion(patient, patient.tumour, grid)
        found.append(Case(id=f"{name}-t", labels=scan | labels, masks=mask, lesion=lesion, **shared))
    return found or [Case(id=name, labels=scan, **shared)]


def _lesion(patient: Patient, lump: Lump, grid: Grid) -> Lesion:
    centre = world(patient, lump.place, grid).round(2)
    side = round(lump.diameter, 2)
    return Lesion(center_mm=tuple(centre.tolist()), box_mm=(side, side, side), diameter_mm=side)


def write(root: Path, seed: int, index: int, grid: Grid) -> None:
    """Render one patient and write the files, each appearing whole or not at all."""
    patient = draw_patient(seed, index, grid)
    made, rows = render(patient, grid), cases(seed, index, grid)
    save_labels(root, made, rows)
    image = root / str(rows[0].image)
    if grid.format == "nifti":
        save(image, made.array, made.affine)
        return
    with whole(image) as folder:
        write_ct_series(
            folder,
            made.array,
            made.affine,
            patient=name_of(index),
            key=grid.key("ct", seed, index),
            kernel=patient.kernel,
            padding=patient.padding,
        )


def save_labels(root: Path, made: Rendered, rows: list[Case]) -> None:
    for path, mask in zip((p for case in rows for p in case.masks.values()), made.masks, strict=True):
        save(root / path, mask, made.affine)
    save(root / str(rows[0].label_map), made.labels, made.affine)


def save(path: Path, array: Array, matrix: Array) -> None:
    image = nibabel.Nifti1Image(np.asfortranarray(array), matrix)
    image.header.set_xyzt_units("mm")
    # in noise there is nothing to find but the frequency of values, in labels and masks nothing but runs
    pack = zlib.compressobj(1, wbits=31, strategy=zlib.Z_RLE)
    with whole(path) as temporary:
        temporary.write_bytes(pack.compress(image.to_bytes()) + pack.flush())
