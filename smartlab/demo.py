"""`smartlab demo`: every notebook, in order, on the built-in phantoms.

Each notebook runs through papermill exactly as it is shipped, with only `out` changed, and leaves
its executed copy, an HTML page, its pictures and its `result.json` below the demo folder.
`index.html` links them. A failing notebook is reported and does not stop the others.
"""

from __future__ import annotations

import base64
import html
import io
import json
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smartlab.errors import DataError, UseError


@dataclass
class Step:
    """One notebook of the demo."""

    name: str
    title: str
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
            f"{pictures} pictures and the executed notebooks: {self.out / 'index.html'}",
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


def run_demo(out: str | Path, *, only: str | None = None, progress: bool = True) -> DemoResult:
    """Run the notebooks (those whose name contains `only`) and write `out/index.html`."""
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
        step = _run(notebook, out)
        steps.append(step)
        if progress:
            print(f"{'FAILED' if step.problem else 'done'} in {step.seconds:.0f} s", flush=True)
    result = DemoResult(out, steps)
    _write_index(result)
    return result


def _run(notebook: Path, out: Path) -> Step:
    import nbformat
    import papermill
    from papermill.exceptions import PapermillExecutionError

    folder = out / notebook.stem
    folder.mkdir(exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    first = nbformat.read(notebook, as_version=4).cells[0].source.splitlines()[0]
    step = Step(notebook.stem, first.lstrip("# ").strip())
    executed = folder / "notebook.ipynb"
    start = time.monotonic()
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters={"out": str(folder)},
            kernel_name="python3",
            progress_bar=False,
            cwd=str(folder),
            extra_arguments=["--log-level=ERROR"],  # the kernel's own warnings would break the progress lines
        )
        step.headline, step.figures = _read_result(folder)
    except PapermillExecutionError as error:
        step.problem = f"cell {error.exec_count}: {error.ename}: {error.evalue.splitlines()[0]}"
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

    body, _ = HTMLExporter(template_name="lab").from_notebook_node(nbformat.read(executed, as_version=4))
    _replace(page, body)


def _thumbnail(figure: Path) -> str:
    """A small copy of a picture as a data URL, so that the index is quick to open."""
    from PIL import Image

    with Image.open(figure) as image:
        image.thumbnail((520, 360))
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>smartlab demo</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem; color: #1a2530 }}
section {{ border-top: 1px solid #d5dbe1; padding: .8rem 0 }}
.pictures {{ display: flex; flex-wrap: wrap; gap: .6rem }}
.pictures img {{ max-width: 100%; border-radius: 4px; background: #000 }}
.failed {{ color: #a4262c }} small {{ color: #5a6672 }}
</style></head><body>
<h1>smartlab demo</h1>
<p>Small runs on synthetic data: they show that everything works, not how well.</p>
{sections}</body></html>
"""


def _write_index(result: DemoResult) -> None:
    sections = []
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
        sections.append(
            f'<section><h2><a href="{step.name}/notebook.html">{html.escape(step.title)}</a></h2>'
            f"<p>{outcome} <small>({step.seconds:.0f} s)</small></p>"
            f'<div class="pictures">{pictures}</div></section>\n'
        )
    _replace(result.out / "index.html", _PAGE.format(sections="".join(sections)))


def _replace(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
