"""Attention over many tokens: softmax, and three approximations whose cost grows linearly with their number.

One interface, chosen by `make_core(kind, …)`: a module that maps q, k, v (B, heads, N, c) to (B, heads, N, c).
Exactly, out = softmax(q kᵀ / √c) v, which compares every token with every other.

- `softmax`    exact, by torch's fused kernel where there is one.
- `nystrom`    through m landmarks, the means of m runs of neighbouring tokens: softmax(q k̃ᵀ) · pinv(softmax(q̃ k̃ᵀ))
               · softmax(q̃ kᵀ) v. The pseudo-inverse is iterated; a depth-wise convolution of v is added, which starts
               at zero [ours] and brings back what is local. Exact where m ≥ N. Xiong et al., "Nyströmformer" (2021).
- `linformer`  keys and values are mixed down to r of each by learned matrices (r, N), shared by the heads. They
               start as means of neighbouring tokens [ours] and not at random: so the start approximates softmax
               attention, exactly where r = N. Wang et al., "Linformer" (2020).
- `performer`  exp(q·k) as the expectation of positive random features, drawn once with orthogonal directions.
               Without bias for any q and k; exact where all keys are equal. Choromanski et al., "Rethinking
               attention with Performers" (2021).

What could overflow or cancel (softmax, pseudo-inverse, random features) is computed in float32 whatever the
precision of q, k, v; the result has theirs.
"""

from __future__ import annotations

from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.core.errors import UseError, one_of
from smartlab.core.settings import AttentionKind, MaeConfig
from smartlab.models.attend import keyless

KINDS: tuple[str, ...] = get_args(AttentionKind)


class Attention(nn.Module):
    """Multi-head self-attention of any kind, (B, N, C) -> (B, N, C), with MAE's names `qkv` and `proj`.

    tokens: N in training, which `linformer` must know; other lengths work too.
    """

    def __init__(
        self, dim: int, heads: int, kind: str = "softmax", tokens: int = 0, settings: MaeConfig | None = None
    ) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.core = make_core(kind, heads, dim // heads, tokens, settings)

    def split(self, x: Tensor, turn: None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (B, heads, N, C / heads); nothing is turned here."""
        batch, n, dim = x.shape
        qkv = keyless(self.qkv, x).view(batch, n, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        return q, k, v

    def join(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.proj(self.core(q, k, v).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.join(*self.split(x))


def make_core(
    kind: str, heads: int, channels: int, tokens: int = 0, settings: MaeConfig | None = None
) -> nn.Module:
    """The attention of this kind for `heads` of `channels` each: a module (q, k, v) -> out.

    >>> make_core("nystrom", 4, 16, settings=MaeConfig(landmarks=32))(q, k, v)
    """
    one_of("no attention of kind", kind, KINDS)
    s = settings or MaeConfig()
    if kind == "softmax":
        return Softmax()
    if kind == "nystrom":
        return Nystrom(heads, s.landmarks, s.iterations, s.kernel)
    if kind == "linformer":
        return Linformer(tokens, s.rank)
    return Performer(channels, s.features)


class Softmax(nn.Module):
    """The exact attention that the others approximate."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)


class Nystrom(nn.Module):
    """Landmarks, an iterated pseudo-inverse and a depth-wise convolution along the tokens."""

    def __init__(self, heads: int, landmarks: int = 64, iterations: int = 6, kernel: int = 33) -> None:
        super().__init__()
        self.landmarks, self.iterations = landmarks, iterations
        self.local = nn.Conv2d(heads, heads, (kernel, 1), padding=(kernel // 2, 0), groups=heads, bias=False)
        nn.init.zeros_(self.local.weight)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[2] <= self.landmarks:  # every token its own landmark: what follows would give this, slowly
            out = F.scaled_dot_product_attention(q, k, v)
        else:
            out = self.approximate(q, k, v)
        return out + self.local(v)

    def approximate(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The three factors, multiplied from the right: nothing larger than N × landmarks arises."""
        mixing = segments(q.shape[2], self.landmarks, q)  # (m, N)
        few_q, few_k = mixing @ q, mixing @ k
        middle = pseudo_inverse(weights(few_q, few_k), self.iterations)
        seen = (weights(few_q, k).to(v.dtype) @ v).float()
        with torch.autocast(q.device.type, enabled=False):  # an inverse has entries of thousands
            gathered = middle @ seen
        return weights(q, few_k).to(v.dtype) @ gathered.to(v.dtype)


class Linformer(nn.Module):
    """Keys and values mixed down to `rank`, by one learned matrix each."""

    def __init__(self, tokens: int, rank: int = 64) -> None:
        super().__init__()
        if tokens < 1:
            raise UseError(
                "linformer attention must know how many tokens there are", found=f"tokens={tokens}"
            )
        start = segments(tokens, min(rank, tokens), torch.zeros(()))
        self.keys, self.values = nn.Parameter(start.clone()), nn.Parameter(start.clone())

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (self._for(matrix, k.shape[2]).to(k.dtype) for matrix in (self.keys, self.values))
        return F.scaled_dot_product_attention(q, keys @ k, values @ v)

    def _for(self, matrix: Tensor, tokens: int) -> Tensor:
        """The matrix for another number of tokens: stretched along them, the sum of each row kept."""
        if matrix.shape[1] == tokens:
            return matrix
        stretched = F.interpolate(matrix[None].float(), size=tokens, mode="linear", align_corners=False)[0]
        return stretched * (matrix.shape[1] / tokens)


class Performer(nn.Module):
    """Positive random features φ with E[φ(q)·φ(k)] = exp(q·k / √c)."""

    directions: Tensor

    def __init__(self, channels: int, features: int = 128) -> None:
        super().__init__()
        self.register_buffer("directions", orthogonal(features, channels))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.autocast(q.device.type, enabled=False):
            few_q, few_k = self.lift(q, (-1,)), self.lift(k, (-2, -1))
            sums = few_k.transpose(-2, -1) @ v.float()  # (B, heads, features, c)
            total = few_q @ few_k.sum(-2)[..., None]
            return ((few_q @ sums) / total).to(v.dtype)

    def lift(self, x: Tensor, over: tuple[int, ...]) -> Tensor:
        """φ(x) up to a factor that is the same over the dimensions `over`, and so cancels."""
        x = x.float() * x.shape[-1] ** -0.25
        exponent = x @ self.directions.float().T - x.square().sum(-1, keepdim=True) / 2
        return (exponent - exponent.detach().amax(over, keepdim=True)).exp() + 1e-6  # never nothing at all


def weights(q: Tensor, k: Tensor) -> Tensor:
    """softmax(q kᵀ / √c) in float32."""
    return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).float().softmax(-1)


def segments(tokens: int, count: int, like: Tensor) -> Tensor:
    """(count, tokens) matrix whose rows take the means of `count` runs of neighbouring tokens."""
    count = min(count, tokens)
    belongs = torch.arange(tokens, device=like.device) * count // tokens
    chosen = belongs == torch.arange(count, device=like.device)[:, None]
    return (chosen / chosen.sum(1, keepdim=True)).to(like.dtype)


def pseudo_inverse(a: Tensor, iterations: int) -> Tensor:
    """Moore–Penrose inverse of (…, m, m), each row summing to 1, by iteration (Razavi et al., 2014)."""
    with torch.autocast(a.device.type, enabled=False):
        a = a.float() if a.dtype != torch.float64 else a
        one = torch.eye(a.shape[-1], device=a.device, dtype=a.dtype)
        norms = a.abs().sum(-2).amax(-1) * a.abs().sum(-1).amax(-1)
        z = a.transpose(-2, -1) / norms[..., None, None]
        for _ in range(iterations):
            az = a @ z
            z = 0.25 * z @ (13 * one - az @ (15 * one - az @ (7 * one - az)))
        return z


def orthogonal(features: int, channels: int) -> Tensor:
    """(features, channels) Gaussian directions, orthogonal within every `channels` of them."""
    q, r = torch.linalg.qr(torch.randn(-(-features // channels), channels, channels))
    blocks = q * r.diagonal(dim1=-2, dim2=-1).sign()[:, None]  # else the directions are not uniform
    lengths = torch.randn(features, channels).norm(dim=1, keepdim=True)
    return blocks.transpose(-2, -1).flatten(0, 1)[:features] * lengths
