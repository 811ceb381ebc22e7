"""What Dask runs for each run of a batch: lock, record, papermill in a forked kernel, record.

It answers what came of it, and ends the kernel when its time is over or when Dask no longer wants it: because the
batch was broken off, or was killed and is gone.
"""

from __future__ import annotations

import io
import json
import logging
import os
import socket
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import papermill
import psutil
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from smartlab.batch import records
from smartlab.batch.forked import kill, server
from smartlab.batch.kernels import ForkedKernel
from smartlab.batch.runs import code_digest, resolve
from smartlab.core.places import code_version

STARTS = 3  # times a kernel that dies before its first cell is started, or whose server dies
PROGRESS_EVERY = 30.0  # seconds between two progress bars in the log
LOOK_EVERY = 0.5  # seconds between two looks whether the run is still wanted
EXECUTING = ".executing.ipynb"


class Devices:
    """The GPUs of this worker, each lent to one run at a time."""

    def __init__(self, names: list[str]) -> None:
        self.free = names
        self.changed = threading.Condition()

    def take(self, n: int) -> list[str]:
        with self.changed:
            self.changed.wait_for(lambda: len(self.free) >= n)
            taken, self.free = self.free[:n], self.free[n:]
            return taken

    def give(self, names: list[str]) -> None:
        with self.changed:
            self.free = sorted(self.free + names)
            self.changed.notify_all()


def execute(request: dict[str, Any], *above: dict[str, Any]) -> dict[str, Any]:
    """One run on this worker, after those it builds on: its `state`, and with done or failed what is recorded.

    Besides done and failed: blocked (what it builds on failed), waiting (that is not done yet), busy (another
    process has it), changed (the source is not the planned one), stopped, lost.
    """
    from distributed import get_worker

    if any(one["state"] != records.DONE for one in above):
        failed = any(one["state"] in (records.FAILED, "blocked") for one in above)
        return {"state": "blocked" if failed else "waiting"}
    folders = dict(zip(request["upstream"], (Path(one["folder"]) for one in above), strict=True))
    worker, wanted = get_worker(), request["resources"]["gpus"]
    task, has = worker.get_current_task(), int(worker.state.total_resources.get("GPU", 0))
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    # those in CUDA_VISIBLE_DEVICES, else as many as the worker was started with as a resource
    every = named or [str(i) for i in range(has)]
    devices = vars(worker).setdefault("smartlab_devices", Devices(every))
    if wanted > len(every):
        return {"state": "lost", "error": f"worker {worker.address} has no {wanted} GPUs to give"}

    def still_wanted() -> bool:
        known = worker.state.tasks.get(task)
        running = worker.status.name in ("running", "paused")
        return known is not None and known.state != "cancelled" and running

    taken = devices.take(wanted)
    try:
        return perform(request, folders, taken, still_wanted)
    finally:
        devices.give(taken)


def perform(
    request: dict[str, Any], above: dict[str, Path], devices: list[str], wanted: Callable[[], bool]
) -> dict[str, Any]:
    """Do the run of a request and record it."""
    out, key = Path(request["out"]), request["key"]
    held = records.lock(out, key, wait=0.2)  # a batch that looks whether the run goes on has it for a moment
    if held is None:
        return {"state": "busy"}
    try:
        folder = records.find(out, key) or out / request["step"] / request["name"]
        before = records.read(folder)
        again = before.get("state") == records.FAILED and request["retry"]
        if before.get("state") in (records.DONE, records.FAILED) and not again:
            return records.answer(folder, before, now=False)
        source = code_digest()
        if request["code_digest"] not in (None, source):
            return {"state": "changed"}
        record = _begin(request, above, folder, devices, source, before.get("attempt", 0) + 1)
        attempt = _Attempt(Path(request["notebook"]), folder, record, request["seconds"], wanted)
        error = attempt.execute()
        if error and attempt.ended in ("stopped", "lost"):
            return {"state": attempt.ended, "error": error}
        return records.answer(folder, finish(folder, record, error, attempt.took()), now=True)
    finally:
        os.close(held)


def _begin(
    request: dict[str, Any],
    above: dict[str, Path],
    folder: Path,
    devices: list[str],
    source: str,
    attempt: int,
) -> dict[str, Any]:
    folder.mkdir(parents=True, exist_ok=True)
    given = ("step", "key", "identity", "settings", "data", "resources", "notebook_name")
    record = {name.removesuffix("_name"): request[name] for name in given} | {
        "upstream": {name: os.path.relpath(path, request["out"]) for name, path in above.items()},
        "parameters": {name: resolve(value, above) for name, value in request["parameters"].items()},
        "devices": ",".join(devices),
        "code": code_version(),
        "code_digest": source,
        "state": records.RUNNING,
        "attempt": attempt,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    (folder / "result.json").unlink(missing_ok=True)  # of an attempt that did not end well
    records.write(folder, record["parameters"] | {"out": str(folder)}, "parameters.json")
    records.write(folder, record)
    records.note_attempt(folder, attempt=attempt, event="started", pid=os.getpid())
    return record


def finish(folder: Path, record: dict[str, Any], error: str, seconds: float) -> dict[str, Any]:
    """Record how an attempt ended; the lock must be held."""
    executing = folder / EXECUTING
    if _cells(executing):
        os.replace(executing, folder / "notebook.ipynb")
    state, seconds = records.FAILED if error else records.DONE, round(seconds, 2)
    records.note_attempt(folder, attempt=record["attempt"], event=state, seconds=seconds)
    record = record | {"state": state, "error": error, "seconds": seconds}
    records.write(folder, record)
    return record


def _cells(notebook: Path) -> list[dict[str, Any]]:
    """The cells of a whole notebook; none where it is half written or absent."""
    try:
        return json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError):
        return []


class Log(io.TextIOBase):
    """What the cells print, without the flood of progress bars: one of them now and then."""

    def __init__(self, path: Path) -> None:
        self.file, self.shown = path.open("a", encoding="utf-8"), 0.0

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            passing, ends = "\r" in line.rstrip("\r\n") or line.endswith("\r"), line.endswith("\n")
            last = line.rstrip("\r\n").rpartition("\r")[2]
            if passing and not ends:
                if time.monotonic() - self.shown < PROGRESS_EVERY:
                    continue
                self.shown = time.monotonic()
            if last or ends:
                self.file.write(last + "\n" if ends or passing else last)
        self.file.flush()
        return len(text)

    def close(self) -> None:
        self.file.close()
        super().close()


class _Attempt:
    """A notebook in a kernel that ends when its time is over or nobody wants it; `ended` says why it had to."""

    def __init__(
        self, notebook: Path, folder: Path, record: dict[str, Any], seconds: float, wanted: Callable[[], bool]
    ) -> None:
        self.notebook, self.folder, self.seconds, self.wanted = notebook, folder, seconds, wanted
        self.parameters = {**record["parameters"], "out": str(folder)}
        self.number, self.ended = record["attempt"], ""
        self.kernel: psutil.Process | None = None
        self.began = time.monotonic()  # then: when its kernel did, for others may have been waited for
        threads = str(record["resources"]["cores"])
        environment = {
            "CUDA_VISIBLE_DEVICES": record["devices"],  # none for a run that asks for none
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TQDM_MININTERVAL": "10",
            "SMARTLAB_STORE_WAIT": str(seconds),  # the first run builds it, others wait
            "PYTHONUTF8": "1",
        }
        given = {"environment": environment, "written_to": str(folder / "log.txt"), "fresh": True}
        given["folder"] = str(folder)
        self.manager = type(
            "BatchKernel", (ForkedKernel,), {**given, "begun": lambda manager, process: self._begun(process)}
        )

    def _begun(self, kernel: psutil.Process) -> None:
        self.kernel, self.began = kernel, time.monotonic()

    def took(self) -> float:
        return time.monotonic() - self.began

    def execute(self) -> str:
        """Run the notebook; the error in one line, empty if there is none."""
        logging.getLogger("papermill").setLevel(logging.CRITICAL)  # it is in the log of the run
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,), daemon=True)
        watch.start()
        log = Log(self.folder / "log.txt")
        try:
            log.write(f"--- attempt {self.number}, {time.strftime('%Y-%m-%d %H:%M:%S')}\n")
            return self._start_until_it_runs(log)
        finally:
            over.set()
            watch.join()
            log.close()

    def _watch(self, over: threading.Event) -> None:
        while not over.wait(LOOK_EVERY):
            if self.kernel is not None and self.took() > self.seconds:
                self.ended = "late"
            elif not self.wanted():
                self.ended = "stopped"
            if self.ended and self.kernel is not None:
                kill(self.kernel)

    def _start_until_it_runs(self, log: Log) -> str:
        for start in range(1, STARTS + 1):
            (self.folder / EXECUTING).unlink(missing_ok=True)
            forking = server()
            try:
                self._papermill(log)
                break
            except PapermillExecutionError as error:
                log.write(f"{error}\n")
                return f"cell {error.exec_count}: {error.ename}: {(error.evalue.splitlines() or [''])[0]}"
            except Exception as error:
                log.write(traceback.format_exc())
                said = f"{type(error).__name__}: {' '.join(str(error).split())}"
                if final := self._final(error, said, forking.alive):
                    return final
                if start == STARTS:
                    self.ended = "" if forking.alive else "lost"
                    return f"the kernel did not start: {said}"
                log.write(f"the kernel did not start; attempt {start + 1} of {STARTS}\n")
                time.sleep(start)
        if not (self.folder / "result.json").is_file():
            return "the notebook ended without writing result.json"
        whole = "metrics" in (records.result(self.folder) or {})
        return "" if whole else "the notebook wrote a result.json that is not JSON with metrics"

    def _final(self, error: Exception, said: str, server_lives: bool) -> str:
        """The error with which the attempt ends; empty where a kernel should be started again."""
        if self.ended == "late":
            return f"stopped at its limit of {self.seconds / 60:g} minutes; raise resources.minutes"
        if self.ended:
            return said
        cells = _cells(self.folder / EXECUTING)
        begun = any(cell.get("execution_count") or cell.get("outputs") for cell in cells)
        if isinstance(error, DeadKernelError | RuntimeError | TimeoutError):
            died = "the kernel died: out of memory, or a crash in a library; see log.txt"
            return died if begun and server_lives else ""
        return "" if isinstance(error, OSError) and not begun else said  # or a fault in the notebook file

    def _papermill(self, log: Log) -> None:
        papermill.execute_notebook(
            str(self.notebook),
            str(self.folder / EXECUTING),
            parameters=self.parameters,
            kernel_name="python3",
            kernel_manager_class=self.manager,
            progress_bar=False,
            start_timeout=300,
            stdout_file=log,
            stderr_file=log,
        )
