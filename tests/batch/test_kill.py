"""Nothing is lost and nothing is done twice, whatever is killed and however many batches share a folder."""

from __future__ import annotations

import json
import shutil
import signal
import time

import pytest

import smartlab as sl
from smartlab.batch import expand, load_plan, load_runs, run_batch
from tests.batch.toys import attempts, ended, launcher, processes_in, start, wait_for, write_plan

PATIENT = {"memory": 0.1, "minutes": 10}


@pytest.mark.slow
def test_a_batch_survives_the_death_of_its_launcher_and_of_itself(tmp_path):
    grid = {"x": [0, 1, 2, 3], "kind": ["a", "b"]}
    path = write_plan(
        tmp_path, grid=grid, parameters={"wait": 0.2, "fail": "3b1"}, seeds=2, resources=PATIENT
    )
    out = tmp_path / "out"
    batch = start(path, out, "--workers", "2")
    wait_for(lambda: ended(out) >= 3, what="three runs")
    launcher(batch).kill()
    wait_for(lambda: ended(out) >= 7, what="runs after the launcher's death")
    batch.kill()
    batch.wait(30)
    wait_for(lambda: not processes_in(out), 20, "orphans to end")
    before = ended(out)

    again = start(path, out, "--workers", "2")
    said = again.communicate(timeout=300)[0]
    assert (
        again.returncode == 1 and "15 of 16 runs done" in said and "cell 4: ValueError: no 3 please" in said
    ), said
    assert f"{16 - before} of them now" in said
    events = attempts(out)
    assert len(events) == 16
    assert all(e.count("done") + e.count("failed") == 1 for e in events.values()), "each counted once"
    runs = load_runs(out)
    assert (runs.state == "done").sum() == 15 and (runs.state == "failed").sum() == 1
    table = sl.load_results(out)
    assert (table.metric == "score").sum() == 15
    assert not processes_in(out)


@pytest.mark.slow
def test_two_batches_in_one_folder_share_the_work(tmp_path):
    both = {"wait": 0.3}
    a = write_plan(tmp_path, "a", grid={"x": [0, 1, 2, 3]}, parameters=both, resources=PATIENT)
    b = write_plan(tmp_path, "b", grid={"x": [2, 3, 4], "kind": ["a"]}, parameters=both, resources=PATIENT)
    out = tmp_path / "out"
    batches = [start(plan, out, "--workers", "2") for plan in (a, b)]
    said = [batch.communicate(timeout=300)[0] for batch in batches]
    assert [batch.returncode for batch in batches] == [0, 0], said
    assert "4 of 4 runs done" in said[0] and "3 of 3 runs done" in said[1]
    assert len(attempts(out)) == 5 and all(e == ["started", "done"] for e in attempts(out).values())


@pytest.mark.slow
def test_ctrl_c_finishes_what_runs_and_a_second_one_breaks_off(tmp_path):
    path = write_plan(tmp_path, grid={"x": [0, 1, 2]}, parameters={"wait": 4.0}, resources=PATIENT)
    out = tmp_path / "out"
    batch = start(path, out, "--workers", "1")
    wait_for(lambda: list(out.glob("toy/*/begun")), what="the first run")
    batch.send_signal(signal.SIGINT)
    said = batch.communicate(timeout=120)[0]
    assert batch.returncode == 1 and "1 of 3 runs done" in said and "2 not run yet" in said, said
    assert list(attempts(out).values()) == [["started", "done"]]

    slow = write_plan(tmp_path, "slow", grid={"x": [7]}, parameters={"wait": 600.0}, resources=PATIENT)
    batch = start(slow, out, "--workers", "1")
    wait_for(lambda: list(out.glob("toy/x-7*/begun")), what="the slow run")
    batch.send_signal(signal.SIGINT)
    time.sleep(1)
    batch.send_signal(signal.SIGINT)
    assert batch.wait(60) == 130
    wait_for(lambda: not processes_in(out), 20, "runs to end")
    assert load_runs(out).state.tolist().count("running") == 1, "left as begun, to be run again"


@pytest.mark.slow
def test_a_finished_batch_of_a_thousand_is_checked_in_seconds(tmp_path):
    """The records are those of one real run, copied under each run's own key."""
    path = write_plan(tmp_path, grid={"x": list(range(250)), "kind": ["a", "b"]}, seeds=2)
    one = load_plan(write_plan(tmp_path, "one", grid={"x": [0], "kind": ["a"]}, seeds=1))
    out = tmp_path / "out"
    assert run_batch(one, out, workers=1, progress=False).ok
    real = next(out.glob("toy/*"))
    record = json.loads((real / "run.json").read_text())
    for run in expand(load_plan(path)):
        folder = out / run.step / run.name
        if not folder.exists():
            shutil.copytree(real, folder)
            facts = {"key": run.key, "identity": run.identity, "settings": run.settings}
            (folder / "run.json").write_text(json.dumps(record | facts))
    assert run_batch(path, out, workers=2, progress=False).executed == 0  # it has written what is new of them
    begin = time.process_time()
    report = run_batch(path, out, workers=2, progress=False)
    checked = time.process_time() - begin
    begin = time.process_time()
    table = sl.load_results(out)
    loaded = time.process_time() - begin
    assert report.ok and report.executed == 0 and checked < 5, checked
    assert table.run.nunique() == 1000 and loaded < 5, loaded
