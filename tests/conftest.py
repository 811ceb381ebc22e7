"""Shared fixtures: where the real data are, and a salt so that stores built in tests are comparable."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[1]
SALT = "tests-only-no-secret"
os.environ["SMARTLAB_SALT"] = SALT  # for what fixtures of the whole session make
REAL = os.environ.setdefault("SMARTLAB_REAL_DATA", str(REPO.parent / "shared" / "data"))  # also for kernels


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real images, or skip. Set SMARTLAB_REAL_DATA to point at it."""
    folder = Path(REAL)
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}; set SMARTLAB_REAL_DATA")
    return folder


@pytest.fixture(scope="session")
def primus():
    """The module of nnU-Net's own Primus; its package comes with the development tools."""
    if importlib.util.find_spec("dynamic_network_architectures") is None:
        pytest.skip("dynamic-network-architectures is not installed")
    import torch

    known = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):  # its torchvision may be built for another torch, and is not needed
        known.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    from dynamic_network_architectures.architectures import primus as theirs

    yield theirs
    del known


@pytest.fixture(autouse=True)
def _isolated_home(tmp_path_factory, monkeypatch):
    """Tests never read or write the user's own cache or salt."""
    monkeypatch.setenv("SMARTLAB_SALT", SALT)
    monkeypatch.setenv("SMARTLAB_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
