"""Ablation batches: papermill over a grid of parameters, on one machine or a cluster, by Dask.

- `plan.py`      what to run, checked before anything runs; `plan_file.py` its YAML as written
- `notebooks.py` the parameters that a notebook has
- `runs.py`      the runs of a plan, each named by what goes into it, so that none is done twice
- `records.py`   the folder of a run: its record, its lock
- `run.py`       what Dask runs: one run, by papermill in a kernel on the GPUs it is given
- `forked.py`    the process that kernels are forked from; `kernels.py` a forked one as papermill wants it
- `execute.py`   the batch itself, on a place from `cluster.py`; `progress.py` where it stands, `summary.py` its end
- `results.py`   all results as one table; `report.py` as a page, written down by `blocks.py`

>>> plan = load_plan("components", {"pretrain.steps": 100})
>>> report = run_batch(plan, "runs/components")
>>> load_results("runs/components")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PUBLIC = {  # imported lazily: kernels and launchers pass through this package
    "Plan": "plan",
    "load_plan": "plan",
    "shipped_plans": "plan_file",
    "expand": "runs",
    "run_batch": "execute",
    "BatchReport": "summary",
    "dry_run": "summary",
    "describe": "summary",
    "load_results": "results",
    "load_runs": "results",
    "export_results": "results",
    "summarise": "results",
    "write_report": "report",
}

__all__ = [*_PUBLIC]

if TYPE_CHECKING:
    from smartlab.batch.execute import run_batch
    from smartlab.batch.plan import Plan, load_plan
    from smartlab.batch.plan_file import shipped_plans
    from smartlab.batch.report import write_report
    from smartlab.batch.results import export_results, load_results, load_runs, summarise
    from smartlab.batch.runs import expand
    from smartlab.batch.summary import BatchReport, describe, dry_run


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(f"smartlab.batch.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module 'smartlab.batch' has no attribute {name!r}")
