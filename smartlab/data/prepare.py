"""From a data configuration to an open store, doing only what is missing.

Phantoms are made, stores are built, both in a cache (`$SMARTLAB_CACHE`, else `~/.cache/smartlab`)
unless the configuration names a place. Real cohorts must be on disk: `smartlab data fetch`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from smartlab.config import DataConfig
from smartlab.data.manifest import Manifest, load_manifest
from smartlab.data.privacy import salt
from smartlab.data.store import Store, build_store, open_store
from smartlab.errors import UseError


def cache_folder() -> Path:
    """Where phantoms and stores go when the configuration names no place."""
    return Path(os.environ.get("SMARTLAB_CACHE") or Path.home() / ".cache" / "smartlab")


def locate_images(
    data: DataConfig, progress: bool = True, given: Manifest | None = None
) -> tuple[Manifest, Path]:
    """The manifest (`given`, or that of the configuration) and the folder of its images; makes the phantom if need be."""
    man = given or load_manifest(data.manifest)
    salt()  # an unusable one is refused now, not after minutes of drawing phantoms
    if man.source.kind == "phantom":
        made, root = _phantom(man, data, progress)
        if given is None:
            return made, root
        drawn = {case.id for case in made.all_cases}  # of the cases that were given, those that are there
        kept = [case for case in given.all_cases if case.id in drawn]
        return given.model_copy(update={"all_cases": kept}), root
    if data.root is None:
        raise UseError(
            f"data.root is not set: where are the images of {man.name!r}?",
            fix=f"fetch them with `smartlab data fetch {man.name} --root DIR`, then set data.root=DIR",
        )
    return man, Path(data.root)


def prepare_store(
    data: DataConfig, progress: bool = True, located: tuple[Manifest, Path] | None = None
) -> tuple[Manifest, Store]:
    """The manifest and store of a configuration; makes the phantom and builds the store if need be.

    located: what `locate_images` found, where the caller has asked it already.
    """
    man, root = located or locate_images(data, progress)
    name = f"{root.name}-store-{data.spacing:g}mm" + ("-percentile" if data.grey == "percentile" else "")
    store = Path(data.store) if data.store else root.parent / name
    report = build_store(
        man,
        root,
        store,
        workers=data.workers,
        spacing=data.spacing,
        grey=data.grey,
        progress=progress,
    )
    if progress and report.failed:
        print(report)
    return man, open_store(store)


def _phantom(man: Manifest, data: DataConfig, progress: bool) -> tuple[Manifest, Path]:
    from smartlab.data.phantom import make_phantom

    settings = dict(man.source.parameters)
    every = int(settings.pop("n"))
    n = data.phantom_cases or every
    seed = int(settings.pop("seed"))
    root = Path(data.root) if data.root else cache_folder() / f"{man.name}-{n}-seed{seed}"
    if progress and n < every and not (root / "manifest.json").exists():
        print(f"drawing {n} of {every} phantom patients; more: data.phantom_cases={every}", file=sys.stderr)
    kind = man.source.location.removeprefix("phantom-")
    shape = settings.get("shape")
    made = make_phantom(
        kind,
        root,
        n=n,
        seed=seed,
        shape=None if shape is None else tuple(shape),
        spacing=settings.get("spacing"),
        workers=data.workers,
        progress=progress,
    )
    return made, root
