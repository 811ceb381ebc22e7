"""What every phantom kind shares: the grid it is made on, and files that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Grid:
    """Image size in voxels or pixels, spacing in mm, "nifti" or "dicom"."""

    shape: tuple[int, ...]
    spacing: float
    format: str

    def key(self, *parts: object) -> str:
        """A name for something made on this grid, for identifiers."""
        return " ".join(map(str, (*parts, *self.shape, self.spacing)))


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` that replaces it once the block has succeeded."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)
