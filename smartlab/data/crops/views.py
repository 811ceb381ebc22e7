"""What training and evaluation read from a store: views, lesion crops, whole volumes.

Every dataset is map-style and pure: item (epoch, index) depends on the seed and these two numbers
only, never on a worker, a rank or what was read before. `dataset[index]` is epoch 0. Only the
blocks that a crop touches are read. Values are int16 as stored, with an axis of channels before (X, Y, Z) where a
store has several; windowing and augmentation happen on the
device, for the whole batch (`augment.py`). `CropLoader` (`loader.py`) makes batches of them.

A dataset names its arrays in `fields` and writes them into buffers it is given (`read`), so that
no crop is copied more often than needed.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from smartlab.core.errors import DataError, UseError
from smartlab.data.images.body import BLOCK
from smartlab.data.images.grid import AIR, Spacing, three
from smartlab.data.images.resample import LabelPainter, over_channels, resample
from smartlab.data.store.store import Store

if TYPE_CHECKING:
    import blosc2
    import pandas as pd

Item = dict[str, Any]
Fields = dict[str, tuple[tuple[int, ...], type[np.generic]]]
# Boxes that were copied into views, for the next: allocated anew, 4 MB may cost 900 page faults each time,
# half as long as decompressing them. Popped and pushed, so that no two threads get the same.
_MEMORY: list[np.ndarray] = []
_REACH = 3  # voxels (or output voxels, if larger) around a crop that resampling looks at


class CropDataset(ABC):
    """Map-style dataset of arrays of fixed shapes. Subclasses fill `fields`, `__len__` and `read`."""

    fields: Fields  # name -> (shape, dtype)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, epoch: int, index: int, out: dict[str, np.ndarray]) -> Item:
        """Write the arrays of an item into `out`; return the rest of the item."""

    def __getitem__(self, key: int | tuple[int, int]) -> Item:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        out = {name: np.empty(shape, dtype) for name, (shape, dtype) in self.fields.items()}
        return out | self.read(epoch, index, out)


def positions(store: Store, images: Iterable[int] | None) -> list[int]:
    """Which images of a store to draw from; all by default."""
    chosen = list(range(len(store)) if images is None else images)
    if not chosen:
        raise DataError("no images to draw from", path=store.path, fix="check the split and failures.csv")
    return chosen


def read_crop(
    array: blosc2.NDArray,
    start: ArrayLike,
    size: ArrayLike,
    fill: int = AIR,
    memory: np.ndarray | None = None,
) -> tuple[np.ndarray, bool]:
    """A box of a stored volume, of all channels, reading only its blocks -> (array (…, *size), whether it was padded).

    The box may reach beyond the volume (or lie outside): there it holds `fill`. `memory`, a flat
    array of the volume's type, is used for the result where it is large enough.
    """
    start, size, many = np.asarray(start), tuple(np.asarray(size).tolist()), tuple(array.shape[:-3])
    low = np.clip(start, 0, array.shape[-3:])
    high = np.clip(start + size, low, array.shape[-3:])
    shape = (*many, *(high - low).tolist())
    count = int(np.prod(shape))
    fits = memory is not None and memory.size >= count
    part = memory[:count].reshape(shape) if memory is not None and fits else np.empty(shape, array.dtype)
    try:
        if count:  # as array[low:high], into memory of ours
            array.get_slice_numpy(part, ([0] * len(many) + low.tolist(), [*many, *high.tolist()]))
    except RuntimeError as error:
        raise DataError(
            "a stored volume is damaged",
            path=array.schunk.urlpath,
            found=error,
            fix="delete it and build the store again",
        ) from error
    if part.shape[-3:] == size:
        return part, False
    out = np.full((*many, *size), fill, array.dtype)
    there: Any = (
        ...,
        *(slice(a, a + n) for a, n in zip(low - start, part.shape[-3:], strict=True)),
    )
    out[there] = part
    return out, True


def resampled_crop(
    array: blosc2.NDArray, grid: np.ndarray, size: tuple[int, ...], target: np.ndarray, fill: int
) -> tuple[np.ndarray, bool]:
    """`size` voxels on the grid `target`, parallel to the volume's own, reading only what they need -> as `read_crop`.

    Axes of one voxel, as of mammograms, stay as they are. Labels go by their share of each voxel.
    """
    to_index = np.linalg.inv(grid) @ target
    step, flat = np.diag(to_index)[:3], np.array(array.shape[-3:]) == 1
    reach = np.where(flat, 0, np.ceil(_REACH * np.maximum(1.0, step) - 1e-6)).astype(int)
    start = np.floor(to_index[:3, 3] + 1e-6).astype(int) - reach
    count = np.where(flat, 1, np.ceil(step * np.array(size) - 1e-6).astype(int) + 2 * reach + 1)
    box, padded = read_crop(array, start, count, fill)
    moved = grid.copy()
    moved[:3, 3] += grid[:3, :3] @ start
    if array.dtype == np.int16:

        def change(one: np.ndarray) -> np.ndarray:
            values = resample(one, moved, size, target, fill=fill)
            return np.clip(np.rint(values), one.min(), one.max()).astype(np.int16)

        return over_channels(change, box), padded
    painter = LabelPainter(size, target)
    for value in np.unique(box[box > 0]):
        painter.paint(int(value), box == value, moved)
    return painter.finish(), padded


class ViewDataset(CropDataset):
    """Overlapping views from one region of a scan, for self-supervised training (METHODS 1.2).

    An item is drawn in three steps: a region of `region`³ voxels with at least the share
    `foreground` of body (the index knows, no voxel is read); then `views` offsets in it such that
    each view shares at least `min_overlap` of its volume with the first; then one read of the box
    around the views. Regions start on the grid of the stored blocks, so little is decompressed in
    vain; views start anywhere. A scan smaller than a view is padded with −1024, one at least as
    large never is.

    draws:   items per image and epoch.
    images:  positions in the store to draw from (a training split); all by default.
    labels:  also give the labels of the views ("view_labels", 0 where an image has none).

    >>> item = ViewDataset(store)[epoch, index]
    >>> item["views"].shape, item["offsets"].shape
    ((2, 96, 96, 96), (2, 3))
    """

    def __init__(
        self,
        store: Store,
        *,
        region: int = 128,
        view: int = 96,
        views: int = 2,
        seed: int = 0,
        min_overlap: float = 0.25,
        foreground: float = 0.25,
        draws: int = 1,
        images: Iterable[int] | None = None,
        labels: bool = False,
    ) -> None:
        if not 0 < view <= region:
            raise UseError("a view must fit into its region", found=f"view {view}, region {region}")
        if not (0 <= min_overlap <= 1 and 0 <= foreground <= 1 and views >= 1 and draws >= 1):
            raise UseError(
                "out of range",
                found=f"min_overlap {min_overlap}, foreground {foreground}, views {views}, draws {draws}",
                expected="shares between 0 and 1, at least one view and one draw",
            )
        self.store, self.region, self.view, self.views = store, region, view, views
        self.seed, self.min_overlap, self.foreground, self.draws = seed, min_overlap, foreground, draws
        self.images = positions(store, images)
        self._starts: dict[int, np.ndarray] = {}  # image -> (regions, 3), made on first use
        self.fields: Fields = {"views": ((views, *store.leading, view, view, view), np.int16)}
        if labels:
            self.fields["view_labels"] = ((views, view, view, view), np.uint8)

    def __len__(self) -> int:
        return len(self.images) * self.draws

    def read(self, epoch: int, index: int, out: dict[str, np.ndarray]) -> Item:
        """Draw and read one item: "image", "offsets" (views, 3) in voxels, "padded"."""
        image = self.images[index % len(self.images)]
        rng = np.random.default_rng((self.seed, epoch, index))
        offsets = self._offsets(rng, np.array(self.store.shape(image)), self._region(rng, image))
        low = offsets.min(axis=0)
        size = offsets.max(axis=0) + self.view - low
        memory = (
            _MEMORY.pop() if _MEMORY else np.empty(math.prod(self.store.leading) * self.region**3, np.int16)
        )
        box, padded = read_crop(self.store.array(image), low, size, AIR, memory)
        self._copy(box, offsets - low, out["views"])
        _MEMORY.append(memory)
        if "view_labels" in out:
            stored = self.store.labels(image)
            labels = np.zeros(size, np.uint8) if stored is None else read_crop(stored, low, size, 0)[0]
            self._copy(labels, offsets - low, out["view_labels"])
        return {"image": image, "offsets": offsets, "padded": padded}

    def _copy(self, box: np.ndarray, offsets: np.ndarray, out: np.ndarray) -> None:
        for view, at in zip(out, offsets, strict=True):
            cut: Any = (..., *(slice(a, a + self.view) for a in at))
            view[:] = box[cut]

    def _region(self, rng: np.random.Generator, image: int) -> np.ndarray:
        """Start of a region, uniform over those on the block grid with enough body."""
        if image not in self._starts:
            share = self.store.body(image)
            for axis, n in enumerate(self.store.shape(image)):  # means over windows: separable
                share = _window_mean(share, axis, n, self.region)
            enough = np.argwhere(share >= min(self.foreground, share.max()))
            self._starts[image] = (BLOCK * enough).astype(np.int16)  # about 1 kB
        starts = self._starts[image]
        start = starts[rng.integers(len(starts))].astype(int)
        if (slack := self.region - self.view) < BLOCK - 1:  # else views would never start between regions
            start += rng.integers(0, BLOCK - slack, size=3)
            start = np.minimum(start, np.maximum(np.subtract(self.store.shape(image), self.region), 0))
        return start

    def _offsets(self, rng: np.random.Generator, shape: np.ndarray, region: np.ndarray) -> np.ndarray:
        """(views, 3) starts of the views, inside the scan wherever it is large enough."""
        end = np.minimum(region + self.region, shape)
        low = np.where(shape < self.view, shape - self.view, np.minimum(region, shape - self.view))
        high = np.where(shape < self.view, 0, np.maximum(low, end - self.view))
        offsets = rng.integers(low, high + 1, size=(self.views, 3))
        for k in range(1, self.views):  # pull a view that went too far back towards the first
            shift = (offsets[k] - offsets[0]).astype(float)
            while np.prod(np.maximum(1 - np.abs(np.trunc(shift)) / self.view, 0)) < self.min_overlap:
                shift *= 0.9
            offsets[k] = offsets[0] + np.trunc(shift).astype(int)
        return offsets


def _window_mean(share: np.ndarray, axis: int, n: int, region: int) -> np.ndarray:
    """Mean along one axis over every window of `region` voxels that starts on a block."""
    blocks = share.shape[axis]
    width = -(-region // BLOCK)
    starts = max(1, -(-(n - region) // BLOCK) + 1)
    voxels = np.minimum(BLOCK, n - BLOCK * np.arange(blocks))  # the last block is cut by the border
    weights = np.zeros((starts, blocks))
    for start in range(starts):
        weights[start, start : start + width] = voxels[start : start + width]
    weights /= weights.sum(axis=1, keepdims=True)
    return np.moveaxis(np.tensordot(weights, share, axes=(1, axis)), 0, axis)


def middle_of_mask(store: Store, image: int, wanted: list[int]) -> list[float] | None:
    """The middle (RAS mm) of the largest piece that these labels have in a scan; None where they have none."""
    from scipy import ndimage

    stored = store.labels(image) if wanted else None
    if stored is None:
        return None
    parts, number = ndimage.label(np.isin(stored[:], wanted))
    if not number:
        return None
    largest = 1 + int(np.bincount(parts.ravel())[1:].argmax())
    affine = store.affine(image)
    return list(map(float, affine[:3, :3] @ ndimage.center_of_mass(parts == largest) + affine[:3, 3]))


def lesion_table(
    store: Store, table: pd.DataFrame, cases: Iterable[str] | None, images: Iterable[int] | None = None
) -> pd.DataFrame:
    """The rows of `store.cases` asked for, each with a lesion; by default all with one, of these images."""
    fix = "choose cases with one, give `lesion` in the manifest, or use whole images; see failures.csv"
    if cases is None:
        table = table[table.center_mm.notna()]
        table = table if images is None else table[table.image.isin(list(images))]
    else:
        keys = list(cases)
        if unknown := [key for key in keys if key not in table.index]:
            short = unknown[0][:8] + "…"
            raise UseError(f"{len(unknown)} cases are not in the store", path=store.path, found=short)
        table = table.loc[keys]
        if without := int(table.center_mm.isna().sum()):
            raise DataError(f"{without} of {len(keys)} cases have no lesion centre", path=store.path, fix=fix)
    if table.empty:
        raise DataError("no case has a lesion", path=store.path, fix=fix)
    return table


class LesionDataset(CropDataset):
    """Crops centred on lesions, one per case, for evaluation. Nothing random.

    Where no case of the store says where its lesion is, the masks of lesions do.

    size:     voxels, one number or three.
    spacing:  resample the crop to this voxel size in mm (one, or three), exactly centred; by default the store's own
              grid is cut, centred to half a voxel.
    cases:    keys of `store.cases` to take, in this order; by default every case with a lesion.

    >>> few = store.cases.index[:6]
    >>> item = LesionDataset(store, size=64, cases=few)[0]
    >>> item["crop"].shape  # what is known of the lesion is in item["labels"]
    (64, 64, 64)
    """

    def __init__(
        self,
        store: Store,
        *,
        size: int | tuple[int, int, int] = 64,
        spacing: Spacing | None = None,
        cases: Iterable[str] | None = None,
    ) -> None:
        from smartlab.data.crops.regions import is_lesion

        self.store, self.spacing = store, spacing
        self.size = (size,) * 3 if isinstance(size, int) else tuple(size)
        table = store.cases
        marked = [value for value, name in store.label_names.items() if is_lesion(name)]
        if marked and table.center_mm.isna().all():
            middles: Any = [middle_of_mask(store, image, marked) for image in table.image]
            table = table.assign(center_mm=middles)
        self.table = lesion_table(store, table, cases)
        self.fields: Fields = {"crop": ((*store.leading, *self.size), np.int16)}
        if store.label_names:
            self.fields["crop_labels"] = (self.size, np.uint8)

    def __len__(self) -> int:
        return len(self.table)

    def read(self, epoch: int, index: int, out: dict[str, np.ndarray]) -> Item:
        """Read one crop: "case", "image", "labels", "center_mm", and the crop's "affine" to RAS mm."""
        row = self.table.iloc[index]
        affine = self._affine(row.image, np.array(row.center_mm, float))
        out["crop"][:] = self._cut(self.store.array(row.image), row.image, affine, AIR)
        if "crop_labels" in out:
            stored = self.store.labels(row.image)
            out["crop_labels"][:] = 0 if stored is None else self._cut(stored, row.image, affine, 0)
        about = {"case": row.name, "image": row.image, "labels": row.labels}
        return about | {"center_mm": np.array(row.center_mm, float), "affine": affine}

    def _affine(self, image: int, center: np.ndarray) -> np.ndarray:
        """Of a grid of `size` voxels around a point; on the store's grid when no spacing is asked."""
        affine = self.store.affine(image)
        middle = (np.array(self.size) - 1) / 2
        if self.spacing is not None:
            affine[:3, :3] *= three(self.spacing) / three(self.store.spacing)
            affine[:3, 3] = center - affine[:3, :3] @ middle
        else:
            inverse = np.linalg.inv(affine)
            start = np.floor(inverse[:3, :3] @ center + inverse[:3, 3] - middle + 0.5)
            affine[:3, 3] += affine[:3, :3] @ start
        return affine

    def _cut(self, stored: blosc2.NDArray, image: int, affine: np.ndarray, fill: int) -> np.ndarray:
        grid = self.store.affine(image)
        to_index = np.linalg.inv(grid) @ affine
        if self.spacing is None:
            return read_crop(stored, np.rint(to_index[:3, 3]).astype(int), self.size, fill)[0]
        return resampled_crop(stored, grid, self.size, affine, fill)[0]


class VolumeDataset:
    """Whole scans one by one, for sliding windows: "volume" int16, of all channels, "volume_labels" uint8 or None."""

    def __init__(self, store: Store, images: Iterable[int] | None = None) -> None:
        self.store = store
        self.images = list(range(len(store)) if images is None else images)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        image = self.images[index]
        labels = self.store.labels(image)
        return {
            "volume": self.store.array(image)[:],
            "volume_labels": None if labels is None else labels[:],
            "affine": self.store.affine(image),
            "image": image,
        }
