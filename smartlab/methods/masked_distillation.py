"""Masked image modelling with a co-distilled teacher: SimMIM, SMIT, SMART and DAGMaN by settings.

One step: the teacher looks at both whole views, and its [CLS] attention says what to hide; it looks again
through noise, and says what is there. The student sees the rest and must predict the hidden voxels (AMIP),
the noisy teacher's hidden tokens (AMPD), and its [CLS] and mean token of the other view (AITD, GITD). The
teacher then moves towards the student.

    SimMIM   no teacher, random masks, AMIP only
    SMIT     clean teacher, random masks, image token = mean token
    DAGMaN   masks from a clean teacher's semantic attention, or from that of a ViT's own [CLS], targets from a
             noisy one (SMART: the same)

Jiang, Rangnekar, Veeraraghavan, "Co-distilled attention guided masked image modeling with noisy teacher for
self-supervised learning on medical images" (MIDL 2025), section 3.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.core.clock import Clock
from smartlab.core.config import Config
from smartlab.masking import (
    head_diversity,
    hidden_count,
    hidden_share,
    informativeness,
    lift,
    make_mask,
    uniform,
    upsample,
)
from smartlab.methods.distillation import (
    Centre,
    Standardise,
    TokenHead,
    average,
    centred,
    collapse_signs,
    constant_share,
    feature_signs,
    mean_over_ranks,
    prototype_loss,
    regress_image,
    regress_patches,
    sinkhorn,
)
from smartlab.models.build import make_encoder
from smartlab.models.encoder import Encoded, dropped_patches, normed
from smartlab.models.heads import CoarseHead, ReconstructionHead


class Branch(nn.Module):
    """What student and teacher have in common: the encoder and, for prototypes, the heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = make_encoder(config)
        wants = config.teacher.enabled
        self.patch_head = TokenHead(self.encoder.channels, config.distill) if wants else None
        self.image_head = (
            self.patch_head
            if config.distill.share_heads or not wants
            else TokenHead(self.encoder.channels, config.distill)
        )
        pools = wants and config.loss.global_image
        self.global_head = TokenHead(self.encoder.stage_channels[-1], config.distill) if pools else None


class MaskedDistillation(nn.Module):
    """Student, teacher and losses. `forward` is one step; `update_teacher` follows the optimiser."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.student = Branch(config)
        encoder = self.student.encoder
        images = config.encoder.in_channels
        self.reconstruct = ReconstructionHead(encoder.stage_channels[-1], encoder.total, images)
        self.coarse = CoarseHead(encoder.channels, channels=images) if config.loss.coarse else None
        self.teacher = copy.deepcopy(self.student).requires_grad_(False) if config.teacher.enabled else None
        d, channels = config.distill, encoder.channels
        widths = {"patch": channels, "image": channels, "global": encoder.stage_channels[-1]}
        sizes = dict.fromkeys(widths, d.prototypes) if d.kind == "prototype" else widths
        self.centres: Any = nn.ModuleDict({name: Centre(sizes[name], d.centre_momentum) for name in widths})
        self.scales: Any = nn.ModuleDict(
            {name: Standardise(n) for name, n in widths.items()} if d.standardise else {}
        )
        # running informativeness of the attention that guides, fast and slow, and an untrained network's
        self.register_buffer("informed", torch.zeros(2))
        self.register_buffer("untrained", torch.zeros(()))
        self.register_buffer("looks", torch.zeros(()))
        self.informed: Tensor
        self.untrained: Tensor
        self.looks: Tensor

    def train(self, mode: bool = True) -> MaskedDistillation:
        """The teacher's only noise is its own: no stochastic depth in its targets and its attention."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self, views: Tensor, clock: Clock, generator: torch.Generator, shares: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """views (B, 2, C, D, H, W) in [0, 1] -> loss and the step's metrics.

        shares: by region ("body", "organ", "lesion"), the part (2B, N) of each unit in it; only watched.
        """
        x = views.flatten(0, 1)  # (2B, C, D, H, W): u0, v0, u1, v1, …
        guide, teacher = self.look(x, clock, generator)
        hidden = self.choose(guide, x, clock, generator)
        student = self.student.encoder(x, hidden=hidden, visible=self._shown(hidden))
        losses = {"amip": self.predict_voxels(student, x, hidden)}
        metrics = self.watch(student, guide, hidden, shares or {})
        image_token = self._scaled("image", student.cls)
        if teacher is not None:
            losses["ampd"], constant = self.match_tokens(student, teacher, hidden, clock)
            losses["itd"], signs = self.match_images("image", image_token, teacher.cls, clock)
            metrics |= constant | signs
            if self.student.global_head is not None:
                assert student.pooled is not None and teacher.pooled is not None
                pooled = self._scaled("global", student.pooled)
                losses["gitd"], _ = self.match_images("global", pooled, teacher.pooled, clock)
        else:
            metrics |= feature_signs(student.cls)
        if self.coarse is not None:
            losses["coarse"] = F.l1_loss(self.coarse(image_token), self.coarse.target(x))
        w = self.config.loss
        weights = {
            "amip": w.amip,
            "ampd": w.patch,
            "itd": w.image,
            "gitd": w.global_image,
            "coarse": w.coarse,
        }
        loss = torch.stack([weights[name] * value.float() for name, value in losses.items()]).sum()
        return loss, metrics | {f"loss_{name}": value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def look(
        self, x: Tensor, clock: Clock, generator: torch.Generator
    ) -> tuple[Encoded | None, Encoded | None]:
        """The teacher on whole views: what guides the masks, and what the student is to predict.

        Both are one look if nothing is to be noisy, or by `teacher.guide=noisy`. Otherwise both go through the
        encoder together up to semantic attention, where the look at the undamaged views ends.
        """
        if self.teacher is None:
            return None, None
        settings, encoder, rows = self.config.teacher, self.teacher.encoder, len(x)
        received, goes_on = self.config.mask.importance == "received", self.student.global_head is not None
        noisy, dropped, kept = self._noise(x, clock, generator)
        if dropped is None and noisy is x:
            both = encoder(x, received=received, deep=rows * goes_on)
            return both, both
        if settings.guide == "noisy" or not encoder.heads:
            both = encoder(noisy, dropped=dropped, received=received, visible=kept, deep=rows * goes_on)
            return both, both
        if dropped is not None:
            dropped = torch.cat([torch.zeros_like(dropped), dropped])
            kept = None if kept is None else kept + rows * encoder.units(x.shape)
        both = encoder(
            torch.cat([x, noisy]), dropped=dropped, received=received, visible=kept, deep=rows * goes_on
        )
        return both.rows(slice(rows)), both.rows(slice(rows, None))

    def _noise(
        self, x: Tensor, clock: Clock, generator: torch.Generator
    ) -> tuple[Tensor, Tensor | None, int | None]:
        """Views with noise, the patches dropped from them, and how many units are kept where that is known."""
        settings, rows, shard = self.config.teacher, len(x), (clock.rank, clock.world)
        if settings.noise_std:
            noise = uniform((rows, *x.shape[1:], 2), x.device, generator, shard).clamp_min(1e-7)
            gauss = (-2 * noise[..., 0].log()).sqrt() * (2 * math.pi * noise[..., 1]).cos()
            x = x + settings.noise_std * gauss
        if not settings.patch_dropout:
            return x, None, None
        encoder = self.student.encoder
        dropped, cell = (
            dropped_patches(encoder, x, settings.patch_dropout, generator, shard=shard),
            encoder.unit_patches,
        )
        # elsewhere counting would wait
        counts = settings.dropout_unit == "mask_unit" and x.device.type == "cpu"
        return x, dropped, int((~dropped[:, ::cell, ::cell, ::cell]).sum()) if counts else None

    def _shown(self, hidden: Tensor) -> int | None:
        """How many units masks leave, in all rows together, where the settings say so."""
        rows, units = hidden.shape
        return (
            rows * (units - hidden_count(self.config.mask.ratio, units)) if self.config.mask.exact else None
        )

    def _scaled(self, which: str, token: Tensor) -> Tensor:
        return self.scales[which](token) if self.scales else token

    @torch.no_grad()
    def choose(self, guide: Encoded | None, x: Tensor, clock: Clock, generator: torch.Generator) -> Tensor:
        """(2B, N) hidden units: guided by the teacher's attention once that attention means something."""
        m, rows = self.config.mask, x.shape[0]
        grid, shard = self.student.encoder.grid(x.shape), (clock.rank, clock.world)
        guided = m.strategy.startswith("attention")
        how = m.drawing() | {"generator": generator, "shard": shard}
        first = "random" if guided else m.strategy
        plain = make_mask(first, None, m.ratio, grid, batch=rows, device=x.device, **how)
        if guide is None or guide.attention is None:
            return plain
        importance = guide.importance if m.importance == "cls" else guide.received
        assert importance is not None
        self._inform(importance)
        if not guided:
            return plain
        aimed = make_mask(m.strategy, importance, m.ratio, grid, **how)
        return torch.where(self.guides(clock), aimed, plain)

    def _inform(self, importance: Tensor, first: int = 10) -> None:
        """Keep track of how informative attention is; the teacher's first looks are an untrained network's."""
        now = mean_over_ranks(informativeness(importance).mean()).nan_to_num()
        share = 1 / (self.looks + 1)
        self.untrained.lerp_(now, torch.where(self.looks < first, share, 0.0))
        self.informed[0].lerp_(now, share.clamp_min(0.1))
        self.informed[1].lerp_(now, share.clamp_min(0.02))
        self.looks += 1

    def guides(self, clock: Clock) -> Tensor:
        """Whether attention is to be trusted with the masks yet: a bool tensor, no wait for the device.

        It must have been more informative than an untrained network's for a while, not for a moment.
        """
        m = self.config.mask
        enough = self.informed.min() >= m.informativeness * self.untrained
        return enough & (clock.epoch >= m.warmup_epochs)

    def predict_voxels(self, student: Encoded, x: Tensor, hidden: Tensor) -> Tensor:
        """AMIP: L1 on the hidden voxels, of all channels."""
        voxels = upsample(hidden, self.student.encoder.grid(x.shape), self.student.encoder.stride)[:, None]
        return average((self.reconstruct(student.stages[-1]).float() - x).abs(), voxels.expand_as(x))

    def match_tokens(
        self, student: Encoded, teacher: Encoded, hidden: Tensor, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """AMPD: the teacher's tokens of the hidden units; gathered first, so that heads see only these."""
        assert self.teacher is not None and self.student.patch_head is not None
        m, d = self.config.mask, self.config.distill
        k = hidden_count(m.ratio, hidden.shape[1])
        counted, where = hidden.to(torch.uint8).topk(k, -1)
        weight = None if m.exact else counted.float()
        mine, theirs = (e.units if d.patch_from == "stage" else e.tokens for e in (student, teacher))
        assert mine is not None and theirs is not None
        where = where[..., None].expand(-1, -1, mine.shape[-1])
        said, taught = self.student.patch_head(mine.gather(1, where)), theirs.gather(1, where).float()
        if d.kind == "regression":
            target = self.scales["patch"](taught) if d.standardise else normed(taught)
            return regress_patches(said, target, weight), {"token_constant": constant_share(target)}
        with torch.no_grad():
            logits = self.teacher.patch_head(taught)  # type: ignore[misc]
            target = self.assign(logits, self.centres["patch"], clock)
            self.centres["patch"].update(logits)
        loss = prototype_loss(said, target, d.student_temperature, weight)
        return loss, {"token_constant": constant_share(taught)}

    def match_images(
        self, which: str, said: Tensor, taught: Tensor, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """AITD ("image", [CLS]) or GITD ("global", the mean token): the teacher's of the other view (or of the
        same one, by setting)."""
        d, pairs = self.config.distill, (len(said) // 2, 2, -1)
        head, centre = getattr(self.student, f"{which}_head"), self.centres[which]
        said, features = head(said).view(pairs), taught
        if d.kind == "regression":
            taught = taught.float().view(pairs)
            across = taught.flip(1) if d.cross_view else taught
            loss = regress_image(said, across, centre.value.clone())
            # no prototypes: the channels take their place, only to be watched
            target = centred(taught, centre.value, self.teacher_temperature(clock))
            centre.update(taught)
        else:
            with torch.no_grad():
                scaled = self.scales[which].apply_as_is(taught) if self.scales else taught
                logits = getattr(self.teacher, f"{which}_head")(scaled).view(pairs)
                target = self.assign(logits, centre, clock)
                centre.update(logits)
            loss = prototype_loss(said, target.flip(1) if d.cross_view else target, d.student_temperature)
        return loss, collapse_signs(target, features)

    def assign(self, logits: Tensor, centre: Centre, clock: Clock) -> Tensor:
        """Teacher logits -> teacher distribution, by the chosen assignment."""
        temperature = self.teacher_temperature(clock)
        if self.config.distill.assignment == "sinkhorn":
            return sinkhorn(logits, temperature)
        return centred(logits, centre.value, temperature)

    def teacher_temperature(self, clock: Clock) -> float:
        """Linear warm-up over the first epochs."""
        t = self.config.teacher
        share = min(1.0, clock.epoch / t.temperature_epochs) if t.temperature_epochs else 1.0
        return t.temperature_start + (t.temperature - t.temperature_start) * share

    @torch.no_grad()
    def watch(
        self, student: Encoded, guide: Encoded | None, hidden: Tensor, shares: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """How informative and how diverse the guiding attention is, what it falls on, and what is hidden."""
        seen = guide if guide is not None else student
        found = {f"hidden_{name}": hidden_share(hidden, share) for name, share in shares.items()}
        if seen.attention is None:
            return found
        diversity = head_diversity(seen.attention)
        rows, importance = seen.attention.float(), seen.importance
        if self.config.mask.importance == "received" and seen.received is not None:
            rows = importance = seen.received.float()[:, None]
        assert importance is not None
        guides = importance.mean(1)
        found |= {f"lift_{name}": lift(guides, share) for name, share in shares.items()}
        return found | {
            "head_diversity": diversity["cosine"].mean(),
            "head_divergence": diversity["jensen_shannon"].mean(),
            "attention_entropy": torch.special.entr(rows).sum(-1).mean(),
            "attention_informativeness": informativeness(guides).mean(),
            "attention_hidden": (guides * hidden).sum(-1).mean(),
        }

    def told(self, clock: Clock, momentum: float) -> dict[str, Any]:
        """What the settings and the guard say about this step, for metrics.csv."""
        guided = self.config.mask.strategy.startswith("attention")
        return {
            "momentum": momentum,
            "teacher_temperature": self.teacher_temperature(clock),
            "guided": self.guides(clock).float() if guided else 0.0,
            "attention_gain": self.informed[0] / self.untrained,  # of no attention it is not-a-number
        }

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher ← momentum · teacher + (1 − momentum) · student, all tensors at once."""
        if self.teacher is None:
            return
        theirs: list[Tensor] = [*self.teacher.parameters()]
        ours: list[Tensor] = [*self.student.parameters()]
        torch._foreach_lerp_(theirs, ours, 1 - momentum)
