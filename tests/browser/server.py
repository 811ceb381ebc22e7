"""A JupyterLab on a free port, and its notebooks run in a browser: for the tests and for benchmarks/explorer.py."""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import nbformat
from playwright.sync_api import BrowserContext, Page

REPO = Path(__file__).resolve().parents[2]
CONNECTED = """() => {
  const kernel = window.jupyterapp?.shell.currentWidget?.sessionContext?.session?.kernel;
  return kernel?.connectionStatus === "connected" && kernel.status === "idle" && !document.querySelector(".jp-Dialog");
}"""


@dataclass
class Lab:
    """A running JupyterLab: its address, token and folder of notebooks."""

    url: str
    token: str
    folder: Path

    def address(self, notebook: str) -> str:
        return f"{self.url}/lab/tree/{notebook}?token={self.token}&reset"


@contextmanager
def jupyterlab(folder: Path) -> Iterator[Lab]:
    """A server whose root is this folder, with settings and kernels of its own."""
    news = folder / ".settings" / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
    news.parent.mkdir(parents=True)
    news.write_text('{"fetchNews": "false"}', encoding="utf-8")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    token = secrets.token_hex(16)
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
        *("--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"),
        *(f"--IdentityProvider.token={token}", f"--ServerApp.root_dir={folder}"),
        "--LabApp.expose_app_in_browser=True",
        "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
    ]
    own = {
        name: str(folder / f".{name}")
        for name in ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
    }
    settings = {
        "JUPYTERLAB_SETTINGS_DIR": str(folder / ".settings"),
        "PYTHONPATH": str(REPO),
        "OMP_NUM_THREADS": "1",
        "PYTHONUTF8": "1",
        "SMARTLAB_SALT": "tests-only-no-secret",
    }
    log = open(folder / "jupyter.log", "w", encoding="utf-8")  # noqa: SIM115  the server writes to it
    server = subprocess.Popen(
        command, env={**os.environ, **own, **settings}, stdout=log, stderr=log, start_new_session=True
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/api/status?token={token}", server, folder / "jupyter.log")
        yield Lab(f"http://127.0.0.1:{port}", token, folder)
    finally:
        os.killpg(server.pid, signal.SIGTERM)  # its kernels too
        try:
            server.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
        log.close()


def wait_for(url: str, server: subprocess.Popen, log: Path, patience: float = 120) -> None:
    began = time.monotonic()
    while time.monotonic() - began < patience and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except OSError:
            time.sleep(0.2)
    raise RuntimeError(f"JupyterLab did not start:\n{log.read_text(encoding='utf-8')[-3000:]}")


def write_notebook(folder: Path, name: str, cells: list[str]) -> None:
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    book = nbformat.v4.new_notebook(metadata=kernel)
    book.cells = [nbformat.v4.new_code_cell(cell, id=f"{name}-{i:02d}") for i, cell in enumerate(cells)]
    nbformat.write(book, folder / f"{name}.ipynb")


def run_notebook(context: BrowserContext, lab: Lab, name: str) -> tuple[Page, list[str]]:
    """Open a notebook, run all its cells; the page, and its list of console errors, which keeps growing."""
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(lab.address(f"{name}.ipynb"), wait_until="commit")
    page.wait_for_selector(".jp-Notebook .jp-CodeCell")
    page.wait_for_function(CONNECTED)  # a run asked for earlier is dropped without a word
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
    return page, errors
