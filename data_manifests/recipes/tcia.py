"""Four small cohorts whose images and tumour or organ masks are all DICOM series in the index.

`nsclc-radiomics`, `nsclc-interobserver`, `pancreas-ct`: one CT per patient, its masks in the same
study. `nsclc-radiogenomics`: several CT per patient, one is chosen (see `_CHOOSE`).

Masks are named for what they show; which segment (SEG) or region (RTSTRUCT) of the series that is,
as a pattern ("*" for all of it), is in `source.parameters["segments"]`. Where outcome needs a clinical table,
`source.parameters["clinical"]` says where it is, and `attach_table` reads it.
"""

from __future__ import annotations

from typing import Any

from smartlab.core.errors import DataError, UseError
from smartlab.data.cohort import idc
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.manifest import Manifest, Source

from .open_ct import NOT_AXIAL

TCIA_FILES = "https://www.cancerimagingarchive.net/wp-content/uploads/"
FREE = "No account is needed."


def _manifest(
    collection: str, cases: list[Case], parameters: dict[str, Any], notes: str = FREE, **kw: Any
) -> Manifest:
    origin = idc.original_source(collection)
    rows = idc.lookup(idc.series_of(cases), ["license_short_name", "Modality"]).values()
    text = [
        f"The {modality} series used as masks are under {licence}."
        for modality, licence in sorted({(row["Modality"], row["license_short_name"]) for row in rows})
        if licence != origin["licence"]
    ]
    return Manifest(
        modality="CT",
        **origin,
        source=Source(
            kind="idc",
            location=collection,
            size_gb=idc.gigabytes(cases),
            parameters={"index_version": idc.index_version(), **parameters},
            notes=notes,
        ),
        notes=[*kw.pop("remarks"), *text],
        cases_file=f"{kw['name']}.csv",
        all_cases=cases,
        **kw,
    )


# One row per patient: the CT, and the masks of its study by modality and origin.
_WITH_MASKS = """
SELECT ct.PatientID AS patient, ct.SeriesInstanceUID AS image,
       list(m.SeriesInstanceUID) FILTER (m.Modality = 'SEG') AS seg,
       list(m.SeriesInstanceUID) FILTER (m.Modality = 'RTSTRUCT') AS rtstruct
FROM series ct LEFT JOIN series m ON m.StudyInstanceUID = ct.StudyInstanceUID
     AND m.Modality IN ('SEG', 'RTSTRUCT') AND m.analysis_result_id IS NOT DISTINCT FROM ?
WHERE ct.collection_id = ? AND ct.Modality = 'CT'
GROUP BY ALL ORDER BY patient
"""


def _with_masks(collection: str, name: str, masks: str, made_by: str | None = None) -> list[Case]:
    """A case per CT; `masks` is the kind of series to take ("seg" or "rtstruct").

    A patient without a SEG has no such structure even where there is an RTSTRUCT, and is left out.
    """
    if masks not in ("seg", "rtstruct"):
        raise UseError("no such kind of masks", found=masks, expected="'seg' or 'rtstruct'")
    cases = []
    for row in idc.query(_WITH_MASKS, [made_by, collection]):
        found = row[masks] or []
        if len(found) > 1:
            raise DataError("has several masks of one kind", path=row["patient"], expected="one per CT")
        cases.append(
            Case(
                id=row["patient"],
                patient=row["patient"],
                series_uid=row["image"],
                masks={name: f"series:{found[0]}"} if found and row["seg"] else {},
                excluded=None if row["seg"] else f"no {name} segmentation is published",
            )
        )
    return cases


def nsclc_radiomics(masks: str = "rtstruct") -> Manifest:
    """Lung1; `masks="seg"` takes the segmentations that its authors converted from the contours."""
    cases = _with_masks("nsclc_radiomics", "tumour", masks)
    return _manifest(
        "nsclc_radiomics",
        cases,
        name="nsclc-radiomics",
        title="NSCLC-Radiomics (Lung1): gross tumour volume on planning CT",
        description=f"{len(cases)} patients with non-small-cell lung cancer, one CT each; "
        f"{sum(not c.excluded for c in cases)} with a delineated gross tumour volume.",
        parameters={
            "segments": {"tumour": "GTV-1"},
            "clinical": {
                "url": TCIA_FILES + "NSCLC-Radiomics-Lung1.clinical-version3-Oct-2019.csv",
                "key": "PatientID",
                "columns": {
                    "survival_days": "Survival.time",
                    "died": "deadstatus.event",
                    "stage": "Overall.Stage",
                    "histology": "Histology",
                    "age": "age",
                    "sex": "gender",
                },
                "kinds": {"survival_days": "time", "died": "event"},
            },
        },
        notes=FREE
        + " Survival is in a separate CSV, free, at source.parameters.clinical.url (link as of 2019, also "
        "on the homepage): download it and run `attach_table`.",
        remarks=[
            "Non-commercial licence. GTV-1 is the primary tumour; some studies hold further regions (lungs, heart, "
            "oesophagus, spinal cord).",
            "LUNG1-128 has no such tumour contour and is left out.",
        ],
    )


def nsclc_interobserver(masks: str = "rtstruct") -> Manifest:
    """The mask is that of the first observer; `source.parameters["observers"]` names the others."""
    cases = _with_masks("nsclc_radiomics_interobserver1", "tumour", masks)
    return _manifest(
        "nsclc_radiomics_interobserver1",
        cases,
        name="nsclc-interobserver",
        title="NSCLC-Radiomics-Interobserver1: the same tumours delineated by five observers",
        description=f"{len(cases)} patients, one CT each; {sum(not c.excluded for c in cases)} with the delineations "
        "of five observers, by hand and semi-automatic.",
        parameters={
            "segments": {"tumour": "GTV-1vis-1"},
            "observers": [f"GTV-1{how}-{k}" for how in ("vis", "auto") for k in range(1, 6)],
        },
        remarks=[
            "Non-commercial licence.",
            "GTV-1vis-1 to -5 are the five observers by hand, GTV-1auto-1 to -5 semi-automatic; the `tumour` mask is the "
            "first. For another, change source.parameters.segments.",
        ],
    )


def pancreas_ct() -> Manifest:
    cases = _with_masks("pancreas_ct", "pancreas", "seg", made_by="pancreas_ct_seg")
    return _manifest(
        "pancreas_ct",
        cases,
        name="pancreas-ct",
        title="NIH Pancreas-CT: pancreas on contrast-enhanced abdominal CT",
        description=f"{len(cases)} portal-venous CT of people without pancreatic disease, pancreas outlined by hand.",
        parameters={"segments": {"pancreas": "*"}},
        remarks=[
            "Masks are the DICOM conversion of the published NIfTI labels (https://doi.org/10.5281/zenodo.12130275)."
        ],
    )


# The CT of each patient: in the study that holds the readers' tumour segmentation where there is
# one, else in a study without PET; an axial series of the chest before others, most slices first.
_CHOOSE = """
WITH s AS (SELECT * FROM series WHERE collection_id = 'nsclc_radiogenomics'),
seg AS (SELECT StudyInstanceUID, max(SeriesInstanceUID) AS uid FROM s
        WHERE Modality = 'SEG' AND analysis_result_id IS NULL GROUP BY ALL),
pet AS (SELECT DISTINCT StudyInstanceUID FROM s WHERE Modality = 'PT')
SELECT s.PatientID AS patient, s.SeriesInstanceUID AS image, seg.uid AS seg,
       count(*) OVER (PARTITION BY s.StudyInstanceUID) AS candidates
FROM s LEFT JOIN seg USING (StudyInstanceUID) LEFT JOIN pet USING (StudyInstanceUID)
WHERE s.Modality = 'CT' AND s.instanceCount >= 20
QUALIFY row_number() OVER (
    PARTITION BY s.PatientID
    ORDER BY seg.uid IS NULL, pet.StudyInstanceUID IS NOT NULL,
             regexp_matches(lower(coalesce(s.SeriesDescription, '')), $not_axial),
             NOT regexp_matches(lower(coalesce(s.SeriesDescription, '')), 'chest|thorax|lung'),
             s.instanceCount DESC, s.SeriesInstanceUID) = 1
ORDER BY patient
"""


def nsclc_radiogenomics() -> Manifest:
    rows = idc.query(_CHOOSE, {"not_axial": NOT_AXIAL})
    cases = [
        Case(
            id=row["patient"],
            patient=row["patient"],
            series_uid=row["image"],
            masks={"tumour": f"series:{row['seg']}"} if row["seg"] else {},
        )
        for row in rows
    ]
    candidates = [row["candidates"] for row in rows if row["seg"]]
    return _manifest(
        "nsclc_radiogenomics",
        cases,
        name="nsclc-radiogenomics",
        title="NSCLC Radiogenomics: outcome, histology and mutations after surgery",
        description=f"{len(cases)} patients with non-small-cell lung cancer, one preoperative CT each; "
        f"{len(candidates)} with the tumour segmented. Outcomes come from a separate table.",
        parameters={
            "segments": {"tumour": "*"},
            "clinical": {
                "url": TCIA_FILES + "NSCLCR01Radiogenomic_DATA_LABELS_2018-05-22_1500-shifted.csv",
                "key": "Case ID",
                "columns": {
                    "survival_status": "Survival Status",
                    "days_to_death": "Time to Death (days)",
                    "recurrence": "Recurrence",
                    "histology": "Histology",
                    "egfr": "EGFR mutation status",
                    "kras": "KRAS mutation status",
                },
                "kinds": {"days_to_death": "time"},
            },
        },
        notes=FREE
        + " Outcomes are in a separate CSV, free, at source.parameters.clinical.url (link as of 2018, also on "
        "the homepage under Data Access, 'Clinical Data'): download it and run `attach_table`.",
        remarks=[
            f"The index does not say which CT a segmentation was drawn on. In {candidates.count(1)} of "
            f"{len(candidates)} studies there is only one CT it can be; in the others, and for patients without one, the "
            "choice is by rule (axial, of the chest, most slices). `smartlab data verify` checks the geometry.",
            "`days_to_death` is empty for patients alive at last contact; their follow-up follows from the table's own "
            "date columns.",
        ],
    )
