"""Slices with their overlays as pixels, by the rule that the browser follows too.

Per pixel: grey from the window; the reconstruction mixed in; then label, attention, error and hidden
units laid over it, each with its opacity. Widget and static picture show the same colours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from smartlab.viewers.plots import PLANES, Plane, colour, pixel_aspect, slice_of
from smartlab.viewers.scene import Layer, Packed, Scene

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}  # across, up, through
OVERLAYS = ("mask", "attention", "reconstruction", "error", "labels")  # in the order of their buttons
OPACITY = {"mask": 0.55, "attention": 0.5, "reconstruction": 1.0, "error": 0.85, "labels": 0.45}
HIDDEN = (86, 180, 233)  # sky blue of Okabe and Ito
LETTERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # left, right, top, bottom edge


@cache
def palette(name: str) -> np.ndarray:
    """A colour map as (256, 3) uint8."""
    from matplotlib import colormaps

    return np.rint(colormaps[name](np.arange(256))[:, :3] * 255).astype(np.uint8)


@cache
def label_colours() -> np.ndarray:
    """(24, 3) uint8; label v has colour (v − 1) mod 24."""
    return np.rint(colour(np.arange(1, 25)[None], 1.0)[0, :, :3] * 255).astype(np.uint8)


def grey(packed: Packed, plane: Plane, index: int, window: Sequence[float]) -> np.ndarray:
    """(H, W) float 0..255 of one slice under a window."""
    values = slice_of(packed.raw, plane, index) * packed.scale + packed.offset
    return np.clip((values - window[0]) / (window[1] - window[0]) * 255, 0, 255)


def on_slice(units: np.ndarray, scene: Scene, plane: Plane, index: int) -> np.ndarray:
    """Values of the unit grid (d, h, w) at every pixel of a slice (H, W)."""
    across, up, through = AXES[plane]
    cut = np.take(units, scene.unit_of(through)[index], axis=through)
    return cut[np.ix_(scene.unit_of(across), scene.unit_of(up))].T[::-1, ::-1]


def paint(
    scene: Scene,
    layer: Layer,
    plane: Plane,
    index: int,
    *,
    window: Sequence[float],
    shown: Sequence[str] = (),
    opacity: Mapping[str, float] | None = None,
    head: int = -1,
) -> np.ndarray:
    """One slice with its overlays as (H, W, 3) uint8. head: -1 for the mean over heads."""
    strength = {**OPACITY, **(opacity or {})}
    base = grey(scene.image, plane, index, window)
    guess = layer.reconstruction
    if guess is not None and "reconstruction" in shown:
        part = strength["reconstruction"]
        base = base * (1 - part) + grey(guess, plane, index, window) * part
    pixels = np.repeat(base[..., None], 3, axis=2)

    def lay(colours: np.ndarray, part: float, where: np.ndarray | None = None) -> None:
        mixed = pixels * (1 - part) + colours * part
        pixels[...] = mixed if where is None else np.where(where[..., None], mixed, pixels)

    if scene.labels is not None and "labels" in shown:
        label = slice_of(scene.labels, plane, index).astype(int)
        lay(label_colours()[(label - 1) % 24], strength["labels"], label > 0)
    if layer.attention is not None and "attention" in shown:
        share = on_slice(layer.attention[head + 1], scene, plane, index) / np.float64(scene.top(head))
        lay(palette("cividis")[np.rint(np.clip(share, 0, 1) * 255).astype(int)], strength["attention"])
    if guess is not None and "error" in shown:
        half = (window[1] - window[0]) / 2
        image, other = (slice_of(p.raw, plane, index) * p.scale + p.offset for p in (scene.image, guess))
        wrong = np.clip(np.abs(other - image) / half, 0, 1)
        lay(palette("magma")[np.rint(wrong * 255).astype(int)], strength["error"])
    if layer.mask is not None and "mask" in shown:
        lay(np.array(HIDDEN), strength["mask"], on_slice(layer.mask, scene, plane, index))
    return np.rint(pixels).astype(np.uint8)


def picture(
    scene: Scene,
    cursor: Sequence[int],
    *,
    plane: Plane | str,
    title: str = "",
    window: Sequence[float],
    shown: Sequence[str] = (),
    opacity: Mapping[str, float] | None = None,
    head: int = -1,
) -> Figure:
    """The viewer as a Matplotlib figure: three planes of one panel, or one plane of several."""
    import matplotlib.pyplot as plt

    planes: Sequence[Plane] = PLANES if plane == "all" else (plane,)  # type: ignore[assignment]
    cells = [(layer, p) for layer in scene.layers for p in planes]
    columns = len(planes) if len(planes) > 1 else min(len(cells), 6)
    rows = -(-len(cells) // columns)
    side = 3.4 if columns <= 3 else 2.4
    tall = max(_size(scene, p)[1] / _size(scene, p)[0] for p in planes)
    figure, axes = plt.subplots(
        rows,
        columns,
        figsize=(side * columns, rows * (side * min(tall, 2) + 0.35) + 0.4),
        layout="constrained",
        squeeze=False,
    )
    for ax in axes.flat:
        ax.axis("off")
    for ax, (layer, one) in zip(axes.flat, cells, strict=False):
        index = cursor[AXES[one][2]]
        pixels = paint(scene, layer, one, index, window=window, shown=shown, opacity=opacity, head=head)
        _draw(ax, scene, layer, one, pixels, cursor, many=len(planes) > 1, shown=shown)
    _explain(figure, axes, scene, shown, head)
    if title:
        figure.suptitle(title, fontsize=12)
    plt.close(figure)  # shown by whoever displays it, not once more by the inline backend
    return figure


def _size(scene: Scene, plane: Plane) -> tuple[float, float]:
    across, up, _ = AXES[plane]
    return scene.shape[across] * scene.spacing[across], scene.shape[up] * scene.spacing[up]


def _draw(
    ax: Axes,
    scene: Scene,
    layer: Layer,
    plane: Plane,
    pixels: np.ndarray,
    cursor: Sequence[int],
    *,
    many: bool,
    shown: Sequence[str],
) -> None:
    ax.imshow(pixels, aspect=pixel_aspect(scene.spacing, plane))
    across, up, through = AXES[plane]
    where = "" if scene.flat else f"{plane} {cursor[through]}"
    parts = [layer.title, where] if many or not layer.title else [layer.title]
    if layer.mask is not None and "mask" in shown and not many:
        parts.append(f"{layer.mask.mean():.0%} hidden")
    ax.set_title(" · ".join(p for p in parts if p), fontsize=10)
    if many:
        line: dict[str, Any] = {"color": "white", "linewidth": 0.6, "alpha": 0.45}
        ax.axvline(scene.shape[across] - 1 - cursor[across], **line)
        ax.axhline(scene.shape[up] - 1 - cursor[up], **line)
    if not scene.flat:
        places = ((0.02, 0.5), (0.98, 0.5), (0.5, 0.98), (0.5, 0.02))
        sides = (("left", "center"), ("right", "center"), ("center", "top"), ("center", "bottom"))
        for letter, place, (ha, va) in zip(LETTERS[plane], places, sides, strict=True):
            ax.text(
                *place, letter, transform=ax.transAxes, color="white", alpha=0.8, fontsize=8, ha=ha, va=va
            )


def _explain(figure: Figure, axes: np.ndarray, scene: Scene, shown: Sequence[str], head: int) -> None:
    """A scale for attention, a legend for labels."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Patch

    if "attention" in shown and scene.has("attention"):
        units = int(np.prod(scene.grid or (1,)))
        scale = ScalarMappable(Normalize(0, scene.top(head) * units), "cividis")
        name = "mean attention" if head < 0 else f"attention of head {head + 1}"
        bar = figure.colorbar(scale, ax=axes, shrink=0.75, aspect=30, pad=0.01)
        bar.set_label(f"{name} (1 = even share)", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    if "labels" in shown and scene.names:
        entries = [
            Patch(color=label_colours()[(v - 1) % 24] / 255, label=name)
            for v, name in list(scene.names.items())[:24]
        ]
        figure.legend(handles=entries, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
