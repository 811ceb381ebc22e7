"""What a person meets at the prompt: one clear line and an exit code, never a traceback."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

import smartlab as sl
from smartlab.cli import app as cli

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
    listing = f"{sys.executable} -m smartlab.cli.app data fetch ct-open --dry-run --json | head -1"
    done = subprocess.run(["bash", "-c", listing], capture_output=True, text=True)
    assert done.stdout.strip() == "{" and done.stderr == ""


@pytest.mark.parametrize(
    ("facts", "rest"),
    [
        (
            {"labels": {"age": {"kind": "number"}, "response": {"kind": "binary"}}},
            "evaluate a --label response",
        ),
        ({"masks": {"tumour": "m.nii.gz"}}, "finetune a --task segment"),
        ({}, "evaluate a --task heads"),
    ],
)
def test_what_comes_after_a_pretraining_fits_its_data(tmp_path, facts, rest):
    case = {"id": "p", "patient": "p", "image": "p.nii.gz", "masks": facts.pop("masks", {})}
    (tmp_path / "manifest.json").write_text(json.dumps({"name": "own", "cases": [case], **facts}))
    config = sl.load_config("tiny", {"data.manifest": str(tmp_path)})
    assert cli._judged_by(config, "a") == f"smartlab {rest}"


def test_a_scan_is_explored_without_a_kernel(monkeypatch, capsys, tmp_path):
    """A page, and the lines for JupyterLab; a scan that is not there, or a setting that is none, is one line."""
    import nibabel
    import numpy as np

    scan, page = tmp_path / "scan.nii.gz", tmp_path / "page.html"
    values = np.random.default_rng(0).integers(-900, 300, (70, 70, 70)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(values, np.diag([2.0, 2.0, 2.0, 1.0])), scan)
    monkeypatch.setattr(sys, "argv", ["smartlab", "explore", str(scan), "ratio=0.5", "--out", str(page)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr()
    assert not end.value.code and page.stat().st_size > 100_000
    assert f"sl.explore({str(scan)!r}, ratio=0.5)" in said.out and not said.err
    for words, code in (
        (["nowhere.nii.gz"], 1),
        ([str(scan), "ratoi=0.5"], 2),
        ([str(scan), "--encoder", "none"], 2),
    ):
        found, line = call(monkeypatch, capsys, "explore", *words, "--out", str(tmp_path / "no.html"))
        assert found == code and words[-1].split("=")[0] in line and "Traceback" not in line, line
    assert not (tmp_path / "no.html").exists()
