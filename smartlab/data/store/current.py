"""Which store was made from what, and whether it still is: told by names, sizes and times, without opening an image."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from smartlab.core.errors import UseError
from smartlab.data.cohort.case import uid_in
from smartlab.data.cohort.manifest import Manifest
from smartlab.data.cohort.privacy import hashed, salt
from smartlab.data.images.readers import files_of
from smartlab.data.store import index
from smartlab.data.store.request import FORMAT, LABELS, FlatSettings, Settings


def salt_check(key: bytes) -> str:
    """Tells whether two stores share a salt, and nothing else about it."""
    return hashed(key, "store", "salt check")


def check_salt(key: bytes, header: index.Row, path: Path) -> None:
    """Refuse a store whose keys are of another salt."""
    if header["salt_check"] != salt_check(key):
        raise UseError(
            "this store was built with another salt",
            path=path,
            fix="set SMARTLAB_SALT to the salt it was built with, or choose another folder",
        )


def made_from(man: Manifest, root: Path, settings: Settings | FlatSettings, key: bytes) -> str:
    """Tells stores apart by their images and voxel size; with other labels or splits it is the same store."""
    images: list[Any] = [group.key for group in man.images()]
    images += [list(group.cases[0].channels.values()) for group in man.images() if man.channels]
    facts = [os.path.realpath(root), images, settings.spacing, settings.labels, getattr(settings, "grey", "")]
    facts += ["MR"] if man.modality == "MR" else []
    return hashed(key, "made from", json.dumps(facts))


def state_of(man: Manifest, root: Path) -> str | None:
    """`cohort_state` as a store may keep it, salted."""
    state = cohort_state(man, root)
    return None if state is None else hashed(salt(), "state", state)


def is_current(
    out: Path, man: Manifest, root: Path, settings: Settings | FlatSettings, state: str | None
) -> bool:
    """Whether a build would change nothing here: told by names, sizes and times, in under a second for 10,000 images.

    state: of the sources (`state_of`).
    """
    header, key = index.read_header(out) or {}, salt()
    wanted = {
        "complete": True,  # what failed failed on these very files
        "format": settings.format,
        "settings": asdict(settings),
        "made_from": made_from(man, root, settings, key),
        "state": state,
    }
    if state is None or any(header.get(name) != value for name, value in wanted.items()):
        return False
    try:
        with os.scandir(out / "volumes") as entries:
            sizes = {f"volumes/{entry.name}": entry.stat().st_size for entry in entries}
    except OSError:
        return False
    return header.get("volumes") == index.digest(sorted(sizes.items()))


def cohort_state(man: Manifest, root: Path) -> str | None:
    """Digest of a manifest and of name, size and time of every file it names; None where these cannot be told.

    Of the files of a series, their number and the first and last are looked at, and the time of their folder, which
    tells when one came, went or was replaced. Opens no image and takes a fraction of a second for 10,000. What lies
    below `root` under another name than its series UID is known to who has read all headers only.
    """
    # as before there were channels
    unsaid: Any = None if man.channels else {"all_cases": {"__all__": {"channels"}}}
    facts = hashlib.sha256(f"{FORMAT} {LABELS} {man.model_dump_json(exclude=unsaid)}".encode())
    images = [case.image or case.series_uid for case in man.cases]
    others = [place for c in man.cases for place in (*c.channels.values(), c.label_map, *c.masks.values())]
    try:
        for place in dict.fromkeys(filter(None, images + others)):
            for seen in _seen(root / (uid_in(place) or place)):
                facts.update(repr(seen).encode())
    except OSError:
        return None
    return facts.hexdigest()


def _seen(source: Path) -> Iterator[tuple[str, int, int]]:
    if not source.is_dir():
        for file in files_of(source):
            yield _facts(file.name, file.stat())
        return
    with os.scandir(source) as entries:
        inside = sorted(entries, key=lambda entry: entry.name)
    files = [entry for entry in inside if not entry.is_dir()]
    yield ".", len(files), source.stat().st_mtime_ns
    for entry in inside:
        if entry.is_dir():
            yield from _seen(Path(entry.path))
        elif entry in (files[0], files[-1]):
            yield _facts(entry.name, entry.stat())


def _facts(name: str, stat: os.stat_result) -> tuple[str, int, int]:
    return name, stat.st_size, stat.st_mtime_ns
