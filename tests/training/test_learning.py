"""Every method learns at the size of the `tiny` preset, on the phantom, as a user would first try it."""

from __future__ import annotations

import math

import pytest

import smartlab as sl


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "steps"),
    [("simmim", 100), ("smit", 100), ("smart", 100), ("dagman", 300), ("mae", 300), ("miram", 300)],
)
def test_reconstruction_falls_and_nothing_collapses_in_300_steps(
    method, steps, tmp_path, monkeypatch, tmp_path_factory
):
    """Three settings of the same method must have got there after a third of it."""
    monkeypatch.setenv(
        "SMARTLAB_CACHE", str(tmp_path_factory.getbasetemp() / "learning")
    )  # one phantom for all
    flat = method in ("mae", "miram")
    config = sl.load_config(
        "miram-tiny" if flat else "tiny",
        {"method.preset": method, "data.phantom_cases": 12, "data.workers": 0},
    )
    assert config.train.steps == 300
    config.train.steps = steps
    history = sl.pretrain(config, tmp_path / "r", progress=False).history
    losses = ["loss_amip"] if not flat else [f"loss_scale_{scale}" for scale in config.mae.scales]
    for loss in losses:
        first, last = history[loss].iloc[0], history[loss].tail(3).mean()
        assert last < 0.6 * first, f"{loss} {first:.3f} -> {last:.3f}"
    if flat:
        late = history.tail(5)
        assert late.feature_std.mean() > 0.01 and late.effective_rank.mean() > 1.2
    if method in ("simmim", "mae", "miram"):
        return
    late = history.tail(5)
    entropy = late.teacher_entropy / math.log(
        config.distill.prototypes if config.distill.kind == "prototype" else 48
    )
    assert entropy.between(0.05, 0.999).all(), entropy.tolist()  # neither one answer nor no answer
    assert late.feature_std.mean() > 0.01 and late.effective_rank.mean() > 1.2
