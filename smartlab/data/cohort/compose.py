"""Build manifests: from public indices by rule, from a fetched folder, or with a clinical table added.

- `compose("ct-open", "data_manifests")` rebuilds a shipped manifest; the rules and the sources are
  in `data_manifests/recipes`. Same inputs, same file.
- `cases_from_folder(manifest, root)` lists the cases of an archive that has been fetched.
- `attach_table(manifest, "clinical.csv")` adds labels from a table with a row per patient.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.case_table import read_rows, says_missing
from smartlab.data.cohort.manifest import Case, LabelSpec, LabelValue, Lesion, Manifest, manifest_folder

NUMERIC = ("number", "time", "event")

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
    if name not in builders:
        near = difflib.get_close_matches(name, builders, 1)
        raise UseError(
            "no such manifest to compose",
            path=name,
            expected=f"one of {', '.join(builders)}",
            fix=f"did you mean {near[0]}?" if near else None,
        )
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


# ---- cases of a fetched archive ------------------------------------------------------------------


def cases_from_folder(manifest: Manifest, root: str | Path) -> Manifest:
    """The same manifest with the cases found below `root` by its `source.parameters["layout"]`:

    image      regular expression on the path below the root; its groups `id`, `fold`, `part` …
    masks      {name: path} and `label_map`: paths in which {id} and the other groups are filled in
    masks_in   a folder of binary masks, each named for what it shows
    splits     {part: split}, or `table` = {file, separator, key, split} for a split column
    lesions    {file, key, center, diameter}: a table of lesion centres (DICOM LPS mm), many per image
    patients   "idc" where `id` is a series UID whose patient the index of public series knows
    npz        MedMNIST's arrays, written out as one NIfTI per sample by `fetch`; `label` and `classes`
    """
    layout = manifest.source.parameters.get("layout")
    if layout is None:
        raise UseError(f"{manifest.name} lists its cases itself and has no folder layout")
    root = Path(root)
    if "stacks" in layout:
        from smartlab.data.cohort.png_stacks import scan_png_stacks

        return scan_png_stacks(root, manifest)
    cases = list(_samples(layout, root) if "npz" in layout else _images(layout, root))
    if not cases:
        raise DataError(
            f"no image of {manifest.name} found",
            path=root,
            expected=f"files like {layout.get('image') or layout['npz']}",
            fix=f"run `smartlab data fetch {manifest.name} --root {root}`",
        )
    return Manifest.model_validate(dict(manifest) | {"all_cases": cases, "cases_file": "cases.csv"})


def _images(layout: Mapping[str, Any], root: Path) -> Iterable[Case]:
    pattern = re.compile(layout["image"])
    found = {m["id"]: (path, m) for path in _files(root) if (m := pattern.fullmatch(path))}
    patients = _idc_patients(list(found)) if layout.get("patients") == "idc" else {}
    splits = _split_column(layout["table"], root) if "table" in layout else {}
    lesions = _lesions(layout["lesions"], root) if "lesions" in layout else {}
    for name, (path, match) in sorted(found.items()):
        groups = match.groupdict()
        scan = Case(
            id=name,
            patient=patients.get(name, name),
            image=path,
            masks=_masks(layout, root, path, groups),
            label_map=layout["label_map"].format(**groups) if "label_map" in layout else None,
            split=splits.get(name) or layout.get("splits", {}).get(groups.get("part")),
            fold=int(groups["fold"]) if "fold" in groups else None,
        )
        own = lesions.get(name, [])
        for k, lesion in enumerate(own, start=1):
            yield scan.model_copy(update={"id": f"{name}-{k}", "lesion": lesion})
        if not own:
            yield scan


def _files(root: Path) -> Iterable[str]:
    """Paths below the root as in a manifest; links to other folders are not followed."""
    for folder, _, names in os.walk(root):
        for name in names:
            yield (Path(folder) / name).relative_to(root).as_posix()


def _masks(layout: Mapping[str, Any], root: Path, image: str, groups: Mapping[str, str]) -> dict[str, str]:
    masks = {name: path.format(**groups) for name, path in layout.get("masks", {}).items()}
    if "masks_in" in layout:
        folder = (root / image).parent / layout["masks_in"]
        for path in sorted(folder.glob("*.nii.gz")):
            masks[path.name.removesuffix(".nii.gz")] = path.relative_to(root).as_posix()
    return masks


def _idc_patients(series_uids: list[str]) -> dict[str, str]:
    from smartlab.data.cohort import idc

    return {uid: row["PatientID"] for uid, row in idc.lookup(series_uids, ["PatientID"]).items()}


def _rows(path: Path, separator: str = ",") -> list[dict[str, str]]:
    try:
        return [row for _, row in read_rows(path, separator)]
    except OSError as error:
        raise DataError("cannot read this table", path=path, found=error) from None


def _split_column(table: Mapping[str, str], root: Path) -> dict[str, str]:
    found = next(
        (root / path for path in _files(root) if Path(path).name == table["file"]), root / table["file"]
    )
    return {row[table["key"]]: row[table["split"]] for row in _rows(found, table["separator"])}


def _lesions(table: Mapping[str, Any], root: Path) -> dict[str, list[Lesion]]:
    lesions: dict[str, list[Lesion]] = defaultdict(list)
    for row in _rows(root / table["file"]):
        left, posterior, superior = (float(row[column]) for column in table["center"])
        diameter = float(row[table["diameter"]])
        lesions[row[table["key"]]].append(
            Lesion(center_mm=(-left, -posterior, superior), diameter_mm=diameter)
        )
    return lesions


def _samples(layout: Mapping[str, Any], root: Path) -> Iterable[Case]:
    """Samples of a MedMNIST archive, as `fetch` wrote them out, with the labels of the archive."""
    import numpy as np

    path = root / layout["npz"]
    if not path.is_file():
        return
    with np.load(path, allow_pickle=False) as arrays:
        for split in ("train", "val", "test"):
            for k, value in enumerate(arrays[f"{split}_labels"].ravel().tolist()):
                name = f"{split}-{k:05d}"
                label = layout["classes"][int(value)]
                yield Case(
                    id=name,
                    patient=name,
                    image=sample_path(layout, split, k),
                    labels={layout["label"]: label},
                    split=split,  # type: ignore[arg-type]
                )


def sample_path(layout: Mapping[str, Any], split: str, k: int) -> str:
    """Where `fetch` writes sample `k` of a split, below the root."""
    return f"{Path(layout['npz']).stem}/{split}-{k:05d}.nii.gz"


# ---- clinical tables ----


def attach_table(
    manifest: Manifest,
    table: str | Path,
    key: str | None = None,
    columns: Mapping[str, str] | None = None,
    kinds: Mapping[str, str] | None = None,
) -> Manifest:
    """The manifest with labels from a CSV that has one row per patient.

    key: the column that holds the patient, as the manifest's cases name it.
    columns: label -> column. kinds: label -> kind of label (see `LabelSpec`); by default "binary"
    where there are two values, "number" where every value is one, else "multiclass". All three default to what the manifest says in
    `source.parameters["clinical"]`. Empty cells give no label; patients without a row neither.

    >>> attach_table(man, "labels.csv", key="Case ID", columns={"egfr": "EGFR mutation status"})
    """
    stated = manifest.source.parameters.get("clinical", {})
    key, columns = key or stated.get("key"), columns or stated.get("columns")
    kinds = {**stated.get("kinds", {}), **(kinds or {})}
    if not key or not columns:
        raise UseError(
            f"{manifest.name} does not say how to read a clinical table", fix="give `key` and `columns`"
        )
    rows = _by_patient(Path(table), key, columns)
    matched = {case.patient for case in manifest.all_cases} & rows.keys()
    if not matched:
        raise DataError(
            f"no patient of {manifest.name} is in this table",
            path=table,
            found=f"{key} such as {next(iter(rows), 'none')!r}",
            expected=f"such as {next((c.patient for c in manifest.all_cases), 'none')!r}",
            fix="name the column with the patients as `key`",
        )
    used = [rows[patient] for patient in sorted(matched)]
    specs = {label: _spec(label, [row[label] for row in used], kinds.get(label)) for label in columns}
    cases = [_labelled(case, rows.get(case.patient, {}), specs) for case in manifest.all_cases]
    lacking = len({c.patient for c in manifest.all_cases}) - len(matched)
    note = f"Labels {', '.join(columns)} from {Path(table).name}; {lacking} patient(s) have no row in it."
    for label, spec in specs.items():
        unread = [row[label] for row in used if row[label] and _value(row[label], spec) is None]
        why = "are not numbers" if spec.kind in NUMERIC else "say that there is none"
        note += f" {len(unread)} value(s) of {label} {why}, such as {unread[0]!r}." if unread else ""
    return Manifest.model_validate(
        dict(manifest)
        | {"labels": manifest.labels | specs, "all_cases": cases, "notes": [*manifest.notes, note]}
    )


def _by_patient(path: Path, key: str, columns: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """patient -> {label: text}; two rows of one patient must agree."""
    rows = [
        {
            (name or "").strip(): (value or "").strip()
            for name, value in row.items()
            if isinstance(value, str | None)
        }
        for row in _rows(path)
    ]
    present = list(rows[0]) if rows else []
    for column in (key, *columns.values()):
        if column not in present:
            near = difflib.get_close_matches(column, present, 1)
            raise DataError(
                f"has no column {column!r}",
                path=path,
                found=f"columns {', '.join(present) or 'none'}",
                fix=f"did you mean {near[0]!r}?" if near else "check `key` and `columns`",
            )
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        values = {label: row[column] for label, column in columns.items()}
        if found.setdefault(row[key], values) != values:
            raise DataError(f"two rows for {row[key]!r} disagree", path=path, fix="keep one row per patient")
    return found


def _spec(label: str, texts: list[str], kind: str | None) -> LabelSpec:
    values = sorted({text for text in texts if text and not (kind is None and says_missing(text))})
    numeric = values and all(_number(v) is not None for v in values)
    kind = kind or ("binary" if len(values) == 2 else "number" if numeric else "multiclass")
    classes = values if kind in ("binary", "multiclass") else []
    return LabelSpec.model_validate(
        {"kind": kind, "classes": classes, "description": "from a clinical table"}
    )


def _labelled(case: Case, row: Mapping[str, str], specs: Mapping[str, LabelSpec]) -> Case:
    labels: dict[str, LabelValue] = dict(case.labels)
    for label, spec in specs.items():
        if (text := row.get(label)) and (value := _value(text, spec)) is not None:
            labels[label] = value
    return case.model_copy(update={"labels": labels})


def _value(text: str, spec: LabelSpec) -> LabelValue:
    """What a cell says; None where it spells out a missing value ("N/A", "Not collected")."""
    if spec.kind in NUMERIC:
        return _number(text)
    return text if not spec.classes or text in spec.classes else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
