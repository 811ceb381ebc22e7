"""The people of the CT phantom in two MR contrasts: the tissues that CT tells apart, in other greys.

Every HU of the painted CT stands for a tissue, and two curves say how bright that is in a T1-like and in a T2-like
image: fat bright and fluid dark in the one, fluid bright and muscle dark in the other, lung and cortical bone dark in
both. Organs that CT hardly tells from muscle have a brightness of their own, by their label. Then comes what a scanner
adds: a smooth bias field of each channel, and the noise of a magnitude image (Rician). Values have no unit, and
each scan has a gain of its own. It shows that the software works, and nothing about MR.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from smartlab.data.cohort.case import Case
from smartlab.data.phantoms import ct
from smartlab.data.phantoms.curve import Array
from smartlab.data.phantoms.grid import Grid
from smartlab.data.phantoms.organs import LABEL
from smartlab.data.phantoms.patient import DEFAULT as DEFAULT
from smartlab.data.phantoms.patient import draw_patient

FORMATS = ("nifti",)
FIELD_MM, megabytes = ct.FIELD_MM, ct.megabytes
CHANNELS = ("t1", "t2")
_STREAM = 3  # random numbers of its own
# air; lung and the couch; fat twice; fluid; muscle; contrast or spongy bone; cortical bone
_HU = (-1000, -200, -110, -70, 5, 60, 200, 700)
_CURVES = {
    "t1": (0.0, 0.05, 0.95, 0.9, 0.25, 0.45, 0.5, 0.1),
    "t2": (0.0, 0.05, 0.7, 0.65, 0.95, 0.3, 0.4, 0.05),
}
_ORGANS = {  # added to what the curve says
    "t1": {"liver": 0.12, "spleen": -0.05, "kidney_left": -0.05, "kidney_right": -0.05, "aorta": -0.3},
    "t2": {"liver": -0.05, "spleen": 0.25, "kidney_left": 0.3, "kidney_right": 0.3, "aorta": -0.25},
}
_NOISE = 0.03  # of the brightest tissue
DESCRIPTION: dict[str, Any] = ct.DESCRIPTION | {
    "title": "Phantom chest and abdomen in two MR contrasts with nodules, tumours and organ labels",
    "modality": "MR",
    "description": "The synthetic patients of phantom-ct, drawn T1-like and T2-like on one grid, a channel each.",
}


def cases(seed: int, index: int, grid: Grid) -> list[Case]:
    """Those of the CT phantom, with two images."""
    found = ct.cases(seed, index, grid)
    return [Case(**dict(case) | {"image": None, "channels": _channels(case)}) for case in found]


def _channels(case: Case) -> dict[str, str]:
    name = case.patient.replace("ct-", "mr-")
    return {channel: f"images/{name}_{number:04d}.nii.gz" for number, channel in enumerate(CHANNELS)}


def write(root: Path, seed: int, index: int, grid: Grid) -> None:
    """Render one patient and write the files, each appearing whole or not at all."""
    patient = replace(draw_patient(seed, index, grid), padding=None, noise=2.0)
    made, rows = ct.render(patient, grid), cases(seed, index, grid)
    ct.save_labels(root, made, rows)
    rng = np.random.default_rng([seed, _STREAM, index])
    for channel, path in rows[0].channels.items():
        ct.save(root / path, _contrast(made, channel, rng), made.affine)


def _contrast(made: ct.Rendered, channel: str, rng: np.random.Generator) -> Array:
    """One channel, float32 without a unit."""
    signal = np.interp(made.array, _HU, _CURVES[channel]).astype(np.float32)
    for organ, more in _ORGANS[channel].items():
        signal[made.labels == LABEL[organ]] += more
    coarse = rng.uniform(0.7, 1.3, (4, 4, 4))
    bias = ndimage.zoom(coarse, np.array(signal.shape) / 4, order=3, mode="nearest", grid_mode=True)
    signal = signal.clip(0) * bias.astype(np.float32)
    real, imaginary = (rng.standard_normal(signal.shape, dtype=np.float32) * _NOISE for _ in range(2))
    return np.hypot(signal + real, imaginary) * np.float32(rng.uniform(200, 2000))
