"""Where things are kept on this machine: the cache, and which stores were made from which images."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from smartlab.core.files import write_text

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
