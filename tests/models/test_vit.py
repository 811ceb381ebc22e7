"""The vision transformer is MAE's, and serves every evaluation as the 3D encoder does."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

import smartlab as sl
from smartlab.core.errors import UseError
from smartlab.models.vit import ViT, ViTEncoder, sine_positions

GREY = 4096


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return ViTEncoder(sl.load_config("miram-tiny")).eval()


def image(rows, columns, seed=0):
    return np.random.default_rng(seed).integers(0, GREY, (rows, columns)).astype(np.int16)


def test_presets_have_the_published_sizes():
    sizes = {"vit-small": (384, 12, 6), "vit-base": (768, 12, 12), "vit-large": (1024, 24, 16)}
    for name, size in sizes.items():
        e = sl.load_config("miram", {"encoder.preset": name}).encoder
        assert (e.embed_dim, e.blocks, e.heads) == size and e.patch == 16
    with torch.device("meta"):
        base = ViT(3, 16, 768, 12, 12, (14, 14))
    parameters = sum(p.numel() for p in base.parameters())
    assert parameters == 85_647_360  # of the published ViT-B/16 without head, its positions not trained


def test_names_are_those_of_the_public_weights(encoder):
    names = set(encoder.state_dict())
    block = {"norm1", "norm2", "attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"}
    expected = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"}
    expected |= {"norm.weight", "norm.bias"}
    expected |= {
        f"blocks.{n}.{part}.{kind}" for n in range(4) for part in block for kind in ("weight", "bias")
    }
    assert names == expected


def test_positions_are_the_published_sines():
    """Columns in the first half of the channels, rows in the second; sines before cosines."""
    table = sine_positions((3, 5), 16)
    for row in range(3):
        for column in range(5):
            want = [
                wave(place * 10000 ** (-k / 4))
                for place in (column, row)
                for wave in (math.sin, math.cos)
                for k in range(4)
            ]
            torch.testing.assert_close(table[row * 5 + column], torch.tensor(want))


def test_positions_of_another_grid_span_the_same_image(encoder):
    """Twice as many patches: their positions lie between, and average to, those of training."""
    coarse, fine = encoder.positions((8, 8)), encoder.positions((16, 16))
    assert fine.shape == (1, 256, 96)
    pooled = torch.nn.functional.avg_pool2d(fine.transpose(1, 2).unflatten(2, (16, 16)), 2)
    slow = slice(8, 24)  # the fastest waves do not survive averaging
    torch.testing.assert_close(
        pooled.flatten(2).transpose(1, 2)[..., slow], coarse[..., slow], atol=0.05, rtol=0
    )


def test_a_foreign_table_of_positions_is_interpolated(encoder):
    torch.manual_seed(0)
    other = ViTEncoder(encoder.config)
    with torch.no_grad():
        other.pos_embed.copy_(torch.linspace(0, 1, 65)[None, :, None].expand(1, 65, 96))
    assert other.positions((4, 8)).shape == (1, 32, 96)
    rows = other.positions((4, 8)).view(4, 8, 96)[:, :, 0]
    assert (rows.diff(dim=0) > 0).all() and (rows.diff(dim=1)[:, 1:-1] > 0).all()


def test_hidden_patches_do_not_reach_the_encoder(encoder):
    """What is hidden may be anything; order and gaps of the visible patches do not matter."""
    x = torch.rand(2, 1, 64, 64)
    keep = torch.tensor([[0, 9, 33, 63], [5, 6, 7, 8]])
    tokens, attention = encoder.visible(x, keep)
    assert tokens.shape == (2, 5, 96) and attention.shape == (2, 4, 4)
    spoiled = torch.full_like(x, float("nan"))
    for row in range(2):
        for patch in keep[row].tolist():
            a, b = 8 * (patch // 8), 8 * (patch % 8)
            spoiled[row, :, a : a + 8, b : b + 8] = x[row, :, a : a + 8, b : b + 8]
    torch.testing.assert_close(encoder.visible(spoiled, keep)[0], tokens)
    swapped, _ = encoder.visible(x, keep[:, [2, 0, 3, 1]])
    torch.testing.assert_close(swapped[:, 1:], tokens[:, [3, 1, 4, 2]], atol=1e-5, rtol=1e-4)
    every, _ = encoder.visible(x, torch.arange(64).expand(2, -1))
    whole = encoder.encode(x)[0]
    torch.testing.assert_close(every, whole)


@pytest.mark.parametrize("size", [(128, 128), (100, 170), (300, 420)], ids=str)
def test_features_and_attention_of_images_of_any_size(encoder, size):
    """Also of those larger than a view, by sliding windows; a token covers 16 stored pixels here."""
    picture = image(*size)
    found, a = encoder.features(picture), encoder.attention(picture)
    grid = tuple(-(-n // 16) for n in size)
    assert found["grid"] == grid and found["cls"].shape == (1, 96)
    assert found["tokens"].shape == (1, math.prod(grid), 96)
    assert [s.shape for s in found["stages"]] == [(1, 96, *grid)] * 4
    assert a.shape == (1, 4, *grid) and (a >= 0).all()
    torch.testing.assert_close(a.sum((2, 3)), torch.ones(1, 4))
    assert all(torch.isfinite(t).all() for t in (found["cls"], found["tokens"], a))


def test_features_are_those_of_training_windowed_and_made_smaller(encoder):
    picture = image(128, 128)
    small = torch.nn.functional.avg_pool2d(torch.from_numpy(picture / 4095.0).float()[None, None], 2)
    tokens, _ = encoder.visible(small.clamp(0, 1), torch.arange(64)[None])
    torch.testing.assert_close(encoder.features(picture)["cls"], tokens[:, 0], atol=1e-4, rtol=1e-4)
    batch = torch.from_numpy(np.stack([picture, image(128, 128, 1)])).float()[:, None]
    torch.testing.assert_close(encoder.features(batch)["cls"][:1], tokens[:, 0], atol=1e-4, rtol=1e-4)


def test_one_window_over_the_whole_image_is_the_image_at_once(encoder):
    picture = image(128, 128)
    a, b = encoder.features(picture), encoder.features(picture, window=128, overlap=0.0)
    assert torch.equal(a["tokens"], b["tokens"])


def test_what_is_no_image_is_refused(encoder):
    with pytest.raises(UseError, match=r"\(2, 3, 4, 5, 6\)"):
        encoder.features(torch.zeros(2, 3, 4, 5, 6))
    with pytest.raises(UseError, match="multiple of the stride 16"):
        encoder.features(image(128, 128), window=20)
    with pytest.raises(UseError, match="4 · n"):
        sine_positions((2, 2), 6)
