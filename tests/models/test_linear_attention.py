"""Every linear attention approaches softmax attention as it is given more, and meets it where it must."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from smartlab.core.errors import UseError
from smartlab.core.settings import MaeConfig
from smartlab.models.linear_attention import (
    KINDS,
    Attention,
    Nystrom,
    make_core,
    orthogonal,
    pseudo_inverse,
    segments,
)

LINEAR = [kind for kind in KINDS if kind != "softmax"]
SIZE = {"nystrom": "landmarks", "linformer": "rank", "performer": "features"}


def image_like(batch=2, heads=2, side=16, channels=16, seed=0, spread=1.5):
    """q, k, v (B, heads, side², c) that vary smoothly over the image, as tokens do."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn(3, batch * heads, channels, 5, 5, generator=generator)
    fine = torch.stack([F.interpolate(x, size=side, mode="bicubic") for x in coarse])
    fine = fine + 0.1 * torch.randn(fine.shape, generator=generator)
    return (spread * fine).flatten(3).transpose(2, 3).unflatten(1, (batch, heads)).unbind(0)


def core(kind, size, tokens, channels=16, **more):
    torch.manual_seed(0)
    return make_core(kind, 2, channels, tokens, MaeConfig(**{SIZE[kind]: size}, **more))


def error(kind, size, q, k, v, dtype=torch.float32, draws=1):
    exact = F.scaled_dot_product_attention(q, k, v)
    apart = []
    for draw in range(draws):
        torch.manual_seed(draw)
        net = make_core(kind, q.shape[1], q.shape[3], q.shape[2], MaeConfig(**{SIZE[kind]: size}))
        with torch.no_grad():
            out = net.to(dtype)(*(x.to(dtype) for x in (q, k, v)))
        assert out.dtype == dtype
        apart.append((out.float() - exact).norm() / exact.norm())
    return float(torch.stack(apart).mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", LINEAR)
def test_the_error_falls_as_more_is_given(kind, dtype):
    # the variance of random features grows like exp(|q|²): smaller logits for them
    q, k, v = image_like(spread=1.5 if kind != "performer" else 0.7)
    sizes = (8, 32, 128, 256) if kind != "performer" else (16, 64, 256, 1024)
    errors = [error(kind, n, q, k, v, dtype, draws=1 if kind != "performer" else 4) for n in sizes]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0], errors
    assert errors[-1] < (0.2 if kind == "performer" else 0.02), errors


@pytest.mark.parametrize("kind", ["nystrom", "linformer"])
@pytest.mark.parametrize("size", [49, 64], ids=["as many", "more"])
def test_as_many_landmarks_or_ranks_as_tokens_are_exact(kind, size):
    q, k, v = image_like(side=7)
    out = core(kind, size, 49)(q, k, v)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v), atol=1e-5, rtol=1e-5)


def test_the_three_factors_themselves_are_exact_with_every_token_a_landmark():
    """Not only the short cut taken there: the formula, with enough iterations of the pseudo-inverse."""
    q, k, v = (x.double() for x in image_like(side=4, spread=3.0))
    net = Nystrom(2, landmarks=16, iterations=40)
    exact = F.scaled_dot_product_attention(q, k, v)
    few = [Nystrom(2, 16, n).approximate(q, k, v) for n in (2, 6)]
    apart = [float((x - exact).norm()) for x in (*few, net.approximate(q, k, v))]
    assert apart[0] > apart[1] > apart[2] and apart[2] < 1e-3, apart


def test_performer_is_exact_where_all_keys_are_equal_and_right_on_average():
    q, k, v = image_like(spread=0.8)
    same = k[:, :, :1].expand_as(k)
    out = core("performer", 16, 256)(q, same, v)
    torch.testing.assert_close(out, v.mean(2, keepdim=True).expand_as(v), atol=1e-4, rtol=1e-3)
    x, y = q[0, 0, :4] / 4, k[0, 0, :4] / 4  # short: the variance grows like exp(|x + y|²)
    kernel = torch.zeros(4, 4)
    for _ in range(400):
        w = orthogonal(64, 16)
        lifted = [(z @ w.T - z.square().sum(-1, keepdim=True) / 2).exp() for z in (x, y)]
        kernel += lifted[0] @ lifted[1].T / 64 / 400
    torch.testing.assert_close(kernel, (x @ y.T).exp(), rtol=0.03, atol=0.01)


def test_random_directions_are_orthogonal_within_a_block_and_as_long_as_gaussian_ones():
    torch.manual_seed(0)
    w = orthogonal(4096, 8)
    gram = w[:8] @ w[:8].T
    assert (gram - gram.diag().diag()).abs().max() < 1e-4
    assert abs(float(w.square().sum(1).mean()) - 8) < 0.3


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 12), st.integers(0, 1000))
def test_the_pseudo_inverse_inverts(m, seed):
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(3, m, m, generator=generator, dtype=torch.float64).softmax(-1) + torch.eye(m)
    a = a / a.sum(-1, keepdim=True)
    torch.testing.assert_close(
        pseudo_inverse(a, 30) @ a, torch.eye(m, dtype=torch.float64).expand_as(a), atol=1e-6, rtol=0
    )


@given(st.integers(1, 60), st.integers(1, 60))
@settings(max_examples=30, deadline=None)
def test_every_token_is_in_one_segment(tokens, count):
    mixing = segments(tokens, count, torch.zeros(()))
    torch.testing.assert_close(mixing.sum(1), torch.ones(min(tokens, count)))
    assert ((mixing > 0).sum(0) == 1).all()


@pytest.mark.parametrize("kind", KINDS)
def test_one_interface_for_all_kinds(kind):
    """Any length, gradients for every parameter, autocast, and no value that is not finite."""
    torch.manual_seed(0)
    net = Attention(32, 4, kind, tokens=65, settings=MaeConfig(landmarks=16, rank=16, features=32))
    for tokens in (65, 130):
        x = torch.randn(2, tokens, 32) * 3
        out = net(x)
        assert out.shape == x.shape and torch.isfinite(out).all()
    out.square().mean().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in net.parameters())
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        low = net(x)
    assert low.dtype == torch.bfloat16
    assert (low.float() - out).norm() < 0.05 * out.norm()


def test_the_inverse_of_landmarks_is_multiplied_in_fp32_under_autocast():
    """It has entries of thousands, which bf16 would leave with two digits."""
    q, k, v = (0.1 * x for x in image_like())
    net = core("nystrom", 64, q.shape[2], iterations=20)
    exact = net(q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        low = net(q, k, v)
    assert (low.float() - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("kind", LINEAR)
def test_large_logits_neither_overflow_nor_vanish(kind):
    q, k, v = (50 * x for x in image_like())
    for dtype in (torch.float32, torch.bfloat16):
        out = core(kind, 32, 256).to(dtype)(*(x.to(dtype) for x in (q, k, v)))
        assert torch.isfinite(out).all()


def test_the_convolution_starts_at_nothing_and_then_adds_what_is_local():
    q, k, v = image_like(side=4)
    net = core("nystrom", 4, 16, kernel=3)
    before = net(q, k, v)
    with torch.no_grad():
        net.local.weight[:, :, 1] = 1.0
    torch.testing.assert_close(net(q, k, v), before + v)


def test_what_cannot_be_is_refused():
    with pytest.raises(UseError, match="one of softmax, nystrom"):
        make_core("cosformer", 2, 16)
    with pytest.raises(UseError, match="how many tokens"):
        make_core("linformer", 2, 16)
