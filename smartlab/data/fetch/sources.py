"""Fetch a public dataset: DICOM series from the Imaging Data Commons, archives from the web, phantoms.

    report = fetch("pancreas-ct", "data/pancreas", dry_run=True)
    print(report)         # what would be fetched, and how large it is

Fetching can be stopped at any moment and started again: a series or archive that is complete is
left alone, the rest continues. Below the root:

    <SeriesInstanceUID>/   one folder per series, images and masks alike
    <unpacked archive>     with `manifest.json`, the cases found in it
    .fetch/                what is under way, and marks of what is done
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from smartlab.core.errors import DataError, SmartlabError, UseError
from smartlab.core.files import size_of, whole
from smartlab.data.cohort.manifest import Manifest, load_manifest
from smartlab.data.fetch import download
from smartlab.data.fetch.download import check_room

IDC_ENDPOINT = "https://s3.amazonaws.com"
BATCH_GB, BATCH_SERIES = 4.0, 100  # a batch costs some seconds to set up, and moves the progress bar once


@dataclass(frozen=True)
class Item:
    """One thing to fetch: a DICOM series or a file. `size_mb` is None where it is not known."""

    name: str
    size_mb: float | None = None
    files: int = 1
    url: str = ""
    done: bool = False


@dataclass
class FetchReport:
    """What a dataset consists of, what was there already, and what went wrong."""

    manifest: str
    licence: str
    root: str
    dry_run: bool
    items: list[Item]
    fetched: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def skipped(self) -> list[str]:
        """Items that were complete before."""
        return [item.name for item in self.items if item.done]

    @property
    def todo(self) -> list[Item]:
        """Items that were not."""
        return [item for item in self.items if not item.done]

    @property
    def todo_mb(self) -> float:
        return sum(item.size_mb or 0 for item in self.todo)

    @property
    def ok(self) -> bool:
        return not self.failed

    def as_json(self) -> dict[str, Any]:
        """Everything, as plain values."""
        return {**asdict(self), "skipped": self.skipped, "todo_mb": self.todo_mb}

    def summary(self) -> str:
        """One line: how many things, how large."""
        unknown = sum(item.size_mb is None for item in self.todo)
        size = size_of(1e6 * self.todo_mb)
        size = "size not known" if unknown == len(self.todo) and unknown else size
        size += f" and {unknown} of unknown size" if 0 < unknown < len(self.todo) else ""
        return f"{len(self.todo)} of {len(self.items)} item(s), {size}"

    def __str__(self) -> str:
        verb = "would fetch" if self.dry_run else "to fetch"
        lines = [f"{self.manifest} ({self.licence}): {verb} {self.summary()}, into {self.root}"]
        if self.dry_run:
            lines += [f"  {i.name}  {size_of(i.size_mb and 1e6 * i.size_mb)}" for i in self.todo[:10]]
            lines += [f"  … and {len(self.todo) - 10} more"] if len(self.todo) > 10 else []
        else:
            lines.append(
                f"{len(self.fetched)} fetched, {len(self.skipped)} already there, {len(self.failed)} failed"
            )
        lines += [f"  failed: {name}: {why}" for name, why in list(self.failed.items())[:10]]
        return "\n".join([*lines, *self.notes])


def fetch(
    manifest: Manifest | str | Path,
    root: str | Path,
    *,
    cases: Sequence[str] | None = None,
    dry_run: bool = False,
    progress: bool = True,
) -> FetchReport:
    """Fetch the images of a manifest, and the masks that are DICOM series, below `root`.

    cases: only these case ids (DICOM series only; archives come whole). Without network it fails
    within seconds, saying what would have been fetched and how large it is.
    """
    manifest, root = load_manifest(manifest), Path(root)
    kind = manifest.source.kind
    if kind == "local":
        raise UseError(
            f"{manifest.name} has no public source: its images are yours to place",
            path=root,
            fix=manifest.source.notes or "put the files below this folder, as the manifest's cases name them",
        )
    if cases is not None and kind != "idc":
        raise UseError(
            f"{manifest.name} comes whole; single cases cannot be fetched", fix="leave out `cases`"
        )
    _refuse_another(manifest, root)
    if kind == "phantom":
        return _make(manifest, root, dry_run, progress)
    items = _series(manifest, root, cases) if kind == "idc" else _files(manifest, root)
    report = FetchReport(manifest.name, manifest.licence, str(root), dry_run, items)
    report.notes += [manifest.source.notes] if manifest.source.notes else []
    if dry_run:
        return report
    if report.todo:
        _check_network(report, IDC_ENDPOINT if kind == "idc" else report.todo[0].url)
        check_room(root, 1e6 * report.todo_mb, "not enough disk space", root)
        if kind == "idc":
            _fetch_series(report, root, progress)
        else:
            _fetch_files(manifest, report, root, progress)
    if manifest.layout and report.ok:
        _list_cases(manifest, report, root, progress)
    return report


def _refuse_another(manifest: Manifest, root: Path) -> None:
    """A folder has one `manifest.json`: a second dataset must not pass for it, nor replace it."""
    if (root / "manifest.json").exists() and (there := load_manifest(root).name) != manifest.name:
        raise UseError(
            "this folder holds another dataset",
            path=root,
            found=there,
            expected=manifest.name,
            fix="give every dataset its own folder as --root",
        )


def _check_network(report: FetchReport, url: str) -> None:
    if reason := download.unreachable(url):
        raise DataError(
            f"cannot reach {url.split('/')[2]}; {len(report.fetched) or 'nothing'} fetched",
            path=report.manifest,
            found=reason,
            expected=f"a network to fetch {report.summary()}",
            fix="check the network or proxy, then run the same command again: it continues where it stopped",
        )


def _bar(report: FetchReport, progress: bool) -> tqdm:
    """Progress over the bytes of everything that is to come."""
    total, off = int(report.todo_mb * 1e6) or None, not progress
    return tqdm(total=total, unit="B", unit_scale=True, desc=report.manifest, disable=off, mininterval=1)


# ---- DICOM series from the Imaging Data Commons ----


def _series(manifest: Manifest, root: Path, cases: Sequence[str] | None) -> list[Item]:
    from smartlab.data.cohort import idc

    chosen = manifest.cases if cases is None else manifest.select(cases).all_cases
    table = idc.lookup(idc.series_of(chosen), ["series_size_MB", "instanceCount"])
    return [
        Item(
            uid, row["series_size_MB"], row["instanceCount"], done=_count(root / uid) >= row["instanceCount"]
        )
        for uid, row in table.items()
    ]


def _count(folder: Path) -> int:
    return sum(1 for _ in folder.glob("*.dcm"))


def _fetch_series(report: FetchReport, root: Path, progress: bool) -> None:
    client = _idc_client()
    waiting = root / ".fetch" / "series"
    waiting.mkdir(parents=True, exist_ok=True)
    with _bar(report, progress) as bar:
        for batch in _batches(report.todo):
            # idc-index logs a failed transfer but does not raise: what arrived is counted below.
            client.download_from_selection(
                downloadDir=str(waiting),
                seriesInstanceUID=[item.name for item in batch],
                use_s5cmd_sync=True,  # files of a batch that was interrupted are not fetched again
                dirTemplate="%SeriesInstanceUID",
                quiet=True,
                show_progress_bar=False,
            )
            if not any(_count(waiting / item.name) for item in batch):
                _check_network(report, IDC_ENDPOINT)
            for item in batch:
                arrived = _count(waiting / item.name)
                if arrived < item.files:
                    report.failed[item.name] = f"{arrived} of {item.files} files arrived"
                    continue
                shutil.rmtree(root / item.name, ignore_errors=True)  # part of a series
                os.replace(waiting / item.name, root / item.name)
                report.fetched.append(item.name)
                bar.update(int((item.size_mb or 0) * 1e6))


def _idc_client() -> Any:
    import logging

    from idc_index import IDCClient

    logging.getLogger("idc_index").setLevel(logging.ERROR)  # its messages repeat for every batch
    return IDCClient.client()


def _batches(items: Sequence[Item]) -> Iterator[list[Item]]:
    batch: list[Item] = []
    for item in items:
        size = sum(one.size_mb or 0 for one in [*batch, item])
        if batch and (len(batch) == BATCH_SERIES or size > BATCH_GB * 1000):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


# ---- archives from the web ----


def _files(manifest: Manifest, root: Path) -> list[Item]:
    items = []
    whole = manifest.source.size_gb if len(manifest.source.files) == 1 else None
    for file in manifest.source.files:
        if Path(file["name"]).name != file["name"] or file["name"].startswith("."):
            raise DataError("not a plain file name", path=manifest.name, found=file["name"])
        done = _mark(root, file["name"]).exists()
        size = file.get("size_mb") or (whole and whole * 1000)
        items.append(Item(file["name"], size, url=file["url"], done=done))
    return items


def _mark(root: Path, name: str) -> Path:
    return root / ".fetch" / f"{name}.done"


def _fetch_files(manifest: Manifest, report: FetchReport, root: Path, progress: bool) -> None:
    facts = {file["name"]: file for file in manifest.source.files}
    with _bar(report, progress) as bar:
        for item in report.todo:
            arrived = root / ".fetch" / item.name
            partial = arrived.with_name(item.name + ".part")
            bar.update(partial.stat().st_size if partial.exists() else 0)
            sums = {key: facts[item.name].get(key) for key in ("md5", "sha256")}
            try:
                download.download(item.url, arrived, progress=bar.update, **sums)
                if download.is_archive(arrived):
                    download.unpack(arrived, root)
                    arrived.unlink()
                else:
                    os.replace(arrived, root / item.name)
            except SmartlabError as error:  # the other files are still worth having
                report.failed[item.name] = str(error)
                continue
            _mark(root, item.name).write_text(json.dumps({"url": item.url, **sums}) + "\n")
            report.fetched.append(item.name)


def _list_cases(manifest: Manifest, report: FetchReport, root: Path, progress: bool) -> None:
    """Write `manifest.json` with the cases that the fetched files hold."""
    if "npz" in (layout := manifest.layout):
        _write_samples(layout, root, progress)
    listed = manifest.listed(root)
    listed.save(root / "manifest.json")
    report.notes.append(f"{len(listed.all_cases)} cases listed in {root / 'manifest.json'}")


def _write_samples(layout: dict[str, Any], root: Path, progress: bool) -> None:
    """MedMNIST's arrays as one NIfTI per sample, with a nominal spacing of 1 mm."""
    import nibabel
    import numpy as np

    from smartlab.data.cohort.listing import sample_path

    with np.load(root / layout["npz"], allow_pickle=False) as arrays:
        for split in ("train", "val", "test"):
            images = arrays[f"{split}_images"]
            for k, image in enumerate(tqdm(images, desc=f"unpacking {split}", disable=not progress)):
                target = root / sample_path(layout, split, k)
                if not target.exists():
                    with whole(target) as temporary:
                        nibabel.save(nibabel.Nifti1Image(image, np.eye(4)), temporary)


def _make(manifest: Manifest, root: Path, dry_run: bool, progress: bool) -> FetchReport:
    """A phantom is made, not fetched."""
    size = manifest.source.size_gb
    listed = len(load_manifest(root).patients) if (root / "manifest.json").exists() else 0
    made = listed > 0 and listed >= manifest.source.parameters.get("n", 0)
    item = Item(f"phantom {manifest.source.location}", size and size * 1000, done=made)
    report = FetchReport(manifest.name, manifest.licence, str(root), dry_run, [item])
    if not dry_run and not made:
        from smartlab.data.phantoms.make import make_like

        make_like(manifest, root, progress=progress)
        report.fetched.append(item.name)
    return report
