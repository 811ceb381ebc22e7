"""From a manifest to jobs: which files, which labels, under which salted keys.

The only place where ids and paths of a cohort meet the keys they are stored under.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from smartlab.core.errors import DataError, SmartlabError, UseError
from smartlab.data.cohort.manifest import Case, ImageGroup, Manifest
from smartlab.data.cohort.privacy import hashed, scrub
from smartlab.data.store.request import Failure, FlatSettings, Job, LabelSource, Outline, Settings, files_of

OUTLINE = "lesion"  # name of the outline of a lesion among the masks of a mammogram's case


class Cohort:
    """The images of a manifest below a root, as jobs for `ingest`."""

    def __init__(
        self, man: Manifest, root: Path, out: Path, settings: Settings | FlatSettings, salt: bytes
    ) -> None:
        self.root, self.out, self.settings, self.salt = root, out, settings, salt
        self.groups = man.images()
        self.keys = [hashed(salt, "image", group.key) for group in self.groups]
        self.case_keys = {case.id: hashed(salt, "case", case.id) for case in man.cases}
        self.flat, self.phantom = man.modality == "MG", man.source.kind == "phantom"
        self.organs = tuple(sorted(man.organs))
        self.values = label_values(man) if settings.labels else {}
        self.rois: dict[str, str] = man.source.parameters.get("segments", {})
        self.series = self._find_series(man)
        self.files = self._mixed(man)

    def job(self, number: int) -> Job | Failure:
        """What to do for image `number`, or why it cannot be done."""
        group, key = self.groups[number], self.keys[number]
        words = identifying(group, self.root)
        try:
            first = group.cases[0]
            path = self._folder_of(first.series_uid) if _by_series(first) else first.locate(self.root)
            lesions = tuple((self.case_keys[c.id], c.lesion) for c in group.cases if c.lesion)
            series = first.series_uid if path.is_dir() else None
            stored = self.settings.labels and not self.flat
            labels = tuple(self._label_sources(group)) if stored else ()
            outlines = tuple(self._outlines(group)) if self.flat else ()
            files = self._own_files(path, series)
            return Job(
                key,
                path,
                series,
                self.out,
                self.settings,
                self.salt,
                files,
                lesions,
                labels,
                self.organs,
                words,
                outlines,
                self.phantom,
            )
        except (
            Exception
        ) as error:  # a link that leads to itself, a folder that may not be read: only this image's
            text = str(error) if isinstance(error, SmartlabError) else f"{type(error).__name__}: {error}"
            return Failure(key, None, scrub(text, words, instead="<image>"))

    def _own_files(self, folder: Path, series: str | None) -> tuple[Path, ...] | None:
        """The files of a series that shares its folder, and damaged ones that may be of it; else None."""
        found = self.files.get(folder, {})
        if series not in found:
            return None
        return tuple(sorted((*found[series], *found.get("", ()))))

    def _label_sources(self, group: ImageGroup) -> Iterator[LabelSource]:
        maps = dict.fromkeys(c.label_map for c in group.cases if c.label_map)
        masks = dict.fromkeys((name, place) for c in group.cases for name, place in c.masks.items())
        for place in maps:
            yield LabelSource(self._below(place))
        for name, place in masks:
            uid = place.removeprefix("series:")
            if uid == place:
                yield LabelSource(self._below(place), self.values[name])
                continue
            # which structure of a SEG or RTSTRUCT: as the manifest says, else the one of this name,
            # else (one mask, one structure) whatever it is called
            several = sum(other == place for _, other in masks) > 1
            roi = self.rois.get(name, name if several else None)
            folder = self._folder_of(uid)
            own = self.files.get(folder, {}).get(uid, ())
            yield LabelSource(own[0] if len(own) == 1 else folder, self.values[name], uid, roi)

    def _outlines(self, group: ImageGroup) -> Iterator[Outline]:
        """The files that may hold the outline of each lesion, from wherever the manifest puts them.

        A missing one is left to the worker, which sets aside the case, not the image.
        """
        for case in group.cases:
            files: list[Path] = []
            for place in case.masks.values():
                uid = place.removeprefix("series:")
                if uid == place:
                    files += [self._below(place)]
                elif uid in self.series:
                    folder = self.series[uid]
                    files += self.files.get(folder, {}).get(uid) or files_of(folder)
            if case.masks:
                yield Outline(self.case_keys[case.id], self.values.get(OUTLINE, 1), tuple(sorted(files)))

    def _below(self, place: str) -> Path:
        try:
            return Case(id="", patient="", image=place).locate(self.root)
        except DataError:
            raise DataError(
                "a mask or label map is missing below the data root",
                path=place,
                fix="fetch it, or build with labels=False",
            ) from None

    def _folder_of(self, uid: str | None) -> Path:
        if uid is not None and uid in self.series:
            return self.series[uid]
        raise DataError("the series is not below the data root", fix="run `smartlab data fetch`")

    def _find_series(self, man: Manifest) -> dict[str, Path]:
        """Folder of every series the manifest names, found once for the whole cohort."""
        wanted = {case.series_uid or "" for case in man.cases if _by_series(case)}
        places = {place for case in man.cases for place in case.masks.values()}
        wanted |= {place.removeprefix("series:") for place in places if place.startswith("series:")}
        found = {uid: self.root / uid for uid in wanted if (self.root / uid).is_dir()}
        from smartlab.data.images.dicom import index_series

        for thorough in (False, True):  # one header per folder; every header only when that misses some
            if wanted - found.keys():
                found = index_series(self.root, thorough) | found
        return found

    def _mixed(self, man: Manifest) -> dict[Path, dict[str, tuple[Path, ...]]]:
        """Folders that hold several images of the manifest -> the files of every series there.

        Each image is then read and watched by its own files: damage or change of one leaves the rest.
        """
        named = {case.series_uid: case for case in man.cases if case.series_uid}
        places = [
            self.series.get(uid) if _by_series(case) else self.root / (case.image or "")
            for uid, case in named.items()
        ]
        if self.flat:  # outlines are single images as well
            places += [folder for uid, folder in self.series.items() if uid not in named]
        folders = [place for place in places if place is not None and place.is_dir()]
        images = Counter(above for place in folders for above in (place, *place.parents))
        from smartlab.data.images.dicom import series_files

        return {folder: series_files(folder) for folder in {*folders} if images[folder] > 1}


def _by_series(case: Case) -> bool:
    return case.image is None and case.series_uid is not None


def label_values(man: Manifest) -> dict[str, int]:
    """Name -> value in the stored label volumes: the organs' own values, then masks by name."""
    if man.modality == "MG":  # whatever else a case names, such as a cut-out, is no label
        return {OUTLINE: 1} if any(case.masks for case in man.cases) else {}
    values = {name: value for value, name in man.organs.items()}
    names = sorted({name for case in man.cases for name in case.masks} - set(values))
    free = [v for v in range(1, 256) if v not in man.organs]
    if any(not 0 < v < 256 for v in man.organs) or len(names) > len(free):
        raise UseError(
            "label values do not fit one byte",
            path=f"manifest {man.name}",
            found=f"{len(values)} organs up to {max(values.values(), default=0)}, {len(names)} masks",
            expected="at most 255 structures with values 1 to 255",
            fix="split the manifest, or build with labels=False",
        )
    return values | dict(zip(names, free, strict=False))


def identifying(group: ImageGroup, root: Path) -> tuple[str, ...]:
    """What identifies the cases of an image, as it may turn up in an error."""
    words = {str(root), str(root.resolve()), os.path.expanduser("~")}
    for case in group.cases:
        given = [case.image, case.label_map, *case.masks.values()]
        places = [place.removeprefix("series:") for place in given if place]
        words |= {case.id, case.patient, case.series_uid or "", *places}
        words |= {part for place in places for part in Path(place).parts}
        words |= {str(root / place) for place in places}
    return tuple(sorted(words - {""}))
