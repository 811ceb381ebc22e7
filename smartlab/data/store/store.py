"""The store: a cohort as small compressed volumes that are read in parts.

Built once from a manifest (`build_store`, in `build.py`), opened in milliseconds however many
scans it holds (`open_store`), and all that training and evaluation touch:

- one blosc2 array per scan, int16 at one spacing, cropped to the body, lossless: HU, or of MR 0 to 4095 between
  two percentiles (`mr.py`); (C, X, Y, Z) where a patient has several images on one grid;
  blocks of 32³ so that a crop reads what it needs (`ingest.py` gives the measurements);
- optionally one uint8 label volume per scan;
- an index with shapes, affines, HU range, where the body is, labels, splits and lesions.

No name, id, path or date is in it: images, cases and patients carry salted hashes
(`privacy.py`). `Store.key_of(case)` leads from a manifest's case to its row, for who has the salt.
"""

from __future__ import annotations

import base64
import hashlib
import mmap
import os
import warnings
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from smartlab.core import plots
from smartlab.core.errors import DataError
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.privacy import hashed, salt
from smartlab.data.images import mr
from smartlab.data.images.body import BLOCK
from smartlab.data.images.grid import Spacing, three
from smartlab.data.images.readers import Volume
from smartlab.data.store import index
from smartlab.data.store.current import check_salt
from smartlab.data.store.flat import FIND
from smartlab.data.store.request import FORMAT
from smartlab.data.store.rows import CaseRow, FileRow, ImageRow

if TYPE_CHECKING:
    import blosc2
    import pandas as pd

OPEN_FILES = 64  # volumes kept open per process: enough for any batch, far below the system's limit


def open_store(path: str | Path) -> Store:
    """Open a built store. Reads the index only.

    >>> store = sl.open_store("my/store")
    >>> store.array(0)[:96, :96, :96]                      # reads these blocks only
    """
    return Store(path)


class Store:
    """A built cohort, indexed by position in manifest order. Cheap to pickle: only its path travels."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()
        header = index.read_header(self.path)
        if header is None:
            begun = (self.path / index.JOURNAL).exists()
            raise DataError(
                "the store is not finished" if begun else "there is no store here",
                path=self.path,
                fix="run the build again, it goes on where it stopped"
                if begun
                else "build one: smartlab data build",
            )
        if header["format"] != FORMAT:
            raise DataError(
                "the store has another format",
                path=self.path,
                found=header["format"],
                expected=FORMAT,
                fix="build it again with this version",
            )
        if not header["complete"]:
            warnings.warn(f"{self.path}: the build was interrupted, some images are missing", stacklevel=3)
        self.header = header
        self.rows: Sequence[ImageRow] = index.read_lines(self.path, header, "images")
        self._open: OrderedDict[str, blosc2.NDArray] = OrderedDict()
        self._process = os.getpid()
        self._compared = mmap.mmap(
            -1, 2 * len(self.rows) + 1
        )  # shared with workers: a byte per volume, per labels

    def __reduce__(self) -> Any:
        return Store, (self.path,)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.rows)

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r}: {len(self)} images, {self.header['cases']['count']} cases)"

    # ---- tables

    @property
    def fingerprint(self) -> str:
        """Hash of voxels, geometry, labels and patients; the same whatever salt was used."""
        return self.header["fingerprint"]

    @cached_property
    def voxels(self) -> str:
        """Hash of what pretraining sees: voxels and geometry, and the lesions of mammograms, but no label and no split."""
        lesions = [(c["image"], c["center_mm"], c["box_mm"], c["diameter_mm"]) for c in self._case_rows]
        images = [(row["array"], row["affine"]) for row in self.rows]
        return index.digest([images, lesions if "grey" in self.header["settings"] else []])

    @property
    def spacing(self) -> Spacing:
        """Voxel size in mm: one number, or three along x, y and z."""
        return self.header["settings"]["spacing"]

    @property
    def voxel_mm3(self) -> float:
        return self.spacing**3 if isinstance(self.spacing, float) else float(np.prod(self.spacing))

    @property
    def modality(self) -> str:
        """ "MR", else "CT", also of mammograms, whose settings say what they are."""
        return self.header["settings"].get("modality", "CT")

    @property
    def channels(self) -> tuple[str, ...]:
        """The names of the images of a patient, where there are several on one grid."""
        return tuple(self.header["settings"].get("channels", ()))

    @property
    def leading(self) -> tuple[int, ...]:
        """The axes of a volume before (X, Y, Z): one of several channels, else none."""
        return (len(self.channels),) if len(self.channels) > 1 else ()

    @property
    def window(self) -> tuple[float, float]:
        """What a picture shows of a scan, black to white: soft tissue, of MR what lies between the percentiles."""
        return mr.WINDOW if self.modality == "MR" else plots.WINDOWS["soft tissue"]

    def shown(self, array: Any) -> Any:
        """What pictures show of a volume or crop: of several channels the first."""
        return array[(0,) * len(self.leading)]

    @property
    def label_names(self) -> dict[int, str]:
        """Value in the label volumes -> name; 0 is background."""
        return {int(value): name for value, name in self.header["label_names"].items()}

    @cached_property
    def images(self) -> pd.DataFrame:
        """One row per image: key, shape, spacing, affine, bytes, hu, labels, source_shape, source_spacing."""
        import pandas as pd

        columns = ["key", "shape", "spacing", "affine", "bytes", "hu", "labels"]
        return pd.DataFrame(list(self.rows), columns=[*columns, "source_shape", "source_spacing", "notes"])

    @property
    def _case_rows(self) -> Sequence[CaseRow]:
        return index.read_lines(self.path, self.header, "cases")

    @cached_property
    def cases(self) -> pd.DataFrame:
        """One row per case, by key: patient, image (position), split, fold, labels, center_mm (RAS), …"""
        import pandas as pd

        columns = ["patient", "image", "split", "fold", "labels", "center_mm", "box_mm", "diameter_mm"]
        return pd.DataFrame(list(self._case_rows), columns=["key", *columns]).set_index("key").astype(object)

    def key_of(self, case: Case | str) -> str:
        """The key of a manifest's case (or case id) in `cases`. Needs the salt the store was built with."""
        key = salt()
        check_salt(key, self.header, self.path)
        found = hashed(key, "case", case if isinstance(case, str) else case.id)
        if found not in self.cases.index:
            raise DataError(
                "the case is not in the store",
                path=self.path,
                found=f"no row for key {found[:8]}…",
                fix="see failures.csv; build the store again after the manifest changed",
            )
        return found

    # ---- volumes

    def verify(self, progress: bool = False) -> list[str]:
        """Files whose content is no longer what was written (a failing disk). Reads every volume."""
        damaged = []
        for row in tqdm(self.rows, desc=f"verify {self.path.name}", unit="image", disable=not progress):
            for part in index.parts(row):
                try:
                    content = hashlib.sha256(self._handle(part)[:].tobytes()).hexdigest()
                except (DataError, RuntimeError):
                    content = ""
                if content != part["array"]:
                    damaged.append(part["file"])
        return damaged

    def affine(self, image: int) -> np.ndarray:
        """(4, 4) voxel index -> RAS mm."""
        return np.array(self.rows[image]["affine"])

    def shape(self, image: int) -> tuple[int, int, int]:
        x, y, z = self.rows[image]["shape"]
        return x, y, z

    def body(self, image: int) -> np.ndarray:
        """Share of body, 0 to 1, in every 32³ block, without opening the volume."""
        row = self.rows[image]
        blocks = [-(-n // BLOCK) for n in row["shape"]]
        return np.frombuffer(base64.b64decode(row["body"]), np.uint8).reshape(blocks) / 255

    def array(self, image: int) -> blosc2.NDArray:
        """Handle on the int16 volume, (X, Y, Z) or (C, X, Y, Z); slicing it reads and decompresses only those blocks."""
        return self._handle(self.rows[image], 2 * image)

    def volume(self, image: int) -> Volume:
        """The scan as it is stored, with its place in space, for who looks at it."""
        modality = "MG" if "grey" in self.header["settings"] else self.modality
        return Volume(self.array(image)[:], self.affine(image), modality)

    def body_mask(self, image: int) -> np.ndarray:
        """(X, Y, Z) bool: where the body is, of a mammogram the breast."""
        volume = self.volume(image)
        return FIND[volume.modality](volume.array, tuple(three(self.spacing).tolist())).whole(volume.shape)

    def labels(self, image: int) -> blosc2.NDArray | None:
        """Handle on the (X, Y, Z) uint8 label volume, or None where the image has none."""
        labels = self.rows[image]["labels"]
        return None if labels is None else self._handle(labels, 2 * image + 1)

    def _handle(self, row: FileRow, number: int | None = None) -> blosc2.NDArray:
        import blosc2

        if self._process != os.getpid():  # a forked worker opens its own handles
            self._open, self._process = OrderedDict(), os.getpid()
        file = row["file"]
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        path = self.path / file
        try:
            if path.stat().st_size != row["bytes"]:
                raise RuntimeError(f"{path.stat().st_size} bytes where {row['bytes']} were written")
            self._compare(path, row, number)
            # mmap: no open, seek and read calls per block (2% faster), and pages are shared by workers
            handle = blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))
        except (OSError, RuntimeError) as error:
            raise DataError(
                "a stored volume is missing or damaged",
                path=path,
                found=error,
                fix="delete it if it is there and build the store again",
            ) from error
        self._open[file] = handle
        if len(self._open) > OPEN_FILES:
            self._open.popitem(last=False)
        return handle

    def _compare(self, path: Path, row: FileRow, number: int | None) -> None:
        """Read a file whole and compare its checksum: once, whichever of this process and its workers opens it first.

        2.4 ms for a volume of 6 MB, more than half of what two views take to read: too much for every opening.
        """
        if "crc32" not in row or (number is not None and self._compared[number]):  # none: of an older version
            return
        if zlib.crc32(path.read_bytes()) != row["crc32"]:
            raise RuntimeError("another content than was written")
        if number is not None:
            self._compared[number] = 1
