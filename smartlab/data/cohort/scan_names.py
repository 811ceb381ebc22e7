"""What the names of files and folders say: mask or scan, what belongs together, and which patient."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from fnmatch import fnmatch
from pathlib import PurePosixPath

from smartlab.data.images.readers import NIFTI

UNNAMED = "mask"  # a mask whose name does not say what it shows: what its owner marked
MASK_WORD = re.compile(
    r"(mask|seg|segmentation|label|labelmap|roi|annotation)s?|(label|mask|seg)s?(tr|ts|va)"
)
SCAN_WORD = re.compile(
    r"ct|mg|(image|img|imaging|scan|volume|vol)s?|images?(tr|ts|va)|dicom|dcm|nifti|nii|orig(inal)?|0000"
)
VISIT = re.compile(  # what follows the patient's name in names, or stands above it: visits, sides, splits
    r"(pre|post|base(line)?|fu|follow(up)?|visit|ses(sion)?|time(point)?|tp|day|week|month|year|scan|t|v)\d*"
    r"|(19|20)\d\d((0[1-9]|1[0-2])([0-2]\d|3[01])?)?|train(ing)?|val(idation)?|test|l|r|left|right|cc|mlo|ml"
)
CROWD = 10  # a folder with more branches than this holds patients; one with fewer is a patient
_WORD = re.compile(r"[^_\-. ]+")


def words_of(name: str) -> list[str]:
    return _WORD.findall(name.lower()) or [""]


def stem(path: str) -> str:
    """The file's name without its suffix."""
    name = PurePosixPath(path).name
    known = next((s for s in reversed(NIFTI) if name.lower().endswith(s)), PurePosixPath(name).suffix)
    return name.removesuffix(name[-len(known) :] if known else "")


def slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def fits(pattern: str, *names: str) -> bool:
    """Whether a pattern of the user fits one of these names, in any case."""
    return any(fnmatch(name.lower(), pattern.lower()) for name in names)


def fits_path(pattern: str, path: str) -> bool:
    return fits(pattern, path, PurePosixPath(path).name, stem(path))


def is_named_like_a_mask(parts: Sequence[str]) -> bool:
    """Whether the nearest word for mask or scan, in the file's name and then its folders, is one for mask."""
    for depth, part in enumerate((stem(parts[-1]), *reversed(parts[:-1]))):
        words = words_of(part)
        if any(map(MASK_WORD.fullmatch, words)) or (depth and words[0].startswith("label")):
            return True
        if any(map(SCAN_WORD.fullmatch, words)):
            return False
    return False


def key_of(path: str, bare: bool = False) -> tuple[str, ...]:
    """Words of a path that are not for mask or scan; what its folder says, a file need not repeat.

    bare: without any word of a folder that has one for mask or scan (`labels_final/`, `images_v2/`).

    >>> key_of("s01/s01_ct.nii.gz"), key_of("s01/segmentations/liver.nii.gz")
    (('s01',), ('s01', 'liver'))
    """
    key: list[str] = []
    before: list[str] = []
    folders = PurePosixPath(path).parts[:-1]
    for depth, part in zip(range(len(folders), -1, -1), (*folders, stem(path)), strict=True):
        every = words_of(part)
        words = [w for w in every if w and not MASK_WORD.fullmatch(w) and not SCAN_WORD.fullmatch(w)]
        if bare and depth and len(words) < len(every):
            continue
        own = words[len(before) :] if before and words[: len(before)] == before else words
        key += own
        before = words or before
    return tuple(key)


def folder_of(path: str) -> str:
    """The folder of an image without those that only say what is in them (masks, images, dicom)."""
    parts = list(PurePosixPath(path).parts[:-1])
    while parts and all(MASK_WORD.fullmatch(w) or SCAN_WORD.fullmatch(w) for w in words_of(parts[-1])):
        parts.pop()
    return "/".join(parts) or "."


def patients_by_name(paths: Iterable[str], root: str) -> dict[str, str]:
    """Path -> patient by folders and names alone; `root` is the name of the whole folder.

    In doubt one patient: a folder with few scans is one, whatever they are called. So a split never has
    scans of a patient on both sides, and too few patients are seen in the report.
    """
    groups: dict[str, str] = {}
    _group({path: PurePosixPath(path).parts for path in paths}, groups, root, top=True)
    spelt: dict[str, str] = {}  # one patient, whatever the case of the letters
    return {path: spelt.setdefault(name.casefold(), name) for path, name in groups.items()}


def _group(items: dict[str, tuple[str, ...]], groups: dict[str, str], above: str, top: bool = False) -> None:
    """Patients of the images below one folder, from what is left of their paths there."""
    branches: dict[str, dict[str, tuple[str, ...]]] = defaultdict(dict)
    for path, parts in items.items():
        branches[parts[0] if parts else ""][path] = parts[1:]
    for name, below in branches.items():
        if not any(below.values()):  # files, or a series
            groups.update(dict.fromkeys(below, _patient_word(stem(name)) or above))
            continue
        passing = all(VISIT.fullmatch(w) or SCAN_WORD.fullmatch(w) for w in words_of(name))
        alone = top and len(branches) == 1
        if passing or alone or len({parts[0] for parts in below.values() if parts}) > CROWD:
            _group(below, groups, above if passing else name, alone)
        else:
            groups.update(dict.fromkeys(below, _patient_word(name) or above))


def _patient_word(name: str) -> str:
    """A name without words for scans at its ends, and for visits and sides at its end."""
    if found := re.match(r"sub-[A-Za-z0-9]+", name):
        return found.group()
    words = list(_WORD.finditer(name))
    while words and SCAN_WORD.fullmatch(words[0].group().lower()):
        words.pop(0)
    while words and (VISIT.fullmatch(last := words[-1].group().lower()) or SCAN_WORD.fullmatch(last)):
        words.pop()
    return name[words[0].start() : words[-1].end()] if words else ""
