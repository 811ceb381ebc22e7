"""Views of mammograms from a store: crops around lesions, whole images, or random parts of the breast.

As all datasets here (`crops.py`) pure in (seed, epoch, index), and reading only the blocks a crop touches.
A view is a square of `view` pixels, int16 grey 0 to 4095, chest wall on the left. What it shows is
never magnified: where a lesion with its margin is smaller than the view at the store's spacing, the
view has more context instead, so the finest detail is always real.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np

from smartlab.core.errors import UseError, one_of
from smartlab.data.crops.views import (
    CropDataset,
    Fields,
    Item,
    LesionDataset,
    lesion_table,
    positions,
    read_crop,
    resampled_crop,
)
from smartlab.data.images.grid import Spacing, three
from smartlab.data.store.store import Store

if TYPE_CHECKING:
    import pandas as pd

CROPS = ("lesion", "image", "random")
_FOREGROUND = 0.25  # least share of breast in a random view, where the image has such a place


class ImageDataset(CropDataset):
    """Square views of mammograms: field "views", (1, view, view) int16.

    crop:    "lesion"  one item per case with a lesion, the square around it;
             "image"   one item per image, the breast's box, padded with black to a square;
             "random"  one item per image, `view` pixels of it as stored, at least a quarter of it breast.
    margin:  context on each side of a lesion, in units of its longer side.
    jitter:  lesions only: how far a view may move (in margins) and change in size, at random; 0 for evaluation.
    flip:    mirror at random along both axes.
    draws:   items per case or image and epoch.
    images:  positions in the store to draw from (a training split); all by default.
    cases:   keys of `store.cases` for "lesion", in this order; by default every case of `images` with a lesion.

    >>> item = ImageDataset(store, view=128, jitter=0)[0]
    >>> item["views"].shape  # what is known of the image is in item["labels"]
    (1, 128, 128)
    """

    def __init__(
        self,
        store: Store,
        *,
        view: int = 128,
        crop: str = "lesion",
        margin: float = 0.5,
        jitter: float = 0.25,
        flip: bool = False,
        seed: int = 0,
        draws: int = 1,
        images: Iterable[int] | None = None,
        cases: Iterable[str] | None = None,
    ) -> None:
        one_of("unknown crop", crop, CROPS)
        if view < 1 or margin < 0 or not 0 <= jitter < 1 or draws < 1:
            raise UseError(
                "out of range",
                found=f"view {view}, margin {margin}, jitter {jitter}, draws {draws}",
                expected="view ≥ 1, margin ≥ 0, 0 ≤ jitter < 1, draws ≥ 1",
            )
        check_flat(store)
        self.store, self.view, self.crop, self.margin = store, view, crop, margin
        self.jitter, self.flip, self.seed, self.draws = jitter, flip, seed, draws
        self.images = positions(store, images)
        self.table: pd.DataFrame | None = None
        if crop == "lesion":
            self.table = lesion_table(store, store.cases, cases, self.images)
        self.fields: Fields = {"views": ((1, view, view), np.int16)}

    def __len__(self) -> int:
        return self.draws * (len(self.images) if self.table is None else len(self.table))

    def read(self, epoch: int, index: int, out: dict[str, np.ndarray]) -> Item:
        """Read one view: "image", "affine" of the view (4, 4) to mm, "padded"; for lesions "case", "labels"."""
        rng = np.random.default_rng((self.seed, epoch, index))
        about: Item = {}
        if self.table is None:
            image = self.images[index % len(self.images)]
            start, side = self._whole(image) if self.crop == "image" else self._anywhere(rng, image)
        else:
            row = self.table.iloc[index % len(self.table)]
            image = row.image
            about = {"case": row.name, "labels": row.labels}
            start, side = self._around(rng, image, row.center_mm, row.box_mm, row.diameter_mm)
        view, affine, padded = cut(self.store, image, start, side, self.view)
        mirrored = rng.random(2) < 0.5 if self.flip else np.zeros(2, bool)
        for axis in np.flatnonzero(mirrored):
            view = np.flip(view, int(axis))
            affine[:3, 3] += affine[:3, axis] * (self.view - 1)
            affine[:3, axis] *= -1
        out["views"][0] = view
        return {"image": int(image), **about, "affine": affine, "padded": padded}

    def _around(
        self, rng: np.random.Generator, image: int, center: list, box: list | None, diameter: float | None
    ) -> tuple[np.ndarray, float]:
        """Start (rows, columns) and side of the square around a lesion, in the store's pixels."""
        extent = max(box[:2]) if box else (diameter or 0.0)
        size = extent / float(three(self.store.spacing)[0])
        side = max(size * (1 + 2 * self.margin), float(self.view))
        inverse = np.linalg.inv(self.store.affine(image))
        middle = (inverse[:3, :3] @ np.array(center, float) + inverse[:3, 3])[:2]
        if self.jitter:
            room = (side - size) / 2  # so far the lesion may move without leaving the view
            middle = middle + self.jitter * room * rng.uniform(-1, 1, 2)
            side = max(side * np.exp(self.jitter * rng.uniform(-1, 1)), float(self.view))
        return middle - (side - 1) / 2, side

    def _whole(self, image: int) -> tuple[np.ndarray, float]:
        shape = np.array(self.store.shape(image)[:2])
        side = float(max(*shape, self.view))
        return np.array([(shape[0] - side) / 2, 0.0]), side  # the chest wall stays at the left border

    def _anywhere(self, rng: np.random.Generator, image: int) -> tuple[np.ndarray, float]:
        """A square of `view` stored pixels with enough breast; what is tried follows from the item alone."""
        shape, breast = np.array(self.store.shape(image)[:2]), self.store.body(image)[:, :, 0]
        best, most = np.zeros(2), -1.0
        for _ in range(16):
            slack = np.maximum(shape - self.view, 0)
            start = rng.integers(0, slack + 1)
            cells = [slice(a // 32, -(-(a + self.view) // 32)) for a in start]
            share = float(breast[tuple(cells)].mean())
            if share > most:
                best, most = start.astype(float), share
            if share >= _FOREGROUND:
                break
        return best, float(self.view)


class FlatLesions(ImageDataset):
    """Squares around lesions for evaluation, as `LesionDataset` gives cubes: field "crop", (1, size, size)."""

    table: pd.DataFrame

    def __init__(self, store: Store, *, size: int, cases: Iterable[str] | None, margin: float) -> None:
        super().__init__(store, view=size, crop="lesion", margin=margin, jitter=0.0, cases=cases)
        self.fields = {"crop": ((1, size, size), np.int16)}

    def read(self, epoch: int, index: int, out: dict[str, np.ndarray]) -> Item:
        return super().read(epoch, index, {"views": out["crop"]})


def lesion_crops(
    store: Store,
    size: int,
    spacing: Spacing | None = None,
    *,
    cases: Iterable[str] | None = None,
    margin: float = 0.5,
) -> LesionDataset | FlatLesions:
    """Crops around lesions, nothing random: cubes of a scan, or squares of a mammogram with its margin."""
    if is_flat(store):
        return FlatLesions(store, size=size, cases=cases, margin=margin)
    return LesionDataset(store, size=size, spacing=spacing, cases=cases)


def is_flat(store: Store) -> bool:
    """Whether a store holds mammograms."""
    return len(store) > 0 and store.shape(0)[2] == 1


def check_flat(store: Store) -> None:
    """Refuse a store of volumes."""
    if not is_flat(store) and len(store):
        raise UseError(
            "this store holds volumes, not mammograms",
            path=store.path,
            found=f"shape {store.shape(0)}",
            fix="use ViewDataset or LesionDataset, or a manifest of modality MG",
        )


def cut(
    store: Store, image: int, start: np.ndarray, side: float, view: int
) -> tuple[np.ndarray, np.ndarray, bool]:
    """A square of the store, from `start` (rows, columns), as view × view pixels -> (grey, affine, padded).

    Black beyond the image. At the store's own spacing it is cut, to half a pixel; else resampled with
    anti-aliasing, exactly placed.
    """
    grid = store.affine(image)
    step = side / view
    if abs(step - 1) < 1e-6:
        at = np.array([*np.floor(np.asarray(start) + 0.5), 0])
        box, padded = read_crop(store.array(image), at.astype(int), (view, view, 1), 0)
        grid[:3, 3] += grid[:3, :3] @ at
        return box[:, :, 0], grid, padded
    first = np.array([*(np.asarray(start) + (step - 1) / 2), 0.0])  # centre of the first pixel
    target = grid.copy()
    target[:3, :2] *= step
    target[:3, 3] += grid[:3, :3] @ first
    values, padded = resampled_crop(store.array(image), grid, (view, view, 1), target, 0)
    return values[:, :, 0], target, padded
