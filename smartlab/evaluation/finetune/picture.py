"""Figures of fine-tuning: how it went, what it reached, and what a prediction looks like."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from smartlab.core import plots
from smartlab.core.files import whole
from smartlab.evaluation.judge.result import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMOOTH = 15  # steps in a moving mean of the loss
CURVES = 4  # more are not told apart
FOLD = re.compile(r"-fold[1-9]\d*$")


def segmentation(
    table: pd.DataFrame,
    estimates: Mapping[str, Estimate],
    histories: Mapping[str, pd.DataFrame],
    example: Path,
) -> Figure:
    """Learning curves, Dice per structure with intervals, and one scan's truth beside its prediction."""
    import matplotlib.pyplot as plt

    structures = list(dict.fromkeys(table.structure))
    width = 3.0 + max(4.0, 0.55 * len(structures))
    figure = plt.figure(figsize=(width + 1.5, 7.2), layout="constrained")
    grid = figure.add_gridspec(2, 1, height_ratios=(1, 1.15))
    top = grid[0].subgridspec(1, 2, width_ratios=(1, max(1.3, 0.18 * len(structures))))
    learning_curves(figure.add_subplot(top[0]), histories, "validation Dice")
    dice_bars(figure.add_subplot(top[1]), table, estimates, structures)
    with np.load(example) as kept:
        planes = [(kept[f"hu_{p}"], kept[f"truth_{p}"], kept[f"said_{p}"]) for p in ("axial", "coronal")]
    bottom = grid[1].subgridspec(1, 4)
    for row, (name, (hu, truth, said)) in enumerate(zip(("axial", "coronal"), planes, strict=True)):
        for column, (what, labels) in enumerate((("truth", truth), ("prediction", said))):
            ax = figure.add_subplot(bottom[2 * row + column])
            ax.imshow(
                hu, cmap="gray", vmin=plots.WINDOWS["soft tissue"][0], vmax=plots.WINDOWS["soft tissue"][1]
            )
            ax.imshow(plots.colour(labels, 0.55), interpolation="nearest")
            ax.set_title(f"{what}, {name}", fontsize=10)
            ax.axis("off")
    first = next(iter(histories))
    figure.suptitle(
        f"Segmentation by fine-tuning: mean Dice {estimates['dice']}, n = {estimates['dice'].n} ({first})",
        fontsize=12,
    )
    return figure


def classification(
    estimates: Mapping[str, Estimate],
    histories: Mapping[str, pd.DataFrame],
    runs: list[tuple[str, str]],
    score: str,
) -> Figure:
    """Learning curves, and the main score of every run with its interval.

    runs: (label on the axis, suffix of the run's metrics).
    """
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
    learning_curves(left, histories, "validation log-likelihood")
    values = [estimates[score + suffix] for _, suffix in runs]
    for place, value in enumerate(values):
        colour = plots.OKABE_ITO[(4 + place) % 8]
        low, high = value.value - value.low, value.high - value.value
        right.errorbar(place, value.value, [[low], [high]], fmt="o", capsize=4, color=colour, markersize=7)
        right.annotate(
            f"{value.value:.2f}", (place, value.value), (8, 0), textcoords="offset points", va="center"
        )
    right.set_xticks(range(len(runs)), [name for name, _ in runs], rotation=20 if len(runs) > 3 else 0)
    right.set_xlim(-0.6, len(runs) - 0.3)
    if score == "auc":
        right.axhline(0.5, color="#999999", linestyle=":", linewidth=1)
    right.set_ylabel(score.upper() if score == "auc" else score)
    _plain(right)
    figure.suptitle(f"Classification by fine-tuning, n = {values[0].n} patients", fontsize=12)
    return figure


def learning_curves(ax: Axes, histories: Mapping[str, pd.DataFrame], score: str) -> None:
    """Loss (left, lines) and validation score (right, dots) over the steps, of the first fold of each run."""
    beside = ax.twinx()
    shown = [(n.removesuffix("-fold0"), h) for n, h in histories.items() if not FOLD.search(n)][:CURVES]
    for place, (name, history) in enumerate(shown):
        colour = plots.OKABE_ITO[(4 + place) % 8]
        smooth = history.loss.rolling(SMOOTH, min_periods=1, center=True).mean()
        ax.plot(history.step, smooth, color=colour, linewidth=1.5, label=name)
        looked = history[history.score.notna()]
        beside.plot(looked.step, looked.score, "o--", color=colour, markersize=4, linewidth=0.8)
    ax.set_xlabel("step")
    ax.set_ylabel("training loss (line)")
    beside.set_ylabel(f"{score} (dots)")
    _plain(ax)
    beside.spines["top"].set_visible(False)
    if len(shown) > 1:
        ax.legend(frameon=False, fontsize=7, loc="lower left")


def dice_bars(
    ax: Axes, table: pd.DataFrame, estimates: Mapping[str, Estimate], structures: list[str]
) -> None:
    """Mean Dice per structure with its interval, a bar for every way to start and share of patients."""
    runs = [(m, f) for m, f in table[["mode", "fraction"]].drop_duplicates().itertuples(index=False)]
    width = 0.8 / len(runs)
    for place, (mode, fraction) in enumerate(runs):
        suffix = "" if place == 0 else f" ({mode}, {100 * fraction:g}%)"
        found = [estimates[f"dice:{structure}{suffix}"] for structure in structures]
        at = np.arange(len(structures)) + (place - (len(runs) - 1) / 2) * width
        height = np.array([e.value for e in found])
        error = np.array([[e.value - e.low, e.high - e.value] for e in found]).T
        ax.bar(
            at,
            height,
            width,
            yerr=np.nan_to_num(error).clip(0),
            color=plots.OKABE_ITO[(4 + place) % 8],
            error_kw={"elinewidth": 1, "capsize": 2},
            label=f"{mode}, {100 * fraction:g}%: {estimates[f'dice{suffix}'].value:.2f}",
        )
    ax.set_xticks(
        range(len(structures)), [s.replace("_", " ") for s in structures], rotation=40, ha="right", fontsize=8
    )
    ax.set_ylim(0, 1)
    ax.set_ylabel("Dice")
    _plain(ax)
    if len(runs) > 1:
        ax.legend(frameon=False, fontsize=8, title="mean", ncols=2)


def keep_example(path: Path, hu: np.ndarray, said: np.ndarray, truth: np.ndarray) -> None:
    """The axial and the coronal slice with the most structures in the truth, for the figure."""
    kept: dict[str, Any] = {}
    for plane, axis in (("axial", 2), ("coronal", 1)):
        others = tuple(a for a in range(3) if a != axis)
        counts = sum(
            ((truth == c).any(axis=others).astype(int) for c in np.unique(truth[truth > 0])),
            np.zeros(truth.shape[axis]),
        )
        most = np.flatnonzero(counts == counts.max())
        area = (truth > 0).sum(axis=others)
        index = int(most[area[most].argmax()])
        for name, array in (("hu", hu), ("said", said.astype(np.uint8)), ("truth", truth)):
            kept[f"{name}_{plane}"] = plots.slice_of(array, plane, index)  # type: ignore[arg-type]
    with whole(path) as temporary:
        np.savez(temporary, **kept)


def _plain(ax: Axes) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25, axis="y")
    ax.set_axisbelow(True)
