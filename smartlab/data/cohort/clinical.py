"""Clinical covariates from a CSV: checked once, imputed and encoded inside every fold.

The file has a column `patient` and any others. Patients are named as in the manifest; where a table of
features knows them by their salted keys only, names are hashed to find them. A column whose known values are all numbers is numeric,
any other is categorical. Empty cells are missing. Only names of columns are ever written anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.privacy import hashed, salt

MOST_CATEGORIES = 20  # more look like an identifier or free text


@dataclass(frozen=True)
class Covariates:
    """One row per patient, in the order asked for: float columns are numeric, others categorical."""

    frame: pd.DataFrame

    def encode(self, train: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Numbers for `rows`, (n, k): missing values become the median or the most frequent category of
        the training rows; categories become one column each; one that training never saw is all zeros."""
        columns = []
        for name in map(str, self.frame.columns):
            column = self.frame[name]
            known = column.iloc[train].dropna()
            if column.dtype.kind == "f":
                filler = known.median() if len(known) else 0.0
                columns.append(column.iloc[rows].fillna(filler).to_numpy(float)[:, None])
            elif len(known):
                values = column.iloc[rows].fillna(known.mode()[0]).to_numpy()
                columns.append((values[:, None] == np.array(sorted(known.unique()))).astype(float))
        return np.hstack(columns) if columns else np.zeros((len(rows), 0))

    def summary(self) -> dict[str, str]:
        """Kind and missing values of every column, for the facts of a result."""
        out = {}
        for name in map(str, self.frame.columns):
            missing = int(self.frame[name].isna().sum())
            kind = "numeric" if self.frame[name].dtype.kind == "f" else "categorical"
            out[name] = f"{kind}, {missing} missing" if missing else kind
        return out


def read_covariates(
    path: str | Path, patients: Sequence[str], columns: Sequence[str] | None = None
) -> Covariates:
    """Covariates of these patients; patients of the file that are not asked for are left out."""
    path = Path(path)
    if not path.is_file():
        raise UseError("no such file of covariates", path=path, expected="a CSV with a column 'patient'")
    try:
        table = pd.read_csv(path, dtype=str, skipinitialspace=True, keep_default_na=True)
    except (ValueError, UnicodeDecodeError) as error:
        raise DataError("cannot be read as CSV", path=path, found=type(error).__name__) from None
    if "patient" not in table:
        raise DataError("has no column 'patient'", path=path, found=", ".join(map(str, table.columns[:8])))
    if table.patient.isna().any():
        raise DataError(
            "a row names no patient", path=path, found=f"line {table.patient.isna().argmax() + 2}"
        )
    asked, names = set(map(str, patients)), table.patient.str.strip()
    if not asked & set(names):
        key = salt()
        names = names.map(lambda name: hashed(key, "patient", name))
    table["patient"] = names
    wanted = [c for c in table.columns if c != "patient"] if columns is None else list(columns)
    if not wanted or (unknown := [c for c in wanted if c not in table]):
        raise UseError(
            "has no covariates" if not wanted else f"has no column {unknown[0]!r}",
            path=path,
            found=", ".join(map(str, table.columns)),
        )
    if (twice := table.patient.duplicated()).any():
        raise DataError(
            "a patient has two rows", path=path, found=f"first again in line {twice.argmax() + 2}"
        )
    absent = sorted(asked - set(table.patient))
    if absent:
        raise DataError(
            f"{len(absent)} of {len(patients)} patients have no row",
            path=path,
            found=f"first missing: {absent[0][:8]}…",
            expected="a row for every patient, named as in the manifest; empty cells where unknown",
        )
    chosen = table.set_index("patient").loc[list(map(str, patients)), wanted]
    return Covariates(
        pd.DataFrame({name: _typed(chosen[name], path) for name in wanted}).reset_index(drop=True)
    )


def _typed(column: pd.Series, path: Path) -> pd.Series:
    """Floats where every known value is a number, else text; refuses what cannot be a covariate."""
    known = column.dropna()
    if not len(known):
        raise DataError(f"column {column.name!r} is empty for these patients", path=path)
    numbers = pd.to_numeric(column, errors="coerce")
    if numbers.notna().sum() == len(known):
        if not np.isfinite(numbers.dropna()).all():
            raise DataError(f"column {column.name!r} holds infinite values", path=path)
        return numbers.astype(float)
    if known.nunique() > MOST_CATEGORIES:
        raise DataError(
            f"column {column.name!r} is neither numeric nor a category",
            path=path,
            found=f"{known.nunique()} different values that are not all numbers",
            expected=f"numbers, or at most {MOST_CATEGORIES} categories",
            fix="name the columns to use",
        )
    return column.astype(object)
