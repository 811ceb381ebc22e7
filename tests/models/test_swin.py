"""Our Swin is MONAI's Swin: same names, same numbers, for every preset and any grid."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from monai.networks.nets.swin_unetr import SwinTransformer

from smartlab.core.config import load_config
from smartlab.core.presets import ENCODERS
from smartlab.core.settings import EncoderConfig
from smartlab.masking import upsample
from smartlab.models.attend import attend
from smartlab.models.encoder import Encoder
from smartlab.models.swin import Swin
from smartlab.models.windows import shift_mask

PRESETS = [name for name, e in ENCODERS.items() if e.get("encoder.kind") == "swin"]


def pair(embed_dim, depths, num_heads, window_size, qkv_bias=True, **_):
    torch.manual_seed(0)
    shape = {"embed_dim": embed_dim, "depths": depths, "num_heads": num_heads}
    ours = Swin(EncoderConfig(**shape, window_size=window_size, qkv_bias=qkv_bias)).eval()
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
    saving = Swin(EncoderConfig(depths=(2, 2, 2, 2), checkpointing=True))
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
    monkeypatch.setattr("smartlab.models.windows.shift_mask", lambda *a: calls.append(a) or shift_mask(*a))
    net = Swin(EncoderConfig(depths=(2, 2, 4, 2)))
    for _ in range(3):
        net(torch.zeros(1, 1, 64, 64, 64))
    # 32³, 16³ and 8³ tokens shift; the last stage has 4³ tokens, one window: no shift, no mask
    assert [call[0] for call in calls] == [(32,) * 3, (16,) * 3, (8,) * 3]
    single = Swin(EncoderConfig(depths=(1, 1, 1, 1)))
    single(torch.zeros(1, 1, 64, 64, 64))
    assert len(calls) == 3
    assert not any("mask" in key for key in net.state_dict())


@pytest.mark.slow
def test_compiles_as_one_graph():
    net = Swin(EncoderConfig(depths=(2, 1, 1, 1)))
    x = torch.randn(1, 1, 64, 32, 32)
    expected = net(x)
    sum(
        stage.square().mean() for stage in torch.compile(net, fullgraph=True, backend="aot_eager")(x)
    ).backward()
    assert all(p.grad is not None for p in net.parameters()), "forward and backward, captured whole"
    with torch.no_grad():  # half the code to be compiled, which takes a minute
        for mine, reference in zip(torch.compile(net, fullgraph=True)(x), expected, strict=True):
            torch.testing.assert_close(mine, reference, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "window_size, depths", [(4, (1, 1, 2, 1)), (4, (2, 2, 2, 2)), (2, (2, 1, 1, 1)), (7, (2, 1, 1, 1))]
)
def test_masked_units_computed_once_change_nothing(window_size, depths):
    """The shortcut equals encoding every masked unit, in all stages and in all gradients."""
    more = {"encoder.window_size": window_size, "encoder.depths": depths, "encoder.preset": "custom"}
    encoder = Encoder(load_config("tiny", more)).double()
    x = torch.rand(2, 1, 64, 64, 64, dtype=torch.float64)
    hidden = torch.rand(2, 512) < 0.7
    found = []
    for visible in (None, int((~hidden).sum())):
        encoder.zero_grad()
        seen = encoder(x, hidden=hidden, visible=visible)
        (seen.cls.square().sum() + seen.tokens.square().mean() + seen.stages[-1].square().sum()).backward()
        grads = {n: p.grad.clone() for n, p in encoder.named_parameters()}
        found.append((seen.stages, grads))
    for dense, quick in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(quick, dense, atol=1e-9, rtol=1e-9)
    for name, gradient in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], gradient, atol=1e-8, rtol=1e-6, msg=name)


def test_masked_units_are_computed_once(monkeypatch):
    """With 70% hidden, the first stage of `tiny` sees the visible units and one more."""
    encoder = Encoder(load_config("tiny"))
    cells = []
    block = encoder.swin.layers1[0].blocks[0]
    block.register_forward_pre_hook(lambda module, inputs: cells.append(inputs[0].shape[0]))
    hidden = torch.zeros(2, 512, dtype=torch.bool)
    hidden[:, :359] = True
    encoder(torch.rand(2, 1, 64, 64, 64), hidden=hidden, visible=2 * (512 - 359))
    assert cells == [2 * (512 - 359) + 1]


@pytest.mark.parametrize("shape", [(300, 2, 64, 12), (4, 64, 64, 8), (1, 3, 50, 16)])
def test_attention_in_pieces_is_attention(shape):
    """The processor's own form agrees with the library's, gradients of the bias included."""
    q, k, v = (torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, shape[1], shape[2], shape[2], dtype=torch.float64, requires_grad=True)
    weight = torch.randn(shape, dtype=torch.float64)
    for form in (attend, lambda q, k, v, b: F.scaled_dot_product_attention(q, k, v, attn_mask=b)):
        out = form(q, k, v, bias)
        grads = torch.autograd.grad((out * weight).sum(), (q, k, v, bias))
        if form is attend:
            expected = (out, *grads)
    for mine, theirs in zip(expected, (out, *grads), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-10, rtol=1e-8)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_sparse_student_sees_each_unit_apart_until_units_are_tokens(checkpointing):
    """What one visible unit gives does not depend on what else is in the view, nor on which units are hidden."""
    more = {
        "encoder.preset": "custom",
        "encoder.depths": [2, 2, 2, 1],
        "encoder.checkpointing": checkpointing,
        "semantic.stage": 3,
        "student.encode": "sparse",
    }
    encoder = Encoder(load_config("tiny", more)).double()
    x = torch.rand(2, 1, 64, 64, 64, dtype=torch.float64)
    hidden = torch.ones(2, 64, dtype=torch.bool)
    hidden[0, :5] = hidden[1, 3:20] = False
    seen = encoder(x, hidden=hidden, visible=int((~hidden).sum()))
    units = seen.stages[3].flatten(1, 3)  # (2, 64, C), one token per unit of 16 voxels
    others = hidden.clone()
    others[0, 5:9] = False
    other_views = torch.where(
        upsample(hidden, (4, 4, 4), 16)[:, None] | (torch.arange(2).view(2, 1, 1, 1, 1) == 1),
        torch.rand_like(x),
        x,
    )
    again = encoder(other_views, hidden=others).stages[3].flatten(1, 3)
    torch.testing.assert_close(again[0, :5], units[0, :5], atol=1e-12, rtol=1e-9)
    assert (again[1, 3:20] - units[1, 3:20]).abs().max() > 1e-3
    torch.testing.assert_close(
        units[hidden], units[hidden][:1].expand_as(units[hidden]), atol=1e-12, rtol=1e-9
    )
    seen.stages[-1].square().sum().backward()  # from here on units see each other
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.swin.layers1.parameters())


def test_positions_inside_a_small_unit_are_the_true_ones():
    """Two tokens that are neighbours share their bias, whatever the size of the cell they are in."""
    attention = Swin(EncoderConfig(depths=(1, 1, 1, 1))).layers1[0].blocks[0].attn
    whole, cell = attention.bias((4, 4, 4), True), attention.bias((2, 2, 2), True)
    place = torch.arange(64).view(4, 4, 4)[1:3, 1:3, 1:3].flatten()
    torch.testing.assert_close(cell, whole[:, place][:, :, place])


def test_doing_blocks_again_in_backward_keeps_little_and_drops_the_same_paths():
    """Checkpointing: equal losses and gradients with stochastic depth, and a third or less kept for backward."""
    x, found = torch.rand(2, 1, 64, 64, 64, dtype=torch.float64), {}
    for again in (False, True):
        torch.manual_seed(0)
        net = Swin(EncoderConfig(depths=(2, 2, 2, 2), drop_path=0.5, checkpointing=again)).double().train()
        kept = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal kept
            kept += tensor.numel()
            return tensor

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda t: t):
            out = net.stages(net.embed(x))[-1].square().sum()
        out.backward()
        found[again] = (out, kept, [p.grad for p in net.parameters()])
    torch.testing.assert_close(found[True][0], found[False][0])
    torch.testing.assert_close(found[True][2], found[False][2])
    assert found[True][1] < found[False][1] / 3


def test_a_row_of_a_sparse_batch_does_not_depend_on_what_other_rows_hide():
    encoder = Encoder(load_config("tiny", {"student.encode": "sparse"})).eval()
    x, nothing, one = torch.rand(2, 1, 32, 32, 32), torch.zeros(2, 64, dtype=torch.bool), torch.zeros(2, 64)
    one[1, 3] = 1
    seen = [encoder(x, hidden=hidden).tokens[0] for hidden in (nothing, one.bool())]
    torch.testing.assert_close(seen[0], seen[1], atol=1e-5, rtol=1e-4)


def test_no_path_is_dropped_among_units_that_are_apart():
    """Cells are no samples: masked ones, computed once for all, must not lose a branch together."""
    settings = {"student.encode": "sparse", "encoder.preset": "custom", "encoder.drop_path": 0.9}
    encoder = Encoder(load_config("tiny", settings)).train()
    hidden = torch.rand(1, 512, generator=torch.Generator().manual_seed(0)) < 0.7
    x = torch.rand(1, 1, 64, 64, 64)
    first, again = (encoder(x, hidden=hidden).stages[encoder.stage] for _ in range(2))
    torch.testing.assert_close(first, again)
