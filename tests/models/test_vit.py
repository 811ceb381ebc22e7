"""The vision transformer is MAE's for images and nnU-Net's Primus for scans, and serves every evaluation."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import smartlab as sl
from smartlab.core.errors import UseError
from smartlab.models.patches import sine_positions
from smartlab.models.vit import Style, ViT, ViTEncoder

GREY = 4096
SIZES = {"primus-s": "S", "primus-b": "B", "primus-m": "M", "primus-l": "L"}
ALONE = {"encoder.cls_token": False, "mask.fill": "zero", "data.view": 24, "data.region": 24, "mae.input": 24}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return ViTEncoder(sl.load_config("miram-tiny")).eval()


def scans(**more):
    torch.manual_seed(0)
    return ViTEncoder(sl.load_config("primus-tiny", more)).eval()


@pytest.fixture(scope="module")
def scan_encoder():
    return scans(**{"encoder.registers": 2})


def made_by(primus, config):
    """nnU-Net's own, made like an encoder of ours."""
    e = config.encoder
    return primus.Primus(
        1,
        e.embed_dim,
        (e.patch,) * 3,
        1,
        e.blocks,
        e.heads,
        (config.data.view,) * 3,
        drop_path_rate=e.drop_path,
        init_values=e.layer_scale,
        scale_attn_inner=e.inner_norm,
    )


def of_encoder(net):
    """The weights of Primus without its decoder and its buffer of zeros."""
    return {k: v for k, v in net.state_dict().items() if not k.startswith(("up_projection.", "mask_token"))}


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


@pytest.mark.parametrize("name", ["primus-tiny", *SIZES])
def test_primus_has_the_names_shapes_and_number_of_its_published_parameters(name, primus):
    config = sl.load_config("primus-tiny", {"encoder.preset": name} | ALONE)
    with torch.device("meta"):
        ours, theirs = ViTEncoder(config).state_dict(), of_encoder(made_by(primus, config))
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    if name in SIZES:
        e, known = config.encoder, primus._PRIMUS_CONFIGS[SIZES[name]]
        assert (e.blocks, e.heads, e.embed_dim) == (
            known["eva_depth"],
            known["eva_numheads"],
            known["embed_dim"],
        )


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("primus-tiny", False),
        ("primus-tiny", True),
        ("primus-s", False),
        *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("primus-b", "primus-m", "primus-l")),
    ],
)
def test_primus_computes_what_nnunets_computes(name, plain, primus):
    """Without [CLS] and registers, as nnU-Net trains it and, plain, as its class comes; all weights moved off their start."""
    torch.manual_seed(0)
    more = {"encoder.layer_scale": None, "encoder.inner_norm": False} if plain else {}
    config = sl.load_config("primus-tiny", {"encoder.preset": name} | ALONE | more)
    ours, theirs = ViTEncoder(config).eval(), made_by(primus, config).eval()
    ours.load_state_dict(of_encoder(theirs))
    with torch.no_grad():
        for weight in ours.state_dict().values():
            weight.add_(0.05 * torch.randn_like(weight))
        theirs.load_state_dict(ours.state_dict(), strict=False)
    seen = []
    theirs.up_projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    x = torch.rand(2, 1, 24, 24, 24)
    with torch.inference_mode():
        theirs(x)
        out = ours(x)
    expected = seen[0].flatten(2).transpose(1, 2)
    assert expected.std() > 0.1
    torch.testing.assert_close(out.tokens, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(out.cls, expected.mean(1), atol=1e-4, rtol=1e-4)
    assert out.attention is None and out.grid == (3, 3, 3)


def test_attention_depends_on_where_tokens_are_to_each_other():
    """Rotated queries and keys meet in logits that a shift along any axis leaves as they were."""
    torch.manual_seed(0)
    net = ViT(1, 2, 36, 2, 2, (6, 6, 6), 2.0, Style(cls=False))
    attention = net.trunk.blocks[0].attn
    x = torch.randn(1, 1, 36).expand(1, 216, 36)
    q, k, _ = attention.split(x, net.turn((6, 6, 6), None))
    logits = (q @ k.transpose(-2, -1))[0].unflatten(2, (6, 6, 6)).unflatten(1, (6, 6, 6))
    for axis in range(3):
        here, there = logits, logits
        for first in (1, 4):
            there, here = there.narrow(first + axis, 1, 5), here.narrow(first + axis, 0, 5)
        torch.testing.assert_close(here, there, atol=1e-4, rtol=1e-4)
    assert logits[0, 0, 0, 0].std() > 0.01, "and not the same everywhere"


def test_hidden_patches_do_not_reach_the_encoder_of_scans(scan_encoder):
    """What is hidden may be anything, and tokens left out are as if they could not be attended to."""
    x, keep = torch.rand(2, 1, 64, 64, 64), torch.rand(2, 512).argsort(1)[:, :100].sort(1).values
    tokens, attention = scan_encoder.visible(x, keep)
    assert tokens.shape == (2, 101, 96) and attention.shape == (2, 4, 100)
    spoiled = torch.full_like(x, float("nan"))
    for row, place in itertools.product(range(2), range(100)):
        a, b, c = (8 * int(i) for i in np.unravel_index(int(keep[row, place]), (8, 8, 8)))
        spoiled[row, :, a : a + 8, b : b + 8, c : c + 8] = x[row, :, a : a + 8, b : b + 8, c : c + 8]
    torch.testing.assert_close(scan_encoder.visible(spoiled, keep)[0], tokens)
    swapped, _ = scan_encoder.visible(x, keep.flip(1))
    torch.testing.assert_close(swapped[:, 1:], tokens[:, 1:].flip(1), atol=1e-5, rtol=1e-4)
    every, _ = scan_encoder.visible(x, torch.arange(512).expand(2, -1))
    out = scan_encoder(x)
    torch.testing.assert_close(every, torch.cat([out.cls[:, None], out.tokens], 1))


def test_a_dense_student_sees_where_nothing_is_but_not_what_was_there(scan_encoder):
    """Hidden patches keep their places; zero by default, a learned token by setting; dropped ones are always zero."""
    x, hidden = torch.rand(1, 1, 64, 64, 64), torch.rand(1, 512) < 0.7
    learned = scans(**{"encoder.registers": 2, "mask.fill": "token", "student.encode": "dense"})
    voxels = hidden.view(1, 1, 8, 8, 8)
    for axis in (2, 3, 4):
        voxels = voxels.repeat_interleave(8, axis)
    for net in (scan_encoder, learned):
        out = net(x, hidden=hidden)
        assert torch.equal(out.tokens, net(torch.where(voxels, 0.3, x), hidden=hidden).tokens)
        dropped = net(x, dropped=hidden.view(1, 8, 8, 8))
        assert torch.equal(dropped.tokens, out.tokens) == (net is scan_encoder)
        assert len(out.tokens[hidden].unique(dim=0)) == int(hidden.sum()), "places tell them apart"


def test_what_is_received_is_attention_averaged_over_queries_and_heads(scan_encoder):
    x = torch.rand(1, 1, 32, 32, 32)
    out = scan_encoder(x, received=True)
    last, inputs = scan_encoder.trunk.blocks[-1], []
    hook = last.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    scan_encoder(x)
    hook.remove()
    q, k, _ = last.attn.split(last.norm1(inputs[0]), scan_encoder.turn((4, 4, 4), None))
    weights = (q @ k.transpose(-2, -1) / 24**0.5).softmax(-1)[..., 3:]
    expected = weights.mean((1, 2))
    torch.testing.assert_close(out.received, expected / expected.sum(-1, keepdim=True))
    rows = weights[:, :, 0]
    torch.testing.assert_close(out.attention, rows / rows.sum(-1, keepdim=True))


@pytest.mark.parametrize("size", [(64, 64, 64), (50, 70, 90)], ids=str)
@pytest.mark.parametrize("semantic", [False, True])
def test_features_and_attention_of_scans_of_any_size(size, semantic):
    net = scans(**({"semantic.enabled": True, "method.preset": "dagman"} if semantic else {}))
    hu = np.random.default_rng(0).integers(-1000, 400, size).astype(np.int16)
    found, a = net.features(hu), net.attention(hu)
    grid = tuple(-(-n // 8) for n in size)
    assert found["grid"] == grid and found["cls"].shape == (1, 96)
    assert found["tokens"].shape == (1, math.prod(grid), 96)
    assert [s.shape for s in found["stages"]] == [(1, 96, *grid)] * 5
    assert a.shape == (1, 4, *grid) and (a >= 0).all()
    torch.testing.assert_close(a.sum((2, 3, 4)), torch.ones(1, 4))
    assert all(torch.isfinite(t).all() for t in (found["cls"], found["tokens"], a))


def test_checkpointing_and_stochastic_depth(scan_encoder):
    x = torch.rand(1, 1, 32, 32, 32)
    again = scans(**{"encoder.registers": 2, "encoder.checkpointing": True}).train()
    assert torch.equal(again(x).tokens, scan_encoder(x).tokens)
    again(x).tokens.sum().backward()
    assert all(p.grad is not None for n, p in again.named_parameters())
    deep = scans(**{"encoder.drop_path": 0.5})
    assert [block.drop_path for block in deep.trunk.blocks] == pytest.approx([0, 1 / 6, 1 / 3, 0.5])
    assert torch.equal(deep(x).cls, deep(x).cls) and not torch.equal(deep.train()(x).cls, deep(x).cls)


def test_settings_of_primus_are_refused_elsewhere_and_channels_must_turn():
    for change in ({"encoder.registers": 2}, {"encoder.cls_token": False}, {"encoder.layer_scale": 0.1}):
        for preset in ("tiny", "miram-tiny"):
            with pytest.raises(UseError, match=r"encoder\.layout=primus"):
                sl.load_config(preset, change)
    with pytest.raises(UseError, match=r"6 × encoder\.heads = 6 × 5"):
        sl.load_config("primus-tiny", {"encoder.heads": 5})
    with pytest.raises(UseError, match="no semantic attention"):
        scans(**{"encoder.cls_token": False}).attention(np.zeros((64, 64, 64), np.int16))


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
