"""One format for every dataset: what it is, under which licence, and its cases.

A manifest is a JSON file (`<name>.json`); a long list of cases sits beside it as CSV
(`cases_file`). Everything is checked on loading: unknown keys, duplicate case ids, paths that
leave the root, label values, patients that appear in two splits or two folds. Checks that need
the images are in `verify.py`. Of one's own data only the name and the cases must be given; published data
have their licence and citation beside.

All positions are millimetres. `Lesion.frame` says in which frame:

- "world": RAS world coordinates, as `Volume.affine` gives.
- "image": for annotations made on pixels without the DICOM headers at hand (LIDC, mammograms):
  in-plane mm from the centre of the first pixel (column × spacing, row × spacing), then the
  DICOM z of the slice (0 for a single image). `Lesion.world(volume)` resolves it on the scan.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from smartlab.core.errors import DataError, UseError, near
from smartlab.core.files import write_text
from smartlab.data.cohort.case_table import SHOWN, cases_from_csv, cases_to_csv

if TYPE_CHECKING:
    from smartlab.data.images.readers import Volume

LabelValue = int | float | str | list[str] | list[float] | None
UID = re.compile(r"^[0-9]+(\.[0-9]+)+$")


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", populate_by_name=True)


class Lesion(_Strict):
    """Where to look in the image: centre and full extent, mm."""

    model_config = ConfigDict(allow_inf_nan=False)

    center_mm: tuple[float, float, float]
    box_mm: tuple[float, float, float] | None = None
    diameter_mm: float | None = None
    frame: Literal["world", "image"] = "world"

    def world(self, volume: Volume) -> np.ndarray:
        """Centre in RAS world mm on this scan, (3,)."""
        if self.frame == "world":
            return np.asarray(self.center_mm, float)
        return volume.from_image_frame(self.center_mm)


class LabelSpec(_Strict):
    """What a label means. `kind` decides how it is checked and how evaluation treats it."""

    kind: Literal["binary", "multiclass", "multilabel", "number", "numbers", "time", "event", "text"]
    classes: list[str] = []
    unit: str | None = None
    minimum: float | None = None
    maximum: float | None = None
    description: str = ""

    def problem(self, value: LabelValue) -> str | None:
        """Why this value is not one of ours, or None."""
        if value is None or self.kind == "text":
            return None
        if self.kind in ("binary", "multiclass", "multilabel"):
            values = value if isinstance(value, list) else [value]
            unknown = [v for v in values if self.classes and v not in self.classes]
            return f"{unknown[0]!r} is not one of {self.classes}" if unknown else None
        values = value if isinstance(value, list) else [value]
        for v in values:
            if isinstance(v, str) or not np.isfinite(v):
                return f"{v!r} is not a number"
            low, high = self.minimum, self.maximum
            if (low is not None and v < low) or (high is not None and v > high):
                return f"{v} is outside {low} to {high}"
        return None


class Source(_Strict):
    """Where the images come from and how to get them."""

    kind: Literal["idc", "msd", "url", "phantom", "local"] = "local"
    location: str = ""  # IDC collection, MSD task, phantom kind, or a folder
    files: list[dict[str, Any]] = []  # for "url": {"url", "name", "md5" or "sha256", "size_mb"}
    size_gb: float | None = None
    parameters: dict[str, Any] = {}  # phantom: n, seed, shape …; folders: patterns for cases
    notes: str = ""  # accounts, registrations, clinical tables: where exactly

    @field_validator("parameters")
    @classmethod
    def _nested(cls, parameters: dict[str, Any]) -> dict[str, Any]:
        for name in ("layout", "segments"):
            if not isinstance(parameters.get(name, {}), dict):
                raise ValueError(f"parameters.{name} is {parameters[name]!r}, not an object")
        return parameters


class Case(_Strict):
    """One row: a scan, or one lesion of a scan (several cases may share an image)."""

    id: str
    patient: str
    image: str | None = None  # path below the root: a file or a DICOM folder
    series_uid: str | None = None  # DICOM SeriesInstanceUID, found by content below the root
    labels: dict[str, LabelValue] = {}
    masks: dict[str, str] = {}  # name -> path of a binary mask, or "series:<UID>" (SEG, RTSTRUCT)
    label_map: str | None = None  # path of an integer label image; names in Manifest.organs
    lesion: Lesion | None = None
    split: Literal["train", "val", "test"] | None = None
    fold: int | None = None
    sha256: str | None = None  # of the image file
    excluded: str | None = None  # why this case is left out by default

    @property
    def image_key(self) -> str:
        """What identifies the image: cases with the same key share one stored volume."""
        return self.series_uid or self.image or self.id

    @field_validator("image", "label_map")
    @classmethod
    def _inside(cls, path: str | None) -> str | None:
        return path if path is None else _safe(path)

    @field_validator("masks")
    @classmethod
    def _masks_inside(cls, masks: dict[str, str]) -> dict[str, str]:
        for path in masks.values():
            if not path.startswith("series:"):
                _safe(path)
            elif not UID.match(path.removeprefix("series:")):
                raise ValueError(f"{path!r} is not series:<UID>")
        return masks

    @field_validator("series_uid")
    @classmethod
    def _uid(cls, uid: str | None) -> str | None:
        if uid is not None and (not UID.match(uid) or len(uid) > 64):
            raise ValueError(f"{uid!r} is not a DICOM UID")
        return uid

    def locate(self, root: str | Path) -> Path:
        """The image of this case below `root`: a file, or the folder that holds the series."""
        root = Path(root)
        if self.image is not None:
            return _resolve_inside(root, self.image)
        if self.series_uid is None:
            raise DataError("has neither an image path nor a series UID", path=f"case {self.id}")
        folder = root / self.series_uid
        if folder.is_dir():
            return folder
        from smartlab.data.images.dicom import find_series

        return find_series(root, self.series_uid)


@dataclass(frozen=True)
class ImageGroup:
    """One image and the cases that live on it."""

    key: str
    cases: tuple[Case, ...]


class Manifest(_Strict):
    """A dataset. `.cases` leaves out excluded cases; `.all_cases` does not."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str = ""
    modality: Literal["CT", "MG"] = "CT"
    licence: str = "own data"
    citation: str = ""
    homepage: str = ""
    description: str = ""
    source: Source = Source()
    labels: dict[str, LabelSpec] = {}
    organs: dict[int, str] = {}  # value in label maps -> name
    notes: list[str] = []
    cases_file: str | None = None
    all_cases: list[Case] = Field(default=[], alias="cases")

    @property
    def cases(self) -> list[Case]:
        return [case for case in self.all_cases if not case.excluded]

    @property
    def patients(self) -> list[str]:
        return list(dict.fromkeys(case.patient for case in self.cases))

    @property
    def segments(self) -> dict[str, str]:
        """Which segment of a DICOM SEG, or ROI of an RTSTRUCT, a mask name stands for."""
        return dict(self.source.parameters.get("segments", {}))

    def images(self) -> list[ImageGroup]:
        """Unique images in manifest order, each with its cases."""
        groups: dict[str, list[Case]] = defaultdict(list)
        for case in self.cases:
            groups[case.image_key].append(case)
        return [ImageGroup(key, tuple(cases)) for key, cases in groups.items()]

    @model_validator(mode="after")
    def _check(self) -> Manifest:
        if problems := list(self._problems()):
            raise ValueError(_counted(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """Everything that is wrong with the cases, one sentence each."""
        seen: set[str] = set()
        for case in self.all_cases:
            if case.id in seen:
                yield f"case id {case.id!r} appears twice"
            seen.add(case.id)
            if not case.id or not case.patient:
                yield f"case {case.id!r} of patient {case.patient!r}: both need a name"
            for name, value in case.labels.items():
                if name not in self.labels:
                    yield f"case {case.id!r} has label {name!r}, which `labels` does not describe"
                elif problem := self.labels[name].problem(value):
                    yield f"case {case.id!r}, label {name!r}: {problem}"
        owner: dict[str, str] = {}
        for case in self.all_cases:
            for image in filter(None, (case.series_uid, case.image and str(PurePosixPath(case.image)))):
                if (other := owner.setdefault(image, case.patient)) != case.patient:
                    yield (
                        f"image {image!r} belongs to two patients, {other!r} and {case.patient!r}; "
                        "an image has one patient, or splits by patient leak"
                    )
        for group in ("split", "fold"):
            if leaks := _straddling(self.cases, group):
                patient, values = leaks[0]
                yield (
                    f"{len(leaks)} patient(s) appear in more than one {group}, e.g. {patient!r} in {values}; "
                    f"every patient belongs to one {group} only, or results leak"
                )

    def select(self, ids: Iterable[str]) -> Manifest:
        """The same manifest with only these cases; an unknown id is an error."""
        wanted = dict.fromkeys(ids)
        known = {case.id: case for case in self.all_cases}
        if missing := [i for i in wanted if i not in known]:
            raise UseError(
                f"{len(missing)} case id(s) are not in {self.name}",
                found=missing[0],
                expected=f"such as {next(iter(known), None)}",
            )
        return self.model_copy(update={"all_cases": [known[i] for i in wanted]})

    def save(self, path: str | Path) -> Path:
        """Write the JSON, and the cases as CSV beside it when `cases_file` names one."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        full = self.model_dump(mode="json", by_alias=True)
        given = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        stated = given.keys() | {
            "schema_version",
            "modality",
        }  # a reader should not have to know these defaults
        content = {key: given.get(key, value) for key, value in full.items() if key in stated}
        if self.cases_file:
            content.pop("cases", None)
            write_text(path.parent / _safe(self.cases_file), cases_to_csv(self.all_cases))
        write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        return path


def manifest_folder() -> Path:
    """The shipped manifests: inside the wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[2]
    inside = package / "data_manifests"
    return inside if inside.is_dir() else package.parent / "data_manifests"


def shipped_manifests() -> list[str]:
    return sorted(p.stem for p in manifest_folder().glob("*.json") if p.stem != "schema")


def load_manifest(name: str | Path | Manifest, root: str | Path | None = None) -> Manifest:
    """A manifest by name (`"lidc-nodules"`), by path, or itself.

    root: the folder of the images. A manifest whose cases are listed only once the data are there
    (`nodules-png`, archives) is completed from it; others list their cases themselves.
    """
    man = name if isinstance(name, Manifest) else _load(name)
    if root is None or man.all_cases or "layout" not in man.source.parameters:
        return man
    from smartlab.data.cohort.compose import cases_from_folder

    return cases_from_folder(man, root)


def _load(name: str | Path) -> Manifest:
    path = Path(name)
    if path.suffix != ".json":
        own, shipped = path / "manifest.json", manifest_folder() / f"{name}.json"
        if path.is_dir() and not own.is_file() and not shipped.is_file():
            raise UseError(
                "no manifest.json in this folder", path=path, fix=f"make one: smartlab data scan {path}"
            )
        path = own if own.is_file() else shipped
    if not path.is_file():
        raise UseError(
            "no such manifest",
            path=name,
            expected=f"a path to a .json, or one of {', '.join(shipped_manifests())}",
            fix=near(str(name), shipped_manifests()),
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError("the file holds no JSON object")
        if content.get("cases_file"):
            beside = path.parent / _safe(content["cases_file"])
            content["cases"] = cases_from_csv(beside, content.get("labels", {}))
        return Manifest.model_validate(content)
    except ValidationError as error:
        problems = [
            ": ".join(filter(None, (".".join(map(str, e["loc"])), e["msg"].removeprefix("Value error, "))))
            for e in error.errors()
        ]
        raise DataError(
            "is not a valid manifest",
            path=path,
            found=_counted(problems),
            fix="see data_manifests/schema.json",
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        raise DataError(
            "is not a valid manifest", path=path, found=error, fix="see data_manifests/schema.json"
        ) from None


def _counted(problems: list[str]) -> str:
    """All problems in one text, so that they can be mended in one go."""
    if len(problems) == 1:
        return problems[0]
    more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
    return f"{len(problems)} problems: {'; '.join(problems[:SHOWN])}{more}"


def schema() -> dict[str, Any]:
    """JSON schema of the format, as committed in data_manifests/schema.json."""
    return Manifest.model_json_schema(by_alias=True)


def _straddling(cases: list[Case], group: str) -> list[tuple[str, list[Any]]]:
    values: dict[str, set[Any]] = defaultdict(set)
    for case in cases:
        values[case.patient].add(getattr(case, group))
    return [(patient, sorted(map(str, found))) for patient, found in values.items() if len(found) > 1]


def _safe(path: str) -> str:
    """A relative path that stays below the root; anything else is refused."""
    parts = PurePosixPath(path).parts
    if (
        not parts
        or "\\" in path
        or "\0" in path
        or PurePosixPath(path).is_absolute()
        or ".." in parts
        or PureWindowsPath(path).drive
    ):
        raise ValueError(f"path {path!r} must be relative and stay below the data root")
    return path


def _resolve_inside(root: Path, relative: str) -> Path:
    """`root/relative`, refused when a symbolic link leads out of the root."""
    path = root / relative
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(
            "leads out of the data root through a link", path=path, fix=f"keep the images below {root}"
        )
    if not path.exists():
        raise DataError("image not found", path=path, fix="check `data.root`, or run `smartlab data fetch`")
    return path
