"""Every notebook runs as shipped, is clean in git, and stops at once at a wrong parameter."""

from __future__ import annotations

import json

import nbformat
import papermill
import pytest
from papermill.exceptions import PapermillExecutionError
from pydantic import Field

from smartlab import UseError
from smartlab.demo import run_demo
from smartlab.notebook import NotebookParameters
from tests.conftest import REPO

NOTEBOOKS = sorted((REPO / "notebooks").glob("*.ipynb"))
SOME = {
    "00_start_here": {"patients": 1, "seed": 3},
    "01_data": {
        "patients": 2,
        "spacing": 4.0,
        "region": 48,
        "view": 32,
        "workers": 0,
        "seed": 1,
        "break_one": False,
    },
    "02_pretrain": {
        "preset": "tiny",
        "method": "smit",
        "strategy": "block",
        "patients": 3,
        "steps": 3,
        "batch": 1,
        "seed": 1,
        "resume": False,
    },
}


def code_cells(path):
    return [c for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_is_clean_in_git(path):
    nbformat.validate(nbformat.read(path, as_version=4))
    cells = nbformat.read(path, as_version=4).cells
    assert all(not c.outputs and c.execution_count is None for c in code_cells(path))
    assert [c.id for c in cells] == [f"{path.name[:2]}-{i:02d}" for i in range(len(cells))]
    assert sum("parameters" in c.metadata.get("tags", []) for c in cells) == 1
    assert cells[0].source.startswith("# ") and path.stat().st_size < 60_000
    assert "finish(" in cells[-1].source, "the last cell writes result.json"


@pytest.mark.slow
def test_the_demo_runs_every_notebook_and_gathers_results(tmp_path):
    result = run_demo(tmp_path, progress=False)
    assert result.ok, result.table()
    assert [s.name for s in result.steps] == [p.stem for p in NOTEBOOKS]
    index = (tmp_path / "index.html").read_text(encoding="utf-8")
    for step in result.steps:
        folder = tmp_path / step.name
        assert f"{step.name}/notebook.html" in index and (folder / "notebook.html").exists()
        assert (folder / "notebook.ipynb").stat().st_size < 2_000_000
        written = json.loads((folder / "result.json").read_text(encoding="utf-8"))
        assert written["smoke"] and written["code"] and written["figures"]
        assert step.figures and all(f.stat().st_size > 5000 for f in step.figures)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_every_parameter_can_be_changed(path, tmp_path):
    changed = SOME[path.stem] | {"out": str(tmp_path / "x")}
    papermill.execute_notebook(path, tmp_path / "o.ipynb", changed, progress_bar=False, kernel_name="python3")
    assert (
        json.loads((tmp_path / "x" / "result.json").read_text(encoding="utf-8"))["parameters"]["seed"]
        == changed["seed"]
    )


@pytest.mark.slow
def test_a_misspelt_parameter_stops_the_notebook_before_any_work(tmp_path):
    with pytest.raises(PapermillExecutionError, match="unknown notebook parameter 'patient'"):
        papermill.execute_notebook(
            NOTEBOOKS[0],
            tmp_path / "o.ipynb",
            {"patient": 1, "out": str(tmp_path / "x")},
            progress_bar=False,
            kernel_name="python3",
        )
    assert not (tmp_path / "x").exists()


class Toy(NotebookParameters):
    patients: int = Field(ge=1)
    out: str


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        ({"patients": 1, "out": "x", "patient": 2}, "unknown notebook parameter 'patient'.*patients"),
        ({"patients": "many", "out": "x"}, "'patients'.*'many'"),
        ({"patients": 0, "out": "x"}, "'patients'.*greater than"),
        ({"patients": 1}, "'out'"),
    ],
)
def test_wrong_parameters_are_named(given, hint):
    with pytest.raises(UseError, match=hint):
        Toy.read(given)


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
    monkeypatch.setattr("smartlab.demo.notebook_folder", lambda: tmp_path)
    result = run_demo(tmp_path / "out", progress=False)
    assert not result.ok
    assert "ZeroDivisionError" in result.steps[0].problem and result.steps[1].headline == "fine"
    assert "ZeroDivisionError" in (tmp_path / "out" / "index.html").read_text(encoding="utf-8")
