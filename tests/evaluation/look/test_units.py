"""A readout finds what features hold, never sees the patients that it is judged on, and counts as stated."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib import pyplot as plt

from smartlab.core.errors import DataError, UseError
from smartlab.evaluation.look.units import _measures, _pairs, units
from tests.evaluation.attention_store import made_store, small_encoder
from tests.evaluation.look.test_unsupervised import scan

QUIET = {"draws": 60, "progress": False}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    rng = np.random.default_rng(0)
    return made_store(tmp_path_factory.mktemp("units"), {f"p{i}": scan(rng) for i in range(6)})


def test_organs_that_differ_in_density_are_read_from_it_and_shuffled_ones_are_not(store, tmp_path):
    found = units(small_encoder(), store, levels=["stage 1", "tokens"], folds=3, **QUIET)
    for level in ("stage 1", "tokens"):
        assert found.metrics[f"{level}/balanced accuracy"].value > 0.9
        assert found.metrics[f"{level}/mIoU: intensity"].value > 0.9
        gain = found.metrics[f"{level}/balanced accuracy minus position"]
        ours, theirs = (found.metrics[f"{level}/balanced accuracy{x}"].value for x in ("", ": position"))
        assert gain.value == pytest.approx(ours - theirs)
    assert found.facts["classes"] == ["background", "liver", "spleen"] and found.facts["patients"] == 6
    assert set(found.table.level) == {"stage 1", "tokens"} and found.table["units"].min() > 0
    plt.close(found.figure())
    rng = np.random.default_rng(1)
    shuffled = made_store(tmp_path, {f"p{i}": scan(rng, shuffled=True) for i in range(6)})
    chance = units(small_encoder(), shuffled, levels=["tokens"], folds=3, **QUIET)
    assert all(
        chance.metrics[f"tokens/balanced accuracy{x}"].value < 0.5 for x in ("", ": intensity", ": random")
    )


def test_few_labelled_patients_can_be_asked_for_and_none_is_on_both_sides(store):
    import pandas as pd

    about = pd.DataFrame({"patient": list("aabbcdef"), "split": [None] * 8})
    for learn, judge in _pairs(about, 2, 3, 0):
        who = about.patient.to_numpy()
        assert len(set(who[learn])) == 2 and not set(who[learn]) & set(who[judge])
    about["split"] = ["train"] * 5 + ["test"] * 3
    ((learn, judge),) = _pairs(about, None, 3, 0)
    assert learn.tolist() == [0, 1, 2, 3, 4] and judge.tolist() == [5, 6, 7]
    one = units(small_encoder(), store, levels=["tokens"], labelled=1, folds=3, **QUIET)
    assert one.facts["labelled"] == 1


def test_measures_by_hand():
    """Two patients, background and two organs; one organ is called background twice."""
    confused = np.array([[[5, 0, 0], [1, 3, 0], [0, 0, 2]], [[5, 0, 0], [1, 3, 0], [0, 0, 2]]], float)
    (accuracy, iou), drawn = _measures(np.array([[1, 1], [2, 0]]), confused)
    assert accuracy == pytest.approx((1 + 0.75 + 1) / 3) and iou == pytest.approx((6 / 8 + 1) / 2)
    assert drawn.shape == (2, 2) and drawn[0] == pytest.approx([accuracy, accuracy])


def test_bad_requests_say_what_is_wrong(store, tmp_path):
    with pytest.raises(UseError, match="no level"):
        units(small_encoder(), store, levels=["stage 9"], **QUIET)
    with pytest.raises(UseError, match="labelled=9"):
        units(small_encoder(), store, labelled=9, **QUIET)
    with pytest.raises(DataError, match="one patient"):
        units(small_encoder(), store, images=[0], **QUIET)
