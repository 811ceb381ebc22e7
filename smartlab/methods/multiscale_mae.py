"""Masked autoencoding of images at one scale or several: MAE and MIRAM by settings.

One step: most patches are hidden; the encoder sees the others; for every scale a decoder of its own
reconstructs the hidden patches, at the encoder's resolution and at higher ones. What is hidden is
the same part of the image at every scale. Targets are the stored pixels, averaged down to each scale.

    MAE      one scale, softmax attention
    MIRAM    scales 1 and 2 (4 by setting), the finer decoders by linear attention

The loss is the mean squared error on hidden patches only, summed over the scales with `mae.weights`.

He et al., "Masked autoencoders are scalable vision learners" (2022); Vo et al., "MIRAM" (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from smartlab.core.clock import Clock
from smartlab.core.config import Config
from smartlab.masking import head_diversity, hidden_count, informativeness, make_mask
from smartlab.methods.distillation import feature_signs
from smartlab.models.decoder import Decoder, finer, from_patches, to_patches
from smartlab.models.vit import ViTEncoder


def places_of(mask: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """(B, N) bool with `count` hidden in every row -> places of the visible and of the hidden, ascending."""
    order = mask.to(torch.uint8).argsort(dim=1, stable=True)
    return order[:, : order.shape[1] - count], order[:, order.shape[1] - count :]


class Seeing(nn.Module):
    """What is exported: the encoder. The decoders are left behind."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.encoder = ViTEncoder(config)


class MultiscaleMAE(nn.Module):
    """Encoder, decoders and losses. `forward` is one step."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.student, self.teacher = Seeing(config), None
        patch = config.encoder.patch
        self.side = config.mae.input // patch
        self.decoders = nn.ModuleDict(
            {
                str(d.scale): Decoder(self.student.encoder.channels, self.side, patch, d, config.mae)
                for d in config.mae.decoders()
            }
        )

    def forward(
        self,
        views: Tensor,
        clock: Clock,
        generator: torch.Generator,
        shares: dict[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """views (B, 1, V, V) in [0, 1] -> loss and the step's metrics."""
        encoder = self.student.encoder
        keep, hidden = self.choose(len(views), views.device, generator, clock)
        seen, attention = encoder.visible(encoder.shrink(views), keep)
        losses, metrics = [], self.watch(seen, attention)
        for d in self.config.mae.decoders():
            places = finer(hidden, self.side, d.scale)
            guess = self.decoders[str(d.scale)](seen, keep, places)
            target, _, _ = self.target(views, d.scale)
            target = target.gather(1, places[..., None].expand(-1, -1, target.shape[-1]))
            loss = (guess.float() - target).square().mean()
            losses.append(d.weight * loss)
            metrics[f"loss_scale_{d.scale}"] = loss.detach()
        return torch.stack(losses).sum(), metrics

    def choose(
        self, rows: int, device: torch.device, generator: torch.Generator, clock: Clock
    ) -> tuple[Tensor, Tensor]:
        """Places of the visible (B, n) and of the hidden patches (B, k), ascending."""
        m = self.config.mask
        mask = make_mask(
            m.strategy,
            None,
            m.ratio,
            (1, self.side, self.side),
            generator=generator,
            batch=rows,
            device=device,
            shard=(clock.rank, clock.world),
        )
        return places_of(mask, hidden_count(m.ratio, mask.shape[1]))

    def target(self, views: Tensor, scale: int) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (B, N·s², p²) of the views at a scale, as they are to be predicted, with the mean and spread
        (B, N·s², 1) that were taken out of each."""
        patches = to_patches(self.student.encoder.shrink(views, scale).float(), self.config.encoder.patch)
        mean, spread = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        if not self.config.mae.normalise:
            mean, spread = torch.zeros_like(mean), torch.ones_like(spread)
        return (patches - mean) / spread, mean, spread

    @torch.no_grad()
    def reconstruct(
        self, views: Tensor, generator: torch.Generator | None = None, mask: Tensor | None = None
    ) -> dict[int, dict[str, Tensor]]:
        """By scale, images (B, 1, s·input, s·input): "target", "guess" (every patch predicted) and "hidden".

        What is hidden is drawn by the generator, or given: mask (B, N) bool, equally many in every row.
        Where targets are normalised, the guess gets the true mean and spread of each patch back: it shows
        what is predicted, which is the pattern within a patch and not its brightness.
        """
        encoder = self.student.encoder
        if mask is not None:
            keep, hidden = places_of(mask, int(mask[0].sum()))
        else:
            assert generator is not None
            keep, hidden = self.choose(len(views), views.device, generator, Clock(0, 1, 1))
        seen, _ = encoder.visible(encoder.shrink(views), keep)
        found = {}
        for d in self.config.mae.decoders():
            side, patch = self.side * d.scale, self.config.encoder.patch
            target, mean, spread = self.target(views, d.scale)
            guess = self.decoders[str(d.scale)](seen, keep).float()
            mask = torch.zeros_like(target).scatter(
                1, finer(hidden, self.side, d.scale)[..., None].expand(-1, -1, target.shape[-1]), 1.0
            )
            parts = {"target": target * spread + mean, "guess": guess * spread + mean, "hidden": mask}
            found[d.scale] = {name: from_patches(x, side, patch) for name, x in parts.items()}
        return found

    @torch.no_grad()
    def watch(self, seen: Tensor, attention: Tensor) -> dict[str, Tensor]:
        """Signs of collapse in [CLS], and how diverse and how informative its attention is."""
        return feature_signs(seen[:, 0]) | {
            "head_diversity": head_diversity(attention)["cosine"].mean(),
            "head_divergence": head_diversity(attention)["jensen_shannon"].mean(),
            "attention_entropy": torch.special.entr(attention).sum(-1).mean(),
            "attention_informativeness": informativeness(attention).mean(),
        }

    def told(self, clock: Clock, momentum: float) -> dict[str, float]:
        """There is no teacher to tell of."""
        return {}

    def update_teacher(self, momentum: float) -> None:
        """There is none."""
