"""What a report says, piece by piece, and the two ways to write it down: Markdown and a page for the browser."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from smartlab.core import page

WIDE = 96  # pixels of a drawn interval
DENSE = 1.35  # pixels of a figure for each of the page


class Estimate(NamedTuple):
    """A number with its interval, and the range over which its column is drawn."""

    value: float
    low: float = math.nan
    high: float = math.nan
    span: tuple[float, float] = (0.0, 0.0)

    def __str__(self) -> str:
        known = "" if math.isnan(self.low) else f" [{self.low:.4g}, {self.high:.4g}]"
        return f"{self.value:.4g}{known}"


class Link(NamedTuple):
    text: str
    path: str  # relative to the report


class Thumbnail(NamedTuple):
    """A small picture that opens the whole one; in pages only."""

    path: Path
    width: int = 640

    def __str__(self) -> str:
        return ""


Cell = str | Estimate | Link | Thumbnail | list[Link]


@dataclass
class Heading:
    text: str
    level: int = 2


@dataclass
class Text:
    """A paragraph; `code` in backticks."""

    text: str
    style: str = ""


@dataclass
class Table:
    head: Sequence[str]
    body: Sequence[Sequence[Cell]]
    more: int = 0  # rows left out


@dataclass
class Pictures:
    """Figures side by side."""

    paths: Sequence[Path]


@dataclass
class OnPage:
    """Not in Markdown; with a title folded away until it is clicked."""

    blocks: Sequence[Block]
    title: str = ""


@dataclass
class Bar:
    """How much is done; not in Markdown either."""

    share: float


Block = Heading | Text | Table | Pictures | OnPage | Bar


def as_markdown(title: str, blocks: Sequence[Block], out: Path) -> str:
    lines = [f"# {title}", ""]
    for block in blocks:
        match block:
            case Heading():
                lines += [f"{'#' * block.level} {block.text}", ""]
            case Text():
                lines += [f"**{block.text}**" if block.style == "headline" else block.text, ""]
            case Table():
                first, *rows = (f"| {' | '.join(map(_plain, row))} |" for row in [block.head, *block.body])
                lines += [first, "| " + " | ".join("---" for _ in block.head) + " |", *rows]
                lines += [f"… and {block.more} more."] * bool(block.more) + [""]
            case Pictures():
                lines += [line for p in block.paths for line in (f"![{p.stem}]({p.relative_to(out)})", "")]
    return "\n".join(lines) + "\n"


def _plain(cell: Cell) -> str:
    """A text that stays in its cell and is no HTML: a parameter or an error may hold anything."""
    if isinstance(cell, list):
        return " ".join(map(_plain, cell))
    if isinstance(cell, Link):
        return f"[{cell.text}]({quote(cell.path)})"
    return " ".join(html.escape(str(cell), quote=False).split()).replace("|", "\\|")


def as_page(title: str, blocks: Sequence[Block], out: Path, refresh: int = 0) -> str:
    return page.page(title, "".join(_shown(block, out) for block in blocks), refresh=refresh)


def _shown(block: Block, out: Path) -> str:
    match block:
        case Heading():
            return f"<h{block.level}>{_words(block.text)}</h{block.level}>\n"
        case Text():
            return f'<p class="{block.style}">{_words(block.text)}</p>\n'
        case Bar():
            return f'<progress max="1" value="{block.share:.4f}"></progress>\n'
        case Pictures():
            return f'<div class="pair">{"".join(_in_scale(p, out) for p in block.paths)}</div>\n'
        case Table():
            body = [[_cell(cell, out) for cell in row] for row in block.body]
            left_out = f"<p>… and {block.more} more.</p>\n" if block.more else ""
            return page.table([_words(text) for text in block.head], body) + left_out
        case OnPage():
            inside = "".join(_shown(one, out) for one in block.blocks)
            title = f"<summary>{_words(block.title)}</summary>"
            return f"<details>{title}{inside}</details>\n" if block.title else inside


def _in_scale(path: Path, out: Path) -> str:
    """A figure as wide as it was drawn, so that letters of figures side by side are of one size."""
    from PIL import Image

    with Image.open(path) as picture:
        wide = round(picture.width / DENSE)
    return page.figure(page.inline(path), path.stem, link=_link(path, out), width=wide)


def _words(text: str) -> str:
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", html.escape(text))


def _link(path: Path, out: Path) -> str:
    return quote(str(path.relative_to(out)))


def _cell(cell: Cell, out: Path) -> str:
    if isinstance(cell, list):
        return "&nbsp;·&nbsp;".join(_cell(one, out) for one in cell)
    if isinstance(cell, Link):
        return f'<a href="{quote(cell.path)}">{html.escape(cell.text)}</a>'
    if isinstance(cell, Thumbnail):
        link = _link(cell.path, out)
        try:
            source = page.inline(cell.path, cell.width)
        except OSError:  # half written, or no picture
            return f'<a href="{link}">cannot be shown</a>'
        return f'<a href="{link}"><img alt="{html.escape(cell.path.stem)}" src="{source}"></a>'
    if isinstance(cell, Estimate):
        return f"{cell.value:.4g}<small>{str(cell).removeprefix(f'{cell.value:.4g}')}</small>{_drawn(cell)}"
    return _words(cell)


def _drawn(cell: Estimate) -> str:
    """The interval as a line and its value as a dot, on the scale of its column; the end of that is not passed."""
    low, high = cell.span
    if not high > low:
        return ""

    def at(value: float) -> float:
        return 4 + (WIDE - 8) * (min(max(value, low), high) - low) / (high - low)

    line = ""
    if not math.isnan(cell.low):
        line = f'<path d="M{at(cell.low):.1f} 5H{at(cell.high):.1f}" stroke="#0072B2" stroke-width="2"/>'
    zero = f'<path d="M{at(0):.1f} 0V10" stroke="#a0aab4" stroke-dasharray="2 2"/>' if low < 0 < high else ""
    dot = f'<circle cx="{at(cell.value):.1f}" cy="5" r="3.5" fill="#0072B2"/>'
    return f'<svg width="{WIDE}" height="10" aria-hidden="true">{zero}{line}{dot}</svg>'
