"""Run one function over a long list of jobs in processes, with few of them in flight.

The jobs may be a generator over 10,000 images: at any time only twice as many as there are workers
have been submitted, so memory does not grow with the cohort. SIGTERM and Ctrl-C stop submission and
let what is running finish; a second Ctrl-C breaks off. Who asks for a Dask scheduler gets its workers.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing import get_all_start_methods, get_context
from typing import Any, Generic, TypeVar

from smartlab.core.errors import UseError

T = TypeVar("T")
R = TypeVar("R")

PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> None:
    """End this process when `parent` does, even if that is killed."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it ended before we asked
            os._exit(1)
        return

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


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
    """The worker died with this job and no other, twice: out of memory, or a crash in a codec."""

    def __init__(self, job: T) -> None:
        self.job = job


def run_bounded(
    function: Callable[[T], R],
    jobs: Iterable[T],
    workers: int,
    scheduler: str | None = None,
    stop: StopRequest | None = None,
) -> Generator[R | Lost[T], None, None]:
    """Results in order of completion. workers=0 without a scheduler runs here, one by one.

    The function must catch its own errors: an exception of it is a fault of the program.
    """
    stop = stop or StopRequest()
    if scheduler:
        yield from _on_cluster(function, jobs, workers, scheduler, stop)
    elif workers == 0:
        for job in jobs:
            if stop.asked:
                return
            yield function(job)
    else:
        waiting, suspects = iter(jobs), list[T]()
        while found := (yield from _in_processes(function, waiting, workers, stop)):
            suspects += found
        for job in suspects:  # each alone: who dies now is guilty
            if (yield from _in_processes(function, iter([job]), 1, stop)):
                yield Lost(job)


def _in_processes(
    function: Callable[[T], R], waiting: Iterator[T], workers: int, stop: StopRequest
) -> Generator[R, None, list[T]]:
    """Results from one pool of processes, until all is done or a process dies: then it returns the jobs in hand.

    Forked where possible: a spawned worker imports the user's script again, which for a script without
    a main guard starts the work again. The workers touch neither torch nor a GPU. They inherit the
    draining handlers, so a Ctrl-C that reaches the whole group does not kill them; and they end with us.
    """
    running: dict[Future[R], T] = {}
    in_hand: list[T] = []
    method = "fork" if "fork" in get_all_start_methods() else "spawn"
    pool = ProcessPoolExecutor(workers, get_context(method), initializer=die_with, initargs=(os.getpid(),))
    try:
        while True:
            for job in () if stop.asked else islice(waiting, 2 * workers - len(running)):
                in_hand.append(job)
                running[pool.submit(function, job)] = job
            if not running:
                return []
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                result = future.result()
                in_hand.remove(running.pop(future))
                yield result
    except BrokenProcessPool:  # the pool ends the others by SIGTERM, which they take for a wish to drain
        for process in list((pool._processes or {}).values()):
            process.kill()
        return in_hand
    finally:
        pool.shutdown(cancel_futures=True)


def _on_cluster(
    function: Callable[[T], R], jobs: Iterable[T], workers: int, scheduler: str, stop: StopRequest
) -> Generator[R | Lost[T], None, None]:
    from distributed import KilledWorker, as_completed

    waiting, jobs_of = iter(jobs), dict[str, T]()
    with connect(scheduler) as client:
        width = 2 * (workers or sum(client.nthreads().values()) or 1)

        def submit(job: T) -> Any:
            future = client.submit(function, job, pure=False)
            jobs_of[future.key] = job
            return future

        suspects = []  # a dying worker also takes the jobs that waited on it
        running = as_completed([submit(job) for job in islice(waiting, width)])
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


def connect(scheduler: str) -> Any:
    """A client of the Dask scheduler at this address."""
    from distributed import Client

    if "://" not in scheduler:
        raise UseError(
            "not the address of a Dask scheduler", found=scheduler, expected="such as tcp://10.0.0.5:8786"
        )
    try:
        return Client(scheduler, timeout=15)
    except OSError as error:
        raise UseError(
            "no Dask scheduler answers", found=scheduler, fix="check the address and that it is running"
        ) from error
