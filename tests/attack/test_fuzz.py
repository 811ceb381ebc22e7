"""Whatever happens to a file, reading it is quick and ends in its content, or in one clear error."""

from __future__ import annotations

import shutil
from collections import Counter

import numpy as np
import pytest
import SimpleITK as sitk

import smartlab as sl
from tests.attack import harness
from tests.attack.harness import (
    HANG,
    OTHER,
    REFUSED,
    TRACEBACK,
    Target,
    attack,
    flip_a_bit,
    note,
    outcome,
    spoil,
    tries,
)
from tests.attack.targets import TARGETS
from tests.data.dicom_factory import itk_image, scan, write_nifti, write_series
from tests.data.store_cohort import manifest, person, save

SEALED = [
    name for name in TARGETS if name.startswith(("store", "checkpoint", "export")) or name == "nifti_gz"
]


@pytest.mark.parametrize(
    "usual", [pytest.param(25, id="some"), pytest.param(400, id="many", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", TARGETS)
def test_damage_to_a_file_never_ends_in_a_traceback_or_a_hang(tmp_path, name, usual):
    told: list[str] = []
    target = TARGETS[name](tmp_path)
    found = attack(target, tries(usual), usual, spoil, told)
    note("fuzz", name, found)
    assert not told, "\n".join(told)
    assert not target.sealed or not found[OTHER]


@pytest.mark.parametrize(
    "usual", [pytest.param(20, id="some"), pytest.param(300, id="many", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", SEALED)
def test_one_flipped_bit_in_what_smartlab_wrote_is_never_silent(tmp_path, name, usual):
    told: list[str] = []
    found = attack(TARGETS[name](tmp_path), tries(usual), usual, flip_a_bit, told)
    note("bit", name, found)
    assert not told and not found[OTHER] and not found[TRACEBACK] and not found[HANG], "\n".join(told)
    assert found[REFUSED] > 0.5 * found.total(), "most bits matter"


# ---- one bad case never stops the others


def _series(folder):
    return "bad", write_series(folder / "bad", person().transpose(2, 1, 0)[:6, :20, :24])[2]


def _nifti(folder):
    return "bad.nii", write_nifti(folder / "bad.nii", person()[:20, :20, :10])


def _itk(name):
    def make(folder):
        sitk.WriteImage(itk_image(scan(8, 20, 20)), str(folder / name))
        return name, folder / name

    return make


def _mask(folder):
    file = save(folder / "bad-mask.nii", (person((20, 20, 10)) > 0).astype(np.uint8))
    save(folder / "bad.nii.gz", person((20, 20, 10)))
    return "bad.nii.gz", file


VICTIMS = {"dicom": _series, "nifti": _nifti, "mhd": _itk("bad.mhd"), "nrrd": _itk("bad.nrrd"), "mask": _mask}


@pytest.mark.parametrize(
    "usual", [pytest.param(12, id="some"), pytest.param(240, id="many", marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("kind", VICTIMS)
def test_no_damage_to_one_case_stops_a_build(tmp_path, kind, usual):
    root = tmp_path / "raw"
    root.mkdir()
    image, file = VICTIMS[kind](root)
    save(root / "good.nii.gz", person((20, 20, 10)))
    bad = {"id": "bad-case", "patient": "b", "image": image}
    bad |= {"masks": {"x": file.name}} if kind == "mask" else {}
    man = manifest([bad, {"id": "good-case", "patient": "g", "image": "good.nii.gz"}])
    content, found = file.read_bytes(), Counter()

    def build() -> int:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
        report = sl.build_store(man, root, tmp_path / "store", workers=0, progress=False)
        assert report.images + report.failed == 2 and sl.open_store(tmp_path / "store").key_of("good-case")
        return report.failed

    assert build() == 0
    for number in range(tries(usual)):
        spoilt = spoil(content, np.random.default_rng((usual, number)), Target(file, build, header=1100))
        file.write_bytes(spoilt)
        how, value = outcome(build)
        found["set aside" if value == "1" else "stored" if value == "0" else how] += 1
        assert value in ("0", "1"), f"seed ({usual}, {number}): {how} {value}"
    note("build", kind, found)
    assert found["set aside"], "some of it was damage"


def test_every_byte_of_one_header_may_be_wrong(tmp_path):
    """The lazy parts of a header are parsed when the reason is told, too."""
    root = tmp_path / "raw"
    file = write_series(root / "bad", scan(4))[1]
    save(root / "good.nii.gz", person((20, 20, 10)))
    cases = [{"id": "bad-case", "patient": "b", "image": "bad"}]
    man = manifest([*cases, {"id": "good-case", "patient": "g", "image": "good.nii.gz"}])
    content = file.read_bytes()
    for place in range(132, 1000, 27 if harness.tries(1) == 1 else 1):
        spoilt = bytearray(content)
        spoilt[place] ^= 0xFF
        file.write_bytes(spoilt)
        report = sl.build_store(man, root, tmp_path / f"store-{place}", workers=0, progress=False)
        assert report.images + report.failed == 2, place
        shutil.rmtree(tmp_path / f"store-{place}")
