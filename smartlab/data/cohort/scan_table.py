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

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from smartlab.core.errors import DataError, some
from smartlab.data.cohort.case import Case, LabelSpec, LabelValue
from smartlab.data.cohort.case_table import Row, all_at_once, read_rows, says_missing
from smartlab.data.cohort.scan_files import hashed_patient

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
    """Cases with what a table says of them, what its labels are, and (what, reason) of what was not taken."""

    cases: list[Case]
    key: str
    own: dict[str, Row]  # case id -> its row
    problems: list[str]
    labels: dict[str, LabelSpec] = field(default_factory=dict)
    left: list[tuple[str, str]] = field(default_factory=list)
    # case id -> its fields
    facts: dict[str, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))

    def texts(self, column: str) -> dict[str, str]:
        """Case id -> what the table has in a column, where it has something."""
        return {case: row[column] for case, (_, row) in self.own.items() if not says_missing(row[column])}

    def line(self, column: str, text: str) -> int:
        return next(line for line, row in self.own.values() if row[column] == text)

    def finish(self) -> None:
        """Write the labels and facts into the cases."""
        self.cases = [
            case.model_copy(update=own | {"labels": case.labels | own.get("labels", {})})
            for case in self.cases
            for own in [self.facts[case.id]]
        ]


def join_table(path: Path, root: Path, cases: list[Case]) -> Joined:
    """The cases with the labels, splits and patients of a table."""
    rows = [(line, {name: text.strip() for name, text in row.items()}) for line, row in read_rows(path)]
    columns = list(rows[0][1]) if rows else []
    if len(columns) < 2:
        raise DataError(
            "is no table of labels",
            path=path,
            found=f"{len(columns)} columns, {len(rows)} rows",
            expected="a column that names the scans, one for each label, and a row for each scan or patient",
        )
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
    joined = Joined(cases, key, own, problems)
    scanless = [line for line, row in rows if not finder.find(row[key])]
    joined.left += [(f"{path.name} line {line}", "no scan of this name") for line in scanless]
    joined.left += [(c.id, f"no row in {path.name}, so no label") for c in cases if c.id not in own]
    for column in columns:
        _read_column(column, joined)
    if not (joined.labels or joined.facts or problems):
        reasons = [f"{what}: {why}" for what, why in joined.left if what.startswith("column")]
        problems.append("no column is a label: " + ("; ".join(reasons) or "there is none beside the key"))
    if problems:
        raise all_at_once("cannot be joined to the scans", path, problems)
    _time_to_event(joined)
    joined.finish()
    return joined


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
        if says_missing(text):
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
            shown = some([case.id for case in found])
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


def _read_column(column: str, joined: Joined) -> None:
    """A column as what it is: patients, splits, a label, or left out."""
    texts = joined.texts(column)
    if column == joined.key:
        return
    if PATIENT.fullmatch(column):
        for case in joined.cases:
            named = texts.get(case.id)
            if named or not HASHED.fullmatch(case.patient):
                joined.facts[case.id]["patient"] = hashed_patient(named or case.patient)
    elif (group := column.casefold()) in ("split", "fold"):
        for case_id, text in texts.items():
            value = _SPLITS.get(text.casefold()) if group == "split" else _fold(text)
            if value is None:
                line, expected = (
                    joined.line(column, text),
                    "train, val or test" if group == "split" else "0, 1, 2 …",
                )
                joined.problems.append(f"line {line}: {group} {text!r} is not {expected}")
            joined.facts[case_id][group] = value
    else:
        try:
            joined.labels[column], read = read_label(column, list(texts.values()))
        except _NotALabel as why:
            joined.left.append((f"column {column}", str(why)))
        except _Doubtful as why:
            joined.problems.append(f"column {column!r} {why}, line {joined.line(column, why.text)}")
        else:
            for case_id, text in texts.items():
                joined.facts[case_id].setdefault("labels", {})[column] = read[text]


_SPLITS = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}


def _fold(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


class _NotALabel(Exception):
    """Why a column is not taken."""


class _Doubtful(Exception):
    """What is wrong with a column that seems to be a label, and the text that shows it."""

    def __init__(self, why: str, text: str) -> None:
        super().__init__(why)
        self.text = text


def read_label(column: str, values: list[str]) -> tuple[LabelSpec, dict[str, LabelValue]]:
    """What a column is, and what each of its texts means."""
    texts = Counter(values)
    if PRIVATE.fullmatch(column):
        raise _NotALabel("named like an identifier or free text, which is not taken")
    if any(DATE.fullmatch(text) for text in texts):
        raise _NotALabel("holds dates, which are not taken: give a number, such as days since the scan")
    if len(texts) < 2:
        raise _NotALabel("has one value only" if texts else "is empty for these scans")
    numbers = {text: number for text in texts if (number := _number(text)) is not None}
    if len(numbers) == len(texts):
        return _numeric(numbers, len(values))
    spelt: dict[str, str] = {}
    for text in sorted(texts):
        first = spelt.setdefault(" ".join(text.casefold().split()), text)
        if first != text:
            raise _Doubtful(f"spells one word in two ways, {first!r} and {text!r}", text)
    few = len(texts) == 2 or (len(texts) <= MOST_CLASSES and 2 * len(texts) <= len(values))
    if numbers and (few or 2 * len(numbers) > len(texts)):
        odd = next(text for text in texts if text not in numbers)
        raise _Doubtful(f"mixes numbers and words, such as {odd!r}", odd)
    if not few or max(map(len, texts)) > LONGEST:
        raise _NotALabel(
            f"{len(texts)} different texts in {len(values)} rows: names, identifiers or free text are not taken"
        )
    kind = "binary" if len(texts) == 2 else "multiclass"
    return LabelSpec(kind=kind, classes=sorted(texts)), {text: text for text in texts}


def _numeric(numbers: dict[str, float], count: int) -> tuple[LabelSpec, dict[str, LabelValue]]:
    found = set(numbers.values())
    if found == {0, 1}:
        read: dict[str, LabelValue] = {text: str(int(value)) for text, value in numbers.items()}
        return LabelSpec(kind="binary", classes=["0", "1"]), read
    if len(found) == count and min(found) >= AN_ID and all(value == int(value) for value in found):
        raise _NotALabel("large whole numbers, all different: identifiers are not taken")
    return LabelSpec(kind="number"), dict(numbers)


def _time_to_event(joined: Joined) -> None:
    """Where columns are called so: 0/1 `event` and a number `time` are what survival models take."""
    names = {name: name.casefold().replace("_", " ") for name in joined.labels}
    events = [n for n, s in joined.labels.items() if EVENT.fullmatch(names[n]) and s.classes == ["0", "1"]]
    times = [n for n, s in joined.labels.items() if TIME.fullmatch(names[n]) and s.kind == "number"]
    if events and times:
        joined.labels |= {name: LabelSpec(kind="event") for name in events}
        joined.labels |= {name: LabelSpec(kind="time") for name in times}
        for own in joined.facts.values():
            own.get("labels", {}).update(
                {n: float(own["labels"][n]) for n in events if n in own.get("labels", {})}
            )


def _number(text: str) -> float | None:
    """A number, with a decimal point or comma; 1,000 could be either and is none."""
    if re.fullmatch(r"[+-]?(\d+[.,]?\d*|[.,]\d+)(e[+-]?\d+)?", text.lower()) and not re.fullmatch(
        r"\d{1,3},\d{3}", text
    ):
        return float(text.replace(",", "."))
    return None
