"""`cbis-ddsm`: the 3,568 lesions of CBIS-DDSM, from its four case-description tables.

The tables (mass and calcification, train and test) name a lesion by patient, breast, view and
abnormality number; the index of public series names its images by the same parts, as the
"PatientID" `Mass-Training_P_00001_LEFT_CC` (the mammogram) and `…_LEFT_CC_1` (the outline of
lesion 1). Part of the calcification test images are `P_00038_LEFT_CC.dcm` instead.

The official split is per abnormality type: 31 patients are in the training part of one and the
test part of the other. The test part is kept whole; the training lesions of those patients are
left out, so that no patient is on both sides.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path

from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort import idc
from smartlab.data.cohort.case import Case, LabelSpec, LabelValue
from smartlab.data.cohort.manifest import Manifest, Source

KINDS = {"Mass": "mass", "Calc": "calc"}
PARTS = {"Training": "train", "Test": "test"}
MARGINS = ["circumscribed", "ill_defined", "spiculated", "obscured", "microlobulated"]
LESIONS = 3568
PIXEL_MM = 0.045  # the files give none; the films of DDSM were digitised at 0.042 to 0.05 mm
HOMEPAGE = "https://www.cancerimagingarchive.net/collection/cbis-ddsm/"
COLUMNS = ("patient id", "left or right breast", "image view", "abnormality id", "pathology", "breast density",
           "subtlety", "assessment")  # fmt: skip
OWN_COLUMNS = {"Mass": ("mass shape", "mass margins"), "Calc": ("calc type", "calc distribution")}
LEAK = "the patient is also in the official test part of the other abnormality type"


def read_tables(folder: str | Path) -> list[dict[str, str]]:
    """A row per lesion of the four tables, with `kind` (Mass, Calc) and `part` (Training, Test) added."""
    lesions = []
    for kind, word in KINDS.items():
        for part, name in PARTS.items():
            path = Path(folder) / f"{word}_case_description_{name}_set.csv"
            try:
                with path.open(newline="", encoding="utf-8-sig") as file:
                    rows = list(csv.DictReader(file))
            except (OSError, ValueError) as error:
                raise UseError(
                    "cannot read a CBIS-DDSM description table",
                    path=path,
                    found=error,
                    fix=f"download the four case description files from {HOMEPAGE} and give their folder as `--tables`",
                ) from None
            for row in rows:
                # "breast density" in one pair of tables is "breast_density" in the other.
                row = {
                    (key or "").strip().replace("_", " "): (value or "").strip() for key, value in row.items()
                }
                if missing := [column for column in (*COLUMNS, *OWN_COLUMNS[kind]) if column not in row]:
                    raise DataError("columns are missing in this table", path=path, found=f"no {missing}")
                lesions.append({**row, "kind": kind, "part": part})
    return lesions


def build(tables: str | Path | None = None) -> Manifest:
    """The `cbis-ddsm` manifest, from a folder with the four description tables."""
    if tables is None:
        raise UseError(
            "cbis-ddsm needs its four case-description tables", fix="give their folder as `--tables`"
        )
    lesions = read_tables(tables)
    series = _series_by_name()
    parts: dict[str, set[str]] = {}
    for row in lesions:
        parts.setdefault(row["patient id"], set()).add(row["part"])
    leaking = {patient for patient, found in parts.items() if len(found) > 1}
    cases = [_case(row, series, leaking) for row in lesions]
    if len(cases) != LESIONS:
        raise DataError("unexpected number of lesions", path=tables, found=len(cases), expected=LESIONS)
    return Manifest(
        name="cbis-ddsm",
        title="CBIS-DDSM: masses and calcifications on digitised film mammograms",
        modality="MG",
        **idc.original_source("cbis_ddsm"),
        description=_describe(cases),
        source=Source(
            kind="idc",
            location="cbis_ddsm",
            size_gb=idc.gigabytes(cases),
            parameters={"index_version": idc.index_version(), "pixel_mm": PIXEL_MM},
            notes="No account is needed. The description tables, only needed to rebuild, are on the homepage.",
        ),
        labels=_LABELS,
        notes=_notes(cases, len(leaking)),
        cases_file="cbis-ddsm.csv",
        all_cases=cases,
    )


def _series_by_name() -> dict[str, dict[str, str]]:
    """Name of an image in the tables' terms -> its series: {"image"} or {"mask"} with a UID."""
    rows = idc.query(
        "SELECT PatientID AS name, SeriesInstanceUID AS uid, SeriesDescription AS description FROM series "
        "WHERE collection_id = 'cbis_ddsm' ORDER BY uid"
    )
    found: dict[str, dict[str, str]] = {}
    for row in rows:
        # Where crop and outline are two series, the outline is the one that says so; where they
        # are one series of two images, its description names either.
        role = "crop" if row["description"] == "cropped images" else "mask"
        found.setdefault(row["name"], {})[role] = row["uid"]
    return found


def _find(series: Mapping[str, Mapping[str, str]], name: str) -> Mapping[str, str]:
    """Images under the full name, or under the short one of part of the calcification test set."""
    for candidate in (name, name.split("_", 1)[1] + ".dcm"):
        if candidate in series:
            return series[candidate]
    raise DataError(
        "no such image in the index of public series", path=name, fix="check the description tables"
    )


def _case(row: Mapping[str, str], series: Mapping[str, Mapping[str, str]], leaking: set[str]) -> Case:
    image = (
        f"{row['kind']}-{row['part']}_{row['patient id']}_{row['left or right breast']}_{row['image view']}"
    )
    name = f"{image}_{row['abnormality id']}"
    outline = _find(series, name)
    left_out = row["patient id"] in leaking and row["part"] == "Training"
    return Case(
        id=name,
        patient=row["patient id"],
        series_uid=_find(series, image)["mask"],
        masks=_masks(outline),
        labels=_labels(row),
        split=None if left_out else ("train" if row["part"] == "Training" else "test"),
        excluded=LEAK if left_out else None,
    )


def _masks(series: Mapping[str, str]) -> dict[str, str]:
    """Where the outline is; where it and the cut-out are two series also the other, for they may be exchanged."""
    places = {"lesion": series.get("mask") or series["crop"]}
    if len(series) > 1:
        places["crop"] = series["crop"]
    return {name: f"series:{uid}" for name, uid in places.items()}


def _labels(row: Mapping[str, str]) -> dict[str, LabelValue]:
    mass = row["kind"] == "Mass"
    labels: dict[str, LabelValue] = {
        "pathology": "malignant" if row["pathology"] == "MALIGNANT" else "benign",
        "pathology_original": row["pathology"].lower(),
        "abnormality": "mass" if mass else "calcification",
        "mass_margins": _several(row["mass margins"]) if mass else None,
        "mass_shape": _several(row["mass shape"]) if mass else None,
        "calc_type": None if mass else _several(row["calc type"]),
        "calc_distribution": None if mass else _several(row["calc distribution"]),
        "breast_density": _positive(row["breast density"]),
        "subtlety": _positive(row["subtlety"]),
        "assessment": float(row["assessment"]),
    }
    return {key: value for key, value in labels.items() if value is not None}


def _several(text: str) -> list[str] | None:
    """`ILL_DEFINED-SPICULATED` -> ["ill_defined", "spiculated"]; nothing recorded -> None."""
    words = (
        []
        if text in ("", "N/A")
        else sorted(set(text.lower().replace("lucent_centered", "lucent_center").split("-")))
    )
    return words or None


def _positive(text: str) -> float | None:
    """A 1-based grade; 0 in the tables means that none was given."""
    return float(text) or None


_LABELS = {
    "pathology": LabelSpec(
        kind="binary", classes=["benign", "malignant"], description="benign includes benign without callback"
    ),
    "pathology_original": LabelSpec(
        kind="multiclass",
        classes=["benign", "benign_without_callback", "malignant"],
        description="as published",
    ),
    "abnormality": LabelSpec(kind="binary", classes=["mass", "calcification"]),
    "mass_margins": LabelSpec(kind="multilabel", classes=MARGINS, description="masses only"),
    "mass_shape": LabelSpec(kind="multilabel", description="masses only"),
    "calc_type": LabelSpec(kind="multilabel", description="calcifications only"),
    "calc_distribution": LabelSpec(kind="multilabel", description="calcifications only"),
    "breast_density": LabelSpec(kind="number", minimum=1, maximum=4, description="BI-RADS density"),
    "subtlety": LabelSpec(kind="number", minimum=1, maximum=5, description="1 subtle … 5 obvious"),
    "assessment": LabelSpec(
        kind="number", minimum=0, maximum=5, description="BI-RADS assessment; 0 incomplete"
    ),
}


def _describe(cases: list[Case]) -> str:
    def count(label: str, value: str) -> int:
        return sum(case.labels[label] == value for case in cases)

    splits = [case.split for case in cases]
    return (
        f"{len(cases)} lesions ({count('abnormality', 'mass')} masses, {count('abnormality', 'calcification')} "
        f"calcifications) of {len({c.patient for c in cases})} patients on {len({c.series_uid for c in cases})} "
        f"mammograms: {count('pathology', 'benign')} benign, {count('pathology', 'malignant')} malignant. Official "
        f"split: {splits.count('train')} train and {splits.count('test')} test; {splits.count(None)} left out."
    )


def _notes(cases: list[Case], leaking: int) -> list[str]:
    unknown = sum(c.labels["abnormality"] == "mass" and "mass_margins" not in c.labels for c in cases)
    return [
        f"{leaking} patients are in the official training part of one abnormality type and the test part of the "
        f"other. Their {sum(c.excluded == LEAK for c in cases)} training lesions are left out (`excluded`); the "
        "official test parts are whole.",
        f"{unknown} masses have no margin recorded, and therefore no `mass_margins` label.",
        "Density and subtlety of 0 in the tables mean not given, and are no label here.",
        "The outline (`lesion` mask) and the cropped lesion are often two images of one series: the outline is the "
        "two-valued image with the size of the mammogram. Lesion centres follow from it once fetched. Descriptions and "
        "file names are exchanged for many lesions, so only the content tells.",
        f"The files give no size of a pixel: {PIXEL_MM} mm is taken (`pixel_mm`), for films digitised at 0.042 to 0.05 "
        "mm, so lengths are right within about 10%.",
        "A film with a mass and a calcification is there twice, as two series. Films were digitised on several scanners.",
    ]
