"""`smartlab batch` and `smartlab results`: a thin layer over `smartlab.batch`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from smartlab.cli.data import AsJson, say


def batch(
    plan: Annotated[str, typer.Argument(help="Plan name or YAML file.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="steps=100, probe.shots=[1,5], seeds=1, resources.gpus=1, …")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the runs; default runs/PLAN.")] = None,
    scheduler: Annotated[str | None, typer.Option(help="Address of a Dask scheduler.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Runs at once on this machine.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would run.")] = False,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run failed runs again.")] = False,
    any_code: Annotated[
        bool, typer.Option("--any-code", help="Count results of other versions of the source.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Run a plan of notebooks: only what is missing, on this machine or a Dask cluster."""
    from smartlab import batch as batches
    from smartlab.batch.summary import describe
    from smartlab.core.config import parse_overrides

    chosen = batches.load_plan(plan, parse_overrides(overrides or []))
    if dry_run:
        listing = batches.dry_run(chosen, out, workers)
        say(as_json, listing, describe(listing))
        return
    report = batches.run_batch(
        chosen,
        out,
        workers=workers,
        scheduler=scheduler,
        retry_failed=retry_failed,
        any_code=any_code,
        progress=not as_json,
    )
    say(as_json, report.as_json(), str(report))
    raise typer.Exit(0 if report.ok else 1)


def results(
    folder: Annotated[Path, typer.Argument(help="Folder of a batch, or of run notebooks.")],
    to: Annotated[Path | None, typer.Option(help="Write all results as .csv or .parquet.")] = None,
    metric: Annotated[str | None, typer.Option(help="Means and intervals of this metric.")] = None,
    by: Annotated[str | None, typer.Option(help="Parameters to compare, such as strategy,ratio.")] = None,
    step: Annotated[str | None, typer.Option(help="Of this step only.")] = None,
    as_json: AsJson = False,
) -> None:
    """Gather the results of a batch into one table."""
    from smartlab import batch as batches

    table = batches.load_results(folder)
    if to is not None:
        batches.export_results(table, to)
    names = sorted(table.metric.unique())
    text = f"{table.run.nunique()} runs with results, {len(table)} values of {', '.join(names)}"
    content: dict = {
        "runs": int(table.run.nunique()),
        "metrics": names,
        "file": None if to is None else str(to),
    }
    if metric is not None:
        found = batches.summarise(table, metric, by.split(",") if by else None, step)
        text = found.to_string(index=False)
        content["rows"] = found.astype(object).where(found.notna(), None).to_dict("records")
    say(as_json, content, text if to is None else f"{text}\n{to}")
