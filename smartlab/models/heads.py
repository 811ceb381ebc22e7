"""Heads on top of the encoder: voxels from tokens, prototypes or regression targets from tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ReconstructionHead(nn.Module):
    """Stride-32 tokens (B, d, h, w, C) -> voxels (B, channels, 32d, 32h, 32w): a 1×1×1 convolution."""

    def __init__(self, dim: int, stride: int = 32, channels: int = 1) -> None:
        super().__init__()
        self.stride, self.channels = stride, channels
        self.proj = nn.Linear(dim, channels * stride**3)

    def forward(self, tokens: Tensor) -> Tensor:
        b, d, h, w, _ = tokens.shape
        s = self.stride
        x = self.proj(tokens).view(b, d, h, w, self.channels, s, s, s)
        return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(b, self.channels, d * s, h * s, w * s)


class CoarseHead(nn.Module):
    """[CLS] alone (B, C) -> a coarse version of the view: mean and spread of every cell, (B, 2 · channels, side³).

    The spread (standard deviation, times 4 to be on the scale of the mean) marks edges and small
    structures, a nodule in a lung say, which the mean of a cell hides.
    """

    SPREAD = 4.0

    def __init__(self, dim: int, side: int = 8, channels: int = 1) -> None:
        super().__init__()
        self.side, out = side, 2 * channels * side**3
        self.net = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, out))

    def forward(self, cls: Tensor) -> Tensor:
        return self.net(cls).unflatten(1, (-1, self.side, self.side, self.side))

    def target(self, view: Tensor) -> Tensor:
        mean = F.adaptive_avg_pool3d(view, self.side)
        square = F.adaptive_avg_pool3d(view.square(), self.side)
        return torch.cat([mean, self.SPREAD * (square - mean.square()).clamp_min(0).sqrt()], 1)


class PrototypeHead(nn.Module):
    """Three-layer perceptron, unit length, then cosine similarity to K prototypes (norm fixed at 1)."""

    def __init__(self, dim: int, hidden: int = 2048, bottleneck: int = 256, prototypes: int = 8192) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.last = nn.Parameter(torch.empty(prototypes, bottleneck))
        nn.init.trunc_normal_(self.last, std=0.02)
        for layer in self.mlp:
            if isinstance(layer, nn.Linear):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """(…, C) -> logits (…, K), cosines in fp32 before any temperature."""
        x = self.mlp(tokens)
        with torch.autocast(x.device.type, enabled=False):  # a temperature of 0.04 would magnify rounding
            return F.linear(F.normalize(x.float(), dim=-1), F.normalize(self.last.float(), dim=-1))


class Predictor(nn.Module):
    """Student tokens -> the teacher's token space, for regression."""

    def __init__(self, dim: int, hidden: int = 2048) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens).float()
