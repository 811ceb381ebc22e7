"""Cases as CSV: nested fields become columns such as `label.malignancy` and `mask.tumour`.

Lists (positions, multi-label values) are joined by "|"; an empty cell means that the field is absent.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartlab.errors import DataError

if TYPE_CHECKING:
    from smartlab.data.manifest import Case, LabelValue

MISSING = {
    "na",
    "n/a",
    "nan",
    "null",
    "none",
    "n.a.",
    "missing",
    "unknown",
    "not available",
    "?",
    "-",
    "--",
    ".",
}
_LESION = ("center_mm", "box_mm", "diameter_mm", "frame")


def says_missing(text: str) -> bool:
    """Whether a value is one of the usual words for having none."""
    return text.strip().lower() in MISSING


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
        elif name == "masks":
            row |= {f"mask.{k}": v for k, v in value.items()}
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


def read_rows(path: Path, separator: str | None = None) -> list[tuple[int, dict[str, str]]]:
    """(line, column -> text) of a CSV as spreadsheets write it, with a byte order mark, semicolons, empty rows or not."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            head = file.readline().strip()
            separator = separator or next((s for s in ";\t" if "id" in head.replace('"', "").split(s)), ",")
            file.seek(0)
            reader = csv.DictReader(file, delimiter=separator)
            rows = [(reader.line_num, row) for row in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError("is not a CSV in UTF-8", path=path, found=error, fix="save it as CSV UTF-8") from None
    for line, row in rows:
        if any(row.pop(None, [])):  # type: ignore[call-overload]
            raise DataError(
                "has more cells than columns", path=path, found=f"line {line}", fix="quote texts with commas"
            )
    texts = [(line, {name: text or "" for name, text in row.items()}) for line, row in rows]
    return [(line, row) for line, row in texts if "".join(row.values()).strip()]


def _nested(row: dict[str, str], labels: dict[str, Any]) -> dict[str, Any]:
    case: dict[str, Any] = {}
    for name, text in row.items():
        if name.startswith("label."):
            label = name.removeprefix("label.")
            case.setdefault("labels", {})[label] = _label(text, labels.get(label, {}).get("kind", "text"))
        elif name.startswith("mask."):
            case.setdefault("masks", {})[name.removeprefix("mask.")] = text
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
