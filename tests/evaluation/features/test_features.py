"""Features: what a row is computed from, what is cached under which key, what fits in memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import smartlab as sl
from smartlab import DataError, UseError
from smartlab.evaluation.features.encoders import as_encoder, identity, random_encoder
from smartlab.evaluation.features.features import (
    centred,
    lesion_features,
    organ_features,
    scan_features,
    stack_features,
)
from smartlab.evaluation.features.pooling import pool_crops
from smartlab.models.encoder import Encoded, Encoder
from tests.shared import once, phantoms

SMALL = {
    "data.spacing": 4.0,
    "data.region": 48,
    "data.view": 32,
    "data.workers": 0,
    "encoder.embed_dim": 8,
    "encoder.num_heads": [1, 2, 2, 2],
    "semantic.heads": 2,
}
QUIET = {"progress": False}


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """(manifest, image folder, store) of six phantom patients."""
    root = once(tmp_path_factory, "ct", phantoms("ct", n=6, shape=(80, 80, 80), spacing=4.0))
    return (
        sl.load_manifest(root / "images" / "manifest.json"),
        root / "images",
        sl.open_store(root / "store"),
    )


@pytest.fixture(scope="module")
def encoder():
    return random_encoder(sl.load_config("tiny", SMALL), seed=0)


def changed(encoder, **settings):
    """The same weights under another configuration."""
    other = Encoder(sl.load_config("tiny", SMALL | {k.replace("__", "."): v for k, v in settings.items()}))
    other.load_state_dict(encoder.state_dict())
    return other.eval()


# ---- what a row is


def test_a_lesion_row_is_what_the_encoder_gives_for_the_crop(cohort, encoder):
    man, _, store = cohort
    table = lesion_features(encoder, store, man, pooling="cls+tokens+stages", cache=False, batch=3, **QUIET)
    crops = sl.LesionDataset(store, size=32)
    assert len(table) == len(crops) > 3
    for row, item in zip(table.x, crops, strict=False):
        out = encoder.features(item["crop"])
        parts = [out["cls"][0], out["tokens"][0].mean(0), *(s[0].mean((1, 2, 3)) for s in out["stages"])]
        np.testing.assert_allclose(row, torch.cat(parts), atol=1e-5)


def test_every_row_has_the_labels_and_patient_of_its_own_case(cohort, encoder):
    man, _, store = cohort
    table = lesion_features(encoder, store, man, cache=False, **QUIET)
    about = table.about.set_index("case")
    with_lesion = [case for case in man.cases if case.lesion]
    assert len(about) == len(with_lesion)
    patients = {}
    for case in with_lesion:
        row = about.loc[store.key_of(case)]
        for name in man.labels:
            assert row[f"label:{name}"] == case.labels.get(name)
        assert row.split == case.split and row.fold == case.fold
        assert patients.setdefault(case.patient, row.patient) == row.patient
    assert len(set(patients.values())) == len(patients)
    classified, y, classes = table.labelled("malignancy")
    assert [classes[v] for v in y] == list(classified.about["label:malignancy"])


def test_the_rows_follow_the_cases_asked_for(cohort, encoder):
    man, _, store = cohort
    every = lesion_features(encoder, store, man, cache=False, **QUIET)
    asked = list(every.about.case[::-1][:3])
    few = lesion_features(encoder, store, man, cases=asked, cache=False, **QUIET)
    assert list(few.about.case) == asked
    np.testing.assert_allclose(few.x, every.x[::-1][:3], atol=1e-5)


@pytest.mark.parametrize("grid, expected", [((3, 3, 3), [1, 1, 1]), ((4, 4, 2), [1.5, 1.5, 0.5])])
def test_center_pools_the_tokens_around_the_middle(grid, expected):
    where = torch.stack(torch.meshgrid(*(torch.arange(n) for n in grid), indexing="ij"), -1)
    out = Encoded([], torch.zeros(1, 3), where.reshape(1, -1, 3).float(), None, None, grid)
    np.testing.assert_allclose(pool_crops(out, "center")[0], expected)


def test_poolings_are_joined_in_the_order_written(cohort, encoder):
    man, _, store = cohort
    rows = {
        p: lesion_features(encoder, store, man, pooling=p, cache=False, **QUIET).x
        for p in ("cls", "center", "stages", "stages+center+cls")
    }
    joined = np.hstack([rows["stages"], rows["center"], rows["cls"]])
    np.testing.assert_array_equal(rows["stages+center+cls"], joined)
    assert rows["stages"].shape[1] == 8 * (1 + 2 + 4 + 8 + 16)


def test_a_scan_row_is_what_the_encoder_gives_for_the_whole_scan(cohort, encoder):
    man, _, store = cohort
    table = scan_features(encoder, store, man, pooling="cls+tokens+stages", cache=False, **QUIET)
    assert list(table.about.image) == list(range(len(store)))
    volume = store.array(0)[:]
    out = encoder.features(volume)
    inside, width = [slice(-(-n // encoder.stride)) for n in volume.shape], encoder.channels
    tokens = out["tokens"][0].T.unflatten(1, out["grid"])[(slice(None), *inside)]
    np.testing.assert_allclose(table.x[0, :width], out["cls"][0], atol=1e-6)
    np.testing.assert_allclose(table.x[0, width : 2 * width], tokens.mean((1, 2, 3)), atol=1e-6)


def test_a_patient_row_is_the_mean_of_the_patients_scans(cohort, encoder):
    man, _, store = cohort
    store = sl.open_store(store.path)
    together = store.cases.copy()
    together.loc[together.image <= 2, "patient"] = "one"
    store.cases = together
    images = scan_features(encoder, store, man, cache=False, **QUIET)
    patients = scan_features(encoder, store, man, by="patient", cache=False, **QUIET)
    assert len(patients) == len(images) - 2 and patients.about.patient.is_unique
    np.testing.assert_allclose(patients.x[0], images.x[:3].mean(0), atol=1e-6)


def test_a_label_on_which_the_lesions_of_a_scan_disagree_is_missing_for_the_scan(cohort, encoder):
    man, _, store = cohort
    about = scan_features(encoder, store, man, cache=False, **QUIET).about
    agreed = 0
    for _, row in about.iterrows():
        values = {ls.get("malignancy") for ls in store.cases[store.cases.image == row.image].labels} - {None}
        assert row["label:malignancy"] == (values.pop() if len(values) == 1 else None)
        agreed += row["label:malignancy"] is not None
    assert agreed


def test_an_organ_row_is_the_mean_of_its_voxels_tokens(cohort, encoder):
    man, _, store = cohort
    table = organ_features(encoder, store, man, pooling="tokens+stages", images=[1], cache=False, **QUIET)
    labels, out = store.labels(1)[:], encoder.features(store.array(1)[:])
    levels = [
        out["tokens"][0].T.unflatten(1, out["grid"]),
        *(s[0] for s in out["stages"][:2]),
    ]  # the others take long
    names = {name: value for value, name in store.label_names.items()}
    for k in (0, len(table) // 2, len(table) - 1):
        row = table.about.iloc[k]
        mask = labels == names[row["label:organ"]]
        means = []
        for level, stride in zip(levels, (encoder.stride, 2, 4), strict=True):
            dense = level
            for axis in (1, 2, 3):
                dense = dense.repeat_interleave(stride, axis)
            x, y, z = labels.shape
            means.append(dense[:, :x, :y, :z][:, torch.from_numpy(mask)].mean(1))
        expected = torch.cat(means)
        np.testing.assert_allclose(table.x[k, : len(expected)], expected, atol=1e-4)
        assert row.voxels == mask.sum()
        middle = store.affine(1) @ [*np.argwhere(mask).mean(0), 1]
        np.testing.assert_allclose(row.center_mm, middle[:3], atol=1e-6)


def test_organs_are_rows_and_lesions_only_where_asked_for(cohort, encoder):
    man, _, store = cohort
    organs = organ_features(encoder, store, man, cache=False, **QUIET)
    _, y, classes = organs.labelled("organ")
    assert {"liver", "heart"} <= set(classes) and not {"nodule", "tumour"} & set(classes)
    assert organs.about.case.is_unique and len(np.unique(y)) == len(classes)
    assert (organs.about.voxels >= 64).all()
    every = organ_features(encoder, store, man, lesions=True, min_voxels=1, cache=False, **QUIET)
    assert "tumour" in set(every.about["label:organ"])


def test_a_store_at_another_spacing_is_resampled_to_that_of_training(cohort, encoder):
    man, _, store = cohort
    organs = organ_features(encoder, store, man, images=[0], spacing=8.0, cache=False, **QUIET)
    same = organ_features(encoder, store, man, images=[0], cache=False, **QUIET)
    merged = organs.about.merge(same.about, on="case")
    big = merged[merged.voxels_y > 2000]
    assert len(big) > 3
    np.testing.assert_allclose(8 * big.voxels_x.astype(int), big.voxels_y.astype(int), rtol=0.25)
    apart = np.array(big.center_mm_x.tolist()) - np.array(big.center_mm_y.tolist())
    assert np.linalg.norm(apart, axis=1).max() < 8


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda e, s, m: lesion_features(e, s, m, pooling="mean", cache=False), "no pooling 'mean'"),
        (lambda e, s, m: lesion_features(e, s, m, pooling="cls+cls", cache=False), "named twice"),
        (lambda e, s, m: lesion_features(e, s, m, size=40, cache=False), "Use size=64"),
        (lambda e, s, m: scan_features(e, s, m, pooling="center", cache=False), "no pooling 'center'"),
        (lambda e, s, m: scan_features(e, s, m, by="lesion", cache=False), "'image' or 'patient'"),
        (lambda e, s, m: scan_features(e, s, m, images=[99], cache=False), "no such image"),
        (lambda e, s, m: organ_features(e, s, m, pooling="cls", cache=False), "no pooling 'cls'"),
    ],
)
def test_a_wrong_request_is_told_before_any_work(cohort, encoder, call, words):
    man, _, store = cohort
    with pytest.raises(UseError, match=words):
        call(encoder, store, man)


# ---- encoders


def test_every_way_to_name_an_encoder_gives_the_same_features(cohort, tmp_path):
    man, images, store = cohort
    config = SMALL | {"data.manifest": str(images / "manifest.json"), "data.root": str(images)}
    config |= {"data.store": str(store.path), "train.steps": 2, "train.picture_every": 1000}
    config |= {"distill.hidden": 16, "distill.bottleneck": 8, "distill.prototypes": 16}
    run = sl.pretrain(sl.load_config("tiny", config), out=tmp_path / "run")
    sl.export(run.path, "safetensors", tmp_path / "exported.safetensors")
    sources = [run, run.path, str(run.path), tmp_path / "exported.safetensors", run.encoder()]
    tables = [lesion_features(source, store, man, cache=False, **QUIET) for source in sources]
    for table in tables:
        np.testing.assert_array_equal(table.x, tables[0].x)
        assert table.facts["weights"] == tables[0].facts["weights"]
    assert tables[0].facts["step"] == 2 and tables[0].facts["role"] == "teacher"
    assert str(tmp_path) not in json.dumps([table.facts for table in tables])
    student = lesion_features(run, store, man, role="student", cache=False, **QUIET)
    assert not np.array_equal(student.x, tables[0].x)


def test_random_weights_follow_from_the_seed_and_touch_no_other_draw(encoder):
    before = torch.get_rng_state()
    again, other = random_encoder(encoder.config, 0), random_encoder(encoder.config, 1)
    assert torch.equal(before, torch.get_rng_state())
    assert identity(again) == identity(encoder) != identity(other)
    assert not any(p.requires_grad for p in other.parameters()) and not other.training


def test_an_encoder_in_training_gives_frozen_features_and_goes_on_training(cohort):
    man, _, store = cohort
    config = sl.load_config("tiny", SMALL | {"encoder.drop_path": 0.5})
    encoder = Encoder(config).train()
    tables = [lesion_features(encoder, store, man, cache=False, **QUIET) for _ in range(2)]
    np.testing.assert_array_equal(tables[0].x, tables[1].x)
    assert encoder.training
    encoder.eval()(torch.rand(1, 1, 32, 32, 32))
    lesion_features(encoder, store, man, cache=False, **QUIET)
    encoder.train()(torch.rand(1, 1, 32, 32, 32)).cls.sum().backward()
    assert encoder.swin.patch_embed.proj.weight.grad is not None


# ---- cache


def test_what_was_computed_once_is_read_the_next_time(cohort, encoder, tmp_path, monkeypatch):
    man, _, store = cohort
    first = [f(encoder, store, man, cache=tmp_path, **QUIET) for f in (lesion_features, scan_features)]
    first.append(organ_features(encoder, store, man, cache=tmp_path, **QUIET))

    def never(*_, **__):
        raise AssertionError("computed again")

    monkeypatch.setattr(Encoder, "forward", never)
    again = [f(encoder, store, man, cache=tmp_path, **QUIET) for f in (lesion_features, scan_features)]
    again.append(organ_features(encoder, store, man, cache=tmp_path, **QUIET))
    for a, b in zip(first, again, strict=True):
        np.testing.assert_array_equal(a.x, b.x)
        assert a.about.equals(b.about) and a.facts == b.facts


def test_features_of_one_configuration_are_never_served_to_another(cohort, encoder, tmp_path):
    man, images, store = cohort
    other_store = tmp_path / "other"
    sl.build_store(man, images, other_store, workers=0, spacing=5.0, progress=False)
    few = list(store.cases.index[store.cases.center_mm.notna()][:4])
    every = [
        {},
        {"pooling": "tokens"},
        {"pooling": "tokens+cls"},
        {"pooling": "cls+tokens"},
        {"size": 64},
        {"spacing": 5.0},
        {"cases": few},
        {"cases": few[::-1]},
        {"encoder": random_encoder(encoder.config, 7)},
        {"encoder": changed(encoder, data__window=[-175.0, 250.0])},
        {"encoder": changed(encoder, mask__ratio=0.3)},
        {"store": sl.open_store(other_store)},
    ]

    def compute(cache, encoder=encoder, store=store, **settings):
        return lesion_features(encoder, store, man, cache=cache, **settings, **QUIET).x

    for _ in range(2):  # filling the cache, then reading it
        for settings in every:
            np.testing.assert_array_equal(compute(tmp_path / "cache", **settings), compute(False, **settings))
    assert len(list((tmp_path / "cache").iterdir())) == len(every)


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty", "other"])
def test_a_damaged_cache_file_is_told_and_computed_again(cohort, encoder, tmp_path, damage):
    man, _, store = cohort
    right = lesion_features(encoder, store, man, cache=tmp_path, **QUIET).x
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    middle = len(whole) // 2
    file.write_bytes(
        {
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "cut": whole[:-1],
            "empty": b"",
            "other": b"not features" * 99,
        }[damage]
    )
    with pytest.warns(UserWarning, match="damaged"):
        again = lesion_features(encoder, store, man, cache=tmp_path, **QUIET).x
    np.testing.assert_array_equal(again, right)
    assert [f.read_bytes() for f in tmp_path.iterdir()] == [whole]


def test_a_write_that_is_killed_leaves_nothing_that_passes_for_features(
    cohort, encoder, tmp_path, monkeypatch
):
    man, _, store = cohort

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(os, "replace", killed)
        lesion_features(encoder, store, man, cache=tmp_path, **QUIET)
    assert all(f.name.startswith(".") for f in tmp_path.iterdir())
    lesion_features(encoder, store, man, cache=tmp_path, **QUIET)


def test_new_labels_reach_cached_features(cohort, encoder, tmp_path):
    man, _, store = cohort
    lesion_features(encoder, store, man, cache=tmp_path, **QUIET)
    store = sl.open_store(store.path)
    other = store.cases.copy()
    other["labels"] = [{"malignancy": "benign"}] * len(other)
    store.cases = other
    about = lesion_features(encoder, store, man, cache=tmp_path, **QUIET).about
    assert set(about["label:malignancy"]) == {"benign"}


def test_the_cache_tells_nothing_about_patients(cohort, encoder, tmp_path):
    man, _, store = cohort
    lesion_features(encoder, store, man, cache=tmp_path, **QUIET)
    content = b"".join(f.read_bytes() + f.name.encode() for f in tmp_path.iterdir())
    assert not any(case.patient.encode() in content or case.id.encode() in content for case in man.cases)


# ---- memory

MANY = """
import resource, sys
import pandas as pd, smartlab as sl
from smartlab.evaluation.features.encoders import random_encoder
from smartlab.evaluation.features.features import lesion_features
store, config, n = sl.open_store(sys.argv[1]), sl.load_config("tiny", eval(sys.argv[2])), int(sys.argv[3])
own = store.cases[store.cases.center_mm.notna()]
many = pd.concat([own] * (n // len(own) + 1))[:n]
many.index = [f"{k:032x}" for k in range(n)]
for part in (many[: n // 4], many):
    store.cases = part
    table = lesion_features(random_encoder(config), store, sys.argv[4], pooling="cls+tokens+stages", cache=sys.argv[5], progress=False)
    print(len(table), table.x.shape[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


@pytest.mark.slow
def test_5000_lesions_fit_in_two_gigabytes(cohort, tmp_path):
    """With 768 numbers each, as SMIT's encoder gives, by what the last 750 of 1,000 add to the peak.

    Measured for all 5,000: 0.72 GB, 0.33 GB of it imports.
    """
    _, images, store = cohort
    config = SMALL | {"encoder.embed_dim": 20, "encoder.num_heads": [1, 2, 2, 2], "encoder.depths": [1] * 4}
    words = [str(store.path), repr(config), "1000", str(images / "manifest.json"), str(tmp_path)]
    out = subprocess.run(
        [sys.executable, "-c", MANY, *words], capture_output=True, text=True, env=os.environ, check=True
    )
    (few, _, before), (rows, columns, peak) = (map(float, line.split()) for line in out.stdout.splitlines())
    assert (few, rows) == (250, 1000) and columns >= 768
    assert peak + (peak - before) / 750 * 4000 < 2.0


# ---- PNG stacks


@pytest.fixture
def nodules(tmp_path):
    """Twelve nodules of six exams: bright discs, larger where malignant."""
    rng = np.random.default_rng(0)
    y, x = np.ogrid[:64, :64]
    for exam in range(6):
        for k, kind in enumerate(("benign", "malignant")):
            folder = tmp_path / kind / f"exam{exam}" / f"Nodule {k}"
            folder.mkdir(parents=True)
            for n in range(3):
                disc = (x - 30) ** 2 + (y - 34) ** 2 <= (4 + 4 * k + exam % 2) ** 2
                pixels = np.where(disc, rng.integers(100, 250, (64, 64)), 0).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{n}.png")
    return tmp_path


def test_a_nodule_row_is_what_the_encoder_gives_for_the_nodule_in_the_middle_of_air(nodules, encoder):
    table = stack_features(encoder, "nodules-png", nodules, pooling="cls", cache=False, batch=5, **QUIET)
    assert len(table) == 12 and table.about.patient.nunique() == 6 and table.facts["failed"] == {}
    pixels = np.stack(
        [np.asarray(Image.open(nodules / f"benign/exam0/Nodule 0/{n}.png"), float).T for n in range(3)], -1
    )[::-1, ::-1]
    hu = np.where(pixels == 0, -1000, np.rint(-1000 + pixels * 1400 / 255)).astype(np.int16)
    crop = np.full((32, 32, 32), -1000, np.int16)
    at = [(a.min(), a.max()) for a in np.nonzero(pixels)]
    box = hu[tuple(slice(a, b + 1) for a, b in at)]
    start = [16 - (a + b + 1) // 2 + a for a, b in at]
    crop[tuple(slice(s, s + n) for s, n in zip(start, box.shape, strict=True))] = box
    np.testing.assert_allclose(table.x[0], encoder.features(crop)["cls"][0], atol=1e-5)


def test_nodules_of_both_classes_in_an_exam_share_a_patient_key_that_hides_the_exam(nodules, encoder):
    about = stack_features(encoder, "nodules-png", nodules, cache=False, **QUIET).about
    assert (about.groupby("patient")["label:malignancy"].nunique() == 2).all()
    assert "exam" not in about.to_csv()


def test_a_bad_nodule_is_recorded_and_the_others_go_on(nodules, encoder):
    (nodules / "benign/exam3/Nodule 0/1.png").write_bytes(b"no image")
    man = sl.load_manifest("nodules-png", root=nodules)
    (nodules / "benign/exam4/Nodule 0/1.png").unlink()  # after the listing
    table = stack_features(encoder, man, nodules, cache=False, **QUIET)
    assert len(table) == 10
    reasons = sorted(table.facts["failed"].values())
    assert len(reasons) == 2 and "1.png cannot be read" in reasons[1] and "slice 1 is missing" in reasons[0]


def test_stack_features_are_cached_by_the_pixels(nodules, encoder, tmp_path):
    def compute(cache, **settings):
        return stack_features(encoder, "nodules-png", nodules, cache=cache, **settings, **QUIET).x

    cache = tmp_path / "cache"
    for settings in ({}, {"grey_hu": (-1200, 600)}, {"size": 64}):
        np.testing.assert_array_equal(compute(cache, **settings), compute(False, **settings))
    before = compute(cache)
    path = nodules / "malignant/exam0/Nodule 1/0.png"
    Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert not np.array_equal(compute(cache), before)
    np.testing.assert_array_equal(compute(cache), compute(False))


def test_no_usable_nodule_is_one_clear_error(tmp_path, encoder):
    folder = tmp_path / "benign" / "exam" / "nodule"
    folder.mkdir(parents=True)
    (folder / "0.png").write_bytes(b"")
    with pytest.raises(DataError, match="no nodule of nodules-png can be used"):
        stack_features(encoder, "nodules-png", tmp_path, cache=False, **QUIET)


@pytest.mark.parametrize("shape", [(5, 7, 3), (64, 64, 40), (32, 1, 90)])
def test_what_fits_is_kept_whole_and_centred(shape):
    volume = np.full(shape, 7, np.int16)
    cube = centred(volume, 32)
    inside = np.argwhere(cube != -1000)
    extent = inside.max(0) - inside.min(0) + 1
    np.testing.assert_array_equal(extent, np.minimum(shape, 32))
    assert np.abs((inside.max(0) + inside.min(0)) / 2 - 15.5).max() <= 0.5


def test_real_nodules_become_features(real_data, tmp_path):
    config = sl.load_config("tiny", SMALL | {"encoder.embed_dim": 4, "encoder.num_heads": [1, 1, 1, 1]})
    table = stack_features(
        random_encoder(config), "nodules-png", real_data / "nodules", cache=tmp_path, **QUIET
    )
    assert len(table) == 531 and table.about.patient.nunique() == 297
    assert table.facts["failed"] == {} and np.unique(table.x, axis=0).shape[0] == 531


def test_facts_name_the_encoder(encoder):
    _, facts = as_encoder(encoder)
    assert facts["encoder"] == "given" and len(facts["weights"]) == 16
    with pytest.raises(UseError, match="no such file"):
        as_encoder(Path("nowhere.safetensors"))


def test_stages_are_layer_normed_before_their_mean():
    stage = torch.randn(2, 2, 2, 2, 6) * 100
    out = Encoded([stage], torch.zeros(2, 3), torch.zeros(2, 8, 3), None, None, (2, 2, 2))
    np.testing.assert_allclose(
        pool_crops(out, "stages"), F.layer_norm(stage, (6,)).mean((1, 2, 3)), atol=1e-6
    )
