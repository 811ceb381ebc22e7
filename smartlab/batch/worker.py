"""What Dask runs for each run of a batch: give it GPUs, hand it to the launcher, wait.

It answers what came of it, and ends the run when Dask no longer wants it: because the batch was
broken off, or was killed and is gone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import threading
from concurrent.futures import Future
from concurrent.futures import TimeoutError as StillRunning
from pathlib import Path
from typing import Any

import smartlab

LOOK_EVERY = 1.0  # seconds between two looks whether the run is still wanted


class Launcher:
    """The launcher process of this worker."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "smartlab.batch.launcher"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # a Ctrl-C is for the batch, which lets runs finish
        )
        self.waiting: dict[str, Future[dict[str, Any]]] = {}
        self.lock = threading.Lock()
        self.ended = False
        threading.Thread(target=self._read, daemon=True).start()

    def start(self, request: dict[str, Any]) -> Future[dict[str, Any]]:
        answer: Future[dict[str, Any]] = Future()
        with self.lock:
            if self.ended:
                answer.set_result({"state": "lost", "error": "the launcher has ended"})
            else:
                self.waiting[request["id"]] = answer
                self._send(request)
        return answer

    def stop(self, name: str) -> None:
        with self.lock:
            self._send({"stop": name})

    def _send(self, order: dict[str, Any]) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # the reader sees the end, too, and answers for all

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            answer = json.loads(line)
            with self.lock:
                self.waiting.pop(answer.pop("id")).set_result(answer)
        with self.lock:
            self.ended = True
            for future in self.waiting.values():
                future.set_result({"state": "lost", "error": "the launcher was killed"})
        self.process.wait()


def _environment() -> dict[str, str]:
    """That of this process, with this smartlab to be found even if it is not installed."""
    environment = dict(os.environ)
    home = str(Path(smartlab.__file__).resolve().parents[1])
    if home not in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        before = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{home}{os.pathsep}{before}" if before else home
    return environment


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


_shared: dict[str, Any] = {}  # of this process, be it a worker of a cluster or the batch itself
_shared_lock = threading.Lock()


def _launcher() -> Launcher:
    with _shared_lock:
        if "launcher" not in _shared or _shared["launcher"].ended:
            _shared["launcher"] = Launcher()
        return _shared["launcher"]


def end_launcher() -> None:
    """End the launcher of this process, and with it what it still runs."""
    with _shared_lock:
        if launcher := _shared.pop("launcher", None):
            launcher.process.stdin.close()
            launcher.process.wait()
        _shared.clear()


def _devices(worker: Any) -> Devices:
    """Those in CUDA_VISIBLE_DEVICES, else as many as the worker was started with as a resource."""
    with _shared_lock:
        if "devices" not in _shared:
            named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
            count = int(worker.state.total_resources.get("GPU", 0))
            _shared["devices"] = Devices(named or [str(i) for i in range(count)])
        return _shared["devices"]


def execute(request: dict[str, Any]) -> dict[str, Any]:
    """One run on this worker: {"state": done | failed | busy | changed | stopped | lost, "folder", "error", …}."""
    from distributed import get_worker

    worker = get_worker()
    task = worker.get_current_task()
    devices, wanted = _devices(worker), request["resources"]["gpus"]
    if wanted > len(devices.free) and wanted > int(worker.state.total_resources.get("GPU", 0)):
        return {"state": "lost", "error": f"worker {worker.address} has no {wanted} GPUs to give"}
    taken = devices.take(wanted)
    try:
        threads = str(request["resources"]["cores"])
        environment = {
            "CUDA_VISIBLE_DEVICES": ",".join(taken),  # none for a run that asks for none
            "OMP_NUM_THREADS": threads,
            "MKL_NUM_THREADS": threads,
            "TQDM_MININTERVAL": "10",
            "SMARTLAB_STORE_WAIT": str(request["seconds"]),  # the first run builds it, others wait
            "PYTHONUTF8": "1",
        }
        launcher = _launcher()
        answer = launcher.start({**request, "environment": environment})
        while True:
            try:
                return answer.result(timeout=LOOK_EVERY)
            except StillRunning:
                if not _wanted(worker, task):
                    launcher.stop(request["id"])
                    return answer.result()
    finally:
        devices.give(taken)


def _wanted(worker: Any, task: Any) -> bool:
    known = worker.state.tasks.get(task)
    return known is not None and known.state != "cancelled" and worker.status.name in ("running", "paused")
