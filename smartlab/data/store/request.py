"""What a worker is asked to store, and what comes of it.

A request is decided by the manifest and the settings alone; with the content of the sources it decides the
stored bytes. CT series and mammograms differ in their settings (`Settings`, `FlatSettings`) only.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from smartlab.core.errors import one_of
from smartlab.data.cohort.case import Lesion
from smartlab.data.cohort.files import LabelSource
from smartlab.data.cohort.privacy import hashed
from smartlab.data.images.readers import TILTS, files_of
from smartlab.data.store.rows import ImageRow

FORMAT = 1  # raise it when building would store other bytes
LABELS = 2  # the same of label volumes, which are then built again; 2: a later mask wins all it covers


@dataclass(frozen=True)
class Settings:
    """What decides the stored bytes, beside the source. `spacing`: mm, of all axes or three."""

    spacing: float | list[float] = 2.0
    crop_body: bool = True
    labels: bool = True
    tilt: str = "refuse"  # or "correct": what read_volume does with a gantry-tilted series
    format: int = FORMAT

    def __post_init__(self) -> None:
        one_of("unknown tilt setting", self.tilt, TILTS)


@dataclass(frozen=True)
class ChannelSettings(Settings):
    """The same of MR, and where a patient has several images on one grid; stores of CT know nothing of it."""

    modality: str = "CT"
    channels: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class FlatSettings:
    """The same for mammograms. `spacing` is mm per pixel, `grey` as in `read_mammogram`."""

    spacing: float = 0.2
    crop_body: bool = True  # here: to the breast
    labels: bool = True
    grey: str = "voi"
    pixel_mm: float | None = None  # taken where a file gives no spacing; from the manifest
    format: int = FORMAT

    def __post_init__(self) -> None:
        one_of("unknown grey setting", self.grey, ("voi", "percentile"))


@dataclass(frozen=True)
class Outline:
    """The files among which the outline of one lesion of a mammogram is, to be told by their content."""

    case: str  # its key
    value: int
    files: tuple[Path, ...]


@dataclass(frozen=True)
class Job:
    """Everything a worker needs for one image. Holds paths and the salt: it is never written or logged."""

    key: str
    path: Path
    series: str | None
    out: Path
    settings: Settings | FlatSettings
    salt: bytes = field(repr=False)
    files: tuple[Path, ...] | None = None  # of this series, where several share the folder `path`
    lesions: tuple[tuple[str, Lesion], ...] = ()  # (case key, lesion)
    labels: tuple[LabelSource, ...] = ()
    organs: tuple[int, ...] = ()  # values a label map may hold
    words: tuple[str, ...] = ()  # what identifies this case, for scrubbing
    outlines: tuple[Outline, ...] = ()  # mammograms only
    channels: tuple[Path, ...] = ()  # images on the grid of the first, `path`
    phantom: bool = False  # drawn here: written fast rather than small

    @property
    def sources(self) -> dict[Path, list[Path]]:
        """File or folder -> the files read from it."""
        image = {self.path: files_of(self.path) if self.files is None else list(self.files)}
        outlines = {file: [file] for one in self.outlines for file in one.files}
        image |= {path: files_of(path) for path in self.channels}
        return image | {source.path: files_of(source.path) for source in self.labels} | outlines

    @property
    def request(self) -> str:
        """Hash of what is asked for: with the content of the sources it decides the stored bytes."""
        lesions = [(case, lesion.model_dump()) for case, lesion in self.lesions]
        labels = [(source.value, source.series, source.roi) for source in self.labels]
        facts: list[Any] = [asdict(self.settings), self.series, lesions, labels, self.organs]
        facts += [(one.case, one.value) for one in self.outlines]
        facts += [LABELS] if self.labels else []
        return hashed(self.salt, "request", json.dumps(facts, sort_keys=True))

    @property
    def stat(self) -> str:
        """Hash of names, sizes and times: tells without reading whether a source may have changed."""
        facts = [
            (os.path.relpath(file, source), file.stat().st_size, file.stat().st_mtime_ns)
            for source, files in self.sources.items()
            for file in files
        ]
        return hashed(self.salt, "stat", json.dumps(facts))

    @property
    def content(self) -> str:
        """SHA-256 over the bytes of every source file, in order of name."""
        digest = hashlib.sha256()
        for file in chain(*self.sources.values()):
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()


@dataclass(frozen=True)
class Failure:
    """Why an image (case None) or a case is not in the store."""

    image: str
    case: str | None
    reason: str


@dataclass(frozen=True)
class Outcome:
    """What became of a job: its row, or none and a failure; both when only a lesion failed."""

    row: ImageRow | None
    failures: tuple[Failure, ...] = ()
    built: bool = False  # False for a row that was kept
    disk_full: bool = False
