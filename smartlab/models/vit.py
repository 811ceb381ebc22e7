"""A vision transformer for images and for scans: whose [CLS] token looks for itself, and that can leave tokens out.

- `encoder.layout=mae`: 2D, in names, shapes and function the published MAE ViT (`cls_token`, `pos_embed`,
  `patch_embed.proj`, `blocks.N.…`, `norm`). Its positions are sines and cosines, computed anew on other grids than
  that of training; a table that came with foreign weights and is something else is interpolated.
- `encoder.layout=primus`: 3D, in names, shapes and function nnU-Net's Primus without its decoder
  (`down_projection.proj`, `eva.pos_embed`, `eva.blocks.N.…`, `eva.norm`), where [CLS] and registers are off. Its
  positions are learned, and queries and keys are rotated by theirs along each axis; blocks have gated perceptrons
  with a norm inside and, by setting, a norm behind attention and learned scales of both branches.

Dosovitskiy et al., "An image is worth 16×16 words" (2021); He et al., "Masked autoencoders are scalable
vision learners" (2022); Wald et al., "Primus: enforcing attention usage for 3D medical image segmentation" (2025);
Fang et al., "EVA-02" (2023); Su et al., "RoFormer" (2021); Darcet et al., "Vision transformers need registers" (2024).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smartlab.core.config import Config
from smartlab.core.settings import MaeConfig
from smartlab.models.attend import Look, look, paths
from smartlab.models.encoder import AnyEncoder, Encoded
from smartlab.models.linear_attention import Attention
from smartlab.models.patches import PatchEmbed, Size, Turn, rotations, sine_positions, taken, turned
from smartlab.models.semantic import SemanticAttention


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class GatedMlp(nn.Module):
    """SwiGLU with a norm before the last layer (Shazeer, "GLU variants", 2020; EVA-02)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1_g, self.fc1_x = nn.Linear(dim, hidden), nn.Linear(dim, hidden)
        self.norm, self.fc2 = nn.LayerNorm(hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.silu(self.fc1_g(x)) * self.fc1_x(x)))


class TurnedAttention(nn.Module):
    """Softmax attention whose queries and keys are rotated by their positions; keys have no bias."""

    def __init__(self, dim: int, heads: int, inner_norm: bool) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.v_proj = nn.Linear(dim, dim), nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim, bias=False)
        self.norm = nn.LayerNorm(dim) if inner_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def split(self, x: Tensor, turn: Turn | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, each (B, heads, N, C / heads)."""
        parts = (part(x).unflatten(-1, (self.heads, -1)) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k, v = (part.transpose(1, 2) for part in parts)
        return (q, k, v) if turn is None else (turned(q, turn), turned(k, turn), v)

    def join(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.proj(self.norm(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)))


class ViTBlock(nn.Module):
    """One pre-norm transformer block, (B, N, C) -> (B, N, C), with attention of any kind; patches are from
    token `first` on."""

    gamma_1: Tensor | None  # learned scales of the branches
    gamma_2: Tensor | None
    drop_path, first = 0.0, 1

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_ratio: float = 4.0,
        kind: str = "softmax",
        tokens: int = 0,
        settings: MaeConfig | None = None,
    ) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn: Any = Attention(dim, heads, kind, tokens, settings)
        self.mlp: nn.Module = Mlp(dim, round(dim * mlp_ratio))
        self.gamma_1 = self.gamma_2 = None

    def forward(
        self, x: Tensor, turn: Turn | None = None, looks: bool = False, received: bool = False
    ) -> Any:
        """With `looks` also what [CLS] looks at among the patches, a `Look`."""
        q, k, v = self.attn.split(self.norm1(x), turn)
        keep = paths(x, self.drop_path, self.training)
        x = x + scaled(self.attn.join(q, k, v), self.gamma_1, keep, 0)
        x = x + scaled(self.mlp(self.norm2(x)), self.gamma_2, keep, 1)
        return (x, look(q, k, self.first, received)) if looks else x


def scaled(branch: Tensor, gamma: Tensor | None, keep: Tensor | None, which: int) -> Tensor:
    """A branch times its learned scale (LayerScale) and what stochastic depth keeps of it."""
    branch = branch if gamma is None else gamma * branch
    return branch if keep is None else keep[which] * branch


class Style(NamedTuple):
    """What differs between blocks of Primus."""

    layer_scale: float | None = None  # where learned scales of the branches start; None: there are none
    inner_norm: bool = False  # behind attention
    drop_path: float = 0.0  # stochastic depth of the last block; less before
    cls: bool = True
    registers: int = 0  # learned tokens for a head to look at when it looks for nothing


class EvaBlock(ViTBlock):
    """The same in the form of EVA-02."""

    def __init__(self, dim: int, heads: int, mlp_ratio: float, style: Style, share: float) -> None:
        nn.Module.__init__(self)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = TurnedAttention(dim, heads, style.inner_norm)
        self.mlp = GatedMlp(dim, int(dim * mlp_ratio))
        self.drop_path, self.first = share * style.drop_path, style.cls + style.registers
        for name in ("gamma_1", "gamma_2"):
            start = None if style.layer_scale is None else torch.full((dim,), style.layer_scale)
            self.register_parameter(name, None if start is None else nn.Parameter(start))


class ViT(nn.Module):
    """The transformer itself: visible patches to tokens. Positions belong to a grid of `base` patches.

    style: of Primus; None: all as in MAE.
    """

    pos_embed: Tensor
    blocks: nn.ModuleList
    norm: nn.LayerNorm
    checkpointing = False

    def __init__(
        self,
        channels: int,
        patch: int,
        dim: int,
        blocks: int,
        heads: int,
        base: Size,
        mlp_ratio: float = 4.0,
        style: Style | None = None,
    ) -> None:
        super().__init__()
        self.base, self.dim, self.patch, self.style = base, dim, patch, style
        self.registers = style.registers if style else 0
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if style is None or style.cls else None
        self.register_tokens = nn.Parameter(torch.zeros(1, self.registers, dim)) if self.registers else None
        if style is None:
            table = torch.cat([torch.zeros(1, dim), sine_positions(base, dim)])
            self.register_buffer("pos_embed", table[None])
            self.patch_embed = PatchEmbed(channels, dim, patch, len(base))
            self.blocks = nn.ModuleList(ViTBlock(dim, heads, mlp_ratio) for _ in range(blocks))
            self.norm = nn.LayerNorm(dim, eps=1e-6)
        else:
            self.down_projection = PatchEmbed(channels, dim, patch, len(base))
            self.eva = nn.Module()
            self.eva.pos_embed = nn.Parameter(torch.zeros(1, math.prod(base), dim))
            shares = [number / max(1, blocks - 1) for number in range(blocks)]
            self.eva.blocks = nn.ModuleList(EvaBlock(dim, heads, mlp_ratio, style, p) for p in shares)
            self.eva.norm = nn.LayerNorm(dim)
        for token in (self.cls_token, self.register_tokens):
            if token is not None:
                nn.init.normal_(token, std=0.02)
        start(self) if style is None else start_primus(self)
        self.first = (self.cls_token is not None) + self.registers  # where patches begin

    @property
    def trunk(self) -> ViT:
        """What holds positions, blocks and the norm behind them."""
        return self if self.style is None else cast(ViT, self.eva)

    @property
    def embed(self) -> PatchEmbed:
        return self.patch_embed if self.style is None else self.down_projection

    def positions(self, grid: Size) -> Tensor:
        """(1, N, C) for a grid of patches."""
        table = self.trunk.pos_embed if self.style else self.pos_embed[:, 1:]
        if grid == self.base:
            return table
        if self.style is None:
            sines = sine_positions(self.base, self.dim).to(table)
            if (table[0] - sines).abs().max() < 1e-4:
                return sine_positions(grid, self.dim, self.base)[None].to(table)
        how = "bicubic" if len(grid) == 2 else "trilinear"
        table = table.transpose(1, 2).unflatten(2, self.base)
        return F.interpolate(table, grid, mode=how, align_corners=False).flatten(2).transpose(1, 2)

    def turn(self, grid: Size, keep: Tensor | None) -> Turn | None:
        """By how much blocks rotate each token. Places count in patches on any grid; what stands before the patches
        has none."""
        if self.style is None:
            return None
        head = self.dim // cast(Any, self.trunk.blocks[0]).attn.heads
        angles = rotations(grid, head, self.trunk.pos_embed.device)
        if keep is not None:
            angles = angles[keep][:, None]  # the same for all heads
        angles = F.pad(angles, (0, 0, self.first, 0))
        return angles.cos(), angles.sin()

    def tokens(
        self, x: Tensor, keep: Tensor | None = None, blank: Tensor | None = None, fill: Tensor | float = 0.0
    ) -> Tensor:
        """Images (B, channels, …) -> what is before the first block, (B, first + n, C): [CLS], registers, patches.

        keep:  (B, n) places of the visible patches; by default all.
        blank: (B, N) bool, patches that are there, but hold `fill`.
        """
        grid = tuple(length // self.patch for length in x.shape[2:])
        tokens = self.embed(x, keep)
        if blank is not None:
            fill = fill.to(tokens.dtype) if isinstance(fill, Tensor) else fill
            tokens = torch.where(blank[..., None], fill, tokens)
        tokens = tokens + taken(self.positions(grid).expand(len(x), -1, -1), keep)
        leading: list[Tensor] = [t for t in (self.cls_token, self.register_tokens) if t is not None]
        if self.style is None:  # [CLS] has a position too
            leading = [leading[0] + self.pos_embed[:, :1]]
        leading = [token.expand(len(x), -1, -1).to(tokens) for token in leading]
        return torch.cat([*leading, tokens], 1)

    def encode(
        self,
        x: Tensor,
        keep: Tensor | None = None,
        blank: Tensor | None = None,
        fill: Tensor | float = 0.0,
        received: bool = False,
    ) -> tuple[Tensor, list[Tensor], Look]:
        """-> normalised tokens (B, first + n, C), what goes into the first and comes out of four evenly spaced blocks, and
        what the last one looks at."""
        turn = self.turn(tuple(length // self.patch for length in x.shape[2:]), keep)
        x = self.tokens(x, keep, blank, fill)
        levels = [x]
        *before, last = self.trunk.blocks
        depth = len(before) + 1
        wanted = [-(-depth * quarter // 4) - 1 for quarter in (1, 2, 3, 4)]
        for number, block in enumerate(before):
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, turn, use_reentrant=False)
            else:
                x = block(x, turn)
            levels += [x] * wanted.count(number)
        x, seen = last(x, turn, looks=True, received=received)
        return self.trunk.norm(x), levels + [x] * wanted.count(depth - 1), seen


class ViTEncoder(ViT, AnyEncoder):
    """The encoder of MAE, MIRAM and Primus, for training and for use after it.

    >>> enc = sl.load_encoder("runs/miram")
    >>> enc.features(image)["cls"].shape, enc.attention(image).shape
    """

    def __init__(self, config: Config) -> None:
        e = config.encoder
        base = (config.input // e.patch,) * e.dims
        style = None
        if e.layout == "primus":
            style = Style(e.layer_scale, e.inner_norm, e.drop_path, e.cls_token, e.registers)
        super().__init__(e.in_channels, e.patch, e.embed_dim, e.blocks, e.heads, base, e.mlp_ratio, style)
        self.config, self.dims, self.checkpointing = config, e.dims, e.checkpointing
        self.smaller = config.data.view // config.input  # stored pixels per pixel that the ViT sees
        self.stride = self.total = e.patch * self.smaller  # stored pixels per token
        self.unit_patches = 1
        count = 5 if style else 4
        self.channels, self.stage_channels = e.embed_dim, [e.embed_dim] * count
        self.stage_strides = [self.stride] * count
        learned = config.mask.fill == "token" and config.student.encode == "dense" and style is not None
        self.mask_token = nn.Parameter(torch.zeros(e.embed_dim)) if learned else None
        if self.mask_token is not None:
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.semantic = SemanticAttention.of(config, self.channels, self.stride)
        own = e.heads if self.cls_token is not None else 0
        self.heads = config.semantic.heads if self.semantic is not None else own

    def shrink(self, x: Tensor, scale: int = 1) -> Tensor:
        """Stored pixels -> pixels of `scale` times the resolution that the ViT sees, by averaging."""
        pool = F.avg_pool2d if self.dims == 2 else F.avg_pool3d
        return pool(x, self.smaller // scale) if self.smaller > scale else x

    def visible(self, x: Tensor, keep: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images (B, 1, …) as the ViT sees them -> normalised tokens (B, 1 + n, C) of [CLS] (or the mean) and the
        patches `keep` (B, n), and the last block's [CLS] attention over these (B, heads, n)."""
        tokens, _, seen = self.encode(x, keep)
        attention = seen.rows if self.heads else None
        return torch.cat([self.image_token(tokens)[:, None], tokens[:, self.first :]], 1), attention

    def image_token(self, tokens: Tensor) -> Tensor:
        """(B, C): [CLS], or the mean of the patches where there is none."""
        return tokens[:, self.first :].mean(1) if self.cls_token is None else tokens[:, 0]

    def forward(
        self,
        x: Tensor,
        hidden: Tensor | None = None,
        dropped: Tensor | None = None,
        received: bool = False,
        visible: int | None = None,
        deep: int | None = None,
    ) -> Encoded:
        """Windowed images (B, C, …) in [0, 1], stored pixels -> `Encoded`; stages are (B, …, C).

        hidden:  (B, N) bool, patches whose embeddings become zero, or the mask token (the student).
        dropped: the same on the grid, zero in any case (the noisy teacher).
        visible: nothing here; see `Encoder`.
        deep:    pooled tokens are wanted of so many of the last rows.
        """
        grid, blank = self.grid(x.shape), hidden if dropped is None else dropped.flatten(1)
        fill = 0.0 if self.mask_token is None or hidden is None else self.mask_token
        tokens, levels, seen = self.encode(self.shrink(x), None, blank, fill, received)
        units, cls = tokens[:, self.first :], self.image_token(tokens)
        stages = [level[:, self.first :].unflatten(1, grid) for level in levels]
        if self.style is None:
            stages = stages[1:]
        else:  # voxels are predicted from what is normalised
            stages[-1] = units.unflatten(1, grid)
        pooled = units[-deep:].mean(1) if deep else units.mean(1) if deep is None else None
        tokens = units
        if self.semantic is not None:
            cls, tokens, *looked = self.semantic(stages[-1], received)
            seen = Look(*looked)
        rows, strength, share, incoming = seen if self.heads else (None,) * 4
        return Encoded(stages, cls, tokens, rows, incoming, grid, units, pooled, strength, share)


def start(module: nn.Module) -> None:
    """Initial weights as in MAE: Xavier for linear layers and patches, zero biases."""
    for part in module.modules():
        if isinstance(part, nn.Linear):
            nn.init.xavier_uniform_(part.weight)
            nn.init.zeros_(part.bias)
        elif isinstance(part, PatchEmbed):
            nn.init.xavier_uniform_(part.proj.weight.view(part.proj.weight.shape[0], -1))
            nn.init.zeros_(part.proj.bias)  # type: ignore[arg-type]


@torch.no_grad()
def start_primus(net: ViT) -> None:
    """Initial weights as in Primus: small normal ones, smaller the deeper a branch ends; He's for the patches."""
    nn.init.kaiming_normal_(net.down_projection.proj.weight, a=0.01)
    nn.init.zeros_(net.down_projection.proj.bias)  # type: ignore[arg-type]
    nn.init.trunc_normal_(net.trunk.pos_embed, std=0.02)
    for part in net.eva.modules():
        if isinstance(part, nn.Linear):
            nn.init.trunc_normal_(part.weight, std=0.02)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    for number, block in enumerate(net.trunk.blocks, 1):
        for branch in (block.attn.proj, block.mlp.fc2):  # type: ignore[union-attr]
            branch.weight.div_(math.sqrt(2 * number))  # type: ignore[union-attr, operator]
