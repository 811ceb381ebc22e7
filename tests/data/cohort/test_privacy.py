"""The salt is one for all processes, whole, and never silently missing."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from smartlab import DataError, UseError
from smartlab.data.cohort import privacy


@pytest.fixture
def home(monkeypatch, tmp_path):
    monkeypatch.delenv("SMARTLAB_SALT", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_an_empty_salt_is_refused(home):
    """What a kill between creating and writing the file would leave: hashes that hide nothing."""
    folder = home / ".config" / "smartlab"
    folder.mkdir(parents=True)
    (folder / "salt").touch()
    with pytest.raises(DataError, match="an empty file"):
        privacy.salt()


def test_a_home_that_cannot_hold_a_salt_is_told(home):
    (home / ".config").write_text("a file where a folder belongs")
    with pytest.raises(DataError, match="Set SMARTLAB_SALT"):
        privacy.salt()


def test_a_salt_that_another_process_made_first_is_kept(home):
    path = home / ".config" / "smartlab" / "salt"
    with ThreadPoolExecutor(4) as pool:
        salts = set(pool.map(lambda _: privacy.salt(), range(16)))
    assert salts == {path.read_bytes()} and len(path.read_bytes()) == 64
    privacy._make_salt(path)  # the loser of a race
    assert salts == {path.read_bytes()} and [p.name for p in path.parent.iterdir()] == ["salt"]


def test_an_unusable_salt_is_refused_before_any_phantom_is_drawn(tmp_path, monkeypatch):
    from smartlab.core.settings import DataConfig
    from smartlab.data.store.prepare import prepare_store

    monkeypatch.setenv("SMARTLAB_SALT", "short")
    monkeypatch.setenv("SMARTLAB_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UseError, match="too short"):
        prepare_store(DataConfig(phantom_cases=2), progress=False)
    assert not (tmp_path / "cache").exists()
