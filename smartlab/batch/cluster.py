"""Where a batch runs: this machine, or the workers of a Dask scheduler.

Runs are placed by Dask's own resources. On this machine they are CORES, GPU and MEMORY (GB). On a cluster
a run that asks for GPUs goes to workers started with `--resources "GPU=n"`; CORES and MEMORY count where
workers offer them.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from smartlab.batch.forked import end_server, server
from smartlab.batch.plan_file import Resources
from smartlab.batch.runs import BatchRun
from smartlab.core.errors import DataError, UseError
from smartlab.core.workers import connect as workers_of


def machine(gpus: bool) -> dict[str, float]:
    """What this machine has; counting GPUs costs seconds, so only where they are asked for."""
    from distributed.system import MEMORY_LIMIT

    count = 0
    if gpus:
        import torch

        count = torch.cuda.device_count()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"CORES": cores, "GPU": count, "MEMORY": MEMORY_LIMIT / 1e9}


def needs(resources: Resources) -> dict[str, float]:
    wanted = {"CORES": resources.cores, "GPU": resources.gpus, "MEMORY": resources.memory}
    return {name: value for name, value in wanted.items() if value}


def slots(runs: Sequence[Resources], has: dict[str, float]) -> int:
    """How many of the smallest runs fit at once."""
    each = [min(math.floor(has[n] / v) if v else 10**6 for n, v in needs(run).items()) for run in runs]
    return max([1, *each])


class Place:
    """Dask as a batch sees it: send a run, and what came back."""

    def __init__(self, client: Any, offered: set[str]) -> None:
        self.client, self.offered = client, offered

    def width(self) -> int:
        """Runs at one time, at most."""
        return sum(self.client.nthreads().values())

    def submit(self, request: dict[str, Any], above: Sequence[Any], run: BatchRun, number: int) -> Any:
        """The future of a run; `above` are those of what it builds on, or their answers where they are known."""
        from smartlab.batch.run import execute

        wanted = needs(run.resources).items()
        return self.client.submit(
            execute,
            request,
            *above,
            key=f"{run.step}-{request['id']}",
            pure=False,
            resources={name: value for name, value in wanted if name in self.offered | {"GPU"}},
            priority=-number,
        )

    def answer(self, future: Any) -> dict[str, Any]:
        """What a run came to, also when its worker died under it."""
        from concurrent.futures import CancelledError as Cancelled

        from distributed import KilledWorker
        from distributed.client import FutureCancelledError

        try:
            return future.result()
        except KilledWorker:
            return {"state": "lost", "error": "every worker that ran it was killed"}
        except (Cancelled, FutureCancelledError):
            if self.client.status != "running":
                raise DataError(
                    "the Dask scheduler is gone", fix="start the batch again: what is done stays done"
                ) from None
            return {"state": "stopped"}
        except Exception as error:  # one worker without smartlab, say, must not end the batch
            return {"state": "lost", "error": f"{type(error).__name__}: {' '.join(str(error).split())}"}


@contextmanager
def connect(runs: Sequence[BatchRun], workers: int | None, scheduler: str | None) -> Iterator[Place]:
    """A place for these runs, after checking that each of them fits."""
    from distributed import Client, LocalCluster

    wanted = [run.resources for run in runs]
    if scheduler is not None:
        if workers is not None:
            raise UseError("workers are those of the scheduler", fix="leave out --workers or --scheduler")
        with workers_of(scheduler) as client:
            there = client.scheduler_info(n_workers=-1)["workers"].values()
            offers = [dict(worker["resources"]) for worker in there]
            _check_fit(runs, offers)
            yield Place(client, set.intersection(*map(set, offers)) if offers else set())
        return
    has = machine(any(one.gpus for one in wanted))
    at_once = workers or slots(wanted, has)
    if workers:  # said so: cores are shared
        has["CORES"] = max(has["CORES"], workers * max(one.cores for one in wanted))
    _check_fit(runs, [has])
    server()  # imports while Dask starts
    # a thread per run in this process, which listens to nobody: it only waits, the kernels are processes
    try:
        with (
            LocalCluster(
                n_workers=1,
                threads_per_worker=at_once,
                processes=False,
                dashboard_address="127.0.0.1:0",  # these show numbers and take no orders
                worker_dashboard_address="127.0.0.1:0",
                resources=has,
                memory_limit=None,
                silence_logs=logging.CRITICAL,
            ) as cluster,
            Client(cluster) as client,
        ):
            yield Place(client, set(has))
    finally:
        end_server()


def _check_fit(runs: Sequence[BatchRun], offers: list[dict[str, float]]) -> None:
    """Refuse runs that no worker could ever take. No workers yet: they may come."""
    for run in runs:
        wanted = needs(run.resources)
        for name, value in wanted.items():
            most = [offer.get(name, 0 if name == "GPU" else math.inf) for offer in offers]
            if most and max(most) < value:
                raise UseError(
                    f"step {run.step!r} asks for {value:g} {name}",
                    found=f"at most {max(most):g} on one worker",
                    fix=f"lower resources.{ {'GPU': 'gpus', 'CORES': 'cores', 'MEMORY': 'memory'}[name] }, "
                    "or use --scheduler with workers that offer it",
                )
