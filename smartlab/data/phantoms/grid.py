"""What every phantom kind shares: the grid it is made on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Grid:
    """Image size in voxels or pixels, spacing in mm, "nifti" or "dicom"."""

    shape: tuple[int, ...]
    spacing: float
    format: str

    def key(self, *parts: object) -> str:
        """A name for something made on this grid, for identifiers."""
        return " ".join(map(str, (*parts, *self.shape, self.spacing)))
