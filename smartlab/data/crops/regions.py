"""What part of each mask unit is body, organ or lesion, for watching what attention and masks fall on.

Labels are never trained on: they only tell, where the data have them, whether guided masks hide what
matters (METHODS 1.4 and 1.6 of the papers' notes). A lift of 1 is chance.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from smartlab.data.cohort.scan_names import UNNAMED
from smartlab.data.images.mr import DENSE

LESION_WORDS = ("nodule", "tumour", "tumor", "lesion", "mass", "metasta", "cancer", "gtv", "neoplasm", "cyst")
BODY = {"CT": -500.0, "MR": float(DENSE)}  # denser than this: body, not air or lung


def is_lesion(name: str) -> bool:
    """Whether a label's name means a lesion, or whatever a user marked, rather than an organ."""
    return name == UNNAMED or any(word in name.lower() for word in LESION_WORDS)


def unit_shares(
    hu: Tensor,
    labels: Tensor | None,
    names: dict[int, str],
    stride: int | tuple[int, int, int],
    body: float = BODY["CT"],
) -> dict[str, Tensor]:
    """Share of every unit's voxels that is "body", "organ" or "lesion", (B, N) each.

    hu, labels: (B, D, H, W); names: label value -> name; body: values above this are.
    """
    masks = {"body": hu > body}
    if labels is not None:
        table = torch.zeros(2, 256, dtype=torch.bool, device=labels.device)
        for value, name in names.items():
            table[int(is_lesion(name)), value] = True
        found = table[:, labels.long()]
        masks |= {"organ": found[0], "lesion": found[1]}
    return {name: F.avg_pool3d(m.float()[:, None], stride).flatten(1) for name, m in masks.items()}


def unit_cubes(volume: np.ndarray, stride: int, total: int = 32) -> np.ndarray:
    """The voxels of every unit, (units, stride³), padded with its least value as an encoder pads a scan.

    total: an encoder takes multiples of this, its stride in the deepest stage.
    """
    volume = np.pad(volume, [(0, -n % total) for n in volume.shape], constant_values=volume.min())
    d, h, w = (n // stride for n in volume.shape)
    cubes = volume.reshape(d, stride, h, stride, w, stride)
    return cubes.transpose(0, 2, 4, 1, 3, 5).reshape(d * h * w, stride**3)
