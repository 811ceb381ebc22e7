"""Where a batch stands: done, running, failed, waiting and the time left, by step.

In a terminal the table is redrawn in place, in a notebook it is one output that changes, and in a log file it is
a line now and then.
"""

from __future__ import annotations

import html
import math
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from smartlab.core import page
from smartlab.training.live import clock, in_notebook

EVERY = 1.0  # seconds between two drawings
LINE_EVERY = 30.0  # seconds between two lines of a log
COLUMNS = ("done", "running", "failed", "waiting")


@dataclass
class Count:
    """How many runs of a step are in which state, and how long those took that are done."""

    name: str
    done: int = 0
    running: int = 0
    failed: int = 0  # or not to be run, because a run they build on failed
    waiting: int = 0
    known: list[float] = field(default_factory=list)  # seconds of each done run

    @property
    def left(self) -> float:
        """Runs; half of a running one is taken to be over."""
        return self.waiting + self.running / 2

    def work(self) -> tuple[float, float]:
        """Seconds of work left and by how much that may be wrong (95%); not-a-number before the first has ended.

        The runs left are taken to be as long as those done, and to spread like them: as if one more had been seen
        that was a third off, for after one run nobody knows.
        """
        if not self.left:
            return 0.0, 0.0
        if not self.known:
            return math.nan, math.nan
        k, mean = len(self.known), statistics.fmean(self.known)
        spread = math.sqrt((sum((x - mean) ** 2 for x in self.known) + (mean / 3) ** 2) / k)
        return self.left * mean, 2 * spread * math.sqrt(self.left + self.left**2 / k)


@dataclass
class Standing:
    """The steps of a batch, of whose runs `at_once` go on at a time."""

    steps: list[Count]
    at_once: int = 1

    def rows(self) -> list[list[str]]:
        """COLUMNS and the time left, a row per step, and one for all."""
        rows = [[s.name, *(str(getattr(s, c)) for c in COLUMNS), self.left([s])] for s in self.steps]
        sums = [str(self.sum(column)) for column in COLUMNS]
        return [*rows, ["all", *sums, self.left(self.steps)]] if len(rows) > 1 else rows

    def sum(self, column: str) -> int:
        return sum(getattr(s, column) for s in self.steps)

    def left(self, steps: Sequence[Count]) -> str:
        """The time left as a range; nothing before a run of each kind has ended."""
        work, wrong = zip(*(s.work() for s in steps), strict=True)
        left, half = sum(work), math.hypot(*wrong)
        if not left or math.isnan(left):
            return ""
        each = max(1, min(self.at_once, math.ceil(sum(s.left for s in steps))))
        low, high = clock(max(0.0, left - half) / each), clock((left + half) / each)
        return f"{low} to {high}" if low != high else f"about {low}"

    def __str__(self) -> str:
        left = self.left(self.steps)
        numbers = ", ".join(f"{self.sum(column)} {column}" for column in COLUMNS)
        return f"{numbers} · {left} left" if left else numbers


class Progress:
    """Shows a batch while inside."""

    def __init__(self, title: str, shown: bool = True) -> None:
        self.title, self.shown = title, shown
        self.notebook = shown and in_notebook()
        self.terminal = shown and not self.notebook and sys.stdout.isatty()
        self.height, self.drawn, self.said = 0, 0.0, ""
        self.handle: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        if self.terminal and self.height:
            print(flush=True)

    def show(self, standing: Standing, *, draining: bool = False, ends: bool = False) -> None:
        every = EVERY if self.notebook or self.terminal else LINE_EVERY
        if not self.shown or (time.monotonic() - self.drawn < every and not ends):
            return
        self.drawn = time.monotonic()
        title = self.title + (" · finishing what runs; Ctrl-C again breaks off" if draining else "")
        head, rows = ["step", *COLUMNS, "time left"], standing.rows()
        if self.notebook:
            cells = [list(map(html.escape, row)) for row in rows]
            self._in_notebook(
                f"<div role='status'><b>{html.escape(title)}</b></div>{page.table(head, cells)}"
            )
        elif self.terminal:
            wide = max(len(row[0]) for row in [head, *rows])
            lines = [
                f"{row[0]:<{wide}}" + "".join(f"{cell:>9}" for cell in row[1:-1]) for row in [head, *rows]
            ]
            lines = [title, *(f"{line}{row[-1]:>18}" for line, row in zip(lines, [head, *rows], strict=True))]
            back = f"\x1b[{self.height - 1}A\r" if self.height > 1 else ""
            sys.stdout.write(back + "\n".join(f"\x1b[2K{line}" for line in lines))
            sys.stdout.flush()
            self.height = len(lines)
        elif (line := f"{self.title} · {standing}") != self.said:
            self.said = line
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    def _in_notebook(self, shown: str) -> None:
        from IPython.display import HTML, display

        if self.handle is None:
            self.handle = display(HTML(shown), display_id=True)
        else:
            self.handle.update(HTML(shown))
