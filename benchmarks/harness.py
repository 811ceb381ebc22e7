"""One way to time things: warm-up, turns, medians with their spread, memory from fresh processes, where it ran.

Two sides that are compared take turns within one process, so that whatever else the machine is doing slows both
alike; the ratio is the median over turns of side A's time over side B's in the same turn. CPU time is recorded
beside wall time: on a machine that others use too, it is the steadier of the two.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

Sides = Mapping[str, Callable[[], Any]]


def machine() -> dict[str, Any]:
    """What the numbers were taken on."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    cpu = next((line.split(": ")[1] for line in lines if line.startswith("model name")), platform.processor())
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "avx512": "avx512f" in flags,
        "bf16_units": bool({"avx512_bf16", "amx_bf16"} & flags),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load_before": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        **{name: version(name) for name in ("blosc2", "torch", "monai", "numpy")},
    }


def now(device: torch.device | None = None) -> float:
    """Seconds, after everything asked of the device is done."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def summary(values: list[float]) -> dict[str, Any]:
    """Median and quartiles of some times, and all of them."""
    ordered = sorted(values)
    quarters = statistics.quantiles(ordered, n=4) if len(ordered) > 1 else [ordered[0]] * 3
    return {
        "median": round(statistics.median(ordered), 5),
        "quartiles": [round(quarters[0], 5), round(quarters[2], 5)],
        "all": [round(v, 5) for v in values],
    }


def in_turns(sides: Sides, turns: int, warm: int = 1, device: torch.device | None = None) -> dict[str, Any]:
    """Time each side `turns` times, in turns: seconds and CPU seconds by side."""
    for _ in range(warm):
        for side in sides.values():
            side()
    wall: dict[str, list[float]] = {name: [] for name in sides}
    cpu: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(turns):
        names = list(sides) if turn % 2 == 0 else list(sides)[::-1]
        for name in names:
            began, used = now(device), time.process_time()
            sides[name]()
            wall[name].append(now(device) - began)
            cpu[name].append(time.process_time() - used)
    return {name: {"seconds": summary(wall[name]), "cpu_seconds": summary(cpu[name])} for name in sides}


def ratio(measured: dict[str, Any], slow: str, fast: str) -> dict[str, Any]:
    """How many times faster `fast` is, over the turns that both took."""
    out = {}
    for kind in ("seconds", "cpu_seconds"):
        pairs = zip(measured[slow][kind]["all"], measured[fast][kind]["all"], strict=True)
        out[kind] = summary([a / b for a, b in pairs if b > 0])
    return out


class Parts:
    """Where the time of a step goes: `with parts("teacher"): …`, nested parts subtracted from the outer one."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.device = device
        self.steps: list[dict[str, float]] = []
        self._open: list[float] = []  # time of nested parts, by level

    def begin(self) -> None:
        self.steps.append({})

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        began = now(self.device)
        self._open.append(0.0)
        try:
            yield
        finally:
            took, nested = now(self.device) - began, self._open.pop()
            if self._open:
                self._open[-1] += took
            if self.steps:
                self.steps[-1][name] = self.steps[-1].get(name, 0.0) + took - nested

    def wrap(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self(name):
                return call(*args, **kwargs)

        return timed

    def medians(self) -> dict[str, float]:
        names = {name for step in self.steps for name in step}
        return {n: round(statistics.median(s.get(n, 0.0) for s in self.steps), 5) for n in sorted(names)}


def peak_megabytes(device: torch.device | None = None) -> float:
    """The most memory this process (or the device) has held."""
    if device is not None and device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.is_file():  # getrusage would tell the most of the process that started this one
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def in_fresh_process(module: str, *words: str, timeout: float = 600) -> dict[str, Any]:
    """`python -m module words…` in a process of its own; its last line is JSON."""
    command = [sys.executable, "-m", module, *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def write(result: dict[str, Any], path: Path) -> None:
    """JSON, by way of a temporary name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)
