"""Phantoms, the embedded default data: synthetic cohorts written as ordinary image files.

- "ct": chest and abdomen with organ labels, lung vessels, nodules (benign or malignant), tumours and
  an outcome; NIfTI files, or DICOM series.
- "mr": the same people in two MR contrasts, a channel each; NIfTI files.
- "mammo": mammograms with masses of five margin classes and pathology; DICOM files.

Patient i follows from (seed, i) and the grid alone: the same for any cohort size, on any number of
workers. `phantom_manifest` lists the cases without making an image. Making is resumable: a patient
whose image exists is done. No phantom stands for a real person or a measured statistic.
"""

from __future__ import annotations

import importlib
import json
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from tqdm.auto import tqdm

from smartlab.core.errors import DataError, UseError, one_of, some
from smartlab.core.files import whole
from smartlab.core.places import cache_folder
from smartlab.core.workers import Lost, run_bounded
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.manifest import Manifest, Source
from smartlab.data.phantoms.grid import Grid

Format = Literal["nifti", "dicom"]
_KINDS = {kind: f"smartlab.data.phantoms.{kind}" for kind in ("ct", "mammo", "mr")}
# raised when a seed gives other images than before: those kept are then others
DRAWING = {"ct": 1, "mammo": 2, "mr": 1}


def make_phantom(
    kind: str,
    out: str | Path,
    *,
    n: int = 16,
    seed: int = 0,
    shape: tuple[int, ...] | None = None,
    spacing: float | None = None,
    workers: int = 1,
    format: Format | None = None,
    progress: bool = True,
) -> Manifest:
    """Write the images of `n` patients and `manifest.json` below `out`; return the manifest.

    shape, spacing (mm), format: of the images; None takes the defaults, 160³ voxels at 2 mm as NIfTI
    for "ct" and "mr", 1024×768 pixels at 0.25 mm as DICOM for "mammo". A smaller field of view holds a smaller
    person, whole. workers: processes; 0 or 1 works in this one.

    >>> manifest = sl.make_phantom("ct", "data/phantom-ct", n=2, shape=(64, 64, 64), spacing=5.0)
    """
    module, grid = _kind(kind), _grid(kind, shape, spacing, format)
    root, manifest = Path(out), phantom_manifest(kind, n, seed, shape=shape, spacing=spacing, format=format)
    _same_cohort(root / "phantom.json", manifest)
    todo = [i for i in range(n) if not all(_is_there(case, root) for case in module.cases(seed, i, grid))]
    write = partial(module.write, root, seed, grid=grid)
    with tqdm(
        total=n, initial=n - len(todo), desc=manifest.name, unit="patient", disable=not progress
    ) as bar:
        for done in run_bounded(write, todo, min(workers, len(todo)) if workers > 1 else 0):
            if isinstance(done, Lost):
                raise DataError(
                    "the process died on this patient twice", found=done.job, fix="use fewer workers"
                )
            bar.update()
    manifest.save(root / "manifest.json")
    return manifest


def kept_in(name: str, n: int, seed: int = 0) -> Path:
    """Where a cohort is kept for all when no place is named."""
    drawing = DRAWING[_short(name)]
    return cache_folder() / (f"{name}-{n}-seed{seed}" + (f"-drawing{drawing}" if drawing > 1 else ""))


def _is_there(case: Case, root: Path) -> bool:
    paths = [*case.masks.values(), case.label_map, case.image, *case.channels.values()]
    return all((root / path).exists() for path in paths if path)


def make_like(
    manifest: Manifest, out: Path, n: int | None = None, workers: int = 1, progress: bool = True
) -> Manifest:
    """The phantom that a manifest describes, or its first `n` patients, written below `out`."""
    stated = manifest.source.parameters
    asked = {key: stated[key] for key in ("n", "seed", "shape", "spacing", "format") if key in stated}
    asked |= {} if n is None else {"n": n}
    return make_phantom(manifest.source.location, out, **asked, workers=workers, progress=progress)


def phantom_manifest(
    kind: str,
    n: int,
    seed: int = 0,
    *,
    shape: tuple[int, ...] | None = None,
    spacing: float | None = None,
    format: Format | None = None,
) -> Manifest:
    """What `make_phantom` would write, without making an image."""
    module, grid = _kind(kind), _grid(kind, shape, spacing, format)
    if n < 1:
        raise UseError("a phantom needs at least one patient", found=f"n={n}", fix="give n=1 or more")
    cases = [case for index in range(n) for case in module.cases(seed, index, grid)]
    name = f"phantom-{_short(kind)}"
    parameters: dict[str, Any] = {"n": n, "seed": seed, "shape": list(grid.shape), "spacing": grid.spacing}
    images = len({case.image for case in cases})
    return Manifest(
        name=name,
        licence="CC0-1.0",
        citation="Synthetic images made by smartlab.",
        homepage="",
        source=Source(
            kind="phantom",
            location=_short(kind),
            size_gb=round(images * module.megabytes(grid) / 1000, 2),
            parameters=parameters | {"format": grid.format},
            notes=f"made on this machine: smartlab data phantom {_short(kind)} --n {n} --seed {seed}",
        ),
        cases_file=f"{name}.csv",
        all_cases=cases,
        **module.DESCRIPTION,
    )


def _short(kind: str) -> str:
    return kind.removeprefix("phantom-")


def _kind(kind: str) -> ModuleType:
    one_of("unknown phantom", _short(kind), _KINDS)
    return importlib.import_module(_KINDS[_short(kind)])


def _grid(kind: str, shape: tuple[int, ...] | None, spacing: float | None, format: str | None) -> Grid:
    """The grid asked for, checked: a person must fit, and lesions must be visible."""
    module = _kind(kind)
    default: Grid = module.DEFAULT
    grid = Grid(
        tuple(int(v) for v in (shape or default.shape)),
        float(spacing or default.spacing),
        format or default.format,
    )
    if len(grid.shape) != len(default.shape):
        raise UseError(
            f"shape has {len(grid.shape)} numbers", found=grid.shape, expected=f"such as {default.shape}"
        )
    if grid.format not in module.FORMATS:
        raise UseError(
            f"a {_short(kind)} phantom cannot be written so", found=grid.format, expected=module.FORMATS
        )
    least, most = module.FIELD_MM
    for size in grid.shape:
        if not least <= size * grid.spacing <= most:
            raise UseError(
                "field of view does not suit the phantom",
                found=f"{size} × {grid.spacing} mm = {size * grid.spacing:.0f} mm",
                expected=f"{least} to {most} mm",
                fix=f"choose a spacing of {least / size:.2g} to {most / size:.2g} mm",
            )
    return grid


def _same_cohort(path: Path, manifest: Manifest) -> None:
    """Refuse to mix two phantoms in one folder; a larger n of the same one may continue."""
    kind = manifest.source.location
    settings = {"kind": kind} | manifest.source.parameters
    settings |= {"drawing": DRAWING[kind]} if DRAWING[kind] > 1 else {}
    settings.pop("n")
    if path.exists():
        there = json.loads(path.read_text())
        if there != settings:
            other = {k: there.get(k) for k in settings | there if settings.get(k) != there.get(k)}
            raise UseError(
                "holds another phantom",
                path=path.parent,
                found=other,
                expected={k: settings.get(k) for k in other},
                fix="choose another folder, or the same settings",
            )
        return
    if others := sorted(f.name for f in path.parent.glob("[!.]*")):
        raise UseError(
            "holds files that are no phantom, and none is drawn among them",
            path=path.parent,
            found=some(others),
            expected="a new or an empty folder, or one that holds this phantom",
            fix=f"for data of your own name them instead of {manifest.name}: --data {path.parent}",
        )
    with whole(path) as temporary:
        temporary.write_text(json.dumps(settings, indent=1) + "\n")
