"""Which crop is seen in which step: item i of a fine-tuning follows from the seed and i alone.

Both datasets have as many items as all steps of the run read, in order, so that a resumed run
sees what it has not seen yet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd

from smartlab.data.crops.flat import ImageDataset, lesion_crops
from smartlab.data.crops.regions import is_lesion
from smartlab.data.crops.views import CropDataset, Fields, Item, LesionDataset, middle_of_mask, read_crop
from smartlab.data.images.body import BLOCK
from smartlab.data.images.grid import AIR, three
from smartlab.data.store.store import Store

PLACES = 256  # voxels remembered per structure and image: enough to draw from, 25 kB for 16 structures


class Places(NamedTuple):
    """Where to look in each case: `case` (crops,) says whose crop each is, `center_mm` (crops, 3) where."""

    case: np.ndarray
    center_mm: list[list[float]]

    def of(self, rows: np.ndarray) -> Places:
        """Those of some of the cases, which are then numbered from 0."""
        kept = [(k, i) for k, row in enumerate(rows) for i in np.flatnonzero(self.case == row)]
        return Places(np.array([k for k, _ in kept], int), [self.center_mm[i] for _, i in kept])


def places(store: Store, about: pd.DataFrame, size: int, spacing: float | None) -> tuple[Places, str]:
    """One place per case of `about` with the mask of a lesion (its largest piece), else windows over the body."""
    wanted = [value for value, name in store.label_names.items() if is_lesion(name)]
    owner, centers, masked = [], [], 0
    for k, image in enumerate(about.image):
        middle = middle_of_mask(store, int(image), wanted)
        found = _windows(store, int(image), size, spacing) if middle is None else [middle]
        owner += [k] * len(found)
        centers += found
        masked += middle is not None
    how = f"the middle of the lesion's mask in {masked} cases, windows over the whole scan in {len(about) - masked}"
    return Places(np.array(owner), centers), how


def _windows(store: Store, image: int, size: int, spacing: float | None) -> list[list[float]]:
    """Centres of crops that tile a scan, without those that hold next to no body."""
    shape, affine, body = np.array(store.shape(image)), store.affine(image), store.body(image)
    mm = three(store.spacing)
    side = size * (mm if spacing is None else three(spacing)) / mm  # voxels of the store
    number = np.maximum(1, np.ceil(shape / side - 0.5)).astype(int)
    found = []
    for place in np.ndindex(*number):
        middle = (np.array(place) + 0.5) * shape / number
        cells = [
            slice(max(0, int((m - s / 2) // BLOCK)), int((m + s / 2) // BLOCK) + 1)
            for m, s in zip(middle, side, strict=True)
        ]
        found.append((float(body[tuple(cells)].mean()), affine[:3, :3] @ (middle - 0.5) + affine[:3, 3]))
    most = max(share for share, _ in found)
    return [list(map(float, center)) for share, center in found if share >= most / 4]


class PlacedCrops(LesionDataset):
    """Crops around given places of scans, one after the other."""

    def __init__(self, store: Store, table: pd.DataFrame, size: int, spacing: float | None) -> None:
        self.store, self.table, self.size, self.spacing = store, table, (size,) * 3, spacing
        self.fields: Fields = {"crop": ((*store.leading, *self.size), np.int16)}


class FlatScans(ImageDataset):
    """Whole mammograms, as `FlatLesions` gives squares around lesions."""

    def __init__(self, store: Store, images: Sequence[int], size: int) -> None:
        super().__init__(store, view=size, crop="image", jitter=0.0, images=images)
        self.fields = {"crop": ((1, size, size), np.int16)}

    def read(self, epoch: int, index: int, out: dict[str, np.ndarray]) -> Item:
        return super().read(epoch, index, {"views": out["crop"]})


def crops_of(
    store: Store, about: pd.DataFrame, where: Places | None, size: int, spacing: float | None, margin: float
) -> CropDataset:
    """The crops of the cases in `about`, around its lesions or at given places; of mammograms without
    lesions the whole image."""
    if where is not None:
        table = about.iloc[where.case].assign(center_mm=pd.Series(where.center_mm).to_numpy(), labels=None)
        return PlacedCrops(store, table.set_index("case"), size, spacing)
    if about.center_mm.notna().all():
        return lesion_crops(store, size, spacing, cases=list(about.case), margin=margin)
    return FlatScans(store, [int(i) for i in about.image], size)


class LesionDraws(CropDataset):
    """Lesion crops drawn for training: each case once per round, or by weight with replacement.

    weights: (cases,) chance of each case, as for balanced classes; None: rounds of all cases.
    owner: (crops,) whose crop each is, where a case has several: one of them is drawn.
    """

    def __init__(
        self,
        cases: CropDataset,
        items: int,
        *,
        seed: int,
        weights: np.ndarray | None = None,
        owner: np.ndarray | None = None,
    ) -> None:
        self.cases, self.items, self.seed = cases, items, seed
        self.owner = np.arange(len(cases)) if owner is None else owner
        self.weights = None if weights is None else weights / weights.sum()
        self.fields: Fields = {"crop": cases.fields["crop"]}

    def __len__(self) -> int:
        return self.items

    def read(self, epoch: int, index: int, out: dict[str, np.ndarray]) -> Item:
        """The crop, and "row": which of the cases it is."""
        if self.weights is None:
            row = rounds(self.seed, int(self.owner.max()) + 1, index)
        else:
            row = int(np.random.default_rng((self.seed, index)).choice(len(self.weights), p=self.weights))
        buffers = {k: out.get(k, np.empty(s, t)) for k, (s, t) in self.cases.fields.items()}
        crops = np.flatnonzero(self.owner == row)
        which = 0 if len(crops) == 1 else np.random.default_rng((self.seed, index, 1)).integers(len(crops))
        self.cases.read(0, int(crops[which]), buffers)
        return {"row": row}


class ForegroundCrops(CropDataset):
    """Random crops with labels, most of them holding a structure that is to be segmented.

    With chance `foreground` a crop lies around a voxel of a structure, every structure of the image
    being as likely as any other, so that small ones are seen as often as large ones. A scan smaller
    than the crop is padded with air.

    table: (256,) uint8, value in the store -> class; 0 is background.
    """

    def __init__(
        self,
        store: Store,
        images: Sequence[int],
        table: np.ndarray,
        *,
        size: int,
        items: int,
        seed: int,
        foreground: float = 0.75,
    ) -> None:
        self.store, self.images, self.table, self.size = store, list(images), table, size
        self.items, self.seed, self.foreground = items, seed, foreground
        self.fields: Fields = {
            "view": ((*store.leading, *(size,) * 3), np.int16),
            "labels": ((size,) * 3, np.uint8),
        }
        self._places: dict[int, list[np.ndarray]] = {}  # image -> voxels of each structure it has

    def __len__(self) -> int:
        return self.items

    def read(self, epoch: int, index: int, out: dict[str, np.ndarray]) -> Item:
        """Draw one crop: "image", and "start", its first voxel in the scan."""
        image = self.images[rounds(self.seed, len(self.images), index)]
        rng = np.random.default_rng((self.seed, index))
        shape = np.array(self.store.shape(image))
        places = self._structures(image)
        if places and rng.random() < self.foreground:
            voxels = places[rng.integers(len(places))]
            quarter = self.size // 4  # the voxel lies in the middle half of the crop
            start = voxels[rng.integers(len(voxels))] - rng.integers(quarter, self.size - quarter, 3)
        else:
            start = rng.integers(0, np.maximum(shape - self.size, 0) + 1)
        slack = shape - self.size
        start = np.where(slack < 0, slack // 2, np.clip(start, 0, np.maximum(slack, 0)))
        out["view"][:] = read_crop(self.store.array(image), start, (self.size,) * 3, AIR)[0]
        labels = self.store.labels(image)
        assert labels is not None  # callers take images with labels only
        out["labels"][:] = self.table[read_crop(labels, start, (self.size,) * 3, 0)[0]]
        return {"image": image, "start": start}

    def _structures(self, image: int) -> list[np.ndarray]:
        if image not in self._places:
            labels = self.store.labels(image)
            assert labels is not None
            classes = self.table[labels[:]]
            rng = np.random.default_rng((self.seed, image, 1))
            found = []
            for value in np.unique(classes[classes > 0]):
                voxels = np.flatnonzero(classes == value)
                some = rng.choice(voxels, min(PLACES, len(voxels)), replace=False)
                found.append(np.column_stack(np.unravel_index(some, classes.shape)).astype(np.int16))
            self._places[image] = found
        return self._places[image]


def rounds(seed: int, n: int, index: int) -> int:
    """Item `index` of an endless sequence in which each of n things comes once per round, shuffled."""
    return int(np.random.default_rng((seed, index // n, n)).permutation(n)[index % n])
