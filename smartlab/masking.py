"""Which mask units to hide from the student.

Every strategy turns an importance per unit into exactly k = ⌈r·N⌉ hidden units per sample (fewer only where
`otherwise`, `ratio_min` or `hint_refill` say so), as batched tensor code on the device, with randomness from
a passed `torch.Generator` only.

- `random`: k units uniformly.
- `block`: boxes of 2×2×2 to 4×4×4 units until k are covered.
- `attention_high`: the k most important.
- `attention_hint`: the k most important but for hints, some of the very top, and the next ones instead.
- `attention_low`: the k least important.
- `attention_sample`: k without replacement, with probability ∝ a^(1/temperature).

Kakogeorgiou et al., "What to hide from your students: attention-guided masked image modeling" (2022).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from smartlab.core.errors import UseError, one_of

STRATEGIES = ("random", "block", "attention_high", "attention_hint", "attention_low", "attention_sample")


def make_mask(
    strategy: str,
    attention: Tensor | None,
    ratio: float,
    grid: tuple[int, ...],
    *,
    generator: torch.Generator | None = None,
    batch: int | None = None,
    device: torch.device | str = "cpu",
    hint: float = 0.1,
    hint_from: str = "top",
    hint_refill: bool = True,
    temperature: float = 1.0,
    p_attention: float = 1.0,
    otherwise: str = "random",
    ratio_min: float | None = None,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """(B, N) bool, True = hidden, exactly ⌈ratio·N⌉ per row.

    attention:   (B, N) importance, or (B, heads, N) whose mean over heads is the importance;
                 None for `random` and `block`, which then need `batch` (and `device`).
    hint:        share of the hidden units that `attention_hint` reveals, drawn from the ⌈hint·N⌉ most
                 important (`hint_from="any"`: from all hidden); the next most important are hidden instead,
                 unless `hint_refill` is off.
    p_attention: share of the samples (in expectation) that follow the strategy; the others are random, or
                 by `otherwise="unmasked"` whole.
    ratio_min:   draw every sample's ratio evenly from here to `ratio`.
    shard:       (rank, world): draw for the batches of all ranks and keep this rank's rows, so that
                 several processes hide what one process with the whole batch would.

    >>> mask = make_mask("attention_high", attention, 0.7, (6, 6, 6), generator=generator)
    """
    n = math.prod(grid)
    importance, rows = _importance(strategy, attention, batch, n)
    device = torch.device(device) if attention is None else importance.device
    if not 0 < ratio < 1:
        raise UseError(f"mask ratio {ratio} hides nothing or everything", expected="a number between 0 and 1")
    noise = uniform((rows, n), device, generator, shard)
    counts: Tensor | int = hidden_count(ratio, n)
    if ratio_min is not None:
        share = uniform((rows, 1), device, generator, shard)
        counts = ((ratio_min + share * (ratio - ratio_min)) * n - 1e-4).ceil().long()
    if strategy == "random":
        score = noise
    elif strategy == "block":
        score = _blocks(rows, grid, hidden_count(ratio, n), device, generator, shard) + noise
    elif strategy == "attention_low":
        score = _rank(-importance, noise)
    elif strategy == "attention_sample":
        # Gumbel top-k: drawing without replacement with probability ∝ a^(1/temperature)
        logits = importance.clamp_min(1e-12).log() / temperature
        score = logits - (-noise.clamp_min(1e-12).log()).clamp_min(1e-12).log()
    else:
        score = _rank(importance, noise).float()
    k = counts
    if strategy == "attention_hint":
        most = torch.as_tensor(counts, device=device)
        hinted = round(hint * counts) if isinstance(counts, int) else (hint * counts).round().long()
        hints = torch.as_tensor(hinted, device=device).minimum(n - most)
        among = most if hint_from == "any" else hints.clamp_min(hidden_count(hint, n)).minimum(most)
        shown = _top(uniform((rows, n), device, generator, shard).where(_top(score, among), -1.0), hints)
        score = score.masked_fill(shown, -1.0)  # below every rank
        k = counts if hint_refill else most - hints
    mask = _top(score, k)
    if p_attention < 1 and (strategy != "random" or otherwise == "unmasked"):
        follows = uniform((rows, 1), device, generator, shard) < p_attention
        mask = torch.where(follows, mask, _top(noise, counts) if otherwise == "random" else False)
    return mask


def hidden_count(ratio: float, units: int) -> int:
    """k = ⌈ratio · units⌉, the number of hidden units per sample."""
    return math.ceil(ratio * units - 1e-9)  # 0.7 · 10 is 7, not 8


def upsample(mask: Tensor, grid: tuple[int, ...], factor: int) -> Tensor:
    """(B, N) units -> (B, D·f, H·f, W·f), each unit repeated over its f³ cells."""
    x = mask.view(-1, *grid)
    for axis in (1, 2, 3):
        x = x.repeat_interleave(factor, axis)
    return x


def _importance(strategy: str, attention: Tensor | None, batch: int | None, n: int) -> tuple[Tensor, int]:
    one_of("unknown mask strategy", strategy, STRATEGIES)
    if attention is None:
        if strategy.startswith("attention"):
            raise UseError(f"mask strategy {strategy!r} needs the attention to be guided by")
        if batch is None:
            raise UseError(f"mask strategy {strategy!r} without attention needs `batch`")
        return torch.empty(0), batch
    importance = attention.float().mean(1) if attention.dim() == 3 else attention.float()
    if importance.shape[-1] != n:
        raise UseError(
            "attention does not fit the grid", found=f"{importance.shape[-1]} units", expected=f"{n}"
        )
    return importance, importance.shape[0]


def uniform(
    shape: tuple[int, ...],
    device: torch.device,
    generator: torch.Generator | None,
    shard: tuple[int, int] = (0, 1),
) -> Tensor:
    """Uniform numbers for this rank's rows.

    Drawn where the generator lives, so that a CPU generator serves any device, and for the rows of
    all ranks, so that the numbers do not depend on how a batch is spread over processes.
    """
    rank, world = shard
    source = generator.device if generator is not None else device
    every = torch.rand((shape[0] * world, *shape[1:]), generator=generator, device=source)
    return every[rank * shape[0] : (rank + 1) * shape[0]].to(device)


def _rank(score: Tensor, noise: Tensor) -> Tensor:
    """Ranks 0 … N−1 of the scores, equal scores in random order."""
    shuffled = noise.argsort(-1)
    order = shuffled.gather(-1, score.gather(-1, shuffled).argsort(dim=-1, stable=True))
    ranks = torch.arange(score.shape[-1], device=score.device).expand_as(order)
    return torch.empty_like(order).scatter_(-1, order, ranks)


def _top(score: Tensor, k: int | Tensor) -> Tensor:
    """The k highest per row, as a bool mask; k may differ from row to row, (B, 1)."""
    return score.argsort(-1, descending=True).argsort(-1) < k


def _blocks(
    rows: int,
    grid: tuple[int, ...],
    k: int,
    device: torch.device,
    generator: torch.Generator | None,
    shard: tuple[int, int],
) -> Tensor:
    """Score ≥ 1 inside boxes: earlier boxes score higher, so that the top k fill box after box."""
    n = math.prod(grid)
    boxes = max(4, math.ceil(4 * k / 8))  # enough of the smallest boxes, overlaps included
    places = torch.stack(
        torch.meshgrid(*(torch.arange(g, device=device) for g in grid), indexing="ij")
    ).flatten(1)
    centre = uniform((rows, boxes, 3, 1), device, generator, shard) * torch.tensor(grid, device=device).view(
        1, 1, 3, 1
    )
    half = 1 + uniform((rows, boxes, 3, 1), device, generator, shard)  # boxes of 2 to 4 units a side
    inside = ((places + 0.5 - centre).abs() <= half).all(2)  # (rows, boxes, N)
    order = torch.arange(boxes, 0, -1, device=device).view(1, boxes, 1)
    return (inside * order).amax(1).view(rows, n).to(torch.float32)


def informativeness(attention: Tensor) -> Tensor:
    """1 − entropy / ln N of the importance map, per sample: 0 = uniform, 1 = a single unit.

    attention: (B, heads, N) or (B, N).
    """
    a = attention.float()
    a = a.mean(1) if a.dim() == 3 else a
    a = a / a.sum(-1, keepdim=True).clamp_min(1e-12)
    entropy = -torch.special.xlogy(a, a).sum(-1)
    return 1 - entropy / math.log(a.shape[-1])


def head_diversity(attention: Tensor) -> dict[str, Tensor]:
    """How differently the heads look, per sample: (B, heads, N) -> cosine and Jensen–Shannon, (B,).

    cosine: mean pairwise 1 − cos of the heads' maps, 0 when all heads are equal.
    jensen_shannon: generalised Jensen–Shannon divergence over the heads, divided by ln(heads), in [0, 1].
    """
    a = attention.float()
    heads = a.shape[1]
    if heads < 2:
        zero = a.new_zeros(a.shape[0])
        return {"cosine": zero, "jensen_shannon": zero}
    unit = F.normalize(a, dim=-1)
    with torch.autocast(a.device.type, enabled=False):
        similarity = (unit @ unit.transpose(1, 2)).sum((1, 2)) - heads
    mean = a.mean(1)
    entropy_mean = -torch.special.xlogy(mean, mean).sum(-1)
    mean_entropy = -torch.special.xlogy(a, a).sum(-1).mean(-1)
    return {
        "cosine": 1 - similarity / (heads * (heads - 1)),
        "jensen_shannon": ((entropy_mean - mean_entropy) / math.log(heads)).clamp_min(0),
    }


def lift(attention: Tensor, share: Tensor) -> Tensor:
    """Attention on a region over what uniform attention would put there: 1 is chance.

    attention: (B, N), each row summing to 1; share: (B, N), the part of each unit in the region.
    """
    return (attention * share).sum() * attention.shape[-1] / share.sum()


def hidden_share(hidden: Tensor, share: Tensor) -> Tensor:
    """The fraction of a region's volume that lies in hidden units; (B, N) each."""
    return (hidden * share).sum() / share.sum()
