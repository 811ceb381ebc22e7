"""Weights keep their function on the way out and back, or are refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from monai.networks.nets import SwinUNETR
from monai.networks.nets import ViT as MonaiViT
from monai.networks.nets.swin_unetr import SwinTransformer

import smartlab as sl
from smartlab.core.errors import DataError, UseError
from smartlab.interop.swin import MERGE_ORDERS
from smartlab.interop.weights import export, load_encoder
from smartlab.models.encoder import Encoder
from smartlab.models.vit import ViTEncoder
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


@pytest.fixture
def image_encoder():
    torch.manual_seed(0)
    net = ViTEncoder(sl.load_config("miram-tiny")).eval()
    with torch.no_grad():  # as trained: nothing at its first value
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    return net


@pytest.fixture
def scan_vit():
    torch.manual_seed(0)
    return ViTEncoder(sl.load_config("primus-tiny", {"encoder.registers": 2})).eval()


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("encoder", (64, 64, 64)), ("image_encoder", (128, 160)), ("scan_vit", (64, 72, 64))],
)
def test_safetensors_carry_their_card_and_load_alone(kind, shape, request, tmp_path):
    encoder = request.getfixturevalue(kind)
    file = export(encoder, "safetensors", tmp_path / "e.safetensors", role="student")
    assert header_of(file)["role"] == "student" and "config" in header_of(file)
    back = load_encoder(file)
    volume = torch.randint(-1000, 400, shape, dtype=torch.int16).numpy()
    assert torch.equal(encoder.attention(volume), back.attention(volume))
    assert torch.equal(encoder.features(volume)["cls"], back.features(volume)["cls"])


def test_a_vision_transformer_of_scans_has_no_place_in_monai(scan_vit, tmp_path):
    with pytest.raises(UseError, match="safetensors"):
        export(scan_vit, "monai", tmp_path / "v.pt")
    assert not list(tmp_path.iterdir())


def test_a_vision_transformer_exported_to_monai_is_the_same_function_there(image_encoder, tmp_path):
    weights = torch.load(export(image_encoder, "monai", tmp_path / "v.pt"), weights_only=True)["state_dict"]
    net = MonaiViT(1, 64, 8, 96, 384, 4, 4, "conv", "learnable", True, spatial_dims=2, qkv_bias=True).eval()
    for part in net.modules():
        if isinstance(part, torch.nn.LayerNorm):
            part.eps = 1e-6  # MONAI has 1e-5: the only difference
    missing, unexpected = net.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all(k.startswith("classification_head") or "cross_attn" in k for k in missing), missing
    x = torch.rand(2, 1, 64, 64)
    with torch.no_grad():
        mine, levels, *_ = image_encoder.encode(x)
        cls, theirs = net.norm(net(x)[1][-1]), net(x)[1]
        torch.testing.assert_close(mine, cls, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(levels[-1], theirs[-1], atol=1e-4, rtol=1e-4)


def public_mae(net, colours):
    """A file as the published MAE weights are: colour patches, and a decoder that is of no use here."""
    weights = dict(net.state_dict()) | {
        "mask_token": torch.zeros(1, 1, 8),
        "decoder_embed.weight": torch.ones(8, 96),
    }
    kernel = torch.randn(96, colours, 8, 8) / 8
    return {"model": weights | {"patch_embed.proj.weight": kernel}}


def test_public_mae_weights_load_by_name_and_see_grey_as_they_saw_colour(image_encoder, tmp_path):
    torch.save(public := public_mae(image_encoder, 3), tmp_path / "mae.pt")
    with pytest.warns(UserWarning, match="three colours summed to one"):
        back = load_encoder(tmp_path / "mae.pt", heads=4)
    assert (back.config.encoder.blocks, back.config.mae.input, back.config.encoder.patch) == (4, 64, 8)
    grey = torch.rand(1, 1, 64, 64)
    mean, spread = (torch.tensor(v).view(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    weights = public["model"]
    colour = torch.nn.functional.conv2d(
        (grey - mean) / spread, weights["patch_embed.proj.weight"], weights["patch_embed.proj.bias"], stride=8
    )
    torch.testing.assert_close(
        back.patch_embed(grey), colour.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4
    )
    assert torch.equal(back.blocks[3].mlp.fc2.weight, image_encoder.blocks[3].mlp.fc2.weight)
    assert back.features(4095 * grey)["cls"].shape == (1, 96)
    assert back.features(torch.zeros(100, 70))["grid"] == (13, 9), "positions for another grid"


def test_vision_transformers_that_do_not_fit_are_refused_with_a_table(image_encoder, tmp_path):
    public = public_mae(image_encoder, 1)["model"]
    torch.save({"model": public}, tmp_path / "grey.pt")
    load_encoder(tmp_path / "grey.pt", heads=4)
    with pytest.raises(UseError, match="96 channels has no usual number of heads"):
        load_encoder(tmp_path / "grey.pt")
    part = {k: v for k, v in public.items() if k != "blocks.2.norm1.weight"}
    part["blocks.1.mlp.fc1.weight"] = torch.zeros(5, 5)
    torch.save(part, tmp_path / "part.pt")
    with pytest.raises(
        DataError, match=r"fits only in part(.|\n)*missing +blocks\.2(.|\n)*\(5, 5\) in the file"
    ):
        load_encoder(tmp_path / "part.pt", heads=4)
    torch.save(public | {"patch_embed.proj.weight": torch.zeros(96, 4, 8, 8)}, tmp_path / "four.pt")
    with pytest.raises(DataError, match="for other images"):
        load_encoder(tmp_path / "four.pt", heads=4)
    torch.save(public | {"pos_embed": torch.zeros(1, 60, 96)}, tmp_path / "odd.pt")
    with pytest.raises(DataError, match="no square grid"):
        load_encoder(tmp_path / "odd.pt", heads=4)


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
    normed = {f"swinViT.{k}": v for k, v in encoder.swin.state_dict().items()}
    normed["swinViT.patch_embed.norm.weight"] = torch.ones(8)  # would change the function if it were left out
    torch.save(normed, tmp_path / "normed.pt")
    with pytest.raises(DataError, match=r"patch_embed\.norm\.weight"):
        load_encoder(tmp_path / "normed.pt")
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
