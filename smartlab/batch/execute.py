"""A batch: the runs of a plan on Dask, each when what it builds on is done, and only those that are missing.

What is done is in the run folders and nowhere else. So a batch that was killed goes on by starting it
again, and two batches in one folder help each other: who has a run's lock does it, the other waits.
"""

from __future__ import annotations

import heapq
import os
import queue
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from smartlab.batch import records
from smartlab.batch.cluster import Place, connect
from smartlab.batch.plan import Plan, load_plan
from smartlab.batch.progress import Count, Progress, Standing
from smartlab.batch.report import write_progress
from smartlab.batch.runs import code_digest, expand, resolve
from smartlab.batch.summary import BLOCKED, WAITING, BatchReport, write_summary
from smartlab.core.files import write_bytes
from smartlab.core.workers import StopRequest, draining

LOOK_AGAIN = 2.0  # seconds between two looks at a run that another batch has
FLYING = "flying"  # at Dask
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
        if batch.ready:
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
        self.runs = {run.key: run for run in expand(plan, code=self.code)}
        self.state = dict.fromkeys(self.runs, WAITING)
        self.folder: dict[str, Path] = {}
        self.error: dict[str, str] = {}
        self.seconds: dict[str, list[float]] = {step.name: [] for step in plan.steps}
        self.lost: Counter[str] = Counter()
        self.busy: dict[str, float] = {}  # key -> when to look again
        self.flying: dict[str, Any] = {}  # key -> Dask's future
        self.executed, self.number, self.changed, self.most = 0, 0, False, 1
        self.next_page = 0.0
        self.token = uuid.uuid4().hex[:8]  # two batches may share a scheduler
        self.children: dict[str, list[str]] = {key: [] for key in self.runs}
        for run in self.runs.values():
            for before in run.upstream.values():
                self.children[before.key].append(run.key)
        self._look_at_folders()
        self.ready: list[tuple[int, int, str]] = []
        for key in self.runs:
            self._consider(key)
        self._keep_plan()

    def _look_at_folders(self) -> None:
        found = records.survey(self.out)
        same = {
            record["identity"]: key for key, (_, record) in found.items() if record["state"] == records.DONE
        }
        for key, run in self.runs.items():
            held = key if key in found or not self.any_code else same.get(run.identity, key)
            if held not in found:
                continue
            folder, record = found[held]
            if record["state"] == records.DONE:
                self._done(key, folder, record.get("seconds") or 0.0)
            elif record["state"] == records.FAILED and not self.retry:
                self._failed(key, folder, record["error"])
        mine = {(run.step, run.identity) for key, run in self.runs.items() if self.state[key] == WAITING}
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

    def _consider(self, key: str) -> None:
        """Put a run on the list once everything it builds on is done."""
        run = self.runs[key]
        if self.state[key] != WAITING:
            return
        before = [self.state[up.key] for up in run.upstream.values()]
        if records.FAILED in before or BLOCKED in before:
            self.state[key] = BLOCKED
            for child in self.children[key]:
                self._consider(child)
        elif all(state == records.DONE for state in before):
            heapq.heappush(self.ready, (run.order, len(self.ready), key))

    def _done(self, key: str, folder: Path, seconds: float) -> None:
        self.state[key], self.folder[key] = records.DONE, folder
        self.seconds[self.runs[key].step].append(seconds)

    def _failed(self, key: str, folder: Path, error: str) -> None:
        self.state[key], self.folder[key], self.error[key] = records.FAILED, folder, error

    def work(self, place: Place, stop: StopRequest, table: Progress) -> None:
        """Until everything is done, or what runs is done after a request to stop."""
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        while True:
            if stop.asked or self.changed:
                self._withdraw()
                self.busy.clear()
            else:
                self._look_at_busy()
                self._submit(place, arrived)
            if not self.flying and not self.busy and (stop.asked or self.changed or not self.ready):
                return
            try:
                self._take(arrived.get(timeout=0.5), place)
                while True:
                    self._take(arrived.get_nowait(), place)
            except queue.Empty:
                pass
            standing = self.standing()
            table.show(standing, draining=stop.asked)
            self._write_page(standing)

    def _write_page(self, standing: Standing) -> None:
        """Now and then, so that it costs the batch little however many runs there are."""
        if (begin := time.monotonic()) > self.next_page:
            write_progress(self.out, self.plan, standing)
            self.next_page = time.monotonic() + min(60, max(PAGE_EVERY, 20 * (time.monotonic() - begin)))

    def _submit(self, place: Place, arrived: queue.SimpleQueue[Any]) -> None:
        """Few runs wait at Dask, however many there are: it stays small and the order stays ours."""
        room = place.width() - len(self.flying)
        while self.ready and room > 0:
            _, _, key = heapq.heappop(self.ready)
            self.state[key] = FLYING
            self.number += 1
            future = place.submit(self._request(key), self.runs[key], self.number)
            self.flying[key] = future
            future.add_done_callback(lambda done, key=key: arrived.put((key, done)))
            room -= 1

    def _request(self, key: str) -> dict[str, Any]:
        """All that a worker needs to know of a run, as plain JSON values."""
        run = self.runs[key]
        above = {name: self.folder[before.key] for name, before in run.upstream.items()}
        return {
            "id": f"{key}-{self.number}-{self.token}",
            "out": str(self.out),
            "step": run.step,
            "name": run.name,
            "key": key,
            "identity": run.identity,
            "notebook": str(self.notebook[run.step]),
            "notebook_name": run.notebook.name,
            "parameters": {name: resolve(value, above) for name, value in run.parameters.items()},
            "settings": run.settings,
            "upstream": {name: os.path.relpath(folder, self.out) for name, folder in above.items()},
            "data": run.data,
            "resources": run.resources.model_dump(),
            "seconds": run.resources.minutes * 60,
            "retry": self.retry,
            "code_digest": None if self.any_code else self.code,
        }

    def _take(self, arrival: tuple[str, Any], place: Place) -> None:
        key, future = arrival
        if self.flying.get(key) is not future:
            return
        del self.flying[key]
        answer = place.answer(future)
        state = answer["state"]
        if state in (records.DONE, records.FAILED):
            self.executed += answer["now"]  # another batch may have done it a moment ago
            self._settle(key, Path(answer["folder"]), answer["state"], answer["error"], answer["seconds"])
            return
        self.state[key] = WAITING
        if state == "busy":
            self.busy[key] = time.monotonic() + LOOK_AGAIN
        elif state == "changed":
            self.changed = True
        elif state == "stopped":  # its worker is closing; after a request to stop nothing is sent anyway
            self._consider(key)
        else:
            self.lost[key] += 1
            if self.lost[key] < MOST_LOST:
                self._consider(key)
            else:
                self._give_up(key, answer.get("error") or f"it was left {state}")

    def _settle(self, key: str, folder: Path, state: str, error: str, seconds: float) -> None:
        if state == records.DONE:
            self._done(key, folder, seconds)
        else:
            self._failed(key, folder, error)
        for child in self.children[key]:
            self._consider(child)

    def _give_up(self, key: str, error: str) -> None:
        """Record a run whose process was lost again and again as failed."""
        run = self.runs[key]
        held = records.lock(self.out, key)
        folder = records.find(self.out, key) or self.out / run.step / run.name
        folder.mkdir(parents=True, exist_ok=True)
        error = f"{error}, {MOST_LOST} times"
        fresh = {"step": run.step, "key": key, "identity": run.identity, "settings": run.settings}
        if held is not None:
            record = {**fresh, "notebook": run.notebook.name, **records.read(folder)}
            records.write(folder, record | {"state": records.FAILED, "error": error, "seconds": 0.0})
            os.close(held)
        self._settle(key, folder, records.FAILED, error, 0.0)

    def _look_at_busy(self) -> None:
        """Runs that another batch had: done meanwhile, or free again."""
        for key, when in list(self.busy.items()):
            if time.monotonic() < when:
                continue
            if records.is_locked(self.out, key):
                self.busy[key] = time.monotonic() + LOOK_AGAIN
                continue
            del self.busy[key]
            folder = records.find(self.out, key)
            record = records.read(folder) if folder else {}
            if folder and record.get("state") in (records.DONE, records.FAILED):
                self._settle(key, folder, record["state"], record["error"], record["seconds"])
            else:
                self._consider(key)

    def _withdraw(self) -> None:
        """Take back what waits at Dask; what runs may finish."""
        for key, future in list(self.flying.items()):
            if not records.is_locked(self.out, key) and not future.done():
                del self.flying[key]
                self.state[key] = WAITING
                future.cancel()

    def standing(self) -> Standing:
        steps = {name: Count(name, known=seconds) for name, seconds in self.seconds.items()}
        for key, run in self.runs.items():
            state, count = self.state[key], steps[run.step]
            count.done += state == records.DONE
            count.failed += state in (records.FAILED, BLOCKED)
            running = state == FLYING and records.is_locked(self.out, key)
            count.running += running
            count.waiting += state == WAITING or (state == FLYING and not running)
        self.most = max(self.most, sum(s.running for s in steps.values()))
        return Standing(list(steps.values()), self.most)

    def report(self, seconds: float) -> BatchReport:
        counts = Counter(dict.fromkeys((records.DONE, records.FAILED, BLOCKED, WAITING), 0))
        counts.update(self.state.values())
        failures = [
            {
                "step": self.runs[key].step,
                "run": self.folder[key].name,
                "error": error,
                "folder": str(self.folder[key]),
            }
            for key, error in self.error.items()
            if self.state[key] == records.FAILED
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
