"""How student tokens learn from teacher tokens: prototypes or regression.

- `prototype`: both sides give a distribution over K prototypes; cross-entropy. The teacher's side is
  kept from collapsing by `centre` (subtract a running mean, sharpen) or by `sinkhorn` (equal use of
  the prototypes within the batch). The published form; wants large batches.
- `regression`: a predictor on the student's side meets the teacher's tokens directly, cosine to the
  centred image token and smooth L1 to the layer-normed (or, channel by channel, standardised) patch tokens.
  For small batches.

Centres and Sinkhorn sums are taken over all ranks. Softmax, centres and losses are in fp32.

Caron et al., DINO (2021); Zhou et al., iBOT (2022); Caron et al., SwAV (2020); Baevski et al., data2vec (2022).
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.core.settings import DistillConfig
from smartlab.models.heads import Predictor, PrototypeHead


def mean_over_ranks(x: Tensor) -> Tensor:
    """The average of x over all processes; x itself when there is one."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        x = x.clone()
        dist.all_reduce(x)
        x /= dist.get_world_size()
    return x


class TokenHead(nn.Module):
    """The trained part of one side's comparison: a prototype head, or a predictor (student only)."""

    def __init__(self, dim: int, settings: DistillConfig) -> None:
        super().__init__()
        if settings.kind == "prototype":
            self.net: nn.Module = PrototypeHead(
                dim, settings.hidden, settings.bottleneck, settings.prototypes
            )
        else:
            self.net = Predictor(dim, settings.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.net(tokens)


class Centre(nn.Module):
    """Running mean over batches and ranks of what the teacher says, (dim,)."""

    value: Tensor

    def __init__(self, dim: int, momentum: float) -> None:
        super().__init__()
        self.momentum = momentum
        self.register_buffer("value", torch.zeros(dim))

    @torch.no_grad()
    def update(self, said: Tensor) -> None:
        mean = mean_over_ranks(said.float().flatten(0, -2).mean(0))
        mean = torch.where(torch.isfinite(mean), mean, self.value)  # a batch that will be skipped
        self.value.lerp_(mean, 1 - self.momentum)


class Standardise(nn.Module):
    """(x − mean) / spread by running statistics over batches and ranks, without gradient through them.

    An image token pooled from hundreds of tokens is nearly the same for every view: its head sees a large
    constant and a small signal. Batch norm would help, but not with four views in a batch.
    """

    mean: Tensor
    variance: Tensor
    batches: Tensor

    def __init__(self, dim: int, slowest: float = 0.02) -> None:
        super().__init__()
        self.slowest = slowest
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("variance", torch.ones(dim))
        self.register_buffer("batches", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self._update(x.detach().float().flatten(0, -2))
        return self.apply_as_is(x)

    def apply_as_is(self, x: Tensor) -> Tensor:
        """Without moving the statistics: the teacher's tokens on the student's scale."""
        return (x.float() - self.mean) / (self.variance.sqrt() + 1e-3)

    @torch.no_grad()
    def _update(self, x: Tensor) -> None:
        share = (1 / (self.batches + 1)).clamp_min(self.slowest)
        mean = mean_over_ranks(x.mean(0))
        self.mean.lerp_(torch.where(torch.isfinite(mean), mean, self.mean), share)
        spread = mean_over_ranks((x - self.mean).square().mean(0))
        self.variance.lerp_(torch.where(torch.isfinite(spread), spread, self.variance), share)
        self.batches += 1


def average(each: Tensor, weight: Tensor | None = None) -> Tensor:
    """The mean over tokens, or over those of weight 1 (0 where there is none)."""
    return each.mean() if weight is None else (each * weight).sum() / weight.sum().clamp_min(1)


def prototype_loss(
    student: Tensor, target: Tensor, temperature: float, weight: Tensor | None = None
) -> Tensor:
    """Cross-entropy H(target, softmax(student / temperature)), averaged over tokens; (…, K) each."""
    return average(-(target * F.log_softmax(student.float() / temperature, -1)).sum(-1), weight)


@torch.no_grad()
def centred(logits: Tensor, centre: Tensor, temperature: float) -> Tensor:
    """Teacher distribution: softmax((logits − centre) / temperature)."""
    return F.softmax((logits.float() - centre) / temperature, -1)


@torch.no_grad()
def sinkhorn(logits: Tensor, temperature: float, rounds: int = 3) -> Tensor:
    """Teacher distribution that uses every prototype equally often within the (global) batch."""
    flat = (logits.float() / temperature).flatten(0, -2)
    q = (flat - flat.amax(-1, keepdim=True)).exp()  # (tokens, K); a factor per token cancels below
    k = q.shape[-1]
    for _ in range(rounds):
        q = q / (mean_over_ranks(q.mean(0)) * k).clamp_min(1e-12)  # every prototype: total 1/K
        q = q / q.sum(-1, keepdim=True).clamp_min(1e-12)  # every token: a distribution
    return q.view_as(logits)


def regress_image(student: Tensor, teacher: Tensor, centre: Tensor) -> Tensor:
    """2 − 2 cos between the predicted and the centred teacher image token, averaged; (…, C) each."""
    target = F.normalize(teacher.float() - centre, dim=-1)
    return (2 - 2 * (F.normalize(student.float(), dim=-1) * target).sum(-1)).mean()


def regress_patches(student: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """Smooth L1 to normalised teacher tokens, averaged; (…, C) each."""
    return average(F.smooth_l1_loss(student.float(), target, reduction="none").mean(-1), weight)


@torch.no_grad()
def constant_share(target: Tensor) -> Tensor:
    """The part of the power of tokens (…, C) that is the same in all of them: 1 leaves nothing to learn."""
    x = target.float().flatten(0, -2)
    return x.mean(0).square().sum() / x.square().sum(-1).mean().clamp_min(1e-12)


@torch.no_grad()
def collapse_signs(target: Tensor, features: Tensor) -> dict[str, Tensor]:
    """Numbers that show a collapse: teacher entropy and KL to uniform, feature spread, effective rank.

    target: (…, K) teacher distributions (for regression: softmax over the centred channels). features: (B, C) image tokens.
    """
    entropy = torch.special.entr(target.float()).sum(-1).mean()
    kl = math.log(target.shape[-1]) - entropy
    return feature_signs(features) | {"teacher_entropy": entropy, "teacher_kl_uniform": kl}


@torch.no_grad()
def feature_signs(features: Tensor) -> dict[str, Tensor]:
    """How much image tokens (B, C) of different views differ: their spread and effective rank."""
    x = features.float().nan_to_num()  # a batch that will be skipped must not stop the run here
    spectrum = torch.linalg.svdvals(x - x.mean(0))
    share = spectrum / spectrum.sum().clamp_min(1e-12)
    rank = torch.special.entr(share).sum().exp()
    return {
        "feature_std": F.normalize(x, dim=-1).std(0, correction=0).mean() * math.sqrt(x.shape[-1]),
        "effective_rank": rank if len(x) > 2 else rank * math.nan,  # of two views always 1
    }
