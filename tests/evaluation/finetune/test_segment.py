"""Segmentation by fine-tuning: honest splits, results that overlay the scans, and nothing lost when killed."""

from __future__ import annotations

import json
import os
import time

import nibabel as nib
import numpy as np
import pandas as pd
import pydicom
import pytest
import torch

import smartlab as sl
from smartlab.core.errors import DataError, UseError
from smartlab.evaluation.finetune import segment as module
from smartlab.evaluation.finetune import segmenter
from smartlab.evaluation.finetune.draws import ForegroundCrops
from smartlab.evaluation.finetune.segment import segment
from smartlab.evaluation.finetune.trainer import Fitted
from smartlab.models.encoder import Encoder
from tests.evaluation.finetune.test_trainer import TINY
from tests.processes import Child

QUICK = {
    "steps": 2,
    "batch": 1,
    "size": 64,
    "overlap": 0.0,
    "checkpoint_every": 1,
    "validate_every": 2,
    "bootstraps": 100,
    "progress": False,
    "labels": ["liver", "lung_left"],
}


WHOLE = {"shape": (64, 64, 64), "spacing": 5.0}  # one window of 64 voxels holds the whole body


def make_encoder(seed=0):
    torch.manual_seed(seed)
    return Encoder(sl.load_config("tiny", TINY)).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    """(manifest path, image folder, store folder) of six phantom patients, the last two for testing."""
    os.environ["SMARTLAB_SALT"] = "tests-only-no-secret"
    root = tmp_path_factory.mktemp("segment-cohort")
    return make_cohort(root, n=6, test=2, **WHOLE)


def make_cohort(root, *, n, test, shape, spacing, **more):
    """Phantoms of which the last `test` patients are for testing."""
    images = root / "images"
    made = sl.make_phantom("ct", images, n=n, shape=shape, spacing=spacing, progress=False, **more)
    split = {p: "test" if i >= n - test else "train" for i, p in enumerate(made.patients)}
    cases = [c.model_copy(update={"split": split[c.patient]}) for c in made.all_cases]
    man = made.model_copy(update={"all_cases": cases})
    path = man.save(images / "split" / "manifest.json")
    sl.build_store(man, images, root / "store", workers=0, spacing=spacing, progress=False)
    return path, images, root / "store"


@pytest.fixture(scope="session")
def result(cohort, tmp_path_factory):
    """Full and scratch, on all patients and on half of them."""
    manifest, images, store = cohort
    out = tmp_path_factory.mktemp("segment") / "out"
    found = segment(
        make_encoder(),
        sl.open_store(store),
        manifest,
        out,
        root=images,
        modes=["full", "frozen"],
        fractions=[0.5, 1.0],
        **QUICK,
    )
    return found, out


def test_the_result_has_every_run_structure_and_patient_it_should(result, cohort):
    found, _ = result
    man = sl.load_manifest(cohort[0])
    test = {c.patient for c in man.cases if c.split == "test"}
    table = found.table
    assert len(table) == len(test) * 2 * 2 * 2  # structures, modes, fractions
    assert table.patient.nunique() == len(test) and table.dice.between(0, 1).all() and (table.hd95 >= 0).all()
    assert {
        "dice",
        "dice:liver",
        "hd95",
        "hd95:lung_left",
        "dice (frozen, 50%)",
        "dice: full minus frozen",
    } <= set(found.metrics)
    main = table[(table["mode"] == "full") & (table.fraction == 1)]
    assert found.metrics["dice"].value == pytest.approx(main.dice.mean())
    assert found.metrics["hd95:liver"].value == pytest.approx(main[main.structure == "liver"].hd95.mean())
    assert main.trained_on.iloc[0] > table[table.fraction == 0.5].trained_on.iloc[0]
    assert found.facts["labels"] == ["lung_left", "liver"] and found.facts["split"].startswith("official")


def test_the_result_saves_with_its_figure_and_holds_no_names(result, tmp_path):
    found, out = result
    found.save(tmp_path)
    assert (tmp_path / "figure.png").stat().st_size > 20_000
    assert json.loads((tmp_path / "result.json").read_text(encoding="utf-8"))["metrics"]["dice"]["n"] > 0
    written = [*tmp_path.rglob("*"), *out.rglob("*")]
    assert not any("ct-0" in path.name for path in written)
    texts = [p.read_text(encoding="utf-8") for p in written if p.suffix in (".csv", ".json")]
    assert not any("ct-0" in text for text in texts)


def test_predictions_lie_on_the_source_scans_and_agree_with_the_table(result, cohort):
    found, out = result
    manifest, images, path = cohort
    man, store = sl.load_manifest(manifest), sl.open_store(path)
    written = sorted((out / "full-100pct" / "predictions").glob("*.nii.gz"))
    assert len(written) == found.table.case.nunique()
    for case in man.cases:
        row = store.cases.loc[store.key_of(case)]
        key = store.rows[row.image]["key"]
        if case.split != "test":
            assert not (out / "full-100pct" / "predictions" / f"{key}.nii.gz").exists()
            continue
        said, source = (
            nib.load(out / "full-100pct" / "predictions" / f"{key}.nii.gz"),
            nib.load(images / case.image),
        )
        assert said.shape == source.shape and np.allclose(said.affine, source.affine, atol=1e-4)
        values = np.asanyarray(said.dataobj)
        assert set(np.unique(values).tolist()) <= {0, 1, 5}
        mine = found.table[
            (found.table.case == key) & (found.table["mode"] == "full") & (found.table.fraction == 1)
        ]
        for value, name in ((1, "lung_left"), (5, "liver")):
            volume = (values == value).sum() * abs(np.linalg.det(said.affine[:3, :3])) / 1000
            assert volume == pytest.approx(mine[mine.structure == name].said_ml.iloc[0], rel=0.05, abs=20)


@pytest.mark.parametrize("split", ["official", "cross"])
def test_no_scan_of_a_tested_patient_is_ever_drawn_from(cohort, tmp_path, monkeypatch, split):
    drawn, tested = [], []

    class Spy(ForegroundCrops):
        def __init__(self, store, images, *rest, **more):
            drawn.append({int(i) for i in images})
            super().__init__(store, images, *rest, **more)

    def measure(job, net, row, folder):
        tested.append(int(row.image))
        return pd.DataFrame(
            [{"case": row.key, "patient": row.patient, "structure": "x", "dice": 1.0, "hd95": 0.0}]
        )

    def fit(job, *rest, **more):
        return Fitted(pd.DataFrame(), 0, 0.0)

    monkeypatch.setattr(module, "ForegroundCrops", Spy)
    monkeypatch.setattr(module, "_measure", measure)
    monkeypatch.setattr(module.Trainings, "fit", fit)
    store = sl.open_store(cohort[2])
    segment(make_encoder(), store, cohort[0], tmp_path, split=split, folds=3, **QUICK)
    folds = 1 if split == "official" else 3
    assert len(drawn) == 2 * folds and sorted(tested) == ([4, 5] if folds == 1 else list(range(6)))
    each = [tested[i::folds] if folds == 1 else tested[2 * i : 2 * i + 2] for i in range(folds)]
    for fold, test in enumerate(each):
        train, held_out = drawn[2 * fold : 2 * fold + 2]
        assert train and not (train | held_out) & set(test) and not train & held_out


def test_the_encoder_is_loaded_whole_and_scratch_is_not():
    encoder = make_encoder(1)
    net = segmenter.build(encoder, 3, pretrained=True, seed=0)
    assert all(torch.equal(v, net.swinViT.state_dict()[k]) for k, v in encoder.swin.state_dict().items())
    fresh = segmenter.build(encoder, 3, pretrained=False, seed=0)
    assert not torch.equal(fresh.swinViT.patch_embed.proj.weight, net.swinViT.patch_embed.proj.weight)
    decoder = [k for k in net.state_dict() if not k.startswith("swinViT")]
    assert all(torch.equal(net.state_dict()[k], fresh.state_dict()[k]) for k in decoder)
    x = torch.rand(1, 1, 64, 64, 64)
    with torch.no_grad():
        ours, monai = encoder.swin(x), net.eval().swinViT(x)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(ours, monai, strict=True))


def test_crops_are_drawn_around_structures_and_carry_their_labels(cohort):
    store = sl.open_store(cohort[2])
    kidney = next(v for v, n in store.label_names.items() if n == "kidney_left")
    table = segmenter.class_table([kidney])
    crops = ForegroundCrops(store, [0, 1], table, size=32, items=12, seed=0, foreground=1.0)
    seen = [crops[i] for i in range(12)]
    assert {item["image"] for item in seen} == {0, 1}
    assert all(item["labels"].max() == 1 for item in seen)  # the kidney, and no other organ
    for item in seen:  # never beyond a scan that is large enough
        assert (item["start"] >= 0).all() and (item["start"] + 32 <= store.shape(item["image"])).all()
    again = ForegroundCrops(store, [0, 1], table, size=32, items=12, seed=0, foreground=1.0)
    assert np.array_equal(again[7]["view"], seen[7]["view"])
    assert not np.array_equal(seen[0]["view"], seen[2]["view"])
    item = ForegroundCrops(store, [0], table, size=160, items=1, seed=0)[0]  # larger than the scan
    array, labels = store.array(0)[:], table[store.labels(0)[:]]
    assert item["labels"].sum() == labels.sum() and (item["view"] == -1024).mean() > 0.5
    start = [-((n - 160) // 2) for n in array.shape]
    inside = tuple(slice(a, a + n) for a, n in zip(start, array.shape, strict=True))
    assert np.array_equal(item["view"][inside], array) and np.array_equal(item["labels"][inside], labels)


def test_probabilities_are_those_of_the_whole_scan_where_one_window_holds_it():
    net = segmenter.build(make_encoder(), 3, pretrained=True, seed=0).eval()
    hu = np.random.default_rng(0).normal(0, 100, (64, 64, 64)).astype(np.int16)
    found = segmenter.probabilities(net, hu, 64, (-175, 250))
    with torch.no_grad():
        x = segmenter.window(torch.from_numpy(hu)[None, None], -175, 250)
        assert np.allclose(found, net(x).softmax(1)[0].numpy(), atol=1e-5)
    small = segmenter.probabilities(net, hu[:20, :25, :30], 64, (-175, 250))
    assert small.shape == (3, 20, 25, 30) and np.allclose(small.sum(0), 1, atol=1e-5)


def test_impossible_requests_are_told(cohort, tmp_path):
    manifest, _, path = cohort
    store, encoder = sl.open_store(path), make_encoder()
    for wrong, said in [
        ({"labels": ["liver", "brain"]}, r"no such structure.*brain"),
        ({"labels": []}, "nothing to segment"),
        ({"modes": ["ful"]}, "modes"),
        ({"fractions": [0.0]}, "fractions"),
        ({"size": 80}, "multiple of the encoder's stride 32"),
        ({"size": 32}, "at least 64"),
        ({"stepps": 3}, "stepps"),
    ]:
        with pytest.raises(UseError, match=said):
            segment(encoder, store, manifest, tmp_path, **(QUICK | wrong))
    with pytest.raises((UseError, DataError), match="patient"):
        segment(encoder, store, manifest, tmp_path, split="cross", folds=50, **QUICK)


def test_all_organs_and_no_lesions_by_default(cohort):
    store = sl.open_store(cohort[2])
    names = module._names(store, sl.load_manifest(cohort[0]), None)
    assert "liver" in names.values() and not {"nodule", "tumour"} & set(names.values())
    only = {v: n for v, n in store.label_names.items() if n in ("nodule", "tumour")}
    assert module._names(store, sl.load_manifest(cohort[0]), ["tumour", "nodule"]) == only


def test_a_dicom_source_gets_a_seg_that_reads_back_as_the_nifti(tmp_path):
    from smartlab.data.images.dicom_masks import read_mask
    from smartlab.data.images.readers import read_labels

    manifest, images, path = make_cohort(
        tmp_path, n=2, test=1, shape=(64, 64, 64), spacing=5.0, format="dicom"
    )
    store, man = sl.open_store(path), sl.load_manifest(manifest)
    more = QUICK | {"steps": 1, "lr": 0.02}
    segment(make_encoder(), store, man, tmp_path / "out", root=images, **more)
    segs = sorted((tmp_path / "out").rglob("*.seg.dcm"))
    assert segs  # a barely trained network calls something an organ
    checked = 0
    for seg in segs:
        key = seg.name.removesuffix(".seg.dcm")
        image = next(i for i, row in enumerate(store.rows) if row["key"] == key)
        case = next(c for c in man.cases if store.cases.loc[store.key_of(c)].image == image)
        volume = sl.read_volume(case.locate(images), series=case.series_uid)
        labels = read_labels(seg.with_name(f"{key}.nii.gz"))
        assert labels.shape == volume.shape and np.allclose(labels.affine, volume.affine, atol=1e-3)
        names = {n: v for v, n in store.label_names.items()}
        for item in pydicom.dcmread(seg, stop_before_pixels=True).SegmentSequence:
            mask = read_mask(seg, volume, item.SegmentLabel)
            assert np.array_equal(mask.array, labels.array == names[item.SegmentLabel])
            checked += 1
    assert checked


def fine_tune(manifest, store, out, slow=0.0):
    """What a fine-tuning process does; `slow` seconds are added to each step."""
    from smartlab.training.engine import Engine

    step = Engine.one_step
    Engine.one_step = lambda self: (time.sleep(slow), step(self))[1]
    more = QUICK | {"steps": 6, "head_only": 0.3}
    result = segment(make_encoder(), sl.open_store(store), manifest, out, resume=True, **more)
    result.table.to_csv(out / "table.csv", index=False)


@pytest.mark.slow
def test_killed_and_resumed_equals_never_stopped(cohort, tmp_path):
    manifest, _, store = cohort
    whole = Child(fine_tune, manifest, store, tmp_path / "whole")
    killed = Child(fine_tune, manifest, store, tmp_path / "killed", 0.5)
    folder = tmp_path / "killed" / "full-100pct" / "checkpoints"
    end = time.monotonic() + 180
    while not list(folder.glob("step-*")):
        assert killed.running and time.monotonic() < end, killed.said
        time.sleep(0.05)
    time.sleep(0.7)  # somewhere in a later step
    killed.kill()
    assert not (tmp_path / "killed" / "table.csv").exists()
    again = Child(fine_tune, manifest, store, tmp_path / "killed")
    assert again.wait() == 0, again.said
    assert whole.wait() == 0, whole.said
    for name in ("table.csv", "full-100pct/history.csv"):
        a, b = (pd.read_csv(tmp_path / run / name) for run in ("whole", "killed"))
        pd.testing.assert_frame_equal(a, b, check_exact=True)
