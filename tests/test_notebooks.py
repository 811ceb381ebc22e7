"""Every notebook runs as shipped, is clean in git, takes every parameter, and stops at once at a wrong one.

The ordered notebooks run twice through `run_demo`, as shipped and with every parameter changed; the tour once.
"""

from __future__ import annotations

import base64
import html
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from papermill.exceptions import PapermillExecutionError
from pydantic import Field

from smartlab import UseError
from smartlab.batch.notebooks import declared, notebook_parameters
from smartlab.cli.demo import run_demo
from smartlab.masking import STRATEGIES
from smartlab.notebook import AtLeast, Folder, NotebookParameters, Part, parameters
from smartlab.notebook_files import main, problems
from tests.conftest import REPO

NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
STEMS = [path.stem for path in NOTEBOOKS]
TOUR = sorted((REPO / "notebooks" / "tour").glob("*.ipynb"))
PLANNED = sorted((REPO / "notebooks" / "plans").glob("*.ipynb"))

# every parameter but `out`, each with another value than the notebook's own
CHANGED: dict[str, dict] = {
    "00_start_here": {"patients": 1, "seed": 3, "workers": 0},
    "01_data": {
        "patients": 2,
        "spacing": 4.0,
        "region": 48,
        "view": 32,
        "workers": 1,
        "seed": 1,
        "break_one": False,
    },
    "02_pretrain": {
        "preset": "small.yaml",
        "method": "smit",
        "strategy": "block",
        "extra": "mask.ratio=0.6",
        "steps": 3,
        "batch": 1,
        "workers": 0,
        "seed": 1,
        "resume": False,
    },
    "03_masks_and_attention": {
        "case": 2,
        "view": 32,
        "ratio": 0.5,
        "crops": 2,
        "noise": 0.2,
        "scans": 2,
        "split": "train",
        "workers": 1,
        "seed": 1,
    },
    "04_linear_probe": {
        "label": "margin",
        "pooling": "cls",
        "split": "folds",
        "folds": 2,
        "neighbours": 3,
        "draws": 21,
        "workers": 1,
        "seed": 1,
    },
    "05_organ_clusters": {
        "scans": 3,
        "split": "train",
        "segmented": 3,
        "pooling": "stages",
        "crop": 32,
        "neighbours": 5,
        "workers": 1,
        "seed": 1,
    },
    "06_finetune": {
        "label": "",
        "folds": 3,
        "classify_steps": 2,
        "classify_size": 64,
        "organs": "spleen",
        "segment_modes": "scratch",
        "segment_steps": 1,
        "segment_size": 96,
        "segment_lr": 0.002,
        "batch": 2,
        "resume": False,
        "workers": 1,
        "seed": 1,
    },
    "07_localize": {
        "scans": 2,
        "held_out": True,
        "regions": "organs",
        "quantile": 0.9,
        "workers": 1,
        "seed": 1,
    },
}
CHANGED |= {
    "08_mammography": {
        "patients": 8,
        "method": "mae",
        "spacing": 0.5,
        "steps": 3,
        "ratio": 0.5,
        "margin": 0.25,
        "lesion": 1,
        "folds": 2,
        "largest": 16,
        "workers": 1,
        "seed": 1,
    },
    "09_ablations": {"workers": 1, "seed": 2},
}
COMMON = {"encoder", "data", "root", "patients"}  # set below, for all notebooks that have them
ELSEWHERE = {  # tests of their own
    "02_pretrain": {"processes", "attach", "attach_seconds"},
    "08_mammography": {"preset"},
    "09_ablations": {"results", "plan", "metric", "step"},
}
NO_CT = {"08_mammography", "09_ablations"}  # not for the cohort and the encoder of the others
REGIONS = ("body", "organ", "lesion")
PLOTTED: dict[str, list[str]] = {  # numbers that a notebook's pictures show, by the name they have as metrics
    "02_pretrain": [
        *("loss_amip", "loss_ampd", "loss_itd", "loss_gitd", "grad_norm"),
        *("attention_informativeness", "head_diversity", "feature_std"),
    ],
    "03_masks_and_attention": [
        *(f"hidden {region}, {name}" for region in REGIONS for name in STRATEGIES),
        *(
            f"{who}{what}"
            for who in ("", "noisy ", "random ")
            for what in ("cosine", "reach distance:stage 4")
        ),
    ],
    "04_linear_probe": [
        *(f"{task} {of}auc" for task in ("probe", "knn") for of in ("", "size/", "random encoder/")),
        *("probe random encoder/brier", "fewshot auc@1", "fewshot size/balanced_accuracy@2"),
    ],
    "05_organ_clusters": [
        "umap/ratio",
        "pca/ratio",
        "dice:liver",
        "dice:intensity",
        "dice:random",
        "ceiling",
    ],
    "06_finetune": ["classify auc", "classify auc (scratch)", "segment dice", "segment dice:liver"],
    "07_localize": [f"liver/{m}{s}" for m in ("lift", "pointing", "auc") for s in ("", ":random", ":centre")],
    "08_mammography": [
        *("pathology auc", "pathology random encoder/auc", "mass_margins balanced_accuracy"),
        *("loss_scale_1", "loss_scale_2", "ms of softmax, 64 tokens"),
    ],
    "09_ablations": ["error_hu of strategy random, ratio 0.4", "error_hu of strategy block, ratio 0.7"],
}
WRONG = {  # values of the right type that make no sense
    "00_start_here": {"patients": 0},
    "01_data": {"spacing": -1.0, "region": 16},
    "02_pretrain": {"steps": 0, "method": "smartt", "strategy": "atention_high", "preset": "tinny"},
    "03_masks_and_attention": {"ratio": 1.5, "view": 40},
    "04_linear_probe": {"label": "malignity", "split": "crossed", "draws": 3, "pooling": "clss"},
    "05_organ_clusters": {"segmented": 1, "pooling": "mean"},
    "06_finetune": {
        "label": "malignity",
        "organs": "liver,lever",
        "classify_size": 30,
        "segment_modes": "ful",
    },
    "07_localize": {"quantile": 1.0, "regions": ""},
}


# ---- in git


@pytest.mark.parametrize("path", NOTEBOOKS + TOUR, ids=lambda path: path.stem)
def test_a_notebook_is_clean_in_git(path):
    assert problems(path) == []
    cells = nbformat.read(path, as_version=4).cells
    assert cells[0].source.startswith("# "), "a title first"
    assert re.search(r"You will .+\. .+\.", cells[0].source, re.S), "two sentences on what you will learn"
    kinds = [c for c in cells if c.cell_type == "code"]
    assert "parameters" in kinds[0].metadata.get("tags", [])
    assert "\np = parameters(globals())\n" in kinds[1].source + "\n", "one line reads and checks them"
    assert "class " not in kinds[1].source, "what a parameter may be stands once, beside its value"
    assert "finish(" in cells[-1].source, "the last cell writes result.json"
    assert "**What to see.**" in "".join(c.source for c in cells) or path.stem.startswith("0") is False
    assert "**Try next.**" in "".join(c.source for c in cells) or path in TOUR


@pytest.mark.parametrize("path", NOTEBOOKS + TOUR + PLANNED, ids=lambda path: path.stem)
def test_what_shows_a_scan_shows_it_in_the_viewer_too(path):
    """Slices in a picture stand still; one can turn those of the viewer, and read off them."""
    code = "\n".join(c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code")
    still = re.search(r"slice_of|draw_slice|gallery\(|\.imshow\(hu|reconstruct\(", code)
    assert not still or re.search(r"sl\.(view|explore)\(", code), f"{still[0]} and no viewer"


def test_cleaning_takes_outputs_away_and_numbers_the_cells(tmp_path, capsys):
    book = nbformat.v4.new_notebook()
    code = nbformat.v4.new_code_cell("x = 1\nx", execution_count=7, metadata={"tags": ["parameters"]})
    code.outputs = [nbformat.v4.new_output("stream", text="secret")]
    code.metadata["collapsed"] = True
    book.cells = [nbformat.v4.new_markdown_cell("# T"), code]
    path = tmp_path / "42_x.ipynb"
    nbformat.write(book, path)
    assert main([str(path), "--check"]) == 1 and "has outputs" in capsys.readouterr().err
    assert main([str(path)]) == 0
    after = nbformat.read(path, as_version=4)
    assert [c.id for c in after.cells] == ["42-00", "42-01"]
    assert after.cells[1].source == "x = 1\nx" and after.cells[1].metadata == {"tags": ["parameters"]}
    assert "secret" not in path.read_text() and main([str(path), "--check"]) == 0


# ---- as shipped


@pytest.mark.slow
def test_the_notebooks_run_as_shipped(tmp_path, monkeypatch, capfd):
    """Each leaves a small file with pictures, a result, and a static picture beside every widget."""
    monkeypatch.setenv("SMARTLAB_CACHE", str(tmp_path / "cache"))
    result = run_demo(tmp_path / "demo", everything=True)
    assert result.ok, result.table()
    said = capfd.readouterr()
    assert not said.err and "ERROR" not in said.out and "Warning" not in said.out, "no stray line"
    for path in NOTEBOOKS:
        folder = tmp_path / "demo" / path.stem
        assert (folder / "notebook.ipynb").stat().st_size < 2_000_000
        written = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert written["smoke"] and written["code"] and written["headline"]
        pictures = [folder / figure for figure in written["figures"]]
        assert pictures and all(p.stat().st_size > 5000 for p in pictures)
        missing = [name for name in PLOTTED.get(path.stem, []) if name not in written["metrics"]]
        assert not missing, f"{path.stem}: plotted and not among its results"
        check_outputs(folder / "notebook.ipynb")
        page = (folder / "notebook.html").read_text(encoding="utf-8")
        assert 'data-mime-type="application/vnd.jupyter.stderr"' not in page


@pytest.mark.slow
def test_a_notebook_runs_under_nbmake(tmp_path, monkeypatch):
    """In a fresh kernel, as `pytest --nbmake notebooks` would."""
    monkeypatch.setenv("SMARTLAB_CACHE", str(tmp_path / "cache"))
    executed = shutil.copy(NOTEBOOKS[0], tmp_path / NOTEBOOKS[0].name)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "-p", "no:cacheprovider"]
    command += ["--nbmake", "--overwrite", "--nbmake-timeout=900", "--rootdir", str(tmp_path), str(executed)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "1 passed" in done.stdout, done.stdout[-6000:]
    check_outputs(executed)


@pytest.mark.slow
def test_the_tour_shows_what_is_far_from_chance(tmp_path, monkeypatch):
    """Every headline stands beside a baseline that its interval excludes, every picture has its caption."""
    monkeypatch.setenv("SMARTLAB_CACHE", str(tmp_path / "cache"))
    result = run_demo(tmp_path / "demo", progress=False)
    assert result.ok and [step.name for step in result.steps] == [path.stem for path in TOUR], result.table()
    page = result.page.read_text(encoding="utf-8")
    assert "refresh" not in page, "a finished page stands still"
    metrics = {}
    for step in result.steps:
        assert step.headline in html.unescape(page) and step.figures and all(step.captions), step.name
        written = json.loads((result.out / step.name / "result.json").read_text(encoding="utf-8"))
        metrics[step.name] = written["metrics"]
    masks, drawn, dice, organs, attention, ablation = metrics.values()
    assert masks["attention_high lesion"]["low"] > 0.75 > masks["random lesion"]["high"]
    errors = list(drawn.values())
    assert errors[-2]["high"] < errors[-1]["low"], "better than the nearest visible voxel"
    assert dice["dice"]["low"] > 0.6 and "dice (scratch, 100%)" in dice
    ours, _, grey, gain = organs.values()
    assert ours["low"] > grey["high"] and gain["low"] > 0.03
    ours, theirs = (attention[f"attention on borders, {n}"] for n in ("pretrained", "random weights"))
    assert ours["low"] > theirs["high"] > 1
    assert ablation["4 voxels, 70% hidden"]["high"] < ablation["16 voxels, 70% hidden"]["low"]


def check_outputs(executed: Path) -> None:
    """No error text, no flood, and every widget has its static picture in the same cell."""
    for cell in nbformat.read(executed, as_version=4).cells:
        if cell.cell_type != "code":
            continue
        data = [o.data for o in cell.outputs if "data" in o]
        widgets = [d for d in data if "application/vnd.jupyter.widget-view+json" in d]
        stills = [d for d in data if 'src="data:image/png;base64,' in str(d.get("text/html", ""))]
        viewers = [w for w in widgets if re.match(r"\w*(Viewer|Explorer)\(", w["text/plain"])]
        assert len(stills) >= len(viewers), f"{executed.name} {cell.id}: a widget without a static picture"
        assert len(viewers) == len([w for w in widgets if "%|" not in w["text/plain"]]), "else only progress"
        said = "".join(o.get("text", "") for o in cell.outputs if o.output_type == "stream")
        assert len(said) < 8000, f"{executed.name} {cell.id}: a flood of text"
        assert "Traceback" not in said and "Warning:" not in said, f"{executed.name} {cell.id}: {said[-600:]}"
        for still in stills:
            encoded = re.search(r"base64,([^\"']+)", still["text/html"])
            assert encoded and base64.b64decode(encoded[1])[:4] == b"\x89PNG"


# ---- with other parameters


def test_every_parameter_is_changed_somewhere():
    for path in NOTEBOOKS:
        known = notebook_parameters(path)
        changed = CHANGED[path.stem]
        assert set(known) - COMMON - {"out"} - ELSEWHERE.get(path.stem, set()) == set(changed) - COMMON, path
        assert all(known[name] != value for name, value in changed.items()), path.stem


@pytest.mark.slow
def test_the_demo_runs_every_notebook_with_every_parameter_changed(tmp_path, monkeypatch):
    """On a cohort given as one's own would be: a manifest's path, its root, and an encoder's run folder."""
    import smartlab as sl

    monkeypatch.setenv("SMARTLAB_CACHE", str(tmp_path / "cache"))
    data, plans = tmp_path / "own", REPO / "notebooks" / "plans"
    made = sl.make_phantom("ct", data, n=8, shape=(120, 120, 120), workers=0, progress=False)
    parts = dict(zip(made.patients, ["train"] * 5 + ["val"] + ["test"] * 2, strict=True))
    cases = [case.model_copy(update={"split": parts[case.patient]}) for case in made.cases]
    source = made.source.model_copy(update={"kind": "local"})
    own = made.model_copy(update={"source": source, "all_cases": cases})
    own.save(data / "own.json")
    small = {"encoder.embed_dim": 12, "data.view": 32, "data.region": 48, "train.batch": 1, "train.steps": 2}
    small |= {"data.workers": 0, "data.manifest": str(data / "own.json"), "data.root": str(data)}
    config = sl.load_config("tiny", small)
    sl.pretrain(config, tmp_path / "run", progress=False)
    (tmp_path / "small.yaml").write_text((tmp_path / "run" / "config.yaml").read_text(encoding="utf-8"))
    common = {"encoder": str(tmp_path / "run"), "data": str(data / "own.json"), "root": str(data)}
    given = {}
    for path in NOTEBOOKS:
        known, changed = notebook_parameters(path), dict(CHANGED[path.stem])
        if path.stem not in NO_CT:
            changed = {k: v for k, v in (common | {"patients": 8}).items() if k in known} | changed
        if "preset" in changed:
            changed["preset"] = str(tmp_path / changed["preset"])
        given[path.stem] = changed
    plan = yaml.safe_load((plans / "neighbours.yaml").read_text(encoding="utf-8")) | {
        "grid": {"ratio": [0.5, 0.6]}
    }
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(plan), encoding="utf-8")
    shutil.copy(plans / "neighbours.ipynb", tmp_path)
    given["09_ablations"]["plan"] = str(tmp_path / "own.yaml")
    result = run_demo(tmp_path / "demo", everything=True, progress=False, parameters=given)
    assert result.ok, result.table()
    assert [s.name for s in result.steps] == STEMS
    index = (tmp_path / "demo" / "index.html").read_text(encoding="utf-8")
    for step in result.steps:
        folder = tmp_path / "demo" / step.name
        assert f"{step.name}/notebook.html" in index and (folder / "notebook.html").exists()
        assert (folder / "notebook.ipynb").stat().st_size < 2_000_000
        written = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert {k: written["parameters"][k] for k in given[step.name]} == given[step.name]
        assert step.figures and step.headline in result.table()


@pytest.mark.parametrize("path", [*NOTEBOOKS, *TOUR, *PLANNED], ids=lambda path: path.stem)
def test_parameters_are_the_same_to_the_notebook_to_plans_and_to_papermill(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    read, planned = type(run_cells(path, {"out": "fine"})["p"]), declared(path)
    assert {n: (f.annotation, f.metadata) for n, f in read.model_fields.items()} == {
        n: (f.annotation, f.metadata) for n, f in planned.model_fields.items()
    }
    shown = papermill.inspect_notebook(path)
    assert set(shown) == set(planned.model_fields), "`papermill --help-notebook` shows them all, and no other"
    assert all(one["inferred_type_name"] != "None" for one in shown.values())
    planned.model_validate({n: f.default for n, f in planned.model_fields.items()})


def run_cells(path: Path, changed: dict) -> dict:
    """The parameters cell, other values after it, and the validation cell, as a kernel would run them."""
    code = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    namespace: dict = {"__name__": "__main__"}
    exec(compile(code[0], "parameters", "exec", dont_inherit=True), namespace)
    namespace.update(changed)
    exec(compile(code[1], "validation", "exec", dont_inherit=True), namespace)
    return namespace


@pytest.mark.parametrize("path", NOTEBOOKS, ids=STEMS)
def test_a_wrong_parameter_stops_at_the_validation_cell_and_is_named(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    known = notebook_parameters(path)
    run_cells(path, {"out": str(tmp_path / "fine")})
    for name in known:
        with pytest.raises(UseError, match=f"unknown notebook parameter '{name}x'.*mean '{name}'"):
            run_cells(path, {f"{name}x": 1})
        with pytest.raises(UseError, match=f"notebook parameter '{name}'"):
            run_cells(path, {name: [1]})
    for name, value in WRONG.get(path.stem, {}).items():
        with pytest.raises(UseError, match=f"{name}.*{re.escape(str(value).split(',')[-1])}"):
            run_cells(path, {name: value})
    assert not list(tmp_path.iterdir()), "nothing was begun"


@pytest.mark.slow
def test_a_misspelt_parameter_stops_papermill_before_any_work(tmp_path):
    with pytest.raises(PapermillExecutionError, match="unknown notebook parameter 'patient'"):
        papermill.execute_notebook(
            NOTEBOOKS[0],
            tmp_path / "o.ipynb",
            {"patient": 1, "out": str(tmp_path / "x")},
            progress_bar=False,
            kernel_name="python3",
        )
    assert not (tmp_path / "x").exists()


def test_ctrl_c_ends_the_demo_and_its_kernels(tmp_path):
    """At once, with one line and the page in place."""
    language = {"language_info": {"name": "python"}}
    book = nbformat.v4.new_notebook(metadata=language)
    body = f"import os, pathlib, time\npathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\ntime.sleep(100)"
    book.cells = [nbformat.v4.new_markdown_cell("# Long"), nbformat.v4.new_code_cell(body)]
    nbformat.write(book, tmp_path / "00_long.ipynb")
    code = (
        "import pathlib, sys, smartlab.cli.demo as demo; from smartlab.cli.app import main\n"
        f"demo.notebook_folder = lambda: pathlib.Path({str(tmp_path)!r}); demo._draw_phantoms = lambda *a: {{}}\n"
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background\n"
        "sys.argv = ['smartlab', 'demo', '--all', '--out', sys.argv[1]]; main()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "out")], stderr=subprocess.PIPE, text=True, cwd=REPO
    )
    end = time.monotonic() + 120
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text(encoding="utf-8"):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130 and "stopped" in said and "Traceback" not in said
    assert (tmp_path / "out" / "index.html").exists()
    kernel = int((tmp_path / "pid").read_text(encoding="utf-8"))
    while time.monotonic() < end and Path(f"/proc/{kernel}").exists():
        time.sleep(0.1)
    assert not Path(f"/proc/{kernel}").exists()


class Toy(NotebookParameters):
    patients: int = Field(ge=1)
    out: str


TOY = {"patients": AtLeast[1], "split": Part, "out": Folder}


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"patients": 1, "out": "x", "patient": 2}, "unknown notebook parameter 'patient'.*patients"),
        ({"patients": "many", "out": "x"}, "'patients'.*'many'"),
        ({"patients": 0, "out": "x"}, "'patients'.*greater than"),
        ({"patients": True, "out": "x"}, "'patients'.*True"),
        ({"patients": 1}, "'out'"),
    ],
)
def test_wrong_parameters_are_named(given, hint):
    with pytest.raises(UseError, match=hint):
        Toy.read(given)
    cell = {"patients": 1, "split": "", "out": "x", "__annotations__": TOY}
    with pytest.raises(UseError, match=hint):
        parameters(cell | given | ({"out": 1} if "out" not in given else {}))


def test_a_parameter_without_a_type_is_told_how_to_get_one():
    with pytest.raises(
        UseError, match=r"unknown notebook parameter 'depth'.*its type in the tagged cell: depth: int = 3"
    ):
        parameters({"patients": 1, "split": "", "out": "x", "__annotations__": TOY, "depth": 3})


def test_a_word_without_its_number_is_told_how_it_is_written():
    with pytest.raises(UseError, match=r"cannot be checked.*AtLeast.*such as AtLeast\[2\]"):
        parameters({"patients": 1, "__annotations__": {"patients": AtLeast}})


def test_what_a_notebook_annotates_later_is_no_parameter():
    later = {"table": dict[str, list], "volume": Path}
    p = parameters(
        {"patients": 1, "split": "val", "out": "x", "volume": Path(), "__annotations__": TOY | later}
    )
    assert (p.patients, p.split, p.out) == (1, "val", Path("x"))


def test_a_changed_parameter_is_read_again_in_the_same_kernel():
    """Beside whatever the notebook has made since, and with the same checks."""
    kernel = {"patients": 1, "split": "", "out": "x", "__annotations__": TOY}
    parameters(kernel)
    kernel |= {"which": "an encoder", "ratios": [0.5], "patients": 3}
    assert parameters(kernel).patients == 3
    for name, value in (("patients", 0), ("split", "trian"), ("out", 3), ("split", Path())):
        with pytest.raises(UseError, match=f"notebook parameter '{name}'"):
            parameters(kernel | {name: value})


def test_modules_and_private_names_are_not_parameters():
    assert Toy.read({"patients": 1, "out": "x", "_ih": [], "In": [], "json": json}).patients == 1


def test_a_failing_notebook_is_reported_and_does_not_stop_the_others(tmp_path, monkeypatch):
    language = {"language_info": {"name": "python"}}
    book = nbformat.v4.new_notebook(metadata=language)
    book.cells = [nbformat.v4.new_markdown_cell("# Broken"), nbformat.v4.new_code_cell("1 / 0")]
    good = nbformat.v4.new_notebook(metadata=language)
    good.cells = [
        nbformat.v4.new_markdown_cell("# Good"),
        nbformat.v4.new_code_cell("out = ''", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "import json, pathlib\npathlib.Path(out, 'result.json').write_text(json.dumps({'headline': 'fine', 'figures': []}))"
        ),
    ]
    nbformat.write(book, tmp_path / "00_broken.ipynb")
    nbformat.write(good, tmp_path / "01_good.ipynb")
    monkeypatch.setattr("smartlab.cli.demo.notebook_folder", lambda: tmp_path)
    result = run_demo(tmp_path / "out", everything=True, progress=False)
    assert not result.ok
    assert "ZeroDivisionError" in result.steps[0].problem and result.steps[1].headline == "fine"
    assert "ZeroDivisionError" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
