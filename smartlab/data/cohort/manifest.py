"""One format for every dataset: what it is, under which licence, and its cases.

A manifest is a JSON file (`<name>.json`); a long list of cases sits beside it as CSV
(`cases_file`). Everything is checked on loading: unknown keys, duplicate case ids, paths that
leave the root, label values, patients that appear in two splits or two folds. Checks that need
the images are in `verify.py`. Of one's own data only the name and the cases must be given; published data
have their licence and citation beside.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from smartlab.core.errors import DataError, UseError, counted, near, problems_of
from smartlab.core.files import write_text
from smartlab.data.cohort.case import Case, LabelSpec, safe_path
from smartlab.data.cohort.case_table import cases_from_csv, cases_to_csv
from smartlab.data.cohort.listing import list_cases


class Source(BaseModel, extra="forbid"):
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


@dataclass(frozen=True)
class ImageGroup:
    """One image and the cases that live on it."""

    key: str
    cases: tuple[Case, ...]


class Manifest(BaseModel, extra="forbid", populate_by_name=True):
    """A dataset. `.cases` leaves out excluded cases; `.all_cases` does not."""

    schema_version: Literal[1] = 1
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9-]*$")
    title: str = ""
    modality: Literal["CT", "MG", "MR"] = "CT"
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
    def channels(self) -> list[str]:
        """The names of the images that every case has on one grid; none where it is one image."""
        return list(self.all_cases[0].channels) if self.all_cases else []

    @property
    def patients(self) -> list[str]:
        return list(dict.fromkeys(case.patient for case in self.cases))

    @property
    def layout(self) -> dict[str, Any]:
        """How the files of a dataset lie that lists no cases itself (`listing.py`)."""
        return self.source.parameters.get("layout", {})

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
            raise ValueError(counted(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """Everything that is wrong with the cases, one sentence each."""
        if self.modality == "MG" and self.channels:
            yield "mammograms have no `channels`: each image is a case"
        seen: set[str] = set()
        for case in self.all_cases:
            if case.id in seen:
                yield f"case id {case.id!r} appears twice"
            seen.add(case.id)
            if not case.id or not case.patient:
                yield f"case {case.id!r} of patient {case.patient!r}: both need a name"
            if list(case.channels) != self.channels:
                found, wanted = (", ".join(names) or "none" for names in (case.channels, self.channels))
                yield f"case {case.id!r} has the channels {found}, the first case {wanted}: all need the same, in one order"
            for name, value in case.labels.items():
                if name not in self.labels:
                    yield f"case {case.id!r} has label {name!r}, which `labels` does not describe"
                elif problem := self.labels[name].problem(value):
                    yield f"case {case.id!r}, label {name!r}: {problem}"
        owner: dict[str, str] = {}
        together: dict[str | None, dict[str, str]] = {}
        for case in self.all_cases:
            if case.channels and together.setdefault(case.image, case.channels) != case.channels:
                yield f"case {case.id!r} has the first channel of another case, and other images beside it"
            images = {str(PurePosixPath(path)) for path in (case.image, *case.channels.values()) if path}
            for image in sorted({case.series_uid or "", *images} - {""}):
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

    def check_there(self, root: Path, work: str) -> None:
        """Refuse work for which there are no cases or no folder of images."""
        if not self.cases:
            raise DataError(
                f"lists no cases, so there is nothing to {work}",
                path=f"manifest {self.name}",
                fix="see its notes: smartlab data show",
            )
        if not root.is_dir():
            raise DataError("no such folder", path=root, fix="give the folder of the images as --root")

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

    def listed(self, root: str | Path) -> Manifest:
        """The same manifest with the cases found below `root`, as its `layout` says (`listing.py`)."""
        if not (layout := self.layout):
            raise UseError(f"{self.name} lists its cases itself and has no folder layout")
        cases, labels = list_cases(self.name, layout, Path(root)), dict(self.labels)
        if (label := layout.get("label")) in labels:
            labels[label] = labels[label].covering([case.labels[label] for case in cases])
        return Manifest.model_validate(
            dict(self) | {"labels": labels, "all_cases": cases, "cases_file": "cases.csv"}
        )

    def save(self, path: str | Path) -> Path:
        """Write the JSON, and the cases as CSV beside it when `cases_file` names one."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        full = self.model_dump(mode="json", by_alias=True)
        given = self.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        # a reader should not have to know these defaults
        stated = given.keys() | {"schema_version", "modality"}
        content = {key: given.get(key, value) for key, value in full.items() if key in stated}
        if self.cases_file:
            content.pop("cases", None)
            write_text(path.parent / safe_path(self.cases_file), cases_to_csv(self.all_cases))
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
    if root is None or man.all_cases or not man.layout:
        return man
    return man.listed(root)


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
            beside = path.parent / safe_path(content["cases_file"])
            if not beside.is_file():
                raise ValueError(f"its cases_file {beside.name} is not beside it")
            content["cases"] = cases_from_csv(beside, content.get("labels", {}))
        return Manifest.model_validate(content)
    except ValidationError as error:
        found: object = counted(problems_of(error))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError) as error:
        found = error
    raise DataError("is not a valid manifest", path=path, found=found, fix="see data_manifests/schema.json")


def schema() -> dict[str, Any]:
    """JSON schema of the format, as committed in data_manifests/schema.json."""
    return Manifest.model_json_schema(by_alias=True)


def _straddling(cases: list[Case], group: str) -> list[tuple[str, list[Any]]]:
    values: dict[str, set[Any]] = defaultdict(set)
    for case in cases:
        values[case.patient].add(getattr(case, group))
    return [(patient, sorted(map(str, found))) for patient, found in values.items() if len(found) > 1]
