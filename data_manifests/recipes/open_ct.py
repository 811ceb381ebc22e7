"""`ct-open`: a pretraining cohort of public chest and abdomen CT, chosen by rule from the index.

Every rule is a field of `Rules`, written into the manifest, so that the same rules on the same
version of the index give the same file. Choice never looks at pixels: what the index does not
say (kernel and thickness of most series) is read from the series description where it is there.

Downstream images must not be seen in pretraining: the collections of all downstream manifests
are left out whole, with those that came from the same hospitals and years.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field

from smartlab.core.errors import UseError
from smartlab.data.cohort import idc
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.manifest import Manifest, Source

DOWNSTREAM = {
    "lidc_idri": "lidc-nodules, luna16, medmnist-nodule3d",
    "nsclc_radiogenomics": "nsclc-radiogenomics, msd-lung",
    "nsclc_radiomics": "nsclc-radiomics",
    "nsclc_radiomics_interobserver1": "nsclc-interobserver",
    "pancreas_ct": "pancreas-ct",
}
RELATED = {
    "nsclc_radiomics_genomics": "same group as nsclc_radiomics",
    "rider_pilot": "partly collected by the LIDC sites",
    "lctsc": "one of its three sites is that of nsclc_radiomics",
    "spie_aapm_lung_ct_challenge": "collected at a LIDC site",
    "ct_lymph_nodes": "same hospital as pancreas_ct",
    "pseudo_phi_dicom_data": "images of other collections under invented identifiers",
}

# Series that are not a plain axial volume, by the words people use for them.
NOT_AXIAL = (
    r"scout|localizer|topogram|scanogram|surview|\bcor|coronal|\bsag|\bmip|minip|\bmpr\b|\bvrt?\b|\b3d\b|oblique|"
    r"curved|reformat|\brfmt\b|\bspo\b|projection|dose (report|info)|screen ?save|summary|smart ?prep|bolus|"
    r"monitoring|test|track|perfusion|dynamic|cine|gated|best(diast|syst)|phase \d+ ?%|\d+ ?%|"
    r"subtract|suppress|monoe|kev\b|iodine|\bz ?eff\b|cbct|phantom|registered|aligned|resampled|processed"
)
# Regions other than chest and abdomen, where the body-part field is empty or wrong.
OTHER_REGION = r"head|brain|neck|sinus|orbit|facial|spine|\b[clt]-?sp|extrem|knee|hip\b|femur|foot|ankle|shoulder|hand|wrist"
REGION = r"chest|thorax|lung|torax|abd|liver|kidney|renal|pancrea|\bcap\b|c[/-]a[/-]p|\bap\b|a[/-]p|body|colon|whole|\bwb\b"
# Kernels that sharpen: GE bone and lung, Siemens B50 and up, Philips C and D, Toshiba FC50 and up.
SHARP = r"\bbone|\blung\b|\b[bi][5-9]\d[fsh]?\b|,[cd],|\bfc[58]\d\b|sharp"


@dataclass(frozen=True)
class Rules:
    """What makes a series part of the cohort."""

    licences: tuple[str, ...] = ("CC BY 3.0", "CC BY 4.0")
    body_parts: tuple[str, ...] = (
        "CHEST", "LUNG", "THORAX", "MEDIASTINUM", "CHESTABDOMEN", "CHESTABDPELVIS", "ABDOMEN", "ABDOMENPELVIS",
        "LIVER", "KIDNEY", "PANCREAS", "STOMACH", "ADRENAL", "COLON", "ESOPHAGUS", "OVARY", "UTERUS", "WHOLEBODY",
    )  # fmt: skip
    min_slices: int = 60
    max_slices: int = 700
    max_thickness_mm: float = 5.0  # where the description says it
    series_per_study: int = 1
    studies_per_patient: int = 1
    series_per_collection: int = 2600
    excluded_collections: tuple[str, ...] = field(default=tuple(sorted(DOWNSTREAM | RELATED)))


def build(rules: Rules | None = None) -> Manifest:
    """The `ct-open` manifest by `rules`, from the installed index."""
    rules = rules or Rules()
    if leaked := set(DOWNSTREAM) - set(rules.excluded_collections):
        raise UseError(
            "a pretraining cohort must not hold downstream images",
            found=sorted(leaked),
            fix="exclude these collections",
        )
    chosen = select(rules)
    cases = [
        Case(
            id=f"{row['collection']}-{row['patient']}" + (f"-{row['number']}" if row["number"] > 1 else ""),
            patient=row["patient"],
            series_uid=row["uid"],
        )
        for row in chosen
    ]
    size = sum(row["size"] for row in chosen) / 1000
    counts = Counter(row["collection"] for row in chosen)
    return Manifest(
        name="ct-open",
        title="Public chest and abdomen CT for pretraining",
        modality="CT",
        licence=" and ".join(sorted({row["licence"] for row in chosen})),
        citation="National Cancer Institute Imaging Data Commons (Fedorov et al., RadioGraphics 2023, "
        "https://doi.org/10.1148/rg.230180), and each collection's own citation: `idc-index` gives them by UID.",
        homepage=idc.IDC_PORTAL,
        description=f"{len(cases)} CT series of {len({c.patient for c in cases})} patients from {len(counts)} collections, "
        f"{size:.0f} GB of DICOM.",
        source=Source(
            kind="idc",
            size_gb=round(size, 1),
            parameters={"index_version": idc.index_version(), "rules": _json(asdict(rules))},
            notes="No account is needed.",
        ),
        notes=[
            "Per collection: " + ", ".join(f"{name} {n}" for name, n in counts.most_common()) + ".",
            "Left out whole: "
            + "; ".join(f"{c} ({why})" for c, why in sorted((DOWNSTREAM | RELATED).items()))
            + "; phantoms and animals.",
            "Within a study the series kept is the thinnest known (3 mm or less before unknown before thicker), soft "
            "kernel before sharp, then the one with most slices; within a collection a fixed pseudo-random order "
            "(MD5 of the UIDs) decides which patients and studies are kept.",
        ],
        cases_file="ct-open.csv",
        all_cases=cases,
    )


def select(rules: Rules) -> list[idc.Row]:
    """The chosen series: collection, patient, number (within the patient), uid, licence, size (MB)."""
    return idc.query(
        _SELECT,
        {
            "licences": list(rules.licences),
            "parts": list(rules.body_parts),
            "excluded": list(rules.excluded_collections),
            "least": rules.min_slices,
            "most": rules.max_slices,
            "thickest": rules.max_thickness_mm,
            "per_study": rules.series_per_study,
            "per_patient": rules.studies_per_patient,
            "per_collection": rules.series_per_collection,
            "not_axial": NOT_AXIAL,
            "other": OTHER_REGION,
            "region": REGION,
            "sharp": SHARP,
        },
    )


# Thickness: the seventh field of NLST descriptions ("0,OPA,GE,LS16,STANDARD,360,2.5,120,…"), or
# "1.25 MM", "5mm", or Siemens' "Thorax  5.0  B31f".
_SELECT = r"""
WITH real_collections AS (
    SELECT collection_id FROM collections
    WHERE species = 'Human' AND NOT coalesce(contains(lower(cancer_types || ' ' || tumor_locations), 'phantom'), false)
), known AS (
    SELECT collection_id AS collection, PatientID AS patient_id, StudyInstanceUID AS study, SeriesInstanceUID AS uid,
           license_short_name AS licence, series_size_MB AS size, instanceCount AS slices, BodyPartExamined AS part,
           translate(lower(coalesce(SeriesDescription, '')), '_^', '  ') AS said,
           translate(lower(coalesce(StudyDescription, '')), '_^', '  ') AS study_said
    FROM series JOIN real_collections USING (collection_id)
    WHERE Modality = 'CT' AND sop_class_name = 'CT Image Storage' AND analysis_result_id IS NULL
      AND license_short_name IN (SELECT unnest($licences)) AND collection_id NOT IN (SELECT unnest($excluded))
      AND instanceCount BETWEEN $least AND $most
), measured AS (
    SELECT *, CASE WHEN collection = 'nlst' THEN try_cast(split_part(said, ',', 7) AS double)
        ELSE try_cast(coalesce(
            nullif(regexp_extract(said, '(\d+(\.\d+)?) ?mm', 1), ''),
            nullif(regexp_extract(said, '\s(\d+\.\d+)\s+[a-z]\d\d[fsh]?\b', 1), '')) AS double)
        END AS thickness
    FROM known
), allowed AS (
    SELECT *, regexp_matches(said, $sharp) AS sharp,
        CASE WHEN thickness <= 3 THEN 0 WHEN thickness IS NULL THEN 1 ELSE 2 END AS coarse
    FROM measured
    WHERE NOT regexp_matches(said, $not_axial)
      AND NOT (regexp_matches(said, $other) AND NOT regexp_matches(said, $region))
      AND NOT (regexp_matches(study_said, $other) AND NOT regexp_matches(study_said, $region))
      AND (part IN (SELECT unnest($parts))
           OR ((part IS NULL OR part = '') AND regexp_matches(said || ' ' || study_said, $region)))
      AND coalesce(thickness, 0) <= $thickest
), per_study AS (
    SELECT * FROM allowed
    QUALIFY row_number() OVER (PARTITION BY study ORDER BY coarse, sharp, slices DESC, uid) <= $per_study
), per_patient AS (
    SELECT * FROM per_study
    QUALIFY dense_rank() OVER (PARTITION BY collection, patient_id ORDER BY md5(study)) <= $per_patient
), per_collection AS (
    SELECT * FROM per_patient
    QUALIFY row_number() OVER (PARTITION BY collection ORDER BY md5(uid)) <= $per_collection
)
SELECT collection, patient_id AS patient,
       row_number() OVER (PARTITION BY collection, patient_id ORDER BY uid) AS number, uid, licence, size
FROM per_collection ORDER BY collection, patient, number
"""


def _json(rules: dict[str, object]) -> dict[str, object]:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in rules.items()}
