"""Files that are whole or absent, and folders that one process at a time writes to."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from smartlab.errors import DataError, SmartlabError

SUFFIX, LOCK = ".tmp", ".lock"


def temporary_of(path: Path) -> Path:
    """Where a file or folder is written before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{os.getpid()}{SUFFIX}")


def write_bytes(path: Path, data: bytes) -> None:
    """Atomic and durable: on the disk under a temporary name before the rename makes it count."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_of(path)
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def written(path: Path, what: str) -> Iterator[Path]:
    """The same for a library that writes a file or a folder itself, at the place this gives it.

    A full disk is an OSError in Python, a RuntimeError in torch and something else in safetensors: all become
    one DataError. What was half written goes, or it would keep the disk full.
    """
    temporary = temporary_of(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        for file in [*temporary.glob("*"), temporary]:
            sync(file)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
        sync(path.parent)
    except SmartlabError:
        raise
    except Exception as error:
        text = (str(error).strip() or type(error).__name__).splitlines()[0]
        there = next(folder for folder in path.absolute().parents if folder.is_dir())
        raise DataError(
            f"{what} could not be written",
            path=path,
            found=f"{text}; {shutil.disk_usage(there).free / 1e9:.1f} GB free",
            fix="free space there, or make the folder writable, and run the same again",
        ) from error
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    elif path.parent.is_dir():
        path.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Refuse a place for results before the work that gives them."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise DataError(
            "results cannot be written here",
            path=there,
            found="a file" if there.is_file() else "a folder that may only be read",
            fix="choose another folder with --out",
        )


def sync(path: Path) -> None:
    """Until what is written there is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def held(folder: Path, problem: str, wait: float = 2.0) -> Iterator[None]:
    """This folder for one process; who comes second is told the `problem`, and who has it, after `wait` seconds.

    A record lock: it dies with its process and is not inherited by workers. A folder that was made for it and in
    which nothing came to be goes with it.
    """
    fresh, until = not folder.exists(), time.monotonic() + wait
    while (file := _lock(folder)) is None:
        if time.monotonic() > until:
            has = (folder / LOCK).read_text(encoding="utf-8")
            raise DataError(problem, path=folder, found=has or None, fix="wait for it, or end it first")
        time.sleep(0.1)
    with file:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)
            if fresh and os.listdir(folder) == [LOCK]:
                shutil.rmtree(folder)


def _lock(folder: Path) -> IO[str] | None:
    """The open lock of a folder, or None while another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    file = (folder / LOCK).open("a+", encoding="utf-8")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):  # not removed meanwhile
            return file
    except OSError:
        pass
    file.close()
    return None
