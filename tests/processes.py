"""Processes of their own for tests that kill one, or need two at once, without importing everything anew.

A forkserver imports the library once for each worker of pytest; `Child` is then a fork of it, ready in
milliseconds where a fresh interpreter takes seconds. It is a real process: SIGKILL ends it as it would any
other.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import tempfile
import traceback
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.conftest import REPO

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["tests.preloaded"])


class Child:
    """`function(*args)` in a process of its own, on one thread, with this process's environment and `env`.

    >>> child = Child(os.kill, 0, 9)
    >>> child.wait()
    -9
    """

    def __init__(self, function: Callable[..., Any], *args: Any, env: dict[str, str] | None = None) -> None:
        handle, name = tempfile.mkstemp(suffix=".log")
        os.close(handle)
        self._log = Path(name)
        weakref.finalize(self, self._log.unlink, missing_ok=True)
        given = {**os.environ, **(env or {})}
        self._process = _CONTEXT.Process(target=_run, args=(name, given, function, args))
        path = os.environ.get("PYTHONPATH")
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(REPO), path]))  # to find what to preload
        try:
            self._process.start()
        finally:
            if path is None:
                del os.environ["PYTHONPATH"]
            else:
                os.environ["PYTHONPATH"] = path

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    @property
    def said(self) -> str:
        """Everything it has printed so far, errors too."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    @property
    def running(self) -> bool:
        return self._process.is_alive()

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL: it gets no chance to save anything."""
        self.send(signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL

    def wait(self, seconds: float = 240) -> int:
        """Its exit code, negative if a signal ended it; a child that hangs is ended and fails the test."""
        self._process.join(seconds)
        if self._process.is_alive():
            self._process.kill()
            raise AssertionError(f"no end after {seconds} s: {self.said}")
        assert self._process.exitcode is not None
        return self._process.exitcode


def _run(log: str, env: dict[str, str], function: Callable[..., Any], args: tuple[Any, ...]) -> None:
    import torch

    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(env)
    torch.set_num_threads(1)
    try:
        function(*args)
    except Exception:
        traceback.print_exc()
        raise SystemExit(1) from None
