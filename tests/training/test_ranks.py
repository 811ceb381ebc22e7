"""Two processes with batch b are one process with batch 2b."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys

import pandas as pd
import pytest

import smartlab as sl
from smartlab.training import checkpoint
from smartlab.training.requests import ranks
from tests.conftest import REPO
from tests.processes import Child


def train(settings, out):
    sl.pretrain(sl.load_config("tiny", settings), out, progress=False)


def rank_of_two(rank, port):
    """The environment in which a launcher starts one of two processes."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "true"}
    return ranks | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("method", "more"),
    [
        (
            "dagman",
            {"distill.kind": "prototype", "distill.assignment": "centre", "mask.strategy": "attention_hint"},
        ),
        pytest.param(
            "dagman",
            {"distill.kind": "prototype", "distill.assignment": "sinkhorn", "mask.p_attention": 0.5},
            marks=SLOW,
        ),
        pytest.param(
            "dagman",
            {"distill.kind": "regression", "teacher.noise_std": 0.05, "distill.standardise": True},
            marks=SLOW,
        ),
        pytest.param("dagman", {"train.sharding": "fsdp", "train.accumulate": 2}, marks=SLOW),
        pytest.param("miram", {}, marks=SLOW),
        pytest.param(
            "miram",
            {"train.sharding": "fsdp", "train.accumulate": 2, "mae.attention": "performer"},
            marks=SLOW,
        ),
    ],
    ids=["centre", "sinkhorn", "regression", "sharded", "miram", "miram-sharded"],
)
def test_two_processes_equal_one_with_twice_the_batch(method, more, settings_of, tmp_path):
    # Adam's first steps are lr · sign(gradient), and the sign of a gradient that is itself rounding noise
    # means nothing: the lr is low, so that this moves no weight by 1e-5, and gradients are compared as well.
    settings = settings_of(method) | more | {"train.steps": 5, "train.checkpoint_every": 5, "train.lr": 2e-6}
    port = free_port()
    halves = settings | {"train.batch": 1}
    pair = [Child(train, halves, tmp_path / "two", env=rank_of_two(rank, port)) for rank in range(2)]
    one = Child(train, settings | {"train.batch": 2}, tmp_path / "one")
    for process in (*pair, one):
        assert process.wait(180) == 0, process.said[-3000:]
    a, b = (pd.read_csv(tmp_path / name / "metrics.csv") for name in ("one", "two"))
    distilled = method == "dagman"
    own = (
        ["loss_amip", "loss_ampd", "loss_itd", "loss_gitd", "momentum"]
        if distilled
        else ["loss_scale_1", "loss_scale_2"]
    )
    for column in ("loss", "lr", "attention_informativeness", *own):
        assert (a[column] - b[column]).abs().max() < 1e-5, column
    assert a.guided.any() == b.guided.any() == distilled
    (mine, ours), (theirs, yours) = (
        checkpoint.load(checkpoint.folder(tmp_path / name, 5)) for name in ("one", "two")
    )
    wanted = (
        {"teacher.encoder.semantic.cls", "centres.image.value"} if distilled else {"decoders.2.mask_token"}
    )
    assert wanted <= mine.keys()
    for name, value in mine.items():
        if value.is_floating_point():
            assert (value - theirs[name]).abs().max() < 1e-5, name
    moments = [state["optimiser"]["state"] for state in (ours, yours)]
    assert len(moments[0]) > 40 and moments[0].keys() == moments[1].keys()
    for key, moment in moments[0].items():
        apart = (moment["exp_avg"] - moments[1][key]["exp_avg"]).abs().max()
        assert apart < 1e-6 + 1e-4 * moment["exp_avg"].abs().max(), key


def resume(settings, out, newest_hidden):
    if newest_hidden:  # as a listing of a shared disk may
        listed = checkpoint.steps
        checkpoint.steps = lambda run: listed(run)[:-1]
    sl.pretrain(sl.load_config("tiny", settings), out, resume=True, progress=False)


def test_all_processes_resume_from_the_checkpoint_that_the_first_one_chose(settings, tmp_path):
    settings = settings | {
        "train.batch": 1,
        "train.steps": 6,
        "train.checkpoint_every": 2,
        "train.keep_last": 3,
    }
    run, ended = tmp_path / "run", []
    for hidden in (False, True):
        port = free_port()
        pair = [Child(resume, settings, run, hidden and r == 1, env=rank_of_two(r, port)) for r in range(2)]
        assert [child.wait(60) for child in pair] == [0, 0], pair[1].said[-2000:]
        ended.append(checkpoint.load(checkpoint.folder(run, 6))[0])
        shutil.rmtree(checkpoint.folder(run, 6))
    assert all((value - ended[1][name]).abs().max() < 1e-6 for name, value in ended[0].items())


def test_a_scheduler_that_numbers_single_processes_makes_none_of_several(monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert ranks() == (0, 1)


@SLOW
def test_the_command_line_runs_under_torchrun_and_in_a_notebook_launcher(settings, tmp_path):
    """The launcher commands of docs/TRAINING.md, with two processes and with one."""
    words = [f"{key}={json.dumps(value)}" for key, value in (settings | {"train.steps": 2}).items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m"]
    command += ["smartlab", "pretrain", "tiny", *words, "--out", str(tmp_path / "two")]
    done = subprocess.run(
        command, cwd=REPO, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, timeout=180
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    facts = json.loads((tmp_path / "two" / "environment.json").read_text())
    assert facts["processes"] == 2

    from accelerate import notebook_launcher

    config = sl.load_config("tiny", settings | {"train.steps": 2})
    notebook_launcher(sl.pretrain, (config, tmp_path / "one"), num_processes=1)
    assert sl.Run(tmp_path / "one").finished
