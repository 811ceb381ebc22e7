"""Errors a user can act on: where, what was found, what was expected, what to do.

Two families, because the command line gives them different exit codes:

- `DataError`  the work failed on a file, case or cohort        -> exit code 1
- `UseError`   the request itself is wrong (config, arguments)  -> exit code 2
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

SHOWN = 20  # problems of a file told at once


class SmartlabError(Exception):
    """One clear message, built from its parts so that no part is forgotten.

    >>> raise DataError("slices are missing", path="scan/", found="gap at z = 12.5 mm",
    ...                 expected="one slice every 2.5 mm", fix="fetch the series again")
    Traceback (most recent call last):
        ...
    smartlab.core.errors.DataError: scan/: slices are missing (found gap at z = 12.5 mm; expected one slice every 2.5 mm). Fetch the series again.
    """

    exit_code = 1

    def __init__(
        self,
        problem: str,
        *,
        path: str | Path | None = None,
        found: object = None,
        expected: object = None,
        fix: str | None = None,
    ) -> None:
        self.problem, self.path, self.fix = problem, None if path is None else str(path), fix
        self.found, self.expected = found, expected
        facts = [f"found {found}"] if found is not None else []
        facts += [f"expected {expected}"] if expected is not None else []
        # without the path and what to do: for a table where these stand beside
        self.reason = problem + (f" ({'; '.join(facts)})" if facts else "")
        self.advice = self.reason + (f". {fix[0].upper()}{fix[1:]}" if fix else "")
        text = self.advice if path is None else f"{path}: {self.advice}"
        super().__init__(text if text.endswith(("?", ".")) else text + ".")

    def __reduce__(self):  # keyword-only arguments must survive the trip to and from a worker
        return _rebuild, (type(self), self.problem, self.path, self.found, self.expected, self.fix)


class DataError(SmartlabError):
    """A file, case or cohort cannot be used."""


class UseError(SmartlabError):
    """The request is wrong: an unknown key, an impossible combination, a missing argument."""

    exit_code = 2


def _rebuild(kind, problem, path, found, expected, fix):
    return kind(problem, path=path, found=found, expected=expected, fix=fix)


def near(word: str, known: Iterable[str]) -> str | None:
    """The fix for a word that is nearly one of these."""
    found = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"did you mean {found[0]!r}?" if found else None


def one_of(what: str, word: str, known: Iterable[str]) -> None:
    """Refuse a word that is none of these."""
    if word not in (known := list(known)):
        fix = near(word, known)
        raise UseError(f"unknown {what}", found=repr(word), expected=" or ".join(known), fix=fix)


def problems_of(error: ValidationError) -> list[str]:
    """What pydantic found wrong, a text each: where, and what."""
    found = ((".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, ")) for e in error.errors())
    return [f"{place}: {why}" if place else why for place, why in found]


def some(words: Sequence[object], most: int = 3) -> str:
    """The first few of many, and that there are more."""
    return ", ".join(map(str, words[:most])) + (", …" if len(words) > most else "")


def counted(problems: Sequence[str]) -> str:
    """All problems in one text, so that they can be mended in one go."""
    if len(problems) == 1:
        return problems[0]
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{len(problems)} problems: {'; '.join(problems[:SHOWN])}{more}"
