"""Slices with their overlays as pixels, by the rule that the browser follows too.

Per pixel: grey from the window; the reconstruction mixed in; then label, attention, error and hidden
units laid over it, each with its opacity. Widget and static picture show the same colours.

Attention has no colour where it is below an even share. Hidden units are tinted; painted over, as the
student gets them ("opaque"); or hatched ("outline"), which is also what a tint becomes under attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from smartlab.core.plots import PLANES, Plane, colour, heat_colours, pixel_aspect, slice_of
from smartlab.viewers.scene import Layer, Packed, Scene

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

AXES = {"axial": (0, 1, 2), "coronal": (0, 2, 1), "sagittal": (1, 2, 0)}  # across, up, through
OVERLAYS = ("mask", "attention", "reconstruction", "error", "labels")  # in the order of their buttons
OPACITY = {"mask": 0.55, "attention": 0.75, "reconstruction": 1.0, "error": 0.85, "labels": 0.45}
STYLES = ("tint", "opaque", "outline")  # of hidden units
HIDDEN = (86, 180, 233)  # sky blue of Okabe and Ito
COVER = (59, 74, 90)  # a hidden unit as the student gets it: no grey value looks like this
LETTERS = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # left, right, top, bottom edge


@dataclass(frozen=True)
class Look:
    """How a scene is looked at. head: -1 for the mean over heads; span: (low, high) of attention, () as it is best."""

    window: Sequence[float]
    shown: Sequence[str] = ()
    opacity: Mapping[str, float] = field(default_factory=dict)
    head: int = -1
    hidden: str = "tint"
    span: Sequence[float] = ()
    contours: bool = False

    def strength(self, overlay: str) -> float:
        return self.opacity.get(overlay, OPACITY[overlay])

    def style(self, layer: Layer) -> str:
        """How this panel's hidden units are drawn, "" where they are not."""
        if layer.mask is None or "mask" not in self.shown:
            return ""
        crowded = self.hidden == "tint" and layer.attention is not None and "attention" in self.shown
        return "outline" if crowded else self.hidden


@cache
def palette(name: str) -> np.ndarray:
    """A colour map as (256, 3) uint8; "heat" is that of attention."""
    from matplotlib import colormaps

    colours = heat_colours() if name == "heat" else colormaps[name](np.arange(256))[:, :3]
    return np.rint(colours * 255).astype(np.uint8)


@cache
def label_colours() -> np.ndarray:
    """(24, 3) uint8; label v has colour (v − 1) mod 24."""
    return np.rint(colour(np.arange(1, 25)[None], 1.0)[0, :, :3] * 255).astype(np.uint8)


def grey(packed: Packed, plane: Plane, index: int, window: Sequence[float]) -> np.ndarray:
    """(H, W) float 0..255 of one slice under a window."""
    values = packed.values(slice_of(packed.raw, plane, index))
    return np.clip((values - window[0]) / (window[1] - window[0]) * 255, 0, 255)


def on_slice(units: np.ndarray, scene: Scene, plane: Plane, index: int) -> np.ndarray:
    """Values of the unit grid (d, h, w) at every pixel of a slice (H, W)."""
    across, up, through = AXES[plane]
    cut = np.take(units, scene.unit_of(through)[index], axis=through)
    return cut[np.ix_(scene.unit_of(across), scene.unit_of(up))].T[::-1, ::-1]


def paint(scene: Scene, layer: Layer, plane: Plane, index: int, **how: Any) -> np.ndarray:
    """One slice with its overlays as (H, W, 3) uint8; the rest as in `Look`."""
    look = Look(**how)
    window, shown = look.window, look.shown
    base = grey(scene.image, plane, index, window)
    guess = layer.reconstruction
    if guess is not None and "reconstruction" in shown:
        part = look.strength("reconstruction")
        base = base * (1 - part) + grey(guess, plane, index, window) * part
    pixels = np.repeat(base[..., None], 3, axis=2)

    def lay(colours: np.ndarray, part: float | np.ndarray, where: np.ndarray | None = None) -> None:
        mixed = pixels * (1 - part) + colours * part
        pixels[...] = mixed if where is None else np.where(where[..., None], mixed, pixels)

    if scene.labels is not None and "labels" in shown:
        label = slice_of(scene.labels, plane, index).astype(int)
        colours = label_colours()[(label - 1) % 24]
        lay(colours, look.strength("labels"), label > 0)
        if look.contours:
            lay(colours, 1.0, _edges(label))
    if layer.attention is not None and "attention" in shown:
        low, high = look.span or scene.span(look.head)[:2]
        heads = layer.attention
        share = on_slice(heads[look.head + 1], scene, plane, index) * np.float64(heads[0].size)
        level = np.clip((share - low) / max(high - low, 1e-6), 0, 1)
        strength = look.strength("attention") * (0.4 + 0.6 * level)
        lay(palette("heat")[np.rint(level * 255).astype(int)], strength[..., None], share >= low)
    if guess is not None and "error" in shown:
        half = (window[1] - window[0]) / 2
        image, other = (p.values(slice_of(p.raw, plane, index)) for p in (scene.image, guess))
        wrong = np.clip(np.abs(other - image) / half, 0, 1)
        lay(palette("viridis")[np.rint(wrong * 255).astype(int)], look.strength("error"))
    style = look.style(layer)
    if layer.mask is not None and style in ("tint", "opaque"):
        rgb, part = (np.array(HIDDEN), look.strength("mask")) if style == "tint" else (np.array(COVER), 1.0)
        lay(rgb, part, on_slice(layer.mask, scene, plane, index))
    return np.rint(pixels).astype(np.uint8)


def _edges(label: np.ndarray) -> np.ndarray:
    """Pixels of a label that touch another one above, below, left or right."""
    padded = np.pad(label, 1, mode="edge")
    inner = padded[1:-1, 1:-1]
    others = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    return (label > 0) & np.any([other != inner for other in others], axis=0)


def picture(
    scene: Scene,
    cursor: Sequence[int],
    *,
    plane: Plane | str,
    title: str = "",
    only: Sequence[int] = (),
    **how: Any,
) -> Figure:
    """The viewer as a Matplotlib figure: three planes of one panel, or one plane of several.

    only: the panels shown, all if there are none;  how: as in `Look`.
    """
    import matplotlib.pyplot as plt

    look = Look(**how)
    planes: Sequence[Plane] = PLANES if plane == "all" else (plane,)  # type: ignore[assignment]
    layers = [layer for n, layer in enumerate(scene.layers) if not only or n in only]
    cells = [(layer, p) for layer in layers for p in planes]
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
        ax.imshow(paint(scene, layer, one, index, **how), aspect=pixel_aspect(scene.spacing, one))
        if layer.mask is not None and look.style(layer) == "outline":
            _hatch(ax, on_slice(layer.mask, scene, one, index))
        _draw(ax, scene, layer, one, cursor, many=len(planes) > 1, masked=bool(look.style(layer)))
    _explain(figure, axes, scene, look)
    if title:
        figure.suptitle(title, fontsize=12)
    plt.close(figure)  # shown by whoever displays it, not once more by the inline backend
    return figure


def _size(scene: Scene, plane: Plane) -> tuple[float, float]:
    across, up, _ = AXES[plane]
    return scene.shape[across] * scene.spacing[across], scene.shape[up] * scene.spacing[up]


def _hatch(ax: Axes, hidden: np.ndarray) -> None:
    """Border and hatching of hidden units (H, W)."""
    if not hidden.any() or min(hidden.shape) < 2:
        return
    red, green, blue = (v / 255 for v in HIDDEN)
    if not hidden.all():
        ax.contour(hidden.astype(float), [0.5], colors=[(red, green, blue)], linewidths=0.9)
    filled = ax.contourf(hidden.astype(float), [0.5, 1.5], colors="none", hatches=["//"])
    filled.set_edgecolor((red, green, blue, 0.6))
    filled.set_linewidth(0)


def _draw(
    ax: Axes, scene: Scene, layer: Layer, plane: Plane, cursor: Sequence[int], *, many: bool, masked: bool
) -> None:
    """What stands over and around a slice: its title, the cursor, the sides of the patient, a length."""
    across, up, through = AXES[plane]
    where = "" if scene.flat else f"{plane} {cursor[through]}"
    parts = [layer.title, where] if many or not layer.title else [layer.title]
    if layer.mask is not None and masked and not many:
        parts.append(f"{layer.mask.mean():.0%} hidden")
    ax.set_title(" · ".join(p for p in parts if p), fontsize=10)
    if layer.note:
        ax.text(0.5, -0.02, layer.note, transform=ax.transAxes, fontsize=8, ha="center", va="top")
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
    width = _size(scene, plane)[0]
    bar = next((n for n in (200, 100, 50, 20, 10, 5, 2, 1) if n <= width / 3), None)
    if bar and scene.length == "mm":
        part = bar / width
        ax.plot([0.97 - part, 0.97], [0.045] * 2, transform=ax.transAxes, color="white", linewidth=1.5)
        ax.text(0.97, 0.06, f"{bar} mm", transform=ax.transAxes, color="white", fontsize=7, ha="right")


def blended(rgb: Sequence[float] | np.ndarray, part: float | np.ndarray, over: float = 128) -> np.ndarray:
    """A colour as it looks over a grey, 0..1."""
    return (np.asarray(rgb, float) * part + over * (1 - part)) / 255


def _explain(figure: Figure, axes: np.ndarray, scene: Scene, look: Look) -> None:
    """A scale for attention, a legend with the colours as they look over the image, and the window."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.patches import Patch

    low, high = look.window
    entries = [Patch(color="none", label=f"window {low:g} to {high:g} {scene.value_name}".replace("-", "−"))]
    if "attention" in look.shown and scene.has("attention"):
        low, high = look.span or scene.span(look.head)[:2]
        part = look.strength("attention") * (0.4 + 0.6 * np.linspace(0, 1, 256))
        scale = ScalarMappable(Normalize(low, high), ListedColormap(blended(palette("heat"), part[:, None])))
        name = "mean attention" if look.head < 0 else f"attention of head {look.head + 1}"
        bar = figure.colorbar(scale, ax=axes, shrink=0.75, aspect=30, pad=0.01, extend="max")
        bar.set_label(f"{name}, × even share; none below {low:g}", fontsize=8)
        bar.ax.tick_params(labelsize=7)
    styles = {look.style(layer) for layer in scene.layers} - {""}
    for style in sorted(styles):
        rgb = blended(HIDDEN, look.strength("mask")) if style == "tint" else blended(COVER, 1.0)
        blue = blended(HIDDEN, 1.0)
        drawn = (
            {"facecolor": "none", "edgecolor": blue, "hatch": "///"} if style == "outline" else {"color": rgb}
        )
        entries.append(Patch(**drawn, label="hidden from the student"))
    if "labels" in look.shown and scene.names:
        for v, name in list(scene.names.items())[:24]:
            entries.append(Patch(color=tuple(swatch(scene, v, look)), label=name))
    columns = min(6, max(1, int(figure.get_figwidth() / 1.8)))  # as many as its width holds
    figure.legend(handles=entries, loc="outside lower center", ncols=columns, fontsize=8, frameon=False)


def swatch(scene: Scene, label: int, look: Look) -> np.ndarray:
    """A label's colour as it looks over the mean grey of what it marks, or as its contour, 0..1."""
    over = np.clip((scene.means[label] - look.window[0]) / (look.window[1] - look.window[0]), 0, 1) * 255
    part = 1.0 if look.contours else look.strength("labels")
    return blended(label_colours()[(label - 1) % 24], part, float(over))
