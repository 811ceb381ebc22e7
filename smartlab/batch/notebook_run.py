"""One run, inside a process of its own: lock, record, papermill, record.

Kernel and process talk over Unix sockets in a private folder, not over TCP: no port can be taken by
another run in the moment between choosing and using it.
"""

from __future__ import annotations

import io
import json
import os
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import papermill
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from nbclient.exceptions import DeadKernelError
from papermill.exceptions import PapermillExecutionError

from smartlab.batch import records
from smartlab.batch.runs import code_digest
from smartlab.core.places import code_version

BUSY, CHANGED = 75, 76  # exit codes: another process has the run; the source is not the planned one
STARTS = 3  # times a kernel that dies before its first cell is started
PROGRESS_EVERY = 30.0  # seconds between two progress bars in the log
EXECUTING = ".executing.ipynb"


class BatchKernel(AsyncKernelManager):
    """This Python as kernel, on Unix sockets, ending with this process."""

    sockets = ""  # folder for them, private and short: their paths have about 100 characters

    def __init__(self, **settings: Any) -> None:
        super().__init__(transport="ipc", **settings)
        self.connection_file, self.ip = f"{self.sockets}/k.json", f"{self.sockets}/k"

    @property
    def kernel_spec(self) -> KernelSpec:
        command = [sys.executable, "-P", "-m", "smartlab.batch.kernel", "-f", "{connection_file}"]
        return KernelSpec(argv=[*command, "--log-level=ERROR"], display_name="Python 3", language="python")


class Log(io.TextIOBase):
    """What the cells print, without the flood of progress bars: one of them now and then."""

    def __init__(self) -> None:
        self.shown = 0.0

    def write(self, text: str) -> int:
        for line in text.splitlines(keepends=True):
            passing, ends = "\r" in line.rstrip("\r\n") or line.endswith("\r"), line.endswith("\n")
            last = line.rstrip("\r\n").rpartition("\r")[2]
            if passing and not ends:
                if time.monotonic() - self.shown < PROGRESS_EVERY:
                    continue
                self.shown = time.monotonic()
            if last or ends:
                sys.stdout.write(last + "\n" if ends or passing else last)
        sys.stdout.flush()
        return len(text)


def perform(request: dict[str, Any]) -> int:
    """Do the run of a request and record it; the exit code is 0 when the record says what came of it."""
    out, key = Path(request["out"]), request["key"]
    BatchKernel.sockets = request["sockets"]
    held = records.lock(out, key, wait=0.2)  # a batch that looks whether the run goes on has it for a moment
    if held is None:
        return BUSY
    folder = records.find(out, key) or out / request["step"] / request["name"]
    before = records.read(folder)
    again = before.get("state") == records.FAILED and request["retry"]
    if before.get("state") in (records.DONE, records.FAILED) and not again:
        return 0
    source = code_digest()
    if request["code_digest"] not in (None, source):
        return CHANGED
    folder.mkdir(parents=True, exist_ok=True)
    record = {
        **{
            name: request[name]
            for name in ("step", "key", "identity", "settings", "upstream", "data", "resources")
        },
        "notebook": request["notebook_name"],
        "parameters": request["parameters"],
        "devices": request["environment"].get("CUDA_VISIBLE_DEVICES", ""),
        "code": code_version(),
        "code_digest": source,
        "state": records.RUNNING,
        "attempt": before.get("attempt", 0) + 1,
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "started": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    (folder / "result.json").unlink(missing_ok=True)  # of an attempt that did not end well
    records.write(folder, record["parameters"] | {"out": str(folder)}, "parameters.json")
    records.write(folder, record)
    records.note_attempt(folder, attempt=record["attempt"], event="started", pid=os.getpid())
    _send_output_to(folder / "log.txt", record["attempt"])
    start = time.monotonic()
    error = _execute(Path(request["notebook"]), folder, record["parameters"], request["environment"])
    finish(folder, record, error, time.monotonic() - start)
    os.close(held)
    return 0


def finish(folder: Path, record: dict[str, Any], error: str, seconds: float) -> None:
    """Record how an attempt ended; the lock must be held."""
    if (executing := folder / EXECUTING).is_file() and _is_whole(executing):
        os.replace(executing, folder / "notebook.ipynb")
    state = records.FAILED if error else records.DONE
    records.note_attempt(folder, attempt=record["attempt"], event=state, seconds=round(seconds, 2))
    records.write(folder, record | {"state": state, "error": error, "seconds": round(seconds, 2)})


def _is_whole(notebook: Path) -> bool:
    try:
        return bool(json.loads(notebook.read_text(encoding="utf-8"))["cells"])
    except (ValueError, KeyError):
        return False


def _send_output_to(path: Path, attempt: int) -> None:
    log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    print(f"--- attempt {attempt}, {time.strftime('%Y-%m-%d %H:%M:%S')}", flush=True)


def _execute(notebook: Path, folder: Path, parameters: dict[str, Any], environment: dict[str, str]) -> str:
    """Run the notebook; the error in one line, empty if there is none."""
    os.environ.update(environment, SMARTLAB_BATCH_PARENT=str(os.getpid()))
    for attempt in range(1, STARTS + 1):
        (folder / EXECUTING).unlink(missing_ok=True)
        try:
            papermill.execute_notebook(
                str(notebook),
                str(folder / EXECUTING),
                parameters={**parameters, "out": str(folder)},
                kernel_name="python3",
                kernel_manager_class=BatchKernel,
                progress_bar=False,
                start_timeout=300,
                cwd=str(folder),
                stdout_file=Log(),
                stderr_file=Log(),
            )
        except PapermillExecutionError as error:
            print(error, flush=True)
            return f"cell {error.exec_count}: {error.ename}: {(error.evalue.splitlines() or [''])[0]}"
        except (DeadKernelError, RuntimeError, TimeoutError, OSError) as error:
            traceback.print_exc()
            if _has_begun(folder) and isinstance(error, OSError):  # a full disk, say
                return f"{type(error).__name__}: {error}"
            if _has_begun(folder):
                return "the kernel died: out of memory, or a crash in a library; see log.txt"
            if attempt == STARTS:
                return f"the kernel did not start: {type(error).__name__}: {error}"
            print(f"the kernel did not start; attempt {attempt + 1} of {STARTS}", flush=True)
            time.sleep(attempt)
        except Exception as error:  # a fault in the notebook file, a full disk: reported like any other
            traceback.print_exc()
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
        else:
            break
    return _fault(folder)


def _fault(folder: Path) -> str:
    """What is wrong with the result, if anything."""
    if not (folder / "result.json").is_file():
        return "the notebook ended without writing result.json"
    whole = "metrics" in (records.result(folder) or {})
    return "" if whole else "the notebook wrote a result.json that is not JSON with metrics"


def _has_begun(folder: Path) -> bool:
    """Whether any code cell was executed."""
    path = folder / EXECUTING
    if not path.is_file() or not _is_whole(path):
        return False
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return any(cell.get("execution_count") or cell.get("outputs") for cell in cells)
