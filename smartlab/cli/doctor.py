"""`smartlab doctor`: is this machine ready, and if not, what to do.

Each check returns one `Check`. A failed check means that smartlab cannot work; a warning means
that it works with less (no GPU, little memory).
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

REQUIRED = [
    "torch",
    "monai",
    "nibabel",
    "pydicom",
    "highdicom",
    "SimpleITK",
    "blosc2",
    "idc_index",
    "accelerate",
    "dask",
    "distributed",
    "papermill",
    "jupyterlab",
    "ipywidgets",
    "anywidget",
    "plotly",
    "matplotlib",
    "sklearn",
    "umap",
    "pydantic",
    "typer",
    "safetensors",
    "tensorboard",
    "einops",
]


@dataclass(frozen=True)
class Check:
    name: str
    status: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def examine(folder: str | Path = ".") -> list[Check]:
    """Run every check; `folder` is where runs and stores would be written."""
    checks: list[Callable[[], Check]] = [
        _python,
        _packages,
        _torch,
        _gpu,
        _memory,
        lambda: _disk(Path(folder)),
        _shared_memory,
        _chromium,
    ]
    results = []
    for check in checks:
        try:
            results.append(check())
        except Exception as error:  # a broken install must not stop the other checks
            name = getattr(check, "__name__", "check").strip("_")
            results.append(Check(name, "fail", f"{type(error).__name__}: {error}", "run `make setup` again"))
    return results


def report(checks: list[Check]) -> str:
    """The checks as text, one line each, advice below."""
    marks = {"ok": "ok  ", "warn": "warn", "fail": "FAIL"}
    lines = []
    for check in checks:
        lines.append(f"{marks[check.status]}  {check.name:<13} {check.found}")
        if check.advice:
            lines.append(f"{'':19} -> {check.advice}")
    return "\n".join(lines)


def as_json(checks: list[Check]) -> dict[str, Any]:
    return {"ready": all(c.status != "fail" for c in checks), "checks": [asdict(c) for c in checks]}


def _python() -> Check:
    found = f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        return Check(
            "Python", "fail", found, "smartlab needs Python 3.11 to 3.13: make setup PYTHON=python3.12"
        )
    return Check("Python", "ok", found)


def _packages() -> Check:
    missing = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    if missing:
        return Check("packages", "fail", f"missing: {', '.join(missing)}", "run `make setup`")
    return Check("packages", "ok", f"all {len(REQUIRED)} found (monai {importlib.metadata.version('monai')})")


def _torch() -> Check:
    import torch

    found = f"{torch.__version__}, {torch.get_num_threads()} threads"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < (2, 6):
        return Check("torch", "fail", found, "smartlab needs torch 2.6 or newer: make setup")
    return Check("torch", "ok", found)


def _gpu() -> Check:
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        return Check("GPU", "ok", f"{len(names)} × {names[0]}, {memory:.0f} GiB")
    advice = (
        "fine for the phantom runs; for real pretraining install the CUDA build of torch on a GPU machine"
    )
    return Check("GPU", "warn", "none visible to torch", advice)


def _memory() -> Check:
    total = memory_limit() / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = f"{total:.1f} GiB for {cores} cores"
    if total < 4:
        return Check("memory", "warn", found, "below 4 GiB: set data.workers=0 and train.batch=1")
    return Check("memory", "ok", found)


def memory_limit() -> int:
    """Bytes this process may use: physical memory, or the container's limit when it is lower."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = Path(file).read_text().strip() if Path(file).is_file() else ""
        if text.isdigit():
            total = min(total, int(text))
    return total


def _disk(folder: Path) -> Check:
    existing = next(p for p in (folder.resolve(), *folder.resolve().parents) if p.exists())
    free = shutil.disk_usage(existing).free / 2**30
    found = f"{free:.0f} GiB free under {existing}"
    if not os.access(existing, os.W_OK):
        return Check("disk", "fail", f"{existing} is not writable", "choose another --out, or fix the rights")
    if free < 2:
        return Check(
            "disk", "fail", found, "the demo needs 2 GiB; 10,000 scans need about 100 GiB in the store"
        )
    if free < 20:
        return Check(
            "disk", "warn", found, "enough for the demo; 10,000 scans need about 100 GiB in the store"
        )
    return Check("disk", "ok", found)


def _shared_memory() -> Check:
    place = Path("/dev/shm")
    if not place.is_dir():
        return Check("/dev/shm", "ok", "not on this system; smartlab's loader does not need it")
    size = shutil.disk_usage(place).total / 2**20
    if size < 256:
        advice = "smartlab's loader works all the same; other loaders in your notebooks need `--shm-size=8g`"
        return Check("/dev/shm", "warn", f"{size:.0f} MiB", advice)
    return Check("/dev/shm", "ok", f"{size / 1024:.1f} GiB")


def chromium() -> str | None:
    """Path of a Chromium or Chrome for the browser tests, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def _chromium() -> Check:
    path = chromium()
    if path is None:
        return Check(
            "Chromium", "warn", "not found", "only the browser tests need it: apt-get install -y chromium"
        )
    return Check("Chromium", "ok", path)
