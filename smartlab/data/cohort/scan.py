"""From a folder of one's own to a manifest: what is there, what belongs together, and what is left out.

    man = sl.scan_folder("scans", labels="outcome.csv")     # smartlab data scan scans --labels outcome.csv

- What a file is, its header tells (`scan_files.py`); names only say which volumes are masks, which scan a
  mask is of, and which patient a scan shows where no DICOM header does.
- A mask belongs to the scan whose name it continues (`p01_liver_mask` to `p01`, `s1/segmentations/liver`
  to `s1/ct`), a SEG or RTSTRUCT to the series it refers to; either must lie on the scan's voxels.
- In doubt scans are taken as of one patient: too few patients are seen in the report, a leak never is.
- A file that cannot be used never stops the others: it is left out, with the reason, in the report. What is
  wrong with the table of labels is an error instead, all of it at once (`scan_table.py`).
"""

from __future__ import annotations

import os
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from smartlab.core.errors import DataError, UseError, counted, one_of, problems_of, some
from smartlab.core.places import KEYS
from smartlab.data.cohort.case import Case, natural
from smartlab.data.cohort.manifest import Manifest, Source, load_manifest
from smartlab.data.cohort.scan_files import MAMMOGRAM, PICTURE, SERIES, VOLUMES, Contents, Found, look_into
from smartlab.data.cohort.scan_masks import Pairs, grids_apart
from smartlab.data.cohort.scan_names import fits_path, is_named_like_a_mask, patients_by_name, slug, stem
from smartlab.data.cohort.scan_table import Joined, join_table
from smartlab.data.images.readers import files_of

FEW = 6  # structures told one by one


@dataclass
class ScanReport:
    """What was understood, row by row (what, number, remark), and (path, reason) of what was left out."""

    manifest: Manifest
    root: Path
    rows: list[tuple[str, int, str]] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)
    written: Path | None = None

    @property
    def next(self) -> list[str]:
        """The commands that go on from here."""
        place = shlex.quote(str(self.root))
        beside = self.written is not None and self.written == self.root / "manifest.json"
        what = place if beside or self.written is None else shlex.quote(str(self.written))
        if self.manifest.layout:
            return [f"smartlab evaluate RUN --task probe --label class --manifest {what} --root {place}"]
        preset = "miram" if self.manifest.modality == "MG" else "smart"
        return [
            f"smartlab data verify {what} --root {place}",
            f"smartlab pretrain {preset} --data {what} --out runs/a",
        ]

    def as_json(self) -> dict[str, Any]:
        return {
            "manifest": str(self.written) if self.written else None,
            "name": self.manifest.name,
            "cases": len(self.manifest.cases),
            "patients": len(self.manifest.patients),
            "understood": [dict(zip(("what", "number", "remark"), row, strict=True)) for row in self.rows],
            "left_out": [{"path": path, "reason": reason} for path, reason in self.left],
            "next": self.next,
        }

    def __str__(self) -> str:
        by_reason: dict[str, list[str]] = defaultdict(list)
        for path, reason in self.left:
            by_reason[reason].append(path)
        rows = list(self.rows)
        for reason, paths in by_reason.items():
            rows.append(("left out", len(paths), f"{some(paths)}: {reason}"))
        width = max(len(what) for what, _, _ in rows)
        lines = [f"{what:<{width}}  {number:>5}  {remark}".rstrip() for what, number, remark in rows]
        lines += [f"wrote {self.written}"] if self.written else []
        return "\n".join([*lines, *(f"next: {command}" for command in self.next if self.written)])


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
        joined = join_table(Path(labels), root, report.manifest.cases)
        _take(report, joined, Path(labels))
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
    scans, masks = _apart(contents, pattern, wanted)
    modality, scans = _one_modality(scans, report, wanted)
    scans = _without_copies(scans, report)
    joined = _joined(scans, channels, report) if channels else {}
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
    _describe(report, scans)


def _apart(contents: Contents, pattern: str | None, modality: str | None) -> tuple[list[Found], list[Found]]:
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


def _joined(scans: list[Found], channels: Sequence[str], report: ScanReport) -> dict[str, dict[str, str]]:
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


def _one_modality(scans: list[Found], report: ScanReport, wanted: str | None) -> tuple[Any, list[Found]]:
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


def _without_copies(scans: list[Found], report: ScanReport) -> list[Found]:
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


# ---- report --------------------------------------------------------------------------------------


def _describe(report: ScanReport, scans: list[Found]) -> None:
    kinds = Counter(one.kind for one in scans)
    for kind, count in kinds.most_common():
        files = sum(one.files for one in scans if one.kind == kind)
        report.rows.append((kind, count, f"{files} files" if kind == SERIES else ""))
    man = report.manifest
    by_header = len({one.patient for one in scans if one.patient})
    each = Counter(case.patient for case in man.cases)
    most, number = each.most_common(1)[0]
    sources = [f"{by_header} by DICOM patient id, as a salted hash"] if by_header else []
    sources += [f"{len(each) - by_header} by folder or name"] if len(each) > by_header else []
    sources += (
        [f"most scans: {number}, of {most}; if that is wrong, give a column `patient` in --labels"]
        if number > 1
        else []
    )
    report.rows.append(("patients", len(each), "; ".join(sources)))
    named = Counter(name for case in man.cases for name in case.masks)
    if len(named) > FEW:
        shown = ", ".join(sorted(named)[:FEW])
        report.rows.append(
            ("masks", named.total(), f"{len(named)} structures on their scans' grids: {shown}, …")
        )
    else:
        report.rows += [("masks", count, f"{name!r}, on their scans' grids") for name, count in named.items()]
    if maps := sum(case.label_map is not None for case in man.cases):
        report.rows.append(("label maps", maps, ", ".join(man.organs.values())))
    report.rows += [("note", 1, f"{one.path}: {one.note}") for one in scans if one.note]
    if kinds[PICTURE]:
        report.rows.append(
            (
                "note",
                kinds[PICTURE],
                "pictures have no pixel size: add source.parameters.pixel_mm to the manifest",
            )
        )


def _take(report: ScanReport, joined: Joined, table: Path) -> None:
    man = report.manifest
    update = {"labels": man.labels | joined.labels, "all_cases": joined.cases}
    try:
        report.manifest = Manifest.model_validate(dict(man) | update)
    except ValidationError as error:  # such as a split that a patient straddles
        problems = counted(problems_of(error))
        raise DataError("cannot be joined to the scans", path=table, found=problems) from None
    lines = {line for line, _ in joined.own.values()}
    remark = f"rows, joined by column {joined.key!r} to {len(joined.own)} of {len(joined.cases)} scans"
    report.rows.append((table.name, len(lines), remark))
    for name, spec in joined.labels.items():
        values = [case.labels[name] for case in joined.cases if name in case.labels]
        counts = Counter(map(str, values))
        found = [v for v in values if isinstance(v, int | float)]
        shown = ", ".join(f"{k} {counts[k]}" for k in spec.classes) or f"{min(found):g} to {max(found):g}"
        report.rows.append((f"label {name}", len(values), f"{spec.kind}: {shown}"))
    report.left += joined.left


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
