"""Read any volumetric CT file into one form: int16 HU on a RAS+ grid.

Contract (see `Volume` and `read_volume`); DICOM lives in `dicom.py`, this module holds the other
formats and the checks that all of them pass.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Volume:
    """One scan.

    array:   (X, Y, Z) int16 Hounsfield units; i grows to the patient's Right, j to Anterior,
             k to Superior (the closest such orientation for an oblique scan), C-contiguous.
    affine:  4×4 float64, voxel index -> RAS world mm, right-handed (det > 0).
    source:  the path it was read from.
    notes:   what was set aside or repaired on the way ("2 localizers set aside"), free of PHI.
    """

    array: np.ndarray
    affine: np.ndarray
    modality: str = "CT"
    source: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Voxel size in mm along i, j, k."""
        sx, sy, sz = np.linalg.norm(self.affine[:3, :3], axis=0)
        return float(sx), float(sy), float(sz)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.array.shape  # type: ignore[return-value]

    def to_index(self, world_mm: np.ndarray) -> np.ndarray:
        """World RAS mm (…, 3) -> fractional voxel index (…, 3)."""
        inverse = np.linalg.inv(self.affine)
        return np.asarray(world_mm, float) @ inverse[:3, :3].T + inverse[:3, 3]

    def to_world(self, index: np.ndarray) -> np.ndarray:
        """Voxel index (…, 3) -> world RAS mm (…, 3)."""
        return np.asarray(index, float) @ self.affine[:3, :3].T + self.affine[:3, 3]


def read_volume(
    path: str | Path, *, series: str | None = None, tilt: str = "refuse", modality: str = "CT"
) -> Volume:
    """Read NIfTI, NRRD, MetaImage, a DICOM folder or an enhanced multi-frame DICOM file."""
    raise DataErrorPlaceholder


def read_labels(path: str | Path) -> Volume:
    """Read an integer label image (any of the non-DICOM formats) on the same RAS+ convention."""
    raise DataErrorPlaceholder


DataErrorPlaceholder = RuntimeError("contract only")
