"""From a folder of one's own to a manifest: what is there, what belongs together, and what is left out.

    man = sl.scan_folder("scans", labels="outcome.csv")     # smartlab data scan scans --labels outcome.csv

- What a file is, its header tells (`scan_files.py`); what of it is a scan, `scan_sort.py`; names only say which volumes are masks, which scan a
  mask is of, and which patient a scan shows where no DICOM header does.
- A mask belongs to the scan whose name it continues (`p01_liver_mask` to `p01`, `s1/segmentations/liver`
  to `s1/ct`), a SEG or RTSTRUCT to the series it refers to; either must lie on the scan's voxels.
- In doubt scans are taken as of one patient: too few patients are seen in the report, a leak never is.
- A file that cannot be used never stops the others: it is left out, with the reason, in the report. What is
  wrong with the table of labels is an error instead, all of it at once (`scan_table.py`).
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from smartlab.core.errors import DataError, UseError, one_of
from smartlab.core.places import KEYS
from smartlab.data.cohort.case import Case, natural
from smartlab.data.cohort.manifest import Manifest, Source, load_manifest
from smartlab.data.cohort.scan_files import PICTURE, SERIES, VOLUMES, Contents, Found, look_into
from smartlab.data.cohort.scan_masks import Pairs
from smartlab.data.cohort.scan_names import patients_by_name, slug, stem
from smartlab.data.cohort.scan_report import ScanReport, describe, take
from smartlab.data.cohort.scan_sort import by_channel, one_modality, scans_and_masks, without_copies
from smartlab.data.cohort.scan_table import join_table


def scan_folder(
    folder: str | Path,
    labels: str | Path | None = None,
    masks: str | None = None,
    *,
    modality: str | None = None,
    channels: Sequence[str] = (),
    out: str | Path | None = None,
    replace: bool = False,
    progress: bool = True,
) -> Manifest:
    """A manifest of everything usable below a folder; with `progress` it says what it found and left out.

    labels:   CSV with one row per scan or patient; see `scan_table.py` for what is read from it.
    masks:    pattern of the files ("*_lesion*") or structures ("GTV*") that are masks, where the usual names
              (`*_mask`, `*_seg`, `label*/`, …) are not used or name more than is wanted.
    modality: "CT" or "MR", where the files do not say it (only DICOM does); by default CT, unless all series are MR.
    channels: names of the images that each patient has on one grid, ("t1", "t2"): files that end in _0000, _0001, …
              as nnU-Net has them, or in _t1, _t2.
    out:      also write it there; images are then looked for in `folder`, the root to give.
    replace:  write over a manifest of other content.

    >>> man = sl.scan_folder("my/images", progress=False)
    >>> len(man.cases) > 0
    True
    """
    more: dict[str, Any] = {"modality": modality, "channels": channels, "out": out, "replace": replace}
    report = scan(folder, labels, masks, progress=progress, **more)
    if progress:
        print(report)
    return report.manifest


def scan(
    folder: str | Path,
    labels: str | Path | None = None,
    masks: str | None = None,
    *,
    modality: str | None = None,
    channels: Sequence[str] = (),
    out: str | Path | None = None,
    replace: bool = False,
    progress: bool = True,
) -> ScanReport:
    """`scan_folder` with its report."""
    root, out = Path(folder), None if out is None else Path(out)
    _check_request(root, labels, out)
    if modality is not None:
        one_of("unknown modality", modality, VOLUMES)
    if len({name.lower() for name in channels}) < len(channels):
        raise UseError("a channel is named twice", found=", ".join(channels))
    ignore = {root / "manifest.json", root / KEYS, *(Path(p) for p in (labels, out) if p)}
    ignore |= {root / path.resolve().relative_to(root.resolve()) for path in ignore if _below(path, root)}
    contents = look_into(root, ignore, progress)
    report = ScanReport(Manifest(name=slug(root.resolve().name) or "own-data"), root, left=contents.left)
    if not _stacks(report, contents):
        _volumes(report, contents, masks, modality, channels)
    if labels is not None:
        take(report, join_table(Path(labels), root, report.manifest.cases), Path(labels))
    _save(report, out, replace)
    return report


def _check_request(root: Path, labels: str | Path | None, out: Path | None) -> None:
    """What can be refused before anything is read."""
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "no such folder"
        raise UseError(problem, path=root, fix="give the folder that holds the scans")
    if labels is not None and not Path(labels).is_file():
        raise UseError("no such table of labels", path=labels, fix="give a CSV file as labels")
    if out is not None:
        if out.suffix != ".json" or out.is_dir():
            raise UseError(
                "the manifest is a .json file", path=out, fix=f"such as --out {out / 'manifest.json'}"
            )
        place = next(parent for parent in out.absolute().parents if parent.exists())
        if not place.is_dir() or not os.access(place, os.W_OK):
            raise UseError("cannot be written here", path=out, fix="give another place as --out")


# ---- what is there -------------------------------------------------------------------------------


def _stacks(report: ScanReport, contents: Contents) -> bool:
    """PNG stacks in folders CLASS/EXAM/NODULE, where there is nothing but pictures."""
    if {one.kind for one in contents.found} != {PICTURE}:
        return False
    numbered = [one for one in contents.found if stem(one.path).isdecimal()]
    if len(numbered) < len(contents.found):
        return False
    layout = {"stacks": "CLASS/EXAM/NODULE/k.png", "label": "class", "grey_hu": [-1000, 400]}
    base = dict(report.manifest) | {
        "source": Source(parameters={"layout": layout}),
        "labels": {"class": {"kind": "multiclass", "description": "the name of the folder"}},
    }
    man = Manifest.model_validate(base).listed(report.root)
    report.left += [(case.id, case.excluded) for case in man.all_cases if case.excluded]
    report.manifest = man.model_copy(update={"cases_file": None, "all_cases": man.cases})
    report.rows.append(("PNG stacks", len(man.cases), "cases, without spacing; class from the first folder"))
    report.rows.append(("patients", len(man.patients), "from the second folder"))
    return True


def _volumes(
    report: ScanReport,
    contents: Contents,
    pattern: str | None,
    wanted: str | None,
    channels: Sequence[str],
) -> None:
    """Scans with their masks and patients -> the manifest of the report."""
    scans, masks = scans_and_masks(contents, pattern, wanted)
    modality, scans = one_modality(scans, report, wanted)
    scans = without_copies(scans, report)
    joined = by_channel(scans, channels, report) if channels else {}
    scans = [one for one in scans if one.path in joined] if channels else scans
    if not scans:
        raise DataError(
            "no scan below this folder can be used",
            path=report.root,
            found=_first_reasons(masks, report.left),
            expected="DICOM series, NIfTI, NRRD, MetaImage, PNG stacks or mammograms",
        )
    pairs = Pairs(scans, masks, pattern, report.root)
    if pattern and not any(pairs.masks.values()):
        raise UseError(f"--masks {pattern!r} fits no mask of these scans", path=report.root)
    report.left += pairs.left
    patients = _patients(scans, report.root)
    ids = Counter(map(_id, scans))
    cases = [
        Case(
            id=_id(one) if ids[_id(one)] == 1 else f"{one.path}/{one.uid}" if one.uid else one.path,
            patient=patient,
            channels=joined.get(one.path, {}),
            image=None if one.path == "." else one.path,
            series_uid=None if channels else one.uid,
            masks=pairs.places(one),
            label_map=pairs.maps.get(id(one)),
        )
        for one, patient in zip(scans, patients, strict=True)
    ]
    report.manifest = Manifest(
        name=report.manifest.name,
        modality=modality,
        organs=pairs.organs,
        source=Source(parameters={"segments": pairs.segments} if pairs.segments else {}),
        all_cases=sorted(cases, key=lambda case: natural(case.id)),
    )
    describe(report, scans)


def _first_reasons(masks: list[Found], left: list[tuple[str, str]]) -> str:
    named = [f"{len(masks)} named like masks, such as {masks[0].path}"] if masks else []
    reasons = [f"{path}: {why}" for path, why in left[:3]]
    more = [f"{len(left) - 3} more left out"] if len(left) > 3 else []
    return "; ".join([*named, *reasons, *more]) or "no file"


def _id(one: Found) -> str:
    """Path without suffix; of a series its folder."""
    if one.kind == SERIES:
        return one.path if one.path != "." else str(one.uid)
    return PurePosixPath(one.name).with_name(stem(one.name)).as_posix()


def _patients(scans: list[Found], root: Path) -> list[str]:
    """The patient of every scan: by the DICOM header, else by folder and name.

    A file in the folder of a DICOM patient is of that patient.
    """
    named = patients_by_name(sorted({one.name for one in scans}), root.resolve().name)
    stated: dict[str, set[str]] = defaultdict(set)
    for one in scans:
        stated[named[one.name]] |= {one.patient} - {""}
    alike = {name: next(iter(found)) for name, found in stated.items() if len(found) == 1}
    return [one.patient or alike.get(named[one.name], named[one.name]) for one in scans]


def _save(report: ScanReport, out: Path | None, replace: bool) -> None:
    if out is None:
        return
    man = report.manifest
    if out.resolve().parent != report.root.resolve():  # from the folder itself it is found without
        source = man.source.model_copy(update={"location": str(report.root.resolve())})
        man = report.manifest = man.model_copy(update={"source": source})
    if out.exists() and not replace and not _same(out, man):
        raise UseError(
            "a manifest with other content is here",
            path=out,
            fix="add --replace to write over it, or give another --out",
        )
    try:
        report.written = man.save(out)
    except OSError as error:
        raise UseError(
            "cannot be written here", path=out, found=error.strerror, fix="give another place as --out"
        ) from None


def _same(path: Path, man: Manifest) -> bool:
    try:
        return load_manifest(path) == man
    except DataError:
        return False


def _below(path: Path, root: Path) -> bool:
    return path.resolve().is_relative_to(root.resolve())
