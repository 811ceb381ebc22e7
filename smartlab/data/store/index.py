"""The store's own files beside the volumes: index, journal, failures.

    store.json          what the store is; names the two index files; written last, by a rename
    images-HASH.jsonl   one line per stored image, in manifest order
    cases-HASH.jsonl    one line per case, in manifest order
    failures.csv        what is missing, and why
    volumes/            KEY-HASH.b2nd and KEY-HASH.labels.b2nd
    journal.jsonl       while building: rows that are done but not in the index yet

Opening reads the first three and no volume. The index files carry their own hash in their names,
so a build that replaces them and is killed in between leaves the old store whole.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from smartlab.core.errors import DataError, UseError, some
from smartlab.core.files import LOCK, TEMPORARY, held, write_bytes
from smartlab.data.store.request import Failure
from smartlab.data.store.rows import CaseRow, FileRow, ImageRow

HEADER, JOURNAL, FAILURES = "store.json", "journal.jsonl", "failures.csv"
Row = dict[str, Any]
R = TypeVar("R")

_OURS = re.compile(
    r"^(\.|\.tmp-\d+\.)?((images|cases)-[0-9a-f]{12}\.jsonl|[0-9a-f]{16,64}-[0-9a-f]{8,64}(\.labels)?\.b2nd)(\.[^/]*)?$"
)


def read_header(out: Path) -> Row | None:
    """store.json, or None where no build has finished or stopped in order."""
    try:
        header = json.loads((out / HEADER).read_bytes())
        told = header.pop("sha256", None)
        if told not in (None, digest(header)):  # None: of a version that wrote none
            raise ValueError("its content is not what was written")
    except FileNotFoundError:
        return None
    except (ValueError, AttributeError) as error:
        raise DataError(
            "is damaged", path=out / HEADER, found=error, fix="delete this file and build the store again"
        ) from None
    return header


def digest(content: Any) -> str:
    """SHA-256 of plain values."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


class Rows(Sequence[R]):
    """Rows of a JSON-lines file, each parsed when it is first looked at: 10,000 open in milliseconds."""

    def __init__(self, data: bytes) -> None:
        self._lines = data.splitlines()
        self._parsed: dict[int, R] = {}

    def __len__(self) -> int:
        return len(self._lines)

    def __getitem__(self, number: int) -> R:  # type: ignore[override]  # one row, never a slice
        if number not in self._parsed:
            self._parsed[number] = json.loads(self._lines[number])
        return self._parsed[number]


def read_lines(out: Path, header: Row, part: str) -> Rows[Any]:
    """The rows of "images" or "cases", compared with the hash that is in the name of their file."""
    path = out / header[part]["file"]
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise DataError(
            "part of the index is missing", path=path, fix=f"delete {HEADER} and build the store again"
        ) from None
    if path.name != _name_of(part, data):
        whole = len(data) == header[part]["bytes"]
        raise DataError(
            f"part of the index is {'damaged' if whole else 'cut short'}",
            path=path,
            found="another content than was written" if whole else f"{len(data)} bytes",
            expected=None if whole else header[part]["bytes"],
            fix=f"delete {HEADER} and build the store again",
        )
    return Rows(data)


def _name_of(part: str, data: bytes) -> str:
    return f"{part}-{hashlib.sha256(data).hexdigest()[:12]}.jsonl"


def write_index(out: Path, header: Row, images: Sequence[ImageRow], cases: Sequence[CaseRow]) -> None:
    """Make these rows the store, at once."""
    both: tuple[tuple[str, Sequence[Any]], ...] = (("images", images), ("cases", cases))
    for part, rows in both:
        data = "".join(json.dumps(row, separators=(",", ":")) + "\n" for row in rows).encode()
        file = _name_of(part, data)
        write_bytes(out / file, data)
        header[part] = {"file": file, "bytes": len(data), "count": len(rows)}
    write_bytes(out / HEADER, (json.dumps(header | {"sha256": digest(header)}, indent=1) + "\n").encode())


def write_failures(out: Path, failures: Iterable[tuple[int, Failure]]) -> None:
    """failures.csv; `case_number` is the position in `manifest.cases`, from 0."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["case_number", "case", "image", "reason"])
    table.writerows([number, f.case, f.image, f.reason] for number, f in failures)
    write_bytes(out / FAILURES, text.getvalue().encode())


def parts(row: ImageRow) -> list[FileRow]:
    """What an image has in files of their own: its volume, and its labels where there are any."""
    return [row, row["labels"]] if row["labels"] else [row]


class Journal:
    """Rows as they are finished, one line each with its checksum, on the disk before the next is asked for."""

    def __init__(self, out: Path) -> None:
        self.path = out / JOURNAL

    def read(self) -> list[ImageRow]:
        """What an earlier run finished; a line that is not what was written is left out, and its image built again."""
        lines = self.path.read_bytes().splitlines() if self.path.exists() else []
        return [row for line in lines if (row := _row_of(line))]

    def start(self, rows: list[ImageRow]) -> None:
        """Begin with these rows, and without a line cut short."""
        write_bytes(self.path, b"".join(map(_line_of, rows)))

    def add(self, row: ImageRow) -> None:
        with self.path.open("ab") as file:
            file.write(_line_of(row))
            file.flush()
            os.fsync(file.fileno())


def _line_of(row: ImageRow) -> bytes:
    text = json.dumps(row).encode()
    return b"%08x %b\n" % (zlib.crc32(text), text)


def _row_of(line: bytes) -> ImageRow | None:
    """The row of a line, None of a damaged one; version 0.1 wrote rows without a checksum."""
    told, _, text = line.partition(b" ")
    try:
        if line.startswith(b"{"):
            return json.loads(line)
        return json.loads(text) if told == b"%08x" % zlib.crc32(text) else None
    except ValueError:
        return None


def clean(out: Path, rows: Iterable[ImageRow]) -> None:
    """Delete what no row and no index names -> number of volumes removed.

    Only files with names of the store's own form: nothing that somebody else put here.
    """
    header = read_header(out) or {}
    keep = {header[part]["file"] for part in ("images", "cases") if part in header}
    for old in [*out.glob("images-*.jsonl"), *out.glob("cases-*.jsonl")]:
        if old.name not in keep and _OURS.match(old.name):
            old.unlink()
    keep |= {part["file"] for row in rows for part in parts(row)}
    volumes = [f for f in (out / "volumes").glob("*") if _OURS.match(f.name)]
    stray = [f for f in volumes if f"volumes/{f.name}" not in keep]
    for file in [*stray, *out.glob(f"{TEMPORARY}*")]:
        file.unlink(missing_ok=True)


@contextmanager
def locked(out: Path, wait: float | None = None) -> Iterator[None]:
    """One build at a time."""
    _check_place(out)
    # in a batch, many runs want one store at once: the first builds it and the others wait
    seconds = float(os.environ.get("SMARTLAB_STORE_WAIT", 10)) if wait is None else wait
    with held(out, "another build is writing this store", seconds):
        yield


def _check_place(out: Path) -> None:
    """A store goes into a folder of its own, or where a store is."""
    if not out.exists():
        return
    if not out.is_dir():
        raise UseError("is a file", path=out, expected="a folder for the store")
    names = {f.name for f in out.iterdir()}
    if names and not names & {HEADER, JOURNAL, LOCK}:
        raise UseError(
            "this folder holds other files and no store",
            path=out,
            found=some(sorted(names)),
            expected="an empty or a new folder, or one that holds a store",
        )
