"""What part of each mask unit is body, organ or lesion, for watching what attention and masks fall on.

Labels are never trained on: they only tell, where the data have them, whether guided masks hide what
matters (METHODS 1.4 and 1.6 of the papers' notes). A lift of 1 is chance.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

LESION_WORDS = ("nodule", "tumour", "tumor", "lesion", "mass", "metasta", "cancer", "gtv", "neoplasm", "cyst")
BODY_HU = -500.0  # denser than this: body, not air or lung


def is_lesion(name: str) -> bool:
    """Whether a label's name means a lesion rather than an organ."""
    return any(word in name.lower() for word in LESION_WORDS)


def unit_shares(hu: Tensor, labels: Tensor | None, names: dict[int, str], stride: int) -> dict[str, Tensor]:
    """Share of every unit's voxels that is "body", "organ" or "lesion", (B, N) each.

    hu, labels: (B, D, H, W); names: label value -> name.
    """
    masks = {"body": hu > BODY_HU}
    if labels is not None:
        table = torch.zeros(2, 256, dtype=torch.bool, device=labels.device)
        for value, name in names.items():
            table[int(is_lesion(name)), value] = True
        found = table[:, labels.long()]
        masks |= {"organ": found[0], "lesion": found[1]}
    return {name: F.avg_pool3d(m.float()[:, None], stride).flatten(1) for name, m in masks.items()}
