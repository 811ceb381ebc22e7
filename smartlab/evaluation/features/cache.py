"""Arrays kept on disk under a hash of everything they follow from.

A file holds the SHA-256 of its content, then the content (npz). It is written under a temporary name
and renamed. One that is damaged is told and made again; one that is there is right, because its name
is the hash of all that decides it.
"""

from __future__ import annotations

import hashlib
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from smartlab.core.files import write_bytes

Arrays = dict[str, np.ndarray]
_DIGEST = 32  # bytes of SHA-256


def cached(folder: Path | None, facts: dict[str, Any], compute: Callable[[], Arrays]) -> Arrays:
    """`compute()`, or what it gave before for the same facts (plain JSON values). None: no cache."""
    if folder is None:
        return compute()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    path = folder / f"{key[:40]}.npz.sum"
    if (found := _read(path)) is not None:
        return found
    arrays = compute()
    _write(path, arrays)
    return arrays


def _read(path: Path) -> Arrays | None:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    if hashlib.sha256(data[_DIGEST:]).digest() != data[:_DIGEST]:
        warnings.warn(f"{path}: damaged, the features are computed again", stacklevel=4)
        return None
    with np.load(io.BytesIO(data[_DIGEST:]), allow_pickle=False) as file:
        return dict(file)


def _write(path: Path, arrays: Arrays) -> None:
    content = io.BytesIO()
    np.savez(content, allow_pickle=False, **arrays)
    data = content.getvalue()
    write_bytes(path, hashlib.sha256(data).digest() + data)
