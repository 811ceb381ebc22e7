"""What the index of a store says of an image and of a case: a line of JSON each, and its types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NotRequired, TypedDict

from smartlab.data.cohort.case import LabelValue


class FileRow(TypedDict):
    """A volume in a file of its own, below the store."""

    file: str
    bytes: int
    crc32: NotRequired[int]  # of the file; older versions wrote none
    array: str  # SHA-256 of its voxels


class LabelRow(FileRow):
    """The labels of an image."""

    voxels: dict[str, int]  # value -> how many voxels have it


class ImageRow(FileRow):
    """An image: where and what it is, and what it was made from."""

    key: str
    shape: list[int]
    spacing: list[float]
    affine: list[list[float]]  # voxel index -> RAS mm
    hu: dict[str, int]  # extremes and percentiles
    body: str  # share of body in every block, base64
    body_found: bool
    lesions: dict[str, list[float] | str]  # case key -> centre in RAS mm, or why it has none
    # case key -> box in mm, measured on the outline of a mammogram's lesion
    boxes: NotRequired[dict[str, list[float]]]
    scale: NotRequired[Sequence[Sequence[float]]]  # of MR, by channel: the values that became 0 and 4095
    labels: LabelRow | None
    source_shape: list[int]
    source_spacing: list[float]
    notes: list[str]
    content: str  # hash of the sources
    request: str  # of what was asked for
    stat: str  # of names, sizes and times of the sources


class CaseRow(TypedDict):
    """A case of an image: `image` is its position among the images."""

    key: str
    patient: str
    image: int
    split: str | None
    fold: int | None
    labels: dict[str, LabelValue]
    center_mm: list[float] | str | None
    box_mm: list[float] | tuple[float, ...] | None
    diameter_mm: float | None
