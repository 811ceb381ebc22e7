"""Features of a cohort: one row per case, with everything a task needs to know about that case.

Tasks take a `FeatureTable` and nothing else, so that every encoder, and every trivial baseline, is
treated alike; `features.py` makes them from images.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from smartlab.core.errors import DataError, UseError, unknown
from smartlab.data.cohort.case import LabelSpec


@dataclass(frozen=True)
class FeatureTable:
    """Features and what is known about each row.

    x:     (n, C) float32, finite.
    about: n rows in the same order, with columns "case" (key), "patient", "image", "split" (train, val,
           test or missing), "fold" and one column "label:<name>" for every label of the manifest.
    specs: the manifest's label specifications, by label name.
    facts: encoder, role, data fingerprint, settings: goes into every result.
    """

    x: np.ndarray
    about: pd.DataFrame
    specs: dict[str, LabelSpec]
    facts: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.x.ndim != 2 or len(self.x) != len(self.about):
            raise UseError(
                "features do not fit their table", found=f"{self.x.shape} features, {len(self.about)} rows"
            )
        if not np.isfinite(self.x).all():
            bad = self.about.case[~np.isfinite(self.x).all(1)].iloc[0]
            raise DataError("features are not finite", found=f"first in case {str(bad)[:8]}…")

    def __len__(self) -> int:
        return len(self.x)

    def take(self, rows: np.ndarray) -> FeatureTable:
        """The rows of a boolean mask or of positions."""
        rows = np.flatnonzero(rows) if np.asarray(rows).dtype == bool else np.asarray(rows)
        return FeatureTable(
            self.x[rows], self.about.iloc[rows].reset_index(drop=True), self.specs, self.facts
        )

    def labelled(self, label: str) -> tuple[FeatureTable, np.ndarray, list[str]]:
        """Rows that have this label, its values, and its classes.

        binary and multiclass: values (n,) int, positions in the classes. multilabel: (n, classes) int8.
        number: (n,) float, no classes.
        """
        spec, column = spec_of(self.specs, label), self.about[f"label:{label}"]
        known = column.notna().to_numpy()
        if not known.any():
            raise DataError(f"no case has the label {label!r}")
        kept, values = self.take(known), list(column[known])
        if spec.kind == "multilabel":
            classes = spec.classes or sorted({v for value in values for v in value})
            return kept, np.array([[c in value for c in classes] for value in values], np.int8), classes
        if spec.kind in ("binary", "multiclass"):
            classes = spec.classes or sorted({str(v) for v in values})
            names = [str(v) for v in values]
            return kept, np.array([classes.index(v) for v in names]), classes
        return kept, np.array(values, float), []


def spec_of(specs: dict[str, LabelSpec], label: str) -> LabelSpec:
    """What is known of a label, or an error that says which there are."""
    if label in specs:
        return specs[label]
    if not specs:
        raise UseError(f"no label {label!r} in this manifest", expected="a manifest with labels")
    raise unknown("no label", label, specs, " in this manifest")
