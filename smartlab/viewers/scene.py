"""What a slice viewer shows, checked once: the image, its overlays and how they lie on each other.

Everything here is in the voxel order of `Volume`: axes grow to the patient's right, anterior, superior.
A 2D image (rows, columns) becomes a volume one voxel thick whose axial slice is the image as given.

Mask units lie on a coarse grid of the same axis order: voxel i belongs to unit ⌊i / unit⌋.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from smartlab.core.errors import UseError
from smartlab.core.plots import WINDOWS
from smartlab.data.images.mr import WINDOW as MR_WINDOW

HEAVY = 500_000_000  # voxels from which the reader is told what the browser must hold; 2 bytes each


@dataclass(frozen=True)
class Panel:
    """One of several pictures of the same image, e.g. one masking strategy.

    mask:           (d, h, w) bool, true where a unit is hidden.
    attention:      (heads, d, h, w), each head summing to 1.
    reconstruction: array of the image's shape and unit.
    note:           a line below the picture.
    """

    title: str = ""
    mask: Any = None
    attention: Any = None
    reconstruction: Any = None
    note: str = ""


@dataclass(frozen=True)
class Packed:
    """An array as 16-bit integers: value = raw × scale + offset. Whole numbers within 16 bits stay exact."""

    raw: np.ndarray
    scale: float = 1.0
    offset: float = 0.0

    def values(self, raw: np.ndarray | None = None) -> np.ndarray:
        """Of some of its raw numbers, or of all."""
        return (self.raw if raw is None else raw) * self.scale + self.offset

    @cached_property
    def span(self) -> tuple[float, float]:
        """Smallest and largest value."""
        return tuple(float(v) * self.scale + self.offset for v in (self.raw.min(), self.raw.max()))  # type: ignore[return-value]

    @staticmethod
    def of(array: np.ndarray) -> Packed:
        """Pack numbers of any type; fractions keep 1/65535 of their range."""
        low, high = float(array.min()), float(array.max())
        whole = array.dtype.kind in "iu" or all(np.array_equal(part, np.rint(part)) for part in array)
        if whole and low >= -32768 and high <= 32767:
            return Packed(array.astype(np.int16, copy=False))
        if whole and high - low <= 65535:
            offset, scale = low + 32768, 1.0
        else:
            scale = (high - low) / 65535 or 1.0
            offset = low + 32768 * scale
        raw = np.empty(array.shape, np.int16)
        for part, out in zip(
            array, raw, strict=True
        ):  # in parts: a large scan is not copied as 64-bit fractions
            out[...] = np.rint((part.astype(np.float64) - offset) / scale)
        return Packed(raw, scale, offset)


@dataclass
class Layer:
    """A panel's arrays, checked. attention (1 + heads, d, h, w) float32: the mean over heads comes first."""

    title: str
    mask: np.ndarray | None = None
    attention: np.ndarray | None = None
    reconstruction: Packed | None = None
    note: str = ""


@dataclass
class Scene:
    """Image (X, Y, Z), spacing (mm), affine 4×4 (voxel -> mm), unit grid and one layer per panel."""

    image: Packed
    spacing: tuple[float, float, float]
    affine: np.ndarray
    layers: list[Layer]
    labels: np.ndarray | None = None
    names: dict[int, str] = field(default_factory=dict)
    grid: tuple[int, int, int] | None = None
    unit: tuple[float, float, float] | None = None
    flat: bool = False
    value_name: str = "HU"
    length: str = "mm"  # or "px", where nobody said how large a voxel is
    notes: list[str] = field(default_factory=list)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.image.raw.shape  # type: ignore[return-value]

    @property
    def given(self) -> tuple[int, ...]:
        """The shape in which the image came, and its overlays come."""
        return self.shape[1::-1] if self.flat else self.shape

    @cached_property
    def means(self) -> dict[int, float]:
        """Mean value of the image within each label, of every n-th voxel where there are millions."""
        if self.labels is None:
            return {}
        step = max(1, round((self.labels.size / 2e6) ** (1 / 3)))
        labels, raw = (a[::step, ::step, ::step].ravel() for a in (self.labels, self.image.raw))
        counts = np.bincount(labels, minlength=max(self.names, default=0) + 1)
        sums = np.bincount(labels, weights=raw, minlength=len(counts))
        means = {
            v: sums[v] / counts[v] if counts[v] else self.image.raw[self.labels == v].mean()
            for v in self.names
        }
        return {v: float(mean) * self.image.scale + self.image.offset for v, mean in means.items()}

    def heads(self) -> int:
        return max((len(x.attention) - 1 for x in self.layers if x.attention is not None), default=0)

    def has(self, overlay: str) -> bool:
        """Whether any panel has something to show for this overlay."""
        if overlay == "labels":
            return self.labels is not None
        name = "reconstruction" if overlay == "error" else overlay
        return any(getattr(layer, name) is not None for layer in self.layers)

    def span(self, head: int) -> tuple[float, float, float]:
        """Where the colours of attention begin and end, and its largest value, as multiples of an even share.

        They begin at an even share and end at the 99th percentile over all panels: a few units that hold
        nearly everything do not take the colours from all others. head: -1 for the mean over heads.
        """
        every = [
            x.attention[head + 1]
            for x in self.layers
            if x.attention is not None and head + 1 < len(x.attention)
        ]
        if not every:
            return 1.0, 2.0, 2.0
        shares = np.stack(every) * np.float64(every[0].size)
        top = max(float(np.percentile(shares, 99, method="lower")), 1.25)
        return 1.0, round(top, 3), round(max(top, float(shares.max())), 3)

    def unit_of(self, axis: int) -> np.ndarray:
        """Unit index of every voxel along an axis."""
        assert self.unit is not None and self.grid is not None
        index = np.floor((np.arange(self.shape[axis]) + 1e-6) / self.unit[axis]).astype(int)
        return np.minimum(index, self.grid[axis] - 1)

    def change(self, number: int, panel: Panel) -> list[str]:
        """Put what the panel gives in place of what stood there; the names of the arrays that are now others.

        What is None stays, and False takes an overlay away.
        """
        if not 0 <= number < len(self.layers):
            raise UseError(f"there is no panel {number}", expected=f"0 to {len(self.layers) - 1}")
        old = self.layers[number]
        given = {name: getattr(panel, name) for name in ("mask", "attention", "reconstruction")}
        changed = [name for name, value in given.items() if value is not None]
        gone = [name for name in changed if given[name] is False]
        panel = replace(panel, **dict.fromkeys(gone))  # type: ignore[arg-type]
        new = _layer(panel, self)
        if self.grid is not None and self.unit is None:
            self.unit = _unit(self, None)
        self.layers[number] = replace(
            old,
            title=panel.title or old.title,
            note=panel.note or old.note,
            **{name: getattr(new, name) for name in changed},
        )
        return changed


def as_array(value: Any) -> np.ndarray:
    """An array from NumPy, torch or nested lists."""
    return np.asarray(value.detach().cpu().float().numpy() if hasattr(value, "detach") else value)


def build(
    image: Any,
    panels: Sequence[Panel],
    *,
    spacing: Sequence[float] | None = None,
    affine: Any = None,
    labels: Any = None,
    label_names: Mapping[int, str] | Sequence[str] | None = None,
    unit: float | Sequence[float] | None = None,
    channel: int = 0,
) -> Scene:
    """Check what was given and bring it into one form."""
    image, channels = _channel(image, channel)
    array, spacing, affine, value_name, known = _image(image, spacing, affine)
    flat = array.ndim == 2
    whole = stand(array) if flat else array
    if flat:
        spacing = (float(spacing[1]), float(spacing[0]), 1.0)
    sx, sy, sz = (float(s) for s in spacing)
    scene = Scene(Packed.of(whole), (sx, sy, sz), affine, [], flat=flat, value_name=value_name)
    scene.length = "mm" if known else "px"
    scene.notes += [f"channel {channel + 1} of {channels} is shown"] if channels > 1 else []
    if whole.size > HEAVY:
        scene.notes.append(
            f"{whole.size * 2 / 1e9:.1f} GB, all of which this page will hold; a crop is quicker to look at"
        )
    for panel in panels:
        shape = as_array(getattr(panel.mask, "array", panel.mask)).shape
        if hasattr(panel.mask, "array") or (shape == whole.shape and unit is None and not flat):
            raise UseError(
                "mask= shows the units that a method hides, and this one has a value for every voxel",
                found=shape,
                fix="give a segmentation as labels=; hidden units of one voxel with unit=1",
            )
    scene.layers = [_layer(panel, scene) for panel in panels]
    scene.unit = None if scene.grid is None else _unit(scene, unit)
    if labels is not None:
        apart = np.abs(getattr(labels, "affine", affine) - affine)
        if apart.max() > 0.5 * min(spacing):
            raise UseError("the labels do not lie where the image lies", found=f"{apart.max():.1f} mm apart")
        scene.labels, scene.names = _labels(labels, label_names, scene)
    return scene


def _channel(image: Any, channel: int) -> tuple[Any, int]:
    """One channel of a `Volume`, and how many it has; anything else as it is."""
    many = len(image.array) if hasattr(image, "scale") and image.array.ndim == 4 else 1
    if not 0 <= channel < many:
        raise UseError(f"there is no channel {channel}", expected=f"0 to {many - 1}")
    return (replace(image, array=image.array[channel]) if many > 1 else image), many


def _image(image: Any, spacing: Any, affine: Any) -> tuple[np.ndarray, Any, np.ndarray, str, bool]:
    """Array, spacing, affine, the name of its values, and whether its size in mm is known."""
    name = "HU"
    if hasattr(image, "affine") and hasattr(image, "array"):  # a Volume
        affine = image.affine if affine is None else affine
        name = {"CT": "HU", "MR": "MR"}.get(image.modality, "value")
    elif hasattr(image, "spacing_mm"):  # a Mammogram, which may not know its spacing
        known = np.isfinite(image.spacing_mm).all()
        spacing = image.spacing_mm if spacing is None and known else spacing
    array = _squeeze(as_array(getattr(image, "array", image)), 3)
    if array.ndim not in (2, 3) or array.dtype.kind not in "biuf" or array.size == 0:
        raise UseError(
            "cannot view this image",
            found=f"{array.dtype} of shape {array.shape}",
            expected="a Volume, a Mammogram, or numbers of shape (X, Y, Z) or (rows, columns)",
        )
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UseError("the image has values that are not numbers", found="NaN or infinity")
    if array.ndim == 2 or (array.min() > -200 and array.max() <= 1):
        name = "value"
    measured = spacing is not None or affine is not None
    if affine is None:
        spacing = [1.0] * array.ndim if spacing is None else [float(s) for s in spacing]
        affine = np.diag([*[*spacing, 1.0][:3], 1.0])
    affine = np.asarray(affine, float)
    if affine.shape != (4, 4):
        raise UseError("affine has the wrong shape", found=affine.shape, expected="(4, 4), voxel -> mm")
    if spacing is None:
        spacing = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    if len(spacing) != array.ndim or not all(np.isfinite(s) and s > 0 for s in spacing):
        raise UseError(
            "spacing does not fit the image", found=list(spacing), expected=f"{array.ndim} lengths in mm"
        )
    array = array.astype(np.uint8) if array.dtype.kind == "b" else array
    return array, spacing, affine, name, measured


def stand(array: np.ndarray) -> np.ndarray:
    """(…, rows, columns) -> (…, X, Y, 1), so that the axial slice is the image as given."""
    return np.swapaxes(array[..., ::-1, ::-1], -1, -2)[..., None]


def _on_units(value: Any, name: str, panel: Panel, scene: Scene) -> np.ndarray:
    """A panel's mask (d, h, w) or attention (heads, d, h, w) on the grid of units that all panels share."""
    size = (2 if scene.flat else 3) + (name == "attention")
    array = _squeeze(as_array(value), size)
    if array.ndim != size:
        expected = "rows, columns)" if scene.flat else "d, h, w)"
        raise UseError(
            f"{name} of panel {panel.title!r} is not on a grid of units",
            found=array.shape,
            expected=("(heads, " if name == "attention" else "(") + expected,
            fix="reshape the units to the encoder's grid",
        )
    array = stand(array) if scene.flat else array
    if scene.grid not in (None, array.shape[-3:]):
        raise UseError("panels have different grids of units", found=array.shape[-3:], expected=scene.grid)
    scene.grid = array.shape[-3:]
    return array


def _unit(scene: Scene, unit: Any) -> tuple[float, float, float]:
    """Voxels of one unit along each axis, as said or as the image divides."""
    shape, grid = scene.shape, scene.grid
    assert grid is not None
    if unit is None:
        # an encoder pads a scan to whole strides: 8 units of 16 for 112 voxels, which 8 would divide too
        sizes = [n // g if n % g == 0 else 0 for n, g in zip(shape, grid, strict=True)]
        if any(size.bit_count() != 1 for size in sizes):
            raise UseError(
                "the size of a unit does not follow from the image and its grid",
                found=f"{grid} units for {tuple(shape)} voxels",
                expected="1, 2, 4, 8, 16, … voxels a unit",
                fix="say how many voxels a unit has along each axis: unit=16",
            )
        size = [float(n) for n in sizes]
    else:
        size = [float(u) for u in np.broadcast_to(np.asarray(unit, float), 2 if scene.flat else 3)]
        size = [size[1], size[0], 1.0] if scene.flat else size
    if any(u <= 0 or g * u < n - 0.5 for n, g, u in zip(shape, grid, size, strict=True)):
        raise UseError(
            "the units do not cover the image", found=f"{grid} units of {size} voxels", expected=shape
        )
    return size[0], size[1], size[2]


def _layer(panel: Panel, scene: Scene) -> Layer:
    layer, shape = Layer(panel.title, note=panel.note), scene.given
    if panel.mask is not None:
        layer.mask = np.ascontiguousarray(_on_units(panel.mask, "mask", panel, scene)).astype(bool)
    if panel.attention is not None:
        heads = _on_units(panel.attention, "attention", panel, scene).astype(np.float64)
        if not np.isfinite(heads).all() or heads.min() < 0:
            raise UseError("attention has values that are not shares", found="negative, NaN or infinity")
        layer.attention = np.concatenate([heads.mean(0, keepdims=True), heads]).astype(np.float32)
    if panel.reconstruction is not None:
        guess = _squeeze(as_array(panel.reconstruction), len(shape))
        if guess.shape != shape or not np.isfinite(guess).all():
            raise UseError(
                f"reconstruction of panel {panel.title!r} is not like the image",
                found=guess.shape,
                expected=f"{shape}, finite, in the unit of the image",
            )
        layer.reconstruction = Packed.of(stand(guess) if scene.flat else guess)
    return layer


def _labels(labels: Any, names: Any, scene: Scene) -> tuple[np.ndarray, dict[int, str]]:
    labels = getattr(labels, "array", labels)  # what `read_labels` and `read_mask` give
    shape = scene.given
    array = _squeeze(np.asarray(labels.detach().cpu() if hasattr(labels, "detach") else labels), len(shape))
    if array.shape != shape or array.dtype.kind not in "biu" or array.min() < 0 or array.max() > 65535:
        raise UseError(
            "labels do not fit the image",
            found=f"{array.dtype} of shape {array.shape}",
            expected=f"whole numbers of shape {shape}, 0 where there is none",
        )
    known = dict(enumerate(names, 1)) if isinstance(names, Sequence) else dict(names or {})
    small = (stand(array) if scene.flat else array).astype(
        np.uint8 if array.max() < 256 else np.uint16, copy=False
    )
    flat, size = small.ravel(order="K"), int(small.max()) + 1
    counts = sum(np.bincount(flat[i : i + 2**20], minlength=size) for i in range(0, flat.size, 2**20))
    present = [int(v) for v in np.flatnonzero(counts) if v]
    return small, {v: str(known.get(v, f"label {v}")) for v in present}


def _squeeze(array: np.ndarray, dimensions: int) -> np.ndarray:
    """Drop leading axes of length 1 (a batch of one)."""
    while array.ndim > dimensions and array.shape[0] == 1:
        array = array[0]
    return array


def window_of(window: str | Sequence[float] | None, scene: Scene) -> tuple[float, float]:
    """Bounds from a name of `plots.WINDOWS`, a pair, or nothing: soft tissue for HU, of MR what lies between its
    percentiles, else the whole range."""
    if window is None:
        if scene.value_name == "MR":
            return MR_WINDOW
        if scene.value_name == "HU":
            return WINDOWS["soft tissue"]
        low, high = scene.image.span
        return low, high if high > low else low + scene.image.scale
    if isinstance(window, str):
        if window not in WINDOWS:
            raise UseError(f"no window {window!r}", expected=f"{', '.join(WINDOWS)} or (low, high)")
        return WINDOWS[window]
    low, high = (float(v) for v in window)
    if not low < high:
        raise UseError("a window goes from low to high", found=(low, high))
    return low, high
