"""Watch a run from outside: one that trains in another process, on another machine, or under a launcher.

All that is read is the run folder, so a shared file system is all it takes. Nothing here can stop or
change the run.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartlab.core.errors import DataError
from smartlab.training.live import Live
from smartlab.training.run import Run

if TYPE_CHECKING:
    from smartlab.core.config import Config

WAIT = 1.0  # seconds between two looks


def follow(path: str | Path, seconds: float, *, stop: threading.Event | None = None) -> Run:
    """Show a run as it goes until it ends, or for so many seconds; returns it as it stands then.

    The folder may still be empty: what has not begun is waited for.

    >>> run = follow("runs/a", seconds=600)
    """
    path, stop = Path(path), stop or threading.Event()
    end = time.monotonic() + seconds
    while not (path / "config.yaml").is_file():
        if time.monotonic() >= end or stop.is_set():
            raise DataError(
                "no run began here",
                path=path,
                found=f"no config.yaml after {seconds:g} s",
                fix="check the path",
            )
        stop.wait(min(WAIT, max(0.0, end - time.monotonic())))
    live: Live | None = None
    shown = 0
    while True:
        last_look = stop.is_set() or time.monotonic() >= end
        run = Run(path)
        history, done = run.history, _ended(run)
        if live is None:
            live = Live(path.name, run.config.train.steps)
        shown = min(shown, len(history))  # a resumed run takes rows back
        for row in history.iloc[shown:].to_dict("records"):
            live.update({str(k): v for k, v in row.items() if v == v})
        shown = len(history)
        if pictures := sorted((path / "figures").glob("step-*.png")):
            with contextlib.suppress(OSError):
                live.picture(pictures[-1])
        if done or last_look:
            live.draw()
            return run
        stop.wait(min(WAIT, max(0.0, end - time.monotonic())))


def _ended(run: Run) -> bool:
    events = run.events
    return bool(events) and events[-1]["event"] in ("finished", "stopped")


def launch(config: Config, out: Path, resume: bool, processes: int) -> Run:
    """Train on several GPUs of this machine from a notebook, watching from the kernel.

    The processes are children of the kernel: interrupting stops them, each after the step in hand.
    """
    from accelerate import notebook_launcher

    from smartlab.data.store.prepare import prepare_store

    prepare_store(config.data)  # once, before there are several
    stop = threading.Event()
    watch = threading.Thread(target=_watch, args=(out, stop), daemon=True)
    watch.start()
    try:
        notebook_launcher(_work, (config, str(out), resume), num_processes=processes)
    except KeyboardInterrupt:
        print("stopping after the step in hand …")
    finally:
        end_children()
        stop.set()
        watch.join()
    return Run(out)


def _work(config: Config, out: str, resume: bool) -> None:
    from smartlab.training.pretrain import pretrain

    pretrain(config, out, resume=resume, progress=False)


def _watch(out: Path, stop: threading.Event) -> None:
    with contextlib.suppress(DataError):  # it ended before it began: the launcher says why
        follow(out, 1e9, stop=stop)


def end_children(patience: float = 60.0) -> None:
    """Leave no process of ours behind: wait for each, then end it."""
    children: list[Any] = multiprocessing.active_children()
    end = time.monotonic() + patience
    for child in children:
        child.join(max(0.0, end - time.monotonic()))
        if child.is_alive():
            child.terminate()
            child.join(5)
        if child.is_alive():
            child.kill()
            child.join()
