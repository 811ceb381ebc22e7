"""`dagman-segment`: the two cohorts of the DAGMaN paper's segmentation task in one manifest, on images that are there.

Learned from NSCLC-Radiomics, tested on LIDC-IDRI's nodules above 3 cc. LIDC's outlines come as points, so their
consensus is written as a mask on every such scan found below the root; the manifest itself does not depend on
which are there.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

import nibabel
import numpy as np
from tqdm.auto import tqdm

from smartlab.data.cohort.case import Case
from smartlab.data.cohort.manifest import Manifest, load_manifest
from smartlab.data.images.dicom_headers import index_series
from smartlab.data.images.readers import read_volume

from . import lidc

LEARN, CHOOSE = 350, 27  # scans of NSCLC-Radiomics [paper]
LEAST_ML = 3.0  # of a nodule that makes a scan of LIDC-IDRI a test [paper]
FOLDER = "lidc-masks"
UNUSED = f"not among the {LEARN + CHOOSE} drawn; which the paper used is not published"


def segment(root: str | Path, annotations: str | Path | None = None, seed: int = 0) -> Manifest:
    """The manifest; masks of the LIDC scans below `root` are written there.

    A test scan holds a nodule above 3 cc; its mask has all its nodules that three readers or more outlined.
    """
    large: dict[str, list[tuple[str, lidc.Nodule]]] = defaultdict(list)
    for name, nodule in lidc.numbered(lidc.read_nodules(annotations)):
        large[nodule.series_uid].append((name, nodule))
    large = {uid: own for uid, own in large.items() if max(_ml(nodule) for _, nodule in own) > LEAST_ML}
    _write_masks(Path(root), large)
    learned = load_manifest("nsclc-radiomics")
    order = np.random.default_rng(seed).permutation(len(learned.cases))
    place = {learned.cases[k].id: rank for rank, k in enumerate(order)}
    cases = [
        case.model_copy(update=_use(place[case.id])) if case.id in place else case
        for case in learned.all_cases
    ]
    cases += [
        Case(
            id=own[0][0],
            patient=own[0][1].patient,
            series_uid=uid,
            masks={"tumour": f"{FOLDER}/{uid}.nii.gz"},
            split="test",
        )
        for uid, own in large.items()
    ]
    test = load_manifest("lidc-nodules")
    source = learned.source.model_copy(
        update={"location": "", "size_gb": None, "parameters": {"segments": learned.segments}}
    )
    return learned.model_copy(
        update={
            "name": "dagman-segment",
            "title": "NSCLC-Radiomics to learn tumours from, LIDC-IDRI's large nodules to test on",
            "licence": f"{learned.licence}; {test.licence}",
            "citation": f"{learned.citation} {test.citation}",
            "description": f"{LEARN} scans to learn from, {CHOOSE} to choose the weights, {len(large)} with a nodule above "
            f"{LEAST_ML:g} cc to test on, as in the DAGMaN paper.",
            "source": source,
            "labels": {},
            "notes": [
                *learned.notes,
                f"Masks of LIDC scans lie in {FOLDER} below the root: compose again once scans are fetched.",
            ],
            "cases_file": "dagman-segment.csv",
            "all_cases": cases,
        }
    )


def _use(rank: int) -> dict[str, str]:
    if rank >= LEARN + CHOOSE:
        return {"excluded": UNUSED}
    return {"split": "train" if rank < LEARN else "val"}


def _ml(nodule: lidc.Nodule) -> float:
    return len(lidc.consensus(nodule)) * nodule.spacing**2 * nodule.slice_step / 1000


def _write_masks(root: Path, scans: dict[str, list[tuple[str, lidc.Nodule]]]) -> None:
    """The consensus of a scan's nodules as NIfTI on its own voxels, for the scans that are below the root."""
    there = {uid: folder for uid, folder in index_series(root, False).items() if uid in scans}
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    for uid, folder in tqdm(there.items(), desc="masks"):
        volume = read_volume(folder, series=uid)
        mask = np.any([lidc.consensus_mask(nodule, volume) for _, nodule in scans[uid]], axis=0)
        path = root / FOLDER / f"{uid}.nii.gz"
        temporary = path.with_name(f".{path.name}")
        nibabel.save(nibabel.Nifti1Image(mask.astype(np.uint8), volume.affine), temporary)
        temporary.replace(path)
    if missing := len(scans) - len(there):
        print(
            f"{missing} of {len(scans)} LIDC scans are not below {root} yet: fetch, and compose again",
            file=sys.stderr,
        )
