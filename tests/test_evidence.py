"""The page of evidence and the results in the README say what the committed result files say."""

from __future__ import annotations

import importlib.util
import itertools
import json

import pandas as pd
import pytest

from tests.conftest import REPO


@pytest.fixture
def maker():
    spec = importlib.util.spec_from_file_location("make_evidence", REPO / "docs" / "make_evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_number_of_the_page_is_that_of_the_result_files(maker):
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "run: python docs/make_evidence.py"


def test_every_result_in_the_readme_is_that_of_the_result_files(maker):
    assert maker.README.read_text(encoding="utf-8") == maker.readme(), "run: python docs/make_evidence.py"


def test_a_verdict_is_what_its_interval_says(maker):
    for low, high, said in ((0.1, 0.3, "Supported"), (-0.3, -0.1, "Not supported"), (-0.1, 0.3, "Undecided")):
        assert maker.verdict({"low": low, "high": high}).startswith(said)
        turned = {0.1: "Not supported", -0.3: "Supported", -0.1: "Undecided"}[low]
        assert maker.verdict({"low": low, "high": high}, -1).startswith(turned)


def test_what_is_said_of_the_shipped_encoder_was_measured_on_it():
    from benchmarks.shipped import tensors
    from smartlab.notebook import WEIGHTS

    here = tensors(WEIGHTS / "tiny-teacher.safetensors")
    results = REPO / "benchmarks" / "results"
    assert json.loads((results / "shipped.json").read_text())["tensors"]["teacher"] == here
    assert json.loads((results / "real_data.json").read_text())["encoder"]["tensors"] == here


@pytest.mark.parametrize("gain", [0.1, -0.1])
def test_an_effect_is_guided_minus_random_whatever_the_order_of_the_runs(gain, maker):
    """And noise minus none; rows come sorted by name, in which "attention_high" is before "random"."""
    from benchmarks.components import measured

    rows = []
    for masks, noise, seed in itertools.product(("attention_high", "random"), (0.3, 0.0), (0, 1, 2)):
        value = (
            0.5
            + gain * (masks == "attention_high")
            + 0.01 * noise
            + 0.001 * seed * (1 + (noise > 0) + (masks == "random"))
        )
        own = {"semantic": True, "dropout": noise, "strategy": masks, "seed": seed}
        rows.append(
            {**own, "step": "clusters", "metric": "m", "value": value, "low": 0.0, "high": 1.0, "n": 9}
        )
    found = {"metrics": {"clusters m": measured(pd.DataFrame(rows), "clusters", "m")}}
    everywhere = maker.effect(found, "clusters m", "strategy")
    assert everywhere["value"] == pytest.approx(gain, abs=0.01)
    assert maker.verdict(everywhere).startswith("Supported" if gain > 0 else "Not supported")
    assert maker.effect(found, "clusters m", "strategy", "dropout 0.0")["value"] == pytest.approx(
        gain, abs=0.01
    )
    assert maker.effect(found, "clusters m", "dropout", "strategy attention_high")["value"] > 0
    assert found["metrics"]["clusters m"]["both_minus_neither"]["value"] == pytest.approx(gain, abs=0.01)
