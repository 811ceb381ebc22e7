"""Static pictures in one visual style: slices in the usual windows, label overlays, crops in place.

Colours are those of Okabe and Ito, readable with any colour vision. Slices are drawn as radiologists
see them: axial from below (the patient's right on the left), coronal from the front, sagittal from
the left; millimetres keep their proportions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from smartlab.core.files import whole

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Plane = Literal["axial", "coronal", "sagittal"]
PLANES: tuple[Plane, ...] = ("axial", "coronal", "sagittal")
# low and high in HU; add your own, and viewers begun later offer it
WINDOWS: dict[str, tuple[float, float]] = {
    "lung": (-1000, 400),
    "soft tissue": (-160, 240),
    "bone": (-300, 1300),
    "mediastinum": (-125, 225),
    "liver": (-45, 105),
    "brain": (0, 80),
    "angiography": (0, 600),
}
OKABE_ITO = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#999999")
# 24 labels: apart from each other, from grey and from the blue of hidden units, at any brightness beneath
LABEL_COLOURS = (
    *("#E69F00", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7"),
    *("#6000FF", "#30FF00", "#FF00F0", "#FF0060", "#00FFFF", "#90FF90"),
    *("#600000", "#609000", "#0030FF", "#600090", "#00FF60", "#C060FF"),
    *("#000090", "#009000", "#90FF00", "#FF0000", "#6060FF", "#C00090"),
)

_AXIS = {"axial": 2, "coronal": 1, "sagittal": 0}


def slice_of(array: np.ndarray, plane: Plane, index: int) -> np.ndarray:
    """One slice of an (X, Y, Z) RAS array as rows and columns for display, origin at the top left."""
    # first axis across, second up, both reversed: right on the left, anterior or head at the top
    return np.take(array, index, axis=_AXIS[plane]).T[::-1, ::-1]


def pixel_aspect(spacing: Sequence[float], plane: Plane) -> float:
    """Height of a pixel over its width for `imshow`."""
    sx, sy, sz = spacing
    return {"axial": sy / sx, "coronal": sz / sx, "sagittal": sz / sy}[plane]


def draw_slice(
    ax: Axes,
    array: np.ndarray,
    plane: Plane,
    index: int,
    *,
    spacing: Sequence[float] = (1, 1, 1),
    window: tuple[float, float] = WINDOWS["soft tissue"],
    labels: np.ndarray | None = None,
    opacity: float = 0.45,
) -> None:
    """Draw one slice, with integer labels on top where given."""
    aspect = pixel_aspect(spacing, plane)
    ax.imshow(slice_of(array, plane, index), cmap="gray", vmin=window[0], vmax=window[1], aspect=aspect)
    if labels is not None:
        ax.imshow(colour(slice_of(labels, plane, index), opacity), aspect=aspect, interpolation="nearest")
    ax.set_xticks([])
    ax.set_yticks([])


def colour(labels: np.ndarray, opacity: float = 0.45) -> np.ndarray:
    """Integer labels (H, W) -> RGBA (H, W, 4), 0 transparent."""
    from matplotlib.colors import to_rgb

    table = np.array([(*to_rgb(c), opacity) for c in LABEL_COLOURS])
    rgba = table[(labels.astype(int) - 1) % len(table)]
    rgba[labels == 0] = 0
    return rgba


def heat_colours() -> np.ndarray:
    """The colours of attention, from little to much, (256, 3) in 0..1: in every figure and in the viewer."""
    import matplotlib

    return matplotlib.colormaps["inferno"](np.linspace(0.3, 0.95, 256))[:, :3]


def heat(values: np.ndarray, high: float, opacity: float = 0.8) -> np.ndarray:
    """Values (H, W) -> RGBA to lay over a slice: nothing at 0, opaque and bright from `high` on."""
    part = np.clip(values / max(high, 1e-12), 0, 1)
    return np.dstack([heat_colours()[np.rint(part * 255).astype(int)], opacity * np.sqrt(part)])


def planes(
    array: np.ndarray,
    *,
    spacing: Sequence[float] = (1, 1, 1),
    at: Sequence[int] | None = None,
    window: str | tuple[float, float] = "soft tissue",
    labels: np.ndarray | None = None,
    title: str = "",
) -> Figure:
    """Axial, coronal and sagittal slice through one voxel (default: the middle)."""
    import matplotlib.pyplot as plt

    place = [n // 2 for n in array.shape] if at is None else [int(v) for v in at]
    bounds = WINDOWS[window] if isinstance(window, str) else window
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), layout="constrained")
    for ax, plane in zip(axes, PLANES, strict=True):
        index = place[_AXIS[plane]]
        draw_slice(ax, array, plane, index, spacing=spacing, window=bounds, labels=labels)
        ax.set_title(f"{plane} {index}", fontsize=10)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def gallery(
    pictures: Sequence[np.ndarray],
    titles: Sequence[str],
    *,
    window: tuple[float, float] = WINDOWS["lung"],
    columns: int = 6,
    title: str = "",
) -> Figure:
    """A grid of 2D pictures under one window, e.g. the middle slices of lesion crops."""
    import matplotlib.pyplot as plt

    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(1.9 * columns, 2.1 * rows), layout="constrained", squeeze=False
    )
    for ax in axes.flat:
        ax.axis("off")
    for ax, picture, name in zip(axes.flat, pictures, titles, strict=False):
        ax.imshow(picture, cmap="gray", vmin=window[0], vmax=window[1])
        ax.set_title(name, fontsize=9)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure


def draw_box(ax: Axes, plane: Plane, shape: Sequence[int], low: Any, high: Any, **style: Any) -> None:
    """Outline a box of voxels [low, high) on a slice drawn by `draw_slice`."""
    from matplotlib.patches import Rectangle

    across, up = {"axial": (0, 1), "coronal": (0, 2), "sagittal": (1, 2)}[plane]
    x, y = shape[across] - high[across] - 0.5, shape[up] - high[up] - 0.5
    size = high[across] - low[across], high[up] - low[up]
    ax.add_patch(Rectangle((x, y), *size, fill=False, **({"linewidth": 1.8} | style)))


def save(figure: Figure, path: str | Path, dpi: int = 110) -> Path:
    """Write the figure as PNG, whole or not at all."""
    with whole(Path(path)) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png", facecolor="white")
    return Path(path)


def curves(history: pd.DataFrame, panels: Sequence[Sequence[str]], title: str = "") -> Figure:
    """Columns of a run's history over the steps, one panel per group of columns."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, len(panels), figsize=(3.8 * len(panels), 3), layout="constrained", squeeze=False
    )
    for ax, names in zip(axes.flat, panels, strict=True):
        for name, shade in zip(names, OKABE_ITO[4:] + OKABE_ITO[:4], strict=False):
            known = history[["step", name]].dropna()
            ax.plot(known.step, known[name], color=shade, label=name, linewidth=1.8)
        ax.set_xlabel("step")
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
        ax.legend(frameon=False, fontsize=8)
    if title:
        figure.suptitle(title, fontsize=12)
    return figure
