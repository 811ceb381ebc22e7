"""Fine-tuning in several processes, or with accumulated batches, is fine-tuning with a larger batch."""

from __future__ import annotations

import os

import pandas as pd
import torch

import smartlab as sl
from smartlab.evaluation.finetune.classify import classify
from smartlab.models.encoder import Encoder
from tests.evaluation.finetune.test_classify import FakeStore, manifest, truth_of
from tests.evaluation.finetune.test_trainer import TINY
from tests.processes import Child
from tests.training.test_ranks import free_port, rank_of_two

QUICK = {"steps": 4, "size": 32, "checkpoint_every": 2, "validate_every": 2, "bootstraps": 100, "lr": 1e-5}


def tune(out, more):
    torch.manual_seed(0)
    encoder = Encoder(sl.load_config("tiny", TINY | {"encoder.drop_path": 0.0}))  # drawn by each for itself
    where = (encoder, FakeStore(truth_of()), manifest(), out)
    result = classify(*where, label="kind", folds=2, head_only=0.3, progress=False, **QUICK | more)
    result.table.to_csv(out / f"table-{os.environ.get('RANK', 0)}.csv", index=False)


def same(a, b):
    assert len(a) == len(b)
    pd.testing.assert_frame_equal(a, b, rtol=1e-4, atol=1e-5)


def test_two_processes_equal_one_with_twice_the_batch(tmp_path):
    port = free_port()
    given = tmp_path / "two", {"batch": 2}
    pair = [Child(tune, *given, env=rank_of_two(rank, port)) for rank in range(2)]
    one = Child(tune, tmp_path / "one", {"batch": 4})
    for process in (*pair, one):
        assert process.wait(300) == 0, process.said[-3000:]
    name = next(p.relative_to(tmp_path / "one") for p in sorted((tmp_path / "one").rglob("history.csv")))
    same(pd.read_csv(tmp_path / "one" / name), pd.read_csv(tmp_path / "two" / name))
    tables = [
        pd.read_csv(tmp_path / place) for place in ("one/table-0.csv", "two/table-0.csv", "two/table-1.csv")
    ]
    same(tables[0], tables[1])
    pd.testing.assert_frame_equal(tables[1], tables[2], check_exact=True)


def test_accumulated_batches_are_one_larger_batch(tmp_path):
    plain = {"flip": False, "intensity": 0.0}  # which are drawn anew for each batch
    tune(tmp_path / "one", plain | {"batch": 4})
    tune(tmp_path / "two", plain | {"batch": 2, "accumulate": 2})
    for one in (tmp_path / "one").rglob("history.csv"):
        same(pd.read_csv(one), pd.read_csv(tmp_path / "two" / one.relative_to(tmp_path / "one")))
