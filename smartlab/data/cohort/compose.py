"""Build the shipped manifests from public indices, by the rules in `data_manifests/recipes`. Same inputs, same file."""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from typing import Any

from smartlab.core.errors import UseError, one_of
from smartlab.data.cohort.manifest import Manifest, manifest_folder

# manifest -> the recipe, a function of data_manifests/recipes; archives have none, their files say all
BUILDERS = {
    "lidc-nodules": "lidc_nodules.build",
    "cbis-ddsm": "cbis.build",
    "ct-open": "open_ct.build",
    "nsclc-radiogenomics": "tcia.nsclc_radiogenomics",
    "nsclc-radiomics": "tcia.nsclc_radiomics",
    "nsclc-interobserver": "tcia.nsclc_interobserver",
    "pancreas-ct": "tcia.pancreas_ct",
}
BESIDE_IMAGES = {"dagman-segment": "dagman.segment"}  # not shipped: they write masks below the root


def compose(name: str, out: str | Path | None = None, **inputs: Any) -> Manifest:
    """Build one of `BUILDERS` or `BESIDE_IMAGES`; with `out`, a folder, also write it there.

    inputs: `annotations` (lidc-nodules), `tables` (cbis-ddsm), `rules` (ct-open), `root` and `annotations`
    (dagman-segment).
    """
    builders = BUILDERS | BESIDE_IMAGES
    one_of("no manifest", name, builders, " to compose")
    module, function = builders[name].split(".")
    build = getattr(recipe(module), function)
    accepted = inspect.signature(build).parameters
    if unknown := [key for key in inputs if key not in accepted]:
        raise UseError(f"{name} does not take `{unknown[0]}`", expected=list(accepted) or "no inputs")
    if "root" in accepted and "root" not in inputs:
        raise UseError(f"{name} is composed beside its images: where are they?", fix="give root (--root)")
    manifest: Manifest = build(**inputs)
    if out is not None:
        manifest.save(Path(out) / f"{name}.json")
    return manifest


def recipe(module: str) -> Any:
    """A module of `data_manifests/recipes`, which lies beside the shipped manifests and is no part of the library."""
    package = "smartlab_recipes"
    if package not in sys.modules:
        folder = manifest_folder() / "recipes"
        spec = importlib.util.spec_from_file_location(
            package, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        sys.modules[package] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
    return importlib.import_module(f"{package}.{module}")
