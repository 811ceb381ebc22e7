"""The layers of an encoder, from the first to the last: early ones are fine-tuned more slowly."""

from __future__ import annotations

import re
from typing import Any

from torch import nn

from smartlab.training.setup import parameter_groups

_MERGING = 99  # after any block


def layer_groups(model: nn.Module, encoder: str, decay: float) -> list[dict[str, Any]]:
    """Parameter groups with "scale", the share of the learning rate: decay ** (layers above), and "encoder".

    The encoder's layers are its patch embedding, each Swin block, merging and semantic block; whatever is
    not the encoder's is on top of them, with scale 1.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    inside = [name for name in names.values() if name.startswith(encoder)]
    places = sorted({place_of(name.removeprefix(encoder)) for name in inside})
    depth = {name: places.index(place_of(name.removeprefix(encoder))) for name in inside}
    groups: list[dict[str, Any]] = []
    for group in parameter_groups(model):
        by_layer: dict[int, list[nn.Parameter]] = {}
        for parameter in group["params"]:
            by_layer.setdefault(depth.get(names[id(parameter)], len(places)), []).append(parameter)
        groups += [
            {
                "params": parameters,
                "decays": group["decays"],
                "scale": decay ** (len(places) - layer),
                "encoder": layer < len(places),
            }
            for layer, parameters in sorted(by_layer.items())
        ]
    return groups


def place_of(name: str) -> tuple[int, int]:
    """(stage, block) of an encoder parameter, in order of depth; a stage's merging comes after its blocks.

    >>> place_of("swin.layers3.0.blocks.1.attn.qkv.weight"), place_of("patch_embed.proj.bias")
    ((3, 1), (0, 0))
    """
    if found := re.search(r"(?:^|\.)layers(\d)\.0\.(?:blocks\.(\d+)|downsample)\.", name):
        return int(found[1]), int(found[2]) if found[2] else _MERGING
    if found := re.search(r"(?:^|\.)semantic\.(?:blocks\.(\d+))?", name):
        return 5, int(found[1] or 0)
    if found := re.search(r"^(?:eva\.)?blocks\.(\d+)\.", name):  # of a plain transformer
        return 1 + int(found[1]), 0
    if name.startswith(("norm.", "eva.norm.")):  # after its last block
        return _MERGING, 0
    return 0, 0
