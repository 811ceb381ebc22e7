"""One format for every dataset: what it is, under which licence, and its cases.

A manifest is a JSON file (`<name>.json`); a long list of cases sits beside it as CSV
(`cases_file`). Everything in it is checked on loading: unknown keys, duplicate case ids, paths
that leave the root, patients that appear in two splits or two folds.

All positions are millimetres. `Lesion.frame` says in which frame:

- "world": RAS world coordinates, as `Volume.affine` gives.
- "image": for annotations made on pixels without the DICOM headers at hand (LIDC): in-plane mm
  from the centre of the first pixel (column × spacing, row × spacing) and the DICOM z of the
  slice, for an untilted axial series. `Lesion.world(volume)` resolves it on the scan itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    import pandas as pd

    from smartlab.data.readers import Volume

LabelValue = int | float | str | list[str] | None


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Lesion(_Strict):
    """Where to look in the image: centre and extent, mm."""

    center_mm: tuple[float, float, float]
    box_mm: tuple[float, float, float] | None = None  # full extent along the three axes
    diameter_mm: float | None = None
    frame: Literal["world", "image"] = "world"

    def world(self, volume: Volume) -> np.ndarray:
        """Centre in RAS world mm on this scan, (3,)."""
        if self.frame == "world":
            return np.asarray(self.center_mm, float)
        dx, dy, z = self.center_mm
        # An axial series without tilt starts at the patient's right-front corner: in RAS that is
        # the last index along i is left of it ... resolved by the two largest in-plane corners.
        nx, ny, _ = volume.shape
        corner = volume.to_world(np.array([nx - 1, ny - 1, 0]))
        raise NotImplementedError(corner, dx, dy, z)


class LabelSpec(_Strict):
    """What a label means. `kind` decides how evaluation treats it."""

    kind: Literal["binary", "multiclass", "multilabel", "number", "time", "event", "text"]
    classes: list[str] = []
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    description: str = ""


class Source(_Strict):
    """Where the images come from and how to get them."""

    kind: Literal["idc", "msd", "url", "phantom", "local"]
    location: str = ""  # collection, MSD task, phantom kind
    files: list[dict[str, Any]] = []  # for "url": {"url", "name", "md5"|"sha256", "size_mb"}
    size_gb: float | None = None
    parameters: dict[str, Any] = {}  # for "phantom": n, seed, shape …
    notes: str = ""  # accounts, registrations, clinical tables: where exactly


class Case(_Strict):
    """One row: a scan, or one lesion of a scan (several cases may share an image)."""

    id: str
    patient: str
    image: str | None = None  # path below the root, a file or a DICOM folder
    series_uid: str | None = None  # DICOM SeriesInstanceUID, found by content below the root
    labels: dict[str, LabelValue] = {}
    masks: dict[str, str] = {}  # name -> path of a binary mask, or "series:<UID>" for SEG/RTSTRUCT
    label_map: str | None = None  # path of an integer label image, names in Manifest.organs
    lesion: Lesion | None = None
    split: Literal["train", "val", "test"] | None = None
    fold: int | None = None
    sha256: str | None = None  # of the image file
    excluded: str | None = None  # why this case is left out by default

    @property
    def image_key(self) -> str:
        """What identifies the image: cases with the same key share one stored volume."""
        return self.series_uid or self.image or self.id


class Manifest(_Strict):
    """A dataset. `.cases` leaves out excluded cases; `.all_cases` does not."""

    schema_version: Literal[1] = 1
    name: str
    title: str
    modality: Literal["CT", "MG"]
    licence: str
    citation: str
    homepage: str
    source: Source
    description: str = ""
    labels: dict[str, LabelSpec] = {}
    organs: dict[int, str] = {}  # value in label maps -> name
    notes: list[str] = []
    cases_file: str | None = None
    all_cases: list[Case] = Field(default=[], alias="cases")
