"""Masked image modelling with a co-distilled teacher: SimMIM, SMIT, SMART and DAGMaN by settings.

One step: the noisy teacher looks at both whole views; its [CLS] attention says what to hide; the
student sees the rest and must predict the hidden voxels (AMIP), the teacher's hidden tokens (AMPD)
and the teacher's image token of the other view (ITD). The teacher then moves towards the student.

    SimMIM   no teacher, random masks, AMIP only
    SMIT     clean teacher, random masks, image token = mean token
    SMART    noisy teacher, masks from semantic class attention
    DAGMaN   noisy teacher, masks from semantic full attention
"""

from __future__ import annotations

import copy
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.config import Config
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
from smartlab.methods.clock import Clock
from smartlab.methods.distillation import (
    Centre,
    Standardise,
    TokenHead,
    centred,
    collapse_signs,
    feature_signs,
    mean_over_ranks,
    prototype_loss,
    regress_image,
    regress_patches,
    sinkhorn,
)
from smartlab.models.encoder import Encoded, Encoder
from smartlab.models.heads import CoarseHead, ReconstructionHead


class Branch(nn.Module):
    """What student and teacher have in common: the encoder and, for prototypes, the heads."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        wants = config.teacher.enabled
        self.patch_head = TokenHead(self.encoder.channels, config.distill) if wants else None
        self.image_head = (
            self.patch_head
            if config.distill.share_heads or not wants
            else TokenHead(self.encoder.channels, config.distill)
        )


class MaskedDistillation(nn.Module):
    """Student, teacher and losses. `forward` is one step; `update_teacher` follows the optimiser."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.student = Branch(config)
        self.reconstruct = ReconstructionHead(
            self.student.encoder.swin.channels[-1], config.encoder.stride(4)
        )
        self.coarse = CoarseHead(self.student.encoder.channels) if config.loss.coarse else None
        self.teacher = copy.deepcopy(self.student).requires_grad_(False) if config.teacher.enabled else None
        size = (
            config.distill.prototypes if config.distill.kind == "prototype" else self.student.encoder.channels
        )
        self.patch_centre = Centre(size, config.distill.centre_momentum)
        self.image_centre = Centre(size, config.distill.centre_momentum)
        channels = self.student.encoder.channels
        self.standardise = Standardise(channels) if config.distill.standardise else nn.Identity()
        self.register_buffer("informed", torch.zeros(()))  # running informativeness of the teacher
        self.informed: Tensor

    def train(self, mode: bool = True) -> MaskedDistillation:
        """The teacher's only noise is its own: no stochastic depth in its targets and its attention."""
        super().train(mode)
        if self.teacher is not None:
            self.teacher.eval()
        return self

    def forward(
        self,
        views: Tensor,
        clock: Clock,
        generator: torch.Generator,
        shares: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """views (B, 2, 1, D, H, W) in [0, 1] -> loss and the step's metrics.

        shares: by region ("body", "organ", "lesion"), the part (2B, N) of each unit in it; only watched.
        """
        weight = self.config.loss
        x = views.flatten(0, 1)  # (2B, 1, D, H, W): u0, v0, u1, v1, …
        teacher = self.look(x, clock, generator)
        hidden = self.choose(teacher, x, clock, generator)
        rows, units = hidden.shape
        shown = rows * (units - hidden_count(self.config.mask.ratio, units))
        student = self.student.encoder(x, hidden=hidden, visible=shown)
        image_token = self.standardise(student.cls)
        losses = {"amip": self.predict_voxels(student, x, hidden)}
        metrics = self.watch(student, teacher, hidden, shares or {})
        if teacher is not None:
            losses["ampd"] = self.match_tokens(student, teacher, hidden, clock)
            losses["itd"], signs = self.match_images(image_token, teacher, clock)
            metrics |= signs
        else:
            metrics |= feature_signs(student.cls)
        if self.coarse is not None:
            losses["coarse"] = F.l1_loss(self.coarse(image_token), self.coarse.target(x))
        weights = {"amip": weight.amip, "ampd": weight.patch, "itd": weight.image, "coarse": weight.coarse}
        loss = torch.stack([weights[name] * value.float() for name, value in losses.items()]).sum()
        return loss, metrics | {f"loss_{name}": value.detach() for name, value in losses.items()}

    @torch.no_grad()
    def look(self, x: Tensor, clock: Clock, generator: torch.Generator) -> Encoded | None:
        """The teacher sees whole views, with a share of their patches dropped and noise added."""
        if self.teacher is None:
            return None
        settings = self.config.teacher
        rows, shard = x.shape[0], (clock.rank, clock.world)
        if settings.noise_std:
            noise = uniform((rows, *x.shape[1:], 2), x.device, generator, shard).clamp_min(1e-7)
            gauss = (-2 * noise[..., 0].log()).sqrt() * (2 * math.pi * noise[..., 1]).cos()
            x = x + settings.noise_std * gauss
        dropped = seen = None
        if settings.patch_dropout:
            encoder = self.teacher.encoder
            cell = encoder.unit_patches if settings.dropout_unit == "mask_unit" else 1
            cells = [length // encoder.config.encoder.patch // cell for length in x.shape[2:]]
            grid = (cells[0], cells[1], cells[2])
            units = uniform((rows, math.prod(grid)), x.device, generator, shard) < settings.patch_dropout
            dropped = upsample(units, grid, cell)
            if (
                x.device.type == "cpu" and settings.dropout_unit == "mask_unit"
            ):  # elsewhere counting would wait
                seen = int((~units).sum())
        received = self.config.mask.importance == "received"
        return self.teacher.encoder(x, dropped=dropped, received=received, visible=seen, units_only=True)

    @torch.no_grad()
    def choose(self, teacher: Encoded | None, x: Tensor, clock: Clock, generator: torch.Generator) -> Tensor:
        """(2B, N) hidden units: guided by the teacher's attention once that attention means something."""
        m, rows = self.config.mask, x.shape[0]
        grid, shard = self.student.encoder.grid(x.shape), (clock.rank, clock.world)
        guided = m.strategy.startswith("attention")
        plain = make_mask(
            "random" if guided else m.strategy,
            None,
            m.ratio,
            grid,
            generator=generator,
            batch=rows,
            device=x.device,
            shard=shard,
        )
        if teacher is None or teacher.attention is None:
            return plain
        importance = teacher.attention if m.importance == "cls" else teacher.received
        assert importance is not None
        now = mean_over_ranks(informativeness(importance).mean()).nan_to_num()
        self.informed.lerp_(now, 1.0 if clock.step == 0 else 0.1)
        if not guided:
            return plain
        aimed = make_mask(
            m.strategy,
            importance,
            m.ratio,
            grid,
            generator=generator,
            hint=m.hint,
            temperature=m.temperature,
            p_attention=m.p_attention,
            shard=shard,
        )
        return torch.where(self.guides(clock), aimed, plain)

    def guides(self, clock: Clock) -> Tensor:
        """Whether attention is to be trusted with the masks yet: a bool tensor, no wait for the device."""
        m = self.config.mask
        return (self.informed >= m.informativeness) & (clock.epoch >= m.warmup_epochs)

    def predict_voxels(self, student: Encoded, x: Tensor, hidden: Tensor) -> Tensor:
        """AMIP: L1 on the hidden voxels."""
        voxels = upsample(hidden, self.student.encoder.grid(x.shape), self.student.encoder.stride)[:, None]
        apart = (self.reconstruct(student.stages[-1]).float() - x).abs()
        return (apart * voxels).sum() / voxels.sum()

    def match_tokens(self, student: Encoded, teacher: Encoded, hidden: Tensor, clock: Clock) -> Tensor:
        """AMPD: the teacher's tokens of the hidden units; gathered first, so that heads see only these."""
        assert self.teacher is not None and self.student.patch_head is not None
        k = hidden_count(self.config.mask.ratio, hidden.shape[1])
        where = hidden.to(torch.uint8).topk(k, -1).indices[..., None].expand(-1, -1, student.tokens.shape[-1])
        said = self.student.patch_head(student.tokens.gather(1, where))
        taught = teacher.tokens.gather(1, where)
        d = self.config.distill
        if d.kind == "regression":
            return regress_patches(said, taught)
        with torch.no_grad():
            logits = self.teacher.patch_head(taught)  # type: ignore[misc]
            target = self.assign(logits, self.patch_centre, clock)
            self.patch_centre.update(logits)
        return prototype_loss(said, target, d.student_temperature)

    def match_images(
        self, image_token: Tensor, teacher: Encoded, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """ITD: the teacher's image token of the other view (or of the same one, by setting)."""
        assert self.teacher is not None and self.student.image_head is not None
        d, half = self.config.distill, image_token.shape[0] // 2
        said = self.student.image_head(image_token).view(half, 2, -1)
        if d.kind == "regression":
            taught = teacher.cls.float().view(half, 2, -1)
            across = taught.flip(1) if d.cross_view else taught
            loss = regress_image(said, across, self.image_centre.value.clone())
            # no prototypes: the channels take their place, only to be watched
            target = centred(taught, self.image_centre.value, self.teacher_temperature(clock))
            self.image_centre.update(taught)
        else:
            with torch.no_grad():
                logits = self.teacher.image_head(self._as_student(teacher.cls)).view(half, 2, -1)  # type: ignore[misc]
                target = self.assign(logits, self.image_centre, clock)
                self.image_centre.update(logits)
            loss = prototype_loss(said, target.flip(1) if d.cross_view else target, d.student_temperature)
        return loss, collapse_signs(target, teacher.cls)

    def _as_student(self, cls: Tensor) -> Tensor:
        """Teacher image tokens on the student's scale, without moving its statistics."""
        s = self.standardise
        return (cls.float() - s.mean) / (s.variance.sqrt() + 1e-3) if isinstance(s, Standardise) else cls

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
        self, student: Encoded, teacher: Encoded | None, hidden: Tensor, shares: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """How informative and how diverse the attention is, what it falls on, and what is hidden."""
        seen = teacher if teacher is not None else student
        found = {f"hidden_{name}": hidden_share(hidden, share) for name, share in shares.items()}
        if seen.attention is None:
            return found
        diversity = head_diversity(seen.attention)
        a = seen.attention.float()
        by_received = self.config.mask.importance == "received"  # what masks are guided by
        if by_received and seen.received is not None:
            a = seen.received.float()[:, None]
        found |= {f"lift_{name}": lift(a.mean(1), share) for name, share in shares.items()}
        return found | {
            "head_diversity": diversity["cosine"].mean(),
            "head_divergence": diversity["jensen_shannon"].mean(),
            "attention_entropy": torch.special.entr(a).sum(-1).mean(),
            "attention_informativeness": informativeness(a).mean(),
            "attention_hidden": (a.mean(1) * hidden).sum(-1).mean(),
        }

    def told(self, clock: Clock, momentum: float) -> dict[str, Any]:
        """What the settings and the guard say about this step, for metrics.csv."""
        guided = self.config.mask.strategy.startswith("attention")
        return {
            "momentum": momentum,
            "teacher_temperature": self.teacher_temperature(clock),
            "guided": self.guides(clock).float() if guided else 0.0,
        }

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """teacher ← momentum · teacher + (1 − momentum) · student, all tensors at once."""
        if self.teacher is None:
            return
        theirs: list[Tensor] = [*self.teacher.parameters()]
        ours: list[Tensor] = [*self.student.parameters()]
        torch._foreach_lerp_(theirs, ours, 1 - momentum)
