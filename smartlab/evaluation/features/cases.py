"""What is known about each row of a table of features: patient, split, labels, where it is.

Cases and patients are named by the salted keys of the store, never by their ids. Nodules of PNG stacks get
the same keys. Which case a key is stands in a table beside the user's own images, and nowhere else.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from smartlab.core.errors import DataError
from smartlab.core.places import KEYS
from smartlab.data.cohort.manifest import Manifest, load_manifest
from smartlab.data.cohort.png_stacks import read_stack
from smartlab.data.cohort.privacy import hashed, salt, scrub
from smartlab.data.store.store import Store


def lesion_rows(store: Store, keys: list[str], manifest: Manifest) -> pd.DataFrame:
    """One row per case of a store, in this order."""
    table = store.cases.loc[keys]
    return _frame(
        {
            "case": keys,
            **{name: list(table[name]) for name in ("patient", "image", "split", "fold")},
            **{f"label:{n}": [labels.get(n) for labels in table.labels] for n in manifest.labels},
            **{name: list(table[name]) for name in ("center_mm", "diameter_mm")},
        }
    )


def scan_rows(store: Store, images: Sequence[int], manifest: Manifest, by: str) -> pd.DataFrame:
    """One row per image or patient; "rows" has the positions in `images` it stands for."""
    cases = store.cases[store.cases.image.isin(images)].reset_index()
    groups = list(cases.groupby(by, sort=False))
    place: dict[Any, int] = {image: k for k, image in enumerate(images)}
    if by == "image":
        groups.sort(key=lambda group: place[group[0]])
    return _frame(
        {
            "case": [own.key.iloc[0] for _, own in groups],
            **{n: [own[n].iloc[0] for _, own in groups] for n in ("patient", "image", "split", "fold")},
            **{f"label:{n}": [_agreed(own.labels, n) for _, own in groups] for n in manifest.labels},
            "rows": [[place[i] for i in dict.fromkeys(own.image)] for _, own in groups],
        }
    )


def write_keys(manifest: Manifest, root: Path) -> str | None:
    """Write which key is which case, patient and image, below `root` where these names are known anyway.

    Returns the file's name; None where nothing can be written there.
    """
    key, names = salt(), ["case_key", "case", "patient_key", "patient", "image_key", "image"]
    rows = [
        [hashed(key, kind, name) if i == 0 else name for kind, name in ids for i in (0, 1)]
        for case in load_manifest(manifest, root).cases
        for ids in [(("case", case.id), ("patient", case.patient), ("image", case.image_key))]
    ]
    temporary = root / f".{KEYS}.{os.getpid()}.tmp"
    try:
        pd.DataFrame(rows, columns=names).to_csv(temporary, index=False)
        os.replace(temporary, root / KEYS)
    except OSError as error:
        warnings.warn(f"{root / KEYS}: not written ({error.strerror}); results keep their keys", stacklevel=2)
        return None
    return KEYS


class Stacks:
    """The nodules of a folder of PNG stacks that can be used, read one by one.

    about: a row per nodule; `image` is its position.   extents: (n, 3) voxels of its box.
    facts: "manifest", "failed" (key -> reason).        fingerprint: hash of all pixels and classes.
    """

    def __init__(self, manifest: Manifest, root: Path) -> None:
        self.manifest, self.root = manifest, root
        self.cases, failed, extents = [], {}, []
        key, digest = salt(), hashlib.sha256()
        for case in manifest.all_cases:
            try:
                if case.excluded:
                    raise DataError(case.excluded)
                stack = read_stack(case.locate(root))
            except DataError as error:
                reason = error.reason
                failed[hashed(key, "case", case.id)] = scrub(reason, [case.patient, *case.id.split("/")])
                continue
            inside = np.argwhere(stack)
            extents.append(inside.max(0) - inside.min(0) + 1)
            digest.update(f"{stack.shape} {sorted(case.labels.items())}".encode() + stack.tobytes())
            self.cases.append(case)
        if not self.cases:
            raise DataError(
                f"no nodule of {manifest.name} can be used", path=root, found=f"{len(failed)} that cannot"
            )
        self.extents, self.fingerprint = np.array(extents), digest.hexdigest()
        self.facts: dict[str, Any] = {"manifest": manifest.name, "failed": failed}
        self.about = _frame(
            {
                "case": [hashed(key, "case", c.id) for c in self.cases],
                "patient": [hashed(key, "patient", c.patient) for c in self.cases],
                "image": list(range(len(self.cases))),
                "split": [c.split for c in self.cases],
                "fold": [c.fold for c in self.cases],
                **{f"label:{n}": [c.labels.get(n) for c in self.cases] for n in manifest.labels},
            }
        )

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, position: int) -> np.ndarray:
        """(X, Y, Z) uint8, 0 outside the nodule."""
        return read_stack(self.cases[position].locate(self.root))


def read_stacks(manifest: Manifest | str | Path, root: str | Path) -> Stacks:
    """The stacks of a manifest below `root`, listed there if the manifest lists none."""
    return Stacks(load_manifest(manifest, root), Path(root))


def _agreed(labels: Iterable[dict[str, Any]], name: str) -> Any:
    """The value that all cases with this label share, else None."""
    values = [own[name] for own in labels if own.get(name) is not None]
    return values[0] if values and all(v == values[0] for v in values) else None


def _frame(columns: dict[str, list[Any]]) -> pd.DataFrame:
    """Columns as they are: pandas would turn missing folds into floats and lists into rows."""
    return pd.DataFrame({name: pd.Series(values, dtype=object) for name, values in columns.items()})
