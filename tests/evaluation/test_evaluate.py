"""One call, and one command, from a run to the result of any task."""

from __future__ import annotations

import json

import pandas as pd
import pytest

import smartlab as sl
from smartlab.cli.app import app
from smartlab.core.errors import DataError, UseError
from smartlab.core.settings import DataConfig
from smartlab.data.cohort.case import Case, LabelSpec
from smartlab.data.cohort.manifest import Manifest, Source
from smartlab.data.cohort.privacy import hashed, salt
from smartlab.data.store.prepare import locate_images
from smartlab.evaluation import task
from smartlab.evaluation.features.cases import write_keys
from smartlab.evaluation.features.encoders import identity, random_encoder
from tests.shared import once, phantoms
from tests.training.conftest import SMALL, cohort, settings  # noqa: F401 - fixtures

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def run(cohort, tmp_path_factory):  # noqa: F811
    manifest, images, store = cohort
    more = {"data.manifest": str(manifest), "data.root": str(images), "data.store": str(store)}
    config = sl.load_config("tiny", SMALL | more | {"train.steps": 2, "train.checkpoint_every": 2})
    made = once(tmp_path_factory, "run", lambda folder: sl.pretrain(config, folder / "r", progress=False))
    return sl.Run(made / "r")


@pytest.fixture
def where(cohort):  # noqa: F811
    manifest, images, store = cohort
    return {"manifest": str(manifest), "root": str(images), "store": sl.open_store(store), "progress": False}


@pytest.mark.parametrize(
    "task, more, metric",
    [
        ("probe", {"label": "malignancy", "draws": 100, "split": "cross", "folds": 2}, "accuracy"),
        ("clusters", {"embeddings": ("pca",), "draws": 50}, "random features/ratio"),
        ("heads", {"views": 1, "draws": 50}, "cosine"),
        ("localize", {"draws": 50}, "lesion/lift"),
        ("unsupervised", {"draws": 50, "folds": 2}, "dice"),
        ("classify", {"label": "malignancy", "split": "cross", "folds": 2, "steps": 1, "size": 32}, "auc"),
    ],
)
def test_every_task_from_a_run_in_one_call(task, more, metric, run, where, tmp_path):
    result = sl.evaluate(run, task, out=tmp_path / task, **where, **more)
    assert metric in result.metrics, sorted(result.metrics)[:20]
    written = json.loads((tmp_path / task / "result.json").read_text())
    assert written["metrics"][metric]["value"] == pytest.approx(result.metrics[metric].value, nan_ok=True)
    assert written["code"] and written["manifest"] and written["headline"] in written["metrics"]
    assert written["encoder"] == run.path.name and written["step"] == run.step
    assert written["weights"] == identity(run.encoder("teacher"))[:16]
    assert (tmp_path / task / "figure.png").stat().st_size > 5000
    assert len((tmp_path / task / "table.csv").read_text().splitlines()) > 1


@pytest.mark.parametrize(
    "task, more, metric",
    [
        ("clusters", {"embeddings": ("pca",), "draws": 50}, "random features/ratio"),
        ("heads", {"views": 1}, "reach entropy:block 2"),
        ("heads", {"sample": "scans"}, "jensen_shannon"),
        ("localize", {}, "lesion/lift"),
        ("units", {"draws": 50, "folds": 2, "levels": ("stage 1", "stage 4")}, "stage 4/balanced accuracy"),
    ],
)
def test_a_vision_transformer_of_scans_is_looked_at_like_any_other(task, more, metric, where):
    """By its own [CLS], without semantic attention."""
    small = {"encoder.embed_dim": 24, "encoder.blocks": 2, "encoder.heads": 2, "encoder.registers": 1}
    small |= {"data.spacing": 4.0, "data.region": 48, "data.view": 32, "mae.input": 32}
    encoder = random_encoder(sl.load_config("primus-tiny", small), seed=1)
    result = sl.evaluate(encoder, task, **where, **more)
    assert result.metrics[metric].value > 0
    assert result.figure().axes


@pytest.mark.parametrize("name", task.TASKS)
def test_a_task_stands_where_the_table_says_and_checks_what_it_is_given(name):
    one = task.find(name)
    assert one.name == name and one.headline and one.check({"seed": "3"}) == {"seed": 3}
    assert one.trains == (name in task.FINE_TUNING) and bool(one.kinds) == (one.ask is not None)
    with pytest.raises(UseError, match=f"{name}: seed='x' does not fit"):
        one.check({"seed": "x"})


def test_the_command_line_does_the_same(run, cohort, tmp_path, monkeypatch):  # noqa: F811
    from typer.testing import CliRunner

    manifest, images, store = cohort
    words = ["evaluate", str(run.path), "--task", "heads", "--manifest", str(manifest), "--root", str(images)]
    done = CliRunner().invoke(app, [*words, "views=1", "draws=20", "--json"])
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    assert said["metrics"]["cosine"]["value"] > 0
    more = ["--store", str(store), "--out", str(tmp_path / "b"), "views=1", "draws=20", "--json"]
    again = CliRunner().invoke(app, [*words, *more])
    assert json.loads(again.stdout)["metrics"]["cosine"] == said["metrics"]["cosine"]
    assert (run.path / "evaluation" / "heads" / "result.json").is_file()


def test_a_run_is_judged_on_its_own_data_from_wherever_it_is_called(cohort, tmp_path, monkeypatch):  # noqa: F811
    """Neither manifest nor store is drawn or built anew; of images that have moved the new place is told."""
    _, images, store = cohort
    monkeypatch.setenv("SMARTLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(images.parent)
    more = {"data.manifest": "images", "data.store": "store", "train.steps": 1}
    run = sl.pretrain(sl.load_config("tiny", SMALL | more), tmp_path / "r", progress=False)
    monkeypatch.chdir(tmp_path)
    again = sl.Run(tmp_path / "r")
    assert (again.data.manifest, again.data.root, again.data.store) == tuple(
        map(str, (images, images, store))
    )
    quick = {"views": 1, "draws": 20, "noise": 0, "progress": False}
    for source in (run, str(tmp_path / "r")):
        assert sl.evaluate(source, "heads", **quick).facts["data"] == sl.open_store(store).fingerprint
    (tmp_path / "moved").symlink_to(images)
    moved = sl.evaluate(run, "heads", root=tmp_path / "moved", **quick)
    assert moved.facts["data"] == sl.open_store(store).fingerprint
    assert not list((tmp_path / "cache").glob("phantom*")), "no phantom was drawn"


def test_a_run_on_an_open_store_alone_asks_which_data(cohort, tmp_path):  # noqa: F811
    opened = sl.open_store(cohort[2])
    run = sl.pretrain(
        sl.load_config("tiny", SMALL | {"train.steps": 1, "data.manifest": "amos22"}),
        tmp_path / "r",
        store=opened,
        progress=False,
    )
    with pytest.raises(UseError, match=r"whose manifest is not known.*--data"):
        sl.evaluate(run, "heads", progress=False)


def test_help_shows_an_example_of_every_task_and_bad_use_has_its_exit_code(tmp_path, monkeypatch, capsys):
    from smartlab.cli.app import main

    def say(*words):
        monkeypatch.setattr("sys.argv", ["smartlab", *map(str, words)])
        with pytest.raises(SystemExit) as done:
            main()
        said = capsys.readouterr()
        return done.value.code, said.out + said.err

    for command in ("evaluate", "finetune"):
        code, said = say(command, "--help")
        for name in task.TASKS:
            fine_tuning = name in task.FINE_TUNING
            assert code == 0 and (f"--task {name}" in said) == (fine_tuning == (command == "finetune"))
    assert say("evaluate", tmp_path, "--task", "porbe")[0] == 2
    assert say("evaluate", tmp_path, "--task", "probe", "label=x")[0] == 2
    assert say("evaluate", tmp_path / "none.safetensors", "--task", "probe")[0] in (1, 2)
    code, said = say("compare", tmp_path, tmp_path / "b", "--task", "probe")
    assert code == 1 and "holds no result" in said and "Traceback" not in said


@pytest.fixture
def own(tmp_path):
    """A cohort of one's own of which only the manifest is there: whoever reads a scan fails."""

    def make(values, kind="binary", name="response", **spec):
        cases = [Case(id=f"Doe_{i}", patient=f"Doe_{i}", image=f"{i}.nii.gz") for i in range(len(values))]
        cases = [c.model_copy(update={"labels": {name: v}}) for c, v in zip(cases, values, strict=True)]
        about = {"title": "Mine", "modality": "CT", "licence": "none", "citation": "none", "homepage": "none"}
        labels = {name: LabelSpec(kind=kind, **spec)}
        return Manifest(name="mine", source=Source(kind="local"), labels=labels, cases=cases, **about)

    return make


@pytest.mark.parametrize("task", ["probe", "classify"])
@pytest.mark.parametrize(
    ("given", "asked", "words"),
    [
        ({"values": ["yes", "no"] * 10}, "respnse", "no label 'respnse'.*Did you mean 'response'"),
        ({"values": ["yes", "no"] * 10 + ["NA"]}, "response", "says it is missing.*'NA'"),
        ({"values": ["yes", "no"] * 10 + ["Yes"]}, "response", "binary and has 3 values"),
        ({"values": ["yes"] * 20, "classes": ["no", "yes"]}, "response", "only one class"),
        ({"values": ["yes"] * 17 + ["no"] * 3}, "response", "too few patients for 5 folds"),
        ({"values": [None] * 20}, "response", "no case has the label"),
        ({"values": ["2021-03-04"] * 20, "kind": "text"}, "response", "kind text"),
        ({"values": [4.5] * 20, "kind": "time"}, "response", "cannot predict.*Use the task outcome"),
    ],
)
def test_a_label_that_cannot_be_judged_is_told_before_any_scan_is_read(
    own, tmp_path, task, given, asked, words
):
    encoder = random_encoder(sl.load_config("tiny", SMALL))
    with pytest.raises((DataError, UseError), match="(?s)" + words):
        sl.evaluate(encoder, task, own(**given), root=tmp_path, label=asked, out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_zeros_and_ones_are_no_number(own, tmp_path):
    encoder = random_encoder(sl.load_config("tiny", SMALL))
    with pytest.raises(DataError, match=r"called a number and has two values.*0.0.*1.0.*binary"):
        sl.evaluate(encoder, "probe", own([0.0, 1.0] * 10, "number"), root=tmp_path, label="response")


def test_keys_are_named_beside_the_images_and_nowhere_else(own, tmp_path, monkeypatch):
    root, man = tmp_path / "scans", own(["yes", "no"])
    root.mkdir()
    assert write_keys(man, root) == "smartlab_keys.csv"
    named = pd.read_csv(root / "smartlab_keys.csv")
    assert named.case.tolist() == ["Doe_0", "Doe_1"] and named.image.tolist() == ["0.nii.gz", "1.nii.gz"]
    for column, kind in (("case_key", "case"), ("patient_key", "patient")):
        assert named[column].tolist() == [hashed(salt(), kind, f"Doe_{i}") for i in range(2)]
    assert named.image_key[0] == hashed(salt(), "image", "0.nii.gz")
    with pytest.warns(UserWarning, match="not written"):
        assert write_keys(man, root / "none") is None


@pytest.mark.parametrize("label", ["outcome", "time_months"])
def test_outcome_from_the_command_line_with_a_clinical_table(label, tmp_path, tmp_path_factory):
    """Patients of the CSV are named as in the manifest, though tables of features know salted keys only."""
    from typer.testing import CliRunner

    untrained = random_encoder(sl.load_config("tiny", SMALL))
    encoder = sl.export(untrained, "safetensors", tmp_path / "untrained.safetensors")
    make = phantoms("ct", n=24, seed=3, shape=(40, 40, 40), spacing=8.0)
    made = once(tmp_path_factory, "small-ct", make)
    root = made / "images"
    patients = sl.load_manifest(root / "manifest.json").patients
    rows = [f"{name},{50 + 2 * i},{'AB'[i % 2]}" for i, name in enumerate(patients)]
    (tmp_path / "clinic.csv").write_text("\n".join(["patient,age,arm", *rows]))
    words = ["evaluate", str(encoder), "--task", "outcome", "--manifest", str(root), "--root", str(root)]
    more = [
        "--store",
        str(made / "store"),
        "folds=2",
        "repeats=2",
        "draws=100",
        f"covariates={tmp_path / 'clinic.csv'}",
    ]
    done = CliRunner().invoke(app, [*words, "--label", label, *more, "--json"], catch_exceptions=False)
    said = json.loads(done.stdout)
    metric = "auc" if label == "outcome" else "concordance"
    assert {f"covariates/{metric}", f"both/{metric}", f"random encoder/{metric}"} <= set(said["metrics"])


def test_organs_can_be_probed_by_their_own_label(run, where):
    """A row per organ and scan, told apart by patient folds, beside the random encoder on the same rows."""
    found = sl.evaluate(run, "probe", label="organ", folds=2, draws=100, **where)
    assert {"accuracy", "random encoder/accuracy", "accuracy minus random encoder"} <= found.metrics.keys()
    organs = set(found.table.truth)
    assert {"liver", "heart"} <= organs and len(found.table) > len(organs)
    assert sl.evaluate(run, "knn", rows="organ", folds=2, draws=100, **where).facts["label"] == "organ"


def test_what_cannot_be_evaluated_is_said(run, where, tmp_path):
    with pytest.raises(UseError, match="no task 'porbe'"):
        sl.evaluate(run, "porbe", **where)
    with pytest.raises(UseError, match="needs a folder"):
        sl.evaluate(run, "segment", **where)
    with pytest.raises(UseError, match="no label 'colour'"):
        sl.evaluate(run, "probe", label="colour", **where)
    with pytest.raises(UseError, match="whole scans"):
        sl.evaluate(run, "localize", "nodules-png", root=tmp_path, progress=False)
    with pytest.raises(UseError, match="probe has no setting 'fold'"):
        sl.evaluate(run, "probe", fold=3, **where)
    with pytest.raises(UseError, match="folds='many' does not fit"):
        sl.evaluate(run, "probe", folds="many", **where)
    with pytest.raises(UseError, match="split='offical' does not fit"):
        sl.evaluate(run, "knn", split="offical", **where)
    with pytest.raises(UseError, match="heads predicts no label"):
        sl.evaluate(run, "heads", label="malignancy", **where)


def test_a_manifest_that_was_changed_in_memory_is_the_one_evaluated(run, cohort, tmp_path):  # noqa: F811
    manifest, images, _ = cohort
    whole = sl.load_manifest(manifest)
    keep = sorted({case.patient for case in whole.cases})[:-1]
    fewer = whole.model_copy(
        update={"name": "fewer", "all_cases": [case for case in whole.cases if case.patient in keep]}
    )
    root = tmp_path / "linked"  # a store of its own
    root.symlink_to(images)
    result = sl.evaluate(run, "heads", fewer, root=root, views=1, draws=20, progress=False)
    assert result.facts["manifest"] == "fewer" and result.facts["patients"] == len(keep)


def test_a_phantom_of_fewer_patients_than_its_manifest_tells_is_that_of_fewer(tmp_path):
    config = DataConfig(manifest="phantom-ct", phantom_cases=2, root=str(tmp_path / "ct"), workers=0)
    made, root = locate_images(config, progress=False)
    assert len(made.patients) == 2 and (root / "manifest.json").is_file()
    again, _ = locate_images(config, progress=False, given=sl.load_manifest("phantom-ct"))
    assert [case.id for case in again.cases] == [case.id for case in made.cases]


def test_voxels_of_another_size_are_refused_where_they_are_looked_at_as_stored(run, where, cohort, tmp_path):  # noqa: F811
    manifest, images, _ = cohort
    sl.build_store(
        sl.load_manifest(manifest), images, tmp_path / "s", spacing=11.0, workers=0, progress=False
    )
    with pytest.raises(UseError, match="voxels of 11 mm"):
        sl.evaluate(run, "localize", **where | {"store": sl.open_store(tmp_path / "s")})


def test_heads_of_the_student_are_those_of_the_student(run, where):
    few = {"views": 1, "draws": 20, "noise": 0}
    teacher, student = (sl.evaluate(run, "heads", role=r, **few, **where) for r in ("teacher", "student"))
    assert student.facts["role"] == "student" and teacher.facts["weights"] != student.facts["weights"]
    assert student.metrics["random cosine"].value == teacher.metrics["random cosine"].value
    assert student.metrics["cosine"].value != teacher.metrics["cosine"].value
