"""Labels from a CSV of one's own: which row is of which scan, and what each column means.

- Rows find their scans by a path, a case's id, a file's or folder's name, a series UID or a patient;
  the column that fits most scans is the key, whatever it is called. In a column called `patient` a value
  stands for all scans of that patient, elsewhere for one. `split` and `fold` are taken as such.
- 0/1 and two words are binary, few words multiclass, numbers are numbers. Dates, free text, names and
  identifiers are not taken, because labels travel with the data.
- What is ambiguous (a row that fits two scans, two rows that disagree, one word in two spellings, words
  among numbers) is an error that names the lines, all of it at once; nothing is guessed.
"""

from __future__ import annotations

import csv
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from smartlab.data.manifest import SHOWN, Case, LabelSpec, LabelValue
from smartlab.data.scan_files import hashed_patient
from smartlab.errors import DataError

MISSING = {"", "na", "n/a", "nan", "null", "none", "-", "--", ".", "?", "unknown", "missing"}
PATIENT = re.compile(r"(patient|subject|person)([_ -]?(id|no|nr|number|name|key))?|mrn|pid", re.IGNORECASE)
PRIVATE = re.compile(
    r"((first|last|file|image|scan|case)[_ -]?)?name|surname|(.*[_ -])?u?id|.*birth.*|dob|(e[_ -]?)?mail|address"
    r"|phone|accession.*|comments?|remarks?|notes?|report|physician.*|path|file|image|scan|case",
    re.IGNORECASE,
)
EVENT, TIME = re.compile(r"(event|death|died|dead)s?\b.*"), re.compile(r".*\b(time|survival)\b.*")
HASHED = re.compile(r"p-[0-9a-f]{12}")
_DAY, _YEAR, _SEPARATOR = r"(0?[1-9]|[12]\d|3[01])", r"(19|20)\d\d", r"[-/. ]"
DATE = re.compile(
    rf"({_YEAR}{_SEPARATOR}\d\d?{_SEPARATOR}{_DAY}|{_DAY}{_SEPARATOR}\d\d?{_SEPARATOR}({_YEAR}|\d\d)"
    rf"|\d\d?/\d\d?/({_YEAR}|\d\d)|{_YEAR}(0[1-9]|1[0-2])(0[1-9]|[12]\d|3[01])"
    rf"|({_DAY}\W+)?(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*\W+({_DAY}\W+)?{_YEAR})([T ]\d.*)?",
    re.IGNORECASE,
)
MOST_CLASSES, LONGEST = 20, 40  # what is more, or longer, is text
AN_ID = 10_000  # whole numbers from here on, all different, are identifiers


@dataclass
class Joined:
    """Cases with their labels, what the labels are, and (what, reason) of what was not taken."""

    cases: list[Case]
    labels: dict[str, LabelSpec] = field(default_factory=dict)
    rows: int = 0
    remark: str = ""
    left: list[tuple[str, str]] = field(default_factory=list)


Row = tuple[int, dict[str, str]]  # line in the file, column -> text


def join_table(path: Path, root: Path, cases: list[Case]) -> Joined:
    """The cases with the labels, splits and patients of a table."""
    columns, rows = read_rows(path)
    finder = _Finder(path, root, cases)
    key = max(columns, key=lambda column: _coverage(finder, [row[column] for _, row in rows]))
    problems: list[str] = []
    own = _rows_of_cases(finder, key, rows, problems)
    if not own and not problems:
        raise DataError(
            "no row fits a scan",
            path=path,
            found=f"columns {', '.join(columns)}; {columns[0]} such as {rows[0][1][columns[0]]!r}",
            expected=f"a column with values such as {cases[0].id!r} or {cases[0].patient!r}",
        )
    joined = Joined(cases, rows=len({line for line, _ in own.values()}))
    scanless = [line for line, row in rows if not finder.find(row[key])]
    without = [case.id for case in cases if case.id not in own]
    joined.left += [(f"{path.name} line {line}", "no scan of this name") for line in scanless]
    joined.left += [(name, f"has no row in {path.name}: it has no label") for name in without]
    joined.remark = f"rows joined by column {key!r} to {len(own)} of {len(cases)} scans"
    values = {c: {i: row[c] for i, (_, row) in own.items() if not _missing(row[c])} for c in columns}
    lines = {i: line for i, (line, _) in own.items()}
    updates: dict[str, dict[str, Any]] = defaultdict(dict)
    labels: dict[str, dict[str, LabelValue]] = defaultdict(dict)
    for column in columns:
        _read_column(column, key, values[column], lines, finder, joined, updates, labels, problems)
    if problems:
        raise _all_at_once(path, problems)
    _time_to_event(joined.labels, labels)
    joined.cases = [case.model_copy(update=updates[case.id] | {"labels": labels[case.id]}) for case in cases]
    if joined.labels:
        return joined
    raise DataError(
        "has no column that can be a label",
        path=path,
        found="; ".join(f"{what}: {why}" for what, why in joined.left if what.startswith("column"))
        or "no other column",
        expected="0/1, two or a few words, or numbers",
    )


# ---- the file ------------------------------------------------------------------------------------


def read_rows(path: Path) -> tuple[list[str], list[Row]]:
    """Columns and rows of a CSV: UTF-8 with or without byte order mark, commas, semicolons or tabs."""
    raw = path.read_bytes()
    if raw[:2] == b"PK":
        raise DataError("is a workbook, not a CSV", path=path, fix="save it as CSV UTF-8")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError("is not UTF-8", path=path, found=f"line {line}", fix="save it as CSV UTF-8") from None
    first = next(iter(text.splitlines()), "")
    delimiter = max(",;\t", key=first.count)
    reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter)
    columns = [name.strip() for name in next(reader, [])]
    while columns and not columns[-1]:
        columns.pop()
    again = [name for name, count in Counter(map(str.casefold, columns)).items() if count > 1]
    problems = [
        f"column {name!r} is there {columns.count(name) or 'twice in two spellings'} times" for name in again
    ]
    problems += ["a column has no name"] if "" in columns else []
    rows = []
    for cells in reader:
        cells = [cell.strip() for cell in cells]
        if not any(cells):
            continue
        if any(cells[len(columns) :]):
            problems.append(f"line {reader.line_num} has {len(cells)} cells for {len(columns)} columns")
        cells += [""] * (len(columns) - len(cells))
        rows.append((reader.line_num, dict(zip(columns, cells, strict=False))))
    if problems:
        raise _all_at_once(path, problems)
    if len(columns) < 2 or not rows:
        raise DataError(
            "is no table of labels",
            path=path,
            found=f"{len(columns)} columns, {len(rows)} rows",
            expected="a column that names the scans, one for each label, and a row for each scan or patient",
        )
    return columns, rows


def _all_at_once(path: Path, problems: list[str]) -> DataError:
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    found = "; ".join([*problems[:SHOWN], *more])
    return DataError(
        "cannot be joined to the scans", path=path, found=found, fix="correct the table, nothing was written"
    )


def _missing(text: str) -> bool:
    return text.casefold() in MISSING


# ---- rows and scans ------------------------------------------------------------------------------


class _Finder:
    """From what a table says to cases."""

    def __init__(self, path: Path, root: Path, cases: list[Case]) -> None:
        self.table, self.root = path, root
        self.by_name: dict[str, dict[str, Case]] = defaultdict(dict)
        for case in cases:
            for name in _names_of(case):
                self.by_name[_plain(name)][case.id] = case

    def find(self, text: str) -> list[Case]:
        """The cases a text can mean."""
        if _missing(text):
            return []
        found = self.by_name.get(_plain(text)) or self.by_name.get(hashed_patient(text))
        if not found and re.search(r"[\\/]", text):
            for place in (self.table.parent / text, self.root.parent / text, Path(text)):
                if place.resolve().is_relative_to(root := self.root.resolve()):
                    inside = place.resolve().relative_to(root).as_posix()
                    found = found or self.by_name.get(_plain(inside))
        return list((found or {}).values())

    def outside(self, text: str) -> bool:
        """Whether a text is a path to a file that is not below the folder."""
        places = [self.table.parent / text, self.root / text]
        return bool(re.search(r"[\\/]", text)) and any(
            place.exists() and not place.resolve().is_relative_to(self.root.resolve()) for place in places
        )


def _names_of(case: Case) -> Iterator[str]:
    """What a table may call a case."""
    yield from (case.id, case.patient)
    if case.series_uid:
        yield case.series_uid
    path = PurePosixPath(case.image or "")
    for part in (path, PurePosixPath(case.id)):
        yield from (part.as_posix(), part.name)
        yield from part.parts[:-1]
    yield re.sub(r"_0000$", "", PurePosixPath(case.id).name)


def _plain(text: str) -> str:
    """Spelling apart: case, backslashes, and the zeros that spreadsheets take from numbers."""
    text = text.strip().removeprefix("./").replace("\\", "/").casefold()
    return text.lstrip("0") or "0" if text.isdecimal() else text


def _coverage(finder: _Finder, texts: list[str]) -> tuple[int, int]:
    """How well a column names the scans: how many of them, and in how many rows without doubt."""
    found = [finder.find(text) for text in texts]
    return len({case.id for cases in found for case in cases}), sum(len(cases) == 1 for cases in found)


def _rows_of_cases(finder: _Finder, key: str, rows: list[Row], problems: list[str]) -> dict[str, Row]:
    """Case id -> its row; a row may be of all scans of a patient."""
    own: dict[str, Row] = {}
    for line, row in rows:
        text = row[key]
        found = finder.find(text)
        if not found and finder.outside(text):
            problems.append(f"line {line}: {text!r} is outside the folder")
        if len(found) > 1 and not PATIENT.fullmatch(key):
            shown = ", ".join(case.id for case in found[:3]) + (", …" if len(found) > 3 else "")
            problems.append(
                f"line {line}: {text!r} fits {len(found)} scans ({shown}); name the scan, or call the column "
                "`patient` if the row is of them all"
            )
            continue
        for case in found:
            before, known = own.setdefault(case.id, (line, row))
            if {k: v for k, v in known.items() if k != key} != {k: v for k, v in row.items() if k != key}:
                problems.append(f"lines {before} and {line} are both of {case.id} and disagree")
    return own


# ---- columns -------------------------------------------------------------------------------------


def _read_column(
    column: str,
    key: str,
    values: dict[str, str],
    lines: dict[str, int],
    finder: _Finder,
    joined: Joined,
    updates: dict[str, dict[str, Any]],
    labels: dict[str, dict[str, LabelValue]],
    problems: list[str],
) -> None:
    """A column's values (case id -> text) as what they are: patients, splits, labels, or left out."""
    if column == key:
        return
    if PATIENT.fullmatch(column):
        for case in joined.cases:
            named = values.get(case.id)
            if named or not HASHED.fullmatch(case.patient):
                updates[case.id]["patient"] = hashed_patient(named or case.patient)
    elif column.casefold() in ("split", "fold"):
        _read_groups(column.casefold(), values, lines, updates, problems)
    else:
        try:
            spec, read = read_label(column, values, lines)
        except _NotALabel as why:
            joined.left.append((f"column {column}", str(why)))
        except DataError as error:
            problems.append(error.problem)
        else:
            joined.labels[column] = spec
            for case, text in values.items():
                labels[case][column] = read[text]


def _read_groups(
    group: str,
    values: dict[str, str],
    lines: dict[str, int],
    updates: dict[str, dict[str, Any]],
    problems: list[str],
) -> None:
    known = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}
    for case, text in values.items():
        value = known.get(text.casefold()) if group == "split" else int(text) if text.isdecimal() else None
        if value is None:
            expected = "train, val or test" if group == "split" else "0, 1, 2 …"
            problems.append(f"line {lines[case]}: {group} {text!r} is not {expected}")
        updates[case][group] = value


class _NotALabel(Exception):
    """Why a column is not taken."""


def read_label(
    column: str, values: dict[str, str], lines: dict[str, int]
) -> tuple[LabelSpec, dict[str, LabelValue]]:
    """What a column is, and what each of its texts means."""
    texts = Counter(values.values())
    numbers = {text: number for text in texts if (number := _number(text)) is not None}
    if PRIVATE.fullmatch(column):
        raise _NotALabel("named like an identifier or free text, which is not taken")
    if any(DATE.fullmatch(text) for text in texts):
        raise _NotALabel("holds dates, which are not taken: give a number, such as days since the scan")
    if len(texts) < 2:
        raise _NotALabel("has one value only" if texts else "is empty for these scans")
    if 0 < len(numbers) < len(texts):
        if len(numbers) < len(texts) / 2 and len(texts) > MOST_CLASSES:
            raise _NotALabel("free text, which is not taken")
        odd = next(text for text in texts if text not in numbers)
        line = next(lines[case] for case, text in values.items() if text == odd)
        raise DataError(f"column {column!r} mixes numbers and words, such as {odd!r} in line {line}")
    if numbers:
        return _numeric(column, numbers, len(values))
    spelt: dict[str, str] = {}
    for text in sorted(texts):
        plain = " ".join(text.casefold().split())
        if (first := spelt.setdefault(plain, text)) != text:
            raise DataError(f"column {column!r} spells one word in two ways, {first!r} and {text!r}")
    few = len(texts) == 2 or (len(texts) <= MOST_CLASSES and 2 * len(texts) <= len(values))
    if not few or max(map(len, texts)) > LONGEST:
        raise _NotALabel(
            f"{len(texts)} different words in {len(values)} rows: names, identifiers or free text are not taken"
        )
    kind = "binary" if len(texts) == 2 else "multiclass"
    return LabelSpec(kind=kind, classes=sorted(texts)), {text: text for text in texts}


def _time_to_event(specs: dict[str, LabelSpec], labels: dict[str, dict[str, LabelValue]]) -> None:
    """Where columns are called so: 0/1 `event` and a number `time` are what survival models take."""
    events = [n for n, s in specs.items() if EVENT.fullmatch(n.casefold()) and s.classes == ["0", "1"]]
    times = [
        n for n, s in specs.items() if TIME.fullmatch(n.casefold().replace("_", " ")) and s.kind == "number"
    ]
    if events and times:
        specs.update({name: LabelSpec(kind="event") for name in events})
        specs.update({name: LabelSpec(kind="time") for name in times})
        for own in labels.values():
            own.update({name: float(str(own[name])) for name in events if name in own})


def _numeric(column: str, numbers: dict[str, float], count: int) -> tuple[LabelSpec, dict[str, LabelValue]]:
    found = set(numbers.values())
    if found == {0, 1}:
        return LabelSpec(kind="binary", classes=["0", "1"]), {
            text: str(int(v)) for text, v in numbers.items()
        }
    whole = all(value == int(value) for value in found)
    if whole and min(found) >= AN_ID and len(found) == count:
        raise _NotALabel("whole numbers, large and all different: identifiers are not taken")
    return LabelSpec(kind="number"), dict(numbers)


def _number(text: str) -> float | None:
    """A number, with a decimal point or comma."""
    if re.fullmatch(r"[+-]?(\d+[.,]?\d*|[.,]\d+)([eE][+-]?\d+)?", text):
        return float(text.replace(",", "."))
    return None
