"""The cases of a dataset that lists none itself, found in the folder of its images.

`source.parameters["layout"]` of the manifest says how the files lie:

    image      regular expression on the path below the root; its groups `id`, `fold`, `part` …
    masks      {name: path} and `label_map`: paths in which {id} and the other groups are filled in
    masks_in   a folder of binary masks, each named for what it shows
    splits     {part: split}, or `table` = {file, separator, key, split} for a split column
    lesions    {file, key, center, diameter}: a table of lesion centres (DICOM LPS mm), many per image
    patients   "idc" where `id` is a series UID whose patient the index of public series knows
    npz        MedMNIST's arrays, written out as one NIfTI per sample by `fetch`; `label` and `classes`
    stacks     PNG slices in folders CLASS/EXAM/NODULE, the class being `label` (`png_stacks.py`)
"""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from smartlab.core.errors import DataError
from smartlab.data.cohort import idc
from smartlab.data.cohort.case import Case, Lesion
from smartlab.data.cohort.case_table import read_rows
from smartlab.data.cohort.png_stacks import list_stacks


def list_cases(name: str, layout: Mapping[str, Any], root: Path) -> list[Case]:
    """The cases of the dataset `name` below `root`."""
    if "stacks" in layout:
        return list_stacks(name, layout["label"], root)
    cases = list(_samples(layout, root) if "npz" in layout else _images(layout, root))
    if not cases:
        raise DataError(
            f"no image of {name} found",
            path=root,
            expected=f"files like {layout.get('image') or layout['npz']}",
            fix=f"run `smartlab data fetch {name} --root {root}`",
        )
    return cases


def _images(layout: Mapping[str, Any], root: Path) -> Iterable[Case]:
    pattern = re.compile(layout["image"])
    found = {m["id"]: (path, m) for path in _files(root) if (m := pattern.fullmatch(path))}
    known = idc.lookup(list(found), ["PatientID"]) if layout.get("patients") == "idc" else {}
    splits = _split_column(layout["table"], root) if "table" in layout else {}
    lesions = _lesions(layout["lesions"], root) if "lesions" in layout else {}
    for name, (path, match) in sorted(found.items()):
        groups = match.groupdict()
        scan = Case(
            id=name,
            patient=known[name]["PatientID"] if known else name,
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


def _split_column(table: Mapping[str, str], root: Path) -> dict[str, str]:
    found = next(
        (root / path for path in _files(root) if Path(path).name == table["file"]), root / table["file"]
    )
    return {row[table["key"]]: row[table["split"]] for _, row in read_rows(found, table["separator"])}


def _lesions(table: Mapping[str, Any], root: Path) -> dict[str, list[Lesion]]:
    lesions: dict[str, list[Lesion]] = defaultdict(list)
    for _, row in read_rows(root / table["file"]):
        left, posterior, superior = (float(row[column]) for column in table["center"])
        diameter = float(row[table["diameter"]])
        lesion = Lesion(center_mm=(-left, -posterior, superior), diameter_mm=diameter)
        lesions[row[table["key"]]].append(lesion)
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
