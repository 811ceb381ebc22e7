"""Swin weights of others in ours: names, the order of patch merging, and the sizes read off the tensors.

Patch merging stacks the eight corners of a 2×2×2 cell in an order that is not in the weights: the same
keys and shapes, another function (MONAI issue 8284). `MERGE_ORDERS` names the orders; weights from
another order get the channel blocks of `norm` and `reduction` permuted. MONAI before 1.5 used two
corners twice: such weights compute something else, and only MONAI's own network can hold them (`foreign.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from smartlab.core.config import Config, load_config
from smartlab.core.errors import DataError, one_of
from smartlab.interop.files import bare
from smartlab.models.swin import MERGE_ORDER

Corner = tuple[int, int, int]
# what belongs to a Swin encoder in files, known here or not: what is not known is refused, not left out
ENCODERS = (
    "patch_embed.",
    *(f"layers{i}{c}." for i in (1, 2, 3, 4) for c in ("", "c")),
    "absolute_pos_embed",
    "pos_embed",
)
MERGE_ORDERS: dict[str, tuple[Corner, ...]] = {
    "monai": MERGE_ORDER,
    "mergingv2": tuple(itertools.product(range(2), range(2), range(2))),  # type: ignore[arg-type]
    # TransMorph (Chen et al., 2022) and networks built on it: two mixed corners swapped. SMIT is one of these by its
    # names; its merging could not be checked, so say the order that its code has.
    "transmorph": (*MERGE_ORDER[:5], MERGE_ORDER[6], MERGE_ORDER[5], MERGE_ORDER[7]),
    "duplicated": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
}
_WRAPPERS = (
    "module.",
    "_orig_mod.",
    "student.",
    "model.",
    "encoder.",
    "backbone.",
    "swinViT.",
    "swin.",
    "transformer.",
)


def convert(weights: Mapping[str, Tensor], path: Path, merging: str = "monai") -> dict[str, Tensor]:
    """Foreign names and merging order -> those of our Swin. Heads and decoders are left behind."""
    one_of("no merging order", merging, MERGE_ORDERS)
    order = MERGE_ORDERS[merging]
    if len(set(order)) < 8:
        raise DataError(
            "was trained with a patch merging that uses two corners twice",
            path=path,
            fix="such weights compute another function: load them into MONAI's own network, as swinunetr:FILE",
        )
    named = {_rename(key): value for key, value in weights.items()}
    if not any(key.startswith("layers1.0.blocks.0.") for key in named):
        raise DataError(
            "holds no 3D Swin encoder or ViT that is known here",
            path=path,
            found=f"keys such as {', '.join(list(weights)[:3])}",
            expected="swinViT.layers1.0.blocks.0.… (MONAI), layers.0.blocks.0.… (SMIT) or MAE's vision transformer",
        )
    kept = {k: v for k, v in named.items() if k.startswith(ENCODERS)}
    blocks = [order.index(corner) for corner in MERGE_ORDER]
    for key, value in kept.items():
        if ".downsample.reduction." in key:  # (2C, 8C): the input channels come in eight blocks
            kept[key] = value.view(value.shape[0], 8, -1)[:, blocks].reshape(value.shape)
        elif ".downsample.norm." in key:
            kept[key] = value.view(8, -1)[blocks].reshape(value.shape)
    return kept


def config_of(weights: Mapping[str, Tensor], path: Path) -> Config:
    """The encoder configuration that these tensors have, read off their shapes."""
    try:
        embed = weights["patch_embed.proj.weight"]
        depths, heads = [], []
        for stage in range(1, 5):
            prefix = f"layers{stage}.0.blocks."
            depths.append(len({k.split(".")[3] for k in weights if k.startswith(prefix)}))
            heads.append(weights[f"{prefix}0.attn.relative_position_bias_table"].shape[1])
        span = round(weights["layers1.0.blocks.0.attn.relative_position_bias_table"].shape[0] ** (1 / 3))
    except KeyError as error:
        raise DataError(
            "lacks a tensor of the Swin encoder", path=path, found=f"no {error.args[0]}"
        ) from None
    return load_config(
        {
            "encoder.preset": "custom",
            "encoder.in_channels": embed.shape[1],
            "encoder.patch": embed.shape[2],
            "encoder.embed_dim": embed.shape[0],
            "encoder.depths": depths,
            "encoder.num_heads": heads,
            "encoder.window_size": (span + 1) // 2,
            "encoder.qkv_bias": "layers1.0.blocks.0.attn.qkv.bias" in weights,
            "method.preset": "simmim",  # no semantic attention comes with foreign weights
        }
    )


def _rename(key: str) -> str:
    """One foreign name -> ours: wrappers off, stages and perceptron layers by our names."""
    key = bare(key, _WRAPPERS)
    for stage in range(4):
        if key.startswith(f"layers.{stage}."):
            key = f"layers{stage + 1}.0." + key.removeprefix(f"layers.{stage}.")
    return key.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")
