"""Plans: what they stand for, and that a mistake is named before anything runs."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from smartlab import UseError, load_config
from smartlab.batch import dry_run, expand, load_plan, shipped_plans
from smartlab.batch.summary import describe
from smartlab.core.config import parse_overrides
from smartlab.notebook import parameters
from tests.batch.toys import toy_notebook, write_plan


def points(plan):
    return [tuple(c.values()) for c in plan.combinations]


def test_grid_pairs_lists_and_seeds_multiply_and_exclusions_take_away(tmp_path):
    path = write_plan(
        tmp_path,
        grid={"x": [1, 2]},
        paired={"kind": ["a", "b"], "rate": [0.1, 0.2]},
        list=[{"wait": 0.0}, {"wait": 1.0, "fail": "1a0"}],
        seeds=3,
        exclude=[{"x": 2, "kind": "b"}, {"wait": 1.0, "seed": [1, 2]}],
    )
    plan = load_plan(path)
    kept = {(c["x"], c["kind"], c["wait"], c["seed"]) for c in plan.combinations}
    # 24 combinations; 6 fall to the first rule; of the 18 left, 9 wait, and two thirds of those fall
    assert len(kept) == len(plan.combinations) == 24 - 6 - 6
    assert all({"a": 0.1, "b": 0.2}[c["kind"]] == c["rate"] for c in plan.combinations)
    assert not any(c["x"] == 2 and c["kind"] == "b" for c in plan.combinations)
    assert all(c["seed"] == 0 for c in plan.combinations if c["wait"] == 1.0)


def test_the_same_work_is_one_run_whatever_plan_or_spelling_asks_for_it(tmp_path):
    a = expand(load_plan(write_plan(tmp_path, "a", grid={"x": [0, 1]})))
    b = expand(load_plan(write_plan(tmp_path, "b", parameters={"rate": 0.5}, list=[{"x": 1, "kind": "a"}])))
    assert b[0].key == a[1].key, "a default written out is the same run"
    c = expand(load_plan(write_plan(tmp_path, "c", parameters={"rate": 0.6}, grid={"x": [1]})))
    assert c[0].key != a[1].key


def test_another_source_notebook_or_data_is_another_run(tmp_path):
    path = write_plan(tmp_path, parameters={"base": str(tmp_path / "d" / "in.txt")}, grid={"x": [0]})
    (tmp_path / "d").mkdir()
    keys = []

    def key(**more):

        keys.append(expand(load_plan(path), **more)[0].key)

    key()
    key(code="other")
    (tmp_path / "d" / "in.txt").write_text("data")
    key()
    (tmp_path / "d" / "in.txt").write_text("dataset")
    key()
    with (tmp_path / "d" / "in.txt").open("wb") as large:  # too large to be read: its time tells
        large.truncate(2**24)
    key()
    os.utime(tmp_path / "d" / "in.txt", (1, 1))
    key()
    toy_notebook(tmp_path, "y = 1")
    key()
    assert len(set(keys)) == 7
    key()
    assert keys[-1] == keys[-2]


def test_evaluations_share_their_pretraining(tmp_path):
    steps = [
        {"name": "pretrain", "notebook": "toy.ipynb"},
        {"name": "probe", "notebook": "toy.ipynb", "parameters": {"base": "{pretrain}", "wait": 0.1}},
        {"name": "heads", "notebook": "toy.ipynb", "parameters": {"base": "{pretrain}", "wait": 0.2}},
    ]
    path = write_plan(tmp_path, steps=steps, grid={"pretrain.x": [1, 2], "probe.rate": [0.1, 0.2, 0.3]})
    runs = expand(load_plan(path))
    assert [sum(r.step == s for r in runs) for s in ("pretrain", "probe", "heads")] == [2, 6, 2]
    assert all(list(r.upstream) == ["pretrain"] for r in runs if r.step != "pretrain")


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ({"gird": {"x": [1]}}, "unknown key 'gird'.*id you mean 'grid'"),
        ({"grid": {"kinds": ["a"]}}, "no parameter 'kinds'.*id you mean 'kind'"),
        ({"grid": {"x": ["many"]}}, "toy.x has the wrong type.*'many'.*int"),
        ({"grid": {"rate": ["1e-4"]}}, "toy.rate has the wrong type.*1.0e-4"),
        ({"grid": {"x": []}}, "no values"),
        ({"grid": {"x": [1]}, "parameters": {"x": 2}}, "both fixed and varied"),
        ({"grid": {"x": [1]}, "list": [{"x": 2}]}, "'x' is varied twice"),
        ({"paired": {"x": [1, 2], "kind": ["a"]}}, "differ in length"),
        ({"grid": {"x": [1]}, "exclude": [{"x": 3}]}, "excludes nothing"),
        ({"grid": {"x": [1]}, "exclude": [{"x": 1}]}, "every combination is excluded"),
        ({"grid": {"x": [1]}, "exclude": [{"z": 1}]}, "no factor 'z'"),
        ({"parameters": {"out": "x"}}, "`out` is set by the batch"),
        ({"parameters": {"base": "{pretrian}/run"}}, "refers to {pretrian}"),
        ({"notebook": "toi.ipynb"}, "no notebook 'toi.ipynb'"),
        ({"resources": {"gpu": 1}}, "unknown key 'gpu' in resources.*id you mean 'gpus'"),
        ({"resources": {"minutes": -1}}, "resources.minutes.*greater than"),
        ({"seeds": "three"}, "seeds"),
    ],
)
def test_a_wrong_plan_is_one_clear_error(tmp_path, content, hint):
    with pytest.raises(UseError, match=hint):
        load_plan(write_plan(tmp_path, **content))


TYPED = """\
from typing import Annotated, Literal
from pydantic import Field
from smartlab.notebook import AtLeast, Folder, Multiple, Share
x: AtLeast[1] = 2
view: Multiple[32, 32] = 64
noise: Share = 0.5  # by a word of smartlab's
rate: Annotated[float, Field(gt=0, le=2)] = 0.5  # or as pydantic writes it
kind: Literal["a", "b"] = "a"
own: SomethingElse = 3  # a type that only the kernel knows: that of the default
seed = 0
out: Folder = "runs/x"
"""


@pytest.mark.parametrize(
    ("content", "hint"),
    [
        ({"parameters": {"noise": 1.5}}, r"p\.yaml: toy\.noise: .*less than 1 \(found 1\.5\)"),
        ({"grid": {"noise": [0.5, 1.5]}}, r"toy\.noise: .*less than 1 \(found 1\.5\)"),
        ({"list": [{"x": 2}, {"x": 0}]}, r"toy\.x: .*greater than or equal to 1 \(found 0\)"),
        ({"paired": {"x": [1, 2], "rate": [1, 3]}}, r"toy\.rate: .*less than or equal to 2 \(found 3\)"),
        ({"grid": {"toy.view": [64, 40]}}, r"toy\.view: .*multiple of 32 \(found 40\)"),
        ({"grid": {"kind": ["a", "c"]}}, r"toy\.kind: .*'a' or 'b' \(found 'c'\)"),
        ({"parameters": {"kind": "{word}"}, "grid": {"word": ["a", "c"]}}, r"toy\.kind: .*\(found 'c'\)"),
        ({"parameters": {"noise": "much"}}, r"toy\.noise has the wrong type \(found 'much'; expected float"),
        ({"parameters": {"x": True}}, r"toy\.x has the wrong type \(found True; expected int, such as 2"),
        ({"parameters": {"own": "many"}}, r"toy\.own has the wrong type \(found 'many'; expected int"),
        ({"parameters": {"nois": 0.5}}, "no parameter 'nois'.*id you mean 'noise'"),
    ],
)
def test_a_value_that_the_notebook_refuses_is_refused_by_the_plan(tmp_path, content, hint):
    toy_notebook(tmp_path, first=TYPED)
    fine = write_plan(
        tmp_path, parameters={"noise": 0.1, "rate": 2, "own": 4}, grid={"kind": ["b"], "view": [96]}
    )
    assert len(load_plan(fine).combinations) == 1
    with pytest.raises(UseError, match=hint):
        load_plan(write_plan(tmp_path, **content))


@pytest.mark.filterwarnings("error")
def test_any_name_is_a_good_name(tmp_path):
    """Also one that pydantic has for itself; a private name is none of a plan's."""
    toy_notebook(tmp_path, first="model_dim = 3\ncopy: int = 2\nread = 1.0\n_own = 4\nout = ''")
    plan = load_plan(write_plan(tmp_path, grid={"model_dim": [1, 2]}, parameters={"copy": 5, "read": 2}))
    assert plan.steps[0].known == {"model_dim": 3, "copy": 2, "read": 1.0, "out": ""}
    with pytest.raises(UseError, match=r"toy\.copy has the wrong type"):
        load_plan(write_plan(tmp_path, parameters={"copy": "x"}))
    cell = {"model_dim": 3, "copy": 2, "read": 1.0, "_own": 4}
    p = parameters(cell | {"__annotations__": {"model_dim": int, "copy": int, "read": float}})
    assert (p.model_dim, p.copy, p.read) == (3, 2, 1.0)


def test_a_text_made_of_an_earlier_run_waits_for_it(tmp_path):
    toy_notebook(tmp_path, first=TYPED)
    steps = [
        {"name": "a", "notebook": "toy.ipynb"},
        {"name": "b", "notebook": "toy.ipynb", "parameters": {"kind": "{a}"}},
    ]
    assert load_plan(write_plan(tmp_path, steps=steps)).steps[1].after == ("a",)
    steps[1]["parameters"] = {"noise": "{a}"}
    with pytest.raises(UseError, match=r"b\.noise has the wrong type"):
        load_plan(write_plan(tmp_path, steps=steps))


def test_a_notebook_without_parameters_tag_is_an_error(tmp_path):
    toy_notebook(tmp_path, tags=())
    with pytest.raises(UseError, match=r"exactly one cell tagged `parameters`.*found 0"):
        load_plan(write_plan(tmp_path))


def test_overrides_replace_fixed_values_factors_and_resources(tmp_path):
    path = write_plan(tmp_path, parameters={"wait": 1.0}, grid={"x": [1, 2], "kind": ["a", "b"]}, seeds=3)
    plan = load_plan(path, {"wait": 0.5, "x": 7, "kind": ["c"], "seeds": 1, "resources.gpus": 2})
    assert points(plan) == [(7, "c", 0)] and plan.steps[0].parameters == {"wait": 0.5}
    assert plan.steps[0].resources.gpus == 2
    with pytest.raises(UseError, match="id you mean 'wait'"):
        load_plan(path, {"wiat": 1})


def test_overrides_meet_exclusions_rows_and_what_a_step_holds_fixed(tmp_path):
    toy_notebook(tmp_path)
    steps = [{"name": "a", "notebook": "toy.ipynb", "parameters": {"rate": 0.5, "kind": "{word}"}}]
    rows = [{"word": "u"}, {"word": "v"}]
    rule = [{"x": 1, "wait": 2.0}]
    path = write_plan(tmp_path, steps=steps, list=rows, grid={"x": [1, 2], "wait": [1.0, 2.0]}, exclude=rule)
    assert len(load_plan(path).combinations) == 6
    assert len(load_plan(path, {"x": 2}).combinations) == 4, "nothing left to exclude"
    assert len(load_plan(path, {"a.rate": [0.1, 0.2], "x": 2}).combinations) == 8
    with pytest.raises(UseError, match="set row by row"):
        load_plan(path, {"word": "w"})
    lacking = write_plan(tmp_path, steps=steps, list=[{"word": "u"}, {"x": 2}])
    with pytest.raises(UseError, match=r"a\.kind takes in 'word', which some combinations lack"):
        load_plan(lacking)


def test_texts_take_in_factors_that_no_notebook_knows(tmp_path):
    steps = [
        {"name": "a", "notebook": "toy.ipynb", "parameters": {"kind": "drop={dropout} {{x}} {plan}"}},
        {"name": "b", "notebook": "toy.ipynb", "parameters": {"base": "{a}/run"}},
    ]
    runs = expand(load_plan(write_plan(tmp_path, steps=steps, grid={"dropout": [0.1, 0.3]})))
    assert [r.step for r in runs] == ["a", "b"] * 2
    from smartlab.batch.runs import resolve

    assert resolve(runs[0].parameters["kind"], {}) == f"drop=0.1 {{x}} {tmp_path}"
    assert runs[0].settings["dropout"] == 0.1 and "kind" not in runs[0].settings
    assert resolve(runs[1].parameters["base"], {"a": tmp_path}) == f"{tmp_path}/run"


def test_a_dry_run_names_every_run_and_writes_nothing(tmp_path):
    plan = load_plan(write_plan(tmp_path, grid={"x": [1, 2]}, seeds=2))
    listing = dry_run(plan, tmp_path / "out", workers=2)
    assert [r["run"].rsplit("-", 1)[0] for r in listing["runs"]] == [
        f"x-{x}_seed-{s}" for x in (1, 2) for s in (0, 1)
    ]
    assert listing["seconds"] == 4 * 120 / 2 and "at most 4 min" in describe(listing)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", shipped_plans())
def test_every_shipped_plan_fits_the_notebooks_as_they_are(name, tmp_path):
    plan = load_plan(name)
    runs = expand(plan)
    assert plan.title and plan.about and len(runs) > 3
    assert len({r.key for r in runs}) == len(runs)
    assert name in describe(dry_run(plan, tmp_path / name))
    for run in runs:  # and every pretraining has a configuration that holds together
        if run.notebook.stem == "02_pretrain":
            p = {**plan.steps[0].known, **run.parameters}
            chosen = {"method.preset": p["method"]} | (
                {"mask.strategy": p["strategy"]} if p["strategy"] else {}
            )
            load_config(p["preset"], chosen | parse_overrides(p["extra"].split()))


def test_the_command_line_refuses_a_misspelt_plan_and_lists_a_good_one(tmp_path):
    path = write_plan(tmp_path, grid={"x": [1, 2]})
    ask = [sys.executable, "-m", "smartlab", "batch"]
    good = subprocess.run(
        [*ask, str(path), "--dry-run", "--out", str(tmp_path / "o")], capture_output=True, text=True
    )
    assert good.returncode == 0 and "2 runs, 2 to do" in good.stdout, good.stderr
    bad = subprocess.run([*ask, "component", "--dry-run"], capture_output=True, text=True)
    assert bad.returncode == 2 and "id you mean" in bad.stderr and "Traceback" not in bad.stderr


def test_the_command_line_refuses_a_wrong_value_before_torch_is_imported():
    ask = [sys.executable, "-X", "importtime", "-m", "smartlab", "batch", "noise", "--dry-run"]
    done = subprocess.run([*ask, "attention.noise=1.5"], capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    said = r"noise\.yaml: attention\.noise: .*less than 1 \(found 1\.5\)"
    assert re.search(said, " ".join(done.stderr.splitlines()[-3:])), done.stderr[-600:]
    assert not re.search(r"\| +(torch|dask|papermill)$", done.stderr, re.M)
