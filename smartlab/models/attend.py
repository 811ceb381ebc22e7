"""Softmax attention behind one function, by whichever kernel is fastest where the tensors live.

On a GPU, and under `torch.compile`, that is `scaled_dot_product_attention`. On a CPU its kernels do badly
with small windows and few channels, and with a trained bias they give up a fused form anyway: there the
same is written out in pieces that stay in the cache (about twice as fast for 64 tokens of 12 channels).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CACHE = 1 << 19  # numbers per piece: 2 MB in float32


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q kᵀ / √c + bias) v; q, k, v (B, heads, n, c), bias (1, heads, n, n)."""
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    rows = max(1, CACHE // (q.shape[1] * q.shape[2] * k.shape[2]))
    scale = q.shape[-1] ** -0.5
    pieces = zip(q.split(rows), k.split(rows), v.split(rows), strict=True)
    parts = [((a * scale) @ b.transpose(-2, -1)).add_(bias).softmax(-1) @ c for a, b, c in pieces]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Look(NamedTuple):
    """What a layer of attention with a [CLS] token looks at, in fp32 and without gradient."""

    rows: Tensor  # (B, heads, N) [CLS] row over the patches, each summing to 1
    strength: Tensor  # (B, heads) log of the mean weight a patch had before that: comparable between windows
    share: Tensor  # (B, heads) log of how much of the [CLS] row, over all keys, is on the patches
    received: Tensor | None  # (B, N) attention each patch receives, mean over queries and heads; if asked for


def look(q: Tensor, k: Tensor, first: int, received: bool = False) -> Look:
    """q, k (B, heads, first + N, c), [CLS] foremost and the patches from `first` on."""
    with torch.autocast(q.device.type, enabled=False):  # in bf16 nearly uniform attention has many ties
        q, k = q.detach().float() * q.shape[-1] ** -0.5, k.detach().float()
        every = (q[:, :, :1] @ k.transpose(-2, -1))[..., 0, :]
        logits = every[..., first:]
        total = logits.logsumexp(-1)
        rows, strength = logits.softmax(-1), total - math.log(logits.shape[-1])
        share = total - every.logsumexp(-1)
        if not received:
            return Look(rows, strength, share, None)
        paid = (q @ k.transpose(-2, -1)).softmax(-1)[..., first:].mean((1, 2))
        return Look(rows, strength, share, paid / paid.sum(-1, keepdim=True))


def paths(x: Tensor, rate: float, training: bool) -> Tensor | None:
    """Stochastic depth: factors (2, B, 1, …) that drop either branch of a block for a random part of the batch."""
    if not rate or not training:
        return None
    keep = torch.rand(2, x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= rate
    return keep.to(x.dtype) / (1 - rate)


def keyless(qkv: nn.Linear, x: Tensor) -> Tensor:
    """qkv(x), with the bias of the keys held fixed.

    A key bias shifts all logits of a query alike, so softmax ignores it: its gradient is rounding noise,
    which Adam would blow up to full steps and which differs from machine to machine.
    """
    if qkv.bias is None:
        return qkv(x)
    q, k, v = qkv.bias.chunk(3)
    return F.linear(x, qkv.weight, torch.cat([q, k.detach(), v]))
