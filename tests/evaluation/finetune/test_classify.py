"""Classification by fine-tuning: learns what is there, chance on shuffled labels, whole patients, resumable."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import smartlab as sl
from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.case import LabelSpec
from smartlab.data.crops.views import LesionDataset
from smartlab.evaluation.finetune import classifier, draws
from smartlab.evaluation.finetune import classify as module
from smartlab.evaluation.finetune.classify import classify, few
from smartlab.evaluation.finetune.draws import LesionDraws
from smartlab.evaluation.judge.compare import estimate
from smartlab.evaluation.judge.metrics import scores
from smartlab.evaluation.judge.predictions import from_table
from smartlab.models.encoder import Encoder
from tests.evaluation.finetune.test_trainer import TINY

QUICK = {
    "steps": 4,
    "batch": 4,
    "size": 32,
    "checkpoint_every": 2,
    "validate_every": 2,
    "bootstraps": 100,
    "progress": False,
}
N = 24  # patients


class FakeStore:
    """A store in memory: every patient has one scan with a bright or a dark ball, seen or unseen."""

    def __init__(self, truth, lesions=1, size=32):
        self.side = size
        self.path, self.fingerprint, self.spacing, self.label_names = "memory", "fake", 3.0, {}
        self.leading = ()
        rows = []
        for patient, value in enumerate(truth):
            for lesion in range(lesions):
                rows.append(
                    {
                        "key": f"case{patient}-{lesion}",
                        "patient": f"p{patient:02}",
                        "image": patient,
                        "split": None,
                        "fold": None,
                        "labels": {"kind": value},
                        "center_mm": [48.0, 48.0, 48.0],
                        "diameter_mm": None,
                    }
                )
        self.cases = pd.DataFrame(rows).set_index("key").astype(object)
        self.bright = list(truth)

    def __len__(self):
        return len(self.bright)

    def shape(self, image):
        return (self.side,) * 3

    def affine(self, image):
        return np.diag([3.0, 3.0, 3.0, 1.0])

    def array(self, image):
        import blosc2

        array = np.random.default_rng(image).normal(0, 20, (self.side,) * 3)
        bright = self.bright[image]
        level = (
            200 if bright == "bright" or "bright" in (bright if isinstance(bright, list) else []) else -100
        )
        array[10:22, 10:22, 10:22] += level
        return blosc2.asarray(array.astype(np.int16), chunks=(32,) * 3, blocks=(32,) * 3)


def manifest(kind="binary", classes=("dark", "bright")):
    return sl.load_manifest("phantom-ct").model_copy(
        update={"labels": {"kind": LabelSpec(kind=kind, classes=list(classes))}}
    )


def make_encoder():
    torch.manual_seed(0)
    return Encoder(sl.load_config("tiny", TINY)).eval().requires_grad_(False)


def truth_of(share=0.5):
    return ["bright" if i < share * N else "dark" for i in range(N)]


def test_it_learns_what_is_there_and_its_table_is_its_metrics(tmp_path):
    store = FakeStore(list(np.random.default_rng(1).permutation(truth_of())))
    more = QUICK | {"steps": 40, "warmup": 0.2, "head_only": 0.2, "flip": False, "intensity": 0.0}
    result = classify(make_encoder(), store, manifest(), tmp_path / "a", label="kind", folds=2, **more)
    assert result.metrics["auc"].value > 0.9 and result.metrics["auc"].n == N
    read = from_table(result.table)
    again = scores(read.kind, read.truth, read.probability, read.classes)
    assert again["accuracy"] == pytest.approx(result.metrics["accuracy"].value)
    assert estimate(result.table)["auc"] == result.metrics["auc"]
    assert sorted(result.table.case) == sorted(f"case{i}-0" for i in range(N))
    result.save(tmp_path / "saved")
    assert (tmp_path / "saved" / "figure.png").stat().st_size > 10_000


@pytest.mark.parametrize(("masked", "how"), [(True, "mask in 24 cases"), (False, "whole scan in 24")])
def test_a_label_of_scans_needs_no_centre_of_a_lesion(tmp_path, masked, how):
    store = FakeStore(list(np.random.default_rng(1).permutation(truth_of())))
    store.cases["center_mm"] = None
    store.body = lambda image: np.ones((1, 1, 1))
    mask = np.zeros((32, 32, 32), np.uint8)
    mask[10:22, 10:22, 10:22], mask[0, 0, 0] = 1, 1  # the largest piece counts
    store.label_names, store.labels = ({1: "tumour"} if masked else {}), lambda image: mask
    where, told = draws.places(store, store.cases.reset_index(names="case"), 16, None)
    assert how in told and len(where.case) == N * (1 if masked else 8)
    if masked:
        assert where.center_mm[0] == pytest.approx([46.5] * 3)  # voxels 10 to 21, of 3 mm
    else:
        assert sorted(where.center_mm[:8])[0] == pytest.approx([22.5] * 3)  # of the first eighth
    more = QUICK | {"steps": 40, "warmup": 0.2, "head_only": 0.2, "flip": False, "intensity": 0.0}
    result = classify(make_encoder(), store, manifest(), tmp_path, label="kind", folds=2, **more)
    assert result.metrics["auc"].value > 0.9 and how in result.facts["crops"]


def test_a_scan_of_several_windows_is_predicted_once(tmp_path):
    store = FakeStore(truth_of(), size=64)
    store.cases["center_mm"] = None
    store.body = lambda image: np.ones((2, 2, 2))
    where, _ = draws.places(store, store.cases.reset_index(names="case"), 32, None)
    assert len(where.case) == 8 * N
    few_rows = where.of(np.array([5, 2]))
    assert few_rows.case.tolist() == [0] * 8 + [1] * 8 and few_rows.center_mm[:8] == where.center_mm[40:48]
    result = classify(
        make_encoder(), store, manifest(), tmp_path, label="kind", folds=2, **(QUICK | {"steps": 1})
    )
    assert sorted(result.table.case) == sorted(f"case{i}-0" for i in range(N))


def test_shuffled_labels_give_chance(tmp_path):
    truth = list(np.random.default_rng(0).permutation(truth_of()))
    store = FakeStore(truth)
    store.bright = truth_of()  # what is in the image has nothing to do with the label
    more = QUICK | {"steps": 20, "lr": 3e-3, "validate_every": 10}
    result = classify(make_encoder(), store, manifest(), tmp_path, label="kind", folds=2, **more)
    assert result.metrics["auc"].low < 0.5 < result.metrics["auc"].high


def test_lesions_of_a_patient_are_never_on_both_sides(tmp_path, monkeypatch):
    seen = []
    original = module._one

    def spy(task, name, train, test, *rest):
        seen.append((set(task.about.patient.iloc[train]), set(task.about.patient.iloc[test])))
        return original(task, name, train, test, *rest)

    monkeypatch.setattr(module, "_one", spy)
    store = FakeStore(truth_of(), lesions=2)
    classify(make_encoder(), store, manifest(), tmp_path, label="kind", folds=3, **(QUICK | {"steps": 1}))
    assert len(seen) == 3 and not any(train & test for train, test in seen)
    assert set.union(*(test for _, test in seen)) == {f"p{i:02}" for i in range(N)}


def test_few_shot_takes_k_patients_of_each_class():
    patients = np.repeat([f"p{i}" for i in range(20)], 3)
    y = np.repeat(np.arange(20) % 2, 3)
    targets, train = np.eye(2)[y], np.arange(6, 54)
    rows = few(patients, targets, train, 4, 0)
    assert (
        set(rows) <= set(train) and len(set(patients[rows])) == 8 and np.bincount(y[rows]).tolist() == [4, 4]
    )
    assert (
        rows.tolist()
        == few(patients, targets, train, 4, 0).tolist()
        != few(patients, targets, train, 4, 1).tolist()
    )
    assert set(few(patients, targets, train, 2, 0)) < set(rows)  # more shots keep the fewer
    with pytest.raises(UseError, match="too few patients for 9 per class"):
        few(patients, targets, train, 9, 0)


def test_few_shot_runs_have_their_own_scores_over_draws(tmp_path):
    result = classify(
        make_encoder(),
        FakeStore(truth_of()),
        manifest(),
        tmp_path,
        label="kind",
        folds=2,
        modes=["frozen", "scratch"],
        shots=[1, 2],
        draws=2,
        **(QUICK | {"steps": 1, "batch": 2}),
    )
    names = [f" ({mode}, {k} per class)" for mode in ("frozen", "scratch") for k in (1, 2)]
    assert all(result.metrics["auc" + name].n == 2 for name in names) and "auc (scratch)" in result.metrics
    apart = result.metrics["auc"].value - result.metrics["auc (scratch)"].value
    assert result.metrics["auc minus scratch"].value == pytest.approx(apart)
    assert {row["b"] for row in result.facts["comparisons"]} == {"scratch"}
    counts = result.table.groupby(["mode", "shots"]).draw.nunique().to_dict()
    assert counts["frozen", "2"] == 2 and counts["scratch", "all"] == 1
    assert all(result.table.groupby(["mode", "shots", "draw"]).case.nunique() == N)


@pytest.mark.parametrize(
    ("kind", "classes"), [("multiclass", ("dark", "bright", "grey")), ("multilabel", ("bright", "round"))]
)
def test_several_classes_and_several_labels(tmp_path, kind, classes):
    if kind == "multiclass":
        truth = [classes[i % 3] for i in range(N)]
    else:
        truth = [[c for j, c in enumerate(classes) if (i >> j) % 2] for i in range(N)]
    result = classify(
        make_encoder(), FakeStore(truth), manifest(kind, classes), tmp_path, label="kind", folds=2, **QUICK
    )
    assert {f"auc:{c}" for c in classes} <= set(result.metrics)
    read = from_table(result.table, kind=kind)
    assert read.probability.shape == (N, len(classes))


@pytest.mark.parametrize("balance", ["sampling", "loss"])
def test_imbalance_is_corrected_in_the_probabilities(balance):
    """Logits of a balanced world, brought back to the real one: exact for a known posterior."""
    rng = np.random.default_rng(0)
    real, n = 0.1, 200_000
    y = rng.random(n) < real
    x = rng.normal(y.astype(float), 1)  # balanced log odds of y given x: x - 1/2
    logits = np.column_stack([np.zeros(n), x - 0.5])
    p = classifier.probability("binary", logits, np.array([0.5, 0.5]), np.array([1 - real, real]))[:, 1]
    assert p.mean() == pytest.approx(y.mean(), abs=0.003)
    multi = classifier.probability("multilabel", (x - 0.5)[:, None], np.array([0.5]), np.array([real]))
    assert np.allclose(multi[:, 0], p)


def test_weights_balance_what_is_drawn():
    truth = truth_of(0.25)
    store = FakeStore(truth)
    crops = LesionDataset(store, size=32)
    share = np.array([0.25 if t == "bright" else 0.75 for t in truth])
    out = {"crop": np.empty((32, 32, 32), np.int16)}
    draws = LesionDraws(crops, 300, seed=0, weights=1 / share)
    drawn = [truth[draws.read(0, i, out)["row"]] for i in range(300)]
    assert drawn.count("bright") == pytest.approx(150, abs=35)
    plain = LesionDraws(crops, 300, seed=0)
    assert sorted(plain.read(0, i, out)["row"] for i in range(N)) == list(range(N))


def test_interrupted_and_resumed_is_the_same(tmp_path, monkeypatch):
    from smartlab.evaluation.finetune.trainer import Stopped
    from smartlab.training.engine import Engine

    def go(out, resume=False):
        store = FakeStore(truth_of())
        return classify(make_encoder(), store, manifest(), out, label="kind", folds=2, resume=resume, **QUICK)

    whole = go(tmp_path / "whole")
    original, count = Engine.one_step, iter(range(100))

    def stop(self):
        if next(count) == 5:  # in the second fold
            self.requests.asked = "stop"
        return original(self)

    monkeypatch.setattr(Engine, "one_step", stop)
    with pytest.raises(Stopped):
        go(tmp_path / "stopped")
    monkeypatch.undo()
    pd.testing.assert_frame_equal(whole.table, go(tmp_path / "stopped", True).table, check_exact=True)


def test_degenerate_data_are_told(tmp_path):
    encoder, man = make_encoder(), manifest()
    with pytest.raises(UseError, match="no label 'size'"):
        classify(encoder, FakeStore(truth_of()), man, tmp_path, label="size", **QUICK)
    with pytest.raises(DataError, match="only one class"):
        classify(encoder, FakeStore(["dark"] * N), man, tmp_path, label="kind", **QUICK)
    with pytest.raises(DataError, match=r"too few patients|fewer patients"):
        classify(encoder, FakeStore(["dark", "bright", "dark"]), man, tmp_path, label="kind", **QUICK)
    with pytest.raises(UseError, match="balance"):
        classify(encoder, FakeStore(truth_of()), man, tmp_path, label="kind", balance="x", **QUICK)
