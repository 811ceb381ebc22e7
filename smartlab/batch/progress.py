"""The table that follows a batch: done, running, failed, waiting and the time left, by step.

In a terminal it is redrawn in place, in a notebook it is one output that changes, and in a log file it is a
line now and then.
"""

from __future__ import annotations

import html
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from smartlab.training.live import clock, in_notebook

EVERY = 1.0  # seconds between two drawings
LINE_EVERY = 30.0  # seconds between two lines of a log
WAITING, FLYING, BLOCKED = "waiting", "flying", "blocked"  # besides done and failed
COLUMNS = ("done", "running", "failed", "waiting")

__all__ = ["BLOCKED", "FLYING", "WAITING", "Progress", "StepCount", "clock", "seconds_left"]


@dataclass
class StepCount:
    """How many runs of a step are in which state, and how long those took that are done."""

    name: str
    limit: float  # seconds
    counts: Counter[str] = field(default_factory=Counter)
    known: list[float] = field(default_factory=list)  # seconds of each done run

    def each(self) -> float:
        """Seconds that a run of this step takes, as far as is known; its limit before the first is done."""
        return statistics.median(self.known) if self.known else self.limit

    def row(self) -> list[int]:
        c = self.counts
        return [c["done"], c[FLYING], c["failed"] + c[BLOCKED], c[WAITING]]


def seconds_left(steps: Sequence[StepCount], at_once: int) -> float:
    """Half of a running run is taken to be over."""
    work = sum(s.each() * (s.counts[WAITING] + s.counts[FLYING] / 2) for s in steps)
    return work / max(1, at_once)


class Progress:
    """Shows a batch while inside."""

    def __init__(self, title: str, shown: bool = True) -> None:
        self.title, self.shown = title, shown
        self.notebook = shown and in_notebook()
        self.terminal = shown and not self.notebook and sys.stdout.isatty()
        self.height, self.drawn, self.said = 0, 0.0, ""
        self.most = 1  # runs seen at once
        self.handle: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *failure: object) -> None:
        if self.terminal and self.height:
            print(flush=True)

    def show(self, steps: list[StepCount], *, draining: bool = False, ends: bool = False) -> None:
        every = EVERY if self.notebook or self.terminal else LINE_EVERY
        if not self.shown or (time.monotonic() - self.drawn < every and not ends):
            return
        self.drawn = time.monotonic()
        self.most = max(self.most, sum(s.counts[FLYING] for s in steps))
        head = self.title + (" · finishing what runs; Ctrl-C again breaks off" if draining else "")
        if self.notebook:
            self._in_notebook(self.as_html(head, steps))
        elif self.terminal:
            lines = self.as_text(head, steps)
            back = f"\x1b[{self.height - 1}A\r" if self.height > 1 else ""
            sys.stdout.write(back + "\n".join(f"\x1b[2K{line}" for line in lines))
            sys.stdout.flush()
            self.height = len(lines)
        elif (line := self.as_line(steps)) != self.said:
            self.said = line
            print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)

    def left(self, steps: Sequence[StepCount]) -> str:
        waiting = any(s.counts[WAITING] or s.counts[FLYING] for s in steps)
        if not waiting:
            return "-"
        known = all(s.known for s in steps if s.counts[WAITING] or s.counts[FLYING])
        return ("" if known else "< ") + clock(seconds_left(steps, self.most))

    def as_text(self, head: str, steps: list[StepCount]) -> list[str]:
        wide = max(len(s.name) for s in steps)
        lines = [head, f"{'step':<{wide}}" + "".join(f"{c:>9}" for c in COLUMNS) + f"{'left':>14}"]
        for s in steps:
            lines.append(f"{s.name:<{wide}}" + "".join(f"{n:>9}" for n in s.row()) + f"{self.left([s]):>14}")
        if len(steps) > 1:
            lines.append(
                f"{'all':<{wide}}" + "".join(f"{n:>9}" for n in _sum(steps)) + f"{self.left(steps):>14}"
            )
        return lines

    def as_line(self, steps: list[StepCount]) -> str:
        numbers = ", ".join(f"{n} {name}" for n, name in zip(_sum(steps), COLUMNS, strict=True))
        return f"{self.title} · {numbers} · {self.left(steps)} left"

    def as_html(self, head: str, steps: list[StepCount]) -> str:
        rows = [[s.name, *s.row(), self.left([s])] for s in steps]
        rows += [["all", *_sum(steps), self.left(steps)]] if len(steps) > 1 else []
        cells = "".join(
            f"<tr><td style='text-align:left'>{html.escape(str(row[0]))}</td>"
            + "".join(f"<td>{html.escape(str(value))}</td>" for value in row[1:])
            + "</tr>"
            for row in rows
        )
        names = "".join(f"<th>{name}</th>" for name in ("step", *COLUMNS, "time left"))
        return f"<div role='status'><b>{html.escape(head)}</b></div><table><tr>{names}</tr>{cells}</table>"

    def _in_notebook(self, page: str) -> None:
        from IPython.display import HTML, display

        if self.handle is None:
            self.handle = display(HTML(page), display_id=True)
        else:
            self.handle.update(HTML(page))


def _sum(steps: Sequence[StepCount]) -> list[int]:
    return [sum(column) for column in zip(*(s.row() for s in steps), strict=True)]
