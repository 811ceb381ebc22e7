"""Masked autoencoding of images and of scans at one scale or several: MAE and MIRAM by settings.

One step: most patches are hidden; the encoder sees the others (of scans, by `student.encode=dense`, all, with
nothing in the hidden ones); for every scale a decoder of its own reconstructs the hidden patches, at the encoder's
resolution and at higher ones. What is hidden is the same part of the image at every scale. Targets are the stored
pixels, averaged down to each scale.

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
from smartlab.masking import head_diversity, hidden_count, hidden_share, informativeness, make_mask
from smartlab.methods.distillation import feature_signs
from smartlab.models.decoder import Decoder, finer, from_patches
from smartlab.models.patches import taken, to_patches
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
        patch, channels, self.dims = config.encoder.patch, self.student.encoder.channels, config.encoder.dims
        self.side = config.mae.input // patch
        self.decoders = nn.ModuleDict(
            {
                str(d.scale): Decoder(
                    channels, self.side, patch, d, config.mae, self.dims, config.encoder.in_channels
                )
                for d in config.mae.decoders()
            }
        )

    def forward(
        self, views: Tensor, clock: Clock, generator: torch.Generator, shares: dict[str, Tensor] | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """views (B, 1, V, V), or of scans (B, 2, C, V, V, V), in [0, 1] -> loss and the step's metrics.

        shares: by region, the part (2B, N) of each patch in it; only watched.
        """
        x = views if self.dims == 2 else views.flatten(0, 1)
        keep, hidden = self.choose(len(x), x.device, generator, clock)
        mask = self.mask(hidden)
        seen, attention, places = self.see(x, keep, mask)
        losses, metrics = [], self.watch(seen, attention)
        metrics |= {f"hidden_{name}": hidden_share(mask, share) for name, share in (shares or {}).items()}
        for d in self.config.mae.decoders():
            wanted = finer(hidden, self.side, d.scale, self.dims)
            guess = self.decoders[str(d.scale)](seen, places, wanted)
            loss = (guess.float() - taken(self.target(x, d.scale)[0], wanted)).square().mean()
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
            (1,) * (3 - self.dims) + (self.side,) * self.dims,
            generator=generator,
            batch=rows,
            device=device,
            shard=(clock.rank, clock.world),
        )
        return places_of(mask, hidden_count(m.ratio, mask.shape[1]))

    def mask(self, hidden: Tensor) -> Tensor:
        """(B, N) bool of hidden places (B, k)."""
        shown = torch.zeros(len(hidden), self.side**self.dims, dtype=torch.bool, device=hidden.device)
        return shown.scatter(1, hidden, True)

    def see(self, x: Tensor, keep: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """What the encoder makes of views: tokens (B, 1 + n, C), [CLS] first; its attention; where the others lie (B, n)."""
        encoder = self.student.encoder
        if self.dims == 2 or self.config.student.encode == "sparse":
            return *encoder.visible(encoder.shrink(x), keep), keep
        out, every = encoder(x, hidden=mask), torch.arange(mask.shape[1], device=x.device)
        return torch.cat([out.cls[:, None], out.tokens], 1), out.attention, every.expand(len(x), -1)

    def target(self, views: Tensor, scale: int) -> tuple[Tensor, Tensor, Tensor]:
        """Patches (B, N·s², p²), of scans (B, N·s³, C·p³), of the views at a scale, as they are to be predicted, with the
        mean and spread (B, N·s², 1) that were taken out of each."""
        patches = to_patches(self.student.encoder.shrink(views, scale).float(), self.config.encoder.patch)
        mean, spread = patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + 1e-6).sqrt()
        if not self.config.mae.normalise:
            mean, spread = torch.zeros_like(mean), torch.ones_like(spread)
        return (patches - mean) / spread, mean, spread

    @torch.no_grad()
    def reconstruct(
        self, views: Tensor, generator: torch.Generator | None = None, mask: Tensor | None = None
    ) -> dict[int, dict[str, Tensor]]:
        """By scale, images (B, C, s·input, …): "target", "guess" (every patch predicted) and "hidden".

        What is hidden is drawn by the generator, or given: mask (B, N) bool, equally many in every row.
        Where targets are normalised, the guess gets the true mean and spread of each patch back: it shows
        what is predicted, which is the pattern within a patch and not its brightness.
        """
        if mask is not None:
            keep, hidden = places_of(mask, int(mask[0].sum()))
        else:
            assert generator is not None
            keep, hidden = self.choose(len(views), views.device, generator, Clock(0, 1, 1))
        seen, _, places = self.see(views, keep, self.mask(hidden))
        found, patch = {}, self.config.encoder.patch
        for d in self.config.mae.decoders():
            target, mean, spread = self.target(views, d.scale)
            guess = self.decoders[str(d.scale)](seen, places).float()
            wanted = finer(hidden, self.side, d.scale, self.dims)
            lost = torch.zeros_like(target).scatter(
                1, wanted[..., None].expand(-1, -1, target.shape[-1]), 1.0
            )
            parts = {"target": target * spread + mean, "guess": guess * spread + mean, "hidden": lost}
            side = self.side * d.scale
            found[d.scale] = {name: from_patches(x, side, patch, self.dims) for name, x in parts.items()}
        return found

    @torch.no_grad()
    def watch(self, seen: Tensor, attention: Tensor | None) -> dict[str, Tensor]:
        """Signs of collapse in [CLS], and how diverse and how informative its attention is."""
        if attention is None:
            return feature_signs(seen[:, 0])
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
