"""A mammogram as the store takes it: a volume with a unit third axis, chest wall on the left.

Axis 0 runs down the rows, axis 1 along the columns. World coordinates are the image's own: mm from the
centre of the first pixel of the file, along columns (x) and rows (y). A breast whose chest wall is on the
right is mirrored; its affine says so, so that positions stay those of the file.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from smartlab.core.errors import DataError
from smartlab.data.cohort.cbis import find_outline
from smartlab.data.images import body as bodies
from smartlab.data.images.grey import COARSE_MM, find_breast, wall_on_right
from smartlab.data.images.mammography import Mammogram, only, read_mammogram
from smartlab.data.images.mr import find_tissue
from smartlab.data.images.readers import Volume

if TYPE_CHECKING:
    from smartlab.data.store.request import Job

_COARSE = 400  # rows on which the chest wall is looked for
_APART_MM = 3.0  # by which a lesion's stated centre may lie beyond its outline


def read(job: Job) -> Volume:
    """The mammogram of a job, int16 0 to 4095, (rows, columns, 1)."""
    path = only(job.path, job.sources[job.path])
    settings: Any = job.settings
    image, pixel_mm = read_mammogram(path, settings.grey), settings.pixel_mm
    notes, spacing = [], image.spacing_mm
    if np.isnan(spacing).any():
        if pixel_mm is None:
            raise DataError(
                "gives no pixel spacing",
                path=path,
                fix="say the size of a pixel as `pixel_mm` under source.parameters in the manifest",
            )
        spacing = (float(pixel_mm), float(pixel_mm))
        notes.append(f"{pixel_mm:g} mm per pixel taken from the manifest")
    volume = as_volume(image, spacing, settings.spacing)
    return replace(volume, source=str(job.path), notes=(*notes, *volume.notes))


def as_volume(image: Mammogram, spacing: tuple[float, float], thickness: float) -> Volume:
    """A mammogram as a volume one voxel of `thickness` mm thick, chest wall on the left."""
    notes, array = list(image.notes), image.array.astype(np.int16)
    rows, columns = array.shape
    along = np.array([[0, spacing[1], 0, 0], [spacing[0], 0, 0, 0], [0, 0, thickness, 0], [0, 0, 0, 1]])
    mirrored = wall_on_right(find_breast(array, max(1, rows // _COARSE)))
    if mirrored:
        array, notes = array[:, ::-1], [*notes, "mirrored: the chest wall was on the right"]
        along[0, 1], along[0, 3] = -spacing[1], (columns - 1) * spacing[1]
    if image.laterality and (image.laterality == "R") != mirrored:
        notes.append(f"the header says {image.laterality}, the chest wall is on the other side")
    stored = np.diag([spacing[1], spacing[0], thickness, 1.0])
    array = np.ascontiguousarray(array)[:, :, None]
    return Volume(array, along, "MG", "", tuple(notes), stored)


def find_body(array: np.ndarray, spacing: tuple[float, ...]) -> bodies.Body:
    """The breast, as `body.find_body` finds the body in a CT."""
    return find_breast(array[:, :, 0], max(1, round(COARSE_MM / spacing[0])))


# how the body is found, by modality
FIND: dict[str, Callable[..., bodies.Body]] = {"CT": bodies.find_body, "MG": find_body, "MR": find_tissue}


@dataclass
class Outlines:
    """What the outlines of an image say, by case."""

    masks: list[tuple[int, np.ndarray]] = field(default_factory=list)  # value, (rows, columns, 1)
    centers: dict[str, list[float]] = field(default_factory=dict)  # of cases the manifest gives none
    boxes: dict[str, list[float]] = field(default_factory=dict)  # the same, mm along x, y, 0
    faults: dict[str, Exception] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def outlines(job: Job, volume: Volume, lesions: dict[str, Any]) -> Outlines:
    """Read the outline of every lesion; one that cannot be used costs its own case only."""
    found = Outlines()
    for number, one in enumerate(job.outlines, 1):
        try:
            mirrored = volume.affine[0, 1] < 0
            image = volume.array[:, ::-1, 0] if mirrored else volume.array[:, :, 0]  # as in the file
            mask, notes = find_outline(one.files, image)
            found.notes += [f"outline {number}: {note}" for note in notes]
            if mirrored:
                mask = mask[:, ::-1]
            index = np.argwhere(mask)
            low, high = index.min(axis=0), index.max(axis=0)
            center = volume.to_world(np.array([*((low + high) / 2), 0]))
            size = (high - low + 1) * volume.spacing[:2]
            box = [float(size[1]), float(size[0]), 0.0]
            stated = lesions.get(one.case)
            if isinstance(stated, list):
                _agree(np.array(stated), center, np.array(box))
            elif stated is None:
                found.centers[one.case] = [round(float(v), 4) for v in center]
                found.boxes[one.case] = [round(v, 4) for v in box]
            found.masks.append((one.value, np.ascontiguousarray(mask)[:, :, None]))
        except Exception as error:  # whatever one outline is, the other lesions of the image go on
            found.faults[one.case] = error
    return found


def _agree(stated: np.ndarray, center: np.ndarray, box: np.ndarray) -> None:
    beyond = np.abs(stated - center)[:2] - box[:2] / 2
    if (beyond > _APART_MM).any():
        raise DataError(
            "the outline lies elsewhere than the lesion",
            found=f"the lesion's centre {beyond.max():.1f} mm beyond its outline",
            expected=f"at most {_APART_MM:g} mm",
            fix="check the centre and the mask in the manifest",
        )
