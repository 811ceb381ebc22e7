"""Clinical tables, a CSV with a row per patient: covariates of a model, or labels of a manifest.

- `read_covariates`: a column `patient` and any others, checked once, imputed and encoded inside every fold.
  Patients are named as in the manifest; where a table of features knows them by their salted keys only, names
  are hashed to find them. A column whose known values are all numbers is numeric, any other categorical.
- `attach_table(manifest, "clinical.csv")` adds labels.

Cells that are empty or say that there is nothing are missing. Only names of columns are ever written anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from smartlab.core.errors import DataError, UseError, near, some
from smartlab.data.cohort.case import Case, LabelSpec, LabelValue
from smartlab.data.cohort.case_table import read_rows, says_missing
from smartlab.data.cohort.manifest import Manifest
from smartlab.data.cohort.privacy import hashed, salt

MOST_CATEGORIES = 20  # more look like an identifier or free text
NUMERIC = ("number", "time", "event")


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
    path, asked = Path(path), list(map(str, patients))
    if not path.is_file():
        raise UseError("no such file of covariates", path=path, expected="a CSV with a column 'patient'")
    rows = read_rows(path)
    present = list(rows[0][1]) if rows else []
    if "patient" not in present:
        raise DataError("has no column 'patient'", path=path, found=some(present, 8))
    wanted = [c for c in present if c != "patient"] if columns is None else list(columns)
    if not wanted or (unknown := [c for c in wanted if c not in present]):
        raise UseError(
            "has no covariates" if not wanted else f"has no column {unknown[0]!r}",
            path=path,
            found=", ".join(present),
        )
    named: dict[str, dict[str, str]] = {}
    for line, row in rows:
        if says_missing(name := row["patient"].strip()):
            raise DataError("a row names no patient", path=path, found=f"line {line}")
        if name in named:
            raise DataError("a patient has two rows", path=path, found=f"first again in line {line}")
        named[name] = row
    if not named.keys() & set(asked):
        key = salt()
        named = {hashed(key, "patient", name): row for name, row in named.items()}
    if absent := sorted(set(asked) - named.keys()):
        raise DataError(
            f"{len(absent)} of {len(asked)} patients have no row",
            path=path,
            found=f"first missing: {absent[0][:8]}…",
            expected="a row for every patient, named as in the manifest; empty cells where unknown",
        )
    texts = {c: [named[patient][c].strip() for patient in asked] for c in wanted}
    frame = pd.DataFrame({c: [None if says_missing(t) else t for t in own] for c, own in texts.items()})
    return Covariates(pd.DataFrame({c: _typed(frame[c], path) for c in wanted}))


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


# ---- labels ----


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
    rows = [{name: text.strip() for name, text in row.items()} for _, row in read_rows(path)]
    present = list(rows[0]) if rows else []
    for column in (key, *columns.values()):
        if column not in present:
            raise DataError(
                f"has no column {column!r}",
                path=path,
                found=f"columns {', '.join(present) or 'none'}",
                fix=near(column, present) or "check `key` and `columns`",
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
