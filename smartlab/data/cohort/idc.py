"""The index of every public series that travels inside the `idc_index_data` package.

It needs no network: a parquet file of about a million rows (UID, patient, modality, licence,
size), queried here with DuckDB. Two tables:

- `series`       one row per DICOM series
- `collections`  one row per collection, with the licence and citation of each of its sources

Example: `query("SELECT count(*) AS n FROM series WHERE collection_id = ?", ["lidc_idri"])`.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartlab.core.errors import DataError
from smartlab.data.cohort.case import Case, uid_in

if TYPE_CHECKING:
    import duckdb

Row = dict[str, Any]
IDC_PORTAL = "https://portal.imaging.datacommons.cancer.gov/explore/"


def index_version() -> str:
    """Version of the installed index, e.g. "25.0.5"; manifests record the one they were built from."""
    try:
        return version("idc-index-data")
    except PackageNotFoundError:
        raise DataError(
            "the index of public series is not installed", fix="run `pip install idc-index-data`"
        ) from None


@cache
def _connection() -> duckdb.DuckDBPyConnection:
    import duckdb
    import idc_index_data

    index_version()
    main = Path(str(idc_index_data.IDC_INDEX_PARQUET_FILEPATH))
    connection = duckdb.connect()
    for view, file in (("series", main), ("collections", main.with_name("collections_index.parquet"))):
        connection.execute(f"CREATE VIEW {view} AS SELECT * FROM read_parquet('{file}')")
    return connection


def query(sql: str, parameters: Sequence[Any] | dict[str, Any] = ()) -> list[Row]:
    """Rows of an SQL query over `series` and `collections`; a missing value is None."""
    cursor = _connection().cursor().execute(sql, parameters or None)
    names = [column[0] for column in cursor.description or []]
    return [dict(zip(names, row, strict=True)) for row in cursor.fetchall()]


def lookup(series_uids: Sequence[str], columns: Sequence[str]) -> dict[str, Row]:
    """UID -> these columns, for every UID in the order asked; unknown UIDs are an error."""
    rows = query(
        f"SELECT SeriesInstanceUID, {', '.join(columns)} FROM series "
        "WHERE SeriesInstanceUID IN (SELECT unnest(?))",
        [list(series_uids)],
    )
    found = {row["SeriesInstanceUID"]: row for row in rows}
    if missing := [uid for uid in dict.fromkeys(series_uids) if uid not in found]:
        raise DataError(
            f"{len(missing)} series are not in the index of public series",
            path=missing[0],
            found=f"idc-index-data {index_version()}",
            fix="check the UID, or install a newer idc-index-data",
        )
    return {uid: found[uid] for uid in dict.fromkeys(series_uids)}


def series_of(cases: Iterable[Case]) -> list[str]:
    """UIDs of the images and of the masks that are DICOM series (SEG, RTSTRUCT), each once."""
    named = ((case.series_uid, *map(uid_in, case.masks.values())) for case in cases)
    return list(dict.fromkeys(uid for uids in named for uid in uids if uid))


def gigabytes(cases: Iterable[Case]) -> float:
    """Size, as DICOM files, of what is fetched by default: all series of the cases not left out."""
    rows = lookup(series_of(c for c in cases if not c.excluded), ["series_size_MB"]).values()
    return round(sum(row["series_size_MB"] for row in rows) / 1000, 1)


def original_source(collection_id: str) -> dict[str, str]:
    """Licence, citation and landing page of a collection's own images, as the index states them."""
    rows = query(
        "SELECT s.license.license_short_name AS licence, s.citation AS citation, s.source_url AS homepage FROM "
        "(SELECT unnest(sources) AS s FROM collections WHERE collection_id = ?) "
        "WHERE s.source_type = 'original_data'",
        [collection_id],
    )
    if len(rows) != 1:
        raise DataError(
            "expected one original source", path=collection_id, found=len(rows), fix="check the collection id"
        )
    return {key: _plain(value) for key, value in rows[0].items()}


def _plain(text: str) -> str:
    """The index's citations carry a little HTML; manifests are plain text."""
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", text))).strip()
