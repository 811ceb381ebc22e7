"""What a run says about itself while it trains."""

from __future__ import annotations

import json
import os

import pytest

import smartlab as sl
from smartlab.core.errors import UseError
from smartlab.training.monitor import Monitor


def test_collapse_is_said_once_it_lasts_and_not_for_one_noisy_batch(tmp_path):
    monitor = Monitor(tmp_path, sl.load_config("tiny"), enabled=True, progress=False, start=0)

    def log(step, spread):
        monitor.row({"step": step, "loss": 1.0, "feature_std": spread, "guided": 0.0})

    def said():
        return [e["about"] for e in map(json.loads, (tmp_path / "events.jsonl").open()) if e.get("about")]

    for number, spread in enumerate([0.05, 0.004, 0.03, 0.02, 0.009, 0.04], 6):
        log(10 * number, spread)
    assert not (tmp_path / "events.jsonl").exists() or "collapse" not in said()
    for number in range(12, 18):
        log(10 * number, 0.004)
    assert said().count("collapse") == 1
    monitor.close()


def test_a_tracker_is_told_every_number_and_one_that_is_not_installed_is_refused_at_once(
    tmp_path, monkeypatch
):
    import accelerate.tracking as known

    told = {}

    class Wandb:
        def __init__(self, run_name, **given):
            told.update(given)

        def start(self):
            told["started"] = True

        def store_init_configuration(self, values):
            told["ratio"] = values["mask.ratio"]

        def log(self, values, step):
            told[step] = values

        def finish(self):
            told["finished"] = True

    config = sl.load_config("tiny", {"train.track": "wandb", "data.manifest": "nowhere.json"})
    monkeypatch.setattr(known, "get_available_trackers", lambda: ["tensorboard"])
    with pytest.raises(
        UseError, match=r"train\.track=wandb is not installed here .*Install it .pip install wandb"
    ):
        sl.pretrain(config, tmp_path / "a", progress=False)
    assert not (tmp_path / "a").exists()
    monkeypatch.setitem(known.LOGGER_TYPE_TO_CLASS, "wandb", Wandb)
    monitor = Monitor(tmp_path, config, enabled=True, progress=False, start=0)
    monitor.row({"step": 4, "epoch": 0.5, "loss": 1.5, "momentum": float("nan"), "guided": 0.0})
    monitor.close()
    assert told.pop("dir") == str(tmp_path) and told.pop("mode") == "offline" and told.pop("ratio") == 0.7
    assert told[4] == {"loss": 1.5, "guided": 0.0} and told["started"] and told["finished"]


def test_every_run_of_a_process_has_an_mlflow_folder_of_its_own(tmp_path, monkeypatch):
    """But where the user says where they go, all go there."""
    import accelerate.tracking as known

    from smartlab.training import track

    class Mlflow:
        def __init__(self, **given):
            pass

        def start(self):
            seen.append(os.environ["MLFLOW_TRACKING_URI"])

        def store_init_configuration(self, values):
            pass

    seen = []
    monkeypatch.setitem(known.LOGGER_TYPE_TO_CLASS, "mlflow", Mlflow)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    config = sl.load_config("tiny", {"train.track": "mlflow"})
    for name in "ab":
        track.open_tracker(config, tmp_path / name, 0)
    assert seen == [(tmp_path / name / "mlruns").as_uri() for name in "ab"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://lab")
    track.open_tracker(config, tmp_path / "c", 0)
    assert seen[-1] == "http://lab"
