"""The step as published, to measure ours against: the same method with none of our speed.

`Reference` is `MaskedDistillation` with each fast part put back to how published code does it:

- MONAI's SwinTransformer, eager and in fp32: attention matrices in memory, shift masks rebuilt in every stage of
  every forward, channels first between stages, windows partitioned by copies;
- student and teacher run all four stages on all tokens; heads run on all tokens, losses are averaged under a mask;
- AdamW tensor by tensor (torch's default on a CPU), teacher updated tensor by tensor;
- nothing is watched: no metrics, which ours does compute.

Parameters have the same names and shapes, so both sides start from the same weights and draw the same masks.
Semantic attention has no published code in torch: with it switched on, both sides use ours.

Jiang et al., SMIT (2022); Hatamizadeh et al., Swin UNETR (2022); Zhou et al., iBOT (2022).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from monai.networks.nets.swin_unetr import SwinTransformer
from torch import Tensor, nn

from smartlab.core.clock import Clock
from smartlab.core.config import Config
from smartlab.masking import upsample
from smartlab.methods.masked_distillation import MaskedDistillation
from smartlab.models.encoder import Encoded


class PublishedSwin(SwinTransformer):
    """MONAI's encoder, with a place between embedding and stages where tokens can be masked."""

    def embed(self, x: Tensor) -> Tensor:
        """Image (B, C_in, D, H, W) -> tokens (B, D/2, H/2, W/2, C)."""
        return self.patch_embed(x).permute(0, 2, 3, 4, 1)

    def stages(
        self, tokens: Tensor, repeats: object = None, upto: int = 4, apart: bool = False, done: int = 0
    ) -> list[Tensor]:
        """All stages on all tokens, whatever is asked for; those behind `upto` are kept for when they are."""
        if done:
            return [m[-len(tokens) :] for m in self._behind]
        x = self.pos_drop(tokens.permute(0, 4, 1, 2, 3))
        maps = [x]
        for layers in (self.layers1, self.layers2, self.layers3, self.layers4):
            maps.append(layers[0](maps[-1].contiguous()))
        maps = [m.permute(0, 2, 3, 4, 1) for m in maps]
        self._behind = maps[upto:]
        return maps[: upto + 1]

    def forward(self, x: Tensor) -> list[Tensor]:
        return self.stages(self.embed(x))


def published_swin(config: Config, flash: bool = False) -> PublishedSwin:
    """flash: by MONAI's option, which works without gradient only: for a teacher."""
    e = config.encoder
    return PublishedSwin(
        e.in_channels,
        e.embed_dim,
        (e.window_size,) * 3,
        (e.patch,) * 3,
        e.depths,
        e.num_heads,
        e.mlp_ratio,
        e.qkv_bias,
        drop_path_rate=e.drop_path,
        use_flash_attention=flash,
    )


class Reference(MaskedDistillation):
    """One step as published; takes the weights of a `MaskedDistillation` by `load_state_dict`."""

    def __init__(self, config: Config, flash: bool = False) -> None:
        super().__init__(config)
        sides = [self.student] if self.teacher is None else [self.student, self.teacher]
        for side in sides:
            trained = side is self.student
            swin = published_swin(config, flash and not trained)
            side.encoder.swin = swin.requires_grad_(trained)  # type: ignore[assignment]

    def predict_voxels(self, student: Encoded, x: Tensor, hidden: Tensor) -> Tensor:
        """Every voxel is predicted; those of hidden units count."""
        head = self.reconstruct
        features = student.stages[-1].permute(0, 4, 1, 2, 3)  # channels first, as a convolution has it
        weight = head.proj.weight[:, :, None, None, None]
        cubes = F.conv3d(features, weight, head.proj.bias)  # (B, 32³, d, h, w)
        b, _, d, h, w = cubes.shape
        s = head.stride
        voxels = cubes.view(b, s, s, s, d, h, w).permute(0, 4, 1, 5, 2, 6, 3)
        made = voxels.reshape(b, 1, d * s, h * s, w * s)
        where = upsample(hidden, student.grid, self.student.encoder.stride)[:, None]
        return (F.l1_loss(made, x, reduction="none") * where).sum() / where.sum()

    def match_tokens(
        self, student: Encoded, teacher: Encoded, hidden: Tensor, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Heads see all tokens; the loss of the shown ones is thrown away."""
        assert self.teacher is not None and self.student.patch_head is not None
        d = self.config.distill
        said, where = self.student.patch_head(student.units), hidden.float()
        if d.kind == "regression":
            target = teacher.units
            each = F.smooth_l1_loss(said, target, reduction="none").mean(-1)
        else:
            with torch.no_grad():
                logits = self.teacher.patch_head(teacher.units)  # type: ignore[misc]
                target = self.assign(logits, self.centres["patch"], clock)
                # ours gathers before the heads and centres what it gathered
                self.centres["patch"].update(logits[hidden])
            each = -(target * F.log_softmax(said / d.student_temperature, -1)).sum(-1)
        return (each * where).sum() / where.sum(), {}

    def match_images(
        self, which: str, said: Tensor, taught: Tensor, clock: Clock
    ) -> tuple[Tensor, dict[str, Tensor]]:
        return super().match_images(which, said, taught, clock)[0], {}

    def watch(self, *_: object) -> dict[str, Tensor]:  # type: ignore[override]
        return {}

    @torch.no_grad()
    def update_teacher(self, momentum: float) -> None:
        """One tensor after the other."""
        if self.teacher is None:
            return
        for theirs, ours in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            theirs.data.mul_(momentum).add_((1 - momentum) * ours.detach().data)


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]
