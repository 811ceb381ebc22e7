"""Unit maps as voxel scores agree with scikit-learn, with torch's interpolation and with closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score

from smartlab.evaluation.features import grids
from smartlab.evaluation.judge.means import patient_means
from smartlab.evaluation.judge.stats import t_interval

CODES = np.arange(256)


def test_interpolation_is_that_of_torch(rng=np.random.default_rng(0)):
    unit_map = rng.random((3, 4, 2)).astype(np.float32)
    found = grids.interpolate(unit_map, (24, 32, 16), 8)
    expected = F.interpolate(torch.from_numpy(unit_map)[None, None], scale_factor=8, mode="trilinear")
    assert np.allclose(found, expected[0, 0].numpy(), atol=1e-6)


@pytest.mark.parametrize("sharp", [0.01, 1.0, 6.0])  # nearly uniform, ordinary, almost all on a few units
def test_auc_and_best_dice_agree_with_counting_every_voxel(sharp):
    rng = np.random.default_rng(1)
    unit_map = np.exp(sharp * rng.normal(size=(3, 3, 4)))
    labels = (rng.random((21, 24, 30)) < 0.1).astype(np.uint8)  # does not fill the last units
    labels[3:9, 4:12, 5:9] = 1
    score = grids.interpolate(unit_map.astype(np.float32), labels.shape, 8).ravel()
    bins = grids.histograms(unit_map[None], labels, CODES, 2, 8)[0]
    assert bins.sum() == labels.size
    assert grids.auc(bins[1], bins[0]) == pytest.approx(roc_auc_score(labels.ravel(), score), abs=1e-3)
    order = labels.ravel()[np.argsort(-score)]
    every = 2 * np.cumsum(order) / (np.arange(1, labels.size + 1) + labels.sum())
    assert grids.best_dice(bins[1], bins[0]) == pytest.approx(every.max(), abs=2e-3)
    top = round(0.2 * labels.size)
    assert grids.quantile_dice(bins[1], bins[0], 0.2) == pytest.approx(every[top - 1], abs=5e-3)


def test_a_uniform_map_is_chance():
    labels = np.zeros((16, 16, 16), np.uint8)
    labels[:4] = 1
    bins = grids.histograms(np.full((1, 2, 2, 2), 0.125), labels, CODES, 2, 8)[0]
    assert grids.auc(bins[1], bins[0]) == 0.5
    assert grids.best_dice(bins[1], bins[0]) == pytest.approx(2 * 0.25 / 1.25)  # everything is predicted
    assert grids.quantile_dice(bins[1], bins[0], 0.1) == pytest.approx(2 * 0.1 * 0.25 / (0.1 + 0.25))
    assert grids.pointing(np.ones(8), np.arange(8) < 2) == 0.25


def test_unit_counts_count_each_voxel_of_the_scan_once():
    labels = np.random.default_rng(2).integers(0, 3, (13, 8, 17)).astype(np.uint8)
    counts = grids.unit_counts(labels, CODES, 3, 8, (2, 1, 4))  # the last unit is padding
    assert counts.sum(0).tolist() == np.bincount(labels.ravel()).tolist()
    grid = counts.reshape(2, 1, 4, 3)
    assert grid[1, 0, 1].tolist() == np.bincount(labels[8:, :8, 8:16].ravel(), minlength=3).tolist()
    assert not grid[:, :, 3].any()


def test_means_weigh_rows_and_intervals_are_over_patients():
    values = np.array([[1.0, np.nan], [1.0, 2.0], [4.0, np.nan]])
    mean, partly = patient_means(values, ["a", "a", "b"])
    assert mean.value == 2.0 and mean.n == 2
    assert mean == t_interval(values[:, 0], ["a", "a", "b"]) and mean.high > 10  # two patients know little
    assert partly.value == 2.0 and partly.n == 1 and np.isnan(partly.low)
    alone = patient_means(values, ["a", "a", "a"])[0]
    assert alone.value == 2.0 and np.isnan(alone.low)
