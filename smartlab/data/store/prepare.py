"""From what the user calls the data to an open store, doing only what is missing.

`find_data` says what `--data`, `data.manifest` and `data.root` mean, and every entry point asks it. Phantoms are
made in a cache (`$SMARTLAB_CACHE`, else `~/.cache/smartlab`), stores are built beside their images unless one that
was made from them is known. Public cohorts must be on disk: `smartlab data fetch`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from smartlab.core.errors import UseError
from smartlab.core.places import remembered_store
from smartlab.core.settings import DataConfig
from smartlab.data.cohort.manifest import Manifest, load_manifest, shipped_manifests
from smartlab.data.cohort.privacy import salt
from smartlab.data.images.grid import Spacing, in_mm
from smartlab.data.store import index
from smartlab.data.store.build import build_store, settings_for
from smartlab.data.store.current import is_current, made_from, state_of
from smartlab.data.store.store import Store, open_store


def find_data(
    data: str | Path | Manifest, root: str | Path | None = None, progress: bool = True
) -> tuple[Manifest, Path | None]:
    """The manifest that `data` names, with its cases, and the folder of its images where that is known.

    data, root: as for `name_data`. The cases of an archive, which its manifest does not list, are those found there.
    """
    man, folder = name_data(data, root, progress)
    return load_manifest(man, folder), folder


def name_data(
    data: str | Path | Manifest, root: str | Path | None = None, progress: bool = True
) -> tuple[Manifest, Path | None]:
    """What `--data` and `--root` mean: the manifest as it stands, and the folder of its images where that is known.

    data: a shipped name; a manifest.json, whose images are below its own folder or the one it tells; a folder with
          a manifest.json; any other folder, which is scanned; or a manifest.
    root: where the images are instead.
    """
    if isinstance(data, Manifest):
        man, home = data, None
    elif (path := Path(data)).suffix == ".json" or (path / "manifest.json").is_file():
        man = load_manifest(data)
        home = _home(path, man)
    elif path.is_dir() and str(data) not in shipped_manifests():
        man, home = _scanned(path, progress), path
    else:
        man, home = load_manifest(data), None
    return man, home if root is None else Path(root)


def _scanned(folder: Path, progress: bool) -> Manifest:
    from smartlab.data.cohort.scan import scan_folder  # it imports what opens every format

    return scan_folder(folder, progress=progress)


def _home(path: Path, man: Manifest) -> Path | None:
    """Where the images of a manifest file are: in the folder it tells, else beside it if they are there."""
    beside = path if path.is_dir() else path.parent
    if man.source.kind == "local" and man.source.location:
        return beside / man.source.location
    first = next((case.image for case in man.cases), None)
    return beside if first is None or (beside / first).exists() else None


def locate_images(
    data: DataConfig, progress: bool = True, given: Manifest | None = None
) -> tuple[Manifest, Path]:
    """The manifest (`given`, or that of the configuration) and the folder of its images; makes the phantom if need be."""
    man, root = find_data(given or data.manifest, data.root, progress)
    salt()  # an unusable one is refused now, not after minutes of drawing phantoms
    if man.source.kind == "phantom" and root is not None and _is_there(man, root, data.manifest):
        few = {*man.patients[: data.phantom_cases]}
        return man.model_copy(update={"all_cases": [c for c in man.all_cases if c.patient in few]}), root
    if man.source.kind == "phantom":
        made, root = _phantom(man, root, data, progress)
        if given is None:
            return made, root
        drawn = {case.id for case in made.all_cases}  # of the cases that were given, those that are there
        kept = [case for case in given.all_cases if case.id in drawn]
        return given.model_copy(update={"all_cases": kept}), root
    if root is None:
        raise UseError(
            f"where are the images of {man.name!r}? No folder was given",
            fix=f"set data.root=DIR (--root DIR); to fetch them first: `smartlab data fetch {man.name} --root DIR`",
        )
    return man, root


def _is_there(man: Manifest, root: Path, named: str) -> bool:
    """Whether a phantom was named by its place and not to be drawn: no patient is added there, nor any lost."""
    return Path(named).exists() and all((root / case.image).exists() for case in man.cases[:1] if case.image)


def prepare_store(
    data: DataConfig, progress: bool = True, located: tuple[Manifest, Path] | None = None
) -> tuple[Manifest, Store]:
    """The manifest and store of a configuration; makes the phantom and builds the store if need be.

    A store that is whole and up to date is opened as it is, also one that may only be read.

    located: what `locate_images` found, where the caller has asked it already.
    """
    man, root = located or locate_images(data, progress)
    store = Path(data.store) if data.store else store_place(man, root, data.spacing, data.grey)
    built = (index.read_header(store) or {}).get("settings", {})
    wanted: Any = settings_for(man, data.spacing).spacing
    for name, asked in (("spacing", wanted), ("grey", data.grey)):
        if built.get(name, asked) != asked:  # built anew in its place, it would be gone for who reads it now
            raise UseError(
                f"this store has another {name}",
                path=store,
                found=built[name],
                expected=f"data.{name}={asked}",
                fix=f"set data.{name}={built[name]}, or another data.store; `smartlab data build` builds one anew",
            )
    as_built = {name: built[name] for name in ("crop_body", "tilt") if name in built}  # not for us to say
    crop, tilt = as_built.get("crop_body", True), as_built.get("tilt", "refuse")
    settings, state = settings_for(man, data.spacing, crop, tilt=tilt, grey=data.grey), state_of(man, root)
    if is_current(store, man, root, settings, state):
        if progress and (failed := (index.read_header(store) or {}).get("failed")):
            print(
                f"{store}: images that failed: {failed}, see {index.FAILURES}; smartlab data build tries again",
                file=sys.stderr,
            )
        return man, open_store(store)
    report = build_store(
        man,
        root,
        store,
        workers=data.workers,
        spacing=data.spacing,
        grey=data.grey,
        progress=progress,
        state=state,
        **as_built,
    )
    if progress and (report.failed or (report.built and report.notes)):
        print(report)
    return man, open_store(store)


def store_place(man: Manifest, root: Path, spacing: Spacing | None = None, grey: str = "voi") -> Path:
    """The store that was made from these images, wherever it is; else where one would be built, beside them."""
    settings = settings_for(man, spacing, grey=grey)
    root = Path(os.path.abspath(root))
    name = f"{root.name}-store-{in_mm(settings.spacing).replace('×', 'x')}mm" + (
        "-percentile" if grey == "percentile" else ""
    )
    usual, wanted = root.parent / name, made_from(man, root, settings, salt())
    for place in (usual, remembered_store(wanted)):
        if place is not None and (index.read_header(place) or {}).get("made_from") == wanted:
            return place
    taken = (index.read_header(usual) or {}).get("manifest", man.name) != man.name
    return usual.with_name(f"{name}-{man.name}") if taken else usual


def _phantom(man: Manifest, root: Path | None, data: DataConfig, progress: bool) -> tuple[Manifest, Path]:
    from smartlab.data.phantoms.make import kept_in, make_like

    every, seed = (int(man.source.parameters[name]) for name in ("n", "seed"))
    n = data.phantom_cases or every
    root = root or kept_in(man.name, n, seed)
    if progress and n < every and not (root / "manifest.json").exists():
        print(f"drawing {n} of {every} phantom patients; more: data.phantom_cases={every}", file=sys.stderr)
    return make_like(man, root, n, data.workers, progress), root
