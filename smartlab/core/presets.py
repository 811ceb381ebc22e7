"""What the preset names of encoders and methods stand for, as dotted settings.

The papers' notes give the provenance; the marks are those of `settings.py`.
"""

from __future__ import annotations

from typing import Any

_SWIN: dict[str, Any] = {"encoder.kind": "swin", "encoder.patch": 2}
_VIT: dict[str, Any] = {
    "encoder.kind": "vit",
    "encoder.patch": 16,
    "data.window": (0.0, 4095.0),  # the grey values of mammograms
}
_PRIMUS: dict[str, Any] = {  # Wald et al., "Primus" (2025), as nnU-Net trains it
    "encoder.kind": "vit",
    "encoder.layout": "primus",
    "encoder.patch": 8,
    "encoder.mlp_ratio": 4 * 2 / 3,
    "encoder.layer_scale": 0.1,
    "encoder.inner_norm": True,
    "semantic.enabled": False,  # its own [CLS] looks
}
_DISTILLATION: dict[str, Any] = {"method.family": "masked_distillation"}
_MAE: dict[str, Any] = {  # He et al., "Masked autoencoders are scalable vision learners" (2022)
    "method.family": "multiscale_mae",
    "semantic.enabled": False,
    "teacher.enabled": False,
    "mask.strategy": "random",
    "mask.ratio": 0.75,
    "loss.patch": 0.0,
    "loss.image": 0.0,
    "loss.global_image": 0.0,
    "loss.coarse": 0.0,
}

ENCODERS: dict[str, dict[str, Any]] = {
    "tiny": {**_SWIN},  # the defaults of EncoderConfig: a CPU size for demos and tests [ours]
    "smit": {  # [smit]
        **_SWIN,
        "encoder.embed_dim": 48,
        "encoder.depths": (2, 2, 4, 2),
        "encoder.num_heads": (4, 4, 4, 4),
        "encoder.window_size": 4,
        "encoder.qkv_bias": False,
    },
    "smart": {  # [paper]; bias of q, k and v [mhub]
        **_SWIN,
        "encoder.embed_dim": 48,
        "encoder.depths": (2, 2, 8, 2),
        "encoder.num_heads": (4, 4, 8, 16),
        "encoder.window_size": 4,
        "encoder.qkv_bias": True,
        "encoder.drop_path": 0.1,
    },
    "swinunetr": {  # MONAI's SwinUNETR default, so that weights drop straight in
        **_SWIN,
        "encoder.embed_dim": 48,
        "encoder.depths": (2, 2, 2, 2),
        "encoder.num_heads": (3, 6, 12, 24),
        "encoder.window_size": 7,
        "encoder.qkv_bias": True,
    },
    "vit-tiny": {  # a CPU size for demos and tests [ours]
        **_VIT,
        "encoder.patch": 8,
        "encoder.embed_dim": 96,
        "encoder.blocks": 4,
        "encoder.heads": 4,
    },
    "vit-small": {**_VIT, "encoder.embed_dim": 384, "encoder.blocks": 12, "encoder.heads": 6},
    "vit-base": {**_VIT, "encoder.embed_dim": 768, "encoder.blocks": 12, "encoder.heads": 12},
    "vit-large": {**_VIT, "encoder.embed_dim": 1024, "encoder.blocks": 24, "encoder.heads": 16},
    "primus-tiny": {  # a CPU size for demos and tests [ours]
        **_PRIMUS,
        "encoder.embed_dim": 96,
        "encoder.blocks": 4,
        "encoder.heads": 4,
    },
    "primus-s": {**_PRIMUS, "encoder.embed_dim": 396, "encoder.blocks": 12, "encoder.heads": 6},
    "primus-b": {**_PRIMUS, "encoder.embed_dim": 792, "encoder.blocks": 12, "encoder.heads": 12},
    "primus-m": {**_PRIMUS, "encoder.embed_dim": 864, "encoder.blocks": 16, "encoder.heads": 12},
    "primus-l": {**_PRIMUS, "encoder.embed_dim": 1056, "encoder.blocks": 24, "encoder.heads": 16},
    "custom": {},
}

_DAGMAN: dict[str, Any] = {  # [paper]
    **_DISTILLATION,
    "mask.strategy": "attention_hint",  # guided by the clean teacher's semantic attention
    "teacher.patch_dropout": 0.7,  # of patch tokens, for the targets
}
_IBOT: dict[str, Any] = {  # Zhou et al., "iBOT" (2022): masked and image tokens distilled, no voxels
    **_DISTILLATION,
    "mask.strategy": "block",
    "mask.ratio": 0.5,
    "mask.ratio_min": 0.1,
    "mask.fill": "token",
    "mask.p_attention": 0.5,
    "mask.otherwise": "unmasked",
    "loss.amip": 0.0,
    "loss.patch": 1.0,
    "loss.image": 1.0,
    "loss.global_image": 0.0,
    "loss.coarse": 0.0,
}

METHODS: dict[str, dict[str, Any]] = {
    "simmim": {  # masked prediction alone
        **_DISTILLATION,
        "semantic.enabled": False,
        "teacher.enabled": False,
        "mask.strategy": "random",
        "mask.fill": "token",
        "loss.patch": 0.0,
        "loss.image": 0.0,
        "loss.global_image": 0.0,
        "loss.coarse": 0.0,
    },
    "smit": {  # clean teacher, average-pooled image token
        **_DISTILLATION,
        "semantic.enabled": False,
        "mask.strategy": "random",
        "mask.fill": "token",  # [smit]
        "loss.global_image": 0.0,
        "loss.coarse": 0.0,
    },
    "smart": _DAGMAN,  # two write-ups of one method
    "dagman": _DAGMAN,
    # the paper's other rows
    "ibot": _IBOT,
    "attmask": {**_IBOT, "mask.strategy": "attention_high"},  # Kakogeorgiou et al. (2022); or attention_hint
    "mst": {  # Li et al., "MST" (2021): the least attended are hidden and restored, image tokens distilled
        **_DISTILLATION,
        "mask.strategy": "attention_low",
        "mask.fill": "token",
        "loss.patch": 0.0,
        "loss.image": 1.0,
        "loss.global_image": 0.0,
        "loss.coarse": 0.0,
    },
    "mae": {**_MAE, "mae.scales": (1,), "mae.attention": ("softmax",), "mae.weights": (1.0,)},
    "miram": {  # the image at its own and at a higher resolution, that one by linear attention [abs]
        **_MAE,
        "mae.scales": (1, 2),
        "mae.attention": ("softmax", "nystrom"),
        "mae.weights": (1.0,),
    },
    "custom": {},
}
