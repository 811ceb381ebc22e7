"""Pictures for mammograms: what was hidden and what came back at every scale, and what a decoder costs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from smartlab.core.plots import OKABE_ITO

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure
    from torch import Tensor

KINDS = {
    "softmax": OKABE_ITO[5],
    "nystrom": OKABE_ITO[4],
    "linformer": OKABE_ITO[2],
    "performer": OKABE_ITO[0],
}
COLUMNS = ("original", "hidden", "reconstruction", "absolute error")


def scales(parts: Mapping[int, Mapping[str, Tensor]], title: str = "", image: int = 0) -> Figure:
    """A row per scale: the original, what was hidden, the hidden part reconstructed, and its error.

    parts: of `MultiscaleMAE.reconstruct`: scale -> "target", "guess", "hidden", each (B, 1, H, W).
    """
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        len(parts), 4, figsize=(10, 2.6 * len(parts) + 0.4), layout="constrained", squeeze=False
    )
    for row, (scale, found) in zip(axes, parts.items(), strict=True):
        target, guess, hidden = (
            found[name][image, 0].float().cpu().numpy() for name in ("target", "guess", "hidden")
        )
        low, high = np.percentile(target, (0.5, 99.5))
        high = max(high, low + 1e-3)
        filled = np.where(hidden > 0, guess, target)
        covered = np.where(hidden > 0, np.nan, target)
        for ax, name, shown in zip(
            row, COLUMNS, (target, covered, filled, np.abs(filled - target)), strict=True
        ):
            error = name == "absolute error"
            ax.set_facecolor("#3b4a5a")  # hidden patches: no grey value looks like this
            drawn = ax.imshow(
                shown,
                cmap="magma" if error else "gray",
                vmin=0 if error else low,
                vmax=(high - low) / 2 if error else high,
                interpolation="nearest",
            )
            ax.set_xticks([])
            ax.set_yticks([])
            if ax in axes[0]:
                ax.set_title(name, fontsize=10)
            if error:
                figure.colorbar(drawn, ax=ax, fraction=0.046, pad=0.02).ax.tick_params(labelsize=8)
        row[0].set_ylabel(f"scale {scale}: {target.shape[0]} × {target.shape[1]}", fontsize=10)
    figure.suptitle(title, fontsize=11)
    return figure


def costs(table: pd.DataFrame, title: str = "") -> Figure:
    """Cost of a step against the number of tokens, a line per kind of attention, both axes logarithmic.

    table: columns "kind", "tokens" and "ms" or "mb" or both. The legend gives the exponent fitted to each line.
    """
    import matplotlib.pyplot as plt

    panels = [(c, name) for c, name in (("ms", "ms per step"), ("mb", "peak memory, MB")) if c in table]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.8), layout="constrained", squeeze=False
    )
    for ax, (column, name) in zip(axes[0], panels, strict=True):
        for kind, rows in table.groupby("kind", sort=False):
            rows = rows.sort_values("tokens")
            label = f"{kind}: tokens^{exponent(rows.tokens.tolist(), rows[column].tolist()):.1f}"
            ax.plot(rows.tokens, rows[column], "o-", color=KINDS.get(str(kind)), label=label, ms=4)
        ax.set_xscale("log", base=2)
        ax.set_yscale("log")
        ax.set_xlabel("tokens of the decoder")
        ax.set_ylabel(name)
        ax.grid(alpha=0.3)
        ax.legend(fontsize=9, frameon=False)
        ax.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return figure


def exponent(tokens: Sequence[float], cost: Sequence[float]) -> float:
    """b of cost ∝ tokens^b over the larger half of the sizes, where what is constant has faded."""
    x, y = np.log(np.asarray(tokens, float)), np.log(np.asarray(cost, float))
    half = min(len(x) // 2, len(x) - 2)
    return float(np.polyfit(x[half:], y[half:], 1)[0])
