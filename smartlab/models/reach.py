"""How far each head of an encoder looks: the distribution of its attention over distance.

Per head, all attention from all queries is summed by the distance between query and key. The entropy of that
distribution (in nats) tells a head that looks everywhere within its reach from one that looks at one distance
only, and its mean how far it looks. That heads differ in both is what diversity means for stages without a [CLS]
token (Jiang et al., DAGMaN, 2025, fig. 4a; Xie et al., "Revealing the dark secrets of masked image modeling", 2023).
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from smartlab.models.encoder import AnyEncoder, Encoded, Encoder
from smartlab.models.vit import ViTBlock, ViTEncoder
from smartlab.models.windows import WindowAttention


class Reach(NamedTuple):
    """Of every head of every block of a stage, (heads,)."""

    entropy: Tensor  # nats
    distance: Tensor  # mean, voxels


@torch.no_grad()
def reach(encoder: AnyEncoder, x: Tensor, dropped: Tensor | None = None) -> tuple[dict[str, Reach], Encoded]:
    """By Swin stage ("stage 1" …) or ViT block ("block 1" …), for windowed views x as `forward` takes them; and
    the forward pass that it was seen in.

    >>> found, _ = reach(encoder, views)
    >>> found["stage 3"].entropy.mean()
    """
    found: dict[str, list[tuple[Tensor, Tensor]]] = defaultdict(list)

    def hook(name: str, stride: int) -> Any:
        def look(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            size, rows = _rows(module, inputs, encoder.dims)
            found[name].append(spread(rows, size, stride))

        return look

    if isinstance(encoder, ViTEncoder):
        places = [(f"block {i + 1}", encoder.stride, block) for i, block in enumerate(encoder.trunk.blocks)]
    else:
        assert isinstance(encoder, Encoder)
        strides = [encoder.config.encoder.stride(stage) for stage in range(4)]
        places = [
            (f"stage {stage + 1}", strides[stage], part)
            for stage, layer in enumerate(encoder.swin.layers())
            for part in layer.modules()
            if isinstance(part, WindowAttention)
        ]
    hooks = [part.register_forward_pre_hook(hook(name, stride)) for name, stride, part in places]
    was_training = encoder.training
    try:
        seen = encoder.eval()(x) if dropped is None else encoder.eval()(x, dropped=dropped)
    finally:
        encoder.train(was_training)
        for one in hooks:
            one.remove()
    joined = {name: Reach(*(torch.cat(p) for p in zip(*each, strict=True))) for name, each in found.items()}
    return joined, seen


def _rows(module: nn.Module, inputs: tuple[Any, ...], dims: int) -> tuple[tuple[int, ...], Tensor]:
    """The grid that attention spans, and attention (heads, n, n) over it, mean over samples and windows."""
    if isinstance(module, ViTBlock):
        q, k, _ = module.attn.split(module.norm1(inputs[0]), *inputs[1:])
        rows = (q.float() @ k.float().transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1)
        rows = rows[..., module.first :, module.first :]  # without [CLS]
        side = round(rows.shape[-1] ** (1 / dims))
        return (side,) * dims, (rows / rows.sum(-1, keepdim=True)).mean(0)
    assert isinstance(module, WindowAttention)
    return inputs[1], module.looks(*inputs)


def spread(rows: Tensor, size: tuple[int, ...], stride: float = 1.0) -> tuple[Tensor, Tensor]:
    """Attention (heads, n, n) over a grid -> entropy of its distances in nats, mean distance; (heads,) each."""
    axes = [torch.arange(length, device=rows.device) for length in size]
    place = torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)
    squared = (place[:, :, None] - place[:, None]).square().sum(0).flatten()
    longest = sum((length - 1) ** 2 for length in size) + 1
    shares = rows.new_zeros(len(rows), longest).index_add_(1, squared, rows.flatten(1)) / rows.shape[1]
    lengths = torch.arange(longest, device=rows.device).sqrt() * stride
    return torch.special.entr(shares).sum(-1), shares @ lengths
