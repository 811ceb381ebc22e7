"""Which files the images, masks and outlines of a cohort are, below the root of its data; found once for all.

A DICOM series is found by content. Of folders that hold several images of the manifest every image has its own
files, so that damage or change of one leaves the rest.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from smartlab.core.errors import DataError
from smartlab.data.cohort.case import Case, below, uid_in
from smartlab.data.cohort.manifest import ImageGroup, Manifest
from smartlab.data.images.readers import Volume, files_of, read_labels


@dataclass(frozen=True)
class LabelSource:
    """A file with labels: a binary mask that stands for `value`, or a label map (value None).

    `series` and `roi` choose a DICOM SEG or RTSTRUCT and a structure in it."""

    path: Path
    value: int | None = None
    series: str | None = None
    roi: str | None = None

    def read(self, volume: Volume) -> Volume:
        """The labels on the voxels of the scan they were drawn on."""
        if self.series is None:
            return read_labels(self.path, binary=self.value is not None, on=volume)
        from smartlab.data.images.dicom_masks import read_mask

        return read_mask(self.path, volume, self.roi, series=self.series)


def values_in(labels: Volume, known: dict[int, str] | tuple[int, ...]) -> list[int]:
    """The values of a label map, background left out; one that the manifest does not name is refused."""
    values = [int(v) for v in np.unique(labels.array) if v != 0]
    if unknown := sorted(set(values) - set(known)):
        raise DataError(
            "the label map holds values the manifest does not name",
            path=labels.source,
            found=unknown[:10],
            expected=f"0 and the {len(known)} values of `organs`",
            fix="name them under `organs` in the manifest",
        )
    return values


class Files:
    """The files of a manifest below `root`. `values` are those of the masks by name, 1 where not given."""

    def __init__(self, man: Manifest, root: Path, values: dict[str, int] | None = None) -> None:
        self.root, self.rois, self.values = root, man.segments, values or {}
        self.series = self._find_series(man)
        self.mixed = self._mixed(man)

    def image(self, group: ImageGroup) -> tuple[Path, str | None, tuple[Path, ...] | None]:
        """File or folder of an image; of a folder the series in it, and its files where it shares the folder."""
        first = group.cases[0]
        path = self._folder_of(first.series_uid) if _by_series(first) else first.locate(self.root)
        series = first.series_uid if path.is_dir() else None
        found = self.mixed.get(path, {})
        if series not in found:
            return path, series, None
        return path, series, tuple(sorted((*found[series], *found.get("", ()))))  # "": damaged, perhaps of it

    def channels(self, group: ImageGroup) -> tuple[Path, ...]:
        """The images beside the first one, where there are several on one grid."""
        return tuple(below(self.root, place) for place in list(group.cases[0].channels.values())[1:])

    def labels(self, group: ImageGroup) -> Iterator[LabelSource]:
        """The label maps and masks of an image."""
        masks = dict.fromkeys((name, place) for c in group.cases for name, place in c.masks.items())
        for place in dict.fromkeys(c.label_map for c in group.cases if c.label_map):
            yield LabelSource(self._below(place))
        for name, place in masks:
            value, uid = self.values.get(name, 1), uid_in(place)
            if uid is None:
                yield LabelSource(self._below(place), value)
                continue
            # which structure of a SEG or RTSTRUCT: as the manifest says, else the one of this name,
            # else (one mask, one structure) whatever it is called
            several = sum(other == place for _, other in masks) > 1
            folder = self._folder_of(uid)
            own = self.mixed.get(folder, {}).get(uid, ())
            path = own[0] if len(own) == 1 else folder
            yield LabelSource(path, value, uid, self.rois.get(name, name if several else None))

    def outline(self, case: Case) -> tuple[Path, ...]:
        """The files that may hold the outline of a lesion of a mammogram, from wherever the manifest puts them.

        A series that is missing is left out: who reads them sets aside the case, not the image.
        """
        files: list[Path] = []
        for place in case.masks.values():
            if (uid := uid_in(place)) is None:
                files += [self._below(place)]
            elif uid in self.series:
                folder = self.series[uid]
                files += self.mixed.get(folder, {}).get(uid) or files_of(folder)
        return tuple(sorted(files))

    def _below(self, place: str) -> Path:
        try:
            return below(self.root, place)
        except DataError:
            raise DataError(
                "not found: a mask or label map is missing below the data root",
                path=place,
                fix="fetch it, or build with labels=False",
            ) from None

    def _folder_of(self, uid: str | None) -> Path:
        if uid is not None and uid in self.series:
            return self.series[uid]
        fix = "run `smartlab data fetch`, or check the data root"
        raise DataError(f"series {uid} is not below this folder", path=self.root, fix=fix)

    def _find_series(self, man: Manifest) -> dict[str, Path]:
        """Folder of every series the manifest names."""
        wanted = {case.series_uid or "" for case in man.cases if _by_series(case)}
        wanted |= {uid for case in man.cases for place in case.masks.values() if (uid := uid_in(place))}
        found = {uid: self.root / uid for uid in wanted if (self.root / uid).is_dir()}
        from smartlab.data.images.dicom_headers import index_series

        for thorough in (False, True):  # one header per folder; every header only when that misses some
            if wanted - found.keys():
                found = index_series(self.root, thorough) | found
        return found

    def _mixed(self, man: Manifest) -> dict[Path, dict[str, tuple[Path, ...]]]:
        """Folders that hold several images of the manifest -> the files of every series there."""
        named = {case.series_uid: case for case in man.cases if case.series_uid}
        places = [
            self.series.get(uid) if _by_series(case) else self.root / (case.image or "")
            for uid, case in named.items()
        ]
        if man.modality == "MG":  # outlines are single images as well
            places += [folder for uid, folder in self.series.items() if uid not in named]
        folders = [place for place in places if place is not None and place.is_dir()]
        images = Counter(above for place in folders for above in (place, *place.parents))
        from smartlab.data.images.dicom_headers import series_files

        return {folder: series_files(folder) for folder in {*folders} if images[folder] > 1}


def _by_series(case: Case) -> bool:
    return case.image is None and case.series_uid is not None
