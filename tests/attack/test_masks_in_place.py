"""A mask lies where its scan lies, or the case is set aside: in `verify`, in `read_labels`, in a build."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

import smartlab as sl
from smartlab.core.errors import DataError
from smartlab.data.cohort.verify import verify_manifest
from tests.data.store_cohort import manifest, person, save


def _identity(folder, mask):
    nib.save(nib.Nifti1Image(mask, np.eye(4)), folder / "mask.nii.gz")


def _coarser(folder, mask):
    save(folder / "mask.nii.gz", np.ascontiguousarray(mask[::2, ::2, ::2]), spacing=(6.0, 6.0, 8.0))


def _shifted(folder, mask):
    save(folder / "mask.nii.gz", mask, origin=(-80.0, -60.0, -42.0))


WRONG = {"identity": _identity, "coarser": _coarser, "shifted": _shifted}


@pytest.mark.parametrize("how", ["masks", "label_map"])
@pytest.mark.parametrize("grid", WRONG)
def test_a_mask_on_another_grid_is_never_painted(tmp_path, grid, how):
    mask = np.zeros((56, 48, 40), np.uint8)
    mask[24:31, 20:26, 10:16] = 1
    for name in ("a", "b"):
        save(tmp_path / f"{name}.nii.gz", person())
    WRONG[grid](tmp_path, mask)
    given = {"masks": {"tumour": "mask.nii.gz"}} if how == "masks" else {"label_map": "mask.nii.gz"}
    bad = {"id": "bad", "patient": "1", "image": "a.nii.gz", **given}
    good = {"id": "good", "patient": "2", "image": "b.nii.gz"}
    man = manifest([bad, good], organs={1: "liver"} if how == "label_map" else {})
    report = sl.build_store(man, tmp_path, tmp_path / "store", workers=0, progress=False)
    assert (report.images, report.failed) == (1, 1)
    assert "not on the image's grid" in str(report) or "does not lie where the image lies" in str(report)
    checked = verify_manifest(man, tmp_path, workers=0, progress=False)
    assert list(checked.table.problem != "") == [True, False]
    with pytest.raises(DataError, match=r"grid|does not lie"):
        sl.read_labels(tmp_path / "mask.nii.gz", on=sl.read_volume(tmp_path / "a.nii.gz"))


def test_a_mask_on_the_scans_grid_is_painted_whole(tmp_path):
    """Also one that is stored the other way round."""
    mask = np.zeros((56, 48, 40), np.uint8)
    mask[24:31, 20:26, 10:16] = 1
    save(tmp_path / "a.nii.gz", person())
    affine = np.diag([-3.0, 3.0, 4.0, 1.0])
    affine[:3, 3] = (-80 + 3 * 55, -60, -50)
    nib.save(nib.Nifti1Image(mask[::-1].copy(), affine), tmp_path / "mask.nii.gz")
    man = manifest([{"id": "a", "patient": "a", "image": "a.nii.gz", "masks": {"t": "mask.nii.gz"}}])
    sl.build_store(man, tmp_path, tmp_path / "store", workers=0, spacing=3.0, progress=False)
    labels = sl.open_store(tmp_path / "store").labels(0)[:]
    assert abs(int(labels.sum()) * 27 / (7 * 6 * 6 * 36) - 1) < 0.35
