"""Check a cohort on disk against its manifest, before hours of work depend on it.

For every image: it exists, reads, has sane geometry; its masks and label map exist, lie on the
same grid and hold only known values; lesion centres fall inside the image; the checksum agrees.
One row per image, problems in words. A bad image never stops the others.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm.auto import tqdm

from smartlab.core.errors import DataError, SmartlabError
from smartlab.core.workers import Lost, run_bounded
from smartlab.data.cohort.files import Files, LabelSource, values_in
from smartlab.data.cohort.manifest import ImageGroup, Manifest, load_manifest
from smartlab.data.cohort.png_stacks import read_stack
from smartlab.data.images import readers
from smartlab.data.images.grid import by, told
from smartlab.data.images.readers import files_of

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class VerifyReport:
    """One row per image, in manifest order. `ok` when no row has a problem."""

    name: str
    table: pd.DataFrame  # image, cases, shape, spacing_mm, problem, remark

    @property
    def bad(self) -> pd.DataFrame:
        return self.table[self.table.problem != ""]

    @property
    def ok(self) -> bool:
        return self.bad.empty

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "ok": self.ok,
            "images": len(self.table),
            "rows": self.table.to_dict("records"),
        }

    def __str__(self) -> str:
        lines = [
            f"{self.name}: {len(self.table)} images, {len(self.table) - len(self.bad)} good, {len(self.bad)} bad"
        ]
        lines += [f"  {row.image}: {row.problem}" for row in self.bad.itertuples()]
        lines += told(filter(None, remark.split(" | ")) for remark in self.table.remark)
        if self.ok and len(self.table):
            shown = self.table.head(5).to_string(
                index=False, columns=["image", "cases", "shape", "spacing_mm"]
            )
            more = f"\n… and {len(self.table) - 5} more" if len(self.table) > 5 else ""
            lines.append(shown + more)
        return "\n".join(lines)


def verify_manifest(
    manifest: str | Path | Manifest,
    root: str | Path,
    *,
    workers: int = 2,
    checksums: bool = True,
    tilt: str = "refuse",
    progress: bool = True,
) -> VerifyReport:
    """Check every image of a manifest below `root`.

    >>> report = sl.verify_manifest("my/manifest.json", "my/images")
    >>> report.bad
    """
    import pandas as pd

    man = load_manifest(manifest, root)
    man.check_there(Path(root), "verify")
    groups = man.images()
    check = partial(check_image, organs=man.organs, modality=man.modality, checksums=checksums, tilt=tilt)
    jobs = map(partial(_job, Files(man, Path(root)), man), groups)
    rows: dict[int, dict[str, Any]] = {}
    with tqdm(total=len(groups), desc=f"verify {man.name}", unit="image", disable=not progress) as bar:
        for number, row in _run(check, jobs, workers if len(groups) > 2 else 0):
            rows[number] = row
            bad = sum(r["problem"] != "" for r in rows.values())
            bar.set_postfix(bad=bad, refresh=False)
            bar.update()
    return VerifyReport(man.name, pd.DataFrame([rows[i] for i in range(len(groups))]))


@dataclass(frozen=True)
class _Image:
    """An image and the files to look at, or why there are none."""

    group: ImageGroup
    path: Path = Path()
    series: str | None = None
    files: tuple[Path, ...] | None = None
    labels: tuple[LabelSource, ...] = ()
    channels: tuple[Path, ...] = ()  # images beside the first
    outlines: tuple[tuple[str, tuple[Path, ...]], ...] = ()  # case, the files that may hold its outline
    stack: bool = False
    problem: str = ""


def _job(files: Files, man: Manifest, group: ImageGroup) -> _Image:
    try:
        path, series, own = files.image(group)
        flat, stack = man.modality == "MG", "stacks" in man.layout
        labels = () if flat or stack else tuple(files.labels(group))
        outlines = tuple((case.id, files.outline(case)) for case in group.cases if flat and case.masks)
        return _Image(group, path, series, own, labels, files.channels(group), outlines, stack)
    except Exception as error:  # of this image only
        return _Image(group, problem=_told(error))


def _told(error: Exception) -> str:
    if isinstance(error, SmartlabError):
        return getattr(error, "public", str(error))  # no header free text in reports
    return f"{type(error).__name__}: {error}"


def _run(check: Any, jobs: Iterable[_Image], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    if workers == 0:
        yield from ((i, check(job)) for i, job in enumerate(jobs))
        return
    for result in run_bounded(partial(_numbered, check), enumerate(jobs), workers):
        if isinstance(result, Lost):
            number, job = result.job
            died = "the process died on this image: out of memory, or a damaged file. Use fewer workers"
            result = number, _row(job.group, died)
        yield result


def _numbered(check: Any, job: tuple[int, _Image]) -> tuple[int, dict[str, Any]]:
    return job[0], check(job[1])


def _row(group: ImageGroup, problem: str = "") -> dict[str, Any]:
    row = {"image": group.key, "cases": len(group.cases), "shape": "", "spacing_mm": ""}
    return row | {"problem": problem, "remark": ""}


def check_image(
    job: _Image, organs: dict[int, str], modality: str, checksums: bool, tilt: str = "refuse"
) -> dict[str, Any]:
    """One row of the report. Problems are collected, never raised."""
    row = _row(job.group, job.problem)
    if job.problem:
        return row
    try:
        if checksums:
            _check_sum(job.path, next((case.sha256 for case in job.group.cases if case.sha256), None))
        if job.stack:
            row["shape"] = by(read_stack(job.path).shape)
        elif modality == "MG":
            from smartlab.data.images.mammography import only, read_mammogram

            image = read_mammogram(only(job.path, job.files or files_of(job.path)))
            row["shape"], row["spacing_mm"] = by(image.array.shape), by(np.round(image.spacing_mm, 3))
            row["problem"] = _check_outlines(job.outlines, image.array)
        else:
            how: Any = {"tilt": tilt, "modality": modality}
            volume = readers.read_volume(job.path, series=job.series, files=job.files, **how)
            for channel in job.channels:
                readers.check_same_grid(channel, readers.read_volume(channel, **how), volume)
            row["shape"], row["spacing_mm"] = by(volume.shape), by(np.round(volume.spacing, 3))
            row["remark"] = " | ".join(volume.notes)
            for case in job.group.cases:
                if case.lesion is not None:
                    case.lesion.world(volume, f"the lesion of case {case.id}")
            for source in job.labels:
                labels = source.read(volume)
                if source.value is None:
                    values_in(labels, organs)
    except Exception as error:  # a fault of one image, foreseen or not, is that image's problem
        row["problem"] = _told(error)
    return row


def _check_outlines(outlines: Iterable[tuple[str, tuple[Path, ...]]], image: np.ndarray) -> str:
    """Find the outline of every lesion of a mammogram -> what is odd about them, in words."""
    from smartlab.data.cohort.cbis import find_outline

    odd = []
    for case, files in outlines:
        try:
            odd += find_outline(files, image)[1]
        except DataError as error:
            odd.append(f"case {case}: {error}")
    return "; ".join(odd)


def _check_sum(path: Path, expected: str | None) -> None:
    if expected and path.is_file():
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != expected:
            raise DataError(
                "checksum differs",
                path=path,
                found=found[:12] + "…",
                expected=expected[:12] + "…",
                fix="fetch it again",
            )


def summary(manifest: str | Path | Manifest) -> dict[str, Any]:
    """The facts of a manifest for `smartlab data show`: counts, labels, licence, where to get it."""
    man = load_manifest(manifest)
    cases = man.cases
    labels = {}
    for name, spec in man.labels.items():
        values = [case.labels[name] for case in cases if case.labels.get(name) is not None]
        if spec.kind in ("binary", "multiclass", "multilabel"):
            counts = Counter(v for value in values for v in (value if isinstance(value, list) else [value]))
            labels[name] = (
                f"{spec.kind}, {', '.join(f'{k} {counts[k]}' for k in spec.classes or sorted(map(str, counts)))}"
            )
        else:
            labels[name] = f"{spec.kind}{f' ({spec.unit})' if spec.unit else ''}, {len(values)} values"
    size = man.source.size_gb
    return {
        "name": man.name,
        "title": man.title or man.name,
        "modality": man.modality,
        "licence": man.licence,
        "citation": man.citation,
        "homepage": man.homepage,
        "source": f"{man.source.kind} {man.source.location}" + (f", {size:,.1f} GB" if size else ""),
        "get it": man.source.notes,
        "cases": f"{len(cases)} on {len(man.images())} images of {len(man.patients)} patients, {len(man.all_cases) - len(cases)} excluded",
        "splits": {str(k): v for k, v in sorted(Counter(c.split or "—" for c in cases).items())},
        "labels": labels,
        "organs": ", ".join(man.organs.values()),
        "notes": man.notes,
    }
