"""Exactly k units are hidden in every sample, and each strategy hides what it says."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smartlab import UseError
from smartlab.masking import STRATEGIES, head_diversity, informativeness, make_mask, upsample

grids = st.tuples(*[st.integers(2, 6)] * 3)
ratios = st.floats(0.05, 0.95)
seeds = st.integers(0, 2**31)


def attention_for(grid, seed, batch=3, heads=4):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, heads, math.prod(grid), generator=generator).softmax(-1)


def draw(strategy, attention, ratio, grid, seed=0, **kw):
    return make_mask(strategy, attention, ratio, grid, generator=torch.Generator().manual_seed(seed), **kw)


@settings(deadline=None)
@given(st.sampled_from(STRATEGIES), grids, ratios, seeds, st.floats(0, 1), st.floats(0, 1))
def test_exactly_k_units_are_hidden_in_every_sample(strategy, grid, ratio, seed, p, hint):
    mask = draw(strategy, attention_for(grid, seed), ratio, grid, seed, p_attention=p, hint=hint)
    n = math.prod(grid)
    assert mask.dtype == torch.bool and mask.shape == (3, n)
    assert (mask.sum(1) == math.ceil(ratio * n - 1e-9)).all()


@given(st.sampled_from(STRATEGIES), grids, seeds)
def test_the_same_seed_gives_the_same_mask(strategy, grid, seed):
    a = attention_for(grid, seed)
    assert torch.equal(draw(strategy, a, 0.5, grid, seed), draw(strategy, a, 0.5, grid, seed))


@given(grids, ratios, seeds)
def test_high_and_low_are_complements_in_rank(grid, ratio, seed):
    a, n = attention_for(grid, seed), math.prod(grid)
    k = math.ceil(ratio * n - 1e-9)
    if k < n:
        high, low = draw("attention_high", a, ratio, grid), draw("attention_low", a, (n - k) / n, grid)
        assert torch.equal(high, ~low)
    importance = a.mean(1)
    high = draw("attention_high", a, ratio, grid)
    for row, hidden in zip(importance, high, strict=True):
        if not hidden.all():
            assert row[hidden].min() >= row[~hidden].max()


@given(grids, ratios, seeds, st.floats(0, 0.5))
def test_hint_differs_from_high_in_exactly_the_stated_number(grid, ratio, seed, hint):
    a, n = attention_for(grid, seed), math.prod(grid)
    k = math.ceil(ratio * n - 1e-9)
    high, hinted = draw("attention_high", a, ratio, grid), draw("attention_hint", a, ratio, grid, hint=hint)
    expected = min(round(hint * k), n - k)
    assert ((high & ~hinted).sum(1) == expected).all() and ((hinted & ~high).sum(1) == expected).all()
    fewer = draw("attention_hint", a, ratio, grid, hint=hint, hint_refill=False)
    assert (fewer.sum(1) == k - expected).all() and not (fewer & ~high).any()


@given(grids, st.floats(0.5, 0.9), seeds, st.floats(0.05, 0.3))
def test_hints_are_among_the_most_attended_and_the_next_ones_are_hidden_instead(grid, ratio, seed, hint):
    """DAGMaN, section 3.1; before, any hidden unit could be the hint."""
    a, n = attention_for(grid, seed), math.prod(grid)
    k, hinted = math.ceil(ratio * n - 1e-9), draw("attention_hint", a, ratio, grid, hint=hint)
    rank = a.mean(1).argsort(-1, descending=True).argsort(-1)
    hints = min(round(hint * k), n - k)
    assert (rank[~hinted & (rank < k)] < max(hints, math.ceil(hint * n - 1e-9))).all()
    assert (hinted == (hinted & (rank < k + hints))).all()


def test_hints_from_anywhere_are_the_old_behaviour():
    a = attention_for((6, 6, 6), 0, batch=200)
    rank = a.mean(1).argsort(-1, descending=True).argsort(-1)
    for where, top_tenth in (("top", 1.0), ("any", 0.1 / 0.7)):
        hinted = draw("attention_hint", a, 0.7, (6, 6, 6), hint=0.1, hint_from=where)
        shown = rank[~hinted & (rank < math.ceil(0.7 * 216))]
        assert (shown < 22).float().mean() == pytest.approx(top_tenth, abs=0.03)


def test_the_ratio_can_be_drawn_per_sample():
    mask = draw("attention_high", attention_for((4, 4, 4), 0, 4000), 0.5, (4, 4, 4), ratio_min=0.1)
    shares = mask.float().mean(1)
    assert shares.min() == pytest.approx(0.1, abs=0.02) and shares.max() == pytest.approx(0.5, abs=0.02)
    assert shares.mean() == pytest.approx(0.3, abs=0.02)
    low = draw(
        "attention_high", attention_for((4, 4, 4), 0, 4000), 0.5, (4, 4, 4), ratio_min=0.1, p_attention=0.0
    )
    assert low.float().mean() == pytest.approx(0.3, abs=0.02), "of random samples too"


def test_hints_are_a_share_of_what_that_very_sample_hides():
    a = attention_for((8, 8, 8), 0, batch=300)
    rank = a.mean(1).argsort(-1, descending=True).argsort(-1)
    mask = draw("attention_hint", a, 0.5, (8, 8, 8), hint=0.1, ratio_min=0.1)
    counts = mask.sum(1, keepdim=True)
    hints = (~mask & (rank < counts)).sum(1)
    assert ((hints - 0.1 * counts[:, 0]).abs() <= 0.51).all()


def test_samples_can_stay_whole_under_random_masks_too():
    """While a guard holds attention back, AttMask still masks half of the samples."""
    mask = draw("random", None, 0.5, (4, 4, 4), batch=2000, p_attention=0.5, otherwise="unmasked")
    assert ((mask.sum(1) == 0) | (mask.sum(1) == 32)).all()
    assert abs((mask.sum(1) == 0).float().mean() - 0.5) < 0.05


@given(st.sampled_from(STRATEGIES), grids, seeds)
def test_the_order_of_the_heads_does_not_matter(strategy, grid, seed):
    a = attention_for(grid, seed).double()  # exact enough for the mean not to depend on the order
    flipped = a.flip(1)
    assert torch.equal(draw(strategy, a, 0.6, grid, seed), draw(strategy, flipped, 0.6, grid, seed))


def test_sample_follows_its_distribution():
    """One unit of eight is drawn: its frequencies are a^(1/τ), by a chi-square test."""
    a = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8])
    for temperature in (1.0, 2.0):
        p = a ** (1 / temperature)
        p = p / p.sum()
        rows = 40_000
        mask = draw("attention_sample", a.expand(rows, 8), 1 / 8, (2, 2, 2), 1, temperature=temperature)
        counts = mask.float().sum(0)
        chi2 = ((counts - rows * p) ** 2 / (rows * p)).sum()
        assert chi2 < 24.3  # 0.1 % of the chi-square distribution with 7 degrees of freedom


def test_random_hides_every_unit_equally_often():
    mask = draw("random", None, 0.7, (4, 4, 4), batch=20_000)
    k = math.ceil(0.7 * 64)
    share = mask.float().mean(0)
    assert (share - k / 64).abs().max() < 5 * math.sqrt(k / 64 * (1 - k / 64) / 20_000)


def test_blocks_are_more_compact_than_random():
    def neighbours(mask):
        x = mask.view(-1, 6, 6, 6).float()
        return (x[:, 1:] * x[:, :-1]).sum() + (x[:, :, 1:] * x[:, :, :-1]).sum()

    block, random = (draw(s, None, 0.4, (6, 6, 6), batch=64) for s in ("block", "random"))
    assert neighbours(block) > 1.5 * neighbours(random)


def test_p_attention_mixes_guided_and_random_samples():
    a = torch.rand(4000, 64, generator=torch.Generator().manual_seed(5))
    high, mixed = (
        draw("attention_high", a, 0.5, (4, 4, 4)),
        draw("attention_high", a, 0.5, (4, 4, 4), p_attention=0.3),
    )
    assert abs((mixed == high).all(1).float().mean() - 0.3) < 0.03
    assert (mixed.sum(1) == 32).all(), "the others are masked at random"
    whole = draw("attention_high", a, 0.5, (4, 4, 4), p_attention=0.3, otherwise="unmasked")
    assert abs((whole.sum(1) == 32).float().mean() - 0.3) < 0.03
    assert (whole.sum(1) == 0).sum() + (whole.sum(1) == 32).sum() == 4000


def test_equal_attention_gives_random_masks_not_corner_masks():
    mask = draw("attention_high", torch.full((5000, 27), 1 / 27), 0.5, (3, 3, 3))
    assert (mask.float().mean(0) - 14 / 27).abs().max() < 0.05


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("attention_high", None, 0.5, (2, 2, 2)), "needs the attention"),
        (("random", None, 0.5, (2, 2, 2)), "batch"),
        (("attention_high", torch.rand(1, 9), 0.5, (2, 2, 2)), "9 units"),
        (("guess", torch.rand(1, 8), 0.5, (2, 2, 2)), "one of random"),
        (("random", torch.rand(1, 8), 1.0, (2, 2, 2)), "ratio"),
    ],
)
def test_bad_requests_are_refused(arguments, hint):
    with pytest.raises(UseError, match=hint):
        make_mask(*arguments)


def test_upsampling_repeats_each_unit_over_its_voxels():
    mask = torch.rand(2, 8) > 0.5
    big = upsample(mask, (2, 2, 2), 3)
    assert big.shape == (2, 6, 6, 6)
    assert torch.equal(big[:, ::3, ::3, ::3].reshape(2, 8), mask)
    assert torch.equal(big[:, 2::3, 2::3, 2::3].reshape(2, 8), mask)


@given(seeds)
def test_informativeness_is_zero_for_uniform_and_one_for_a_single_unit(seed):
    a = attention_for((3, 3, 3), seed)
    assert ((informativeness(a) >= -1e-6) & (informativeness(a) <= 1)).all()
    assert informativeness(torch.full((1, 27), 1 / 27)).abs() < 1e-6
    assert informativeness(torch.eye(27)[:1]) == 1


def test_head_diversity_is_zero_for_equal_heads_and_one_for_disjoint_heads():
    equal = torch.rand(2, 1, 12).softmax(-1).expand(2, 4, 12)
    disjoint = torch.eye(4).repeat_interleave(3, 1)[None] / 3
    for name in ("cosine", "jensen_shannon"):
        assert head_diversity(equal)[name].abs().max() < 1e-5
        assert abs(head_diversity(disjoint)[name].item() - 1) < 1e-5
