"""The page of evidence and the results in other pages say what the committed result files say."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re

import pandas as pd
import pytest
import torch

import smartlab as sl
from tests.conftest import REPO


@pytest.fixture
def maker():
    spec = importlib.util.spec_from_file_location("make_evidence", REPO / "docs" / "make_evidence.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_number_of_the_page_is_that_of_the_result_files(maker):
    assert maker.PAGE.read_text(encoding="utf-8") == maker.page(), "run: python docs/make_evidence.py"


def test_every_result_in_other_pages_is_that_of_the_result_files(maker):
    assert set(maker.PLACES) == set(maker.blocks()) and maker.README in maker.PLACES.values()
    for page in maker.PLACES.values():
        assert page.read_text(encoding="utf-8") == maker.filled(page), "run: python docs/make_evidence.py"


def test_a_verdict_is_what_its_interval_says(maker):
    for low, high, said in ((0.1, 0.3, "Supported"), (-0.3, -0.1, "Not supported"), (-0.1, 0.3, "Undecided")):
        assert maker.verdict({"low": low, "high": high}).startswith(said)
        turned = {0.1: "Not supported", -0.3: "Supported", -0.1: "Undecided"}[low]
        assert maker.verdict({"low": low, "high": high}, -1).startswith(turned)


def test_what_is_said_of_the_shipped_encoder_was_measured_on_it():
    from benchmarks.shipped import tensors
    from smartlab.core.places import WEIGHTS

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


def test_a_map_that_points_at_lesions_hides_them_and_one_that_looks_away_shows_them():
    from benchmarks.importance import RATIOS, measured, tiles

    lesion = torch.zeros(3, 64)
    lesion[:, :4] = 1.0  # 4 of 64 units
    shares = {"lesion": lesion, "organ": torch.zeros(3, 64)}
    towards = torch.softmax(lesion * 3, -1)
    away = torch.softmax(-lesion * 3, -1)
    found = measured(towards, towards, shares, 0.7, seed=0)
    assert found["lift lesion"] > 5 and all(found[f"hidden lesion at {r}"] == 1 for r in RATIOS)
    assert found["hidden by the clean map too"] == 1
    assert "lift organ" not in found  # nothing of it in these views
    looking_away = measured(away, towards, shares, 0.7, seed=0)
    assert looking_away["lift lesion"] < 0.2 and looking_away["hidden lesion at 0.9"] == 0
    assert looking_away["hidden by the clean map too"] < 1
    scan = torch.arange(8 * 4 * 5).view(8, 4, 5)
    views = tiles(scan, 4)
    assert views.shape == (2, 4, 4, 4)
    assert torch.equal(views[1], scan[4:, :, :4])


def test_later_seeds_are_held_against_the_interval_of_the_first_three():
    from benchmarks.components import repeat

    arm = (True, 0.0, "random")
    cell = pd.DataFrame({"seed": [0, 1, 2, 3, 4], "value": [0.5, 0.6, 0.7, 0.61, 0.63]})
    assert repeat(cell, arm)["within"]
    assert not repeat(cell.assign(value=[0.5, 0.51, 0.52, 0.9, 0.9]), arm)["within"]
    assert repeat(cell[cell.seed < 3], arm) is None


def test_a_repeat_is_held_beside_the_committed_table():
    from benchmarks.components import FACTORS, beside

    arm = dict(zip(FACTORS, (True, 0.0, "random"), strict=True))
    known = {
        "each": [{**arm, "seed": seed, "value": 0.5 + 0.1 * seed} for seed in range(3)],
        "arms": [{**arm, "value": 0.6, "low": 0.45, "high": 0.75, "n": 3}],
    }
    rows = pd.DataFrame({**arm, "seed": [0, 1, 7], "value": [0.5, 0.6, 0.61], "low": 0, "high": 1, "n": 9})
    found = beside({"purity": rows}, {"purity": known})
    assert (found["values"], found["the_same"]) == (2, 2)  # nothing is known of seed 7
    assert (found["means"], found["inside"], found["outside"]) == (1, 1, [])
    far = beside({"purity": rows.assign(value=[0.5, 0.9, 0.95])}, {"purity": known})
    assert (far["the_same"], far["inside"]) == (1, 0) and far["outside"][0]["metric"] == "purity"


DATASETS = REPO / "docs" / "DATASETS.md"
COUNTED = {  # what its table says of them
    ("ct-open",): "10,363 series",
    ("lidc-nodules",): "1,180 (and 211 left out, with the reason)",
    ("cbis-ddsm",): "3,485 (and 83 left out: their patients are in both official parts)",
    ("nsclc-radiogenomics", "nsclc-radiomics", "nsclc-interobserver"): "211, 421, 21",
    ("phantom-ct", "phantom-mammo"): "128 and 240 patients",
}


@pytest.mark.parametrize("names", COUNTED, ids=", ".join)
def test_the_counts_of_the_datasets_are_those_of_the_manifests(names):
    rows = [line for line in DATASETS.read_text(encoding="utf-8").splitlines() if line.startswith("| `")]
    row = next(line for line in rows if all(f"`{name}`" in line for name in names))
    said = row.strip("| ").split(" | ")[-1]
    assert said == COUNTED[names]
    manifests = [sl.load_manifest(name) for name in names]
    counts = [
        [len({case.patient for case in m.cases})] if said.endswith("patients") else [len(m.cases)]
        for m in manifests
    ]
    for found, manifest in zip(counts, manifests, strict=True):
        if "left out" in said:
            found.append(len(manifest.all_cases) - len(manifest.cases))
    numbers = [int(word.replace(",", "")) for word in re.findall(r"\d{1,3}(?:,\d{3})+|\d+", said)]
    assert numbers == [number for found in counts for number in found]


def test_the_weights_that_come_along_are_as_small_as_is_said():
    from smartlab.core.places import WEIGHTS

    assert "student and teacher, 2 MB each" in DATASETS.read_text(encoding="utf-8")
    assert all(
        1.5e6 < (WEIGHTS / f"tiny-{role}.safetensors").stat().st_size < 2.5e6
        for role in ("student", "teacher")
    )


def test_arms_with_more_seeds_and_arms_that_lack_a_metric_find_their_place(maker):
    """Five seeds with semantic attention, three without; attention is measured only where there is some."""
    from benchmarks.components import measured

    rows = []
    for semantic, masks, noise, seed in itertools.product(
        (False, True), ("attention_high", "random"), (0.0, 0.3), range(5)
    ):
        if not semantic and (masks != "random" or seed > 2):
            continue
        own = {"semantic": semantic, "dropout": noise, "strategy": masks, "seed": seed}
        value = 0.5 + 0.2 * semantic - 0.1 * (masks == "attention_high") + 0.01 * ((seed * 7) % 5)
        told = {"value": value, "low": 0.0, "high": 1.0, "n": 9}
        rows.append({**own, "step": "clusters", "metric": "features/knn_purity", **told})
        if semantic:
            rows.append({**own, "step": "attention", "metric": "jensen_shannon", **told})
    table, names = (
        pd.DataFrame(rows),
        {"clusters features/knn_purity": "clusters", "attention jensen_shannon": "attention"},
    )
    found = {"metrics": {n: measured(table, step, n.split(" ")[1]) for n, step in names.items()}}
    purity = "clusters features/knn_purity"
    assert maker.effect(found, purity, "semantic")["value"] == pytest.approx(0.2)
    assert maker.effect(found, purity, "semantic")["n"] == 3
    assert maker.effect(found, purity, "strategy")["n"] == 5
    assert maker.numbers(found) == "5 seeds an arm (3 where there is no semantic attention)"
    assert "3 seeds alone, -0.100 over the 2 added" in maker.by_seeds(found, purity, "strategy")
    assert "in 8 of 8 cells" in maker.repeated(found)
    lines = maker.arms(found)
    assert lines[2].count("–") == 0 and lines[3].count("–") == 2


def test_what_of_a_map_is_the_same_in_every_view():
    from benchmarks.importance import explained_by_place

    generator = torch.Generator().manual_seed(0)
    same = torch.rand(1, 64, generator=generator).expand(50, 64)
    other = torch.rand(50, 64, generator=generator)
    assert explained_by_place(same) == pytest.approx(1.0, abs=1e-5)
    assert explained_by_place(other) < 0.05
