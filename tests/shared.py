"""What several tests look at and none changes, made once for all workers of pytest.

With `-n`, each worker has fixtures of its own, those of the session too. What takes seconds to make goes to a
folder beside the workers' own instead: the first that asks makes it, the others wait at a lock and use it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

MADE = ".made"


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """The folder `name`, filled by `make(folder)` in whichever worker comes first."""
    base = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder = base / "shared" / name
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(base / "shared" / f"{name}.lock"):
        if not (folder / MADE).exists():
            make(folder)
            (folder / MADE).touch()
    return folder


def phantoms(kind: str, *, spacing: float, **more: Any) -> Callable[[Path], None]:
    """What draws phantom patients into images/ and builds their store in store/, for `once`."""

    def make(folder: Path) -> None:
        import smartlab as sl

        images = folder / "images"
        drawn = sl.make_phantom(kind, images, spacing=spacing, progress=False, **more)
        sl.build_store(drawn, images, folder / "store", workers=0, spacing=spacing, progress=False)

    return make
