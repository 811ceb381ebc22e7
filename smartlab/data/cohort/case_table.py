"""Cases as CSV: nested fields become columns such as `label.malignancy` and `mask.tumour`.

Lists (positions, multi-label values) are joined by "|"; an empty cell means that the field is absent.
"""

from __future__ import annotations

import csv
import io
from collections import Counter
from pathlib import Path
from typing import Any

from smartlab.core.errors import DataError, counted
from smartlab.data.cohort.case import Case, LabelValue

MISSING = (
    {"", "na", "n/a", "n.a.", "nan", "null", "none", "missing", "unknown", "not available"}
    | set("?-.")
    | {"--"}
)
_NAMED = {"masks": "mask", "channels": "channel"}  # field -> word before the names in it
_LESION = ("center_mm", "box_mm", "diameter_mm", "frame")


def says_missing(text: str) -> bool:
    """Whether a value is one of the usual words for having none."""
    return text.strip().casefold() in MISSING


def cases_to_csv(cases: list[Case]) -> str:
    """The table of these cases, one row each."""
    rows = [_flat(case) for case in cases]
    columns = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, columns, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue()


def _flat(case: Case) -> dict[str, str]:
    row: dict[str, str] = {}
    for name, value in case.model_dump(mode="json", exclude_none=True).items():
        if name == "labels":
            row |= {f"label.{k}": _text(v) for k, v in value.items() if v is not None}
        elif name in _NAMED:
            row |= {f"{_NAMED[name]}.{k}": v for k, v in value.items()}
        elif name == "lesion":
            row |= {k: _text(v) for k, v in value.items()}
        else:
            row[name] = _text(value)
    return row


def _text(value: Any) -> str:
    return "|".join(map(str, value)) if isinstance(value, list) else str(value)


def cases_from_csv(path: Path, labels: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of the table as nested fields; `labels` (name -> spec) says how to read label values."""
    cases = []
    for line, row in read_rows(path):
        if lacking := [name for name in ("id", "patient") if not row.get(name)]:
            raise DataError(
                f"a case has no {lacking[0]}",
                path=path,
                found=f"line {line}",
                expected="id and patient in every row",
            )
        cases.append(_nested({name: text for name, text in row.items() if text}, labels))
    return cases


Row = tuple[int, dict[str, str]]  # line in the file, column -> text


def read_rows(path: Path, separator: str | None = None) -> list[Row]:
    """The rows of a CSV as spreadsheets write it: byte order mark, semicolons, tabs, empty rows or not."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError("cannot read this table", path=path, found=error) from None
    if raw[:2] == b"PK":
        raise DataError("is a workbook, not a CSV", path=path, fix="save it as CSV UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            "is not a CSV in UTF-8", path=path, found=f"line {line}", fix="save it as CSV UTF-8"
        ) from None
    separator = separator or max(",;\t", key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        columns = [name.strip() for name in next(reader, [])]
        lines = [(reader.line_num, cells) for cells in reader if "".join(cells).strip()]
    except csv.Error as error:
        raise DataError("is not a CSV", path=path, found=f"line {reader.line_num}: {error}") from None
    while columns and not columns[-1]:
        columns.pop()
    again = Counter(map(str.casefold, columns))
    problems = [f"column {name!r} is there {n} times" for name, n in again.items() if name and n > 1]
    problems += ["a column has no name"] if "" in columns else []
    problems += [
        f"line {line} has {len(cells)} cells for {len(columns)} columns: quote texts with commas"
        for line, cells in lines
        if any(cells[len(columns) :])
    ]
    if problems:
        raise all_at_once("is no table", path, problems)
    width = len(columns)
    return [(line, dict(zip(columns, (cells + [""] * width)[:width], strict=True))) for line, cells in lines]


def all_at_once(what: str, path: Path, problems: list[str]) -> DataError:
    """One error of everything that is wrong in a file."""
    return DataError(what, path=path, found=counted(problems), fix="correct the table, nothing was written")


def _nested(row: dict[str, str], labels: dict[str, Any]) -> dict[str, Any]:
    case: dict[str, Any] = {}
    for name, text in row.items():
        if name.startswith("label."):
            label = name.removeprefix("label.")
            case.setdefault("labels", {})[label] = _label(text, labels.get(label, {}).get("kind", "text"))
        elif field := next((f for f, word in _NAMED.items() if name.startswith(f"{word}.")), None):
            case.setdefault(field, {})[name.partition(".")[2]] = text
        elif name in _LESION:
            value = text.split("|") if name in ("center_mm", "box_mm") else text
            case.setdefault("lesion", {})[name] = value
        else:
            case[name] = text
    return case


def _label(text: str, kind: str) -> LabelValue:
    if kind == "multilabel":
        return text.split("|")
    if kind == "numbers":
        return [float(part) for part in text.split("|")]
    if kind in ("number", "time", "event"):
        try:
            return float(text)
        except ValueError:
            return text  # refused later, with the case named
    return text
