"""One row of a dataset: a scan or a lesion of it, its labels, and where its files are.

All positions are millimetres. `Lesion.frame` says in which frame:

- "world": RAS world coordinates, as `Volume.affine` gives.
- "image": for annotations made on pixels without the DICOM headers at hand (LIDC, mammograms):
  in-plane mm from the centre of the first pixel (column × spacing, row × spacing), then the
  DICOM z of the slice (0 for a single image). `Lesion.world(volume)` resolves it on the scan.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, field_validator, model_validator

from smartlab.core.errors import DataError

if TYPE_CHECKING:
    from smartlab.data.images.readers import Volume

LabelValue = int | float | str | list[str] | list[float] | None
UID = re.compile(r"^[0-9]+(\.[0-9]+)+$")


class Lesion(BaseModel, extra="forbid", allow_inf_nan=False):
    """Where to look in the image: centre and full extent, mm."""

    center_mm: tuple[float, float, float]
    box_mm: tuple[float, float, float] | None = None
    diameter_mm: float | None = None
    frame: Literal["world", "image"] = "world"

    def world(self, volume: Volume, name: str = "the lesion") -> np.ndarray:
        """Centre in RAS world mm on this scan, (3,); refused where it lies outside."""
        flat = self.frame == "image"
        world = volume.from_image_frame(self.center_mm) if flat else np.asarray(self.center_mm, float)
        index = volume.to_index(world)
        beyond = np.maximum(np.maximum(-0.5 - index, index + 0.5 - volume.shape), 0)
        if beyond.any():
            raise DataError(
                f"{name} lies outside the image",
                found=f"a centre {(beyond * volume.spacing).max():.0f} mm beyond its border",
                fix="check the centre and its frame in the manifest",
            )
        return world


class LabelSpec(BaseModel, extra="forbid"):
    """What a label means. `kind` decides how it is checked and how evaluation treats it."""

    kind: Literal["binary", "multiclass", "multilabel", "number", "numbers", "time", "event", "text"]
    classes: list[str] = []
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    description: str = ""

    def problem(self, value: LabelValue) -> str | None:
        """Why this value is not one of ours, or None."""
        if value is None or self.kind == "text":
            return None
        if self.kind in ("binary", "multiclass", "multilabel"):
            values = value if isinstance(value, list) else [value]
            unknown = [v for v in values if self.classes and v not in self.classes]
            return f"{unknown[0]!r} is not one of {self.classes}" if unknown else None
        values = value if isinstance(value, list) else [value]
        for v in values:
            if isinstance(v, str) or not np.isfinite(v):
                return f"{v!r} is not a number"
            low, high = self.minimum, self.maximum
            if (low is not None and v < low) or (high is not None and v > high):
                return f"{v} is outside {low} to {high}"
        return None

    def covering(self, found: list[LabelValue]) -> LabelSpec:
        """The same where its classes are those found, else with these: folders are named as their owner likes."""
        names = sorted(set(map(str, found)), key=natural)
        if set(names) <= set(self.classes):
            return self
        kind = "binary" if len(names) <= 2 else "multiclass"
        return LabelSpec(kind=kind, classes=names, description="the name of the folder")


def natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key under which "Nodule 2" comes before "Nodule 10"."""
    parts = re.split(r"([0-9]+)", name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]


class Case(BaseModel, extra="forbid"):
    """One row: a scan, or one lesion of a scan (several cases may share an image)."""

    id: str
    patient: str
    image: str | None = None  # path below the root: a file or a DICOM folder
    channels: dict[
        str, str
    ] = {}  # name -> path, where a patient has several images on one grid; the first is `image`
    series_uid: str | None = None  # DICOM SeriesInstanceUID, found by content below the root
    labels: dict[str, LabelValue] = {}
    masks: dict[str, str] = {}  # name -> path of a binary mask, or "series:<UID>" (SEG, RTSTRUCT)
    label_map: str | None = None  # path of an integer label image; names in Manifest.organs
    lesion: Lesion | None = None
    split: Literal["train", "val", "test"] | None = None
    fold: int | None = None
    sha256: str | None = None  # of the image file
    excluded: str | None = None  # why this case is left out by default

    @property
    def image_key(self) -> str:
        """What identifies the image: cases with the same key share one stored volume."""
        return self.series_uid or self.image or self.id

    @model_validator(mode="after")
    def _channels_inside(self) -> Case:
        if not self.channels:
            return self
        for path in self.channels.values():
            safe_path(path)
        first = next(iter(self.channels.values()))
        if self.image not in (None, first) or self.series_uid:
            raise ValueError(
                f"case {self.id!r}: `channels` name all images, the first is {first!r}; leave `image` out"
            )
        self.image = first
        return self

    @field_validator("image", "label_map")
    @classmethod
    def _inside(cls, path: str | None) -> str | None:
        return path if path is None else safe_path(path)

    @field_validator("masks")
    @classmethod
    def _masks_inside(cls, masks: dict[str, str]) -> dict[str, str]:
        for path in masks.values():
            if (uid := uid_in(path)) is None:
                safe_path(path)
            elif not UID.match(uid):
                raise ValueError(f"{path!r} is not series:<UID>")
        return masks

    @field_validator("series_uid")
    @classmethod
    def _uid(cls, uid: str | None) -> str | None:
        if uid is not None and (not UID.match(uid) or len(uid) > 64):
            raise ValueError(f"{uid!r} is not a DICOM UID")
        return uid

    def locate(self, root: str | Path) -> Path:
        """The image of this case below `root`: a file, or the folder that holds the series."""
        root = Path(root)
        if self.image is not None:
            return below(root, self.image)
        if self.series_uid is None:
            raise DataError("has neither an image path nor a series UID", path=f"case {self.id}")
        folder = root / self.series_uid
        if folder.is_dir():
            return folder
        from smartlab.data.images.dicom_headers import find_series

        return find_series(root, self.series_uid)


def uid_in(place: str) -> str | None:
    """The UID where a mask is a DICOM series, found by content; None where it is a file."""
    return place.removeprefix("series:") if place.startswith("series:") else None


def below(root: str | Path, place: str) -> Path:
    """`root/place`, refused when it is not there, or when a symbolic link leads out of the root."""
    path = Path(root) / place
    if not path.resolve().is_relative_to(Path(root).resolve()):
        raise DataError(
            "leads out of the data root through a link", path=path, fix=f"keep the images below {root}"
        )
    if not path.exists():
        raise DataError("image not found", path=path, fix="check `data.root`, or run `smartlab data fetch`")
    return path


def safe_path(path: str) -> str:
    """A relative path that stays below the root; anything else is refused."""
    if not PurePosixPath(path).parts or leaves(path):
        raise ValueError(f"path {path!r} must be relative and stay below the data root")
    return path


def leaves(path: str) -> bool:
    """Whether a path could lead out of its folder, on any system."""
    pure = PurePosixPath(path)
    strange = "\\" in path or "\0" in path or bool(PureWindowsPath(path).drive)
    return strange or pure.is_absolute() or ".." in pure.parts
