"""A step that is fast computes what the published step computes: losses, gradients' effect and teacher."""

from __future__ import annotations

import json
import math

import pytest
import torch

import smartlab as sl
from benchmarks import gpu
from benchmarks import step as bench
from benchmarks.step import Side

SMALL = {
    "encoder.preset": "custom",
    "encoder.embed_dim": 8,
    "encoder.depths": [2, 2, 2, 2],
    "encoder.num_heads": [1, 2, 2, 2],
    "data.view": 32,
    "data.region": 48,
    "distill.hidden": 32,
    "distill.bottleneck": 16,
    "distill.prototypes": 64,
    "train.batch": 2,
    "train.precision": "fp32",
}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["smit", "dagman"])
def test_losses_equal_the_published_step_in_every_step(method, checkpointing):
    """fp32, 1e-4; a later step's losses depend on the gradients, the optimiser and the teacher before it."""
    more = {"method.preset": method, "encoder.checkpointing": checkpointing}
    config = sl.load_config("smit", SMALL | more | {"semantic.heads": 2, "mask.warmup_epochs": 0})
    ours = Side(config, torch.device("cpu"))
    state = {name: value.clone() for name, value in ours.method.state_dict().items()}
    published = Side(config, torch.device("cpu"), "reference", state)
    for _ in range(3):
        ours(), published()
    for mine, theirs in zip(ours.losses, published.losses, strict=True):
        assert {"loss_amip", "loss_ampd", "loss_itd"} <= mine.keys() & theirs.keys()
        for name, value in theirs.items():
            assert abs(float(mine[name]) - float(value)) < 1e-4, name
    assert ours.losses[0]["loss_amip"] != ours.losses[-1]["loss_amip"]
    teacher = dict(ours.method.teacher.named_parameters())
    for name, value in published.method.teacher.named_parameters():
        torch.testing.assert_close(teacher[name], value, atol=1e-4, rtol=1e-4, msg=name)


def test_losses_in_bf16_are_those_of_the_published_step_within_the_stated_tolerance():
    config = sl.load_config("smit", SMALL | {"method.preset": "smit"})
    found = bench.bf16(config, torch.device("cpu"), 3)
    assert found["apart"].keys() >= {"loss_amip", "loss_ampd", "loss_itd"}
    assert 1e-5 < max(found["apart"].values()) < bench.BF16  # bf16 indeed, and close
    assert found["within"]


def test_a_loss_that_is_no_number_is_not_within_the_tolerance(monkeypatch):
    config = sl.load_config("smit", SMALL | {"method.preset": "smit"})
    run = Side.__call__

    def spoiled(side):
        run(side)
        if side.bf16:
            side.losses[-1]["loss_amip"] *= math.nan

    monkeypatch.setattr(Side, "__call__", spoiled)
    assert not bench.bf16(config, torch.device("cpu"), 2)["within"]


def test_the_gpu_script_compares_losses_and_says_where_it_cannot_run(monkeypatch):
    small = SMALL | {"data.view": 32, "data.region": 32, "semantic.heads": 2}
    monkeypatch.setattr(gpu, "SMALL", small)
    found = gpu.equal(torch.device("cpu"))
    assert set(found) == {"smit", "dagman"} and "loss_gitd" in found["dagman"]
    assert all(value < 1e-6 for losses in found.values() for value in losses.values())
    if not torch.cuda.is_available():
        monkeypatch.setattr("sys.argv", ["gpu"])
        with pytest.raises(SystemExit, match="no CUDA device"):
            gpu.main()


def test_the_floor_counts_what_a_step_multiplies():
    config = sl.load_config("smit", SMALL | {"method.preset": "smit"})
    found = bench.floor(config, torch.device("cpu"), size=1024)
    assert 0 < found["gflop"]["ours sparse"] < found["gflop"]["ours"] < found["gflop"]["reference"]
    assert found["seconds"]["ours"] == pytest.approx(
        found["gflop"]["ours"] / found["gflop_per_second"], abs=0.01
    )


def test_the_benchmark_gives_numbers_a_table_and_a_plot(monkeypatch, tmp_path):
    out = tmp_path / "step.json"
    words = ["step", "--preset", "tiny", "--view", "32", "--quick", "--only", "step,parts", "--out", str(out)]
    monkeypatch.setattr("sys.argv", words)
    bench.main()
    found = json.loads(out.read_text())
    assert found["machine"]["cpu"] and found["machine"]["torch"] == torch.__version__
    for side in ("reference", "ours"):
        assert found["step"][side]["seconds"]["median"] > 0
        parts = found["parts"][side]
        assert {
            "teacher",
            "student",
            "heads",
            "losses",
            "backward",
            "optimiser",
            "teacher update",
        } <= parts.keys()
    assert out.with_suffix(".png").stat().st_size > 5000
    assert "whole step, tiny" in out.with_suffix(".md").read_text()
