"""Damage files of every format at random and count what comes of it.

Whatever is done to a file, reading it may end in three ways only: the content as it was, one `SmartlabError`,
or, for formats that carry no checksum, other content. An exception of another kind is a traceback for somebody.
The number of tries grows with SMARTLAB_ATTACK (a factor: with 60 the slow part takes about an hour).
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import signal
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from smartlab.core.errors import SmartlabError

PATIENCE = 20  # seconds in which every small file must be read or refused
TOKENS = [
    b"",
    b"null",
    b"-1",
    b"0",
    b"1e309",
    b"[]",
    b"{}",
    b"NaN",
    b'"',
    b"\0",
    b"9" * 25,
    b"true",
    b"\xff\xfe",
    b": ",
]
VALUES = [
    None,
    True,
    0,
    -1,
    10**30,
    0.5,
    "",
    "x",
    "../x",
    "2024-13-45",
    [],
    {},
    [1, "a"],
    {"a": 1},
    [None],
    {"a": [{}]},
]
SAME, REFUSED, OTHER, TRACEBACK, HANG = "same", "refused", "other content", "traceback", "hang"


def tries(usual: int) -> int:
    """How often to try."""
    return max(1, round(usual * float(os.environ.get("SMARTLAB_ATTACK", 1))))


@dataclass
class Target:
    """A file to damage, and how to read what it is part of: to a text that tells two contents apart."""

    file: Path
    read: Callable[[], Any]
    sealed: bool = False  # carries a checksum: other content must be noticed
    header: int = 0  # bytes at the beginning that are hit in half of the tries
    text: Any = None  # the module that loads and dumps it, where it is JSON or YAML: half of the tries change its tree


class Hang(BaseException):
    """Not an Exception, so that nothing on the way takes it for damage."""


def _hang(number: int, frame: Any) -> None:
    raise Hang


def flip_a_bit(content: bytes, rng: np.random.Generator, target: Target) -> bytes:
    return _flip(content, rng, target.header)


def spoil(content: bytes, rng: np.random.Generator, target: Target) -> bytes:
    """What happens to files, or to who writes them by hand."""
    if target.text is None or rng.random() < 0.5:
        return _spoil(content, rng, target.header)
    tree = target.text.loads(content) if target.text is json else yaml.safe_load(content)
    for _ in range(rng.integers(1, 3)):
        _change(tree, rng)
    return (json.dumps(tree) if target.text is json else yaml.safe_dump(tree, sort_keys=False)).encode()


def _change(tree: Any, rng: np.random.Generator) -> None:
    """One value of a tree becomes something else, goes, or moves to another name."""
    places = list(_places(tree))
    if not places:
        return
    home, key = places[rng.integers(len(places))]
    what = rng.integers(len(VALUES) + 3)
    if what < len(VALUES):
        home[key] = copy.deepcopy(VALUES[what])
    elif what == len(VALUES) and isinstance(home, dict):
        home[f"{key}x"] = home.pop(key)
    elif what == len(VALUES) + 1:
        home[key] = [home[key]]
    else:
        del home[key]


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    inside = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in list(inside):
        yield tree, key
        yield from _places(value)


def _flip(content: bytes, rng: np.random.Generator, header: int) -> bytes:
    spoilt = bytearray(content)
    spoilt[rng.integers(_within(content, rng, header))] ^= 1 << int(rng.integers(8))
    return bytes(spoilt)


def _spoil(content: bytes, rng: np.random.Generator, header: int) -> bytes:
    """One to three of the things that happen to files: bits, bytes, cuts, holes, repeats, other words."""
    for _ in range(rng.integers(1, 4)):
        end = _within(content, rng, header)
        at, length = int(rng.integers(end)), int(rng.integers(1, 9))
        some = rng.integers(0, 256, length, np.uint8).tobytes()
        word = TOKENS[rng.integers(len(TOKENS))]
        content = [
            _flip(content, rng, header),
            content[:at] + some + content[at + length :],
            content[:at],
            content[:at] + content[at + length :],
            content[:at] + content[at : at + 40] + content[at:],
            content[:at] + word + content[at + length :],
        ][rng.integers(6)] or b"\n"
    return content


def _within(content: bytes, rng: np.random.Generator, header: int) -> int:
    return min(header, len(content)) if header and rng.random() < 0.5 else len(content)


def attack(
    target: Target, count: int, seed: int, how: Callable[..., bytes] = spoil, told: list[str] | None = None
) -> Counter[str]:
    """What came of so many tries; what must not have come is told in `told`, with how to do it again."""
    content, good = target.file.read_bytes(), outcome(target.read)[1]
    assert good is not None, "the file can be read before it is damaged"
    found: Counter[str] = Counter()
    try:
        for number in range(count):
            spoilt = how(content, np.random.default_rng((seed, number)), target)
            target.file.write_bytes(spoilt)
            kind, value = outcome(target.read)
            if kind == SAME and value != good:
                kind = OTHER
            found[kind] += 1
            if told is not None and (kind in (TRACEBACK, HANG) or (kind == OTHER and target.sealed)):
                told.append(f"{target.file.name}, seed ({seed}, {number}): {kind} {value}")
    finally:
        target.file.write_bytes(content)
    return found


def note(kind: str, name: str, found: Mapping[str, int]) -> None:
    """Counts for docs/PROMISES.md, where a file for them is named."""
    if place := os.environ.get("SMARTLAB_ATTACK_COUNTS"):
        with Path(place).open("a") as file:
            file.write(json.dumps({"try": kind, "of": name, **found}) + "\n")


def outcome(read: Callable[[], Any]) -> tuple[str, Any]:
    """(kind, fingerprint of what was read or the words of the error)."""
    before = signal.signal(signal.SIGALRM, _hang)
    signal.alarm(PATIENCE)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return SAME, fingerprint(read())
    except SmartlabError as error:
        return REFUSED, str(error)
    except Hang:
        return HANG, ""
    except Exception as error:
        return TRACEBACK, f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def fingerprint(value: Any) -> str:
    """Tells contents apart."""
    if isinstance(value, str):
        return value
    if isinstance(value, np.ndarray):
        data = np.ascontiguousarray(value)
        return f"{value.dtype} {value.shape} {hashlib.sha256(data.view(np.uint8).tobytes()).hexdigest()}"
    if isinstance(value, dict):
        return str(
            {key: fingerprint(one) for key, one in sorted(value.items(), key=lambda item: str(item[0]))}
        )
    if isinstance(value, list | tuple):
        return str([fingerprint(one) for one in value])
    return repr(value)
