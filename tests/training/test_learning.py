"""Every method learns at the size of the `tiny` presets, on a small phantom cohort."""

from __future__ import annotations

import math

import pytest

import smartlab as sl
from tests.shared import once, phantoms
from tests.training.conftest import places

VIEWS = {  # of half the presets' side, as the images of the shared cohorts are coarser
    "ct": {"data.spacing": 4.0, "data.region": 48, "data.view": 32},
    "mammo": {"data.spacing": 1.0, "data.view": 64, "mae.input": 32},
}


@pytest.fixture(scope="session")
def sixteen(tmp_path_factory):
    """As many patients as the preset draws: a handful is too few for the distillation not to collapse."""
    return places(once(tmp_path_factory, "ct-16", phantoms("ct", n=16, shape=(80, 80, 80), spacing=4.0)))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "steps"),
    [("simmim", 60), ("smit", 60), ("smart", 60), ("dagman", 120), ("mae", 120), ("miram", 120)],
)
def test_reconstruction_falls_and_nothing_collapses(method, steps, sixteen, flat_cohort, tmp_path):
    """All in a small part of what a preset trains for."""
    flat = method in ("mae", "miram")
    manifest, images, store = flat_cohort if flat else sixteen
    where = {"data.manifest": str(manifest), "data.root": str(images), "data.store": str(store)}
    views = VIEWS["mammo" if flat else "ct"]
    more = {"method.preset": method, "train.steps": steps, "data.workers": 0}
    config = sl.load_config("miram-tiny" if flat else "tiny", where | views | more)
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


@pytest.mark.slow
def test_masks_of_whole_objects_teach_what_goes_with_what():
    """The study of `benchmarks.studies.planted` in a few minutes; chance is 0.25, with 256 views 0.20 to 0.31."""
    from benchmarks.studies import planted

    method, training = planted.train("oracle", 0, 600)
    found = planted.judge(method, 0)
    assert training["hidden_object"] > 0.75  # one of two whole, of the other some
    assert found["other seen"] > 0.4 and found["other hidden"] < 0.35, found
