"""Whatever ends first, nothing that was forked is left behind."""

from __future__ import annotations

import subprocess
import sys

import psutil
import pytest

from smartlab.batch import forked
from tests.batch.toys import wait_for


def gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


@pytest.fixture
def tree():
    """A server, what it forked, and what that has started."""
    one = forked.Server(("json",), ("no_such_module",))
    process = one.fork("subprocess:call", args=["sleep", "100"])
    wait_for(process.children, 60)
    yield one, process, process.children()[0]
    one.end()


@pytest.mark.parametrize("how", ["asked to", "its owner ended"])
def test_a_server_ends_with_all_that_it_forked_and_its_sockets(tree, how):
    one, process, started = tree
    if how == "asked to":
        one.end()
    else:
        one.process.stdin.close()
    wait_for(lambda: gone(process) and gone(started) and not one.folder.exists(), 30)


def test_what_was_forked_ends_with_a_server_that_is_killed_and_there_is_a_new_one(tree, monkeypatch):
    one, process, started = tree
    monkeypatch.setattr(forked, "_shared", [one])
    assert forked.server((), ()) is one
    one.process.kill()
    wait_for(lambda: gone(process), 30)
    with pytest.raises(RuntimeError, match="has ended"):
        one.fork("subprocess:call", args=["true"])
    again = forked.server((), ())
    assert again is not one and again.alive and not one.folder.exists()
    forked.end_server()
    assert not again.alive and not forked._shared
    started.kill()


def test_a_script_without_a_main_guard_is_not_run_again(tmp_path):
    code = (
        "from smartlab.batch.forked import end_server, server\nprint('once')\n"
        "server((), ()).fork('subprocess:call', args=['sleep', '1']).wait()\nend_server()\n"
    )
    (tmp_path / "script.py").write_text(code)
    said = subprocess.run([sys.executable, tmp_path / "script.py"], capture_output=True, text=True)
    assert said.returncode == 0 and said.stdout == "once\n", said.stderr


def test_what_is_forked_draws_its_own_random_numbers(tmp_path):
    """Repetitions of a notebook that sets no seed are no copies of each other."""
    from smartlab.batch import load_results, run_batch
    from tests.batch.toys import toy_notebook, write_plan

    draw = "import json, pathlib, numpy, torch\n"
    draw += "drawn = {'numpy': numpy.random.rand(), 'torch': float(torch.rand(()))}\n"
    draw += "pathlib.Path(out, 'result.json').write_text(json.dumps({'metrics': drawn}))"
    toy_notebook(tmp_path, draw)
    modules, one = ("torch", "numpy.random", *forked.LIGHT), forked.server
    forked.end_server()
    one(modules, ())
    assert run_batch(write_plan(tmp_path, grid={"x": [1, 2]}), tmp_path / "out", progress=False).ok
    found = load_results(tmp_path / "out")
    assert found.groupby("metric").value.nunique().tolist() == [2, 2]


def test_a_kernel_that_is_dead_and_not_reaped_is_seen_to_be_dead():
    from smartlab.batch.kernels import _Popen

    process = subprocess.Popen(["sleep", "100"])
    face = _Popen(psutil.Process(process.pid))
    assert face.poll() is None
    process.kill()
    wait_for(lambda: face.poll() == 1, 20)
    process.wait()
    assert face.poll() == 1
