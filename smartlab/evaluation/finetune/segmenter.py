"""The network that segments: MONAI's SwinUNETR around the pretrained Swin, and how it is used on scans."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from monai.inferers import sliding_window_inference
from monai.losses import DiceLoss
from monai.networks.nets import SwinUNETR
from torch import Tensor, nn

from smartlab.core.errors import UseError
from smartlab.data.crops.augment import augment, draw_mirrors, mirror, window
from smartlab.data.crops.loader import CropLoader
from smartlab.evaluation.features.encoders import network_input
from smartlab.evaluation.finetune.draws import ForegroundCrops
from smartlab.interop.wrap import Wrapped
from smartlab.models.encoder import Encoder
from smartlab.training.requests import ranks

ENCODER = "swinViT."  # prefix of the encoder's parameters in SwinUNETR


def build(encoder: Encoder | Wrapped, classes: int, *, pretrained: bool, seed: int) -> SwinUNETR:
    """SwinUNETR of the encoder's shape, with its weights in `swinViT`; the decoder depends on the seed only.

    classes: outputs, background included.
    """
    if isinstance(encoder, Wrapped):
        return _around(encoder, classes, pretrained, seed)
    e = encoder.config.encoder
    if e.embed_dim % 12:
        raise UseError("SwinUNETR needs a multiple of 12 channels", found=f"encoder.embed_dim={e.embed_dim}")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = SwinUNETR(
            in_channels=e.in_channels,
            out_channels=classes,
            patch_size=e.patch,
            depths=e.depths,
            num_heads=e.num_heads,
            window_size=e.window_size,
            qkv_bias=e.qkv_bias,
            mlp_ratio=e.mlp_ratio,
            feature_size=e.embed_dim,
            dropout_path_rate=e.drop_path,
            use_checkpoint=e.checkpointing,
        )
    if pretrained:
        net.swinViT.load_state_dict(encoder.swin.state_dict(), strict=True)
    # convolutions over channels-last memory: a third less time per step on a CPU
    return net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def _around(encoder: Wrapped, classes: int, pretrained: bool, seed: int) -> SwinUNETR:
    """The same around MONAI's own Swin."""
    swin = encoder.swin
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = SwinUNETR(1, classes, feature_size=swin.embed_dim, use_v2=swin.use_v2)
        inner: Any = copy.deepcopy(swin).requires_grad_(True) if pretrained else encoder.fresh().network
        net.swinViT = inner
    return net.to(memory_format=torch.channels_last_3d)  # type: ignore[call-overload]


def loss_of(
    net: nn.Module,
    hu_window: tuple[float, float],
    *,
    weights: np.ndarray | None = None,
    flip: bool = False,
    intensity: float = 0.1,
) -> Callable[[dict[str, Any], torch.Generator], Tensor]:
    """Soft Dice over the whole batch, so that absent structures weigh little, plus cross-entropy.

    weights: (classes,) of the cross-entropy. Without them a structure of few voxels is soon predicted
    nowhere, where soft Dice has no gradient either, and never comes back in a short training.
    """
    overlap = DiceLoss(softmax=True, to_onehot_y=True, include_background=False, batch=True)
    weight = None if weights is None else torch.as_tensor(weights, dtype=torch.float32)

    def loss(batch: dict[str, Any], generator: torch.Generator) -> Tensor:
        x, labels = network_input(window(batch["view"], *hu_window)), batch["labels"]
        if flip:
            mirrors = draw_mirrors(x[:, :1], generator, ranks())  # the same of all channels
            x, labels = mirror(x, mirrors), mirror(labels, mirrors[:, 0])
        x = augment(x, generator, flip=False, intensity=intensity, shard=ranks())
        logits = net(x.contiguous(memory_format=torch.channels_last_3d))
        of_voxels = F.cross_entropy(
            logits.float(), labels.long(), weight=None if weight is None else weight.to(logits.device)
        )
        return overlap(logits.float(), labels[:, None]) + of_voxels

    return loss


def score_of(
    net: nn.Module,
    crops: ForegroundCrops,
    classes: int,
    hu_window: tuple[float, float],
    device: torch.device,
    precision: str,
) -> Callable[[], float]:
    """Mean Dice over structures, each over all voxels of fixed validation crops together."""

    def score() -> float:
        hits, total = torch.zeros(classes), torch.zeros(classes)
        for batch in CropLoader(crops, 1, shuffle=False):
            x = network_input(window(batch["view"].to(device), *hu_window))
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
                said = net(x.contiguous(memory_format=torch.channels_last_3d)).argmax(1).cpu()
            truth = batch["labels"].long()
            hits += torch.bincount(truth[said == truth], minlength=classes)
            total += torch.bincount(truth.flatten(), minlength=classes)
            total += torch.bincount(said.flatten(), minlength=classes)
        seen = total[1:] > 0
        return float((2 * hits[1:][seen] / total[1:][seen]).mean()) if seen.any() else 0.0

    return score


@torch.no_grad()
def probabilities(
    net: nn.Module,
    hu: np.ndarray,
    size: int,
    hu_window: tuple[float, float],
    *,
    overlap: float = 0.5,
    precision: str = "fp32",
) -> np.ndarray:
    """Class probabilities (classes, X, Y, Z) float32 of a scan (X, Y, Z) or (C, X, Y, Z), by sliding windows."""
    device = next(net.parameters()).device
    x = network_input(window(torch.from_numpy(np.ascontiguousarray(hu))[None].to(device), *hu_window))

    def predict(part: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            return net(part.contiguous(memory_format=torch.channels_last_3d)).float().softmax(1)

    # windows are blended as probabilities; outside the scan is air, which the window maps to 0
    result: Any = sliding_window_inference(
        x, (size,) * 3, 1, predict, overlap=overlap, mode="gaussian", device=torch.device("cpu")
    )
    return result[0].numpy()


def class_weights(counts: np.ndarray) -> np.ndarray:
    """Weights of classes from their voxels: one over the square root of the frequency, 1 on average.

    A structure of a thousandth of the voxels of another weighs 32 times as much per voxel, and 1/32 in all.
    """
    share = np.maximum(counts, 1) / np.maximum(counts, 1).sum()
    weights = share**-0.5
    return weights / (share * weights).sum()


def class_table(values: Sequence[int]) -> np.ndarray:
    """(256,) uint8: value in the label volumes -> class 1, 2, … in the order of `values`; 0 for others."""
    table = np.zeros(256, np.uint8)
    table[list(values)] = np.arange(1, len(values) + 1)
    return table
