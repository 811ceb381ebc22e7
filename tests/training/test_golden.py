"""Golden records: the first steps of every method and of every fine-tuning, as they were when they were recorded.

Whoever changes what is computed sees it here. To record anew, on purpose, set SMARTLAB_GOLDEN=record.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pandas as pd
import pytest

import smartlab as sl
from smartlab.core.presets import METHODS
from smartlab.evaluation.finetune import segment
from smartlab.evaluation.finetune.classify import classify
from tests.evaluation.finetune.test_classify import FakeStore, manifest, truth_of
from tests.evaluation.finetune.test_trainer import make_model

RECORD = Path(__file__).with_suffix(".json")
TOLERANCE = 1e-4  # relative: processors and numbers of threads round differently
TUNED = {"steps": 4, "batch": 2, "checkpoint_every": 2, "validate_every": 2, "progress": False}


def compare(name, history, columns):
    """Every value of these columns, step by step; what is empty must have been empty."""
    found = {c: [None if v != v else float(f"{v:.7g}") for v in history[c]] for c in columns}
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
    if os.environ.get("SMARTLAB_GOLDEN") == "record":
        RECORD.write_text(
            json.dumps(record | {name: found}, indent=1, sort_keys=True) + "\n", encoding="utf-8"
        )
        return
    expected = pd.DataFrame(record[name], dtype=float)
    pd.testing.assert_frame_equal(
        pd.DataFrame(found, dtype=float), expected, rtol=TOLERANCE, atol=1e-8, check_like=True
    )


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_first_steps_of_a_method(method, settings_of, tmp_path):
    more = {"train.steps": 4, "encoder.drop_path": 0.1}
    config = sl.load_config("tiny", settings_of(method) | more)
    history = sl.pretrain(config, tmp_path, progress=False).history
    losses = [c for c in history if c.startswith("loss") and history[c].notna().any()]
    compare(method, history, [*losses, "lr", "weight_decay", "grad_norm", "feature_std"])


def test_the_first_steps_of_a_classification(tmp_path):
    more = TUNED | {"size": 32, "folds": 2, "modes": ["full", "frozen"], "bootstraps": 100, "clip": 0.5}
    classify(make_model().encoder, FakeStore(truth_of(0.25)), manifest(), tmp_path, label="kind", **more)
    for history in sorted(tmp_path.rglob("history.csv")):
        compare(f"classify {history.parent.name}", pd.read_csv(history), ["lr", "loss", "score"])


def test_the_first_steps_of_a_segmentation(settings, tmp_path, monkeypatch):
    """Of the first fold; nothing is predicted."""
    monkeypatch.setattr(segment, "_measure", lambda *_: (_ for _ in ()).throw(InterruptedError))
    monkeypatch.setattr(segment, "hold_out", lambda patients, y, train, *_: (train[1:], train[:1]))
    store, more = sl.open_store(settings["data.store"]), {"labels": ["liver", "lung_left"], "folds": 2}
    where, more = (store, settings["data.manifest"], tmp_path), TUNED | {"batch": 1} | more
    with pytest.raises(InterruptedError):
        segment.segment(make_model().encoder, *where, split="cross", **more)
    history = pd.read_csv(tmp_path / "full-100pct-fold0" / "history.csv")
    compare("segment", history, ["lr", "loss", "score"])
