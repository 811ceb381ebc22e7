"""Kernels that are there at once: forked from one process that has imported the heavy packages.

A fresh kernel spends some five CPU seconds on importing torch and the rest; a forked one starts in a
blink and shares that memory. For runs on this machine, such as the demo's; batches on a cluster start
fresh kernels.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
from functools import cache
from multiprocessing.context import ForkServerContext
from typing import Any, cast

from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.provisioning import LocalProvisioner

from smartlab.batch.notebook_run import BatchKernel
from smartlab.core.workers import die_with

_PRELOAD = [  # without umap, whose first import in a new environment compiles for most of a minute
    "torch._dynamo",  # optimisers import it when they first step
    "torch.utils.tensorboard",
    "accelerate",
    "pyarrow.pandas_compat",
    "monai.networks.nets",
    "matplotlib.pyplot",
    "ipykernel.ipkernel",
    "smartlab.batch.forked",
    "scipy.ndimage",
    "scipy.stats",
    "sklearn.linear_model",
    "sklearn.manifold",
    "smartlab.notebook",
    "smartlab.data.store.build",
    "smartlab.data.crops.views",
    "smartlab.data.phantoms.make",
    "smartlab.data.phantoms.ct",
    "smartlab.training.pretrain",
    "smartlab.evaluation.evaluate",
    "smartlab.evaluation.look.clusters",
    "smartlab.evaluation.finetune.segment",
    "smartlab.evaluation.finetune.classify",
    "smartlab.viewers.masks",
    "smartlab.viewers.embedding",
]


@cache
def server() -> ForkServerContext:
    """The process that kernels are forked from; starting it does not wait for its imports."""
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    forkserver.ensure_running()
    return context


class _Process:
    """A forked process with the face of `subprocess.Popen` that jupyter_client looks at."""

    stdin = stdout = stderr = None

    def __init__(self, *args: Any) -> None:
        self._process = server().Process(target=_become_kernel, args=args)
        self._process.start()
        self.pid = self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self) -> int | None:
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.pid is not None and self.poll() is None:
            os.kill(self.pid, number)


class _Provisioner(LocalProvisioner):
    async def launch_kernel(self, cmd: list[str], **given: Any) -> KernelConnectionInfo:
        folder, manager = str(given.get("cwd") or os.getcwd()), cast(ForkedKernel, self.parent)
        process: Any = _Process(manager.connection_file, dict(given["env"]), folder)
        self.process, self.pid, self.pgid, self.cwd = process, process.pid, process.pid, folder  # type: ignore[assignment]
        return self.connection_info


class ForkedKernel(BatchKernel):
    """This Python as kernel, forked from `server()`, on Unix sockets in a private folder."""

    def __init__(self, **settings: Any) -> None:
        self.sockets = tempfile.mkdtemp(prefix="smartlab-")
        super().__init__(**settings)
        self.provisioner = _Provisioner(kernel_id="forked", kernel_spec=self.kernel_spec, parent=self)

    def cleanup_ipc_files(self) -> None:
        super().cleanup_ipc_files()
        if self.shutting_down:
            shutil.rmtree(self.sockets, ignore_errors=True)


def _become_kernel(connection_file: str, environment: dict[str, str], folder: str) -> None:
    """In the forked process: be an IPython kernel in that folder until told otherwise."""
    os.setsid()
    die_with(os.getppid())
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    log = os.open("kernel.log", os.O_WRONLY | os.O_TRUNC | os.O_CREAT, 0o666)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.argv = ["kernel"]
    import matplotlib
    import torch
    from ipykernel.kernelapp import launch_new_instance

    matplotlib.rcParams["backend"] = "module://matplotlib_inline.backend_inline"
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    launch_new_instance(argv=["-f", connection_file, "--log-level=CRITICAL"])
