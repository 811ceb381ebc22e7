"""Which files below a folder are scans, which masks, which are channels of one patient, and which are there twice.

Names say which volumes are masks and channels; what is left out goes to the report, with the reason.
"""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from smartlab.data.cohort.scan_files import MAMMOGRAM, PICTURE, SERIES, Contents, Found
from smartlab.data.cohort.scan_masks import grids_apart
from smartlab.data.cohort.scan_names import fits_path, is_named_like_a_mask, stem
from smartlab.data.cohort.scan_report import ScanReport
from smartlab.data.images.readers import files_of


def scans_and_masks(
    contents: Contents, pattern: str | None, modality: str | None
) -> tuple[list[Found], list[Found]]:
    """Scans, and masks by their names (or by `pattern`)."""
    scans: list[Found] = []
    masks = [one for one in contents.found if one.grid is None]  # SEG and RTSTRUCT
    files = [one for one in contents.found if one.grid is not None]
    shared = os.path.commonpath([os.path.dirname(one.path) for one in files]) if files else ""
    above = len(PurePosixPath(shared).parts)  # a folder that holds everything says nothing of a file
    for one in files:
        could_be = one.kind not in (SERIES, MAMMOGRAM)
        usual = could_be and is_named_like_a_mask(PurePosixPath(one.path).parts[above:])
        if (fits_path(pattern, one.path) and could_be) if pattern else usual:
            masks.append(one)
        elif usual:
            contents.left.append((one.path, "named like a mask, and --masks asks for others"))
        elif (
            could_be
            and modality != "MR"
            and one.kind != PICTURE
            and one.grid
            and one.grid.array.itemsize == 1
        ):
            why = "8-bit values are no Hounsfield units; if it is a mask, name it *_mask or give --masks PATTERN"
            contents.left.append((one.path, why))
        else:
            scans.append(one)
    return scans, masks


def by_channel(scans: list[Found], channels: Sequence[str], report: ScanReport) -> dict[str, dict[str, str]]:
    """By the path of the first channel, the paths of all: files of one name but for `_0000`, `_0001`, or `_t1`, `_t2`."""
    groups: dict[str, dict[str, Found]] = defaultdict(dict)
    for one in scans:
        place = PurePosixPath(one.path).with_name(stem(one.path)).as_posix()
        for number, name in enumerate(channels):
            if end := next(
                (e for e in (f"_{number:04d}", f"_{name}") if place.lower().endswith(e.lower())), None
            ):
                kept = groups[place[: -len(end)]].setdefault(name, one)
                if kept is not one:
                    report.left.append((one.path, f"a second {name} of one patient, beside {kept.path}"))
                break
        else:
            report.left.append(
                (one.path, f"no channel: its name ends neither in _0000, … nor in _{channels[0]}, …")
            )
    joined = {}
    for place, found in groups.items():
        first = found.get(channels[0])
        lacking = [name for name in channels if name not in found]
        apart = (
            {} if first is None else {n: why for n, one in found.items() if (why := grids_apart(one, first))}
        )
        if first is None or lacking or apart:
            why = (
                f"{place} has no {lacking[0]}"
                if lacking
                else "; ".join(f"{n}: {w}" for n, w in apart.items())
            )
            report.left += [(one.path, why) for one in found.values()]
        else:
            first.name = f"{place}.nii"
            joined[first.path] = {name: found[name].path for name in channels}
    return joined


def one_modality(scans: list[Found], report: ScanReport, wanted: str | None) -> tuple[Any, list[Found]]:
    """CT, unless MR is asked for or all series are MR, or there are only mammograms: a manifest has one modality."""
    flat = [one for one in scans if one.kind in (MAMMOGRAM, PICTURE)]
    volumes = [one for one in scans if one.kind not in (MAMMOGRAM, PICTURE)]
    if not volumes:
        return "MG", flat
    reasons = {
        MAMMOGRAM: "a mammogram among CT: a manifest holds one of them, scan its folder by itself",
        PICTURE: "a picture, not a scan",
    }
    report.left += [(one.path, reasons[one.kind]) for one in flat]
    stated = [
        one.grid.modality if one.kind == SERIES and one.grid else "" for one in volumes
    ]  # files do not say it
    chosen = wanted or ("MR" if {*stated} == {"MR"} else "CT")
    others = [(one, kind) for one, kind in zip(volumes, stated, strict=True) if kind not in ("", chosen)]
    report.left += [
        (o.path, f"{kind} among {chosen}: for these, scan with --modality {kind}") for o, kind in others
    ]
    return chosen, [one for one, kind in zip(volumes, stated, strict=True) if kind in ("", chosen)]


def without_copies(scans: list[Found], report: ScanReport) -> list[Found]:
    """Scans without those that are the same file again: under two names they would be two patients."""
    seen: dict[tuple[int, bytes], str] = {}
    kept = []
    for one in scans:
        file = report.root / one.path
        first = seen.setdefault(_sample(file), one.path) if one.uid is None else one.path
        if first == one.path:
            kept.append(one)
        else:
            report.left.append((one.path, f"the same image as {first}"))
    return kept


def _sample(file: Path) -> tuple[int, bytes]:
    """Size and the middle of the voxel data: alike for copies only."""
    file = files_of(file)[-1]  # the data beside a header
    size = file.stat().st_size
    with file.open("rb") as stream:
        stream.seek(max(0, size // 2 - 32768))
        return size, stream.read(65536)
