"""`smartlab demo`: notebooks on the built-in phantoms, and one page of what came of them.

By default the tour: the short notebooks of `notebooks/tour`, from the first mask to a small ablation.
With `everything`, all the ordered notebooks, as they are shipped. They run two at a time through
papermill, in kernels forked from one process, with only `out` changed (and what the caller gives).

`index.html` is there from the start and fills as notebooks end: a headline each, its pictures with
their captions, and the executed notebook. A failing notebook is reported and does not stop the others.
"""

from __future__ import annotations

import html
import json
import os
import queue
import sys
import threading
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smartlab.core import page
from smartlab.core.errors import DataError, UseError
from smartlab.core.files import write_text
from smartlab.core.places import notebook_folder

JOBS = 2  # notebooks at a time: what two cores can do
OURS = (  # rooms that its notebooks use
    *(
        "smartlab.notebook",
        "smartlab.data.store.build",
        "smartlab.data.crops.views",
        "smartlab.data.phantoms.make",
    ),
    *("smartlab.data.phantoms.ct", "smartlab.training.pretrain", "smartlab.evaluation.evaluate"),
    *("smartlab.evaluation.look.clusters", "smartlab.evaluation.finetune.segment"),
    *("smartlab.evaluation.finetune.classify", "smartlab.viewers.masks", "smartlab.viewers.embedding"),
)
LIVE = {  # pages that a notebook may leave beside its own: how they are called, and what to do there
    "explorer.html": ("Mask explorer", "Turn the knobs: every mask in this page was drawn by the notebook."),
    "viewer.html": (
        "Slice viewer",
        "Turn the wheel over a slice, click to move all of them; the buttons above say what lies over the scan.",
    ),
}
FIRST = ("1_masks", "3_segment")  # started before others: what one waits to see, and what takes longest


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
    captions: list[str] = field(default_factory=list)  # what to see, one a figure; "" where there is none
    state: str = "waiting"  # then "running", then "done"


@dataclass
class DemoResult:
    out: Path
    steps: list[Step]
    tour: bool = False
    seconds: float = 0.0
    patient: Path | None = None  # a picture of one phantom, before anything else is there

    @property
    def ok(self) -> bool:
        return all(step.state == "done" and not step.problem for step in self.steps)

    @property
    def page(self) -> Path:
        return self.out / "index.html"

    def table(self) -> str:
        """The results table that `make demo` ends with."""
        width = max(len(step.title) for step in self.steps)
        lines = ["", f"{'':<{width}}  {'time':>5}  what was seen"]
        for step in self.steps:
            outcome = f"FAILED: {step.problem}" if step.problem else step.headline
            lines.append(f"{step.title:<{width}}  {step.seconds:4.0f}s  {outcome}")
        pictures = sum(len(step.figures) for step in self.steps)
        minutes, seconds = divmod(round(self.seconds), 60)
        lines += ["", f"{pictures} pictures in {minutes} min {seconds:02d} s: {self.page}", _SYNTHETIC]
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        rows = [{**vars(s), "figures": [str(f) for f in s.figures]} for s in self.steps]
        return {"ok": self.ok, "index": str(self.page), "seconds": self.seconds, "steps": rows}


_SYNTHETIC = "All of it is synthetic data: it shows what the tools do, and nothing about patients."


def run_demo(
    out: str | Path,
    *,
    everything: bool = False,
    only: str | None = None,
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    progress: bool = True,
) -> DemoResult:
    """Run the tour, or `everything`, or what of it has `only` in its name; write `out/index.html`.

    parameters: notebook name -> parameters other than its own, e.g. {"02_pretrain": {"steps": 200}}.
    """
    out, start = Path(out).resolve(), time.monotonic()
    folder = notebook_folder() if everything else notebook_folder() / "tour"
    notebooks = [p for p in sorted(folder.glob("[0-9]*_*.ipynb")) if (only or "") in p.stem]
    if not notebooks:
        raise UseError("no notebook to run", path=folder, found=f"none whose name contains {only!r}")
    out.mkdir(parents=True, exist_ok=True)
    result = DemoResult(out, [_announced(path) for path in notebooks], tour=not everything)
    _write_page(result)
    given = {path.stem: dict((parameters or {}).get(path.stem, {})) for path in notebooks}
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // JOBS)))
    from smartlab.batch.forked import HEAVY, LIGHT, server

    server((*LIGHT, *HEAVY, *OURS), ())  # imports torch while the phantoms are drawn
    if progress:
        print(f"The page is there, and fills: {result.page}", flush=True)
    _show_a_patient(result)
    cohorts = _draw_phantoms(
        [n for n, more in zip(notebooks, given.values(), strict=True) if "data" not in more]
    )
    if progress and cohorts:
        print(f"  Phantom patients: the first there in {time.monotonic() - start:.0f} s", flush=True)
    todo: queue.SimpleQueue[tuple[Path, Step]] = queue.SimpleQueue()
    for pair in sorted(zip(notebooks, result.steps, strict=True), key=lambda pair: pair[0].stem not in FIRST):
        todo.put(pair)
    lock = threading.Lock()

    def work() -> None:
        while True:
            try:
                notebook, step = todo.get_nowait()
            except queue.Empty:
                return
            step.state = "running"
            if later := cohorts.get(_patients(notebook)):
                later.wait()
            _run(notebook, out, step, given[notebook.stem])
            with lock:
                result.seconds = time.monotonic() - start
                _write_page(result)
                if progress:
                    left = sum(s.state != "done" for s in result.steps)
                    state = "FAILED" if step.problem else "done"
                    print(f"  {step.title}: {state} in {step.seconds:.0f} s, {left} to go", flush=True)

    workers = [threading.Thread(target=work, daemon=True) for _ in range(min(JOBS, len(notebooks)))]
    for worker in workers:
        worker.start()
    try:
        for worker in workers:
            worker.join()
    except KeyboardInterrupt:  # kernels have a session of their own, and end with this process
        print("smartlab: stopped; run the same command again to go on", file=sys.stderr, flush=True)
        os._exit(130)  # threads that talk to dead kernels would be waited for
    result.seconds = time.monotonic() - start
    _write_page(result)
    return result


def _announced(notebook: Path) -> Step:
    """A step with the title and the introduction of its notebook's first cell."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    first, _, about = "".join(cells[0]["source"]).partition("\n")
    return Step(notebook.stem, first.lstrip("# ").strip(), " ".join(about.replace("*", "").split()))


def _show_a_patient(result: DemoResult) -> None:
    """The first picture: one phantom, which needs neither torch nor a store."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.pyplot import close

    from smartlab.core import plots
    from smartlab.data.phantoms.ct import render
    from smartlab.data.phantoms.patient import draw_patient

    made = render(draw_patient(0, 0))
    figure = plots.planes(made.array, spacing=(2, 2, 2), at=(85, 76, 70), labels=made.labels)
    result.patient = plots.save(figure, result.out / "patient.png", dpi=130)
    close(figure)
    _write_page(result)


def _draw_phantoms(notebooks: Sequence[Path]) -> dict[Any, Any]:
    """The cohorts that notebooks share, by number of patients: the first is there, others are being drawn.

    By all cores and before any notebook needs them: two that drew one at the same time would be in each other's way.
    """
    from smartlab.batch.forked import server
    from smartlab.notebook import open_cohort

    wanted = dict.fromkeys(n for path in notebooks if (n := _patients(path)))
    drawing: dict[Any, Any] = {}
    for number, patients in enumerate(wanted):
        few = patients <= 8  # sooner drawn here than workers are started
        given = {"data": "phantom-ct", "patients": patients, "workers": 0 if few else JOBS, "progress": False}
        if number == 0:
            open_cohort(**given)
            drawing[patients] = None
        else:
            drawing[patients] = server().fork("smartlab.notebook:open_cohort", **given)
    return drawing


def _patients(notebook: Path) -> Any:
    """How many phantom patients a notebook asks for; None where it does not say."""
    from smartlab.batch.notebooks import notebook_parameters

    with suppress(UseError):
        known = notebook_parameters(notebook)
        return known.get("patients") if known.get("data", "phantom-ct") == "phantom-ct" else None
    return None


def _run(notebook: Path, out: Path, step: Step, parameters: dict[str, Any]) -> None:
    import papermill
    from papermill.exceptions import PapermillExecutionError

    from smartlab.batch.kernels import ForkedKernel

    folder = out / notebook.stem
    folder.mkdir(exist_ok=True)
    (folder / "result.json").unlink(missing_ok=True)
    executed = folder / "notebook.ipynb"
    start = time.monotonic()
    try:
        papermill.execute_notebook(
            str(notebook),
            str(executed),
            parameters={**parameters, "out": str(folder)},
            kernel_name="python3",
            kernel_manager_class=type("DemoKernel", (ForkedKernel,), {"folder": str(folder)}),
            progress_bar=False,
        )
        _read_result(step, folder)
    except PapermillExecutionError as error:
        said = (error.evalue.splitlines() or [""])[0]
        step.problem = f"cell {error.exec_count}: {error.ename}: {said}"
    except Exception as error:  # a lost kernel must not stop the other notebooks
        step.problem = f"{type(error).__name__}: {error}"
    if executed.is_file():
        _write_html(executed, folder / "notebook.html")
    step.seconds, step.state = time.monotonic() - start, "done"


def _read_result(step: Step, folder: Path) -> None:
    path = folder / "result.json"
    if not path.is_file():
        raise DataError("the notebook ended without writing its result", path=path)
    result = json.loads(path.read_text(encoding="utf-8"))
    step.headline = result["headline"]
    step.figures = [folder / figure for figure in result["figures"]]
    step.captions = [result.get("captions", {}).get(figure, "") for figure in result["figures"]]


def _write_html(executed: Path, page: Path) -> None:
    import nbformat
    from nbconvert import HTMLExporter

    with warnings.catch_warnings():  # figures of plotly come with a static picture, which is what is taken
        warnings.filterwarnings("ignore", message="Your element with mimetype")
        book = nbformat.read(executed, as_version=4)
        for cell in book.cells:  # progress bars, which would stand on red
            cell.outputs = [o for o in cell.get("outputs", []) if o.get("name") != "stderr"]
        body, _ = HTMLExporter(template_name="lab").from_notebook_node(book)
    write_text(page, body)


def _write_page(result: DemoResult) -> None:
    rows, sections = [], []
    for step in result.steps:
        said = html.escape(step.problem or step.headline or step.state)
        style = "failed" if step.problem else "headline" if step.headline else "waiting"
        time_of = f"{step.seconds:.0f} s" if step.state == "done" else ""
        title = html.escape(step.title)
        rows.append([f'<a href="#{step.name}">{title}</a>', time_of, said])
        pictures = "".join(
            page.figure(str(figure.relative_to(result.out)), figure.stem, caption)
            for figure, caption in zip(step.figures, step.captions, strict=True)
            if figure.suffix == ".png"
        )
        more = (
            f'<p><a href="{step.name}/notebook.html">The notebook, as it was run</a></p>'
            if step.state == "done"
            else ""
        )
        knobs = "".join(
            f'<iframe src="{step.name}/{name}" title="{title}" loading="lazy"></iframe><figcaption>{about} '
            f'<a href="{step.name}/{name}">In a window of its own</a></figcaption>\n'
            for name, (title, about) in LIVE.items()
            if (result.out / step.name / name).is_file()
        )
        sections.append(
            f'<section id="{step.name}"><h2>{title}</h2><p>{html.escape(step.about)}</p>'
            f'<p class="{style}">{said}</p>{pictures}{knobs}{more}</section>\n'
        )
    patient = (
        page.figure(
            "patient.png",
            "patient",
            "One of the synthetic patients that everything below works on, with the organs that come labelled (colours). "
            "Scan and labels are drawn by a procedure.",
        )
        if result.patient
        else ""
    )
    unfinished = any(step.state != "done" for step in result.steps)
    title = "A tour of smartlab" if result.tour else "The notebooks of smartlab"
    about = _SYNTHETIC + (" This page fills as the notebooks end." if unfinished else "")
    listing = page.table(["", "time", "what was seen"], rows, numbers=[1])
    body = f"<p>{about}</p>\n{patient}{listing}{''.join(sections)}"
    write_text(result.page, page.page(title, body, refresh=5 if unfinished else 0))
