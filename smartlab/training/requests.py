"""What the outside asks of a run: SIGTERM and Ctrl-C save and stop, SIGUSR1 saves and goes on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch

from smartlab.core.files import held

T = TypeVar("T")
R = TypeVar("R")


class Requests:
    """Listens while it exists; `agreed` tells, the same on all processes, what was asked for."""

    _codes = ("", "save", "stop")

    def __init__(self, device: torch.device, world: int) -> None:
        self.device, self.world, self.asked = device, world, ""
        self._before: dict[int, Any] = {}
        if threading.current_thread() is not threading.main_thread():
            return  # Python takes signals in the main thread only
        answers = {signal.SIGTERM: "stop", signal.SIGINT: "stop"}
        if hasattr(signal, "SIGUSR1"):
            answers[signal.SIGUSR1] = "save"

        def note(number: int, frame: Any) -> None:
            if number == signal.SIGINT and self.asked == "stop":
                raise KeyboardInterrupt  # a second Ctrl-C does not wait
            asked = answers[signal.Signals(number)]
            self.asked = max(self.asked, asked, key=self._codes.index)  # a stop is never forgotten

        self._before = {number: signal.signal(number, note) for number in answers}

    def agreed(self) -> str:
        """ "", "save" or "stop": the strongest that any process was asked since the last call."""
        asked, self.asked = self.asked, ""  # what comes from here on is for the next call
        code = self._codes.index(asked)
        if self.world > 1:
            most = torch.tensor([float(code)], device=self.device)
            torch.distributed.all_reduce(most, torch.distributed.ReduceOp.MAX)
            code = int(most)
        return self._codes[code]

    def close(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def _together() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def from_main(value: T) -> T:
    """What the first process of a run found, on all of them: another may see another state of a shared disk."""
    told = [value]
    if _together():
        torch.distributed.broadcast_object_list(told)
    return told[0]


def ranks() -> tuple[int, int]:
    """(which of the processes of this run this is, how many there are), as the launcher says."""
    if _together():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    if "LOCAL_RANK" not in os.environ:  # some schedulers set the others for whatever they start
        return 0, 1
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextmanager
def first_alone() -> Iterator[None]:
    """The first process of a run before the others: what it builds, they find."""
    if ranks()[1] == 1:
        yield
        return
    from accelerate import PartialState

    with PartialState(cpu=on_cpu()).main_process_first():
        yield


def on_cpu() -> bool:
    """Whether there is nothing else; accelerate overlooks the processes of torchrun unless told so."""
    return not (torch.cuda.is_available() or torch.backends.mps.is_available())


def shared(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """[function(item) for item in items], of which each process does its share and all get the whole."""
    if not _together():
        return [function(item) for item in items]
    rank, world = ranks()
    mine = [function(item) for item in items[rank::world]]
    found: list[Any] = [None] * world
    torch.distributed.all_gather_object(found, mine)
    return [found[i % world][i // world] for i in range(len(items))]


def only_one(out: Path) -> AbstractContextManager[None]:
    """The run folder for this run alone, until it ends: of several processes of one run the first holds it for all."""
    if ranks()[0] > 0:
        return nullcontext()
    return held(out, "another process trains in this folder")
