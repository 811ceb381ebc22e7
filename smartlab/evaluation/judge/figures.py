"""Figures of results in one style: estimates with their intervals, and curves of predictions, beside each other.

What is in question is blue and thick; what stands beside it keeps one colour in every panel.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from smartlab.core.plots import OKABE_ITO
from smartlab.evaluation.judge import metrics
from smartlab.evaluation.judge.predictions import Predictions, from_table
from smartlab.evaluation.judge.result import Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE = OKABE_ITO[4]
OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
GREY = OTHERS[-1]
DOTTED: dict[str, Any] = {"color": "0.7", "linewidth": 1, "linestyle": ":"}  # chance, or the diagonal
TITLES = {
    "auc": "AUC",
    "average_precision": "average precision",
    "balanced_accuracy": "balanced accuracy",
    "brier": "Brier score (lower is better)",
    "exact_match": "all labels right",
    "r2": "R²",
    "pearson": "Pearson r",
    "spearman": "Spearman ρ",
    "jensen_shannon": "Jensen–Shannon",
}


def title_of(metric: str) -> str:
    return TITLES.get(metric, metric.replace("_", " "))


def colours(names: Sequence[str]) -> dict[str, str]:
    """Blue for the first, then one each."""
    return {name: BLUE if i == 0 else OTHERS[(i - 1) % len(OTHERS)] for i, name in enumerate(names)}


def panels(
    columns: int, width: float = 4.6, height: float = 4.6, rows: int = 1, **more: Any
) -> tuple[Figure, np.ndarray]:
    """A figure and its axes (rows, columns), each of this size."""
    import matplotlib.pyplot as plt

    size = (width * columns, height * rows)
    return plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, **more)


def plain(ax: Axes, title: str = "", grid: Any = None, **settings: Any) -> None:
    """No frame; a title, lines behind along the axis `grid` ("x", "y", "both"), and what `ax.set` takes."""
    ax.spines[["top", "right"]].set_visible(False)
    if grid:
        ax.grid(axis=grid, alpha=0.25)
        ax.set_axisbelow(True)
    if title:
        ax.set_title(title, fontsize=10)
    ax.set(**settings)


def legend(ax: Axes, **settings: Any) -> None:
    ax.legend(**({"frameon": False, "fontsize": 8} | settings))


def intervals(
    ax: Axes, at: Any, found: Sequence[Estimate], colour: str, *, across: bool = False, **style: Any
) -> None:
    """Estimates with their intervals at these places of the axis; across: the places are rows."""
    value, low, high = np.array([one[:3] for one in found], float).reshape(-1, 3).T
    error = np.maximum([value - low, high - value], 0)  # the mean of draws may lie outside their middle
    drawn = (value, at, None, error) if across else (at, value, error)
    usual: dict[str, Any] = {"fmt": "o", "color": colour, "markersize": 6, "capsize": 2}
    ax.errorbar(*drawn, **(usual | style))


def listed(
    ax: Axes,
    found: Mapping[str, Estimate | None],
    shades: Sequence[str],
    *,
    across: bool = True,
    **style: Any,
) -> None:
    """One row (or column) for each estimate, in this order, with its name; None leaves its place empty."""
    size = len(found)
    for place, (one, shade) in enumerate(zip(found.values(), shades, strict=True)):
        if one is not None:
            intervals(ax, [place], [one], shade, across=across, **style)
    if across:
        ax.set_yticks(range(size), [*found], fontsize=8)
        ax.set_ylim(size - 0.5, -0.5)
    else:
        ax.set_xticks(range(size), [*found], rotation=20 if size > 4 else 0)
        ax.set_xlim(-0.6, size - 0.4)
    plain(ax, grid="x" if across else "y")


def over(ax: Axes, x: Any, found: Sequence[Estimate], colour: str, **style: Any) -> None:
    """Estimates over a number, such as the step: a line in the band of its intervals."""
    value, low, high = np.array([one[:3] for one in found], float).T
    ax.plot(x, value, color=colour, markersize=4, **style)
    ax.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)


def performance(
    task: str,
    predictions: dict[str, pd.DataFrame],
    kind: str,
    estimates: Mapping[str, Mapping[str, Estimate]],
    compared: pd.DataFrame,
    facts: dict[str, Any],
) -> Figure:
    """ROC and calibration (or predicted against true), and every score beside the other features'."""
    shade = colours(list(predictions))
    tables = {name: from_table(one, name, kind) for name, one in predictions.items()}
    main = next(iter(tables))
    figure, (axes,) = panels(2 if kind == "number" else 3)
    if kind == "number":
        draw_scatter(axes[0], tables[main], f"mean absolute error {estimates[main]['mae']}")
    else:
        if kind == "binary":
            draw_roc(axes[0], tables, estimates, shade)
        else:
            draw_roc_by_class(axes[0], tables[main], estimates[main])
        draw_calibration(axes[1], tables[main])
    unitless = [m for m in metrics.HEADLINES[kind] if m not in ("mae", "rmse")]
    draw_forest(axes[-1], unitless, estimates, compared, shade)
    how = f"{facts['cases']} cases of {facts['patients']} patients, {facts['split']}"
    figure.suptitle(f"{task}: {facts['label']}\n{how}", fontsize=11)
    return figure


def draw_roc(
    ax: Axes,
    tables: dict[str, Predictions],
    estimates: Mapping[str, Mapping[str, Estimate]],
    shade: dict[str, str],
) -> None:
    """One curve for each set of features, the one in question on top."""
    for name in reversed(tables):
        one, first = tables[name], shade[name] == BLUE
        legend = f"{name}  {estimates[name]['auc'].value:.3f}"
        _curve(ax, one.truth == 1, one.probability, shade[name], legend, 2.6 if first else 1.5)
    within = any(one.within_folds for one in tables.values())
    _roc_axes(ax, "ROC of all folds together\n(legend: AUC within folds)" if within else "ROC (legend: AUC)")


def draw_roc_by_class(ax: Axes, one: Predictions, estimates: Mapping[str, Estimate]) -> None:
    """Each class against the rest."""
    for k, name in enumerate(one.classes):
        truth = one.truth[:, k] if one.truth.ndim == 2 else one.truth == k
        legend = f"{name}  {estimates[f'auc:{name}'].value:.3f}"
        _curve(ax, truth == 1, one.probability[:, k], (BLUE, *OTHERS)[k % 7], legend, 1.8)
    how = "all folds together; AUC within folds, " if one.within_folds else ""
    _roc_axes(ax, f"ROC, each class against the rest\n({how}macro AUC {estimates['auc'].value:.3f})")


def _curve(ax: Axes, truth: np.ndarray, score: np.ndarray, shade: str, legend: str, width: float) -> None:
    from sklearn.metrics import roc_curve

    if 0 < truth.sum() < len(truth):
        false, true, _ = roc_curve(truth, score)
        ax.plot(false, true, color=shade, linewidth=width, label=legend)


def _roc_axes(ax: Axes, title: str) -> None:
    handles, names = ax.get_legend_handles_labels()
    legend(ax, handles=handles[::-1], labels=names[::-1], loc="lower right")
    _square(ax, title, xlabel="1 − specificity", ylabel="sensitivity")


def _square(ax: Axes, title: str, **names: str) -> None:
    """Two numbers between 0 and 1, and where they are equal."""
    ax.plot([0, 1], [0, 1], **DOTTED)
    plain(ax, title, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal", **names)


def draw_calibration(ax: Axes, one: Predictions) -> None:
    """How often an event happened where its probability said p; bars count the predictions.

    Multiclass: the event is that the most probable class is right. Multilabel: every label of every case.
    """
    truth, p, what = one.truth, one.probability, f"of {one.classes[1]!r}" if one.kind == "binary" else ""
    if one.kind == "multiclass":
        truth, p, what = p.argmax(1) == truth, p.max(1), "of the most probable class"
    elif one.kind == "multilabel":
        truth, p, what = truth.ravel(), p.ravel(), "of a label"
    found = metrics.calibration(np.asarray(truth), p)
    known = found.cases > 0
    ax.bar(np.arange(0.05, 1, 0.1), 0.25 * found.cases / found.cases.max(), 0.09, color="0.88", zorder=0)
    seen, count = found.observed[known], found.cases[known]
    middle = (seen + 2 / count) / (1 + 4 / count)  # Wilson, z = 2; rows of a patient taken as if apart
    half = 2 / (1 + 4 / count) * np.sqrt(seen * (1 - seen) / count + 1 / count**2)
    shown = [Estimate(*one) for one in zip(seen, middle - half, middle + half, strict=True)]
    intervals(ax, found.predicted[known], shown, BLUE, fmt="o-", capsize=0, markersize=5, elinewidth=0.9)
    title = f"calibration (error {found.error:.3f}; bars: counts)"
    _square(ax, title, xlabel=f"predicted probability {what}", ylabel="observed frequency")


def draw_scatter(ax: Axes, one: Predictions, title: str) -> None:
    """Predicted against true numbers."""
    ends = [min(one.truth.min(), one.probability.min()), max(one.truth.max(), one.probability.max())]
    ax.plot(ends, ends, **DOTTED)
    faint = min(1.0, 0.2 + 60 / len(one.truth))
    ax.scatter(one.truth, one.probability, s=14, color=BLUE, alpha=faint, linewidths=0)
    plain(ax, title, xlabel="true", ylabel="predicted")


def draw_forest(
    ax: Axes,
    names: Sequence[str],
    estimates: Mapping[str, Mapping[str, Estimate]],
    compared: pd.DataFrame,
    shade: dict[str, str],
) -> None:
    """Scores with 95% intervals, a group per score; p of the difference from the first where compared."""
    step, across = 1 / (len(estimates) + 1.5), ax.get_yaxis_transform()
    first = next(iter(estimates))
    for place, metric in enumerate(names):
        ax.text(0, place, title_of(metric), transform=across, fontsize=8.5, weight="bold", va="center")
        for i, (name, found) in enumerate(estimates.items()):
            at, one = place + (i + 1) * step, found[metric]
            label = None if place else name
            intervals(ax, [at], [one], shade[name], across=True, capsize=0, markersize=5, label=label)
            text = f"{one.value:.3f}"
            pairs = compared[(compared.metric == metric) & (compared.b == name)]
            for p, of in zip(pairs.p_holm.head(1), pairs.a, strict=False):
                text += f"   {_p(p)}" + ("" if of == first else f" vs {of}")
            ax.text(1.02, at, text, transform=across, fontsize=7.5, va="center", color="0.25")
    ax.set_ylim(len(names) - 0.1, -0.25)
    ax.set_yticks([])
    legend(ax, loc="upper center", bbox_to_anchor=(0.5, -0.07), ncol=min(4, len(estimates)))
    compares = "; p of the difference (Holm)" if len(compared) else ""
    plain(ax, f"95% intervals over patients{compares}", grid="x")
    ax.spines["left"].set_visible(False)


def follow_up(
    time: np.ndarray,
    event: np.ndarray,
    risk: Mapping[str, np.ndarray],
    p: Mapping[str, float],
    estimates: Mapping[str, Mapping[str, Estimate]],
    compared: pd.DataFrame,
    facts: dict[str, Any],
) -> Figure:
    """Kaplan–Meier curves of the high and the low half of each risk, and every model's concordance."""
    figure, (axes,) = panels(len(risk) + 1, 4.8)
    for ax, (name, one) in zip(axes, risk.items(), strict=False):
        title = f"halves by predicted risk, {name}: log-rank {_p(p[name])}"
        draw_halves(ax, time, event, one, title, facts["unit"])
    draw_forest(axes[-1], ["concordance"], estimates, compared, colours(list(estimates)))
    axes[-1].axvline(0.5, **DOTTED)
    how = f"{facts['patients']} patients, {facts['events']} events, {facts['split']}"
    figure.suptitle(f"outcome: {facts['label']}\n{how}", fontsize=11)
    return figure


def draw_halves(
    ax: Axes, time: np.ndarray, event: np.ndarray, risk: np.ndarray, title: str, unit: str
) -> None:
    """Survival of patients above the median risk and of the others; crosses are ends of follow-up."""
    from scipy.stats import CensoredData, ecdf

    high = risk > np.median(risk)
    marks = [float(v) for v in np.linspace(0, time.max(), 5)]
    for i, (name, half, shade) in enumerate([("low risk", ~high, BLUE), ("high risk", high, OTHERS[0])]):
        if not half.any():
            continue
        curve = ecdf(CensoredData(time[half & event], right=time[half & ~event])).sf
        with np.errstate(divide="ignore", invalid="ignore"):  # no variance before the first, after the last
            band = curve.confidence_interval(method="log-log")
        at, level = np.r_[0, curve.quantiles], np.r_[1, curve.probabilities]
        ax.step(at, level, where="post", color=shade, linewidth=2, label=f"{name} (n = {half.sum()})")
        low, top = (
            np.r_[1, np.nan_to_num(b.probabilities, nan=v)] for b, v in ((band.low, 0), (band.high, 1))
        )
        ax.fill_between(at, low, top, step="post", color=shade, alpha=0.12, linewidth=0)
        ends = time[half & ~event]
        ax.plot(ends, curve.evaluate(ends), "+", color=shade, markersize=6)
        for mark in marks:
            _below(ax, mark, str(int((time[half] >= mark).sum())), -44 - 11 * i, shade)
    _below(ax, 0, "at risk", -34, "black")
    ax.set_xticks(marks, [f"{m:.3g}" for m in marks])
    legend(ax, loc="upper right")
    plain(ax, title, ylim=(0, 1.03), xlim=(0, time.max() * 1.02), ylabel="without an event")
    ax.set_xlabel(unit + 3 * "\n")  # room for the numbers at risk


def _below(ax: Axes, at: float, text: str, points: float, shade: str) -> None:
    """Small text under the axis, some points below it."""
    style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 8, "color": shade}
    style |= {"xycoords": ("data", "axes fraction"), "xytext": (0, points), "textcoords": "offset points"}
    ax.annotate(text, (at, 0), annotation_clip=False, **style)


def _p(value: float) -> str:
    if np.isnan(value):
        return "p = –"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
