"""Which mask is of which scan, by name and grid or by DICOM reference; and which files are label maps."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path, PurePosixPath

import numpy as np

from smartlab.core.errors import DataError, some
from smartlab.data.cohort.scan_files import CONTOURS, SEGMENTATION, Found, frames_apart
from smartlab.data.cohort.scan_names import (
    MASK_WORD,
    UNNAMED,
    fits,
    fits_path,
    folder_of,
    key_of,
    slug,
    stem,
    words_of,
)
from smartlab.data.images.readers import check_same_grid, read_labels


class Pairs:
    """The masks of every scan. Scans are known by identity, as several may share a folder.

    `left` are (path, reason) of masks that belong to none; `segments` says which structures of a SEG or
    RTSTRUCT a mask's name stands for; `maps` are label maps, `organs` the names of their values.
    """

    def __init__(self, scans: list[Found], masks: list[Found], pattern: str | None, root: Path) -> None:
        self.pattern = pattern
        self.by_key: dict[tuple[bool, tuple[str, ...]], list[Found]] = defaultdict(list)
        self.by_folder: dict[str, list[Found]] = defaultdict(list)
        for one in scans:
            for bare in (False, True):
                self.by_key[bare, key_of(one.name, bare)].append(one)
            self.by_folder[folder_of(one.path)].append(one)
        self.series = {one.uid: one for one in scans if one.uid}
        self.masks: dict[int, dict[str, list[Found]]] = {id(one): defaultdict(list) for one in scans}
        self.segments: dict[str, str] = {}
        self.maps: dict[int, str] = {}
        self.organs: dict[int, str] = {}
        self.left: list[tuple[str, str]] = []
        for mask in masks:
            by_reference = mask.kind in (SEGMENTATION, CONTOURS)
            if why := (self._refer if by_reference else self._match)(mask):
                self.left.append((mask.path, why))
        self._take_back_doubles()
        self._find_label_maps(root)

    def places(self, one: Found) -> dict[str, str]:
        """The masks of a scan as a manifest has them."""
        named = sorted(self.masks[id(one)].items())
        return {name: f"series:{m.uid}" if m.uid else m.path for name, (m, *_) in named}

    def _match(self, mask: Found) -> str:
        """Give a file to the scan whose name it continues and whose grid it shares; else why not."""
        for bare in (False, True):
            key = key_of(mask.path, bare)
            if near := next(
                (s for n in range(len(key), -1, -1) if (s := self.by_key.get((bare, key[:n])))), []
            ):
                break
        if not near and folder_of(mask.path) != ".":  # the one scan of the folder, whatever it is called
            alone = self.by_folder.get(folder_of(mask.path), [])
            near = alone if len(alone) == 1 else []
        if not near:
            return "a mask without a scan of its name"
        good = [one for one in near if not grids_apart(mask, one)]
        if not good:
            return f"not on the grid of {near[0].path}: {grids_apart(mask, near[0])}"
        if len(good) > 1:
            return f"a mask that fits {len(good)} scans: {some([one.path for one in good])}"
        start = key_of(good[0].name, bare)
        rest = key[len(start) :] if key[: len(start)] == start else words_of(stem(mask.path))
        name = "_".join(word for word in rest if not MASK_WORD.fullmatch(word)) or UNNAMED
        self.masks[id(good[0])][name].append(mask)
        return ""

    def _refer(self, mask: Found) -> str:
        """Give a SEG or RTSTRUCT to the series it was drawn on; else why not."""
        one = next((self.series[uid] for uid in mask.refers if uid in self.series), None)
        if one is None or one.grid is None:
            return f"{mask.kind} of a series that is not among the scans"
        if mask.frames is not None and (why := frames_apart(mask.frames, one.grid)):
            return why
        name, shown = UNNAMED, ", ".join(sorted(mask.structures)) or "none"
        if self.pattern is not None and not fits_path(self.pattern, mask.path):
            if not fits(self.pattern, *mask.structures):
                return f"has no structure that --masks fits: {shown}"
            name = slug(self.pattern).replace("-", "_") or UNNAMED
            self.segments[name] = self.pattern
        elif len(mask.structures) != 1:
            return f"has {len(mask.structures)} structures, choose with --masks: {shown}"
        self.masks[id(one)][name].append(mask)
        return ""

    def _take_back_doubles(self) -> None:
        """Of two masks of one name on one scan, none is more right than the other."""
        for named in self.masks.values():
            for name in [name for name, found in named.items() if len(found) > 1]:
                paths = [mask.path for mask in named.pop(name)]
                why = f"{len(paths)} masks {name!r} for one scan: keep one, or name the structures"
                self.left += [(path, why) for path in paths]

    def _find_label_maps(self, root: Path) -> None:
        """Masks without a structure's name may be label maps: a look into one of them tells.

        The names of values come from a `dataset.json`, as nnU-Net and the Decathlon write it; without
        one, label maps are left out.
        """
        named = {scan: masks[UNNAMED][0] for scan, masks in self.masks.items() if UNNAMED in masks}
        files = {scan: m for scan, m in named.items() if m.uid is None and m.grid and m.grid.modality != "MG"}
        by_size = sorted(files.values(), key=lambda mask: (root / mask.path).stat().st_size)
        if not by_size:
            return
        typical = by_size[len(by_size) // 2].path  # the smallest may be empty
        try:
            values = [int(v) for v in np.unique(read_labels(root / typical).array) if v]
        except DataError:  # of this file verifying tells more
            return
        organs = _named_values(root, typical)
        if organs and set(values) <= organs.keys():
            self.organs, self.maps = organs, {scan: mask.path for scan, mask in files.items()}
        elif len(values) > 1:
            shown = some(values, 8)
            why = f"a label map ({typical} holds {shown}): say what its values are in a dataset.json above it"
            self.left += [(mask.path, why) for mask in files.values()]
        else:
            return
        for scan in files:
            del self.masks[scan][UNNAMED]


def _named_values(root: Path, place: str) -> dict[int, str]:
    """Value -> name by the nearest dataset.json above a label map; {} without one."""
    files = (root / folder / "dataset.json" for folder in PurePosixPath(place).parents)
    file = next(filter(Path.is_file, files), None)
    if file is None:
        return {}
    try:
        named = json.loads(file.read_text(encoding="utf-8-sig"))["labels"]
        pairs = [(k, v) if str(k).isdecimal() else (v, k) for k, v in named.items()]
        return {int(value): str(name) for value, name in pairs if int(value)}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            "does not name the values of label maps",
            path=file,
            found=f"{type(error).__name__}: {error}",
            expected='"labels": {"background": 0, "liver": 1}',
        ) from None


def grids_apart(mask: Found, one: Found) -> str:
    """How the grids of a mask, or another channel, and a scan differ, or ""."""
    assert mask.grid is not None and one.grid is not None
    try:
        check_same_grid(mask.path, mask.grid, one.grid)
    except DataError as error:
        return error.reason
    return ""
