"""The process beside a Dask worker that starts the runs: `python -m smartlab.batch.launcher`.

Importing papermill costs seconds of processor time, a fork of a process that has it milliseconds. So
each run is a fork of this process, which does nothing else and has one thread. Requests come as lines
of JSON on standard input, answers leave on standard output. When the input ends, because the worker
has ended, all runs end too; the runs in turn ask the system to end with this process.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from smartlab.batch import notebook_run, records
from smartlab.core.workers import die_with

SHORT = (
    tempfile.gettempdir() if len(tempfile.gettempdir()) < 60 else "/tmp"
)  # the path of a socket is limited


@dataclass
class Child:
    request: dict[str, Any]
    pid: int
    pipe: int  # its end says that the process has ended
    started: float
    timed_out: bool = False
    stopped: bool = False

    @property
    def deadline(self) -> float:
        return self.started + self.request["seconds"]


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _sweep()
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ, None)
    children: dict[int, Child] = {}
    buffer = b""
    while True:
        ends = [c.deadline for c in children.values() if not c.timed_out]
        wait = max(0.0, min(ends) - time.monotonic()) if ends else None
        for key, _ in selector.select(wait):
            if key.fd != 0:
                selector.unregister(key.fd)
                _answer(children.pop(key.fd))
                continue
            block = os.read(0, 1 << 16)
            if not block:
                for child in children.values():
                    _kill(child.pid)
                os._exit(0)
            *lines, buffer = (buffer + block).split(b"\n")
            for line in lines:
                _obey(json.loads(line), children, selector)
        for child in children.values():
            if not child.timed_out and time.monotonic() >= child.deadline:
                child.timed_out = True
                _kill(child.pid)


def _sweep() -> None:
    """Remove the folders for sockets of launchers that were killed."""
    for left in Path(SHORT).glob("smk-*-*"):
        pid = left.name.split("-")[1]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _obey(order: dict[str, Any], children: dict[int, Child], selector: selectors.BaseSelector) -> None:
    if "stop" in order:
        for child in children.values():
            if child.request["id"] == order["stop"]:
                child.stopped = True
                _kill(child.pid)
        return
    order["sockets"] = tempfile.mkdtemp(prefix=f"smk-{os.getpid()}-", dir=SHORT)
    child = _fork(order, [0, 1, *children])
    children[child.pipe] = child
    selector.register(child.pipe, selectors.EVENT_READ, None)


def _fork(request: dict[str, Any], ours: list[int]) -> Child:
    end, pipe_of_child = os.pipe()  # not inherited by the kernel
    parent = os.getpid()
    if pid := os.fork():
        os.close(pipe_of_child)
        return Child(request, pid, end, time.monotonic())
    code = 1
    try:
        os.setsid()
        die_with(parent)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        for handle in ours[2:]:
            os.close(handle)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        code = notebook_run.perform(request)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _kill(pid: int) -> None:
    """End a run and everything it has started, the kernel's own children included."""
    with suppress(psutil.NoSuchProcess):
        run = psutil.Process(pid)
        run.suspend()  # so that it starts nothing more
        for process in [*run.children(recursive=True), run]:
            with suppress(psutil.NoSuchProcess):
                process.kill()


def _answer(child: Child) -> None:
    os.close(child.pipe)
    shutil.rmtree(child.request["sockets"], ignore_errors=True)
    code = os.waitstatus_to_exitcode(os.waitpid(child.pid, 0)[1])
    request = child.request
    out, answer = Path(request["out"]), {"id": request["id"]}
    folder = records.find(out, request["key"])
    if child.timed_out and folder is not None:
        _record_timeout(out, folder, child)
        code = 0
    if code == 0 and folder is not None:
        record = records.read(folder)
        facts = {name: record.get(name) for name in ("state", "error", "seconds", "attempt")}
        answer |= {"folder": str(folder), **facts, "now": record.get("pid") == child.pid}
    elif code == notebook_run.BUSY:
        answer |= {"state": "busy"}
    elif code == notebook_run.CHANGED:
        answer |= {"state": "changed"}
    elif child.stopped:
        answer |= {"state": "stopped"}
    else:
        reason = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        answer |= {"state": "lost", "error": f"its process ended by {reason}"}
    os.write(1, json.dumps(answer).encode() + b"\n")


def _record_timeout(out: Path, folder: Path, child: Child) -> None:
    held = records.lock(out, child.request["key"], wait=1.0)
    record = records.read(folder)
    if held is not None and record.get("state") == records.RUNNING and record.get("pid") == child.pid:
        minutes = child.request["seconds"] / 60
        error = f"stopped at its limit of {minutes:g} minutes; raise resources.minutes"
        notebook_run.finish(folder, record, error, time.monotonic() - child.started)
    if held is not None:
        os.close(held)


if __name__ == "__main__":
    main()
