"""What a step is given, and what is watched on it: labels move with the image and are only watched."""

from __future__ import annotations

import pandas as pd
import torch

import smartlab as sl
from smartlab.data.crops.regions import is_lesion, unit_shares
from smartlab.masking import hidden_share, lift
from smartlab.training.views import prepare

NAMES = {1: "liver", 2: "nodule"}


def test_labels_are_mirrored_with_their_image():
    """Voxels labelled 1 are those above 0 HU, before and after the step's mirrors."""
    config = sl.load_config("tiny", {"data.flip": True})
    hu = torch.randint(-900, 300, (3, 2, 64, 64, 64), dtype=torch.int16)
    batch = {"views": hu, "view_labels": (hu > 0).to(torch.uint8)}
    x, shares = prepare(batch, config, torch.device("cpu"), torch.Generator().manual_seed(3), (0, 1), NAMES)
    dense = (x.flatten(0, 1) > 1000 / 1400).float()
    expected = torch.nn.functional.avg_pool3d(dense, 8).flatten(1)
    torch.testing.assert_close(shares["organ"], expected)
    assert shares["lesion"].sum() == 0 and not torch.equal(
        x[:, :, 0], (hu.float() + 1000).div(1400).clamp(0, 1)
    )


def test_watching_draws_no_random_number():
    """A logged step sees the views that an unlogged one would."""
    config = sl.load_config("tiny", {"data.flip": True, "data.intensity": 0.1})
    batch = {"views": torch.randint(-900, 300, (2, 2, 64, 64, 64), dtype=torch.int16)}
    seen = [
        prepare(batch, config, torch.device("cpu"), torch.Generator().manual_seed(3), (0, 1), names)[0]
        for names in (None, NAMES)
    ]
    assert torch.equal(*seen)


def test_lesions_are_known_by_their_names():
    assert all(map(is_lesion, ("nodule", "Lung tumour", "GTV-1", "metastasis", "mass")))
    assert not any(map(is_lesion, ("liver", "lung_left", "aorta", "gallbladder")))


def test_shares_lift_and_hidden_fraction_count_voxels():
    labels = torch.zeros(1, 16, 16, 16, dtype=torch.uint8)
    labels[:, :8, :8, :8] = 1  # one unit of eight
    labels[:, :8, :8, 8:12] = 2  # half a unit
    shares = unit_shares(torch.zeros(1, 16, 16, 16), labels, NAMES, 8)
    assert shares["organ"].sum() == 1 and shares["lesion"].sum() == 0.5 and shares["body"].sum() == 8
    attention = torch.full((1, 8), 0.1)
    attention[0, shares["lesion"][0] > 0] = 0.3
    assert abs(float(lift(attention, shares["lesion"])) - 2.4) < 1e-6  # 0.3 against 1/8
    assert abs(float(lift(torch.full((1, 8), 0.125), shares["organ"])) - 1) < 1e-6
    hidden = shares["lesion"] > 0
    assert hidden_share(hidden, shares["lesion"]) == 1 and hidden_share(hidden, shares["organ"]) == 0


def test_a_run_tells_what_masks_and_attention_fall_on(settings, tmp_path):
    more = {"mask.informativeness": 0.0, "mask.strategy": "attention_high", "train.steps": 6}
    run = sl.pretrain(sl.load_config("tiny", settings | more), tmp_path / "r", progress=False)
    history: pd.DataFrame = run.history
    for region in ("body", "organ", "lesion"):
        assert (
            history[f"lift_{region}"].dropna().gt(0).all()
            and history[f"hidden_{region}"].dropna().between(0, 1).all()
        )
    assert history[["lift_body", "lift_organ"]].notna().all().all() and history.lift_lesion.notna().any()
