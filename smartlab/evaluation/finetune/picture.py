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
from smartlab.evaluation.judge import figures
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
    figure = plt.figure(figsize=(4.5 + max(4.0, 0.55 * len(structures)), 7.2), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.15), squeeze=False)[:, 0]
    left, right = above.subplots(1, 2, width_ratios=(1, max(1.3, 0.18 * len(structures))))
    learning_curves(left, histories, "validation Dice")
    dice_by_structure(right, table, estimates, structures)
    axes = iter(below.subplots(1, 4))
    with np.load(example) as kept:
        low, high = kept["window"] if "window" in kept else plots.WINDOWS["soft tissue"]
        for plane in ("axial", "coronal"):
            for what, labels in (("truth", kept[f"truth_{plane}"]), ("prediction", kept[f"said_{plane}"])):
                ax = next(axes)
                ax.imshow(kept[f"hu_{plane}"], cmap="gray", vmin=low, vmax=high)
                ax.imshow(plots.colour(labels, 0.55), interpolation="nearest")
                ax.set_title(f"{what}, {plane}", fontsize=10)
                ax.axis("off")
    mean, first = estimates["dice"], next(iter(histories))
    figure.suptitle(f"Segmentation by fine-tuning: mean Dice {mean}, n = {mean.n} ({first})", fontsize=12)
    return figure


def classification(
    estimates: Mapping[str, Estimate], histories: Mapping[str, pd.DataFrame], runs: Mapping[str, str]
) -> Figure:
    """Learning curves, and the AUC of every run with its interval. runs: name -> suffix of its metrics."""
    figure, ((left, right),) = figures.panels(2, 4.75, 3.6)
    learning_curves(left, histories, "validation log-likelihood")
    found = {name: estimates[f"auc{suffix}"] for name, suffix in runs.items()}
    figures.listed(right, found, [_shade(i) for i in range(len(found))], across=False)
    for place, one in enumerate(found.values()):
        near = {"xytext": (8, 0), "textcoords": "offset points", "va": "center"}
        right.annotate(f"{one.value:.2f}", (place, one.value), **near)
    right.axhline(0.5, **figures.DOTTED)
    right.set_ylabel("AUC")
    n = next(iter(found.values())).n
    figure.suptitle(f"Classification by fine-tuning, n = {n} patients", fontsize=12)
    return figure


def learning_curves(ax: Axes, histories: Mapping[str, pd.DataFrame], score: str) -> None:
    """Loss (left, lines) and validation score (right, dots) over the steps, of the first fold of each run."""
    beside = ax.twinx()
    shown = [(n.removesuffix("-fold0"), h) for n, h in histories.items() if not FOLD.search(n)][:CURVES]
    for place, (name, history) in enumerate(shown):
        smooth = history.loss.rolling(SMOOTH, min_periods=1, center=True).mean()
        ax.plot(history.step, smooth, color=_shade(place), linewidth=1.5, label=name)
        looked = history[history.score.notna()]
        beside.plot(looked.step, looked.score, "o--", color=_shade(place), markersize=4, linewidth=0.8)
    figures.plain(ax, grid="y", xlabel="step", ylabel="training loss (line)")
    beside.set_ylabel(f"{score} (dots)")
    beside.spines["top"].set_visible(False)
    if len(shown) > 1:
        figures.legend(ax, fontsize=7, loc="lower left")


def dice_by_structure(
    ax: Axes, table: pd.DataFrame, estimates: Mapping[str, Estimate], structures: list[str]
) -> None:
    """Mean Dice per structure with its interval, for every way to start and share of patients."""
    runs = table[["mode", "fraction"]].drop_duplicates().itertuples(index=False)
    names = [f"{mode}, {100 * fraction:.3g}%" for mode, fraction in runs]
    for place, name in enumerate(names):
        suffix = f" ({name})" if place else ""
        at = np.arange(len(structures)) + (place - (len(names) - 1) / 2) * 0.6 / len(names)
        found = [estimates[f"dice:{structure}{suffix}"] for structure in structures]
        label = f"{name}: {estimates[f'dice{suffix}'].value:.2f}"
        figures.intervals(ax, at, found, _shade(place), label=label)
    shown = [s.replace("_", " ") for s in structures]
    ax.set_xticks(range(len(structures)), shown, rotation=40, ha="right", fontsize=8)
    figures.plain(ax, grid="y", ylim=(0, 1), ylabel="Dice")
    if len(names) > 1:
        figures.legend(ax, title="mean", ncols=2)


def _shade(place: int) -> str:
    return (figures.BLUE, *figures.OTHERS)[place % 7]


def keep_example(
    path: Path, hu: np.ndarray, said: np.ndarray, truth: np.ndarray, window: tuple[float, float]
) -> None:
    """The axial and the coronal slice with the most structures in the truth, for the figure."""
    kept: dict[str, Any] = {"window": window}
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
