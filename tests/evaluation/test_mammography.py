"""Pathology and margins on mammograms: the same tasks, folds and intervals as on CT, from squares around lesions."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from PIL import Image

import smartlab as sl
from smartlab.core.errors import UseError
from smartlab.data.cohort.manifest import Manifest
from smartlab.data.crops.flat import ImageDataset
from smartlab.evaluation.features.baselines import lesion_baselines
from smartlab.evaluation.features.encoders import random_encoder
from smartlab.evaluation.features.features import lesion_features, organ_features, scan_features
from smartlab.evaluation.finetune.layers import layer_groups

MARGINS = ["circumscribed", "ill_defined", "spiculated", "obscured", "microlobulated"]
QUIET = {"progress": False}


def drawn(rng: np.random.Generator, malignant: bool, rim: bool, radius: int) -> tuple[np.ndarray, np.ndarray]:
    """A breast with one mass: fine stripes where malignant, a dark rim where circumscribed."""
    y, x = np.mgrid[:96, :80].astype(float)
    image = 60.0 * ((x / 70) ** 2 + ((y - 48) / 44) ** 2 < 1) + rng.normal(0, 3, (96, 80)) + 10
    row, column = rng.integers(34, 62), rng.integers(20, 40)
    away = np.hypot(x - column, y - row)
    image += 60 * (away < radius) - (40 * ((away > radius) & (away < radius + 3)) if rim else 0)
    image += 45 * (away < radius) * np.sign(np.sin(1.6 * y)) if malignant else 0
    return image.clip(0, 255).astype(np.uint8), (255 * (away < radius)).astype(np.uint8)


def radius_of(number: int) -> int:
    return 7 + number % 5


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """40 patients with one lesion each, official split by patient, and their store."""
    os.environ["SMARTLAB_SALT"] = "tests-only-no-secret"
    root, rng, cases = tmp_path_factory.mktemp("mg"), np.random.default_rng(0), []
    for i in range(40):
        malignant, rim = i % 2 == 0, i % 3 == 0
        image, mask = drawn(rng, malignant, rim, radius_of(i))
        for name, array in (("image", image), ("mask", mask)):
            Image.fromarray(array).save(root / f"{i}-{name}.png")
        margins = ["circumscribed"] * rim + ["spiculated"] * malignant
        labels = {"pathology": "malignant" if malignant else "benign"}
        labels |= {"mass_margins": margins} if margins else {}
        cases.append(
            {
                "id": f"case-{i}",
                "patient": f"patient-{i}",
                "image": f"{i}-image.png",
                "masks": {"lesion": f"{i}-mask.png"},
                "labels": labels,
                "split": "train" if i < 26 else "test",
            }
        )
    about = {"title": "t", "modality": "MG", "licence": "-", "citation": "-", "homepage": "-"}
    labels = {
        "pathology": {"kind": "binary", "classes": ["benign", "malignant"]},
        "mass_margins": {"kind": "multilabel", "classes": MARGINS},
    }
    source = {"kind": "local", "parameters": {"pixel_mm": 1.0}}
    man = Manifest.model_validate(
        {"name": "drawn", **about, "source": source, "labels": labels, "cases": cases}
    )
    sl.build_store(man, root, root / "store", spacing=1.0, workers=0, grey="percentile", progress=False)
    return man, sl.open_store(root / "store")


@pytest.fixture(scope="module")
def encoder():
    """A small vision transformer that has learned nothing."""
    small = {"data.view": 32, "data.spacing": 1.0, "mae.input": 32, "mae.scales": [1], "encoder.patch": 4}
    config = sl.load_config("miram-tiny", {"method.preset": "mae", **small, "encoder.embed_dim": 48})
    return random_encoder(config)


def test_a_row_of_features_is_what_the_encoder_says_of_the_view(cohort, encoder):
    man, store = cohort
    table = lesion_features(encoder, store, man, pooling="cls+tokens+stages", cache=False, **QUIET)
    assert len(table) == 40 and table.x.shape[1] == encoder.channels * 2 + sum(encoder.stage_channels)
    data = ImageDataset(store, view=32, jitter=0)
    for index in (0, 17):
        item = data[index]
        said = encoder.features(torch.from_numpy(item["views"])[None])
        assert table.about.case[index] == item["case"]
        assert np.allclose(table.x[index, : encoder.channels], said["cls"][0], atol=1e-5)
        mean = said["tokens"][0].mean(0)
        assert np.allclose(table.x[index, encoder.channels : 2 * encoder.channels], mean, atol=1e-5)


def test_batches_and_the_middle_tokens_change_nothing(cohort, encoder):
    man, store = cohort
    one, many = (
        lesion_features(encoder, store, man, pooling="center", batch=b, cache=False, **QUIET).x
        for b in (1, 16)
    )
    assert np.allclose(one, many, atol=1e-5) and one.shape == (40, encoder.channels)


def test_the_margin_is_part_of_what_is_cached(cohort, encoder, tmp_path):
    man, store = cohort
    first = lesion_features(encoder, store, man, cache=tmp_path, **QUIET).x
    wider = random_encoder(encoder.config.model_copy(deep=True))
    wider.config.data.margin = 2.0
    assert not np.allclose(first, lesion_features(wider, store, man, cache=tmp_path, **QUIET).x)


@pytest.mark.parametrize("task", ["probe", "knn"])
def test_pathology_and_margins_on_the_official_split(cohort, encoder, task):
    man, store = cohort
    binary = sl.evaluate(encoder, task, man, store=store, label="pathology", draws=200, **QUIET)
    for name in ("auc", "average_precision", "accuracy"):
        found = binary.metrics[name]
        assert 0 <= found.low <= found.value <= found.high <= 1 and found.n == 14, "test patients only"
    assert binary.metrics["auc"].value > 0.9, "stripes are seen even by random weights"
    several = sl.evaluate(encoder, task, man, store=store, label="mass_margins", draws=200, **QUIET)
    for name in ("auc", "average_precision", "auc:spiculated", "auc:circumscribed", "accuracy"):
        assert 0 <= several.metrics[name].value <= 1, name
    assert "auc:obscured" not in several.metrics, "a class that no case has, has no score"
    assert {"random encoder/auc", "size/auc"} <= set(binary.metrics), sorted(binary.metrics)


@pytest.mark.parametrize("label", ["pathology", "mass_margins"])
def test_few_examples_are_enough_for_what_is_plain(cohort, encoder, label):
    man, store = cohort
    found = sl.evaluate(
        encoder, "fewshot", man, store=store, label=label, shots=(1, 4), draws=20, beside=False, **QUIET
    )
    assert found.metrics["auc@4"].value > 0.75 and found.facts["shots"] == [1, 4]
    assert "official" in found.facts["test"]


@pytest.mark.parametrize("label", ["pathology", "mass_margins"])
def test_fine_tuning_learns_and_is_measured_on_the_official_test_patients(cohort, encoder, label, tmp_path):
    man, store = cohort
    settings = {"steps": 40, "batch": 8, "lr": 2e-3, "validate_every": 40, "bootstraps": 100}
    found = sl.evaluate(
        encoder, "classify", man, store=store, label=label, out=tmp_path, intensity=0.0, **settings, **QUIET
    )
    assert found.metrics["auc"].value > 0.8 and found.facts["settings"]["size"] == 32
    assert found.facts["split"].startswith("official") and found.table.patient.nunique() <= 14
    if label == "mass_margins":
        assert {"auc:spiculated", "average_precision:circumscribed"} <= set(found.metrics)


def test_layers_of_a_vision_transformer_learn_at_falling_rates(encoder):
    net = torch.nn.ModuleDict({"encoder": encoder, "head": torch.nn.Linear(2, 2)}).requires_grad_(True)
    groups = layer_groups(net, "encoder.", 0.5)
    scale = {id(p): g["scale"] for g in groups for p in g["params"]}
    by_name = {n: scale[id(p)] for n, p in net.named_parameters() if id(p) in scale}
    order = [
        "encoder.patch_embed.proj.weight",
        "encoder.blocks.0.attn.qkv.weight",
        "encoder.blocks.1.attn.qkv.weight",
    ]
    assert [by_name[n] for n in order] == sorted({by_name[n] for n in order}), "later layers learn faster"
    assert (
        by_name["encoder.blocks.3.mlp.fc1.weight"]
        < by_name["encoder.norm.weight"]
        < by_name["head.weight"]
        == 1
    )
    net.requires_grad_(False)


def test_baselines_measure_the_mass_on_the_image(cohort):
    man, store = cohort
    tables = lesion_baselines(store, man, window=(0, 4095), progress=False)
    assert {"size", "mean HU", "HU histogram"} <= set(tables)
    diameters = [2 * radius_of(i) for i in range(40)]
    assert np.allclose(tables["size"].x[:, 0], diameters, atol=1.5), "of the discs that were drawn"


def test_scans_are_refused_before_any_work(encoder, tmp_path, monkeypatch):
    monkeypatch.setenv("SMARTLAB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UseError, match=r"an encoder of images cannot take phantom-ct.*found modality CT"):
        sl.evaluate(encoder, "probe", "phantom-ct", **QUIET)
    with pytest.raises(UseError, match=r"an encoder of scans cannot take phantom-mammo"):
        sl.evaluate(random_encoder(sl.load_config("tiny")), "probe", "phantom-mammo", **QUIET)
    assert not (tmp_path / "cache").exists(), "no phantom was made"


@pytest.mark.parametrize("grey", ["voi", "percentile"])
def test_the_store_is_that_of_training(encoder, grey, tmp_path, monkeypatch):
    """Evaluation windows the images as the encoder saw them."""
    from smartlab.evaluation import task as module

    asked = []
    monkeypatch.setattr(module, "locate_images", lambda data, *_: asked.append(data) or 1 / 0)
    own = random_encoder(encoder.config.model_copy(deep=True))
    own.config.data.grey = grey
    with pytest.raises(ZeroDivisionError):
        sl.evaluate(own, "probe", "phantom-mammo", **QUIET)
    assert (asked[0].grey, asked[0].spacing) == (grey, 1.0)


def test_whole_images_have_features_and_organs_are_refused(cohort, encoder):
    man, store = cohort
    table = scan_features(
        encoder, store, man, pooling="cls+tokens", images=range(3), by="image", cache=False, **QUIET
    )
    assert table.x.shape == (3, 2 * encoder.channels) and np.isfinite(table.x).all()
    with pytest.raises(UseError, match="mammograms have no organs"):
        organ_features(encoder, store, man, cache=False, **QUIET)
