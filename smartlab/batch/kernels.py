"""Forked processes as kernels for papermill, on Unix sockets: no port can be taken by another in between."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, ClassVar, cast

import psutil
from jupyter_client.connect import KernelConnectionInfo
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager
from jupyter_client.provisioning import LocalProvisioner

from smartlab.batch.forked import server


class _Popen:
    """A process with the face of `subprocess.Popen` that jupyter_client looks at."""

    stdin = stdout = stderr = None

    def __init__(self, process: psutil.Process) -> None:
        self.process, self.pid = process, process.pid

    def poll(self) -> int | None:
        with suppress(psutil.NoSuchProcess):
            if self.process.is_running() and self.process.status() != psutil.STATUS_ZOMBIE:
                return None
        return 1

    def wait(self) -> int | None:
        self.process.wait()
        return 1

    def send_signal(self, number: int) -> None:
        self.process.send_signal(number)


class _Provisioner(LocalProvisioner):
    async def launch_kernel(self, cmd: list[str], **given: Any) -> KernelConnectionInfo:
        manager = cast(ForkedKernel, self.parent)
        folder = manager.folder or os.getcwd()
        process = server().fork(
            "smartlab.batch.forked:become_kernel",
            connection_file=manager.connection_file,
            environment={**given["env"], **manager.environment},
            folder=folder,
            log=manager.written_to,
            fresh=manager.fresh,
        )
        manager.begun(process)
        popen: Any = _Popen(process)
        self.process, self.pid, self.pgid, self.cwd = popen, process.pid, process.pid, folder  # type: ignore[assignment]
        return self.connection_info


class ForkedKernel(AsyncKernelManager):
    """This Python as kernel, forked from `server()`."""

    folder: ClassVar[str] = (
        ""  # where it works; papermill's `cwd` would move this whole process, other runs included
    )
    environment: ClassVar[Mapping[str, str]] = {}  # besides that of this process
    written_to: ClassVar[str] = "kernel.log"  # what it writes past the notebook
    fresh: ClassVar[bool] = False  # whether smartlab is imported again from its source

    def __init__(self, **settings: Any) -> None:
        super().__init__(transport="ipc", **settings)
        forking = server()
        self.ip = f"{forking.folder}/{next(forking.numbers)}"
        self.connection_file = f"{self.ip}.json"
        self.provisioner = _Provisioner(kernel_id="forked", kernel_spec=self.kernel_spec, parent=self)

    def begun(self, process: psutil.Process) -> None:
        """For who wants to follow the process."""

    @property
    def kernel_spec(self) -> KernelSpec:
        return KernelSpec(argv=[sys.executable], display_name="Python 3", language="python")
