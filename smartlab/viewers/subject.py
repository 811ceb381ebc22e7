"""What the mask explorer looks at: a scan at the spacing of training, views of it, and the model that sees them.

CT and mammograms alike: a view is a cube of voxels or a square of pixels as in training, shown as the student
gets it, clipped to the window of its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from smartlab.core.config import Config
from smartlab.core.errors import DataError, UseError
from smartlab.core.places import default_encoder
from smartlab.data.crops.augment import window
from smartlab.data.crops.regions import BODY, is_lesion, unit_shares
from smartlab.data.images.grid import AIR, Spacing, three
from smartlab.data.images.mammography import Mammogram, read_mammogram
from smartlab.data.images.readers import Volume, read_channels, read_labels, read_volume
from smartlab.data.images.resample import LabelPainter, at_spacing, to_hounsfield
from smartlab.data.store import flat
from smartlab.data.store.store import Store
from smartlab.masking import upsample
from smartlab.models.encoder import dropped_patches
from smartlab.training.run import Run
from smartlab.viewers.scene import as_array


class View(NamedTuple):
    """One crop of a subject. Arrays are (X, Y, Z), or (rows, columns) of a mammogram."""

    image: np.ndarray  # clipped to the window of training
    affine: np.ndarray
    labels: np.ndarray | None
    input: Tensor  # (1, C, …) in [0, 1]
    shares: dict[str, Tensor]  # region -> (1, N), the part of each unit in it
    channel: int = 0  # which of several `image` is


@dataclass(frozen=True)
class Subject:
    """A scan at the spacing of training.

    array:  (X, Y, Z) HU or MR, or (rows, columns, 1) grey values, chest wall on the left.
    labels: whole numbers of the same shape, 0 for none; names: number -> name.
    center: voxel that the first view is around.
    """

    array: np.ndarray
    affine: np.ndarray
    labels: np.ndarray | None
    names: dict[int, str]
    center: np.ndarray
    notes: tuple[str, ...] = ()
    body: np.ndarray | None = field(default=None, repr=False)  # of a mammogram: the breast
    modality: str = "CT"
    several: np.ndarray | None = field(default=None, repr=False)  # (C, X, Y, Z), of which `channel` is shown
    channel: int = 0
    shown: str = ""  # that in words

    @property
    def flat(self) -> bool:
        return self.body is not None

    def view(self, center: Sequence[int], side: int, stride: int, bounds: tuple[float, float]) -> View:
        """The crop of `side` voxels around a voxel, inside the scan wherever it is large enough."""
        shape = np.array(self.array.shape)
        size = np.array([side, side, 1 if self.flat else side])
        start = np.clip(
            np.asarray(center) - size // 2,
            np.minimum(0, (shape - size) // 2),
            np.maximum(shape - size, (shape - size) // 2),
        )
        affine = self.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ start

        def cut(array: np.ndarray, fill: float) -> np.ndarray:
            low, high = np.clip(start, 0, shape), np.clip(start + size, 0, shape)
            beyond = list(zip(low - start, start + size - high, strict=True))
            return np.pad(array[tuple(map(slice, low, high))], beyond, constant_values=fill)

        crop = cut(self.array, 0 if self.flat else AIR)
        every = crop[None] if self.several is None else np.stack([cut(one, AIR) for one in self.several])
        labels = None if self.labels is None else cut(self.labels, 0)
        dense = every.max(0) if self.body is None else np.where(cut(self.body, 0), 0, AIR)
        told = None if labels is None else torch.from_numpy(labels[None])
        shares = unit_shares(
            torch.from_numpy(dense[None]),
            told,
            self.names,
            (stride, stride, 1) if self.flat else stride,
            BODY[self.modality],
        )
        if self.flat:
            shares = {"breast": shares.pop("body"), **shares}
            crop, every, labels = crop[..., 0], every[..., 0], None if labels is None else labels[..., 0]
        x = window(torch.from_numpy(every)[None], *bounds)
        return View(
            np.clip(crop, *np.rint(bounds).astype(crop.dtype)),
            affine,
            labels,
            x,
            {n: s for n, s in shares.items() if s.sum()},
            self.channel,
        )


def subject_of(
    scan: Any,
    spacing: Spacing,
    is_flat: bool,
    *,
    case: int | str = 0,
    labels: Any = None,
    label_names: Mapping[int, str] | None = None,
    modality: str = "CT",
    channels: int = 1,
    channel: int = 0,
) -> Subject:
    """A subject from a path, or one per channel, `Volume`, `Mammogram`, array at the spacing of training, or a store
    and its `case`; modality, channels: of the training; channel: which is shown."""
    names, center = dict(label_names or {}), None
    called: tuple[str, ...] = ()
    if isinstance(scan, Store):
        called = scan.channels
        volume, labels, names, center = _stored(scan, case)
    else:
        volume = _volume(scan, spacing, is_flat, modality)
    if (volume.modality == "MG") != is_flat:
        kinds = (modality, "mammograms")
        raise UseError(
            f"this encoder is one of {kinds[is_flat]}, and the scan is of the other kind",
            fix="give `encoder` a run of mammograms (method miram or mae)"
            if not is_flat
            else "give an encoder of CT",
        )
    many = len(volume.array.reshape(-1, *volume.shape))
    if not is_flat and (volume.modality, many) != (modality, channels):
        raise UseError(
            "this encoder is not one of such scans",
            path=volume.source or None,
            found=f"{volume.modality} of {many} channel{'s' * (many > 1)}",
            expected=f"{modality} of {channels}",
            fix="give a list of paths, one per channel, or a store"
            if channels > many
            else "give another encoder",
        )
    if not 0 <= channel < many:
        raise UseError(f"there is no channel {channel}", expected=f"0 to {many - 1}")
    array, affine = at_spacing(volume.array, volume.affine, spacing)
    array = to_hounsfield(array, volume.array) if array.dtype.kind == "f" else array
    several, array = (array, array[channel]) if array.ndim == 4 else (None, array)
    name = f"{called[channel]}, " if called else ""
    shown = f"{name}channel {channel + 1} of {many}" if many > 1 else ""
    body = _breast(array, float(three(spacing)[0])) if is_flat else None
    painted = None if labels is None else _labels(labels, volume, array.shape, affine)
    names = names or ({} if painted is None else {int(v): f"label {v}" for v in np.unique(painted) if v})
    if center is None:
        voxel = _middle(array, painted, names, body, volume.modality, spacing)
    else:
        voxel = Volume(array, affine).to_index(np.asarray(center, float))
    center = np.rint(voxel).astype(int)
    more = () if is_flat else (volume.modality, several, channel, shown)
    return Subject(array, affine, painted, names, center, volume.notes, body, *more)


def _volume(scan: Any, spacing: Spacing, is_flat: bool, modality: str) -> Volume:
    """A scan in any form but a store as a `Volume`."""
    path = scan if isinstance(scan, (str, Path)) else ""
    if path:
        scan = read_mammogram(path) if is_flat else read_volume(path, modality=modality)
    elif isinstance(scan, (list, tuple)) and scan and all(isinstance(one, (str, Path)) for one in scan):
        scan = read_channels(scan, modality=modality)
    if isinstance(scan, Volume):
        return scan
    if isinstance(scan, Mammogram):
        if not np.isfinite(scan.spacing_mm).all():
            raise DataError(
                "gives no pixel spacing",
                path=path or None,
                fix="read it with sl.read_mammogram, and give dataclasses.replace(mammogram, spacing_mm=(0.1, 0.1))",
            )
        return flat.as_volume(scan, scan.spacing_mm, float(three(spacing)[0]))
    array = as_array(scan)
    if array.ndim not in ((2,) if is_flat else (3, 4)) or array.dtype.kind not in "iuf":
        raise UseError(
            "cannot explore this",
            found=f"{type(scan).__name__} of shape {array.shape}",
            expected="a path, a Volume, a Mammogram, a store, or an array (X, Y, Z), (C, X, Y, Z) or (rows, columns) at the encoder's spacing",
        )
    x, y, z = three(spacing).tolist()
    if is_flat:
        return flat.as_volume(Mammogram(array, (x, y), "", ""), (x, y), z)
    return Volume(np.rint(array).astype(np.int16), np.diag([x, y, z, 1.0]), modality)


def _stored(store: Store, case: int | str) -> tuple[Volume, Any, dict[int, str], Any]:
    """A case of a store: its scan, labels with names, and where its lesion is (mm). Numbers count those with one."""
    table = store.cases
    if isinstance(case, int):
        known = table[table.center_mm.notna()]
        known = known if len(known) else table
        case = known.index[case % len(known)]
    if case not in table.index:
        raise UseError(
            f"no case {case!r} in the store", path=store.path, expected="a number, or a key of store.cases"
        )
    row: Any = table.loc[case]
    image, is_flat = int(row.image), store.shape(int(row.image))[2] == 1
    volume = store.volume(image)
    stored, names = store.labels(image), store.label_names
    labels = None if stored is None else stored[:]
    center, box = (value if isinstance(value, list) else None for value in (row.center_mm, row.box_mm))
    if is_flat and center and box and (labels is None or not labels.any()):
        labels, names = _box(volume, center, box), {1: "lesion"}
    return volume, labels, names, center


def _box(volume: Volume, center: Sequence[float], box: Sequence[float]) -> np.ndarray:
    """The box around a lesion of a mammogram as a label; box: mm along columns and rows."""
    labels = np.zeros(volume.shape, np.uint8)
    middle = volume.to_index(np.asarray(center, float))[:2]
    half = np.array(box[:2])[::-1] / 2 / volume.spacing[:2]
    low, high = (np.clip(np.rint(middle + s * half).astype(int), 0, volume.shape[:2]) for s in (-1, 1))
    labels[low[0] : high[0] + 1, low[1] : high[1] + 1] = 1
    return labels


def _labels(labels: Any, volume: Volume, shape: tuple[int, ...], affine: np.ndarray) -> np.ndarray:
    """Labels of the scan as it was given on the grid that is explored."""
    labels = read_labels(labels) if isinstance(labels, (str, Path)) else labels
    array = np.asarray(getattr(labels, "array", labels))
    placed = getattr(labels, "affine", volume.affine)
    if array.shape != volume.shape or np.abs(placed - volume.affine).max() > 0.5 * min(volume.spacing):
        raise UseError(
            "the labels do not lie where the scan lies",
            found=array.shape,
            expected=f"the grid of the scan, {volume.shape}",
        )
    if array.shape == shape:
        return array.astype(np.uint8)
    painter = LabelPainter(shape, affine)
    for value, box in enumerate(ndimage.find_objects(array), 1):
        if box is not None:
            moved = placed.copy()
            moved[:3, 3] += placed[:3, :3] @ [s.start for s in box]
            painter.paint(value, array[box] == value, moved)
    return painter.finish()


def _breast(array: np.ndarray, spacing: float) -> np.ndarray:
    """(rows, columns, 1) bool."""
    return flat.find_body(array, (spacing, spacing, spacing)).whole(array.shape)


def _middle(
    array: np.ndarray, labels: Any, names: Mapping[int, str], body: Any, modality: str, spacing: Spacing
) -> np.ndarray:
    """Where to begin: the middle of the largest lesion, else of the body, else of the scan."""
    lesions = [value for value, name in names.items() if is_lesion(name)]
    if labels is not None and (marked := np.isin(labels, lesions)).any():
        parts, _ = ndimage.label(marked)
        return np.array(ndimage.center_of_mass(parts == 1 + np.bincount(parts.ravel())[1:].argmax()))
    step = np.ones(3)
    if body is None:
        mm = tuple(three(spacing).tolist())
        found = flat.FIND[modality](array, mm)
        body, step = found.mask, np.array(found.step)
    return step * ndimage.center_of_mass(body) if body.any() else np.array(array.shape) / 2


class Model:
    """An encoder that looks at views; of a run the whole method, which also fills in what is hidden.

    source: a run or its folder, an exported file, an encoder; None: the encoder that comes with smartlab.
    """

    def __init__(self, source: Any = None) -> None:
        from smartlab.interop.weights import load_encoder

        self.method: Any = None
        if isinstance(source, Run) or (isinstance(source, (str, Path)) and Path(source).is_dir()):
            self.method = (source if isinstance(source, Run) else Run(source)).method()
            source = (self.method.teacher or self.method.student).encoder
        source = default_encoder() if source is None else source
        self.encoder: Any = load_encoder(source) if isinstance(source, (str, Path)) else source
        if not isinstance(getattr(self.encoder, "config", None), Config):
            raise UseError(
                "the mask explorer needs an encoder of smartlab, whose mask units it knows",
                found=type(self.encoder).__name__,
                fix="give a run folder, an exported file, or what sl.load_encoder returns",
            )
        self.config = self.encoder.config
        self.flat: bool = self.config.flat
        self.stride: int = self.encoder.stride
        semantic = self.config.semantic
        self.heads: int = self.encoder.heads
        alone = semantic.enabled and semantic.kind == "class"  # then only [CLS] attends
        self.receives = not self.flat and self.heads > 0 and not alone
        self.autoencodes = self.config.method.family == "multiscale_mae"
        self.rebuilds = self.method is not None and (self.autoencodes or self.config.loss.amip > 0)

    @torch.inference_mode()
    def look(
        self, x: Tensor, dropout: float, draw: int, received: bool
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """[CLS] attention (1, heads, N), attention received (1, N) and the importance (1, heads, N) that guides masks, of a
        view, by a teacher that misses `dropout` of it."""
        if self.flat:
            seen = self.encoder(x)
            return seen.attention, None, seen.importance
        dropped, kept = None, None
        if dropout:
            dropped = dropped_patches(self.encoder, x, dropout, torch.Generator().manual_seed(draw))
            cell = self.encoder.unit_patches
            if (
                self.config.teacher.dropout_unit == "mask_unit"
            ):  # of missing units, which are alike, one is computed
                kept = int((~dropped[:, ::cell, ::cell, ::cell]).sum())
        seen = self.encoder(x, dropped=dropped, received=received, visible=kept, deep=0)
        return seen.attention, seen.received, seen.importance

    @torch.inference_mode()
    def rebuild(self, view: View, mask: Tensor) -> np.ndarray:
        """The view with its hidden part (1, N) as the student fills it in, in HU or grey values."""
        grid = self.encoder.grid(view.input.shape)
        if self.autoencodes:
            finest = list(self.method.reconstruct(view.input, mask=mask).values())[-1]
            guess = F.interpolate(finest["guess"], view.input.shape[2:])[0, view.channel]
        else:
            seen = self.method.student.encoder(view.input, hidden=mask)
            guess = self.method.reconstruct(seen.stages[-1])[0, view.channel].float()
        hidden = upsample(mask, (1, *grid)[-3:], self.stride)[0]
        hidden = hidden[0] if self.flat else hidden
        low, high = self.config.data.window
        return np.where(hidden.numpy(), np.rint(low + (high - low) * guess.numpy()), view.image).astype(
            np.int16
        )

    def units(self, view: View) -> tuple[int, ...]:
        """The grid of mask units of a view: (d, h, w), or (h, w) of a mammogram."""
        return tuple(self.encoder.grid(view.input.shape))
