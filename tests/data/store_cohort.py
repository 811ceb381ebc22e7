"""A small cohort of people made of ellipsoids, for the tests of store, crops and loader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from smartlab.data.cohort.manifest import Manifest


def person(shape=(56, 48, 40), seed: int = 0, size: float = 0.36) -> np.ndarray:
    """Soft tissue with noise, a lung and a bone, in air, on a table; (X, Y, Z) int16."""
    rng = np.random.default_rng(seed)
    x, y, z = np.meshgrid(*[(np.arange(n) + 0.5) / n - 0.5 for n in shape], indexing="ij")
    hu = np.full(shape, -1000.0)
    body = (x / size) ** 2 + (y / (0.75 * size)) ** 2 < 1
    hu[body] = 40 + 10 * rng.normal(size=int(body.sum()))
    hu[((x + 0.15) / 0.1) ** 2 + (y / 0.12) ** 2 + (z / 0.3) ** 2 < 1] = -850
    hu[(x / 0.05) ** 2 + ((y + 0.18) / 0.05) ** 2 < 1] = 700
    hu[:, 2, :] = 300  # the table: a thin sheet behind the back
    return np.rint(hu).astype(np.int16)


def save(path: Path, array: np.ndarray, spacing=(3.0, 3.0, 4.0), origin=(-80.0, -60.0, -50.0)) -> Path:
    affine = np.diag([*spacing, 1.0])
    affine[:3, 3] = origin
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, affine), path)
    return path


def manifest(cases: list[dict[str, Any]], **more: Any) -> Manifest:
    about = {"title": "t", "modality": "CT", "licence": "-", "citation": "-", "homepage": "-"}
    return Manifest.model_validate(
        {"name": "people", **about, "source": {"kind": "local"}, "cases": cases, **more}
    )


def make_cohort(root: Path, n: int = 4, **more: Any) -> Manifest:
    """n people with a tumour mask each, the first two of them with a second case on the same image."""
    cases = []
    for i in range(n):
        shape = (56 - 4 * (i % 3), 48, 40)
        save(root / f"p{i}" / "ct.nii.gz", person(shape, seed=i))
        tumour = np.zeros(shape, np.uint8)
        tumour[24:30, 20:26, 10 + i : 15 + i] = 1
        save(root / f"p{i}" / "tumour.nii.gz", tumour)
        center = [-80 + 3 * 26.5, -60 + 3 * 22.5, -50 + 4 * (12.0 + i)]
        case = {
            "id": f"case-{i}",
            "patient": f"patient-{i}",
            "image": f"p{i}/ct.nii.gz",
            "masks": {"tumour": f"p{i}/tumour.nii.gz"},
            "lesion": {"center_mm": center, "diameter_mm": 18.0},
            "labels": {"grade": i},
            "split": "train" if i % 2 == 0 else "test",
        }
        cases.append(case)
        if i < 2:
            cases.append({**case, "id": f"case-{i}-again", "lesion": None})
    return manifest(cases, labels={"grade": {"kind": "number"}}, **more)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by name."""
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.rglob("*")) if f.is_file()}
