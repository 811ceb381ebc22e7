"""Build a store from a cohort: resumable, safe to kill, and the same bytes whatever happened before.

What is done is known from the index and the journal; an image is skipped when its sources (by name,
size and time), the settings and its volume are unchanged. Everything else goes to the workers,
few at a time. The order of the index is the order of the manifest, never that of completion.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from smartlab.core.errors import DataError, UseError
from smartlab.core.files import size_of
from smartlab.core.places import remember_store
from smartlab.core.workers import Lost, draining, run_bounded
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.manifest import Manifest, load_manifest
from smartlab.data.cohort.privacy import hashed, salt, storable
from smartlab.data.images.grid import Spacing, in_mm, told
from smartlab.data.store import index
from smartlab.data.store.current import check_salt, made_from, salt_check, state_of
from smartlab.data.store.ingest import files_present, ingest, lost_lesions
from smartlab.data.store.jobs import Cohort
from smartlab.data.store.request import ChannelSettings, Failure, FlatSettings, Job, Outcome, Settings
from smartlab.data.store.rows import CaseRow, ImageRow

TYPICAL_BYTES = 10_000_000  # a chest CT at 2 mm, cropped and compressed; told until some are built
SPARE_BYTES = 500_000_000  # left free on the disk
TRUSTED = 4  # images after which their mean size is believed


@dataclass
class StoreReport:
    """What a build did, counted in images. `failed` ones miss themselves or a case: see `failures`."""

    path: str
    images: int  # now in the store
    cases: int
    built: int
    skipped: int  # unchanged since an earlier run
    failed: int
    removed: int  # no longer in the manifest
    bytes: int  # of all volumes
    interrupted: bool
    remaining: int  # not tried because of the interruption
    failures: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # on images that are in the store, and on how many

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        state = " (interrupted; run the same again to go on)" if self.interrupted else ""
        lines = [
            f"store {self.path}: {self.images} images, {self.cases} cases, {size_of(self.bytes)}{state}",
            f"  built    {self.built:6d}",
            f"  skipped  {self.skipped:6d}  unchanged",
            f"  failed   {self.failed:6d}" + ("  see failures.csv" if self.failed else ""),
        ]
        lines += [f"  removed  {self.removed:6d}  no longer in the manifest"] if self.removed else []
        lines += [f"  left     {self.remaining:6d}"] if self.remaining else []
        lines += [f"    case {f['case_number']}: {f['reason']}" for f in self.failures[:5]]
        lines += [f"    … and {len(self.failures) - 5} more"] if len(self.failures) > 5 else []
        lines += self.notes
        return "\n".join(lines)


def build_store(
    manifest: str | Path | Manifest,
    root: str | Path,
    out: str | Path,
    *,
    workers: int = 2,
    spacing: Spacing | None = None,
    crop_body: bool = True,
    labels: bool = True,
    tilt: str = "refuse",
    grey: str = "voi",
    scheduler: str | None = None,
    progress: bool = True,
    state: str | None = None,
) -> StoreReport:
    """Resample the images of a manifest below `root` to `spacing` mm into the store `out`.

    spacing:    mm, one number, or three along x, y and z; None is 2 for scans and 0.2 for mammograms.
    workers:    processes on this machine; 0 works in this one.
    scheduler:  address of a Dask scheduler whose workers see `root` and `out`.
    labels:     also store label maps and masks, merged into one uint8 volume per image.
    tilt:       "refuse" gantry-tilted DICOM series, or "correct" them.
    grey:       how mammograms are windowed: "voi" or "percentile" (`read_mammogram`).
    state:      of the sources, where the caller has just asked for it (`current.state_of`).

    Run it again after any interruption, or when the manifest or the data changed.

    >>> report = sl.build_store("my/manifest.json", "my/images", "my/store")
    >>> report.failed
    0
    """
    man, root, out = load_manifest(manifest, root), Path(root), Path(out)
    settings = settings_for(man, spacing, crop_body, labels, tilt, grey)
    _check_request(man, root, out, settings.spacing, workers)
    with index.locked(out), draining() as stop:
        build = _Build(man, root, out, settings, state)
        build.resume()
        total = len(build.cohort.groups)
        todo = [i for i in range(total) if build.pending(i)]
        build.report.skipped = total - len(todo)
        results = run_bounded(_work, build.tasks(todo), workers, scheduler, stop)
        about: dict[str, Any] = {"desc": f"store {man.name}", "unit": "image", "disable": not progress}
        with tqdm(total=total, initial=build.report.skipped, **about) as bar, closing(results):
            build.check_disk(len(todo))
            for left, result in zip(range(len(todo) - 1, -1, -1), results, strict=False):
                build.take(*_numbered(result))
                bar.set_postfix_str(build.forecast(left), refresh=False)
                bar.update()
                build.check_disk(left)
        return build.finish()


Task = tuple[int, Job | Failure, ImageRow | None]  # position, what to do, row of an earlier run


def _work(task: Task) -> tuple[int, Outcome]:
    number, job, previous = task
    return number, Outcome(None, (job,)) if isinstance(job, Failure) else ingest(job, previous)


def _numbered(result: tuple[int, Outcome] | Lost[Task]) -> tuple[int, Outcome]:
    if not isinstance(result, Lost):
        return result
    number, job, _ = result.job
    reason = "the worker died on this image twice: out of memory, or a damaged file. Use fewer workers"
    return number, Outcome(None, (Failure(job.key if isinstance(job, Job) else job.image, None, reason),))


class _Build:
    """The state of one run."""

    def __init__(
        self, man: Manifest, root: Path, out: Path, settings: Settings | FlatSettings, state: str | None
    ) -> None:
        self.man, self.out, self.settings, self.salt = man, out, settings, salt()
        self.labels = storable(man.labels, man.cases)
        self.cohort = Cohort(man, root, out, settings, self.salt)
        self.rows: dict[int, ImageRow] = {}  # position of the image -> its row
        self.written = 0  # bytes of their volumes
        self.stale: dict[str, ImageRow] = {}  # image key -> row that may still hold
        self.failures: dict[int, tuple[Failure, ...]] = {}
        self.report = StoreReport(str(out), 0, 0, 0, 0, 0, 0, 0, False, 0)
        self.journal = index.Journal(out)
        # before any of it is read: what changes meanwhile is seen next time
        self.state = state or state_of(man, root)

    # ---- what is there already

    def resume(self) -> None:
        header = index.read_header(self.out)
        if header:
            self._check_header(header)
        rows: Sequence[ImageRow] = index.read_lines(self.out, header, "images") if header else []
        self.stale = {row["key"]: row for row in [*rows, *self.journal.read()]}
        self.journal.start(list(self.stale.values()))
        index.clean(self.out, self.stale.values())

    def _check_header(self, header: dict[str, Any]) -> None:
        check_salt(self.salt, header, self.out)
        if header["manifest"] != self.man.name:
            raise UseError(
                "this folder holds the store of another manifest",
                path=self.out,
                found=header["manifest"],
                expected=self.man.name,
                fix="choose another folder for --out",
            )

    def pending(self, number: int) -> bool:
        """Whether this image needs work. Looks at names, sizes and times, reads no image."""
        job, row = self.cohort.job(number), self.stale.get(self.cohort.keys[number])
        try:
            if not isinstance(job, Job) or row is None or row["request"] != job.request:
                return True
            if not files_present(self.out, row) or row["stat"] != job.stat:
                return True
        except OSError:  # a file that is there and cannot be looked at: the worker says why
            return True
        self._keep(number, row)
        self.failures[number] = lost_lesions(row)
        return False

    def tasks(self, numbers: list[int]) -> Iterator[Task]:
        for number in numbers:
            yield number, self.cohort.job(number), self.stale.get(self.cohort.keys[number])

    # ---- what came of it

    def take(self, number: int, outcome: Outcome) -> None:
        if outcome.disk_full:
            raise DataError("the disk is full", path=self.out, fix="free space, then run the same again")
        self.failures[number] = outcome.failures
        if outcome.row is not None:
            self.journal.add(outcome.row)
            self._keep(number, outcome.row)
            self.report.built += outcome.built
            self.report.skipped += not outcome.built

    def _keep(self, number: int, row: ImageRow) -> None:
        self.rows[number] = row
        self.written += _volume_bytes(row)

    def forecast(self, left: int) -> str:
        failed = sum(bool(found) for found in self.failures.values())
        return f"failed={failed}, about {size_of(left * self._mean_bytes())} more to write"

    def check_disk(self, left: int) -> None:
        """Stop early, with what is built kept, when the rest will not fit."""
        known = len(self.rows) >= TRUSTED
        needed = left * self._mean_bytes() if known else 0.0
        free = shutil.disk_usage(self.out).free
        if left and needed + SPARE_BYTES > free:
            raise DataError(
                "the disk is too small for this store",
                path=self.out,
                found=f"{size_of(free)} free",
                expected=f"about {size_of(needed)} for the {left} images left, and {size_of(SPARE_BYTES)} spare",
                fix="free space or choose another disk, then run the same again; what is built is kept",
            )

    def _mean_bytes(self) -> float:
        return self.written / len(self.rows) if len(self.rows) >= TRUSTED else TYPICAL_BYTES

    def finish(self) -> StoreReport:
        rows = [self.rows[i] for i in sorted(self.rows)]
        cases, lost = self._case_rows()
        tried = self.rows.keys() | self.failures.keys()
        report = replace(
            self.report,
            images=len(rows),
            cases=len(cases),
            failed=sum(bool(found) for found in self.failures.values()),
            remaining=len(self.cohort.groups) - len(tried),
            bytes=sum(map(_volume_bytes, rows)),
            notes=told(row["notes"] for row in rows),
            failures=[{"case_number": number, **asdict(failure)} for number, failure in lost],
        )
        header: dict[str, Any] = {
            "format": self.settings.format,
            "manifest": self.man.name,
            "complete": report.remaining == 0,
            "salt_check": salt_check(self.salt),
            "made_from": made_from(self.man, self.cohort.root, self.settings, self.salt),
            "failed": report.failed,
            "state": self.state,
            "volumes": index.digest(
                sorted((part["file"], part["bytes"]) for row in rows for part in index.parts(row))
            ),
            "settings": asdict(self.settings),
            "label_names": {
                str(v): name for name, v in sorted(self.cohort.values.items(), key=lambda i: i[1])
            },
            "fingerprint": _fingerprint(self.settings, rows, cases),
        }
        known = {row["key"] for row in self.stale.values()}
        report.removed = len(known - set(self.cohort.keys))
        report.interrupted = report.remaining > 0
        index.write_failures(self.out, lost)
        index.write_index(self.out, header, rows, cases)
        remember_store(header["made_from"], self.out)
        self.journal.path.unlink()
        index.clean(self.out, rows)
        return report

    def _case_rows(self) -> tuple[list[CaseRow], list[tuple[int, Failure]]]:
        """Rows of the cases that are in the store, and the failures of those that are not."""
        position = {group.key: i for i, group in enumerate(self.cohort.groups)}
        stored = {number: i for i, number in enumerate(sorted(self.rows))}
        rows, lost = [], []
        for case_number, case in enumerate(self.man.cases):
            number, key = position[case.image_key], self.cohort.case_keys[case.id]
            failure = next((f for f in self.failures.get(number, ()) if f.case in (None, key)), None)
            if failure:
                lost.append((case_number, replace(failure, case=key)))
            elif number in stored:
                rows.append(self._case_row(case, key, stored[number], self.rows[number]))
        return rows, lost

    def _case_row(self, case: Case, key: str, image: int, row: ImageRow) -> CaseRow:
        box = row.get("boxes", {}).get(key)  # measured on the outline, where the manifest says nothing
        return {
            "key": key,
            "patient": hashed(self.salt, "patient", case.patient),
            "image": image,
            "split": case.split,
            "fold": case.fold,
            "labels": {name: v for name, v in case.labels.items() if name in self.labels},
            "center_mm": row["lesions"].get(key),
            "box_mm": case.lesion.box_mm if case.lesion else box,
            "diameter_mm": case.lesion.diameter_mm if case.lesion else max(box) if box else None,
        }


# ---- small parts ---------------------------------------------------------------------------------


def settings_for(
    man: Manifest,
    spacing: Spacing | None = None,
    crop: bool = True,
    labels: bool = True,
    tilt: str = "refuse",
    grey: str = "voi",
) -> Settings | FlatSettings:
    """How a store is built: mammograms, CT and MR differ in what there is to say."""
    if man.modality == "MG":
        pixel_mm = man.source.parameters.get("pixel_mm")
        flat: Any = 0.2 if spacing is None else spacing
        if np.ndim(flat):
            raise UseError(
                "pixels of mammograms have one size", found=f"spacing={in_mm(flat)}", expected="one number"
            )
        return FlatSettings(float(flat), crop, labels, grey, pixel_mm)
    mm: Any = 2.0 if spacing is None else np.asarray(spacing, float).tolist()
    if np.ndim(mm) and len(mm) != 3:
        raise UseError("a voxel has one size, or three", found=f"spacing={in_mm(mm)}")
    mm = mm[0] if np.ndim(mm) and len({*mm}) == 1 else mm
    if man.modality == "MR" or man.channels:
        return ChannelSettings(mm, crop, labels, tilt, modality=man.modality, channels=man.channels)
    return Settings(mm, crop, labels, tilt)


def _check_request(man: Manifest, root: Path, out: Path, spacing: Spacing, workers: int) -> None:
    man.check_there(root, "build")
    if "stacks" in man.layout:
        raise UseError(
            "PNG stacks are evaluated as they are, they have no store",
            path=f"manifest {man.name}",
            fix="smartlab evaluate RUN --task probe --manifest … --root …",
        )
    if out.resolve() == root.resolve():
        raise UseError(
            "the store cannot be written among the images", path=out, fix="choose another folder for --out"
        )
    low, high, usual = (0.02, 1.5, 0.2) if man.modality == "MG" else (0.1, 20, 2)
    sizes = np.atleast_1d(spacing)
    if (
        len(sizes) not in ((1,) if man.modality == "MG" else (1, 3))
        or not ((low <= sizes) & (sizes <= high)).all()
    ):
        raise UseError(
            "spacing is out of range",
            path=f"manifest {man.name}",
            found=f"{in_mm(spacing)} mm",
            expected=f"{low} to {high} mm for {man.modality}"
            + ("" if man.modality == "MG" else ", or three of these"),
            fix=f"set data.spacing={usual:g}, for example",
        )
    if workers < 0:
        raise UseError("workers cannot be negative", found=workers, expected="0 or more")


def _volume_bytes(row: ImageRow) -> int:
    return sum(part["bytes"] for part in index.parts(row))


def _fingerprint(settings: Settings | FlatSettings, images: list[ImageRow], cases: list[CaseRow]) -> str:
    """Hash of what a model can see: voxels, geometry, labels, patients; the same under any salt."""
    patients = {p: i for i, p in enumerate(dict.fromkeys(case["patient"] for case in cases))}
    facts = [
        asdict(settings),
        [(r["array"], r["affine"], r["labels"] and r["labels"]["array"]) for r in images],
        [{**case, "key": "", "patient": patients[case["patient"]]} for case in cases],
    ]
    return index.digest(facts)
