"""Figures of predictions: ROC curves, calibration, and scores with their intervals, beside each other.

The features in question are blue and thick; what stands beside them keeps one colour in every panel.
"""

from __future__ import annotations

from collections.abc import Mapping
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
TITLES = {
    "auc": "AUC",
    "average_precision": "average precision",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "brier": "Brier score (lower is better)",
    "exact_match": "all labels right",
    "r2": "R²",
    "pearson": "Pearson r",
    "spearman": "Spearman ρ",
    "concordance": "concordance",
}


def colours(names: list[str]) -> dict[str, str]:
    """Blue for the first, then one each."""
    return {name: BLUE if i == 0 else OTHERS[(i - 1) % len(OTHERS)] for i, name in enumerate(names)}


def performance(
    task: str,
    predictions: dict[str, pd.DataFrame],
    kind: str,
    estimates: Mapping[str, Mapping[str, Estimate]],
    compared: pd.DataFrame,
    facts: dict[str, Any],
) -> Figure:
    """ROC and calibration (or predicted against true), and every score beside the other features'."""
    import matplotlib.pyplot as plt

    from smartlab.evaluation.judge.report import HEADLINES

    shade = colours(list(predictions))
    tables = {name: from_table(one, name, kind) for name, one in predictions.items()}
    main = next(iter(tables))
    panels = 2 if kind == "number" else 3
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 4.6), layout="constrained")
    if kind == "number":
        draw_scatter(axes[0], tables[main], f"mean absolute error {estimates[main]['mae']}")
    else:
        if kind == "binary":
            draw_roc(axes[0], tables, estimates, shade)
        else:
            draw_roc_by_class(axes[0], tables[main], estimates[main])
        draw_calibration(axes[1], tables[main])
    unitless = [m for m in HEADLINES[kind] if m not in ("mae", "rmse")]
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
    ax.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle=":")
    ax.set(
        xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel="1 − specificity", ylabel="sensitivity", aspect="equal"
    )
    ax.set_title(title, fontsize=10)
    handles, names = ax.get_legend_handles_labels()
    ax.legend(handles[::-1], names[::-1], frameon=False, fontsize=8, loc="lower right")
    plain(ax)


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
    ax.plot([0, 1], [0, 1], color="0.7", linewidth=1, linestyle=":")
    seen, count = found.observed[known], found.cases[known]
    middle = (seen + 2 / count) / (
        1 + 4 / count
    )  # Wilson's interval, z = 2; rows of a patient taken as if apart
    half = 2 / (1 + 4 / count) * np.sqrt(seen * (1 - seen) / count + 1 / count**2)
    errors = np.maximum([seen - (middle - half), middle + half - seen], 0)
    ax.errorbar(
        found.predicted[known],
        seen,
        errors,
        color=BLUE,
        marker="o",
        markersize=5,
        linewidth=1.8,
        elinewidth=0.9,
    )
    ax.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), aspect="equal")
    ax.set(xlabel=f"predicted probability {what}", ylabel="observed frequency")
    ax.set_title(f"calibration (error {found.error:.3f}; bars: counts)", fontsize=10)
    plain(ax)


def draw_scatter(ax: Axes, one: Predictions, title: str) -> None:
    """Predicted against true numbers."""
    ends = [min(one.truth.min(), one.probability.min()), max(one.truth.max(), one.probability.max())]
    ax.plot(ends, ends, color="0.7", linewidth=1, linestyle=":")
    ax.scatter(
        one.truth, one.probability, s=14, color=BLUE, alpha=min(1.0, 0.2 + 60 / len(one.truth)), linewidths=0
    )
    ax.set(xlabel="true", ylabel="predicted")
    ax.set_title(title, fontsize=10)
    plain(ax)


def draw_forest(
    ax: Axes,
    names: list[str],
    estimates: Mapping[str, Mapping[str, Estimate]],
    compared: pd.DataFrame,
    shade: dict[str, str],
) -> None:
    """Scores with 95% intervals, a group per score; p of the difference from the first where compared."""
    step, place = 1 / (len(estimates) + 1.5), 0.0
    for metric in names:
        ax.text(
            0,
            place,
            TITLES[metric],
            transform=ax.get_yaxis_transform(),
            fontsize=8.5,
            weight="bold",
            va="center",
        )
        for i, (name, found) in enumerate(estimates.items()):
            at, one = place + (i + 1) * step, found[metric]
            if np.isfinite(one.value):
                ax.plot([one.low, one.high], [at, at], color=shade[name], linewidth=1.6)
                ax.plot(one.value, at, "o", color=shade[name], markersize=5)
            pair = compared[(compared.metric == metric) & (compared.b == name)]
            text = f"{one.value:.3f}"
            if len(pair):
                text += f"   {_p(pair.p_holm.iloc[0])}" + (
                    f" vs {pair.a.iloc[0]}" if (pair.a != next(iter(estimates))).any() else ""
                )
            ax.text(
                1.02, at, text, transform=ax.get_yaxis_transform(), fontsize=7.5, va="center", color="0.25"
            )
        place += 1
    ax.set_ylim(place - 0.1, -0.25)
    ax.set_yticks([])
    for name in estimates:
        ax.plot([], [], "o-", color=shade[name], markersize=5, label=name)
    ax.legend(
        frameon=False,
        fontsize=8,
        loc="upper center",
        bbox_to_anchor=(0.5, -0.07),
        ncol=min(4, len(estimates)),
    )
    ax.set_title(
        "95% intervals over patients" + ("; p of the difference (Holm)" if len(compared) else ""), fontsize=10
    )
    ax.grid(axis="x", alpha=0.25)
    plain(ax)
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
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(risk) + 1, figsize=(4.8 * (len(risk) + 1), 4.6), layout="constrained")
    for ax, (name, one) in zip(axes, risk.items(), strict=False):
        draw_halves(
            ax, time, event, one, f"halves by predicted risk, {name}: log-rank {_p(p[name])}", facts["unit"]
        )
    draw_forest(axes[-1], ["concordance"], estimates, compared, colours(list(estimates)))
    axes[-1].axvline(0.5, color="0.7", linewidth=1, linestyle=":")
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
        with np.errstate(
            divide="ignore", invalid="ignore"
        ):  # no variance before the first and after the last
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
            left, below = str(int((time[half] >= mark).sum())), -44 - 11 * i
            _below(ax, mark, left, below, shade)
    _below(ax, 0, "at risk", -34, "black")
    ax.set(ylim=(0, 1.03), xlim=(0, time.max() * 1.02), ylabel="without an event")
    ax.set_xlabel(unit + 3 * "\n")  # room for the numbers at risk
    ax.set_xticks(marks, [f"{m:.3g}" for m in marks])
    ax.set_title(title, fontsize=10)
    ax.legend(frameon=False, fontsize=8, loc="upper right")
    plain(ax)


def _below(ax: Axes, at: float, text: str, points: float, shade: str) -> None:
    """Small text under the axis, some points below it."""
    ax.annotate(
        text,
        (at, 0),
        xycoords=("data", "axes fraction"),
        xytext=(0, points),
        textcoords="offset points",
        ha="center",
        va="center",
        fontsize=8,
        color=shade,
        annotation_clip=False,
    )


def _p(value: float) -> str:
    if np.isnan(value):
        return "p = –"
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def plain(ax: Axes) -> None:
    """No frame."""
    ax.spines[["top", "right"]].set_visible(False)
