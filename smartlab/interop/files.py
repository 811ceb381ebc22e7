"""What every reader of foreign files does: find the tensors, take wrappers off their names, load all of them or none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from smartlab.core.errors import DataError
from smartlab.training.checkpoint import finite, load_pickled, load_weights

_PLACES = ("state_dict", "model_state_dict", "trunk_state_dict", "model", "student", "net")
_SHOWN = 5  # of each kind of problem


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a foreign checkpoint; pickled code is never run."""
    content: Any = load_weights(path)[0] if path.suffix == ".safetensors" else load_pickled(path)
    for key in _PLACES:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise DataError("holds no state dict", path=path, found=type(content).__name__)
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}


def bare(key: str, wrappers: Sequence[str]) -> str:
    """A name without the wrappers that training put before it, one in the other."""
    while (wrapper := next((w for w in wrappers if key.startswith(w)), None)) is not None:
        key = key.removeprefix(wrapper)
    return key


def load_whole(module: torch.nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Every tensor, with its shape, or none: then a table of what is missing, unknown and of another shape."""
    wanted = module.state_dict()
    missing = [f"missing    {k} {tuple(v.shape)}" for k, v in wanted.items() if k not in weights]
    unknown = [f"unknown    {k} {tuple(v.shape)}" for k, v in weights.items() if k not in wanted]
    other = [
        f"shape      {k}: {tuple(weights[k].shape)} in the file, {tuple(v.shape)} here"
        for k, v in wanted.items()
        if k in weights and weights[k].shape != v.shape
    ]
    if missing or unknown or other:
        rows = [row for kind in (missing, unknown, other) for row in _first(kind)]
        matched = len(wanted) - len(missing) - len(other)
        raise DataError(
            f"fits only in part: {matched} of {len(wanted)} tensors match\n  " + "\n  ".join(rows) + "\n",
            path=path,
        )
    module.load_state_dict(finite(dict(weights), path))


def _first(rows: list[str]) -> list[str]:
    more = [f"           … and {len(rows) - _SHOWN} more {rows[0].split()[0]}"] if len(rows) > _SHOWN else []
    return rows[:_SHOWN] + more
