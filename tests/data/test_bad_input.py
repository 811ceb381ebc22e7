"""Every kind of bad input gives its one clear error: where, what was found, what to do."""

from __future__ import annotations

import pickle
import warnings

import pytest

from smartlab import read_volume
from smartlab.errors import DataError, UseError
from tests.data import bad_series  # noqa: F401  registers its rows
from tests.data.bad_files import BAD
from tests.data.dicom_factory import scan, write_series


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
    assert "Doe" not in message and "secret-id" not in message  # the factory's patient


def test_the_table_is_long_enough():
    assert len(BAD) >= 30


def test_an_unknown_tilt_setting_is_bad_use(tmp_path):
    with pytest.raises(UseError, match="'refuse' or 'correct'"):
        read_volume(tmp_path, tilt="fix")


def test_errors_survive_the_trip_from_a_worker(tmp_path):
    write_series(tmp_path, scan(6), uid="1.2.3.1")
    write_series(tmp_path, scan(4), uid="1.2.3.2", name="b{}".format)
    with pytest.raises(DataError) as caught:
        read_volume(tmp_path)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value) and again.public == caught.value.public
