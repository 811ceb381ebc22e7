"""Other people's encoders by name: MONAI's network for each, weights by their published names, and what it was trained to see.

`LAYOUTS` says where each number comes from; [ours] marks what is not published. Two things are not in any file:

- MONAI before 1.5 merged patches with two corners twice (issue 4757: kept so for the sake of weights). All
  published Swin weights below were trained so, and compute something else in MONAI's network of today; here they
  get the merging that they were trained with, and `merging="monai"` that of today.
- MedicalNet's ResNets have dilated convolutions in their last two layers instead of strides (med3d/models/resnet.py);
  MONAI's ResNet takes their weights, and here their dilations too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from monai.networks.nets import ResNetFeatures
from monai.networks.nets.resnet import ResNet, get_inplanes, resnet_params
from monai.networks.nets.segresnet_ds import SegResEncoder
from monai.networks.nets.swin_unetr import PatchMergingV2, SwinTransformer
from torch import Tensor, nn

from smartlab.core.errors import UseError, one_of
from smartlab.interop import hub
from smartlab.interop.files import bare, load_whole, read_weights
from smartlab.interop.swin import ENCODERS, MERGE_ORDERS, Corner
from smartlab.interop.wrap import Preprocessing, Wrapped

Weights = Mapping[str, Tensor]
_WRAPPERS = (
    "module.",
    "_orig_mod.",
    "model.",
    "net.",
    "backbone.",
    "trunk.",
    "encoder.",
    "swinViT.",
    "swin_vit.",
)
_RESNET = ("conv1.", "bn1.", *(f"layer{i}." for i in (1, 2, 3, 4)))


@dataclass(frozen=True)
class Layout:
    """One published encoder, or several of one form.

    build: a network of the size that the tensors have, with new weights.
    parts: how names of the encoder begin, wrappers off; the rest of a file, heads and decoders, is left behind.
    file:  its name on the hub, where there is one.
    """

    build: Callable[..., nn.Module]
    parts: tuple[str, ...]
    sees: Preprocessing
    source: str
    file: str = ""


class Merging(PatchMergingV2):
    """MONAI's patch merging with the corners of a cell in any order, even twice."""

    def __init__(self, *args: Any, corners: tuple[Corner, ...], **more: Any) -> None:
        super().__init__(*args, **more)
        self.corners = corners

    def forward(self, x: Tensor) -> Tensor:
        d, h, w = (n % 2 for n in x.shape[1:4])
        x = F.pad(x, (0, 0, 0, w, 0, h, 0, d))
        return self.reduction(self.norm(torch.cat([x[:, i::2, j::2, k::2] for i, j, k in self.corners], -1)))


class WideResNet(ResNetFeatures):
    """MONAI's ResNet-50 with twice the channels, giving the map of every layer."""

    def __init__(self, first: int) -> None:
        sizes: Any = [first * n // 64 for n in get_inplanes()]
        ResNet.__init__(self, "bottleneck", [3, 4, 6, 3], sizes, 3, 1, conv1_t_stride=2, feed_forward=False)


def _swin(weights: Weights, merging: str | None) -> nn.Module:
    """SwinUNETR's encoder at its published depths, in any width; with convolutions before the stages if they are there."""
    one_of("no merging order", merging := merging or "duplicated", MERGE_ORDERS)
    return SwinTransformer(
        1,
        _first(weights, "patch_embed.proj.weight", 48),
        window_size=(7, 7, 7),
        patch_size=(2, 2, 2),
        depths=(2, 2, 2, 2),
        num_heads=(3, 6, 12, 24),
        use_v2=any(key.startswith("layers1c.") for key in weights),
        downsample=partial(Merging, corners=MERGE_ORDERS[merging]),
    )


def _segres(weights: Weights, merging: str | None) -> nn.Module:
    return SegResEncoder(init_filters=_first(weights, "conv_init.weight", 32), blocks_down=(1, 2, 2, 4, 4))


def _wide(weights: Weights, merging: str | None) -> nn.Module:
    return WideResNet(_first(weights, "conv1.weight", 128))


def _medicalnet(weights: Weights, merging: str | None) -> nn.Module:
    """The depth is read off the blocks that there are; what cannot be told becomes a ResNet-50."""
    names = [{key.split(".")[1] for key in weights if key.startswith(f"layer{i}.")} for i in (1, 2, 3, 4)]
    block = "bottleneck" if "layer1.0.conv3.weight" in weights else "basic"
    sizes = block, [len(found) for found in names]
    name = next((name for name, known in resnet_params.items() if known[:2] == sizes), "resnet50")
    net: Any = ResNetFeatures(name, pretrained=False, spatial_dims=3, in_channels=1)
    for layer, dilation in ((net.layer3, 2), (net.layer4, 4)):
        for part in layer.modules():
            if isinstance(part, nn.Conv3d):
                wide = dilation if part.kernel_size == (3, 3, 3) else 1
                part.stride, part.dilation = (1, 1, 1), (wide,) * 3
                part.padding = (wide if wide > 1 else 0,) * 3
            elif isinstance(getattr(part, "downsample", None), partial):
                part.downsample = partial(part.downsample, stride=1)
    return net


def _first(weights: Weights, key: str, usual: int) -> int:
    """Channels of a first layer; the published ones where it is not in the file, for the table of what is not."""
    return weights[key].shape[0] if key in weights else usual


LAYOUTS = {
    "ct-fm": Layout(
        _segres,
        ("conv_init.", "layers."),
        Preprocessing(spacing=(3.0, 1.0, 1.0), window=(-1024, 2048), orientation="SPL"),
        "Pai et al. 2025, arXiv:2501.09001; project-lighter/CT-FM, experiments/fm: base.yaml, backbones/segresenc.yaml, "
        "frameworks/intrasample_simclr.yaml (crops there 96 × 128 × 128 mm, here a cube of 96 mm [ours])",
        "model.safetensors",
    ),
    "fmcib": Layout(
        _wide,
        _RESNET,
        Preprocessing(spacing=1.0, window=(-1024, 3072), orientation="SPL", size=50),
        "Pai et al. 2024, Nat. Mach. Intell. 6:354; AIM-Harvard/foundation-cancer-image-biomarker, "
        "fmcib/preprocessing/__init__.py, fmcib/models/resnet50.py (weights: zenodo.org/records/10528450)",
    ),
    "medicalnet": Layout(
        _medicalnet,
        _RESNET,
        Preprocessing(spacing=1.0, window=(-1024, 3071), standardise=True, orientation="SPL"),
        "Chen et al. 2019, arXiv:1904.00625; Tencent/MedicalNet, med3d/models/resnet.py; slices first and standardised "
        "as in datasets/brains18.py; spacing, directions, size and the whole range of CT [ours]",
    ),
    "suprem": Layout(
        _swin,
        ENCODERS,
        Preprocessing(spacing=1.5, window=(-175, 250)),
        "Li et al. 2024, ICLR; MrGiovanni/SuPreM, supervised_pretraining/train.py, backbone/swinunetr.py",
        "supervised_suprem_swinunetr_2100.pth",
    ),
    "swinunetr": Layout(
        _swin,
        ENCODERS,
        Preprocessing(spacing=(1.5, 1.5, 2.0), window=(-1000, 1000), size=128),
        "Tang et al. 2022, CVPR; Project-MONAI/research-contributions, SwinUNETR/Pretrain/main.py "
        "(crops there 144 × 144 × 192 mm, here a cube of 192 mm [ours])",
    ),
    "voco": Layout(
        _swin,
        ENCODERS,
        Preprocessing(spacing=1.5, window=(-175, 250), size=64),
        "Wu et al. 2024, CVPR and arXiv:2410.09890; Luffy03/Large-Scale-Medical, Self-supervised/voco_train.py, "
        "models/voco_head.py (abdomen and neck; its chests were seen at −1000 to 500 HU)",
        "VoCo_B_SSL_head.pt",
    ),
}


def load(name: str, place: str, merging: str | None = None) -> Wrapped:
    """The encoder of a layout, with weights from a file or the hub (hf:ORG/NAME or hf:ORG/NAME/FILE)."""
    one_of("no kind of weights", name, LAYOUTS)
    layout = LAYOUTS[name]
    path = hub.download(place, layout.file) if place.startswith(hub.PREFIX) else Path(place)
    if not path.is_file():
        raise UseError("no such file", path=path, expected=f"weights of {name}, or hf:ORG/NAME/FILE")
    if merging is not None and layout.build is not _swin:
        raise UseError(f"{name} merges no patches", found=f"merging={merging!r}")
    every = {_renamed(key): value for key, value in read_weights(path).items()}
    weights = {key: value for key, value in every.items() if key.startswith(layout.parts)} or every
    make = partial(layout.build, {k: torch.empty_like(v, device="meta") for k, v in weights.items()}, merging)
    with torch.random.fork_rng():
        network = make()
    load_whole(network, weights, path)
    return Wrapped(network, layout.sees, name, make)


def _renamed(key: str) -> str:
    return bare(key, _WRAPPERS).replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")
