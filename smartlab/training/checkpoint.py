"""Checkpoints that are either whole or absent, and say so themselves when they no longer are what was written.

`checkpoints/step-NNNNNN/` holds `student.safetensors` and `teacher.safetensors` (encoders with their
configuration in the header, usable alone) and `state.pt` (everything else that resuming needs; loads
with `weights_only=True`). A checkpoint is written under a temporary name, synced and renamed. Each
safetensors file carries a hash of its tensors and its header, each `.pt` file the checksums of its zip format.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from smartlab.core.errors import DataError
from smartlab.core.files import TEMPORARY, written

ROLES = ("student", "teacher")
_NAME = re.compile(r"^step-(\d{6,})$")
_HASH, _HAS_HASH = "sha256", "hashed"  # in the header of a safetensors file; two, as one could lose its name


def save(
    run: Path, step: int, method: dict[str, Tensor], state: dict[str, Any], header: dict[str, str]
) -> Path:
    """Write checkpoint `step` of a run folder.

    method: the method's state dict; what lies under `student.encoder.` and `teacher.encoder.` goes to
            safetensors files, the rest to state.pt.
    header: text kept with the weights (configuration, fingerprints).
    """
    final = folder(run, step)
    with written(final, "a checkpoint") as temporary:
        temporary.mkdir()
        rest, roles = dict(method), list[str]()
        for role in ROLES:
            prefix = f"{role}.encoder."
            weights = {k.removeprefix(prefix): rest.pop(k) for k in method if k.startswith(prefix)}
            if weights:
                about = {**header, "role": role, "step": str(step)}
                save_weights(temporary / f"{role}.safetensors", weights, about)
                roles.append(role)
        state = {**state, "step": step, "method": rest, "header": header, "roles": roles}
        torch.save(state, temporary / "state.pt")
    return final


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A checkpoint folder -> (method state dict, training state)."""
    try:
        state = load_pickled(path / "state.pt")
        method = dict(state.pop("method"))
        there = [role for role in ROLES if (path / f"{role}.safetensors").is_file()]
        for role in state.pop("roles", there):
            file = path / f"{role}.safetensors"
            method |= {f"{role}.encoder.{k}": v for k, v in load_weights(file)[0].items()}
    except (OSError, MemoryError):
        raise
    except Exception as error:
        raise DataError(
            "the checkpoint cannot be read",
            path=path,
            found=error.found if isinstance(error, DataError) else type(error).__name__,
            fix="delete this folder to resume from the one before it",
        ) from None
    return method, state


def newest_whole(run: Path) -> tuple[dict[str, Tensor], dict[str, Any], list[Path]]:
    """The newest checkpoint that can be read, and the damaged ones that are newer."""
    damaged: list[Path] = []
    errors: list[DataError] = []
    for step in reversed(steps(run)):
        try:
            return *load(folder(run, step)), damaged
        except DataError as error:
            damaged.append(folder(run, step))
            errors.append(error)
    raise errors[0]


def set_aside(damaged: list[Path]) -> None:
    """Out of the way, so that pruning counts whole ones only; kept for whoever wants to look."""
    for path in damaged:
        shutil.rmtree(aside := path.with_name(f"damaged-{path.name}"), ignore_errors=True)
        os.replace(path, aside)


# ---- single files --------------------------------------------------------------------------------


def save_weights(path: Path, weights: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """A safetensors file that can tell whether it is still what was written."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in weights.items()}
    save_file(tensors, path, {**about, _HAS_HASH: "yes", _HASH: _hash_of(tensors, about)})


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header text of a safetensors file, compared with its hash where it carries one."""
    with _reading(path), safe_open(path, "pt") as opened:
        about = dict(opened.metadata() or {})
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  no mapping
    told, expected = about.pop(_HASH, None), about.pop(_HAS_HASH, None) is not None
    if (told or expected) and told != _hash_of(tensors, about):  # neither: of another program
        raise _unreadable(path, "another content than was written")
    return tensors, about


def finite(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same weights; refused if the training that made them had diverged."""
    bad = [k for k, v in weights.items() if v.is_floating_point() and not bool(torch.isfinite(v).all())]
    if bad:
        raise DataError(
            "holds weights that are not numbers",
            path=path,
            found=f"NaN or infinity in {len(bad)} of {len(weights)} tensors, first {bad[0]}",
            fix="the training diverged: take an earlier checkpoint, or train again with a lower train.lr",
        )
    return weights


def load_pickled(path: Path) -> Any:
    """What torch.save wrote: tensors and plain values only, compared with the checksums of its zip format."""
    with _reading(path):
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if (name := archive.testzip()) is not None:
                    raise _unreadable(path, f"another content than was written in {name}")
        return torch.load(path, map_location="cpu", weights_only=True)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """A missing file or wrong content is a DataError; where memory, handles or rights are lacking, the file may be whole."""
    try:
        if path.is_file():
            path.open("rb").close()  # safetensors would call it missing, whatever the system said
        yield
    except DataError:
        raise
    except Exception as error:
        text = str(error)
        if "allocate memory" in text:  # a RuntimeError of torch's
            raise MemoryError(text) from None
        nonsense = getattr(error, "errno", None) == errno.EINVAL  # a position that only damage asks for
        if isinstance(error, MemoryError | OSError) and path.is_file() and not nonsense:
            raise
        if "weights_only" in text:  # torch's advice would be to run that code
            text = "objects that only running code could restore"
        raise _unreadable(path, text.splitlines()[0] if text else type(error).__name__) from None


def _unreadable(path: Path, found: str) -> DataError:
    return DataError(
        "cannot be read as weights",
        path=path,
        found=found,
        fix="write it again where it came from: smartlab export, or torch.save(model.state_dict(), …)",
    )


def _hash_of(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


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
    for pattern in (f"{TEMPORARY}*", ".writing-*"):  # of a run that was killed while saving, also one of 0.1
        for left in (run / "checkpoints").glob(pattern):
            shutil.rmtree(left, ignore_errors=True)


def header_of(file: Path) -> dict[str, str]:
    """The text kept with the weights of a safetensors file."""
    with _reading(file), safe_open(file, "pt") as opened:
        return {
            name: text for name, text in (opened.metadata() or {}).items() if name not in (_HASH, _HAS_HASH)
        }


def differences(old: dict[str, str], new: dict[str, str]) -> list[str]:
    """What differs between two checkpoint headers, as "key: old → new"; how often to log and such are no difference."""
    from smartlab.core.config import Config, flatten

    before, after = (dict(flatten(json.loads(h["config"]))) for h in (old, new))
    harmless = {
        "train.log_every",
        "train.picture_every",
        "train.checkpoint_every",
        "train.keep_last",
        "train.track",
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
