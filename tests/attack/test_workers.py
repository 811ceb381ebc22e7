"""A loader worker that dies or hangs ends training soon, with a word that says so; and the run goes on from there."""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections import deque

import psutil
import pytest

from smartlab import Run
from smartlab.cli import app as cli
from smartlab.core.errors import DataError
from smartlab.data.crops import loader
from smartlab.data.crops.loader import CropLoader
from smartlab.data.crops.views import ViewDataset
from smartlab.data.store.store import open_store
from tests.attack.harness import tries
from tests.processes import Child
from tests.training.conftest import cohort, settings  # noqa: F401  fixtures
from tests.training.test_resume import assert_same_run, train, wait_for_step


def command(words):
    """The command line in a process of its own."""
    sys.argv = ["smartlab", *words]
    cli.main()


def pretrain_words(given, out):
    named = [f"{key}={value}" for key, value in given.items()]
    return ["pretrain", "tiny", *named, "--out", str(out), "--json", "--resume"]


def loader_workers(child):
    return psutil.Process(child.pid).children()


@pytest.mark.parametrize(
    "usual", [pytest.param(2, id="some"), pytest.param(8, id="many", marks=pytest.mark.slow)]
)
def test_a_killed_worker_ends_the_command_with_a_line_that_says_why(settings, tmp_path, usual):  # noqa: F811
    settings = settings | {"data.workers": 2, "train.steps": 100_000}
    for number in range(tries(usual)):
        out = tmp_path / str(number)
        child = Child(command, pretrain_words(settings, out))
        wait_for_step(out, 2, child)
        time.sleep(random.Random(number).random() / 2)
        loader_workers(child)[number % 2].kill()
        assert child.wait(30) == 1
        assert "a loader worker died (found exit code -9, killed)" in child.said, child.said
        assert "Traceback" not in child.said


@pytest.mark.slow
@pytest.mark.parametrize("hung", [False, True], ids=["died", "hung and was asked to stop"])
def test_a_run_whose_worker_died_or_hung_goes_on_as_if_it_had_not(settings, tmp_path, hung):  # noqa: F811
    settings = settings | {"data.workers": 2, "train.checkpoint_every": 20 if hung else 2}
    killed = Child(train, settings, tmp_path / "killed", 0.3)
    wait_for_step(tmp_path / "killed", 4, killed)
    if hung:
        loader_workers(killed)[0].suspend()
        time.sleep(2)  # what was read ahead is used up, and it waits for the next batch
        killed.send(signal.SIGTERM)
        assert killed.wait(30) == 0, killed.said
        run = Run(tmp_path / "killed")
        assert 4 <= run.step < 8 and [e["event"] for e in run.events][-2:] == ["saved", "stopped"]
    else:
        loader_workers(killed)[0].kill()
        assert killed.wait(30) == 1
    for name in ("killed", "whole"):
        again = Child(train, settings, tmp_path / name)
        assert again.wait() == 0, again.said
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 8)


@pytest.mark.parametrize("asked", [False, True], ids=["waited for", "asked to stop"])
def test_a_hung_worker_is_given_up(settings, tmp_path, asked):  # noqa: F811
    settings = settings | {"data.workers": 2, "train.steps": 100_000}
    more = {"SMARTLAB_LOADER_WAIT": "600" if asked else "2"}
    child = Child(command, pretrain_words(settings, tmp_path / "r"), env=more)
    wait_for_step(tmp_path / "r", 2, child)
    worker = loader_workers(child)[0]
    worker.suspend()
    time.sleep(0.5)
    if asked:
        child.send(signal.SIGTERM)
    assert child.wait(40) == (0 if asked else 1), child.said
    assert ("a loader worker does not answer" in child.said) != asked and "Traceback" not in child.said
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_a_slow_worker_of_a_run_that_was_suspended_or_asked_to_stop_is_waited_for(monkeypatch):
    class Slow:
        polls = 0

        def poll(self, seconds):
            self.polls += 1
            return self.polls > 30

        def recv(self):
            return "its answer"

    pool = loader._Pool.__new__(loader._Pool)
    pool.pipes = [Slow()]
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0 * pool.pipes[0].polls)  # suspended again and again
    assert pool._receive(0, lambda: pool.pipes[0].polls > 25) == "its answer"
    pool.pipes, pool.processes = [Slow()], []
    Slow.close = lambda self: None
    pool.pending = deque()
    with pytest.raises(loader.GivenUp):
        pool._receive(0, lambda: pool.pipes[0].polls > 15)


def test_a_loader_can_be_used_again_after_its_worker_died(cohort):  # noqa: F811
    reader = CropLoader(ViewDataset(open_store(cohort[2]), region=48, view=32, draws=4), 2, workers=2)
    batches = iter(reader)
    first = next(batches)["views"]
    os.kill(reader._pool.processes[1].pid, signal.SIGKILL)
    with pytest.raises(DataError, match="a loader worker died"):
        for _ in range(4):
            next(batches)
    reader.epoch, reader.position = 0, 0
    assert (next(iter(reader))["views"] == first).all()
    reader.close()
