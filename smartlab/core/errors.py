"""Errors a user can act on: where, what was found, what was expected, what to do.

Two families, because the command line gives them different exit codes:

- `DataError`  the work failed on a file, case or cohort        -> exit code 1
- `UseError`   the request itself is wrong (config, arguments)  -> exit code 2
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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


def unknown(
    what: str,
    word: object,
    known: Iterable[str],
    where: str = "",
    *,
    also: str = "",
    path: str | Path | None = None,
    fix: str | None = None,
) -> UseError:
    """What to say of a word that is none of those known: which these are, and the nearest.

    also: what else would do.   fix: where no word is near.
    """
    known = list(known)
    expected, hint = f"one of {', '.join(known)}{also}", near(str(word), known)
    return UseError(f"{what} {word!r}{where}", path=path, expected=expected, fix=hint or fix)


def one_of(what: str, word: object, known: Iterable[str], where: str = "", **more: Any) -> None:
    """Refuse a word that is none of these; see `unknown`."""
    if word not in (known := list(known)):
        raise unknown(what, word, known, where, **more)


class Problem(NamedTuple):
    """One thing that pydantic found wrong."""

    where: tuple[str, ...]
    why: str
    value: object
    kind: str  # pydantic's word for it

    @property
    def place(self) -> str:
        return ".".join(self.where)

    def __str__(self) -> str:
        return f"{self.place}: {self.why}" if self.place else self.why


def problems_of(error: ValidationError) -> list[Problem]:
    """What pydantic found wrong."""
    return [
        Problem(tuple(map(str, e["loc"])), e["msg"].removeprefix("Value error, "), e["input"], e["type"])
        for e in error.errors()
    ]


def misfit(what: str, error: ValidationError, **more: Any) -> UseError:
    """The first thing that pydantic found wrong with `what`."""
    first = problems_of(error)[0]
    return UseError(f"{what}{first}", found=repr(first.value), **more)


def some(words: Sequence[object], most: int = 3) -> str:
    """The first few of many, and that there are more."""
    return ", ".join(map(str, words[:most])) + (", …" if len(words) > most else "")


def counted(problems: Sequence[object]) -> str:
    """All problems in one text, so that they can be mended in one go."""
    if len(problems) == 1:
        return str(problems[0])
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{len(problems)} problems: {'; '.join(map(str, problems[:SHOWN]))}{more}"
