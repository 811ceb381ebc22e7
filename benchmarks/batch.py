"""What a batch adds to the notebooks' own time, and what a finished one costs to check.

    python -m benchmarks.batch --runs 1000 --out benchmarks/results/batch.json

- `kernel`: a notebook that does nothing, run by papermill again and again in one warm process, `workers`
  at a time: the kernel's own start, under the same load.
- `batch`: the same notebook as a plan of `--runs` runs. Overhead per run = (batch − kernel) × workers / runs,
  the batch's own start and its report left out and given beside.
- the resident memory of scheduler and worker after a tenth of the runs and at the end.
- `resume`: a second call on the finished batch; and on records copied up to 1,000 runs where fewer were run.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import nbformat
import psutil

CELLS = (
    'x = 0\nout = ""',
    "import json, pathlib\npathlib.Path(out, 'result.json').write_text(json.dumps({'metrics': {'x': x}}))",
)
WARM = """
import sys, time
import papermill
from smartlab.batch.forked import LIGHT, end_server, server
from smartlab.batch.kernels import ForkedKernel
notebook, folder, runs = sys.argv[1], sys.argv[2], int(sys.argv[3])
Kernel = type("Kernel", (ForkedKernel,), {"folder": folder})
server(LIGHT, ())
for i in range(runs + 1):
    start = start if i > 1 else time.monotonic()  # the first one waits for the imports
    papermill.execute_notebook(notebook, f"{folder}/o.ipynb", {"x": i, "out": folder}, kernel_name="python3",
                               progress_bar=False, kernel_manager_class=Kernel)
print((time.monotonic() - start) / runs)
end_server()
"""


def write_inputs(folder: Path, runs: int) -> Path:
    book = nbformat.v4.new_notebook(metadata={"language_info": {"name": "python"}})
    book.cells = [nbformat.v4.new_code_cell(source) for source in CELLS]
    book.cells[0].metadata["tags"] = ["parameters"]
    nbformat.write(book, folder / "trivial.ipynb")
    values = ", ".join(map(str, range(runs)))
    plan = folder / f"trivial-{runs}.yaml"
    resources = "resources: {memory: 0.2, minutes: 5}"
    plan.write_text(f"title: Trivial\nnotebook: trivial.ipynb\ngrid: {{x: [{values}]}}\n{resources}\n")
    return plan


def environment() -> dict[str, str]:
    return dict(os.environ, PYTHONPATH=str(Path(__file__).resolve().parents[1]), OMP_NUM_THREADS="1")


def time_kernels(folder: Path, runs: int, workers: int) -> float:
    """Seconds that a trivial notebook takes from the start of its kernel to the end, `workers` at once."""
    running = []
    for number in range(workers):
        (home := folder / f"warm-{number}").mkdir()
        command = [sys.executable, "-c", WARM, str(folder / "trivial.ipynb"), str(home), str(runs)]
        running.append(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        )
    return sum(float(process.communicate()[0]) for process in running) / workers


class Watch(threading.Thread):
    """Resident megabytes of this process, which holds the scheduler, over the share of runs done."""

    def __init__(self, out: Path, runs: int) -> None:
        super().__init__(daemon=True)
        self.out, self.runs, self.ended = out, runs, threading.Event()
        self.seen: list[tuple[float, float, float]] = []  # share of runs, MB, seconds
        self.start_time = time.monotonic()

    def run(self) -> None:
        me = psutil.Process()
        while not self.ended.wait(0.5):
            done = sum(1 for _ in self.out.glob("trivial/*/result.json"))
            self.seen.append(
                (done / self.runs, me.memory_info().rss / 1e6, time.monotonic() - self.start_time)
            )

    def at(self, share: float) -> tuple[float, float, float]:
        return next((row for row in self.seen if row[0] >= share), self.seen[-1])


def measure(runs: int, workers: int) -> dict[str, Any]:
    from smartlab.batch import expand, load_plan, load_results, run_batch

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        plan, out = load_plan(write_inputs(folder, runs)), folder / "out"
        kernel = time_kernels(folder, max(5, min(runs // 10, 40)), workers)
        watch = Watch(out, runs)
        watch.start()
        report = run_batch(plan, out, workers=workers, progress=False)
        watch.ended.set()
        watch.join()
        assert report.ok, str(report)
        begin, end = next(row for row in watch.seen if row[0] > 0), watch.at(1.0)
        share = end[0] - begin[0]
        each = (end[2] - begin[2]) * workers / (share * runs)
        again = _timed(lambda: run_batch(plan, out, workers=workers, progress=False))
        thousand = load_plan(write_inputs(folder, max(1000, runs)))
        real = next(out.glob("trivial/*"))
        record = json.loads((real / "run.json").read_text())
        for run in expand(thousand):
            if not (home := out / run.step / run.name).exists():
                shutil.copytree(real, home)
                facts = {"key": run.key, "identity": run.identity, "settings": run.settings}
                (home / "run.json").write_text(json.dumps(record | facts))
        return {
            "runs": runs,
            "workers": workers,
            "kernel_seconds": round(kernel, 3),
            "batch_seconds_per_run": round(each, 3),
            "overhead_seconds_per_run": round(each - kernel, 3),
            "first_result_after_seconds": round(begin[2], 2),
            "memory_mb": {"after 10%": round(watch.at(0.1)[1]), "at the end": round(end[1])},
            "resume_seconds": round(again, 2),
            "resume_of_1000_seconds": round(_timed(lambda: run_batch(thousand, out, progress=False)), 2),
            "load_results_of_1000_seconds": round(_timed(lambda: load_results(out)), 2),
        }


def _timed(call: Any) -> float:
    begin = time.monotonic()
    call()
    return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/batch.json"))
    chosen = parser.parse_args()
    before = os.getloadavg()[0]
    result = measure(chosen.runs, chosen.workers)
    machine = {"cores": os.cpu_count(), "system": platform.platform(), "python": platform.python_version()}
    result["machine"] = machine | {"load_before": round(before, 1)}
    chosen.out.parent.mkdir(parents=True, exist_ok=True)
    chosen.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
