"""Make the pictures of the README: `python docs/make_pictures.py [phantom-ct phantom-mammo …]`.

The functions draw pictures below docs/images that follow from seeds; the others are taken from the
notebooks as `make demo` ran them (runs/demo, or the folder in SMARTLAB_DEMO).
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from PIL import Image

from smartlab.core.plots import OKABE_ITO
from smartlab.data.phantoms import breast, ct, mammo
from smartlab.data.phantoms.organs import ORGANS
from smartlab.data.phantoms.patient import DEFAULT, Patient, affine, draw_patient, world

IMAGES = Path(__file__).parent / "images"
LUNG, SOFT = (-1350, 150), (-150, 250)


def phantom_ct() -> None:
    """One patient: coronal and sagittal, axial in two windows, labels; below, nodules of both classes."""
    image = ct.render(_calm_patient())
    fig = plt.figure(figsize=(10, 6.8), facecolor="black")
    front, side, chest, liver, kidneys = (0, 86, 0), (81, 0, 0), (0, 0, 96), (0, 0, 57), (0, 0, 36)
    upper = [(front, LUNG), (front, SOFT), (side, SOFT), (front, SOFT)]
    lower = [(chest, LUNG), (chest, SOFT), (liver, SOFT), (kidneys, SOFT)]
    for row, (bottom, height) in zip((upper, lower), ((0.555, 0.445), (0.285, 0.265)), strict=True):
        for k, (plane, window) in enumerate(row):
            panel = fig.add_axes((0.25 * k, bottom, 0.248, height))
            panel.imshow(
                _plane(image.array, plane),
                cmap="gray",
                vmin=window[0],
                vmax=window[1],
                interpolation="bicubic",
            )
            panel.axis("off")
            if row is upper and k == 3:
                shown = np.ma.masked_equal(_plane(image.labels, plane), 0)
                panel.imshow(
                    shown, cmap="gist_rainbow", vmin=1, vmax=len(ORGANS), alpha=0.5, interpolation="nearest"
                )
    for k, (name, malignant) in enumerate((("benign nodules", False), ("malignant nodules", True))):
        panel = fig.add_axes((0.003 + 0.5 * k, 0.0, 0.494, 0.255))
        panel.imshow(_nodules(malignant), cmap="gray", vmin=-1000, vmax=250, interpolation="bicubic")
        panel.set_title(name, color="white", fontsize=9, pad=1)
        panel.axis("off")
    _save(fig, "phantom-ct")


def phantom_mammo() -> None:
    """Four views of two patients; below, one mass of each margin class."""
    fig = plt.figure(figsize=(10, 5.3), facecolor="black")
    shown = [(p, view) for p in _pair() for view in ("CC", "MLO")]
    for k, (patient, view) in enumerate(shown):
        panel = fig.add_axes((0.25 * k, 0.42, 0.248, 0.58))
        panel.imshow(mammo.render(patient, view)[0][30:-30], cmap="gray", vmin=0, vmax=3300, aspect="equal")
        panel.axis("off")
    for k, margin in enumerate(breast.MARGINS):
        panel = fig.add_axes((0.2 * k + 0.002, 0.0, 0.196, 0.37))
        panel.imshow(_mass(margin), cmap="gray", vmin=300, vmax=3300)
        panel.set_title(margin.replace("_", " "), color="white", fontsize=9, pad=2)
        panel.axis("off")
    _save(fig, "phantom-mammo")


def _calm_patient() -> Patient:
    """A patient with contrast, little noise, some fat and a tumour."""
    wanted = (draw_patient(0, i) for i in range(500))
    return next(p for p in wanted if p.phase == "portal" and p.noise < 12 and p.body.fat > 10 and p.tumour)


def _plane(array: np.ndarray, plane: tuple[int, int, int]) -> np.ndarray:
    """A slice as radiologists look at it: patient's right on the left, front or head up; margins cut."""
    axis = int(np.flatnonzero(plane)[0])
    picture = np.take(array, plane[axis], axis).T[::-1, ::-1]
    return picture[24:138, 6:-6] if axis == 2 else picture[:, 10:-10]


def _nodules(malignant: bool, rows: int = 2, columns: int = 6, half: int = 11) -> np.ndarray:
    """A mosaic of nodules cut at their centres, HU."""
    found: list[np.ndarray] = []
    for index in range(200):
        patient = draw_patient(0, index)
        lumps = [n for n in patient.nodules if n.malignant == malignant and 11 < n.diameter < 24]
        if not lumps or patient.noise > 22:
            continue
        array = np.pad(ct.render(patient).array, half, constant_values=-1000)
        for lump in lumps[:1]:
            offset = world(patient, lump.place, DEFAULT) - affine(patient, DEFAULT)[:3, 3]
            i, j, k = np.rint(offset / DEFAULT.spacing).astype(int)
            cut = array[i : i + 2 * half + 1, j : j + 2 * half + 1, k + half]
            found.append(np.pad(cut.T[::-1, ::-1], 1, constant_values=-1000))
        if len(found) >= rows * columns:
            break
    return np.block([found[r * columns : (r + 1) * columns] for r in range(rows)])


def _pair() -> list[breast.Patient]:
    """A left and a right breast with a mass each and both views."""
    patients = [breast.draw_patient(0, i) for i in range(100)]
    good = [
        p
        for p in patients
        if len(p.views) == 2 and len(p.masses) == 1 and p.density in (2, 3) and p.depth > 95
    ]
    return [next(p for p in good if p.laterality == side) for side in "RL"]


def _mass(margin: str, half: int = 80) -> np.ndarray:
    """A mass of one margin class in a breast that is not too dense."""
    for index in range(500):
        patient = breast.draw_patient(0, index)
        for mass in patient.masses:
            if mass.margins == (margin,) and patient.density <= 2 and 13 < mass.diameter < 22:
                column, row = breast.mass_centre(patient, patient.views[0], mass, breast.DEFAULT)
                image = np.pad(mammo.render(patient, patient.views[0])[0], half)
                return image[int(row) : int(row) + 2 * half, int(column) : int(column) + 2 * half]
    raise LookupError(margin)


def _save(fig: plt.Figure, name: str, step: int = 6) -> None:
    """As PNG, with grey values in steps, which keeps it below 200 KB."""
    IMAGES.mkdir(exist_ok=True)
    fig.canvas.draw()
    pixels = np.asarray(fig.canvas.buffer_rgba())[..., :3] // step * step
    grey = (np.ptp(pixels.astype(int), axis=-1) == 0).all()
    picture = (
        Image.fromarray(pixels[..., 0])
        if grey
        else Image.fromarray(pixels).quantize(256, dither=Image.Dither.NONE)
    )
    picture.save(IMAGES / f"{name}.png", optimize=True)
    print(f"docs/images/{name}.png: {(IMAGES / f'{name}.png').stat().st_size / 1000:.0f} kB")
    plt.close(fig)


def attention() -> None:
    """The recorded run of benchmarks/attention.py: what [CLS] attention falls on, as it forms."""
    report = json.loads((IMAGES.parents[1] / "benchmarks" / "results" / "attention.json").read_text("utf-8"))
    rows = report["checkpoints"]
    steps = [row["step"] for row in rows]
    fig, (left, right) = plt.subplots(1, 2, figsize=(9, 3.1), layout="constrained")
    for ax, names in (
        (left, {"informativeness of views": ("attention informativeness", OKABE_ITO[4])}),
        (
            right,
            {
                "lift lesion": ("lesions", OKABE_ITO[5]),
                "lift organ": ("labelled organs", OKABE_ITO[2]),
                "lift body": ("body", OKABE_ITO[7]),
            },
        ),
    ):
        for name, (title, colour) in names.items():
            value, low, high = np.array([row[name][:3] for row in rows]).T
            ax.plot(steps, value, color=colour, label=title, marker="o", ms=3)
            ax.fill_between(steps, low, high, color=colour, alpha=0.18, lw=0)
        ax.axvline(report["guard"]["first_guided_step"], color="0.5", lw=1, ls=":")
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
    left.set_title("How far from uniform", loc="left", fontsize=10)
    left.text(
        report["guard"]["first_guided_step"] + 20, 0.004, "masks guided from here", fontsize=8, color="0.35"
    )
    left.set_ylim(0)
    right.axhline(1, color="0.5", lw=1)
    right.set_title("What it falls on (1 = chance)", loc="left", fontsize=10)
    right.legend(frameon=False, fontsize=8)
    _save(fig, "attention")


FROM_NOTEBOOKS = {  # our name -> picture of the tour
    "masks": "1_masks/figures/masks.png",
    "reconstruction": "2_pretrain/figures/reconstruction.png",
}


def from_notebook(name: str, largest: int = 200_000) -> None:
    """A picture that a notebook made, with fewer colours and, if need be, smaller."""
    demo = Path(os.environ.get("SMARTLAB_DEMO", IMAGES.parents[1] / "runs" / "demo"))
    source = demo / FROM_NOTEBOOKS[name]
    if not source.is_file():
        sys.exit(f"{source} is not there: run `make demo` first")
    with Image.open(source) as picture:
        whole = picture.convert("RGB")
    out, scale = IMAGES / f"{name}.png", 1.0
    while True:
        size = (round(whole.width * scale), round(whole.height * scale))
        small = whole.resize(size, Image.Resampling.LANCZOS) if scale < 1 else whole
        small.quantize(256, dither=Image.Dither.NONE).save(out, optimize=True)
        if out.stat().st_size < largest:
            break
        scale *= 0.9
    print(f"docs/images/{name}.png: {out.stat().st_size / 1000:.0f} kB, {size[0]} × {size[1]}")


PICTURES = {"phantom-ct": phantom_ct, "phantom-mammo": phantom_mammo, "attention": attention}

if __name__ == "__main__":
    for name in sys.argv[1:] or [*PICTURES, *FROM_NOTEBOOKS]:
        PICTURES[name]() if name in PICTURES else from_notebook(name)
