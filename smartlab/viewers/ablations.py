"""Pictures of an ablation: forest plots, heat maps and curves, with intervals.

All take a table with one row per combination of factors: the factors' columns, `value`, `low` and `high`
(not-a-number where unknown), as `smartlab.batch.summarise` gives it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from smartlab.core.plots import OKABE_ITO

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SHADES = OKABE_ITO[4:7] + OKABE_ITO[:3] + OKABE_ITO[7:]  # yellow is too faint for thin lines
MARKERS = "osD^vPX"
MOST_ROWS = 40  # of a forest plot: more cannot be read


def forest(table: pd.DataFrame, by: Sequence[str], metric: str, *, title: str = "") -> Figure:
    """One line per combination, in the order of the table, coloured by the first factor."""
    import matplotlib.pyplot as plt

    table = table.head(MOST_ROWS)
    figure, ax = plt.subplots(figsize=(7.5, 1.3 + 0.3 * len(table)), layout="constrained")
    levels = list(dict.fromkeys(table[by[0]])) if by else [""]
    rest = list(by[1:] or by)
    for place, (_, row) in enumerate(table.iterrows()):
        number = levels.index(row[by[0]]) if by else 0
        shade = SHADES[number % len(SHADES)]
        if math.isfinite(row.low):
            ax.plot([row.low, row.high], [place, place], color=shade, linewidth=2, solid_capstyle="round")
        ax.plot(row.value, place, MARKERS[number % len(MARKERS)], color=shade, markersize=6)
    ax.set_yticks(range(len(table)), [_words(row, rest) for _, row in table.iterrows()], fontsize=8)
    ax.set_ylim(len(table) - 0.5, -0.5)
    if len(by) > 1:
        _legend(ax, by[0], levels, MARKERS)
        ax.set_ylabel(", ".join(rest))
    middle = float(table.value.mean())
    ax.axvline(middle, color="#999999", linewidth=1, linestyle=":", zorder=0)
    ax.set_xlabel(f"{metric}, 95% interval; dotted: mean of all" if table.low.notna().any() else metric)
    _clean(ax, "x")
    ax.set_title(title or ("" if len(by) > 1 else ", ".join(by)), fontsize=11)
    return figure


def _words(row: pd.Series, names: Sequence[str]) -> str:
    return ", ".join(_level(row[name]) for name in names)


def _level(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _legend(ax: Axes, name: str, levels: Sequence[Any], markers: str | None = None) -> None:
    from matplotlib.lines import Line2D

    handles = [
        Line2D(
            [],
            [],
            color=SHADES[i % len(SHADES)],
            marker=markers[i % len(markers)] if markers else "o",
            label=_level(level),
        )
        for i, level in enumerate(levels)
    ]
    ax.legend(
        handles=handles,
        title=name,
        frameon=False,
        fontsize=8,
        title_fontsize=8,
        loc="upper left",
        bbox_to_anchor=(1, 1),
    )


def _clean(ax: Axes, grid: Any) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis=grid, alpha=0.25)


def heat(table: pd.DataFrame, x: str, y: str, metric: str, *, title: str = "") -> Figure:
    """The value for each pair of levels, with the half-width of its interval; empty where nothing ran."""
    import matplotlib.pyplot as plt

    across, down = list(dict.fromkeys(table[x])), list(dict.fromkeys(table[y]))
    grid = np.full((len(down), len(across)), np.nan)
    for row in table.to_dict("records"):
        grid[down.index(row[y]), across.index(row[x])] = row["value"]
    figure, ax = plt.subplots(
        figsize=(2.6 + 1.15 * len(across), 1.5 + 0.62 * len(down)), layout="constrained"
    )
    picture = ax.imshow(grid, cmap="cividis", aspect="auto")
    low, high = np.nanmin(grid), np.nanmax(grid)
    for row in table.to_dict("records"):
        place = across.index(row[x]), down.index(row[y])
        half = (row["high"] - row["low"]) / 2
        text = f"{row['value']:.3g}" + (f"\n± {_short(half)}" if math.isfinite(half) else "")
        bright = (row["value"] - low) / ((high - low) or 1) > 0.55
        ax.text(*place, text, ha="center", va="center", fontsize=9, color="black" if bright else "white")
    ax.set_xticks(range(len(across)), [_level(v) for v in across], fontsize=9)
    ax.set_yticks(range(len(down)), [_level(v) for v in down], fontsize=9)
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(-0.5, len(across)), minor=True)
    ax.set_yticks(np.arange(-0.5, len(down)), minor=True)
    ax.grid(which="minor", color="white", linewidth=2)
    ax.tick_params(which="both", length=0)
    figure.colorbar(picture, ax=ax, label=metric).outline.set_visible(False)  # type: ignore[operator]
    ax.set_title(title, fontsize=11)
    return figure


def _short(number: float) -> str:
    """Two digits, without an exponent."""
    return f"{number:.0f}" if abs(number) >= 10 else f"{number:.2g}"


def dose(table: pd.DataFrame, x: str, by: str | None, metric: str, *, title: str = "") -> Figure:
    """The value over a factor that is a number, one line per level of `by`, with intervals."""
    import matplotlib.pyplot as plt

    figure, ax = plt.subplots(figsize=(6.2, 3.4), layout="constrained")
    levels = list(dict.fromkeys(table[by])) if by else [metric]
    step = float(np.diff(np.unique(table[x].to_numpy(float))).min(initial=1.0)) * 0.04
    for number, level in enumerate(levels):
        line = (table[table[by] == level] if by else table).sort_values(x)
        shade = SHADES[number % len(SHADES)]
        places = line[x].to_numpy(float)
        style: dict[str, Any] = {"color": shade, "marker": MARKERS[number % len(MARKERS)], "markersize": 5}
        low, high = line.low.to_numpy(float), line.high.to_numpy(float)
        if len(levels) <= 3:
            ax.plot(places, line.value, linewidth=1.8, **style)
            ax.fill_between(places, low, high, color=shade, alpha=0.15, linewidth=0)
            continue
        places = places + step * (number - (len(levels) - 1) / 2)  # many bands on top of each other hide all
        ax.plot(places, line.value, linewidth=1.2, **style)
        ax.vlines(places, low, high, color=shade, linewidth=1.2, alpha=0.7)
    if by:
        _legend(ax, by, levels, MARKERS)
    ax.set_xlabel(x)
    ax.set_ylabel(metric)
    _clean(ax, "both")
    ax.set_title(title, fontsize=11)
    return figure


def interactive(table: pd.DataFrame, by: Sequence[str], metric: str) -> go.Figure:
    """The forest plot to zoom and hover in."""
    import plotly.graph_objects as go

    figure = go.Figure()
    levels = list(dict.fromkeys(table[by[0]])) if by else [""]
    for number, level in enumerate(levels):
        part = table[table[by[0]] == level] if by else table
        labels = [_words(row, by) for _, row in part.iterrows()]
        bars = {
            "type": "data",
            "symmetric": False,
            "array": (part.high - part.value).tolist(),
            "arrayminus": (part.value - part.low).tolist(),
        }
        figure.add_scatter(
            x=part.value.tolist(),
            y=labels,
            error_x=bars if part.low.notna().any() else None,
            mode="markers",
            marker={"color": SHADES[number % len(SHADES)], "size": 9},
            name=_level(level),
            customdata=part[["low", "high", "n"]].to_numpy().tolist(),
            hovertemplate="%{y}<br>%{x:.4g} [%{customdata[0]:.4g}, %{customdata[1]:.4g}], n=%{customdata[2]:.0f}<extra></extra>",
        )
    figure.update_layout(
        template="plotly_white",
        xaxis_title=metric,
        legend_title=by[0] if by else "",
        yaxis={"autorange": "reversed"},
        height=160 + 26 * len(table),
        margin={"l": 10, "r": 10, "t": 20, "b": 10},
    )
    return figure


def close(figure: Figure) -> None:
    """Forget a figure that was saved: hundreds of open ones fill the memory."""
    import matplotlib.pyplot as plt

    plt.close(figure)
