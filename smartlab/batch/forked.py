"""Kernels that are there at once: forked from one process that has imported the heavy packages.

A fresh kernel spends some five CPU seconds on importing torch and the rest; a forked one starts in a blink and
shares that memory. The process they are forked from, `python -m smartlab.batch.forked`, does nothing else and has
one thread. It imports no main script again, as multiprocessing's would. When its input ends, because who asked
has ended, it ends all that it forked; they in turn ask the system to end with it.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import psutil

from smartlab.core.workers import die_with

LIGHT = ("ipykernel.kernelapp", "ipykernel.ipkernel")
HEAVY = (  # without umap, whose first import in a new environment compiles for most of a minute
    "torch._dynamo",  # optimisers import it when they first step
    "torch.utils.tensorboard",
    "accelerate",
    "pyarrow.pandas_compat",
    "monai.networks.nets",
    "matplotlib.pyplot",
    "scipy.ndimage",
    "scipy.stats",
    "sklearn.linear_model",
    "sklearn.manifold",
)


GRACE = 1.0  # seconds without an order after which it goes on importing


class Server:
    """The process that others are forked from; starting it does not wait for its imports.

    It imports what is `first` before it forks, and what may be `later` after that, while nothing is asked of it.
    """

    def __init__(self, first: Sequence[str], later: Sequence[str]) -> None:
        # for sockets: private, and short, for their paths have about 100 characters
        short = len(tempfile.gettempdir()) < 60
        self.folder = Path(tempfile.mkdtemp(prefix="smk-", dir=None if short else "/tmp"))
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-m", "smartlab.batch.forked", str(self.folder), *first, "", *later],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=_environment(),
            start_new_session=True,  # a Ctrl-C is for the batch, which lets runs finish
        )
        self.numbers, self.lock = count(), threading.Lock()

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def fork(self, function: str, **given: Any) -> psutil.Process:
        """Start `module:function` with these JSON values in a forked process."""
        assert self.process.stdin is not None and self.process.stdout is not None
        order = {"function": function, "given": given}
        with self.lock:
            with suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps(order).encode() + b"\n")
                self.process.stdin.flush()
            line = self.process.stdout.readline()
        if not line:
            raise RuntimeError("the process that kernels are forked from has ended")
        with suppress(psutil.NoSuchProcess):
            return psutil.Process(int(line))
        raise RuntimeError(f"{function} ended at once")

    def end(self) -> None:
        """End it and all that it forked."""
        if self.alive:
            kill(psutil.Process(self.process.pid))
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


_shared: list[Server] = []  # of this process, be it a worker of a cluster or the batch itself
_shared_lock = threading.Lock()


def server(first: Sequence[str] = LIGHT, later: Sequence[str] = HEAVY) -> Server:
    """The one of this process, with what its first caller had it import; a new one where it was killed."""
    with _shared_lock:
        if _shared and not _shared[0].alive:
            _shared.pop().end()
        if not _shared:
            _shared.append(Server(first, later))
        return _shared[0]


def end_server() -> None:
    with _shared_lock:
        while _shared:
            _shared.pop().end()


def _environment() -> dict[str, str]:
    """That of this process, with this smartlab to be found even if it is not installed."""
    home = str(Path(__file__).resolve().parents[2])
    # one thread, since it forks: each kernel sets its own; and counting GPUs must not touch them before the fork
    alone = {"OPENBLAS_NUM_THREADS": "1", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
    if home in (sysconfig.get_path("purelib"), sysconfig.get_path("platlib")):
        return {**os.environ, **alone}
    path = os.pathsep.join([home, *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, **alone, "PYTHONPATH": path}


def serve(folder: str, *preload: str) -> dict[str, Any]:
    """Fork as long as there are orders; it returns, with its order, in each forked process.

    preload: modules, with an empty name between those to import first and later.
    """
    for ignored in (signal.SIGINT, signal.SIGCHLD):  # nobody waits for what was forked
        signal.signal(ignored, signal.SIG_IGN)
    me, names, ahead = os.getpid(), list(preload), True
    while True:
        while names and (ahead or not select.select([0], [], [], GRACE)[0]):
            if not (module := names.pop(0)):
                ahead = False
                break
            with suppress(ImportError):
                importlib.import_module(module)
        gc.freeze()  # a collection in what is forked would copy the memory it shares
        if not (line := sys.stdin.buffer.readline()):
            break
        order = json.loads(line)
        if pid := os.fork():
            os.write(1, f"{pid}\n".encode())
            continue
        os.setsid()
        die_with(me)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        nothing = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1):
            os.dup2(nothing, stream)
        return order
    kill(psutil.Process(), itself=False)
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(0)


def kill(process: psutil.Process, itself: bool = True) -> None:
    """End a process and everything it has started, and wait until they are gone."""
    with suppress(psutil.NoSuchProcess):
        if itself:
            process.suspend()  # so that it starts nothing more
        found = [*process.children(recursive=True), *([process] if itself else [])]
        for one in found:
            with suppress(psutil.NoSuchProcess):
                one.kill()
        psutil.wait_procs(found, timeout=2)


def become_kernel(
    connection_file: str, environment: dict[str, str], folder: str, log: str, fresh: bool
) -> None:
    """In the forked process: be an IPython kernel in that folder until told otherwise."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.argv = ["kernel"]
    if matplotlib := sys.modules.get("matplotlib"):
        matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
    # what was imported before the fork would draw the same in every kernel
    if numpy := sys.modules.get("numpy.random"):
        numpy.seed()
    if torch := sys.modules.get("torch"):
        torch.seed()
    if threads := int(environment.get("OMP_NUM_THREADS") or 0):
        from threadpoolctl import threadpool_limits

        threadpool_limits(threads)
        if torch:
            torch.set_num_threads(threads)
    if fresh:  # the source of smartlab as it is now, not as it was when the server began
        for name in [name for name in sys.modules if name.partition(".")[0] == "smartlab"]:
            del sys.modules[name]
        importlib.invalidate_caches()
    options = ["--log-level=CRITICAL", "--HistoryManager.hist_file=:memory:"]
    from ipykernel.kernelapp import launch_new_instance

    launch_new_instance(argv=["-f", connection_file, *options])


if __name__ == "__main__":
    asked = serve(*sys.argv[1:])
    module, _, name = asked["function"].partition(":")
    getattr(importlib.import_module(module), name)(**asked["given"])
    atexit._run_exitfuncs()
    os._exit(0)  # taking down all that was imported would copy the memory it shares
