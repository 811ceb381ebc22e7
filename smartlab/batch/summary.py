"""What a batch came to, and what it would do."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smartlab.batch import records
from smartlab.batch.plan import Plan
from smartlab.batch.runs import expand
from smartlab.training.live import clock

WAITING, BLOCKED = "waiting", "blocked"  # besides done, failed and running


@dataclass
class BatchReport:
    """What a batch came to."""

    out: Path
    plan: Plan
    counts: dict[str, int]
    failures: list[dict[str, Any]]  # step, run, error, folder
    executed: int  # by this call
    seconds: float
    note: str = ""
    files: list[Path] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return self.counts[records.DONE] == sum(self.counts.values())

    def __str__(self) -> str:
        total = sum(self.counts.values())
        lines = [
            f"{self.counts[records.DONE]} of {total} runs done, {self.executed} of them now, in {clock(self.seconds)}"
        ]
        for state, words in (
            (records.FAILED, "failed"),
            (BLOCKED, "not run, because a run they build on failed"),
        ):
            lines += [f"{self.counts[state]} {words}"] if self.counts[state] else []
        left = self.counts[WAITING]
        lines += [f"{left} not run yet: start the same batch again to go on"] if left else []
        lines += [f"  {f['step']}/{f['run']}: {f['error']}" for f in self.failures[:20]]
        lines += [f"  … and {len(self.failures) - 20} more"] if len(self.failures) > 20 else []
        lines += ["run them again with --retry-failed"] if self.failures else []
        lines += [self.note] if self.note else []
        return "\n".join(lines + [str(path) for path in self.files])

    def as_json(self) -> dict[str, Any]:
        facts = {"ok": self.ok, "out": str(self.out), "plan": self.plan.name, **self.counts}
        return facts | {
            "executed": self.executed,
            "seconds": round(self.seconds, 1),
            "failures": self.failures,
            "note": self.note,
            "files": [str(path) for path in self.files],
        }


def write_summary(report: BatchReport) -> None:
    """results.csv, ablation.md and report.html, when there is something new to say."""
    from smartlab.batch.report import PAGE, write_report
    from smartlab.batch.results import export_results, load_results

    files = [report.out / name for name in (PAGE, "ablation.md", "results.csv")]
    ended = [path.stat().st_mtime for f in records.folders(report.out) if (path := f / "run.json").is_file()]
    written = [path.stat().st_mtime for path in files if path.is_file()]
    if ended and (len(written) < len(files) or min(written) < max(ended)):
        try:
            if report.counts[records.DONE]:
                export_results(load_results(report.out), files[-1])
            write_report(report.out, plan=report.plan)
        except Exception as error:  # results that cannot be summarised are still results
            report.note = f"{report.note}\nno summary: {error}".strip()
            return
    report.files = [path for path in files if path.is_file()]


def dry_run(plan: Plan, out: str | Path | None = None, workers: int | None = None) -> dict[str, Any]:
    """The runs of a plan, which of them are done, and how long the others may take."""
    out = Path(out or Path("runs") / plan.name).resolve()
    from smartlab.batch.cluster import machine, slots

    runs, found = expand(plan), records.survey(out)
    seconds: dict[str, list[float]] = {step.name: [] for step in plan.steps}
    for _, record in found.values():
        if record["state"] == records.DONE and record["step"] in seconds:
            seconds[record["step"]].append(record["seconds"])
    rows = []
    for run in runs:
        state = found[run.key][1]["state"] if run.key in found else WAITING
        state = WAITING if state == records.RUNNING else state
        rows.append({"step": run.step, "run": run.name, "state": state, "parameters": run.parameters})
    has = machine(any(run.resources.gpus for run in runs))
    at_once = workers or slots([run.resources for run in runs], has)
    left, measured = 0.0, True
    for step in plan.steps:
        todo = sum(row["step"] == step.name and row["state"] == WAITING for row in rows)
        each = statistics.median(seconds[step.name] or [step.resources.minutes * 60])
        left += todo * each / min(at_once, slots([step.resources], has))
        measured = measured and bool(seconds[step.name] or not todo)
    return {
        "plan": plan.name,
        "out": str(out),
        "runs": rows,
        "at_once": at_once,
        "seconds": left,
        "measured": measured,
    }


def describe(listing: Mapping[str, Any]) -> str:
    """A dry run as text."""
    rows = listing["runs"]
    lines = [f"{row['step']:<14} {row['state']:<8} {row['run']}" for row in rows]
    bound = "about" if listing["measured"] else "at most"
    basis = "from the runs done so far" if listing["measured"] else "from the time limits of the steps"
    todo = sum(row["state"] == WAITING for row in rows)
    lines.append(
        f"{len(rows)} runs, {todo} to do, {listing['at_once']} at once: {bound} {clock(listing['seconds'])} ({basis})"
    )
    return "\n".join([*lines, f"folder: {listing['out']}"])
