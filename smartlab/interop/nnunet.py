"""A Primus as nnU-Net fine-tunes it.

The form is that of nnssl, whose checkpoints nnU-Net's `nnUNetv2_preprocess_like_nnssl` and `nnUNetv2_train_pretrained
-tr PretrainedTrainer_Primusx` read: tensors by nnU-Net's names and an adaptation plan that says how to build the
network, and at which voxel size and view it learned. [CLS], registers and the mask token have no place there and
stay behind.

nnU-Net takes less from the plan than we put in it: it always standardises each image by its own mean and spread,
and gives axes as (z, y, x) in whatever orientation the file has. Our encoders saw a window of HU scaled to [0, 1],
on RAS+ (x, y, z). `fit_plans` says that in nnU-Net's own terms, in a second plans file.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from smartlab.core.errors import DataError, UseError
from smartlab.core.files import write_text
from smartlab.data.images.grid import in_mm
from smartlab.models.encoder import AnyEncoder
from smartlab.models.vit import ViTEncoder
from smartlab.training.checkpoint import load_pickled

STEM, ENCODER = "down_projection", "eva"
# by channels, blocks and heads
NAMED = {(396, 12, 6): "S", (792, 12, 12): "B", (864, 16, 12): "M", (1056, 24, 16): "L"}
MLP_RATIO = 4 * 2 / 3  # nnU-Net builds no other
RESAMPLING = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
INTENSITIES = "foreground_intensity_properties_per_channel"
CITATION = "Wald et al. (2025). Primus: enforcing attention usage for 3D medical image segmentation. arXiv:2503.01835"


def to_nnunet(encoder: AnyEncoder) -> dict[str, Any]:
    """What nnU-Net's fine-tuning reads: `network_weights` and `nnssl_adaptation_plan`; plain values and tensors.

    >>> torch.save(to_nnunet(ViTEncoder(sl.load_config("primus-tiny"))), "encoder.pth")
    """
    if not isinstance(encoder, ViTEncoder) or encoder.style is None:
        images = encoder.config.encoder.dims == 2
        kind = "a vision transformer of images" if images else "a Swin transformer"
        fix = "export with --to monai" + ("" if images else ", or pretrain a Primus: encoder.preset=primus-s")
        raise UseError("nnU-Net fine-tunes Primus encoders", found=kind, fix=fix)
    if encoder.config.data.modality == "MR":
        raise UseError(
            "nnU-Net would clip MR at the window of ours, which is on another scale",
            found="an encoder of MR",
            expected="one of CT",
        )
    if isinstance(encoder.config.data.spacing, tuple):
        raise UseError(
            "nnU-Net's plan is written for one voxel size", found=in_mm(encoder.config.data.spacing) + " mm"
        )
    if abs(encoder.config.encoder.mlp_ratio - MLP_RATIO) > 1e-6:
        ratio = encoder.config.encoder.mlp_ratio
        raise UseError("nnU-Net builds Primus with encoder.mlp_ratio=8/3 only", found=ratio)
    weights, left = {}, []
    for key, value in encoder.state_dict().items():
        if key.startswith((f"{STEM}.", f"{ENCODER}.")):
            weights[key] = value.detach().cpu().clone()
        else:
            left.append(key.split(".")[0])
    if extra := [name for name in ("cls_token", "register_tokens") if name in left]:
        warnings.warn(
            f"nnU-Net's Primus has no {' and no '.join(extra)}: left behind, patches no longer attend to them",
            stacklevel=3,
        )
    citation = {"type": "Architecture", "name": "Primus", "apa_citations": [CITATION]}
    return {"network_weights": weights, "citations": [citation], "nnssl_adaptation_plan": _plan(encoder)}


def _plan(encoder: ViTEncoder) -> dict[str, Any]:
    """nnssl's AdaptationPlan as it serialises it, and the window as nnU-Net has intensities."""
    e, data = encoder.config.encoder, encoder.config.data
    side, spacing = [encoder.config.input] * 3, [data.spacing * encoder.smaller] * 3
    low, high = data.window
    name = NAMED.get((e.embed_dim, e.blocks, e.heads), "X") if e.patch == 8 else "X"
    learned = {
        "data_identifier": "smartlab",
        "preprocessor_name": "DefaultPreprocessor",
        "spacing_style": "isotropic",
        "normalization_schemes": ["CTNormalization"],
        "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape",
        "resampling_fn_data_kwargs": RESAMPLING,
        "resampling_fn_mask": "resample_data_or_seg_to_shape",
        "resampling_fn_mask_kwargs": RESAMPLING | {"is_seg": True, "order": 1},
        "spacing": spacing,
        "patch_size": side,
    }
    return {
        "architecture_plans": {
            "arch_class_name": f"Primus{name}",
            "arch_kwargs": {
                "embed_dim": e.embed_dim,
                "patch_embed_size": [e.patch] * 3,
                "encoder_eva_depth": e.blocks,
                "encoder_eva_numheads": e.heads,
                "init_values": e.layer_scale,
                "scale_attn_inner": e.inner_norm,
            },
            "arch_kwargs_requiring_import": [],
        },
        "pretrain_plan": {
            "dataset_name": Path(data.manifest).name,
            "plans_name": "smartlab",
            "original_median_spacing_after_transp": spacing,
            "image_reader_writer": "NibabelIOWithReorient",
            "transpose_forward": [2, 1, 0],
            "transpose_backward": [2, 1, 0],
            "experiment_planner_used": "smartlab",
            "configurations": {"isotropic": learned},
        },
        "pretrain_num_input_channels": e.in_channels,
        "recommended_downstream_patchsize": side,
        "key_to_encoder": ENCODER,
        "key_to_stem": STEM,
        "keys_to_in_proj": [f"{STEM}.proj"],
        "key_to_lpe": f"{ENCODER}.pos_embed",
        # clipped to two percentiles, less a mean, over a spread: our window, scaled to [0, 1]
        INTENSITIES: {
            str(channel): {"percentile_00_5": low, "percentile_99_5": high, "mean": low, "std": high - low}
            for channel in range(e.in_channels)
        },
    }


def fit_plans(plans: str | Path, weights: str | Path) -> Path:
    """Beside plans that `nnUNetv2_preprocess_like_nnssl` wrote, the same with the intensities and axes of pretraining.

    plans:   ptPlans__….json in nnU-Net's folder of preprocessed data; its images are NIfTI.
    weights: the export that it was made from.

    The new file is named …___Window; `nnUNetv2_preprocess -plans_name …___Window -c 3d_fullres` makes its data.
    """
    plans, found = Path(plans), load_pickled(Path(weights))
    if not isinstance(found, Mapping) or "nnssl_adaptation_plan" not in found:
        raise DataError("is not an export for nnU-Net", path=weights, fix="smartlab export RUN --to nnunet")
    plan, content = found["nnssl_adaptation_plan"], json.loads(plans.read_text(encoding="utf-8"))
    if "pretrain_info" not in content:
        raise DataError("was not planned from a checkpoint", path=plans, fix="nnUNetv2_preprocess_like_nnssl")
    learned = plan["pretrain_plan"]
    (one,) = content["configurations"].values()
    spacing = [one["spacing"][axis] for axis in content["transpose_backward"]]  # as the file has its axes
    one["spacing"] = [spacing[axis] for axis in learned["transpose_forward"]]
    window = plan[INTENSITIES]
    one["normalization_schemes"] = [
        "CTNormalization" if str(channel) in window else scheme
        for channel, scheme in enumerate(one["normalization_schemes"])
    ]
    one["data_identifier"] = one["data_identifier"].partition("___Norm")[0] + "___Window"
    for key in ("image_reader_writer", "transpose_forward", "transpose_backward"):
        content[key] = learned[key]
    content[INTENSITIES] = content[INTENSITIES] | window
    content["plans_name"] = content["plans_name"].partition("___Norm")[0] + "___Window"
    out = plans.with_name(f"{content['plans_name']}.json")
    write_text(out, json.dumps(content, indent=4))
    return out
