"""Semantic attention: a [CLS] row over the mask units, whatever the grid and the settings."""

from __future__ import annotations

import pytest
import torch

from smartlab.masking import head_diversity
from smartlab.models.semantic import SemanticAttention


@pytest.mark.parametrize("kind", ["full", "class"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("registers", [0, 2])
@pytest.mark.parametrize("position", [True, False])
def test_attention_is_a_distribution_over_the_units_on_any_grid(kind, similarity, registers, position):
    net = SemanticAttention(24, (4, 4, 4), 2, 4, kind, similarity, position, registers)
    for grid in ((4, 4, 4), (3, 5, 2)):
        seen = net(torch.randn(2, *grid, 24), received=True)
        n = grid[0] * grid[1] * grid[2]
        assert (
            seen.attention.shape == (2, 4, n)
            and seen.tokens.shape == (2, n, 24)
            and seen.cls.shape == (2, 24)
        )
        torch.testing.assert_close(seen.attention.sum(-1), torch.ones(2, 4))
        torch.testing.assert_close(seen.received.sum(-1), torch.ones(2))
        seen.cls.sum().backward()


def test_the_reported_attention_is_what_the_block_pays():
    """[CLS] is moved by exactly the attention that is reported: checked against the written-out softmax."""
    torch.manual_seed(0)
    net = SemanticAttention(16, (2, 2, 2), 1, 2, "full", "dot", registers=1)
    tokens = torch.randn(1, 2, 2, 2, 16)
    x = torch.cat([net.cls, net.norm_in(tokens).reshape(1, 8, 16) + net.positions((2, 2, 2))], 1)
    block = net.blocks[0]
    q, k, v = block._split(x)
    weights = (q[:, :, :1] @ k.transpose(-2, -1) / 8**0.5).softmax(-1)
    moved = x[:, :1] + block.proj((weights @ v).transpose(1, 2).flatten(2))
    moved = net.norm(moved + block.mlp(block.norm2(moved)))
    seen = net(tokens)
    torch.testing.assert_close(seen.cls, moved[:, 0])
    patches = weights[:, :, 0, 2:]
    torch.testing.assert_close(seen.attention, patches / patches.sum(-1, keepdim=True))
    torch.testing.assert_close(seen.attention * seen.share.exp()[..., None], patches)


def test_attention_that_picks_masks_stays_in_fp32_under_autocast():
    """Nearly uniform attention ranked in bf16 would be ranked by rounding."""
    torch.manual_seed(0)
    net = SemanticAttention(16, (6, 6, 6), 2, 4, "full", "dot")
    tokens = torch.randn(1, 6, 6, 6, 16)
    with torch.autocast("cpu", torch.bfloat16):
        seen = net(tokens, received=True)
        spread = head_diversity(seen.attention)["cosine"]
    assert seen.attention.dtype == seen.received.dtype == torch.float32
    assert all(len(seen.attention[0, head].unique()) > 200 for head in range(4))
    assert len(seen.received.unique()) > 200
    torch.testing.assert_close(spread, head_diversity(seen.attention)["cosine"])


def test_without_positions_only_content_counts():
    """Moving the tokens about moves the attention with them, and leaves [CLS] as it was."""
    net = SemanticAttention(16, (2, 2, 2), 2, 4, "full", "cosine", position=False, registers=2)
    tokens, order = torch.randn(1, 8, 16), torch.randperm(8)
    a, b = (net(t.view(1, 2, 2, 2, 16)) for t in (tokens, tokens[:, order]))
    torch.testing.assert_close(b.attention, a.attention[:, :, order])
    torch.testing.assert_close(b.cls, a.cls)
