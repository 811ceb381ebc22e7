"""Training from a real kernel: stopped by ■ it loses nothing and leaves no process; others can watch it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import nbformat
import psutil
import pytest
from jupyter_client.manager import KernelManager

import smartlab as sl
from tests.conftest import REPO

CELLS = [
    c.source
    for c in nbformat.read(REPO / "notebooks" / "02_pretrain.ipynb", as_version=4).cells
    if c.cell_type == "code"
]
STEPS = 150


@contextmanager
def kernel(folder: Path):
    """A running kernel and its client."""
    manager = KernelManager(kernel_name="python3")
    manager.start_kernel(cwd=str(folder), env=os.environ | {"OMP_NUM_THREADS": "1"})
    client = manager.client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=120)
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def run(client, code: str) -> dict:
    """Run a cell to its end -> the reply, with "html": what it displays by then."""
    shown: dict[str, str] = {}

    def keep(message) -> None:
        content = message["content"]
        if message["msg_type"] in ("display_data", "update_display_data"):
            shown[content.get("transient", {}).get("display_id", "")] = content["data"].get("text/html", "")

    reply = client.execute_interactive(code, timeout=300, output_hook=keep)
    return reply["content"] | {"html": "".join(shown.values())}


def helpers_of(manager) -> list[str]:
    """Processes that the kernel has, the bookkeeper of shared memory aside."""
    own = psutil.Process(manager.provisioner.pid).children(recursive=True)
    lines = [(p.status(), " ".join(p.cmdline()) if p.status() != psutil.STATUS_ZOMBIE else "") for p in own]
    return [f"{status} {line}" for status, line in lines if "resource_tracker" not in line]


def wait_for(holds, what: str, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def rows(out: Path) -> int:
    path = out / "run" / "metrics.csv"
    return len(path.read_text().splitlines()) - 1 if path.is_file() else 0


@pytest.mark.slow
def test_stopping_the_training_cell_loses_nothing_and_leaves_no_process(settings, cohort, tmp_path):
    config = sl.load_config("tiny", settings)
    config.save(tmp_path / "small.yaml")
    out = tmp_path / "out"
    given = {"preset": str(tmp_path / "small.yaml"), "method": "simmim", "steps": STEPS, "workers": 1}
    given |= {"data": str(cohort[0]), "root": str(cohort[1]), "out": str(out)}
    code = [*CELLS[:1], "\n".join(f"{name} = {value!r}" for name, value in given.items()), CELLS[1]]
    with kernel(tmp_path) as (manager, client):
        for cell in code:
            assert run(client, cell)["status"] == "ok"
        client.execute(CELLS[2])
        wait_for(lambda: rows(out) >= 3, "training began")
        manager.interrupt_kernel()
        assert run(client, "x = 1")["status"] in ("ok", "aborted")
        stopped = sl.Run(out / "run")
        assert 3 <= stopped.step < STEPS and stopped.events[-1]["event"] == "stopped"
        wait_for(lambda: not helpers_of(manager), f"left behind: {helpers_of(manager)}", 15)
        again = run(client, CELLS[2])
        assert again["status"] == "ok", again
        assert "<polyline" in again["html"] and "data:image/png" in again["html"], "live losses and masks"
        assert run(client, "assert run.finished")["status"] == "ok"
        wait_for(lambda: not helpers_of(manager), f"left behind: {helpers_of(manager)}", 15)
    steps = sl.Run(out / "run").history.step.tolist()
    assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == STEPS, "no step lost or twice"
    assert {1, 3, 6, 9} <= {*steps}


@pytest.mark.slow
def test_stopping_while_the_data_are_made_leaves_no_process_and_goes_on(tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    monkeypatch.setenv("SMARTLAB_CACHE", str(cache))
    make = "from smartlab.notebook import open_cohort\nopen_cohort('phantom-ct', patients={}, workers=2)"
    made = cache / "phantom-ct-6-seed0"
    with kernel(tmp_path) as (manager, client):
        client.execute(make.format(6))
        wait_for(lambda: any(made.glob("images/*.nii.gz")), "making began")
        manager.interrupt_kernel()
        run(client, "x = 1")
        wait_for(lambda: not helpers_of(manager), f"left behind: {helpers_of(manager)}", 30)
        whole = {path: path.stat().st_mtime_ns for path in made.glob("images/*.nii.gz")}
        assert 1 <= len(whole) < 6
        again = run(client, make.format(6))
        assert again["status"] == "ok", again
    assert len([*made.glob("images/*.nii.gz")]) == 6
    assert all(path.stat().st_mtime_ns == before for path, before in whole.items()), "none is made twice"


def test_a_run_elsewhere_is_watched_until_it_ends(settings, tmp_path):
    from smartlab.training.follow import follow

    out = tmp_path / "elsewhere"
    config = sl.load_config("tiny", settings | {"train.picture_every": 4})
    config.save(tmp_path / "c.yaml")
    start = f"import smartlab as sl; sl.pretrain(sl.load_config({str(tmp_path / 'c.yaml')!r}), {str(out)!r}, progress=False)"
    with subprocess.Popen([sys.executable, "-c", start]) as process:
        with kernel(tmp_path) as (_, client):
            code = "from smartlab.training.follow import follow\n"
            reply = run(client, code + f"run = follow({str(out)!r}, 250)\nassert run.finished, run")
        assert process.wait(60) == 0
    assert reply["status"] == "ok", reply
    assert "step 8 of 8" in reply["html"] and "<polyline" in reply["html"]
    assert "data:image/png" in reply["html"], "the newest masked view"
    with pytest.raises(sl.DataError, match="no run began here"):
        follow(tmp_path / "nowhere", 0.1)


def test_more_processes_than_gpus_are_refused_before_any_work(settings, tmp_path):
    import torch

    from smartlab.notebook import train

    if torch.cuda.device_count() > 8:
        pytest.skip("this machine has the GPUs")
    with pytest.raises(sl.UseError, match="processes=9 needs as many GPUs"):
        train(sl.load_config("tiny", settings), tmp_path / "r", processes=9)
    assert not (tmp_path / "r").exists()
