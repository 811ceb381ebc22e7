"""What the files below a folder are, told by their headers: images, DICOM series, masks, and the rest.

No voxel is read, so a thousand files take seconds. What a header can tell is checked as reading does it
(missing slices, missing orientation, damaged files); what cannot be used is set aside with the reason.
"""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydicom.config import disable_value_validation
from pydicom.dataset import Dataset
from tqdm.auto import tqdm

from smartlab.core.errors import DataError
from smartlab.data.cohort.privacy import hashed, salt
from smartlab.data.images.dicom_headers import headers_of, owner, series_uid
from smartlab.data.images.grid import LPS_TO_RAS, check_affine, ras_grid
from smartlab.data.images.mammography import PICTURES
from smartlab.data.images.readers import NIFTI, Volume, empty, read_grid

SERIES, MAMMOGRAM, PICTURE, SEGMENTATION, CONTOURS = "DICOM series", "mammogram", "picture", "SEG", "RTSTRUCT"
_FORMATS = dict.fromkeys(NIFTI, "NIfTI") | {".nrrd": "NRRD", ".nhdr": "NRRD", ".mhd": "MetaImage", ".mha": "MetaImage"}  # fmt: skip
VOLUMES = ("CT", "MR")  # modalities of DICOM series that are read as volumes
_VOXELS = (".raw", ".zraw")  # of a MetaImage or NRRD whose header stands beside
_OFF_GRID = 0.3  # voxels, as in dicom_masks
_REFERENCES = ["ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence"]
_STRUCTURES = ["SegmentSequence", "StructureSetROISequence"]


@dataclass
class Found:
    """An image, a series or a segmentation.

    path:        below the folder, as in a manifest; "." where a series fills the folder itself.
    grid:        where its voxels lie, without voxels; of RTSTRUCT and SEG None (see `frames`).
    patient:     salted hash of the DICOM patient id, "" where there is none.
    refers:      series that a SEG or RTSTRUCT was drawn on.
    structures:  their names: free text, to show to a person and never to store.
    frames:      SEG: (n, 2, 3) RAS mm of the first and last pixel of every frame.
    """

    path: str
    kind: str
    grid: Volume | None = None
    uid: str | None = None
    files: int = 1
    patient: str = ""
    refers: tuple[str, ...] = ()
    structures: tuple[str, ...] = field(default=(), repr=False)
    frames: np.ndarray | None = None
    note: str = ""
    name: str = ""  # the path, without what tells a channel from the others

    def __post_init__(self) -> None:
        self.name = self.name or self.path


@dataclass
class Contents:
    """What is below a folder: what can be used, and (path, reason) of what cannot."""

    found: list[Found] = field(default_factory=list)
    left: list[tuple[str, str]] = field(default_factory=list)

    def take(self, place: str, make: Callable[..., Found], *given: Any) -> None:
        """What this makes of a place, or why it cannot be used."""
        try:
            self.found.append(make(place, *given))
        except DataError as error:
            self.left.append((place, error.advice))
        except Exception as error:  # a garbled header can fail anywhere
            self.left.append((place, f"garbled header ({type(error).__name__})"))


@disable_value_validation()  # its warnings would print header values
def look_into(root: Path, ignore: Collection[Path] = (), progress: bool = False) -> Contents:
    """Everything below `root`, in order of path; `ignore` are files that are there for another reason."""
    contents, rest = Contents(), []
    for file in _watched(list(_walk(root, contents)), f"scan {root.name}", progress):
        place = file.relative_to(root).as_posix()
        if file in ignore or (file.suffix.lower() in _VOXELS and _header_beside(file)):
            continue
        if not file.resolve().is_relative_to(root.resolve()):
            contents.left.append((place, "a link that leads out of the folder: copy the file into it"))
        elif kind := next((k for s, k in _FORMATS.items() if file.name.lower().endswith(s)), None):
            contents.take(place, _file, file, kind)
        else:
            rest.append(file)
    headers, damage, others = headers_of(_watched(rest, "DICOM headers", progress), _tags())
    for file in others:
        place = file.relative_to(root).as_posix()
        if file.suffix.lower() in PICTURES:
            contents.take(place, _picture, file)
        else:
            contents.left.append((place, f"not an image ({file.suffix.lower() or 'no extension'})"))
    _sort_dicom(root, headers, [(file, error.advice) for file, error in damage], contents)
    contents.found.sort(key=lambda one: one.path)
    return contents


def _watched(files: list[Path], what: str, progress: bool) -> Iterable[Path]:
    return tqdm(files, desc=what, unit="file", disable=not progress or len(files) < 500)


def _walk(root: Path, contents: Contents) -> Iterator[Path]:
    """Files in order, hidden ones left out; links to folders are not followed, and said."""
    for folder, inside, names in os.walk(root):
        inside[:] = sorted(name for name in inside if not name.startswith("."))
        for name in inside:
            if (link := Path(folder) / name).is_symlink():
                why = "a link to a folder: it is not followed, put the folder itself here"
                contents.left.append((link.relative_to(root).as_posix(), why))
        yield from (Path(folder) / name for name in sorted(names) if not name.startswith("."))


def _header_beside(file: Path) -> bool:
    return any(file.with_suffix(suffix).is_file() for suffix in (".mhd", ".nhdr"))


def _file(place: str, file: Path, kind: str) -> Found:
    return Found(place, kind, read_grid(file))


def _picture(place: str, file: Path) -> Found:
    """A PNG or TIFF: its size only."""
    from PIL import Image

    try:
        with Image.open(file) as image:
            columns, rows = image.size
    except Exception as error:
        raise DataError("cannot be read as an image", path=file, found=type(error).__name__) from None
    return Found(place, PICTURE, Volume(empty((rows, columns, 1)), np.eye(4), "MG", str(file)))


# ---- DICOM ---------------------------------------------------------------------------------------


def _tags() -> list[str]:
    from smartlab.data.images.dicom import SLICE_TAGS

    return [*SLICE_TAGS, "SOPInstanceUID", *_REFERENCES, *_STRUCTURES]


def _sort_dicom(
    root: Path, headers: list[Dataset], damaged: list[tuple[Path, str]], contents: Contents
) -> None:
    """Series, mammograms and segmentations among the headers; a series with a damaged slice is set aside."""
    if not headers:
        contents.left += [(file.relative_to(root).as_posix(), why) for file, why in damaged]
        return
    from smartlab.data.images.dicom import kind_of

    series: dict[str, list[Dataset]] = defaultdict(list)
    for header in headers:
        series[series_uid(header)].append(header)
    broken = _blame(root, series, damaged, contents)
    for uid, own in series.items():
        place = _place(root, own)
        kinds = {kind_of(header, None) for header in own}
        modality = str(own[0].get("Modality", "unknown"))
        if uid in broken:
            contents.left.append((place, broken[uid]))
        elif "volume" in kinds and modality == "MG":
            contents.found += [_mammogram(root, header) for header in own]
        elif "volume" in kinds and modality in VOLUMES:
            used = [header for header in own if kind_of(header, None) == "volume"]
            used, place = _without_copies(root, used, contents)
            contents.take(place, _series, root, uid, used, modality)
        elif kinds <= {"SEG object", "RTSTRUCT object"}:
            contents.take(place, _segmentation, uid, own)
        else:
            what = f"DICOM of modality {modality}" if "volume" in kinds else ", ".join(sorted(kinds))
            contents.left.append((place, f"{what}: only CT, MR and mammograms are read"))


def _blame(
    root: Path, series: dict[str, list[Dataset]], damaged: list[tuple[Path, str]], contents: Contents
) -> dict[str, str]:
    """Series UID -> why it cannot be trusted: a damaged file that is of it, or can be of no other."""
    folders = defaultdict(set)
    for uid, own in series.items():
        for header in own:
            folders[Path(str(header.filename)).parent].add(uid)
    broken = {}
    for file, why in damaged:
        here = folders.get(file.parent, set())
        uid = owner(file, series) or (next(iter(here)) if len(here) == 1 else "")
        if uid:
            broken[uid] = f"{file.name}: {why}"
        else:
            contents.left.append((file.relative_to(root).as_posix(), why))
    return broken


def _place(root: Path, headers: list[Dataset]) -> str:
    """The folder of a series below the root; the file itself where it is only one."""
    files = [Path(str(header.filename)) for header in headers]
    common = files[0] if len(files) == 1 else Path(os.path.commonpath([file.parent for file in files]))
    return common.relative_to(root).as_posix()


def _without_copies(root: Path, headers: list[Dataset], contents: Contents) -> tuple[list[Dataset], str]:
    """The slices of a series and its folder, without copies of slices that lie elsewhere."""
    crowd = Counter(Path(str(header.filename)).parent for header in headers)
    by_home = sorted(headers, key=lambda h: (-crowd[Path(str(h.filename)).parent], str(h.filename)))
    first = {str(header.get("SOPInstanceUID", header.filename)): header for header in reversed(by_home)}
    place, firsts = _place(root, list(first.values())), set(map(id, first.values()))
    kept = []
    for header in headers:
        file = Path(str(header.filename))
        if id(header) in firsts or file.is_relative_to(root / place):  # there it would be read, and is told
            kept.append(header)
        else:
            contents.left.append((file.relative_to(root).as_posix(), f"a copy of a slice in {place}"))
    return kept, place


def _patient(header: Dataset) -> str:
    text = str(header.get("PatientID") or "").strip()
    return hashed_patient(text) if text else ""


def hashed_patient(text: str) -> str:
    """A patient as a manifest of one's own names them: the same for a DICOM header and a table."""
    return "p-" + hashed(salt(), "patient", text)[:12]


def _series(place: str, root: Path, uid: str, headers: list[Dataset], modality: str) -> Found:
    from smartlab.data.images.dicom import planes_in
    from smartlab.data.images.dicom_geometry import stack_planes

    planes = [plane for header in headers for plane in planes_in(header, modality)]
    stack = stack_planes(planes, root / place, "correct")
    rows, columns = stack.planes[0].size
    check_affine(affine := LPS_TO_RAS @ stack.affine, root / place)
    shape, affine = ras_grid((columns, rows, len(stack.planes)), affine)
    tilted = (
        f"gantry tilt of {stack.tilt_degrees:.1f}°: give --tilt correct" if stack.offsets is not None else ""
    )
    grid = Volume(empty(shape), affine, modality, place)
    return Found(place, SERIES, grid, uid, len(headers), _patient(headers[0]), note=tilted)


def _mammogram(root: Path, header: Dataset) -> Found:
    place = Path(str(header.filename)).relative_to(root).as_posix()
    shape = int(header.get("Rows", 0)), int(header.get("Columns", 0)), 1
    return Found(place, MAMMOGRAM, Volume(empty(shape), np.eye(4), "MG", place), patient=_patient(header))


def _segmentation(place: str, uid: str, headers: list[Dataset]) -> Found:
    """A SEG or RTSTRUCT: what it was drawn on, and what is drawn."""
    if len(headers) > 1:
        raise DataError(f"{len(headers)} segmentations in one series", expected="one")
    header = headers[0]
    if str(header.Modality) == "SEG":
        refers = [str(item.SeriesInstanceUID) for item in header.get("ReferencedSeriesSequence") or []]
        names = [str(item.SegmentLabel) for item in header.SegmentSequence]
        return Found(
            place,
            SEGMENTATION,
            None,
            uid,
            refers=tuple(refers),
            structures=tuple(names),
            frames=_frames(header),
        )
    refers = [
        str(series.SeriesInstanceUID)
        for frame in header.get("ReferencedFrameOfReferenceSequence") or []
        for study in frame.get("RTReferencedStudySequence") or []
        for series in study.get("RTReferencedSeriesSequence") or []
    ]
    names = [str(item.ROIName) for item in header.StructureSetROISequence]
    return Found(place, CONTOURS, None, uid, refers=tuple(refers), structures=tuple(names))


def _frames(header: Dataset) -> np.ndarray:
    """(n, 2, 3) RAS mm of the first and the last pixel of every frame of a SEG."""
    from smartlab.data.images.dicom_planes import _attribute, frame_count

    corners = []
    for frame in range(frame_count(header)):
        first, axes, spacing = (
            np.array(_attribute(header, frame, name), float)
            for name in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing")
        )
        last = (header.Columns - 1) * spacing[1] * axes[:3] + (header.Rows - 1) * spacing[0] * axes[3:]
        corners.append([first, first + last])
    return np.array(corners) * (-1, -1, 1)


def frames_apart(frames: np.ndarray, grid: Volume) -> str:
    """Why the frames of a SEG do not lie on the voxels of a scan, or ""."""
    index = grid.to_index(frames)
    off = float(np.abs(index - index.round()).max())
    size = np.abs(index[:, 1] - index[:, 0]).max(axis=0)
    if off > _OFF_GRID or (size > np.array(grid.shape)).any():
        return f"not on the voxels of its scan ({off:.2f} voxels off)"
    return ""
