"""Check a cohort on disk against its manifest, before hours of work depend on it.

For every image: it exists, reads, has sane geometry; its masks and label map exist, lie on the
same grid and hold only known values; lesion centres fall inside the image; the checksum agrees.
One row per image, problems in words. A bad image never stops the others.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from smartlab.core.errors import DataError, SmartlabError
from smartlab.data.cohort.manifest import Case, ImageGroup, Manifest, load_manifest
from smartlab.data.cohort.png_stacks import read_stack
from smartlab.data.images.grid import told

if TYPE_CHECKING:
    import pandas as pd

    from smartlab.data.images.readers import Volume


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
    from tqdm.auto import tqdm

    man = load_manifest(manifest, root)
    groups = man.images()
    if not groups:
        raise DataError(
            "lists no cases, so there is nothing to verify",
            path=f"manifest {man.name}",
            fix="see its notes: smartlab data show",
        )
    if not Path(root).is_dir():
        raise DataError("no such folder", path=root, fix="give the folder of the images as --root")
    check = partial(
        check_image,
        organs=man.organs,
        segments=man.segments,
        modality=man.modality,
        root=Path(root),
        checksums=checksums,
        tilt=tilt,
        stacks="stacks" in man.source.parameters.get("layout", {}),
    )
    rows: dict[int, dict[str, Any]] = {}
    with tqdm(total=len(groups), desc=f"verify {man.name}", unit="image", disable=not progress) as bar:
        for number, row in _run(check, groups, workers):
            rows[number] = row
            bad = sum(r["problem"] != "" for r in rows.values())
            bar.set_postfix(bad=bad, refresh=False)
            bar.update()
    return VerifyReport(man.name, pd.DataFrame([rows[i] for i in range(len(groups))]))


def _run(check: Any, groups: list[ImageGroup], workers: int) -> Iterator[tuple[int, dict[str, Any]]]:
    if workers == 0 or len(groups) < 3:
        yield from ((i, check(group)) for i, group in enumerate(groups))
        return
    from smartlab.core.workers import Lost, run_bounded

    for result in run_bounded(partial(_numbered, check), enumerate(groups), workers):
        if isinstance(result, Lost):
            number, group = result.job
            row = {"image": group.key, "cases": len(group.cases), "shape": "", "spacing_mm": "", "remark": ""}
            died = "the process died on this image: out of memory, or a damaged file. Use fewer workers"
            result = number, row | {"problem": died}
        yield result


def _numbered(check: Any, job: tuple[int, ImageGroup]) -> tuple[int, dict[str, Any]]:
    return job[0], check(job[1])


def check_image(
    group: ImageGroup,
    organs: dict[int, str],
    segments: dict[str, str],
    modality: str,
    root: Path,
    checksums: bool,
    tilt: str = "refuse",
    stacks: bool = False,
) -> dict[str, Any]:
    """One row of the report. Problems are collected, never raised."""
    row = {
        "image": group.key,
        "cases": len(group.cases),
        "shape": "",
        "spacing_mm": "",
        "problem": "",
        "remark": "",
    }
    try:
        path = group.cases[0].locate(root)
        if checksums:
            _check_sum(path, group.cases)
        if stacks:
            row["shape"] = _by(read_stack(path).shape)
        elif modality == "MG":
            from smartlab.data.images.mammography import read_mammogram
            from smartlab.data.store.request import files_of

            if len(files := files_of(path)) != 1:
                raise DataError("the series should be one mammogram", path=path, found=f"{len(files)} files")
            image = read_mammogram(files[0])
            row["shape"], row["spacing_mm"] = _by(image.array.shape), _by(np.round(image.spacing_mm, 3))
            row["problem"] = _check_outlines(group.cases, image.array, root)
        else:
            from smartlab.data.images.readers import read_volume

            volume = read_volume(path, series=group.cases[0].series_uid, tilt=tilt)
            row["shape"], row["spacing_mm"] = _by(volume.shape), _by(np.round(volume.spacing, 3))
            row["remark"] = " | ".join(volume.notes)
            for case in group.cases:
                _check_case(case, volume, organs, segments, root)
    except SmartlabError as error:
        row["problem"] = getattr(error, "public", str(error))  # no header free text in reports
    except Exception as error:  # an unforeseen fault of one image is that image's problem
        row["problem"] = f"{type(error).__name__}: {error}"
    return row


def _check_case(
    case: Case, volume: Volume, organs: dict[int, str], segments: dict[str, str], root: Path
) -> None:
    from smartlab.data.images.readers import read_labels

    if case.lesion is not None:
        index = volume.to_index(case.lesion.world(volume))
        if (index < -0.5).any() or (index > np.array(volume.shape) - 0.5).any():
            raise DataError(
                f"the lesion of case {case.id} lies outside the image",
                found=f"voxel {np.round(index).tolist()}",
                expected=f"inside {volume.shape}",
            )
    if case.label_map is not None:
        labels = read_labels(_below(root, case.label_map), on=volume)
        unknown = sorted(set(np.unique(labels.array).tolist()) - {0} - set(organs))
        if unknown:  # building refuses them too
            raise DataError(
                "holds values the manifest does not name",
                path=case.label_map,
                found=unknown,
                expected=f"0 and {sorted(organs)}",
            )
    for name, place in case.masks.items():
        if place.startswith("series:"):
            from smartlab.data.images.dicom import find_series
            from smartlab.data.images.dicom_masks import read_mask

            uid = place.removeprefix("series:")
            several = sum(other == place for other in case.masks.values()) > 1  # as in building
            roi = segments.get(name, name if several else None)
            read_mask(find_series(root, uid), volume, roi=roi, series=uid)
            continue
        read_labels(_below(root, place), binary=True, on=volume)


def _check_outlines(cases: tuple[Case, ...], image: np.ndarray, root: Path) -> str:
    """Find the outline of every lesion of a mammogram -> what is odd about them, in words."""
    from smartlab.data.cohort.cbis import find_outline
    from smartlab.data.images.dicom import find_series
    from smartlab.data.store.request import files_of

    odd = []
    for case in cases:
        files: list[Path] = []
        for place in case.masks.values():
            uid = place.removeprefix("series:")
            files += [_below(root, place)] if uid == place else files_of(find_series(root, uid))
        if files:
            try:
                odd += find_outline(files, image)[1]
            except DataError as error:
                odd.append(f"case {case.id}: {error}")
    return "; ".join(odd)


def _check_sum(path: Path, cases: tuple[Case, ...]) -> None:
    expected = next((case.sha256 for case in cases if case.sha256), None)
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


def _below(root: Path, place: str) -> Path:
    path = root / place
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError("leads out of the data root through a link", path=path)
    if not os.path.exists(path):
        raise DataError("not found", path=path, fix="check the manifest, or fetch the data again")
    return path


def _by(values: Any) -> str:
    return "×".join(f"{v:g}" for v in values)


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
