"""`smartlab demo`: every notebook, in order, on the built-in phantoms.

Each notebook runs through papermill exactly as it is shipped, with only `out` changed (and what the
caller gives), and leaves its executed copy, an HTML page, its pictures and its `result.json` below the
demo folder. `index.html` links them. A failing notebook is reported and does not stop the others.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smartlab.errors import DataError, UseError


@dataclass
class Step:
    """One notebook of the demo."""

    name: str
    title: str
    about: str = ""  # what one learns, from its first cell
    seconds: float = 0.0
    headline: str = ""
    problem: str = ""
    figures: list[Path] = field(default_factory=list)


@dataclass
class DemoResult:
    out: Path
    steps: list[Step]

    @property
    def ok(self) -> bool:
        return all(not step.problem for step in self.steps)

    def table(self) -> str:
        """The results table that `make demo` ends with."""
        width = max(len(step.name) for step in self.steps)
        lines = ["", f"{'notebook':<{width}}  {'time':>6}  result"]
        for step in self.steps:
            outcome = f"FAILED: {step.problem}" if step.problem else step.headline
            lines.append(f"{step.name:<{width}}  {step.seconds:5.0f}s  {outcome}")
        pictures = sum(len(step.figures) for step in self.steps)
        lines += [
            "",
            "This is a small run on synthetic data: it shows that everything works, not how well.",
            f"{pictures} pictures and the executed notebooks, in {sum(s.seconds for s in self.steps) / 60:.1f} min: "
            f"{self.out / 'index.html'}",
        ]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        rows = [{**vars(s), "figures": [str(f) for f in s.figures]} for s in self.steps]
        return {"ok": self.ok, "index": str(self.out / "index.html"), "steps": rows}


def notebook_folder() -> Path:
    """The shipped notebooks: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent
    inside = package / "notebooks"
    return inside if inside.is_dir() else package.parent / "notebooks"


def run_demo(
    out: str | Path,
    *,
    only: str | None = None,
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
) -> DemoResult:
    """Run the notebooks (those whose name contains `only`) and write `out/index.html`.

    parameters: notebook name -> parameters other than its own, e.g. {"02_pretrain": {"steps": 200}}.
    """
    out = Path(out).resolve()
    notebooks = [p for p in sorted(notebook_folder().glob("[0-9][0-9]_*.ipynb")) if (only or "") in p.stem]
    if not notebooks:
        raise UseError(
            "no notebook to run", path=notebook_folder(), found=f"none whose name contains {only!r}"
        )
    out.mkdir(parents=True, exist_ok=True)
    steps = []
    for number, notebook in enumerate(notebooks, 1):
        if progress:
            print(f"[{number}/{len(notebooks)}] {notebook.stem} ", end="", flush=True)
        step = _run(notebook, out, dict((parameters or {}).get(notebook.stem, {})))
        steps.append(step)
        if progress:
            print(f"{'FAILED' if step.problem else 'done'} in {step.seconds:.0f} s", flush=True)
    result = DemoResult(out, steps)
    _write_index(result)
    return result


def _run(notebook: Path, out: Path, parameters: dict[str, Any]) -> Step:
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    folder = out / notebook.stem
    folder.mkdir(exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    first, _, about = nbformat.read(notebook, as_version=4).cells[0].source.partition("\n")
    step = Step(notebook.stem, first.lstrip("# ").strip(), " ".join(about.replace("*", "").split()))
    executed = folder / "notebook.ipynb"
    start = time.monotonic()
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters={**parameters, "out": str(folder)},
            kernel_name="python3",
            progress_bar=False,
            cwd=str(folder),
            extra_arguments=["--log-level=ERROR"],  # the kernel's own warnings would break the progress lines
        )
        step.headline, step.figures = _read_result(folder)
    except PapermillExecutionError as error:
        said = (error.evalue.splitlines() or [""])[0]
        step.problem = f"cell {error.exec_count}: {error.ename}: {said}"
    except Exception as error:  # a lost kernel must not stop the other notebooks
        step.problem = f"{type(error).__name__}: {error}"
    step.seconds = time.monotonic() - start
    if executed.is_file():
        _write_html(executed, folder / "notebook.html")
    return step


def _read_result(folder: Path) -> tuple[str, list[Path]]:
    path = folder / "result.json"
    if not path.is_file():
        raise DataError("the notebook ended without writing its result", path=path)
    result = json.loads(path.read_text(encoding="utf-8"))
    return result["headline"], [folder / figure for figure in result["figures"]]


def _write_html(executed: Path, page: Path) -> None:
    import nbformat
    from nbconvert import HTMLExporter

    with warnings.catch_warnings():  # figures of plotly come with a static picture, which is what is taken
        warnings.filterwarnings("ignore", message="Your element with mimetype")
        body, _ = HTMLExporter(template_name="lab").from_notebook_node(nbformat.read(executed, as_version=4))
    _replace(page, body)


def _thumbnail(figure: Path) -> str:
    """A small copy of a picture as a data URL, so that the index is quick to open."""
    from PIL import Image

    with Image.open(figure) as image:
        image.thumbnail((1100, 400))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>smartlab demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 2rem auto; padding: 0 1rem; color: #1a2530 }}
a {{ color: #0b5394 }} h1 {{ margin-bottom: 0 }} h2 {{ margin: 0 0 .2rem; font-size: 1.2rem }}
table {{ border-collapse: collapse; margin: 1rem 0; width: 100% }}
td, th {{ text-align: left; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid #d5dbe1; vertical-align: top }}
td:nth-child(2) {{ text-align: right; white-space: nowrap }}
section {{ border-top: 1px solid #d5dbe1; padding: 1rem 0 }} p {{ margin: .2rem 0 .6rem }}
.pictures {{ display: flex; flex-wrap: wrap; gap: .6rem }}
.pictures a {{ display: block; border: 1px solid #d5dbe1; border-radius: 4px; overflow: hidden; background: #fff }}
.pictures img {{ display: block; height: 12.5rem; max-width: 100%; object-fit: contain }}
.failed {{ color: #a4262c }} small {{ color: #5a6672 }}
</style></head><body>
<h1>smartlab demo</h1>
<p>Every notebook, run as it is shipped. Small runs on synthetic data: they show that everything works, not how well.</p>
<table><tr><th>notebook</th><th>time</th><th>result</th></tr>
{rows}</table>
{sections}</body></html>
"""


def _write_index(result: DemoResult) -> None:
    rows, sections = [], []
    for step in result.steps:
        pictures = "".join(
            f'<a href="{figure.relative_to(result.out)}"><img alt="{figure.stem}" src="{_thumbnail(figure)}"></a>'
            for figure in step.figures
            if figure.suffix == ".png"
        )
        outcome = (
            f'<span class="failed">{html.escape(step.problem)}</span>'
            if step.problem
            else html.escape(step.headline)
        )
        link = f'<a href="{step.name}/notebook.html">'
        rows.append(
            f"<tr><td>{link}{step.name}</a></td><td>{step.seconds:.0f} s</td><td>{outcome}</td></tr>\n"
        )
        sections.append(
            f'<section id="{step.name}"><h2>{link}{html.escape(step.title)}</a></h2>'
            f"<p><small>{html.escape(step.about)}</small></p>"
            f'<div class="pictures">{pictures}</div></section>\n'
        )
    _replace(result.out / "index.html", _PAGE.format(rows="".join(rows), sections="".join(sections)))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
