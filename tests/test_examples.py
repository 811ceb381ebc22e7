"""The examples of the documentation run as written."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import smartlab as sl
from smartlab.models.encoder import Encoder
from tests.conftest import REPO


@pytest.mark.slow
def test_monais_swinunetr_is_fine_tuned_from_an_export(tmp_path):
    man = sl.make_phantom("ct", tmp_path / "ct", n=1, shape=(80, 80, 80), spacing=4.0, progress=False)
    weights = sl.export(Encoder(sl.load_config("tiny")), "monai", tmp_path / "encoder.pt")
    case = man.cases[0]
    files = [str(weights), str(tmp_path / "ct" / case.image), str(tmp_path / "ct" / case.label_map)]
    script = REPO / "docs" / "examples" / "finetune_swinunetr.py"
    done = subprocess.run(
        [sys.executable, script, *files, "--steps", "2", "--spacing", "4"],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "step    2  loss" in done.stdout and "mean Dice" in done.stdout
