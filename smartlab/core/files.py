"""Files that are whole or absent, and folders that one process at a time writes to."""

from __future__ import annotations

import fcntl
import os
import shutil
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from smartlab.core.errors import DataError, SmartlabError

TEMPORARY, LOCK = ".tmp-", ".lock"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path`, of the same kind of file, that replaces it once the block has succeeded.

    What was half written goes, or it would keep a full disk full. A folder takes the place of a folder only.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}.{path.name}")
    try:
        _remove(temporary)
        yield temporary
        if path.is_dir() and temporary.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def write_bytes(path: Path, data: bytes) -> None:
    """Whole and durable: on the disk before the rename makes it count."""
    with whole(path) as temporary:
        temporary.write_bytes(data)
        sync(temporary)


def write_text(path: Path, text: str) -> None:
    """A text file that is whole or not there."""
    with whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def written(path: Path, what: str) -> Iterator[Path]:
    """The same for a library that writes a file or a folder itself, at the place this gives it.

    A full disk is an OSError in Python, a RuntimeError in torch and something else in safetensors: all become
    one DataError. What was half written goes, or it would keep the disk full.
    """
    try:
        with whole(path) as temporary:
            yield temporary
            for file in [*temporary.glob("*"), temporary]:
                sync(file)
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


def size_of(count: float | None) -> str:
    """Bytes in words."""
    if count is None:
        return "size not known"
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


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
    try:
        file = (folder / LOCK).open("a+", encoding="utf-8")
    except FileNotFoundError:  # who had it has just removed the folder
        return None
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    except OSError as error:  # a file system without locks
        text = f"{folder}: cannot be locked ({error.strerror}): let one process at a time write there"
        warnings.warn(text, stacklevel=4)
        return file
    if os.path.samestat(os.fstat(file.fileno()), os.stat(folder / LOCK)):  # not removed meanwhile
        return file
    file.close()
    return None
