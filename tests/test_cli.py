"""What a person meets at the prompt: one clear line and an exit code, never a traceback."""

from __future__ import annotations

import subprocess
import sys

import pytest

from smartlab import cli

PHANTOM = ["data", "phantom", "ct", "--n", "1"]


def call(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["smartlab", *words])
    with pytest.raises(SystemExit) as end:
        cli.main()
    return end.value.code, capsys.readouterr().err


@pytest.mark.parametrize("inside", ["", "deeper"])
def test_a_folder_that_cannot_be_made_is_one_clear_line(monkeypatch, capsys, tmp_path, inside):
    file = tmp_path / "file"
    file.touch()
    code, said = call(monkeypatch, capsys, *PHANTOM, "--out", str(file / inside))
    assert code == 1 and said.count("\n") == 1 and said.startswith(f"smartlab: {file}"), said


def test_a_negative_seed_is_bad_use(monkeypatch, capsys, tmp_path):
    code, said = call(monkeypatch, capsys, *PHANTOM, "--out", str(tmp_path), "--seed", "-1")
    assert code == 2 and "--seed" in said


def test_a_reader_that_has_read_enough_is_no_error():
    listing = f"{sys.executable} -m smartlab.cli data fetch ct-open --dry-run --json | head -1"
    done = subprocess.run(["bash", "-c", listing], capture_output=True, text=True)
    assert done.stdout.strip() == "{" and done.stderr == ""
