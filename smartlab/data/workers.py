"""Run one function over a long list of jobs on Dask, with few of them in flight.

The jobs may be a generator over 10,000 images: at any time only twice as many as there are workers
have been submitted, so memory does not grow with the cohort. SIGTERM and Ctrl-C stop submission and
let what is running finish; a second Ctrl-C breaks off.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain, islice
from typing import Any, Generic, TypeVar

from smartlab.errors import UseError

T = TypeVar("T")
R = TypeVar("R")

CLOSING = 30.0  # seconds that a cluster of processes is given to end


class StopRequest:
    """Set by a signal: finish what is running, start nothing new."""

    def __init__(self) -> None:
        self.asked = False

    def __call__(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True


@contextmanager
def draining() -> Iterator[StopRequest]:
    """SIGTERM and Ctrl-C only ask to stop, while inside. Signals reach the main thread only."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    old = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


class Lost(Generic[T]):
    """The worker died with this job and no other, again and again: out of memory, or a crash in a codec."""

    def __init__(self, job: T) -> None:
        self.job = job


def run_bounded(
    function: Callable[[T], R], jobs: Iterable[T], workers: int, scheduler: str | None, stop: StopRequest
) -> Generator[R | Lost[T], None, None]:
    """Results in order of completion. workers=0 without a scheduler runs here, one by one.

    The function must catch its own errors: an exception of it is a fault of the program.
    """
    if workers == 0 and scheduler is None:
        for job in jobs:
            if stop.asked:
                return
            yield function(job)
        return
    waiting = iter(jobs)
    if (first := list(islice(waiting, 1))) == []:
        return  # no cluster for nothing
    from distributed import KilledWorker, as_completed

    with ExitStack() as stack:
        cluster = _connect(scheduler) if scheduler else stack.enter_context(local_cluster(workers))
        client = stack.enter_context(_client(cluster))
        width = 2 * (workers or sum(client.nthreads().values()) or 1)
        jobs_of = {}

        def submit(job: T) -> Any:
            future = client.submit(function, job, pure=False)
            jobs_of[future.key] = job
            return future

        suspects = []  # a dying worker also takes the jobs that waited on it
        running = as_completed([submit(job) for job in chain(first, islice(waiting, width - 1))])
        for future in running:
            job = jobs_of.pop(future.key)
            try:
                yield future.result()
            except KilledWorker:
                suspects.append(job)
            del future  # lets the scheduler forget it
            for following in () if stop.asked else islice(waiting, 1):
                running.add(submit(following))
        for job in suspects:  # each alone: who dies now is guilty
            if stop.asked:
                return
            try:
                yield submit(job).result()
            except KilledWorker:
                yield Lost(job)


@contextmanager
def local_cluster(workers: int, threads: int = 1, **options: Any) -> Iterator[Any]:
    """Worker processes on this machine.

    Forked where possible: a spawned worker imports the user's script again, which for a script
    without a main guard starts the build again. The workers touch neither torch nor a GPU. They
    inherit the draining handlers, so a Ctrl-C that reaches the whole group does not kill them. No
    memory limit: a forked worker shares its parent's pages, which Dask would count as its own. Closing is
    not waited for without end: seldom, after a worker died, Dask waits for a process that is gone.
    """
    import dask
    from distributed import LocalCluster

    method = "fork" if "fork" in multiprocessing.get_all_start_methods() else "spawn"
    with dask.config.set({"distributed.worker.multiprocessing-method": method}):
        cluster = LocalCluster(
            n_workers=workers,
            threads_per_worker=threads,
            memory_limit=None,
            dashboard_address="127.0.0.1:0",  # any free port: several builds may run
            silence_logs=logging.CRITICAL,
            **options,
        )
        try:
            yield cluster
        finally:
            with suppress(TimeoutError):
                cluster.close(timeout=CLOSING)


def _renew_helper_thread() -> None:
    """Dask hands large messages to one helper thread of the process. A fork of a process that has it already
    believes in a thread that was not forked along, and waits for it forever."""
    if utils := sys.modules.get("distributed.utils"):
        utils._offload_executor = ThreadPoolExecutor(1, thread_name_prefix="Dask-Offload")  # type: ignore[attr-defined]


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_helper_thread)


def _client(cluster: Any) -> Any:
    from distributed import Client

    try:
        return Client(cluster, timeout=15)
    except OSError as error:
        raise UseError(
            "no Dask scheduler answers", found=cluster, fix="check the address and that it is running"
        ) from error


def _connect(scheduler: str) -> str:
    if "://" not in scheduler:
        raise UseError(
            "not the address of a Dask scheduler", found=scheduler, expected="such as tcp://10.0.0.5:8786"
        )
    return scheduler
