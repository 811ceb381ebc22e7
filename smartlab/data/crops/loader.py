"""Batches of crops in a fixed order, read ahead by worker processes.

- The order follows from (seed, epoch). Batch k of one process with batch size 2b is what two ranks
  with batch size b get together. Workers only decide who reads an item, never what it is.
- The state is two numbers, so a run resumes in the middle of an epoch with the batches it missed.
- Workers are processes: blosc2 holds Python's lock while it decompresses a slice. Two threads gave
  1.0 times the views of one and made a 0.5 ms pause of the main thread last 4 to 7 ms; two
  processes gave 1.8 times (two busy cores).
- They write into anonymous shared memory that is mapped before they are forked, and answer through
  pipes. Nothing is created in /dev/shm (no torch shared tensors, no semaphores), which containers
  often limit to 64 MB, less than one batch of views.
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import signal
import sys
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import torch

from smartlab.core.errors import DataError, SmartlabError, UseError

if TYPE_CHECKING:
    from smartlab.data.crops.views import CropDataset

Batch = dict[str, Any]
Arrays = dict[str, np.ndarray]
PATIENCE, PATIENCE_TO_STOP = 300.0, 5.0  # seconds without an answer of a worker, which takes milliseconds


class GivenUp(DataError):
    """The next batch did not come after the run was asked to stop; it is not counted as read."""


class CropLoader:
    """Iterate over batches of a `CropDataset`; one `for` loop is (the rest of) one epoch.

    A batch is a dict: the dataset's arrays as tensors with a leading batch axis, on `device`; numbers
    and small arrays stacked as tensors; everything else as lists. Batches are the caller's to keep.

    workers:    processes that read ahead; 0 reads in this one.
    rank, world: this process takes its share of every global batch of batch × world items.
    drop_last:  leave out the last, smaller batch (training); evaluation wants False.

    >>> loader = CropLoader(ViewDataset(store), 8, workers=2)
    >>> for batch in loader: step(batch["views"])
    >>> torch.save(loader.state_dict(), path)
    """

    def __init__(
        self,
        dataset: CropDataset,
        batch: int,
        *,
        workers: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        device: str | torch.device | None = None,
        rank: int = 0,
        world: int = 1,
        drop_last: bool = True,
        prefetch: int = 2,
    ) -> None:
        if batch < 1 or workers < 0 or prefetch < 1 or not 0 <= rank < world:
            raise UseError(
                "out of range",
                found=f"batch {batch}, workers {workers}, prefetch {prefetch}, rank {rank} of {world}",
                expected="batch ≥ 1, workers ≥ 0, prefetch ≥ 1, 0 ≤ rank < world",
            )
        self.dataset, self.batch, self.workers, self.seed = dataset, batch, workers, seed
        self.shuffle, self.rank, self.world, self.drop_last = shuffle, rank, world, drop_last
        self.device = torch.device(device or "cpu")
        self.prefetch = prefetch
        self.epoch, self.position = 0, 0  # the next batch to hand out
        self.wait_seconds = 0.0  # time the caller spent waiting for data, in all
        self._order: tuple[int, np.ndarray] | None = None  # of the last epoch asked for
        self._memory = _Memory(pinned=self.device.type == "cuda")
        self._pool: _Pool | None = None
        self.stopped: Callable[[], bool] = lambda: False  # whether whoever iterates was asked to stop
        if len(self) == 0:
            raise UseError(
                "the dataset is smaller than one global batch",
                found=f"{len(dataset)} items",
                expected=f"at least {batch * world}",
                fix="lower the batch size, raise `draws`, or set drop_last=False",
            )

    def __len__(self) -> int:
        """Batches in an epoch."""
        size = self.batch * self.world
        return len(self.dataset) // size if self.drop_last else -(-len(self.dataset) // size)

    def indices(self, epoch: int, position: int) -> list[int]:
        """Items of one batch of this rank."""
        if self._order is None or self._order[0] != epoch:
            order = np.arange(len(self.dataset))
            if self.shuffle:
                np.random.default_rng((self.seed, epoch)).shuffle(order)
            self._order = epoch, order
        start = position * self.batch * self.world + self.rank * self.batch
        return self._order[1][start : start + self.batch].tolist()

    def __iter__(self) -> Iterator[Batch]:
        batches = self._read_ahead() if self.workers else self._read_here()
        try:
            while self.position < len(self):
                start = time.perf_counter()
                batch = next(batches)
                self.wait_seconds += time.perf_counter() - start
                self.position += 1  # before the caller can ask for the state
                yield batch
            self.epoch, self.position = self.epoch + 1, 0
        finally:
            batches.close()

    # ---- state

    def state_dict(self) -> dict[str, int]:
        """Where the next batch comes from, and what that depends on."""
        return {
            "epoch": self.epoch,
            "position": self.position,
            "seed": self.seed,
            "items": len(self.dataset),
            "global_batch": self.batch * self.world,
            "shuffle": int(self.shuffle),
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from a saved state, with any number of workers or ranks but the same global batch."""
        mine = self.state_dict()
        for key in ("seed", "items", "global_batch", "shuffle"):
            if state[key] != mine[key]:
                raise UseError(
                    f"the saved position of the loader is for another {key.replace('_', ' ')}",
                    found=state[key],
                    expected=mine[key],
                    fix="resume with the settings of the run, or start a new one",
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])

    # ---- reading

    def _read_here(self) -> Generator[Batch, None, None]:
        for position in range(self.position, len(self)):
            chosen = self.indices(self.epoch, position)
            tensors = self._memory.tensors(self.dataset, len(chosen))
            arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
            about = [self.dataset.read(self.epoch, i, _row(arrays, k)) for k, i in enumerate(chosen)]
            yield self._send(tensors) | _collate(about)

    def _read_ahead(self) -> Generator[Batch, None, None]:
        if self._pool is None or self._pool.closed:
            self._pool = _Pool(self.dataset, self.batch, self.workers, self.prefetch)
        pool, asked = self._pool, iter(range(self.position, len(self)))
        try:
            for position in asked:
                pool.ask(self.epoch, self.indices(self.epoch, position))
                if pool.full:
                    break
            while pool.pending:
                arrays, about = pool.take(self.stopped)
                tensors = self._memory.tensors(self.dataset, len(about))
                for name, tensor in tensors.items():
                    tensor.numpy()[:] = arrays[name]
                # the slot is free now that its content has been copied
                if (position := next(asked, -1)) >= 0:
                    pool.ask(self.epoch, self.indices(self.epoch, position))
                yield self._send(tensors) | _collate(about)
        finally:
            pool.drop()

    def _send(self, tensors: dict[str, torch.Tensor]) -> Batch:
        return {name: tensor.to(self.device, non_blocking=True) for name, tensor in tensors.items()}

    def close(self) -> None:
        """End the workers; they also end with the loader or the program."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def __del__(self) -> None:
        if getattr(self, "_pool", None) is not None:
            self.close()


class _Memory:
    """Memory for batches, used again once the caller has let go of every tensor on it.

    Fresh memory costs a page fault per 4 kB, up to a fifth of the time of reading a batch. Torch keeps
    page-locked memory for reuse itself; for ordinary memory, a numpy array counts who refers to it.
    """

    def __init__(self, pinned: bool) -> None:
        self.pinned = pinned
        self.arrays: list[np.ndarray] = []

    def tensors(self, dataset: CropDataset, batch: int) -> dict[str, torch.Tensor]:
        return {
            name: self._tensor((batch, *shape), np.dtype(dtype))
            for name, (shape, dtype) in dataset.fields.items()
        }

    def _tensor(self, shape: tuple[int, ...], dtype: np.dtype) -> torch.Tensor:
        if self.pinned:
            return torch.empty(shape, dtype=_TORCH[dtype], pin_memory=True)
        for array in self.arrays:
            # three references are ours: the list, `array`, and the argument of getrefcount
            if array.shape == shape and array.dtype == dtype and sys.getrefcount(array) == 3:
                return torch.from_numpy(array)
        array = np.empty(shape, dtype)
        self.arrays = [*self.arrays[-_KEPT:], array]
        return torch.from_numpy(array)


_KEPT = 7  # arrays remembered: the batch in hand and the next one, of datasets with up to four fields
_TORCH = {np.dtype(np.int16): torch.int16, np.dtype(np.uint8): torch.uint8}


def _row(arrays: Arrays, k: int) -> Arrays:
    return {name: array[k] for name, array in arrays.items()}


def _collate(about: list[dict[str, Any]]) -> Batch:
    batch: Batch = {}
    for name, first in (about[0] if about else {}).items():  # none for a rank beyond a short last batch
        values = [item[name] for item in about]
        number = isinstance(first, bool | int | float | np.ndarray | np.number)
        batch[name] = torch.from_numpy(np.stack(values)) if number else values
    return batch


class _Pool:
    """Worker processes and the memory they share with this one: `prefetch` slots of one batch each."""

    def __init__(self, dataset: CropDataset, batch: int, workers: int, prefetch: int) -> None:
        if "fork" not in multiprocessing.get_all_start_methods():
            raise UseError("loader workers need a system that can fork", fix="set data.workers=0")
        context = multiprocessing.get_context("fork")
        self.slots = [_shared(dataset, batch) for _ in range(prefetch)]
        self.free = deque(range(prefetch))
        self.pending: deque[tuple[int, int, int]] = deque()  # slot, batch length, first worker
        self.turn = 0  # which worker reads the next item: all share evenly, whatever the batch size
        self.closed = False
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(workers):
            mine, theirs = context.Pipe()
            ends = [*self.pipes, mine]  # of this process; a worker that kept them would never see them close
            process = context.Process(target=_work, args=(theirs, ends, dataset, self.slots), daemon=True)
            with warnings.catch_warnings():  # Python ≥ 3.12 warns of forking with threads; a worker
                warnings.simplefilter("ignore", DeprecationWarning)  # runs none of their code
                process.start()
            theirs.close()
            self.pipes.append(mine)
            self.processes.append(process)

    @property
    def full(self) -> bool:
        return not self.free

    def ask(self, epoch: int, indices: list[int]) -> None:
        """Have a batch read into a free slot."""
        slot = self.free.popleft()
        for worker, rows in self._shares(len(indices), self.turn):
            try:
                self.pipes[worker].send((slot, epoch, [(row, indices[row]) for row in rows]))
            except OSError:
                self._died(worker)
        self.pending.append((slot, len(indices), self.turn))
        self.turn = (self.turn + len(indices)) % len(self.pipes)

    def _shares(self, count: int, turn: int) -> Iterator[tuple[int, range]]:
        for k in range(min(count, len(self.pipes))):
            yield (turn + k) % len(self.pipes), range(k, count, len(self.pipes))

    def take(self, stopped: Callable[[], bool] = lambda: False) -> tuple[Arrays, list[dict[str, Any]]]:
        """The oldest batch asked for. Its arrays are valid until the next `ask`."""
        slot, count, turn = self.pending.popleft()
        about: dict[int, dict[str, Any]] = {}
        failed: Exception | None = None
        for worker, _ in self._shares(count, turn):
            answer = self._receive(worker, stopped)
            if isinstance(answer, Exception):
                failed = answer
            else:
                about.update(answer)
        self.free.append(slot)
        if failed is not None:
            raise failed
        arrays = {name: array[:count] for name, array in self.slots[slot].items()}
        return arrays, [about[row] for row in range(count)]

    def _receive(self, worker: int, stopped: Callable[[], bool]) -> Any:
        """The answer of a worker. One that gives none for long is given up, sooner once the run was asked to stop.

        What is counted are polls: the time in which all of the run was suspended is not the worker's.
        """
        patience, waited, since_asked = float(os.environ.get("SMARTLAB_LOADER_WAIT", PATIENCE)), 0.0, 0.0
        try:
            while not self.pipes[worker].poll(0.5):
                waited, since_asked = waited + 0.5, since_asked + 0.5 * stopped()
                if waited >= patience or since_asked >= PATIENCE_TO_STOP:
                    self.close(0)
                    raise (GivenUp if since_asked else DataError)(
                        "a loader worker does not answer",
                        found=f"nothing for {waited:.0f} s",
                        fix="check the disk that holds the store; the last checkpoint is whole, go on with --resume",
                    )
            return self.pipes[worker].recv()
        except (EOFError, OSError):
            self._died(worker)

    def _died(self, worker: int) -> NoReturn:
        self.processes[worker].join(1)
        code = self.processes[worker].exitcode
        self.close(0)
        raise DataError(
            "a loader worker died",
            found=f"exit code {code}" + (", killed" if code == -signal.SIGKILL else ""),
            fix="the system may have run out of memory: lower data.workers or the batch size, then go on with --resume",
        ) from None

    def drop(self) -> None:
        """Wait for what is being read and forget it, so that the next epoch starts clean."""
        while self.pending:
            try:
                self.take(lambda: True)
            except Exception:  # nobody will see this batch, nor what was wrong with it
                continue

    def close(self, seconds: float = 5) -> None:
        """End the workers; those that have not ended by themselves after some seconds are killed."""
        self.pending.clear()
        self.closed = True
        for pipe in self.pipes:
            pipe.close()  # ends the worker's loop
        for process in self.processes:
            process.join(seconds)
            if process.is_alive():
                process.kill()  # it need not heed a gentler signal: it has the handlers of the run
                process.join(1)


def _shared(dataset: CropDataset, batch: int) -> Arrays:
    """Arrays for one batch in anonymous shared memory: inherited by forked workers, never a file."""
    arrays = {}
    for name, (shape, dtype) in dataset.fields.items():
        size = batch * int(np.prod(shape)) * np.dtype(dtype).itemsize
        arrays[name] = np.frombuffer(mmap.mmap(-1, size), dtype).reshape(batch, *shape)
    return arrays


def _work(pipe: Connection, others: list[Connection], dataset: CropDataset, slots: list[Arrays]) -> None:
    """A worker's life: read what is asked for, until the pipe closes."""
    for other in others:
        other.close()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the main process, which ends us
    while True:
        try:
            slot, epoch, rows = pipe.recv()
        except (EOFError, OSError):
            return
        answer: Any
        try:
            answer = {row: dataset.read(epoch, index, _row(slots[slot], row)) for row, index in rows}
        except SmartlabError as error:
            answer = error
        except Exception:
            answer = RuntimeError(f"a loader worker failed:\n{traceback.format_exc()}")
        try:
            pipe.send(answer)
        except OSError:  # nobody reads: the main process has ended
            return
