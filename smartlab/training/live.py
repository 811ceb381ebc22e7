"""The run as one self-updating table in a notebook: what is measured, now and since the start.

Drawn as plain HTML with the curve of the losses and small inline ones, and the newest picture of a masked
view below; refreshed in place at most once a second, so that a long run leaves one short output behind
and not a flood.
"""

from __future__ import annotations

import base64
import html
import math
import time
from pathlib import Path
from typing import Any

ROWS = {  # column of metrics.csv -> what to call it
    "loss": "loss",
    "loss_amip": "hidden voxels (AMIP)",
    "loss_ampd": "hidden tokens (AMPD)",
    "loss_itd": "image tokens (AITD)",
    "loss_gitd": "global image tokens (GITD)",
    "loss_scale_1": "hidden patches, as large as the input",
    "loss_scale_2": "hidden patches, twice as fine",
    "loss_scale_4": "hidden patches, four times as fine",
    "attention_informativeness": "attention informativeness",
    "head_diversity": "head diversity",
    "hidden_lesion": "lesions hidden",
    "views_per_second": "views per second",
}
LOSSES = {"loss_amip": "#0072B2", "loss_ampd": "#D55E00", "loss_itd": "#009E73", "loss_gitd": "#CC79A7"} | {
    "loss_scale_1": "#0072B2",
    "loss_scale_2": "#D55E00",
    "loss_scale_4": "#009E73",
}  # drawn large, by colour
EVERY = 1.0  # seconds between two refreshes


def in_notebook() -> bool:
    """Whether this process is a Jupyter kernel (papermill's included)."""
    try:
        from IPython import get_ipython
    except ImportError:
        return False
    shell = get_ipython()
    return shell is not None and hasattr(shell, "kernel")


class Live:
    """A table that follows a run of `total` steps from `start`."""

    def __init__(self, name: str, total: int, start: int = 0) -> None:
        from IPython.display import HTML, display

        self.name, self.total, self.start, self.began = name, total, start, time.monotonic()
        self.history: dict[str, list[float]] = {}
        self.at: dict[str, list[float]] = {}  # the step of every value
        self.image = ""
        self.notes: list[str] = []
        self.row: dict[str, float] = {"step": start}
        self._drawn, self._html = 0.0, HTML
        self._handle: Any = display(HTML(self.render()), display_id=True)

    def update(self, row: dict[str, float]) -> None:
        self.row = row
        for name in ROWS:
            if (value := row.get(name)) is not None and math.isfinite(value):
                self.history.setdefault(name, []).append(value)
                self.at.setdefault(name, []).append(row["step"])
        if time.monotonic() - self._drawn > EVERY or row["step"] == self.total:
            self.draw()

    def note(self, text: str) -> None:
        self.notes = [*self.notes[-3:], text]
        self.draw()

    def picture(self, path: Path) -> None:
        """Show this PNG below the table, in place of the one before."""
        if path.name not in self.image:
            data = base64.b64encode(path.read_bytes()).decode()
            name = f"what is hidden and what is made of it, {path.name}"
            self.image = (
                f"<img alt='{html.escape(name)}' style='max-width:100%' src='data:image/png;base64,{data}'>"
            )
            self.draw()

    def draw(self) -> None:
        self._drawn = time.monotonic()
        if self._handle is not None:  # outside a notebook there is nothing to update
            self._handle.update(self._html(self.render()))

    def render(self) -> str:
        """The table as HTML."""
        step = int(self.row["step"])
        done = step - self.start
        left = (time.monotonic() - self.began) / done * (self.total - step) if done else math.nan
        ends = "finished" if step == self.total else f"{clock(left)} left" if done else "starting"
        masks = "" if "guided" not in self.row else f" · masks {'guided' if self.row['guided'] else 'random'}"
        head = f"<b>{html.escape(self.name)}</b>: step {step} of {self.total} · {ends}{masks}"
        lines = "".join(
            f"<tr><td style='text-align:left'>{label}</td><td>{values[0]:.4g}</td>"
            f"<td><b>{values[-1]:.4g}</b></td><td>{sparkline(values)}</td></tr>"
            for name, label in ROWS.items()
            if (values := self.history.get(name))
        )
        table = (
            f"<table><tr><th></th><th>first</th><th>now</th><th>since the start</th></tr>{lines}</table>"
            if lines
            else ""
        )
        notes = "".join(f"<div>⚠ {html.escape(text)}</div>" for text in self.notes)
        curves = {name: (self.at[name], self.history[name]) for name in LOSSES if name in self.history}
        plot = chart(curves, self.total) if any(len(at) > 1 for at, _ in curves.values()) else ""
        return f"<div role='status'>{head}</div>{plot}{table}{notes}{self.image}"


def chart(curves: dict[str, tuple[list[float], list[float]]], total: int) -> str:
    """The losses over the steps as inline SVG, each divided by its first value so that one axis holds all."""
    width, height, left, base = 560, 150, 34, 128
    shown = {}
    for name, (at, values) in curves.items():
        keep = sorted({round(i * (len(at) - 1) / 199) for i in range(200)})
        first = abs(values[0]) or 1.0
        shown[name] = [(at[i], values[i] / first) for i in keep]
    high = max(1.0, *(v for points in shown.values() for _, v in points))
    low = min(0.0, *(v for points in shown.values() for _, v in points))

    def place(step: float, value: float) -> str:
        x = left + step / max(1, total) * (width - left - 110)
        return f"{x:.1f},{base - (value - low) / (high - low) * (base - 10):.1f}"

    parts = []
    for row, (name, points) in enumerate(shown.items()):
        line = " ".join(place(*point) for point in points)
        colour, y = LOSSES[name], 22 + 18 * row
        parts.append(f"<polyline points='{line}' fill='none' stroke='{colour}' stroke-width='1.8'/>")
        parts.append(f"<text x='{width - 104}' y='{y}' fill='{colour}' font-size='12'>{name}</text>")
    axis = f"<path d='M{left},6 V{base} H{width - 110}' fill='none' stroke='#888'/>"
    ticks = (
        f"<text x='{left - 4}' y='14' text-anchor='end' font-size='11' fill='#888'>{high:.3g}</text>"
        f"<text x='{left - 4}' y='{base}' text-anchor='end' font-size='11' fill='#888'>{low:.2g}</text>"
        f"<text x='{left}' y='{height - 6}' font-size='11' fill='#888'>losses over their first value, step 0 to {total}</text>"
    )
    return f"<svg width='{width}' height='{height}' role='img' aria-label='losses so far'>{axis}{ticks}{''.join(parts)}</svg>"


def sparkline(values: list[float], width: int = 160, height: int = 24, most: int = 80) -> str:
    """A small curve as inline SVG."""
    if len(values) > most:
        values = [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]
    low, high = min(values), max(values)
    span, across = (high - low) or 1.0, max(1, len(values) - 1)
    points = " ".join(
        f"{2 + i * (width - 4) / across:.0f},{height - 3 - (v - low) / span * (height - 6):.1f}"
        for i, v in enumerate(values)
    )
    return (
        f"<svg width='{width}' height='{height}' role='img' aria-label='from {values[0]:.4g} to {values[-1]:.4g}'>"
        f"<polyline points='{points}' fill='none' stroke='#0072B2' stroke-width='1.5'/></svg>"
    )


def clock(seconds: float) -> str:
    """A length of time as people say it: 45 s, 12 min, 3 h 20 min."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
