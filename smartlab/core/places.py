"""Where things are kept: on this machine the cache, and which stores were made from which images; in the package what it carries."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import smartlab
from smartlab.core.errors import DataError
from smartlab.core.files import write_text

PACKAGE = Path(smartlab.__file__).resolve().parent
WEIGHTS = PACKAGE / "weights"
KEYS = "smartlab_keys.csv"  # beside the user's own images: which key in results is which case


def cache_folder() -> Path:
    """Where phantoms and stores go when the configuration names no place."""
    return Path(os.environ.get("SMARTLAB_CACHE") or Path.home() / ".cache" / "smartlab")


def remember_store(made_from: str, store: Path) -> None:
    """Note where a store is, so that it is found by what it was made from, wherever it was put."""
    with contextlib.suppress(OSError):  # without a cache stores are found beside their images only
        write_text(cache_folder() / "stores" / made_from, str(store.absolute()))


def remembered_store(made_from: str) -> Path | None:
    """Where the store made from this was last built."""
    try:
        return Path((cache_folder() / "stores" / made_from).read_text(encoding="utf-8"))
    except OSError:
        return None


def default_encoder() -> Path:
    """The small pretrained encoder that the package carries: what is used unless another is named."""
    path = WEIGHTS / "tiny-teacher.safetensors"
    if not path.is_file():
        raise DataError(
            "the small encoder of the package is missing",
            path=path,
            fix="install smartlab again, or give `encoder` a run folder or an exported file",
        )
    return path


def notebook_folder() -> Path:
    """The shipped notebooks: inside the wheel, or beside the package in a checkout."""
    inside = PACKAGE / "notebooks"
    return inside if inside.is_dir() else PACKAGE.parent / "notebooks"


def code_version() -> str:
    """Package version, with the commit when this is a checkout ("0.1.0+abc1234", "-changed" if edited)."""
    folder = PACKAGE.parent
    if not (folder / ".git").exists():
        return smartlab.__version__
    try:
        ask = ["git", "-C", str(folder), "describe", "--always", "--dirty=-changed", "--abbrev=8"]
        commit = subprocess.run(ask, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return smartlab.__version__
    return f"{smartlab.__version__}+{commit}"
