"""What a scan of a folder understood and left out, in rows."""

from __future__ import annotations

import shlex
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from smartlab.core.errors import DataError, counted, problems_of, some
from smartlab.data.cohort.manifest import Manifest
from smartlab.data.cohort.scan_files import PICTURE, SERIES, Found
from smartlab.data.cohort.scan_table import Joined

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


def describe(report: ScanReport, scans: list[Found]) -> None:
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


def take(report: ScanReport, joined: Joined, table: Path) -> None:
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
