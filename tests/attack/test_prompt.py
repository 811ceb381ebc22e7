"""What a person at the prompt meets when a file or a word is wrong: one line that says what and where."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import smartlab as sl
from smartlab.batch import load_plan, records
from smartlab.cli import app as cli
from smartlab.interop.weights import export
from smartlab.models.build import make_encoder
from smartlab.training import checkpoint
from tests.batch.toys import toy_notebook, write_plan
from tests.data.store_cohort import make_cohort


@pytest.fixture
def say(monkeypatch, capsys):
    """Call the command line -> (exit code, what it said on standard error)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["smartlab", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        return end.value.code, capsys.readouterr().err

    return call


def run_folder(folder):
    """What a pretraining leaves behind, made without training."""
    config = sl.load_config("tiny", {"encoder.embed_dim": 8, "semantic.heads": 2})
    config.save(folder / "config.yaml")
    header = {"config": json.dumps(config.model_dump(mode="json")), "data": "d"}
    encoder = make_encoder(config).state_dict()
    method = {f"{role}.encoder.{k}": v for role in checkpoint.ROLES for k, v in encoder.items()}
    checkpoint.save(folder, 3, method, {}, header)
    (folder / "environment.json").write_text(json.dumps({"data": "d", "places": {}}))
    (folder / "metrics.csv").write_text("step,loss\n1,0.5\n2,0.4\n3,0.3\n")
    return folder


CASES = {}


def case(*words, code=1):
    """Register what makes the mistake; it returns the words of the command. `words` must be in the one line."""

    def register(make):
        CASES[make.__name__] = (make, words, code)
        return make

    return register


# ---- tables and manifests


def _table(folder, edit):
    make_cohort(folder, 2).model_copy(update={"cases_file": "cases.csv"}).save(folder / "m.json")
    path = folder / "cases.csv"
    path.write_bytes(edit(path.read_bytes()))
    return ["data", "verify", folder / "m.json", "--root", folder, "--workers", 0]


@case("cases.csv", "10 cells for 9 columns", "line 2")
def a_comma_too_many_in_a_table(folder):
    return _table(folder, lambda text: text.replace(b"patient-0", b"patient-0,more", 1))


@case("cases.csv", "not a CSV in UTF-8")
def a_table_that_is_not_utf_8(folder):
    return _table(folder, lambda text: text.replace(b"patient-0", b"pati\xe9nt-0", 1))


@case("m.json", "not a valid manifest")
def a_manifest_whose_table_is_a_number(folder):
    (folder / "m.json").write_text('{"name": "a", "cases_file": 5}')
    return ["data", "show", folder / "m.json"]


@case("m.json", "not a valid manifest", "layout")
def a_manifest_whose_layout_is_a_word(folder):
    content = {"name": "a", "source": {"parameters": {"layout": "stacks"}}, "cases": []}
    (folder / "m.json").write_text(json.dumps(content))
    return ["data", "verify", folder / "m.json", "--root", folder]


@case("spacing is out of range", "0 mm", code=2)
def a_voxel_size_of_nothing(folder):
    make_cohort(folder, 1).save(folder / "m.json")
    return [
        "data",
        "build",
        folder / "m.json",
        "--root",
        folder,
        "--out",
        folder.parent / "s",
        "--spacing",
        0,
    ]


@case("no such manifest", "id you mean 'pancreas-ct'", code=2)
def a_manifest_that_is_misspelt(folder):
    return ["data", "show", "pancreas-tc"]


# ---- configurations


@case("data.root", "not valid YAML", code=2)
def a_folder_that_looks_like_a_date(folder):
    return ["config", "tiny", "data.root=2024-13-45"]


@case("c.yaml", "cannot be read as YAML", code=2)
def a_config_that_is_not_utf_8(folder):
    (folder / "c.yaml").write_bytes("seed: 0  # für alle".encode("latin-1"))
    return ["config", folder / "c.yaml"]


@case("encoder.num_heads", "greater than or equal to 1", code=2)
def a_stage_without_heads(folder):
    return ["config", "tiny", "encoder.num_heads=[0,1,1,1]"]


@case("encoder.preset has no preset", code=2)
def a_list_of_presets(folder):
    return ["config", "tiny", "encoder.preset=[tiny]"]


@case("c.yaml", "extends itself", code=2)
def a_config_that_extends_itself(folder):
    (folder / "c.yaml").write_text(f"extends: {folder / 'c.yaml'}\n")
    return ["config", folder / "c.yaml"]


@case("no option --steps", "train.steps=", code=2)
def a_setting_as_an_option(folder):
    return ["pretrain", "tiny", "--steps", 10, "--out", folder / "r"]


@case("no option --folds", "dashes: folds=", code=2)
def a_setting_of_a_task_as_an_option(folder):
    return ["evaluate", folder / "r", "--folds", 3]


@case("no task 'prob'", "id you mean 'probe'", code=2)
def a_task_that_is_misspelt(folder):
    return ["evaluate", run_folder(folder / "r"), "--task", "prob"]


# ---- plans and notebooks


@case("toy.ipynb", "is not Python", code=2)
def a_parameters_cell_that_does_not_parse(folder):
    path = write_plan(folder, grid={"x": [1]})
    (folder / "toy.ipynb").write_text((folder / "toy.ipynb").read_text().replace("x = 0", "x = = 0"))
    return ["batch", path, "--dry-run"]


@case("toy.ipynb", "is not a notebook", code=2)
def a_notebook_whose_cell_has_no_source(folder):
    path = write_plan(folder, grid={"x": [1]})
    cells = [{"cell_type": "code", "metadata": {"tags": ["parameters"]}}]
    (folder / "toy.ipynb").write_text(json.dumps({"cells": cells}))
    return ["batch", path, "--dry-run"]


@case("cores", "greater than or equal to 1", code=2)
def a_step_without_cores(folder):
    steps = [{"name": "a", "notebook": "toy.ipynb", "resources": {"cores": 0}}]
    return ["batch", write_plan(folder, steps=steps), "--dry-run"]


@case("too many", code=2)
def a_plan_of_a_billion_runs(folder):
    return ["batch", write_plan(folder, seeds=10**9), "--dry-run"]


# ---- weights and runs


@case("e.safetensors", "cannot be read as weights", "export")
def weights_that_are_cut_short(folder):
    file = export(make_encoder(sl.load_config("tiny")), "safetensors", folder / "e.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    return ["export", file, "--to", "monai", "--out", folder / "e.pt"]


@case("e.pt", "objects that only running code could restore")
def weights_that_hold_code(folder):
    torch.save({"state_dict": {"a": torch.zeros(1)}, "path": folder}, folder / "e.pt")
    return ["export", folder / "e.pt", "--to", "safetensors", "--out", folder / "e.safetensors"]


@case("student.safetensors", "cannot be read as weights")
def a_student_that_is_gone(folder):
    run = run_folder(folder / "r")
    (checkpoint.folder(run, 3) / "student.safetensors").unlink()
    return ["export", run, "--to", "monai", "--out", folder / "e.pt", "--role", "student"]


@case("metrics.csv", "is no table of steps")
def a_history_that_cannot_be_read(folder):
    run = run_folder(folder / "r")
    (run / "metrics.csv").write_bytes(b"step,loss\n\xff\xfe,1,2,3\n")
    return ["export", run, "--to", "safetensors", "--out", folder / "e.safetensors"]


@case("environment.json", "is damaged")
def facts_that_cannot_be_read(folder):
    run = run_folder(folder / "r")
    (run / "environment.json").write_text('{"data": ')
    return ["export", run, "--to", "safetensors", "--out", folder / "e.safetensors"]


@case("teacher.safetensors", "weights that are not numbers", "take an earlier checkpoint")
def an_encoder_that_diverged(folder):
    run = run_folder(folder / "r")
    file = checkpoint.folder(run, 3) / "teacher.safetensors"
    weights, about = load_file(file), checkpoint.header_of(file)
    weights["swin.patch_embed.proj.bias"][0] = float("nan")
    save_file(weights, file, about)
    return ["export", run, "--to", "monai", "--out", folder / "e.pt"]


@case("store.json", "is damaged")
def a_store_whose_header_was_changed(folder):
    sl.build_store(make_cohort(folder / "raw", 1), folder / "raw", folder / "s", workers=0, progress=False)
    text = (folder / "s" / "store.json").read_text()
    (folder / "s" / "store.json").write_text(text.replace('"spacing": 2.0', '"spacing": 3.0'))
    return ["data", "verify", "--store", folder / "s"]


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_one_line_that_says_what_and_where(tmp_path, say, name):
    make, words, expected = CASES[name]
    code, said = say(*make(tmp_path))
    lines = [line for line in said.splitlines() if not line.startswith("Try `smartlab --help`")]
    assert code == expected and len(lines) == 1 and lines[0].startswith("smartlab: "), said
    for word in words:
        assert word in said, said


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["evaluate", "r", "--tsak", "probe"], "--task"),
        (["pretrain", "tiny", "--out"], "'--out' requires an argument"),
    ],
)
def test_an_option_that_is_misspelt_or_lacks_its_value_is_not_taken_for_a_setting(say, words, told):
    code, said = say(*words)
    assert code == 2 and told in said and "dashes" not in said


def test_a_plan_may_name_a_notebook_with_spaces_and_magics(tmp_path, say):
    path = write_plan(tmp_path, grid={"x": [1, 2]}, notebook="My toy 2.ipynb")
    toy_notebook(tmp_path, name="My toy 2")
    text = (tmp_path / "My toy 2.ipynb").read_text()
    (tmp_path / "My toy 2.ipynb").write_text(text.replace("x = 0", "%matplotlib inline\\n!ls\\nx = 0"))
    plan = load_plan(path)
    assert [step.name for step in plan.steps] == ["my-toy-2"] and plan.steps[0].known["x"] == 0


def test_what_nobody_foresaw_is_one_line_with_the_place(say, monkeypatch):
    def fault(*given, **more):
        raise LookupError("first line\nsecond line")

    monkeypatch.setattr("smartlab.core.config.load_config", fault)
    code, said = say("config", "tiny")
    assert (
        code == 1 and said.count("\n") == 1 and "LookupError: first line second line (at cli/app.py:" in said
    )
    monkeypatch.setenv("SMARTLAB_TRACEBACK", "1")
    monkeypatch.setattr(sys, "argv", ["smartlab", "config", "tiny"])
    with pytest.raises(LookupError):
        cli.main()


def test_a_broken_pipe_that_is_not_the_readers_is_told(say, monkeypatch):
    def broken(*given, **more):
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr("smartlab.core.config.load_config", broken)
    code, said = say("config", "tiny")
    assert code == 1 and "Broken pipe (at cli/app.py" in said


def test_a_store_is_verified_volume_by_volume(tmp_path, say):
    sl.build_store(
        make_cohort(tmp_path / "raw", 2), tmp_path / "raw", tmp_path / "s", workers=0, progress=False
    )
    assert say("data", "verify", "--store", tmp_path / "s", "--json") == (0, "")
    volume = sorted((tmp_path / "s" / "volumes").glob("*.labels.b2nd"))[0]
    content = bytearray(volume.read_bytes())
    content[len(content) // 2] ^= 1
    volume.write_bytes(content)
    damaged, _ = say("data", "verify", "--store", tmp_path / "s", "--json")
    assert damaged == 1 and sl.open_store(tmp_path / "s").verify() == [f"volumes/{volume.name}"]
    code, said = say("data", "verify", tmp_path / "raw", "--store", tmp_path / "s")
    assert code == 2 and "ive one of them" in said


# ---- the records of a batch


def record(folder, key, state=records.DONE, **settings):
    folder.mkdir(parents=True)
    facts = {"step": "toy", "key": key, "identity": key, "state": state, "settings": settings, "seconds": 1.0}
    records.write(folder, facts | {"upstream": {}, "error": ""})
    (folder / "result.json").write_text(json.dumps({"metrics": {"score": 1.0}}))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"key": "b"}', b"\xff"])
def test_one_damaged_record_hides_no_other_run_and_is_named(tmp_path, content):
    record(tmp_path / "toy" / "a-1", "a", x=1)
    record(tmp_path / "toy" / "b-2", "b", x=2)
    (tmp_path / "toy" / "b-2" / "run.json").write_bytes(content)
    with pytest.warns(UserWarning, match=r"b-2/run\.json: .*not done"):
        assert list(records.survey(tmp_path)) == ["a"]
    with pytest.warns(UserWarning, match="not done"):
        assert list(sl.load_results(tmp_path).x) == [1]


@pytest.mark.parametrize("content", [None, "", '{"metrics": {"sc', "[]", '{"metrics": 3}'])
def test_a_run_whose_result_is_gone_or_damaged_is_named_and_not_done(tmp_path, content):
    record(tmp_path / "toy" / "a-1", "a", x=1)
    record(tmp_path / "toy" / "b-2", "b", x=2)
    (tmp_path / "toy" / "b-2" / "result.json").unlink()
    if content is not None:
        (tmp_path / "toy" / "b-2" / "result.json").write_text(content)
    with pytest.warns(UserWarning, match=r"b-2: its result\.json is gone or damaged"):
        found = records.survey(tmp_path)
        assert list(sl.load_results(tmp_path).x) == [1]
    assert {key: row["state"] for key, (_, row) in found.items()} == {"a": "done", "b": "running"}


def test_words_of_a_plan_stay_in_their_cell_and_are_no_html(tmp_path):
    from smartlab.batch.report import write_report

    for number, word in enumerate(["a|b", "<script>alert(1)</script>", "two\nlines", "{{braces}}"]):
        record(tmp_path / "toy" / f"r-{number}", str(number), word=word)
    page = write_report(tmp_path).read_text(encoding="utf-8")
    table = sl.load_results(tmp_path)
    assert sorted(table.word) == ["<script>alert(1)</script>", "a|b", "two\nlines", "{braces}"]
    assert "a\\|b" in page and "<script>" not in page and "two lines" in page and "{braces}" in page
