"""Our Swin is MONAI's Swin: same names, same numbers, for every preset and any grid."""

from __future__ import annotations

import pytest
import torch
from monai.networks.nets.swin_unetr import SwinTransformer

from smartlab.config import ENCODERS, EncoderConfig
from smartlab.models.swin import Swin, shift_mask

PRESETS = [name for name in ENCODERS if name != "custom"]


def pair(embed_dim, depths, num_heads, window_size, qkv_bias=True, **_):
    torch.manual_seed(0)
    ours = Swin(1, embed_dim, depths, num_heads, window_size, qkv_bias=qkv_bias).eval()
    theirs = SwinTransformer(
        1, embed_dim, (window_size,) * 3, (2, 2, 2), depths, num_heads, qkv_bias=qkv_bias
    ).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    return ours, theirs


def settings(preset):
    fields = {key.removeprefix("encoder."): value for key, value in ENCODERS[preset].items()}
    return EncoderConfig(preset=preset, **fields).model_dump()


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("size", [(64, 64, 64), (96, 64, 32)])
def test_outputs_equal_monai_for_every_preset(preset, size):
    ours, theirs = pair(**settings(preset))
    x = torch.randn(1, 1, *size)
    with torch.no_grad():
        for mine, reference in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("size", [(32, 64, 128), (160, 32, 32), (50, 36, 70)])
def test_any_size_is_padded_as_monai_pads_it(size):
    ours, theirs = pair(12, (2, 2, 2, 2), (1, 2, 4, 8), 4)
    x = torch.randn(2, 1, *size)
    with torch.no_grad():
        for mine, reference in zip(ours(x), theirs(x), strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


def test_gradients_equal_monai_and_checkpointing_changes_nothing():
    ours, theirs = pair(12, (2, 2, 2, 2), (1, 2, 4, 8), 4)
    saving = Swin(1, 12, (2, 2, 2, 2), (1, 2, 4, 8), 4, checkpointing=True)
    saving.load_state_dict(ours.state_dict())
    x = torch.randn(1, 1, 64, 64, 32, dtype=torch.float64)
    weights = [torch.randn_like(f) for f in ours.double()(x)]
    for net in (ours, theirs, saving):
        net.double().train()
        sum((w * f).sum() for w, f in zip(weights, net(x), strict=True)).backward()
    reference = dict(theirs.named_parameters())
    for other in (ours, saving):
        for name, parameter in other.named_parameters():
            scale = reference[name].grad.abs().max().clamp(min=1e-6)
            assert (parameter.grad - reference[name].grad).abs().max() / scale < 1e-6, name


def test_shift_masks_are_built_once_and_only_where_windows_shift(monkeypatch):
    calls = []
    monkeypatch.setattr("smartlab.models.swin.shift_mask", lambda *a: calls.append(a) or shift_mask(*a))
    net = Swin(1, 12, (2, 2, 4, 2), (1, 2, 4, 8), 4)
    for _ in range(3):
        net(torch.zeros(1, 1, 64, 64, 64))
    # 32³, 16³ and 8³ tokens shift; the last stage has 4³ tokens, one window: no shift, no mask
    assert [call[0] for call in calls] == [(32,) * 3, (16,) * 3, (8,) * 3]
    single = Swin(1, 12, (1, 1, 1, 1), (1, 2, 4, 8), 4)
    single(torch.zeros(1, 1, 64, 64, 64))
    assert len(calls) == 3
    assert not any("mask" in key for key in net.state_dict())


@pytest.mark.slow
def test_compiles_as_one_graph():
    net = Swin(1, 12, (2, 1, 1, 1), (1, 2, 4, 8), 4)
    x = torch.randn(1, 1, 64, 32, 32)
    expected = net(x)
    for mine, reference in zip(torch.compile(net, fullgraph=True)(x), expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)
