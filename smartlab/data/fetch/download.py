"""Files from the web: resumable download with checksum, and unpacking that stays inside its folder.

`download` keeps what it has in `<target>.part` and asks for the rest (HTTP Range) after a broken
connection or a killed process; the file gets its name only once length and checksum are right.
`unpack` looks at every member of an archive first, and refuses the whole archive if one has an
absolute path, climbs out with "..", or is a link or device.
"""

from __future__ import annotations

import hashlib
import http.client
import os
import shutil
import stat
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smartlab.core.errors import DataError, UseError
from smartlab.core.files import size_of, whole
from smartlab.data.cohort.case import leaves

CHUNK = 1 << 20
TIMEOUT = 20.0  # seconds without a byte
RETRIES = 5  # in a row without progress
BACKOFF = 1.0  # seconds before the first retry, doubled each time
REACH = 5.0  # seconds to find out that there is no network

Progress = Callable[[int], object]  # called with the number of bytes that arrived


def unreachable(url: str, seconds: float = REACH) -> str | None:
    """Why the server of `url` cannot be reached, or None. Answers within `seconds`, proxies included."""
    _refuse_other_schemes(url)
    answer: list[str | None] = [f"no answer within {seconds:g} s"]

    def ask() -> None:
        try:
            with _open(url, method="HEAD", timeout=seconds):
                answer[0] = None
        except urllib.error.HTTPError:  # an answer all the same
            answer[0] = None
        except (OSError, http.client.HTTPException) as error:
            answer[0] = str(getattr(error, "reason", error))

    # In a thread: looking up a name may hang far longer than any timeout that can be set.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return answer[0]


def download(
    url: str,
    target: str | Path,
    *,
    md5: str | None = None,
    sha256: str | None = None,
    progress: Progress = lambda n: None,
) -> Path:
    """Fetch one file to `target`, continuing an earlier attempt; nothing is done if it is there."""
    target = Path(target)
    if target.exists():
        return target
    part = target.with_name(target.name + ".part")
    part.parent.mkdir(parents=True, exist_ok=True)
    failures = 0
    while True:
        before = _size(part)
        try:
            _receive(url, part, progress)
            break
        except urllib.error.HTTPError as error:
            if error.code < 500 and error.code not in (408, 429):
                raise DataError(
                    "the server refuses this file", path=url, found=f"HTTP {error.code}"
                ) from None
            reason: object = f"HTTP {error.code}"
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or error
        failures = 1 if _size(part) > before else failures + 1
        if failures > RETRIES:
            raise DataError(
                "the connection keeps failing",
                path=url,
                found=reason,
                fix=f"run the same command again: it continues at {_size(part) / 1e6:.0f} MB",
            )
        time.sleep(BACKOFF * 2 ** (failures - 1))
    _check(part, url, "md5", md5)
    _check(part, url, "sha256", sha256)
    os.replace(part, target)
    _tag(part).unlink(missing_ok=True)
    return target


def _receive(url: str, part: Path, progress: Progress) -> None:
    """The bytes that `part` does not have yet; from the start where the file has changed since."""
    have = _size(part)
    headers = {}
    if have:
        headers["Range"] = f"bytes={have}-"
        if _tag(part).exists():
            headers["If-Range"] = _tag(part).read_text()
    try:
        response = _open(url, headers=headers)
    except urllib.error.HTTPError as error:
        total = error.headers.get("Content-Range", "").rpartition("/")[2]
        if error.code != 416:
            raise
        if total == str(have):  # nothing is missing
            return
        part.unlink()
        raise ConnectionError("the partial file is longer than the file") from None
    with response:
        resumed = response.status == 206
        if not resumed:
            progress(-have)
        if etag := response.headers.get("ETag"):
            _tag(part).write_text(etag)
        expected = int(response.headers.get("Content-Length", -1))
        received = 0
        with part.open("ab" if resumed else "wb") as file:
            while block := response.read(CHUNK):
                file.write(block)
                received += len(block)
                progress(len(block))
    if expected >= 0 and received < expected:
        raise ConnectionError(f"cut after {received} of {expected} bytes")


def _open(
    url: str, *, method: str = "GET", headers: dict[str, str] | None = None, timeout: float = TIMEOUT
) -> Any:
    _refuse_other_schemes(url)
    request = urllib.request.Request(
        url, headers={"User-Agent": "smartlab", **(headers or {})}, method=method
    )
    return urllib.request.urlopen(request, timeout=timeout)


def _refuse_other_schemes(url: str) -> None:
    """A manifest from elsewhere must not make us read local files."""
    if not url.startswith(("https://", "http://")):
        raise UseError("only web addresses are fetched", path=url, expected="https://…")


def _tag(part: Path) -> Path:
    """Where the server's version mark of a partial file is kept, so that versions are never mixed."""
    return part.with_name(part.name + ".etag")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _check(path: Path, url: str, kind: str, expected: str | None) -> None:
    if expected is None:
        return
    with path.open("rb") as file:
        found = hashlib.file_digest(file, kind).hexdigest()
    if found != expected.lower():
        path.unlink()
        _tag(path).unlink(missing_ok=True)
        raise DataError(
            f"the {kind} checksum is wrong, and the file was removed",
            path=url,
            found=found,
            expected=expected,
            fix="fetch again; if it stays wrong, the file on the server has changed since this manifest was made",
        )


# ---- archives ----


def is_archive(path: str | Path) -> bool:
    """Whether `unpack` knows this kind of file, by its name."""
    return str(path).endswith((".zip", ".tar", ".tar.gz", ".tgz"))


def unpack(archive: str | Path, root: str | Path) -> int:
    """Unpack a zip or tar below `root`; returns the number of files. Existing files are replaced."""
    archive, root = Path(archive), Path(root)
    try:
        if archive.suffix == ".zip":
            with zipfile.ZipFile(archive) as zipped:
                infos = [(i.filename, None if i.is_dir() else i.file_size, i) for i in zipped.infolist()]
                return _unpack(archive, root, infos, zipped.open)
        with tarfile.open(archive) as tarred:
            members = [(m.name, None if m.isdir() else m.size, m) for m in tarred.getmembers()]
            return _unpack(archive, root, members, tarred.extractfile)
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise DataError(
            "is a damaged archive", path=archive, found=error, fix="remove it and fetch again"
        ) from None


Member = zipfile.ZipInfo | tarfile.TarInfo


def _unpack(
    archive: Path, root: Path, members: Sequence[tuple[str, int | None, Member]], read: Callable[[Any], Any]
) -> int:
    """Write the members (name, size or None of a folder, itself), each file whole; any unsafe one refuses all."""
    for name, _, member in members:
        plain = _is_plain(member)
        if leaves(name) or not plain:
            raise DataError(
                "the archive is unsafe, and nothing was unpacked",
                path=archive,
                found=f"member {name!r}" + ("" if plain else ", a link or device"),
                expected="plain files below the folder",
            )
    files = [(name, size, member) for name, size, member in members if size is not None]
    check_room(root, sum(size for _, size, _ in files), "not enough disk space to unpack", archive)
    for name, _, member in files:
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if not target.parent.resolve().is_relative_to(root.resolve()):
            raise DataError("leads out of the data root through a link", path=target.parent)
        with read(member) as source, whole(target) as temporary, temporary.open("wb") as file:
            shutil.copyfileobj(source, file, CHUNK)
    return len(files)


def _is_plain(member: Member) -> bool:
    if isinstance(member, tarfile.TarInfo):
        return member.isfile() or member.isdir()
    return stat.S_IFMT(member.external_attr >> 16) in (0, stat.S_IFREG, stat.S_IFDIR)


def check_room(folder: Path, needed: float, problem: str, path: Path) -> None:
    """Refuse what does not fit on the disk of a folder, which is made; in bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    if needed > (free := shutil.disk_usage(folder).free):
        raise DataError(problem, path=path, found=f"{size_of(free)} free", expected=size_of(needed))
