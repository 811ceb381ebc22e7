"""Every kind of bad input gives its one clear error: where, what was found, what to do."""

from __future__ import annotations

import pickle
import warnings

import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import given, settings
from hypothesis import strategies as st

from smartlab import read_volume
from smartlab.core.errors import DataError, UseError
from tests.data import bad_series  # noqa: F401  registers its rows
from tests.data.bad_files import BAD
from tests.data.dicom_factory import itk_image, scan, write_enhanced, write_nifti, write_series


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_its_one_clear_error(tmp_path, name):
    write, words, read = BAD[name]
    folder = tmp_path / "case"
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # writing nonsense warns
        path = write(folder)
    with pytest.raises(DataError) as caught:
        read(path)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word.lower() in message.lower(), message
    assert (
        "Doe" not in message and "Jane" not in message and "secret-id" not in message
    )  # the factory's patient


@pytest.fixture(scope="module")
def victims(tmp_path_factory):
    """One good file of every format: its path, what to read, its content, the length of its header."""
    root = tmp_path_factory.mktemp("victims")
    series = write_series(root / "series", scan(3))[1]
    nifti, multi = write_nifti(root / "a.nii", scan()), write_enhanced(root / "e.dcm", scan(3))
    rows = [(series, series.parent, 1100), (multi, multi, 3000), (nifti, nifti, 348)]
    for name in ("a.mha", "a.nrrd", "b.mhd", "b.nhdr"):
        sitk.WriteImage(itk_image(scan()), str(root / name))
        rows.append((root / name, root / name, 400))
    return [(file, path, file.read_bytes(), header) for file, path, header in rows]


@settings(max_examples=150, deadline=None)
@given(which=st.integers(0, 6), seed=st.integers(0, 2**32), cut=st.booleans())
def test_random_damage_never_ends_in_anything_but_a_clear_error(victims, which, seed, cut):
    file, path, content, header = victims[which]
    rng, damaged = np.random.default_rng(seed), bytearray(content)
    for place in rng.integers(0, min(header, len(content)), 3):
        damaged[place] = rng.integers(256)
    file.write_bytes(damaged[: rng.integers(1, len(content))] if cut else damaged)
    try:
        read_volume(path)
    except DataError as error:
        assert path.name in str(error) or file.name in str(error)
    finally:
        file.write_bytes(content)


def test_the_table_is_long_enough():
    assert len(BAD) >= 30


def test_an_unknown_tilt_setting_is_bad_use(tmp_path):
    with pytest.raises(UseError, match="one of refuse, correct"):
        read_volume(tmp_path, tilt="fix")


def test_errors_survive_the_trip_from_a_worker(tmp_path):
    write_series(tmp_path, scan(6), uid="1.2.3.1")
    write_series(tmp_path, scan(4), uid="1.2.3.2", name="b{}".format)
    with pytest.raises(DataError) as caught:
        read_volume(tmp_path)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.public == caught.value.public
