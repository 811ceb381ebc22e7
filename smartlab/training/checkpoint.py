"""Checkpoints that are either whole or absent.

`checkpoints/step-NNNNNN/` holds `student.safetensors` and `teacher.safetensors` (encoders with their
configuration in the header, usable alone) and `state.pt` (everything else that resuming needs; loads
with `weights_only=True`). A checkpoint is written under a temporary name, synced and renamed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from smartlab.errors import DataError

ROLES = ("student", "teacher")
_NAME = re.compile(r"^step-(\d{6,})$")


def save(
    run: Path, step: int, method: dict[str, Tensor], state: dict[str, Any], header: dict[str, str]
) -> Path:
    """Write checkpoint `step` of a run folder.

    method: the method's state dict; what lies under `student.encoder.` and `teacher.encoder.` goes to
            safetensors files, the rest to state.pt.
    header: text kept with the weights (configuration, fingerprints).
    """
    folder = run / "checkpoints"
    temporary, final = folder / f".writing-step-{step:06d}", folder / f"step-{step:06d}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    rest = dict(method)
    for role in ROLES:
        prefix = f"{role}.encoder."
        weights = {k.removeprefix(prefix): rest.pop(k) for k in method if k.startswith(prefix)}
        if weights:
            save_file(
                {k: v.detach().cpu().contiguous() for k, v in weights.items()},
                temporary / f"{role}.safetensors",
                {**header, "role": role, "step": str(step)},
            )
    torch.save({**state, "step": step, "method": rest, "header": header}, temporary / "state.pt")
    for file in temporary.iterdir():
        _sync(file)
    shutil.rmtree(final, ignore_errors=True)
    os.replace(temporary, final)
    _sync(folder)
    return final


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint folder -> (method state dict, training state)."""
    try:
        state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        method = dict(state.pop("method"))
        for role in ROLES:
            file = path / f"{role}.safetensors"
            if file.is_file():
                method |= {f"{role}.encoder.{k}": v for k, v in load_file(file).items()}
    except Exception as error:
        raise DataError(
            "the checkpoint cannot be read",
            path=path,
            found=error,
            fix="delete this folder to resume from the one before it",
        ) from None
    return method, state


def steps(run: Path) -> list[int]:
    """Steps of the whole checkpoints of a run, ascending."""
    found = (_NAME.match(p.name) for p in (run / "checkpoints").glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def folder(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:06d}"


def prune(run: Path, keep_last: int, keep_every: int | None) -> None:
    """Delete all but the newest `keep_last`, and those on multiples of `keep_every`."""
    every = steps(run)
    for step in every[:-keep_last]:
        if not (keep_every and step % keep_every == 0):
            shutil.rmtree(folder(run, step))
    for left in (run / "checkpoints").glob(".writing-*"):  # of a run that was killed while saving
        shutil.rmtree(left, ignore_errors=True)


def header_of(file: Path) -> dict[str, str]:
    """The text kept with the weights of a safetensors file."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        return json.loads(opened.read(length)).get("__metadata__", {})


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """What differs between two checkpoint headers, as "key: old → new"; how often to log and such are no difference."""
    from smartlab.config import Config, flatten

    before, after = (dict(flatten(json.loads(h["config"]))) for h in (old, new))
    harmless = {
        "train.log_every",
        "train.picture_every",
        "train.checkpoint_every",
        "train.keep_last",
        "train.keep_every",
        "data.workers",
        *("data.manifest", "data.root", "data.store"),  # names and places: what lies there has a fingerprint
    }
    defaults = dict(flatten(Config().model_dump(mode="json")))
    before = defaults | before  # a setting that is newer than the run had its default
    found = [
        f"{k}: {before.get(k)} → {after.get(k)}"
        for k in after
        if before.get(k) != after.get(k) and k not in harmless
    ]
    if old["data"] != new["data"]:
        found.append("the data have another fingerprint")
    return found


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
