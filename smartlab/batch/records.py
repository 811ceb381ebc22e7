"""The folder of a run: what it holds, how it is found, and the lock that keeps it to one process.

    OUT/STEP/NAME-KEY/   notebook.ipynb, parameters.json, log.txt, result.json and what the notebook writes
                         run.json: the record (state, attempts, seconds, error, code, data, what it builds on)
                         attempts.jsonl: one line when an attempt starts, one when it ends
    OUT/.batch/          locks, and the notebooks as they were when the batch began

The lock is the kernel's own (flock): it ends with the process that holds it, however that ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from smartlab.core.files import write_bytes

DONE, FAILED, RUNNING = "done", "failed", "running"


def lock(out: Path, key: str, wait: float = 0.0) -> int | None:
    """The open lock of a run, or None while another process has it (for `wait` seconds)."""
    folder = out / ".batch" / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / key, os.O_RDWR | os.O_CREAT, 0o666)  # never inherited by the kernel
    until = time.monotonic() + wait
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return handle
        except BlockingIOError:
            if time.monotonic() >= until:
                os.close(handle)
                return None
            time.sleep(0.02)


def is_locked(out: Path, key: str) -> bool:
    handle = lock(out, key)
    if handle is not None:
        os.close(handle)
    return handle is None


def folders(out: Path) -> Iterator[Path]:
    """Every run folder of a batch."""
    for step in sorted(out.iterdir()) if out.is_dir() else []:
        if step.is_dir() and not step.name.startswith("."):
            with os.scandir(step) as entries:
                yield from (Path(e.path) for e in sorted(entries, key=lambda e: e.name) if e.is_dir())


def find(out: Path, key: str) -> Path | None:
    """The folder of the run with this key, under whatever name a plan gave it."""
    return next(iter(sorted(out.glob(f"*/*{key}"))), None)


_TEXT, _TABLE, _NUMBER = (str,), (dict, type(None)), (int, float, type(None))
_FIELDS = {  # of a record
    **dict.fromkeys(("step", "key", "identity", "state"), _TEXT),
    **dict.fromkeys(("settings", "upstream"), _TABLE),
    "seconds": _NUMBER,
}


def read(folder: Path) -> dict[str, Any]:
    """The record of a run, empty where there is none.

    One that cannot be read counts as none, and a run whose result cannot as not done: both are done again.
    """
    path = folder / "run.json"
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        wrong = [name for name, kinds in _FIELDS.items() if not isinstance(record.get(name), kinds)]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (ValueError, AttributeError, RecursionError) as error:
        wrong = [str(error)]
    if wrong:
        warnings.warn(f"{path}: is damaged ({wrong[0]}); the run counts as not done", stacklevel=2)
        return {}
    if record["state"] == DONE and result(folder) is None:
        warnings.warn(
            f"{folder}: its result.json is gone or damaged; the run counts as not done", stacklevel=2
        )
        return record | {"state": RUNNING}
    return record


def result(folder: Path) -> dict[str, Any] | None:
    """The result of a run, None without a whole one; of what is to be shown, what can be."""
    try:
        found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        tables = [found.get(part, {}) for part in ("metrics", "parameters")]
    except (FileNotFoundError, ValueError, AttributeError, RecursionError):
        return None
    if not all(isinstance(table, dict) for table in tables):
        return None
    said, figures, captions = (found.get(part) for part in ("headline", "figures", "captions"))
    figures = [f for f in (figures if isinstance(figures, list) else []) if isinstance(f, str) and _inside(f)]
    captions = {k: str(v) for k, v in captions.items()} if isinstance(captions, dict) else {}
    return found | {"headline": str(said or ""), "figures": figures, "captions": captions}


def _inside(path: str) -> bool:
    return not Path(path).is_absolute() and ".." not in Path(path).parts


def answer(folder: Path, record: dict[str, Any], now: bool) -> dict[str, Any]:
    """What a batch needs to know of a run that has ended, and whether it was just now."""
    return {n: record.get(n) for n in ("state", "error", "seconds")} | {"folder": str(folder), "now": now}


def write(folder: Path, record: dict[str, Any], name: str = "run.json") -> None:
    """The whole record or the one before, on the disk: never half of it."""
    write_bytes(folder / name, json.dumps(record, indent=1).encode())


def note_attempt(folder: Path, **facts: Any) -> None:
    """Append one line; a line is written at once, so that none is mixed with another."""
    line = json.dumps({"time": time.strftime("%Y-%m-%dT%H:%M:%S"), **facts}) + "\n"
    handle = os.open(folder / "attempts.jsonl", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        os.write(handle, line.encode())
    finally:
        os.close(handle)


def survey(out: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Key -> folder and record of every run in a batch folder."""
    found = {}
    for folder in folders(out):
        if record := read(folder):
            found[record["key"]] = (folder, record)
    return found


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
