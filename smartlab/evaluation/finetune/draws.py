"""Which crop is seen in which step: item i of a fine-tuning follows from the seed and i alone.

Both datasets have as many items as the run has steps × batch, read in order, so that a resumed run
sees what it has not seen yet.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from smartlab.data.crops import CropDataset, Fields, Item, read_crop
from smartlab.data.grid import AIR
from smartlab.data.store import Store

PLACES = 256  # voxels remembered per structure and image: enough to draw from, 25 kB for 16 structures


class LesionDraws(CropDataset):
    """Lesion crops drawn for training: each case once per round, or by weight with replacement.

    weights: (cases,) chance of each case, as for balanced classes; None: rounds of all cases.
    """

    def __init__(
        self, cases: CropDataset, items: int, *, seed: int, weights: np.ndarray | None = None
    ) -> None:
        self.cases, self.items, self.seed = cases, items, seed
        self.weights = None if weights is None else weights / weights.sum()
        self.fields: Fields = {"crop": cases.fields["crop"]}

    def __len__(self) -> int:
        return self.items

    def read(self, epoch: int, index: int, out: dict[str, np.ndarray]) -> Item:
        """The crop, and "row": which of the cases it is."""
        if self.weights is None:
            row = rounds(self.seed, len(self.cases), index)
        else:
            row = int(np.random.default_rng((self.seed, index)).choice(len(self.weights), p=self.weights))
        buffers = {k: out.get(k, np.empty(s, t)) for k, (s, t) in self.cases.fields.items()}
        self.cases.read(0, row, buffers)
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
        self.fields: Fields = {"view": ((size,) * 3, np.int16), "labels": ((size,) * 3, np.uint8)}
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
