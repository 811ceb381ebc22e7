"""A batch: the runs of a plan on Dask, each after what it builds on, and only those that are missing.

What is done is in the run folders and nowhere else. So a batch that was killed goes on by starting it
again, and two batches in one folder help each other: who has a run's lock does it, the other asks again.
"""

from __future__ import annotations

import os
import queue
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any

from smartlab.batch import records
from smartlab.batch.cluster import Place, connect
from smartlab.batch.plan import Plan, load_plan
from smartlab.batch.progress import Count, Progress, Standing
from smartlab.batch.report import write_progress
from smartlab.batch.runs import code_digest, expand
from smartlab.batch.summary import BLOCKED, WAITING, BatchReport, write_summary
from smartlab.core.files import write_bytes
from smartlab.core.workers import StopRequest, draining

LOOK_AGAIN = 2.0  # seconds until what another batch had is asked for again
AT_ONCE = 2000  # runs sent to Dask at one time, however many there are
PAGE_EVERY = 10.0  # seconds between two writings of the page
MOST_LOST = 3  # times a run may lose its process before it counts as failed


def run_batch(
    plan: Plan | str | Path | Mapping[str, Any],
    out: str | Path | None = None,
    *,
    workers: int | None = None,
    scheduler: str | None = None,
    retry_failed: bool = False,
    any_code: bool = False,
    progress: bool = True,
) -> BatchReport:
    """Run what is missing of a plan.

    workers:      runs at once on this machine; by default as many as its cores, GPUs and memory allow.
    scheduler:    address of a Dask scheduler to use instead of this machine.
    retry_failed: run failed runs again; otherwise they are listed.
    any_code:     let results of another version of smartlab's source count as done.
    """
    plan = plan if isinstance(plan, Plan) else load_plan(plan)
    out = Path(out or Path("runs") / plan.name).resolve()
    batch = Batch(plan, out, retry_failed, any_code)
    start = time.monotonic()
    with ExitStack() as stack:
        stop = stack.enter_context(draining())
        table = stack.enter_context(Progress(f"{plan.name}: {len(batch.runs)} runs", progress))
        if batch.waiting():
            place = stack.enter_context(connect(list(batch.runs.values()), workers, scheduler))
            batch.work(place, stop, table)
        table.show(batch.standing(), ends=True)
    report = batch.report(time.monotonic() - start)
    write_summary(report)
    return report


class Batch:
    """The state of a batch while it goes on; what is done can always be read again from the folders."""

    def __init__(self, plan: Plan, out: Path, retry_failed: bool, any_code: bool) -> None:
        self.plan, self.out, self.retry, self.any_code = plan, out, retry_failed, any_code
        self.code = code_digest()
        self.runs = {run.key: run for run in expand(plan, code=self.code)}  # after those they build on
        self.answers: dict[str, dict[str, Any]] = {}  # of runs that are done, failed or blocked
        self.flying: dict[str, Any] = {}  # key -> Dask's future
        self.seconds: dict[str, list[float]] = {step.name: [] for step in plan.steps}
        self.lost: Counter[str] = Counter()
        self.executed, self.number, self.changed, self.most, self.next_page = 0, 0, False, 1, 0.0
        self.token = uuid.uuid4().hex[:8]  # two batches may share a scheduler
        self._look_at_folders()
        self._keep_plan()

    def waiting(self) -> list[str]:
        return [key for key in self.runs if key not in self.answers]

    def state(self, key: str) -> str:
        return self.answers[key]["state"] if key in self.answers else WAITING

    def _look_at_folders(self) -> None:
        found = records.survey(self.out)
        same = {
            record["identity"]: key for key, (_, record) in found.items() if record["state"] == records.DONE
        }
        for key, run in self.runs.items():
            held = key if key in found or not self.any_code else same.get(run.identity, key)
            folder, record = found.get(held, (self.out, {}))
            if record.get("state") == records.DONE or (
                record.get("state") == records.FAILED and not self.retry
            ):
                self._settle(key, records.answer(folder, record, now=False))
            elif any(self.state(up.key) in (records.FAILED, BLOCKED) for up in run.upstream.values()):
                self.answers[key] = {"state": BLOCKED}
        mine = {(run.step, run.identity) for key, run in self.runs.items() if key not in self.answers}
        self.other_code = sum(
            (r["step"], r["identity"]) in mine for k, (_, r) in found.items() if k not in self.runs
        )

    def _keep_plan(self) -> None:
        """The plan and its notebooks as they are now, so that all runs use the same."""
        kept = self.out / ".batch" / "notebooks"
        kept.mkdir(parents=True, exist_ok=True)
        self.notebook = {}
        for step in self.plan.steps:
            text = step.notebook.read_bytes()
            path = kept / f"{records.digest(text)}.ipynb"
            if not path.is_file():
                write_bytes(path, text)
            self.notebook[step.name] = path
        if self.plan.path.is_file():
            write_bytes(self.out / f"{self.plan.name}.yaml", self.plan.path.read_bytes())

    def _settle(self, key: str, answer: dict[str, Any]) -> None:
        self.answers[key] = answer
        if answer["state"] == records.DONE:
            self.seconds[self.runs[key].step].append(answer.get("seconds") or 0.0)

    def work(self, place: Place, stop: StopRequest, table: Progress) -> None:
        """Until everything is done, or what runs is done after a request to stop.

        In rounds: what is not done is sent to Dask, which runs each after those it builds on. A further round is for
        what another batch had, and for what lost its worker.
        """
        while (todo := self.waiting()) and not (stop.asked or self.changed):
            arrived: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
            for key in todo[:AT_ONCE]:
                self._submit(key, place, arrived)
            while self.flying:
                if stop.asked or self.changed:
                    self._withdraw()
                try:
                    self._take(*arrived.get(timeout=0.5), place)
                    while True:
                        self._take(*arrived.get_nowait(), place)
                except queue.Empty:
                    pass
                standing = self.standing(2 * place.width())
                table.show(standing, draining=stop.asked)
                self._write_page(standing)
            if len(self.waiting()) == len(todo) and not stop.asked:
                time.sleep(LOOK_AGAIN)

    def _submit(self, key: str, place: Place, arrived: queue.SimpleQueue[tuple[str, Any]]) -> None:
        run = self.runs[key]
        self.number += 1
        above = [self.answers.get(up.key) or self.flying[up.key] for up in run.upstream.values()]
        future = self.flying[key] = place.submit(self._request(key), above, run, self.number)
        future.add_done_callback(lambda done: arrived.put((key, done)))

    def _request(self, key: str) -> dict[str, Any]:
        """All that a worker needs to know of a run, as plain JSON values."""
        run = self.runs[key]
        return {
            "id": f"{key}-{self.number}-{self.token}",
            "out": str(self.out),
            "step": run.step,
            "name": run.name,
            "key": key,
            "identity": run.identity,
            "notebook": str(self.notebook[run.step]),
            "notebook_name": run.notebook.name,
            "parameters": run.parameters,
            "settings": run.settings,
            "upstream": list(run.upstream),
            "data": run.data,
            "resources": run.resources.model_dump(),
            "seconds": run.resources.minutes * 60,
            "retry": self.retry,
            "code_digest": None if self.any_code else self.code,
        }

    def _take(self, key: str, future: Any, place: Place) -> None:
        if self.flying.get(key) is not future:
            return
        del self.flying[key]
        came, above = place.answer(future), self.runs[key].upstream.values()
        if came["state"] in (records.DONE, records.FAILED, BLOCKED):
            self.executed += came.get("now", False)  # another batch may have done it a moment ago
            self._settle(key, came)
        elif came["state"] == "changed":
            self.changed = True
        elif came["state"] == "lost" and all(up.key in self.answers for up in above):
            self.lost[key] += 1
            if self.lost[key] >= MOST_LOST:
                self._give_up(key, came["error"])

    def _give_up(self, key: str, error: str) -> None:
        """Record a run whose process was lost again and again as failed."""
        run = self.runs[key]
        held = records.lock(self.out, key)
        folder = records.find(self.out, key) or self.out / run.step / run.name
        folder.mkdir(parents=True, exist_ok=True)
        lost = {"state": records.FAILED, "error": f"{error}, {MOST_LOST} times", "seconds": 0.0}
        fresh = {"step": run.step, "key": key, "identity": run.identity, "settings": run.settings}
        if held is not None:
            fresh |= {"upstream": {}, "notebook": run.notebook.name, **records.read(folder)}
            records.write(folder, fresh | lost)
            os.close(held)
        self._settle(key, records.answer(folder, lost, now=True))

    def _withdraw(self) -> None:
        """Take back what waits at Dask; what runs may finish."""
        for key, future in list(self.flying.items()):
            if not future.done() and not records.is_locked(self.out, key):
                del self.flying[key]
                future.cancel()

    def standing(self, look_at: int = 0) -> Standing:
        """Where it stands; what runs is among the first that Dask has, of which so many are looked at."""
        steps = {name: Count(name, known=seconds) for name, seconds in self.seconds.items()}
        for answer, run in ((self.answers.get(key), run) for key, run in self.runs.items()):
            count = steps[run.step]
            if answer is None:
                count.waiting += 1
            elif answer["state"] == records.DONE:
                count.done += 1
            else:
                count.failed += 1
        ready = (k for k in self.flying if all(u.key in self.answers for u in self.runs[k].upstream.values()))
        for key in islice(ready, look_at):
            if records.is_locked(self.out, key):
                steps[self.runs[key].step].waiting -= 1
                steps[self.runs[key].step].running += 1
        self.most = max(self.most, sum(s.running for s in steps.values()))
        return Standing(list(steps.values()), self.most)

    def _write_page(self, standing: Standing) -> None:
        """Now and then, so that it costs the batch little however many runs there are."""
        if (begin := time.monotonic()) > self.next_page:
            with suppress(Exception):  # no page is worth a batch; the report at the end says what is wrong
                write_progress(self.out, self.plan, standing)
            self.next_page = time.monotonic() + min(60, max(PAGE_EVERY, 20 * (time.monotonic() - begin)))

    def report(self, seconds: float) -> BatchReport:
        counts = Counter(dict.fromkeys((records.DONE, records.FAILED, BLOCKED, WAITING), 0))
        counts.update(map(self.state, self.runs))
        failures = [
            {"step": self.runs[key].step, "run": Path(came["folder"]).name}
            | {"error": came["error"], "folder": came["folder"]}
            for key, came in self.answers.items()
            if came["state"] == records.FAILED
        ]
        note = ""
        if self.changed:
            note = (
                "smartlab's source changed while the batch ran: start it again to go on with the new source"
            )
        elif self.other_code:
            note = (
                f"{self.other_code} runs in this folder were made by another version of smartlab or of a notebook "
                "and were not counted; --any-code counts them"
            )
        return BatchReport(self.out, self.plan, dict(counts), failures, self.executed, seconds, note)
