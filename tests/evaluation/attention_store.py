"""Stores and encoders for the tests of attention and clusters: phantoms, or volumes made by hand."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import torch

from smartlab import build_store, load_config, open_store
from smartlab.data.cohort.case import Case
from smartlab.data.cohort.manifest import Manifest, Source
from smartlab.data.store.store import Store
from smartlab.models.encoder import Encoder

SMALL = {
    "data.spacing": 4.0,
    "data.region": 32,
    "data.view": 32,
    "encoder.embed_dim": 12,
    "encoder.depths": [1, 1, 1, 1],
    "encoder.num_heads": [1, 2, 2, 2],
    "semantic.enabled": True,
    "semantic.stage": 2,
    "semantic.heads": 3,
    "semantic.blocks": 1,
    "semantic.similarity": "cosine",
}


def small_encoder(seed: int = 0, **overrides: object) -> Encoder:
    torch.manual_seed(seed)
    settings = SMALL | {key.replace("__", "."): value for key, value in overrides.items()}
    return Encoder(load_config("tiny", settings)).eval()


def made_store(folder: Path, scans: dict[str, tuple[np.ndarray, dict[str, np.ndarray]]]) -> Store:
    """A store of scans by patient: HU of a body without air around, and masks by name."""
    folder.mkdir(parents=True, exist_ok=True)
    affine = np.diag([4.0, 4.0, 4.0, 1.0])
    cases = []
    for patient, (hu, masks) in scans.items():
        nib.save(nib.Nifti1Image(hu.astype(np.int16), affine), folder / f"{patient}.nii.gz")
        for name, mask in masks.items():
            nib.save(nib.Nifti1Image(mask.astype(np.uint8), affine), folder / f"{patient}-{name}.nii.gz")
        paths = {name: f"{patient}-{name}.nii.gz" for name in masks}
        cases.append(Case(id=patient, patient=patient, image=f"{patient}.nii.gz", masks=paths))
    man = Manifest(
        name="made-up",
        title="made up",
        modality="CT",
        licence="CC0",
        citation="none",
        homepage="none",
        source=Source(kind="local"),
        cases=cases,
    )
    build_store(man, folder, folder / "store", workers=0, spacing=4.0, progress=False)
    return open_store(folder / "store")
