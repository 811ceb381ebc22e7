"""What may leave the hospital's folders: salted keys, and texts without names, ids, paths or dates.

A patient, case or image is written down only as a keyed hash (HMAC-SHA-256) of its id. Without the
salt nobody can test a guess ("is patient 4711 in this store?"). The salt is `SMARTLAB_SALT`, or a
random one kept in `~/.config/smartlab/salt`, readable by its owner only.

Error texts are useful and dangerous: they name files, folders and header values. `scrub` replaces
what is known to identify, then everything that looks like a path, a UID or a date.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from smartlab.core.errors import DataError, UseError

if TYPE_CHECKING:
    from smartlab.data.cohort.case import Case, LabelSpec

SHORTEST = 16  # characters of a salt
MOST_CLASSES = 20  # more, if the manifest does not list them, look like identifiers
KEY_LENGTH = 32  # hex digits, 128 bits: no collision among any number of cases
_SHAPES = [
    (re.compile(r"(?<![\w.])(?:[A-Za-z]:)?(?:[\\/][^\s\\/:;,()'\"]+)+[\\/]?"), "<path>"),
    (re.compile(r"(?<![\d.])\d+(?:\.\d+){4,}(?![\d.])"), "<uid>"),
    (re.compile(r"(?<!\d)(?:19|20)\d\d[-/.]?(?:0[1-9]|1[0-2])[-/.]?(?:0[1-9]|[12]\d|3[01])(?!\d)"), "<date>"),
]
_TEXT_VR = {"PN", "LO", "SH", "LT", "ST", "UT", "UC", "DA", "DT", "UI", "AE"}  # free text, names, dates, ids


def salt() -> bytes:
    """The user's salt; made on first use."""
    if text := os.environ.get("SMARTLAB_SALT"):
        if len(text) < SHORTEST:  # a short salt is found by trying
            raise UseError(
                "SMARTLAB_SALT is too short to hide anything",
                found=f"{len(text)} characters",
                expected=f"a random text of at least {SHORTEST}",
            )
        return text.encode()
    path = Path.home() / ".config" / "smartlab" / "salt"
    try:
        if not path.exists():
            _make_salt(path)
        key = path.read_bytes()
    except OSError as error:
        key, reason = b"", error.strerror
    else:
        reason = f"{len(key)} characters" if key else "an empty file"
    if len(key) < SHORTEST:  # hashing with none, or one found by trying, would look the same and hide nothing
        raise DataError(
            "the salt cannot be kept here",
            path=path,
            found=reason,
            fix="set SMARTLAB_SALT to a long random text, and keep it: the store needs it again",
        )
    return key


def _make_salt(path: Path) -> None:
    """A random salt, there whole or not at all; of two processes that start together both use one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(secrets.token_hex(32))
    try:
        os.link(temporary, path)  # unlike a rename, never replaces the salt that another made
    except FileExistsError:
        pass
    finally:
        temporary.unlink()


def hashed(key: bytes, kind: str, text: str) -> str:
    """Salted hash of an id. `kind` keeps a case and a patient of the same name apart."""
    return hmac.new(key, f"{kind}\0{text}".encode(), hashlib.sha256).hexdigest()[:KEY_LENGTH]


def scrub(text: str, known: Iterable[str], instead: str = "<id>") -> str:
    """`text` without any of the `known` strings, and without paths, UIDs and dates.

    >>> scrub("/data/DOE_JOHN/ct.nii.gz: cut short at 4096 bytes", ["DOE_JOHN"])
    '<path>: cut short at 4096 bytes'
    """
    for word in sorted({w for w in known if _identifies(w)}, key=len, reverse=True):
        text = re.sub(rf"(?<!\w){re.escape(word)}(?!\w)", instead, text, flags=re.IGNORECASE)
    for shape, name in _SHAPES:
        text = shape.sub(name, text)
    return " ".join(text.split())


def storable(labels: Mapping[str, LabelSpec], cases: Iterable[Case]) -> set[str]:
    """Labels that go into a store: all but free text, which nothing learns from and which may name somebody.

    Classes that the manifest does not list are text as well: refused where they look like names or dates.
    """
    for name, spec in labels.items():
        if spec.kind in ("binary", "multiclass", "multilabel") and not spec.classes:
            given = [case.labels.get(name) for case in cases]
            values = {str(v) for one in given for v in (one if isinstance(one, list) else [one])} - {"None"}
            telling = next((v for v in sorted(values) if scrub(v, []) != " ".join(v.split())), None)
            if len(values) > MOST_CLASSES or telling:
                raise DataError(
                    f"label {name!r} looks like text that could identify a patient",
                    found="a date, a path or a UID among its values" if telling else f"{len(values)} values",
                    expected=f"at most {MOST_CLASSES} classes, or their list as `classes` in the manifest",
                    fix=f'call it text ("kind": "text"), which stays out of the store, or leave {name!r} out',
                )
    return {name for name, spec in labels.items() if spec.kind != "text"}


def _identifies(word: str) -> bool:
    """Short plain numbers stay: 'slice 12' must not lose its 12 because a case is called 12."""
    return len(word) >= 4 or (len(word) >= 2 and not word.isdigit())


def identifying_words(path: Path) -> set[str]:
    """File names below `path`, and every text of its DICOM headers: what an error could repeat."""
    import pydicom

    words: set[str] = set()
    files = [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]
    for file in files:
        words |= {file.name, *file.relative_to(path).parts}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they would print header values
            try:
                header = pydicom.dcmread(file, stop_before_pixels=True)
            except Exception:  # not DICOM, or too damaged to hold a header: nothing to learn from it
                continue
            for text, name in _texts(header):  # a name appears whole, or by its parts: DOE^JOHN, John Doe
                words |= {text, *(re.split(r"[\^=\s]+", text) if name else [])}
    return {word for word in words if word}


def _texts(header: Any) -> Iterator[tuple[str, bool]]:
    """(text, whether it is a name) of every element; one too damaged to parse gives its bytes as they are."""
    for tag in list(header.keys()):
        try:
            element = header[tag]
            items, value = (element.value, []) if element.VR == "SQ" else ([], element.value)
            values = value if element.VM > 1 else [value]
            texts = [str(one) for one in values] if element.VR in _TEXT_VR else []
        except Exception:
            raw = getattr(header.get_item(tag), "value", None)
            yield (raw.decode("latin-1") if isinstance(raw, bytes) else ""), True
            continue
        for item in items:
            yield from _texts(item)
        yield from ((text, element.VR == "PN") for text in texts)
