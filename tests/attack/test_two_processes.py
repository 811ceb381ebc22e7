"""Two processes in one folder: the second is told who has it, and the first never notices."""

from __future__ import annotations

import os
import signal
import time

import pandas as pd
import pytest

import smartlab as sl
from smartlab.core.errors import DataError
from smartlab.core.files import held
from smartlab.evaluation.finetune.trainer import fit
from smartlab.training.requests import only_one
from tests.processes import Child
from tests.training.conftest import cohort, settings  # noqa: F401  fixtures
from tests.training.test_resume import train, wait_for_step


def keep(folder, made):
    with only_one(folder):
        made.touch()
        time.sleep(60)


@pytest.fixture
def holder(tmp_path):
    child = Child(keep, tmp_path / "run", tmp_path / "made")
    while not (tmp_path / "made").exists():
        assert child.running, child.said
        time.sleep(0.02)
    yield child
    if child.running:
        child.kill()


def test_the_second_pretraining_is_told_and_the_first_goes_on(settings, tmp_path):  # noqa: F811
    settings = settings | {"train.steps": 20, "train.checkpoint_every": 2}
    first = Child(train, settings, tmp_path / "run", 0.15)
    wait_for_step(tmp_path / "run", 2, first)
    with pytest.raises(DataError, match=rf"another process trains .*process {first.pid} on"):
        sl.pretrain(sl.load_config("tiny", settings), tmp_path / "run", resume=True, progress=False)
    assert first.wait() == 0, first.said
    assert pd.read_csv(tmp_path / "run" / "metrics.csv").step.tolist() == list(range(1, 21))


def test_so_is_the_second_fine_tuning(holder, tmp_path):
    with pytest.raises(DataError, match=rf"another process trains .*process {holder.pid} on"):
        fit(None, tmp_path / "run", None, seed=0, resume=True)


def test_a_lock_ends_with_its_process_however_that_ends(holder, tmp_path):
    holder.kill()
    with held(tmp_path / "run", "taken"):
        pass


def test_other_processes_of_the_same_run_do_not_lock_each_other_out(holder, tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}.items():  # as launchers do
        monkeypatch.setenv(name, value)
    with only_one(tmp_path / "run"):
        pass


def test_a_worker_that_outlives_its_run_does_not_keep_the_folder(tmp_path):
    with held(tmp_path / "run", "taken"):
        pid = os.fork()
        if pid == 0:
            time.sleep(30)
            os._exit(0)
    child = Child(keep, tmp_path / "run", tmp_path / "made")
    try:
        end = time.monotonic() + 10
        while not (tmp_path / "made").exists():
            assert child.running and time.monotonic() < end, child.said
            time.sleep(0.02)
    finally:
        child.kill()
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
