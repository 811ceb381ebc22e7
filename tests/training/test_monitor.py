"""What a run says about itself while it trains."""

from __future__ import annotations

import json

import smartlab as sl
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
