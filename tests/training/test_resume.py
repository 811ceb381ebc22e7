"""Nothing is lost: a run that was stopped, however rudely, ends as if it never had been."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

import smartlab as sl
from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.manifest import Source
from smartlab.models.reach import Reach
from smartlab.training import checkpoint, pretrain
from smartlab.training.monitor import COLUMNS, columns, rewind
from tests.processes import Child

VOLATILE = ["views_per_second", "data_wait", "peak_memory_mb"]


def weights(run, step):
    folder = checkpoint.folder(run, step)
    method, _ = checkpoint.load(folder)
    return method


def assert_same_run(a, b, step):
    left, right = (pd.read_csv(run / "metrics.csv").drop(columns=VOLATILE) for run in (a, b))
    pd.testing.assert_frame_equal(left, right, check_exact=True)
    mine, theirs = weights(a, step), weights(b, step)
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[k], theirs[k]) for k in mine)


def train(settings, out, slow=0.0):
    """What a training process does; `slow` seconds are added to each step."""
    from smartlab.training.engine import Engine

    step = Engine.one_step
    Engine.one_step = lambda self: (time.sleep(slow), step(self))[1]
    sl.pretrain(sl.load_config("tiny", settings), out, resume=True, progress=False)


def wait_for_step(run, step, process, seconds=90):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path = run / "metrics.csv"
        if path.exists() and path.read_text(encoding="utf-8").count("\n") > step:
            return
        assert process.running, process.said
        time.sleep(0.02)
    raise AssertionError("the run did not get that far")


@pytest.mark.parametrize(
    ("method", "more"),
    [
        pytest.param("simmim", {}, marks=pytest.mark.slow),
        pytest.param("smit", {"distill.kind": "prototype"}, marks=pytest.mark.slow),
        ("dagman", {}),
        pytest.param(
            "dagman",
            {"train.accumulate": 2, "data.workers": 2, "teacher.noise_std": 0.05, "encoder.drop_path": 0.2},
            marks=pytest.mark.slow,
        ),
        ("miram", {}),
        pytest.param(
            "miram",
            {"train.accumulate": 2, "data.workers": 2, "mae.attention": ["performer", "linformer"]},
            marks=pytest.mark.slow,
        ),
    ],
    ids=["simmim", "smit", "dagman", "dagman-accumulating", "miram", "miram-accumulating"],
)
def test_killed_and_resumed_equals_never_stopped(method, more, settings_of, tmp_path):
    settings = settings_of(method) | more
    whole = Child(train, settings, tmp_path / "whole")
    killed = Child(train, settings, tmp_path / "killed", 0.15)
    wait_for_step(tmp_path / "killed", random.Random(method + str(more)).randint(4, 7), killed)
    killed.kill()
    assert checkpoint.steps(tmp_path / "killed"), "there is something to resume from"
    assert whole.wait() == 0, whole.said
    again = Child(train, settings, tmp_path / "killed")
    assert again.wait() == 0, again.said
    assert_same_run(tmp_path / "whole", tmp_path / "killed", 8)
    assert "resume" in [e["event"] for e in sl.Run(tmp_path / "killed").events]
    assert sl.Run(tmp_path / "whole").history.guided.any() == (method == "dagman")


def test_sigterm_saves_and_exits_well_and_sigusr1_saves_and_goes_on(settings, tmp_path):
    settings = settings | {"train.checkpoint_every": 1000, "train.steps": 40}
    process = Child(train, settings, tmp_path / "run", 0.1)
    wait_for_step(tmp_path / "run", 3, process)
    process.send(signal.SIGUSR1)
    wait_for_step(tmp_path / "run", 8, process)
    assert checkpoint.steps(tmp_path / "run"), "SIGUSR1 saved"
    process.send(signal.SIGTERM)
    assert process.wait(60) == 0, process.said
    run = sl.Run(tmp_path / "run")
    assert 8 <= run.step < 40 and [e["event"] for e in run.events][-2:] == ["saved", "stopped"]
    assert run.history.step.iloc[-1] == run.step


VIT = {"encoder.embed_dim": 24, "encoder.blocks": 2, "encoder.heads": 2, "encoder.registers": 1}


@pytest.mark.parametrize(
    ("preset", "more"),
    [
        ("tiny", {}),
        ("primus-tiny", VIT | {"mae.input": 32, "mae.width": 12, "mae.heads": 2}),
        pytest.param("primus-tiny", VIT | {"method.preset": "dagman"}, marks=pytest.mark.slow),
    ],
    ids=["swin", "vit", "vit-dagman"],
)
def test_stopping_in_the_middle_of_an_epoch_changes_nothing(preset, more, settings, tmp_path, monkeypatch):
    """Same process, same thread count: stop after 4 of 8 steps, resume, compare."""
    config = sl.load_config(preset, settings | more)
    sl.pretrain(config, tmp_path / "whole", progress=False)
    from smartlab.training.engine import Engine

    original, count = Engine.one_step, iter(range(100))

    def stop_at_four(self):
        if next(count) == 3:
            self.requests.asked = "stop"
        return original(self)

    monkeypatch.setattr(Engine, "one_step", stop_at_four)
    run = sl.pretrain(config, tmp_path / "stopped", progress=False)
    assert run.step == 4 and not run.finished
    monkeypatch.setattr(Engine, "one_step", original)
    assert sl.pretrain(config, tmp_path / "stopped", resume=True, progress=False).finished
    assert_same_run(tmp_path / "whole", tmp_path / "stopped", 8)


def test_training_tells_how_far_heads_look_by_mean_and_variance(settings, tmp_path, monkeypatch):
    told = {f"stage {n}": Reach(n * torch.tensor([1.0, 2.0, 6.0]), torch.ones(3)) for n in (1, 2, 3, 4)}
    monkeypatch.setattr(pretrain, "reach", lambda *_: (told, None))
    history = sl.pretrain(
        sl.load_config("tiny", settings | {"train.steps": 1}), tmp_path, progress=False
    ).history
    for n in (1, 2, 3, 4):
        assert history[f"reach_entropy_{n}"].item() == pytest.approx(3 * n)
        assert history[f"reach_variance_{n}"].item() == pytest.approx((4 + 1 + 9) / 3 * n**2)


def test_a_run_folder_is_complete(settings, tmp_path):
    run = sl.pretrain(sl.load_config("tiny", settings | {"train.steps": 2}), tmp_path / "r", progress=False)
    for name in (
        "config.yaml",
        "environment.json",
        "metrics.csv",
        "events.jsonl",
        "figures/step-000002.png",
        "tensorboard",
    ):
        assert (tmp_path / "r" / name).exists(), name
    folder = checkpoint.folder(tmp_path / "r", 2)
    assert sorted(p.name for p in folder.iterdir()) == [
        "state.pt",
        "student.safetensors",
        "teacher.safetensors",
    ]
    assert list(run.history.columns) == columns(run.config) and run.finished
    header = checkpoint.header_of(folder / "teacher.safetensors")
    assert header["role"] == "teacher" and json.loads(header["config"])["seed"] == 0 and header["data"]
    assert yaml.safe_load((tmp_path / "r" / "config.yaml").read_text(encoding="utf-8"))["train"]["steps"] == 2
    # the saved teacher is usable alone, and is what the run was using
    encoder = run.encoder("teacher")
    saved = load_file(folder / "teacher.safetensors")
    assert all(torch.equal(v, saved[k]) for k, v in encoder.state_dict().items())
    assert run.encoder("student") is not encoder


def test_a_run_of_several_scales_tells_the_loss_of_each(settings_of, tmp_path):
    """Beside the columns that every run has; those that mean nothing here are empty."""
    config = sl.load_config("tiny", settings_of("miram") | {"train.steps": 4})
    run = sl.pretrain(config, tmp_path / "r", progress=False)
    history = run.history
    assert list(history.columns) == columns(config) and run.finished
    assert (
        history[["loss", "loss_scale_1", "loss_scale_2", "lr", "grad_norm", "feature_std"]]
        .notna()
        .all()
        .all()
    )
    assert history[["loss_amip", "momentum", "teacher_entropy", "guided"]].isna().all().all()
    assert history.views_per_second.gt(0).all() and (tmp_path / "r/figures/step-000004.png").exists()
    folder = checkpoint.folder(tmp_path / "r", 4)
    assert sorted(p.name for p in folder.iterdir()) == ["state.pt", "student.safetensors"]
    net = run.method()
    mine, theirs = net.student.encoder.state_dict(), run.encoder().state_dict()
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert not net.training and "decoders.2.pixels.weight" in net.state_dict()
    older = checkpoint.header_of(folder / "student.safetensors")
    settings = json.loads(older["config"])
    del settings["data"]["window"], settings["data"]["grey"]  # as a run from before these settings
    told = checkpoint.differences(older | {"config": json.dumps(settings)}, older)
    assert told == ["data.window: [-175.0, 250.0] → [0.0, 4095.0]"]


def test_a_folder_with_a_run_is_not_overwritten_and_changes_are_told(settings, tmp_path):
    config = sl.load_config("tiny", settings | {"train.steps": 3})
    sl.pretrain(config, tmp_path / "r", progress=False)
    with pytest.raises(UseError, match="resume"):
        sl.pretrain(config, tmp_path / "r", progress=False)
    changed = sl.load_config("tiny", settings | {"train.steps": 4, "mask.ratio": 0.5, "train.log_every": 2})
    with pytest.raises(UseError, match=r"mask\.ratio: 0\.7 → 0\.5.*train\.steps: 3 → 4|train\.steps: 3 → 4"):
        sl.pretrain(changed, tmp_path / "r", resume=True, progress=False)
    assert sl.pretrain(changed, tmp_path / "r", resume=True, allow_changes=True, progress=False).step == 4


def test_a_label_or_split_that_was_added_stops_no_run_and_changes_no_step(settings, cohort, tmp_path, capsys):
    """The run goes on with the images it began with, and says how many of them are held out by now."""
    man = sl.load_manifest(cohort[0]).model_copy(update={"source": Source(kind="local")})
    for case in man.all_cases:
        case.split = "test" if case.patient in man.patients[4:] else "train"
    plain = man.model_copy(update={"labels": {}}, deep=True)
    for case in plain.all_cases:
        case.labels, case.split = {}, None
    plain.save(tmp_path / "plain.json")
    own = {"data.manifest": str(tmp_path / "plain.json"), "data.store": str(tmp_path / "store")}
    config = sl.load_config("tiny", settings | own | {"train.steps": 6})
    sl.pretrain(config, tmp_path / "whole", progress=False)
    shutil.copytree(tmp_path / "whole", tmp_path / "halfway")
    shutil.rmtree(checkpoint.folder(tmp_path / "halfway", 6))
    man.save(tmp_path / "plain.json")
    run = sl.pretrain(config, tmp_path / "halfway", resume=True, progress=False)
    assert_same_run(tmp_path / "whole", tmp_path / "halfway", 6)
    event = next(e for e in run.events if e["event"] == "split")
    assert (event["images"], event["now_held_out"]) == (6, 2)
    assert "2 of them are held out by now" in capsys.readouterr().err


def test_a_run_from_before_labels_were_left_out_of_its_fingerprint_resumes(settings, tmp_path):
    config = sl.load_config("tiny", settings | {"train.steps": 3})
    run = sl.pretrain(config, tmp_path / "r", progress=False)
    path = checkpoint.folder(run.path, 3) / "state.pt"
    state = torch.load(path, weights_only=True)
    state["header"]["data"] = sl.open_store(settings["data.store"]).fingerprint
    del state["images"]
    torch.save(state, path)
    assert sl.pretrain(config, tmp_path / "r", resume=True, progress=False).finished


def test_a_damaged_checkpoint_is_named(settings, tmp_path):
    config = sl.load_config("tiny", settings | {"train.steps": 3})
    sl.pretrain(config, tmp_path / "r", progress=False)
    (checkpoint.folder(tmp_path / "r", 3) / "state.pt").write_bytes(b"cut short")
    with pytest.raises(DataError, match=r"step-000003.*cannot be read"):
        sl.pretrain(config, tmp_path / "r", resume=True, progress=False)


def test_half_a_checkpoint_is_never_taken_for_one(settings, tmp_path, monkeypatch):
    config = sl.load_config("tiny", settings | {"train.steps": 3})
    monkeypatch.setattr(
        os,
        "replace",
        lambda *a: (
            (_ for _ in ()).throw(KeyboardInterrupt()) if "checkpoints" in str(a[1]) else os.rename(*a)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        sl.pretrain(config, tmp_path / "r", progress=False)
    assert checkpoint.steps(tmp_path / "r") == []


def test_old_checkpoints_are_pruned_as_asked(tmp_path):
    for step in range(1, 8):
        checkpoint.folder(tmp_path, step).mkdir(parents=True)
    checkpoint.prune(tmp_path, keep_last=2, keep_every=3)
    assert checkpoint.steps(tmp_path) == [3, 6, 7]


def test_rewinding_keeps_whole_rows_up_to_the_checkpoint(tmp_path):
    path, blank = tmp_path / "metrics.csv", "," * (len(COLUMNS) - 1)
    path.write_text(
        ",".join(COLUMNS) + "\n" + "".join(f"{i}{blank}\n" for i in range(1, 6)) + "6,0.1", encoding="utf-8"
    )
    rewind(path, 4)
    assert pd.read_csv(path).step.tolist() == [1, 2, 3, 4]


def test_a_bad_batch_is_skipped_counted_and_named(settings, tmp_path, monkeypatch):
    from smartlab.training import views as training_views

    original, calls = training_views.window, iter(range(1000))
    monkeypatch.setattr(
        training_views, "window", lambda hu, *a: original(hu, *a) * (float("nan") if next(calls) == 1 else 1)
    )
    run = sl.pretrain(sl.load_config("tiny", settings | {"train.steps": 4}), tmp_path / "r", progress=False)
    skipped = [e for e in run.events if e["event"] == "skipped"]
    assert len(skipped) == 1 and skipped[0]["step"] == 2 and len(skipped[0]["images"]) == 2
    assert run.history.skipped.tolist() == [0, 1, 1, 1]
    assert all(torch.isfinite(v).all() for v in weights(run.path, 4).values())
    assert run.history.loss.notna().tolist() == [True, False, True, True]


def test_one_infinite_gradient_costs_one_step_and_no_weights(settings, tmp_path, monkeypatch):
    """The loss may be finite all the same: the step is not taken, and what was learned stays."""
    from smartlab.training.engine import Engine

    norm, calls = Engine.trained, iter(range(1000))

    def spoil(self):
        found = norm(self)
        if next(calls) == 1:
            found[0].grad.view(-1)[0] = float("inf")
        return found

    monkeypatch.setattr(Engine, "trained", spoil)
    run = sl.pretrain(sl.load_config("tiny", settings | {"train.steps": 4}), tmp_path / "r", progress=False)
    skipped = [e for e in run.events if e["event"] == "skipped"]
    assert [e["step"] for e in skipped] == [2] and skipped[0]["reason"] == "non-finite gradient"
    assert run.history.skipped.tolist() == [0, 1, 1, 1] and run.history.loss.notna().all()
    assert all(torch.isfinite(v).all() for v in weights(run.path, 4).values())


def test_two_runs_in_one_process_may_differ_in_precision(settings, tmp_path):
    for precision in ("fp32", "bf16"):
        more = {"train.steps": 1, "train.precision": precision}
        run = sl.pretrain(sl.load_config("tiny", settings | more), tmp_path / precision, progress=False)
        assert run.finished


def test_a_stop_is_not_forgotten_for_a_later_save():
    import os

    from smartlab.training.requests import Requests

    requests = Requests(torch.device("cpu"), 1)
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
        assert requests.agreed() == "stop" and requests.agreed() == ""
    finally:
        requests.close()


def test_a_run_that_cannot_begin_leaves_signals_as_they_were(settings, tmp_path, monkeypatch):
    from smartlab.training import pretrain

    def unreachable(*given):
        raise DataError("the tracker cannot be reached")

    monkeypatch.setattr(pretrain, "Monitor", unreachable)
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    with pytest.raises(DataError, match="tracker"):
        sl.pretrain(sl.load_config("tiny", settings), tmp_path / "r", progress=False)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before


def test_a_guard_that_never_opened_is_told(settings, tmp_path):
    """Masks that were meant to be guided and never were: the run says so at its end."""
    run = sl.pretrain(
        sl.load_config("tiny", settings | {"train.steps": 2, "mask.informativeness": 99}),
        tmp_path / "r",
        progress=False,
    )
    assert "never_guided" in [e.get("about") for e in run.events]


def test_too_many_bad_batches_stop_the_run_with_a_diagnosis(settings, tmp_path, monkeypatch):
    from smartlab.training import views as training_views

    original = training_views.window
    monkeypatch.setattr(training_views, "window", lambda hu, *a: original(hu, *a) * float("nan"))
    with pytest.raises(DataError, match="3 steps in a row had a non-finite loss"):
        sl.pretrain(
            sl.load_config("tiny", settings | {"train.max_bad_steps": 3}), tmp_path / "r", progress=False
        )
