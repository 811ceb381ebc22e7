"""Weights keep their function on the way out and back, or are refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from monai.networks.nets import SwinUNETR
from monai.networks.nets.swin_unetr import SwinTransformer

import smartlab as sl
from smartlab.errors import DataError, UseError
from smartlab.interop import MERGE_ORDERS, export, load_encoder
from smartlab.models.encoder import Encoder
from smartlab.training.checkpoint import header_of

SETTINGS = {
    "encoder.preset": "custom",
    "encoder.embed_dim": 12,
    "encoder.num_heads": [1, 2, 4, 8],
    "encoder.depths": [2, 1, 2, 1],
}


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return Encoder(sl.load_config("tiny", SETTINGS)).eval()


def unetr():
    return SwinUNETR(
        in_channels=1,
        out_channels=3,
        feature_size=12,
        depths=(2, 1, 2, 1),
        num_heads=(1, 2, 4, 8),
        window_size=4,
    ).eval()


def test_export_to_swinunetr_and_back_gives_the_same_features(encoder, tmp_path):
    file = export(encoder, "monai", tmp_path / "e.pt")
    weights = torch.load(file, weights_only=True)["state_dict"]
    net = unetr()
    net.swinViT.load_state_dict({k.removeprefix("swinViT."): v for k, v in weights.items()}, strict=True)
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert not unexpected and not any(k.startswith("swinViT") for k in missing)
    x = torch.randn(1, 1, 64, 64, 64)
    with torch.no_grad():
        assert torch.isfinite(net(x)).all()
        for mine, theirs in zip(encoder.swin(x), net.swinViT(x), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        torch.save(net.state_dict(), tmp_path / "unetr.pt")
        back = load_encoder(tmp_path / "unetr.pt")
        for mine, theirs in zip(encoder.swin(x), back.swin(x), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
    assert back.config.encoder.depths == (2, 1, 2, 1) and back.config.encoder.window_size == 4


def test_safetensors_carry_their_card_and_load_alone(encoder, tmp_path):
    file = export(encoder, "safetensors", tmp_path / "e.safetensors", role="student")
    assert header_of(file)["role"] == "student" and "config" in header_of(file)
    back = load_encoder(file)
    volume = torch.randint(-1000, 400, (64, 64, 64), dtype=torch.int16).numpy()
    assert torch.equal(encoder.attention(volume), back.attention(volume))
    assert torch.equal(encoder.features(volume)["cls"], back.features(volume)["cls"])


def test_weights_of_the_other_merging_order_are_permuted_to_the_same_function(encoder, tmp_path):
    torch.manual_seed(1)
    other = SwinTransformer(
        1, 12, (4,) * 3, (2,) * 3, (2, 1, 2, 1), (1, 2, 4, 8), downsample="mergingv2"
    ).eval()
    for p in other.parameters():
        torch.nn.init.normal_(p, std=0.2)
    torch.save({"state_dict": {f"swinViT.{k}": v for k, v in other.state_dict().items()}}, tmp_path / "v2.pt")
    x = torch.randn(1, 1, 32, 32, 32)
    with torch.no_grad():
        right, wrong = (load_encoder(tmp_path / "v2.pt", merging=m) for m in ("mergingv2", "monai"))
        for mine, theirs in zip(right.swin(x), other(x), strict=True):
            torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        assert (wrong.swin(x)[-1] - other(x)[-1]).abs().max() > 0.1


def test_smit_and_ssl_names_are_understood(encoder, tmp_path):
    names = {}
    for k, v in encoder.swin.state_dict().items():
        for stage in range(4):
            k = k.replace(f"layers{stage + 1}.0.", f"layers.{stage}.")
        names["module.transformer." + k.replace("linear1", "fc1").replace("linear2", "fc2")] = v
    names["module.rec_head.weight"] = torch.zeros(3)
    torch.save({"student": names}, tmp_path / "smit.pt")
    with pytest.warns(UserWarning, match="order of its patch merging is not in the file"):
        back = load_encoder(tmp_path / "smit.pt")
    load_encoder(tmp_path / "smit.pt", merging="monai")
    assert all(torch.equal(v, back.swin.state_dict()[k]) for k, v in encoder.swin.state_dict().items())


def test_every_order_is_a_permutation_of_the_corners_but_the_refused_one():
    corners = set(itertools.product(range(2), repeat=3))
    assert [name for name, order in MERGE_ORDERS.items() if set(order) != corners] == ["duplicated"]


def test_what_cannot_be_loaded_whole_is_refused_with_a_table(encoder, tmp_path):
    weights = {f"swinViT.{k}": v for k, v in encoder.swin.state_dict().items()}
    weights.pop("swinViT.layers3.0.downsample.norm.weight")
    weights["swinViT.layers2.0.blocks.0.mlp.linear1.weight"] = torch.zeros(5, 5)
    torch.save(weights, tmp_path / "part.pt")
    with pytest.raises(
        DataError, match=r"fits only in part(.|\n)*missing +layers3(.|\n)*\(5, 5\) in the file"
    ):
        load_encoder(tmp_path / "part.pt")
    torch.save({"conv.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(DataError, match="no 3D Swin encoder"):
        load_encoder(tmp_path / "other.pt")
    torch.save(encoder, tmp_path / "pickled.pt")
    with pytest.raises(DataError, match="cannot be read as weights"):
        load_encoder(tmp_path / "pickled.pt")
    export(encoder, "monai", tmp_path / "good.pt")
    with pytest.raises(DataError, match="two corners twice"):
        load_encoder(tmp_path / "good.pt", merging="duplicated")
    with pytest.raises(UseError, match="no such file"):
        load_encoder(tmp_path / "absent.pt")
