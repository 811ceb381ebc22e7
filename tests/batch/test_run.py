"""Batches end to end: what is run, what is kept, what is said, and what is never done twice."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pandas as pd
import pytest

import smartlab as sl
from smartlab.batch import load_plan, load_runs, run_batch
from smartlab.batch.run import Devices
from tests.batch.toys import attempts, processes_in, toy_notebook, wait_for, write_plan
from tests.conftest import REPO


@pytest.mark.slow
def test_a_chain_runs_shared_work_once_keeps_failures_apart_and_is_never_repeated(tmp_path):
    toy_notebook(tmp_path)
    steps = [
        {"name": "pretrain", "notebook": "toy.ipynb"},
        {"name": "probe", "notebook": "toy.ipynb", "parameters": {"base": "{pretrain}"}},
    ]
    varied = {"pretrain.x": [10, 20], "probe.x": [1, 2], "pretrain.fail": ["20a0"]}
    path = write_plan(tmp_path, steps=steps, grid=varied, seeds=1)
    out = tmp_path / "out"
    report = run_batch(path, out, workers=2, progress=False)
    assert report.counts == {"done": 3, "failed": 1, "blocked": 2, "waiting": 0} and report.executed == 4
    assert "cell 4: ValueError: no 20 please" in str(report) and not report.ok
    table = sl.load_results(out)
    probe = table[(table.step == "probe") & (table.metric == "score")]
    assert (
        sorted(probe["probe.x"]) == [1, 2]
        and set(probe["pretrain.x"]) == {10}
        and sorted(probe.value) == [11, 12]
    )
    auc = table[table.metric == "auc"].iloc[0]
    assert (auc.value, auc.low, auc.high, auc.n) == (0.5, 0.4, 0.6, 9)
    runs = load_runs(out)
    assert list(runs[runs.state == "failed"].error) == ["cell 4: ValueError: no 20 please"]

    bad = out / "pretrain" / runs[runs.state == "failed"].run.iloc[0]
    cells = json.loads((bad / "notebook.ipynb").read_text())["cells"]
    assert "x is 20" in json.dumps(cells) and cells[-1]["execution_count"] is None, "up to the failing cell"
    assert "ValueError" in (bad / "log.txt").read_text()
    assert json.loads((bad / "parameters.json").read_text())["out"] == str(bad)
    page = (out / "ablation.md").read_text(encoding="utf-8")
    assert "no 20 please" in page and "## probe" in page and list((out / "figures").glob("probe-score-*.png"))

    again = run_batch(path, out, workers=2, progress=False)
    assert again.executed == 0 and again.counts == report.counts
    retried = run_batch(path, out, workers=2, retry_failed=True, progress=False)
    assert retried.executed == 1 and attempts(out)[bad.name] == ["started", "failed"] * 2


@pytest.mark.slow
def test_a_slow_run_and_a_dead_kernel_fail_alone_and_leave_no_process(tmp_path):
    rows = [{"wait": 600.0}, {"fail": "die"}, {"x": 1}]
    path = write_plan(tmp_path, list=rows, resources={"minutes": 0.5, "memory": 0.1})
    here = os.getcwd()
    report = run_batch(path, tmp_path / "out", workers=3, progress=False)
    assert os.getcwd() == here
    errors = {f["run"].split("-")[0]: f["error"] for f in report.failures}
    assert report.counts["done"] == 1 and report.counts["failed"] == 2
    assert "limit of 0.5 minutes" in errors["wait"] and "kernel died" in errors["fail"]
    slow = next((tmp_path / "out").glob("*/wait-*")) / "notebook.ipynb"
    assert json.loads(slow.read_text())["cells"], "the notebook is kept as far as it came"
    assert not processes_in(tmp_path / "out")


@pytest.mark.slow
def test_notebook_09_draws_a_batch_that_ran_elsewhere(tmp_path):
    import papermill

    grid = {"x": [1, 2], "kind": ["a", "b"]}
    assert run_batch(write_plan(tmp_path, grid=grid, seeds=2), tmp_path / "r", workers=2, progress=False).ok
    given = {"results": str(tmp_path / "r"), "plan": "noise", "metric": "score", "step": "toy"}
    book = REPO / "notebooks" / "09_ablations.ipynb"
    where = {"out": str(tmp_path / "o")}
    papermill.execute_notebook(
        book, tmp_path / "o.ipynb", given | where, progress_bar=False, kernel_name="python3"
    )
    result = json.loads((tmp_path / "o" / "result.json").read_text())
    assert result["metrics"]["runs"] == 8 and result["metrics"]["combinations"] == 4
    assert result["metrics"]["score of x 2, kind a"]["value"] == pytest.approx(2.05)
    assert {"figures/forest.png", "figures/heat.png"} <= set(result["figures"])
    assert not (tmp_path / "o" / "batch").exists()


@pytest.mark.slow
def test_progress_bars_do_not_flood_the_log(tmp_path):
    bars = (
        "import pathlib, json, time\nfrom tqdm import tqdm\nfor _ in tqdm(range(300), mininterval=0):\n    time.sleep(0.003)\n"
        "print('after')\npathlib.Path(out, 'result.json').write_text(json.dumps({'metrics': {'a': 1}}))"
    )
    toy_notebook(tmp_path, bars)
    report = run_batch(write_plan(tmp_path), tmp_path / "out", workers=1, progress=False)
    log = next((tmp_path / "out").glob("toy/*/log.txt")).read_text()
    assert report.ok and "after" in log and len(log.splitlines()) < 10 and "\r" not in log, log


def test_a_run_that_no_worker_can_take_is_refused(tmp_path):
    plan = load_plan(write_plan(tmp_path, resources={"gpus": 64}))
    with pytest.raises(sl.UseError, match="step 'toy' asks for 64 GPU"):
        run_batch(plan, tmp_path / "out", progress=False)
    with pytest.raises(sl.UseError, match="address of a Dask scheduler"):
        run_batch(plan, tmp_path / "out", scheduler="here", progress=False)


def test_each_gpu_is_lent_to_one_run_at_a_time():
    devices = Devices(["4", "5", "6"])
    first, second = devices.take(2), devices.take(1)
    assert sorted(first + second) == ["4", "5", "6"]
    devices.give(first)
    assert devices.take(1) == ["4"] and devices.free == ["5"]


def test_a_kernel_that_does_not_start_is_started_again(tmp_path, monkeypatch):
    from smartlab.batch import run

    calls = []

    def execute(*args, **more):
        calls.append(args)
        if len(calls) < 3:
            raise RuntimeError("Kernel died before replying to kernel_info")
        (tmp_path / "result.json").write_text('{"metrics": {}}')

    def attempt():
        record = {"parameters": {}, "resources": {"cores": 1}, "devices": "", "attempt": 1}
        return run._Attempt(tmp_path / "n.ipynb", tmp_path, record, 60.0, lambda: True).execute()

    monkeypatch.setattr(run, "server", lambda: SimpleNamespace(alive=True))
    monkeypatch.setattr(run.papermill, "execute_notebook", execute)
    monkeypatch.setattr(run.time, "sleep", lambda seconds: None)
    assert attempt() == "" and len(calls) == 3
    calls.clear()
    monkeypatch.setattr(run, "STARTS", 2)
    assert "the kernel did not start" in attempt()


@pytest.fixture
def two_workers(tmp_path):
    """A scheduler and two workers as separate processes, one GPU each (by name; nothing is computed on them)."""
    where = tmp_path / "scheduler.json"
    dask = [sys.executable, "-m", "dask"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    running = [
        subprocess.Popen(
            [
                *dask,
                "scheduler",
                "--port",
                "0",
                "--no-dashboard",
                "--scheduler-file",
                str(where),
                "--host",
                "127.0.0.1",
            ],
            **quiet,
        )
    ]
    for gpu in ("3", "4"):
        command = [*dask, "worker", "--scheduler-file", str(where), "--nthreads", "1", "--resources", "GPU=1"]
        running.append(
            subprocess.Popen(
                [*command, "--no-dashboard"], env=dict(os.environ, CUDA_VISIBLE_DEVICES=gpu), **quiet
            )
        )
    wait_for(where.exists, what="the scheduler")
    yield json.loads(where.read_text())["address"]
    for process in reversed(running):
        process.terminate()
    for process in running:
        process.wait(30)


@pytest.mark.slow
def test_a_cluster_gives_the_results_of_one_machine_on_the_gpus_of_its_workers(tmp_path, two_workers):
    from distributed import Client

    with Client(two_workers) as client:
        client.wait_for_workers(2, timeout=60)
    path = write_plan(tmp_path, grid={"x": [1, 2], "kind": ["a", "b"]}, parameters={"wait": 0.3}, seeds=1)
    here = run_batch(path, tmp_path / "here", workers=2, progress=False)
    there = run_batch(
        load_plan(path, {"resources.gpus": 1}), tmp_path / "there", scheduler=two_workers, progress=False
    )
    assert here.ok and there.ok and here.executed == there.executed == 4
    a, b = (sl.load_results(tmp_path / where) for where in ("here", "there"))
    facts = ["step", "run", "x", "kind", "seed", "metric", "value", "low", "high", "n"]
    same = [t[t.metric != "device"][facts].reset_index(drop=True) for t in (a, b)]
    pd.testing.assert_frame_equal(*same)
    assert set(a[a.metric == "device"].value) == {-1} and set(b[b.metric == "device"].value) == {3, 4}
