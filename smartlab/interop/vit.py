"""Vision transformer weights to and from others: public MAE weights in, MONAI's own ViT out.

In: files with the names of the published MAE ViT, with or without its decoder, which is left behind. They were
trained on colour pictures, standardised by ImageNet's means and spreads. Grey images need one channel: the three
kernels are summed, with that standardisation folded into weights and bias, so that a grey image in [0, 1] gives
exactly what the same image as standardised colour gave. The number of heads is not in a file: 64 channels per head,
except for the published sizes in `HEADS`, or as said.

Out: the layout of `monai.networks.nets.ViT` (conv patches, learned positions, with its class token), equal in
function up to the epsilon of layer norm (1e-6 here, 1e-5 there).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from smartlab.core.config import Config, load_config
from smartlab.core.errors import DataError, UseError
from smartlab.interop.files import bare
from smartlab.models.vit import ViTEncoder

HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}  # by channels, of the published sizes
MEANS, SPREADS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_WRAPPERS = ("module.", "_orig_mod.", "student.", "teacher.", "model.", "encoder.", "backbone.")
_LEFT_BEHIND = ("decoder_", "mask_token", "head.", "fc_norm.")


def is_vit(weights: Mapping[str, Tensor]) -> bool:
    """Whether these are the names of a vision transformer as MAE has them."""
    names = {bare(key, _WRAPPERS) for key in weights}
    return {"cls_token", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} <= names


def convert_vit(weights: Mapping[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Foreign ViT weights -> ours: wrappers off, decoder and heads left behind, colour folded to grey."""
    named = {bare(k, _WRAPPERS): v for k, v in weights.items()}
    kept = {k: v for k, v in named.items() if not k.startswith(_LEFT_BEHIND)}
    kernel = kept.get("patch_embed.proj.weight")
    if kernel is None or kernel.dim() != 4 or kernel.shape[1] not in (1, 3):
        raise DataError(
            "has a patch embedding for other images",
            path=path,
            found="none" if kernel is None else f"shape {tuple(kernel.shape)}",
            expected="(channels, 1 or 3, patch, patch)",
        )
    if kernel.shape[1] == 3:
        mean, spread = torch.tensor(MEANS).view(3, 1, 1), torch.tensor(SPREADS).view(3, 1, 1)
        bias = kept.get("patch_embed.proj.bias", torch.zeros(len(kernel)))
        kept["patch_embed.proj.bias"] = bias - (kernel * mean / spread).sum((1, 2, 3))
        kept["patch_embed.proj.weight"] = (kernel / spread).sum(1, keepdim=True)
        warnings.warn(
            f"{path}: patches of three colours summed to one, for grey images in [0, 1] that stand for colour images "
            "standardised as ImageNet's",
            stacklevel=3,
        )
    return kept


def config_of_vit(weights: Mapping[str, Tensor], path: Path, heads: int | None = None) -> Config:
    """The configuration that these tensors have, read off their shapes; `heads` where they cannot tell."""
    kernel = weights["patch_embed.proj.weight"]
    channels, patch = kernel.shape[0], kernel.shape[2]
    places = weights.get("pos_embed")
    side = 0 if places is None else math.isqrt(places.shape[1] - 1)
    if places is None or side**2 != places.shape[1] - 1:
        raise DataError(
            "has positions of no square grid",
            path=path,
            found="no pos_embed" if places is None else f"{places.shape[1]} positions",
            expected="1 for [CLS] and n² for the patches",
        )
    heads = heads or HEADS.get(channels) or (channels // 64 if channels % 64 == 0 else None)
    if heads is None:
        raise UseError(
            f"a ViT of {channels} channels has no usual number of heads", path=path, fix="say it: heads=…"
        )
    hidden = weights.get("blocks.0.mlp.fc1.weight")
    blocks = {key.split(".")[1] for key in weights if key.startswith("blocks.")}
    return load_config(
        {
            "encoder.preset": "custom",
            "encoder.kind": "vit",
            "encoder.in_channels": kernel.shape[1],
            "encoder.patch": patch,
            "encoder.embed_dim": channels,
            "encoder.blocks": len(blocks),
            "encoder.heads": heads,
            "encoder.mlp_ratio": 4.0 if hidden is None else hidden.shape[0] / channels,
            "method.preset": "mae",
            "mae.input": side * patch,
            "data.view": side * patch,
            "data.window": (0.0, 4095.0),
            "data.spacing": 0.25,
        }
    )


def to_monai(encoder: ViTEncoder) -> dict[str, Tensor]:
    """The state dict of a MONAI ViT with the same function; its classification head is not in it.

    >>> net = monai.networks.nets.ViT(1, 224, 16, 768, 3072, 12, 12, "conv", classification=True, spatial_dims=2,
    ...                               qkv_bias=True)
    >>> encoder = ViTEncoder(sl.load_config("miram"))
    >>> net.load_state_dict(to_monai(encoder), strict=False)
    """
    if not encoder.config.flat:
        raise UseError("MONAI has no network of the form of Primus", fix="export to safetensors")
    found = {}
    for key, value in encoder.state_dict().items():
        value = value.detach().cpu().clone()
        if key == "cls_token":
            value = value + encoder.pos_embed[:, :1].cpu()  # MONAI gives the class token no position
        elif key == "pos_embed":
            key, value = "patch_embedding.position_embeddings", value[:, 1:].clone()
        key = key.replace("patch_embed.proj.", "patch_embedding.patch_embeddings.")
        key = key.replace(".attn.proj.", ".attn.out_proj.")
        key = key.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")
        found[key] = value
    return found
