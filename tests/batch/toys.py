"""Small notebooks and plans for the tests of batches."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
import yaml

TOY = """\
x = 0
kind = "a"
rate = 0.5
seed = 0
wait = 0.0
fail = ""
base = ""
out = ""
"""
WORK = """\
import json, os, pathlib, time
print("x is", x)
pathlib.Path(out, "begun").touch()
time.sleep(wait)
"""
FAIL = """\
if fail == f"{x}{kind}{seed}":
    raise ValueError(f"no {x} please")
if fail == "die":
    os.kill(os.getpid(), 9)
"""
RESULT = """\
above = json.loads(pathlib.Path(base, "result.json").read_text())["metrics"]["score"] if base else 0
metrics = {"score": x + 0.1 * seed + above, "auc": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}}
metrics["device"] = int(os.environ["CUDA_VISIBLE_DEVICES"] or -1)
pathlib.Path(out, "result.json").write_text(json.dumps({"metrics": metrics}))
"""


def toy_notebook(
    folder: Path, *cells: str, name: str = "toy", tags: tuple[str, ...] = ("parameters",), first: str = TOY
) -> Path:
    book = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python"}})
    sources = [first, *(cells or (WORK, FAIL, RESULT))]
    book.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    book.cells[0].metadata["tags"] = list(tags)
    nbformat.write(book, folder / f"{name}.ipynb")
    return folder / f"{name}.ipynb"


def write_plan(folder: Path, name: str = "p", **content) -> Path:
    if not (folder / "toy.ipynb").exists():
        toy_notebook(folder)
    content = {"title": "Toy", **content}
    if "steps" not in content:
        content.setdefault("notebook", "toy.ipynb")
    content.setdefault("resources", {"memory": 0.1, "minutes": 2})
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path


def start(plan: Path, out: Path, *words: str) -> subprocess.Popen:
    """`smartlab batch` as a process of its own."""
    command = [sys.executable, "-m", "smartlab", "batch", str(plan), "--out", str(out), *words]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def attempts(out: Path) -> dict[str, list[str]]:
    """Run folder's name -> its events."""
    return {
        path.parent.name: [json.loads(line)["event"] for line in path.read_text().splitlines()]
        for path in sorted(out.glob("*/*/attempts.jsonl"))
    }


def ended(out: Path) -> int:
    return sum(event != "started" for events in attempts(out).values() for event in events)


def wait_for(condition, seconds: float = 240, what: str = "") -> None:
    limit = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < limit, f"waited {seconds} s for {what or condition}"
        time.sleep(0.05)


def processes_in(out: Path) -> list[psutil.Process]:
    """The runs and kernels that work in a batch folder."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(out) in process.cwd() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def launcher(batch: subprocess.Popen) -> psutil.Process:
    """The process that all runs of a local batch are forked from."""
    for process in psutil.Process(batch.pid).children():
        if "smartlab.batch.forked" in process.cmdline():
            return process
    raise LookupError("no launcher yet")
