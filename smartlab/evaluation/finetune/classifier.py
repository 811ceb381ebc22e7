"""The network that classifies: an encoder and a linear head, its loss, and what its outputs mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from smartlab.data.crops.augment import augment, window
from smartlab.data.crops.loader import CropLoader
from smartlab.data.crops.views import CropDataset
from smartlab.evaluation.features.encoders import network_input
from smartlab.evaluation.finetune.draws import LesionDraws

ENCODER = "encoder."  # prefix of the encoder's parameters in a Classifier
STANDARDISED = 64  # training crops from which the features' mean and spread are taken
LEAST_SPREAD = 0.125  # features are of size one: more gain would make every change of the encoder an upheaval
Measure = Callable[[Tensor, Tensor], Tensor]


class Classifier(nn.Module):
    """An encoder and a linear head on its image token and mean token.

    Windowed crops (B, 1, D, H, W), or images (B, 1, H, W), -> logits (B, outputs). Features are first standardised by the mean
    and spread they had over training crops: what tells crops apart is a few percent of what they
    share, which a new head would take hundreds of steps to look past.
    """

    centre: Tensor
    spread: Tensor

    def __init__(self, encoder: Any, outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        width = 2 * encoder.channels
        self.register_buffer("centre", torch.zeros(width))
        self.register_buffer("spread", torch.ones(width))
        self.head = nn.Linear(width, outputs)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def features(self, x: Tensor) -> Tensor:
        seen = self.encoder(x)
        return torch.cat([seen.cls, seen.tokens.mean(1)], 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.features(x) - self.centre) / self.spread)


def build(encoder: Any, classes: int, *, pretrained: bool, seed: int) -> Classifier:
    """The encoder's weights, or new ones, and a head; what is new depends on the seed only."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = Classifier(encoder.fresh(), classes)
    if pretrained:
        net.encoder.load_state_dict(encoder.state_dict())
    return net


@torch.no_grad()
def standardise(
    net: Classifier,
    draws: LesionDraws,
    hu_window: tuple[float, float],
    seed: int,
    augmentation: dict[str, Any],
) -> None:
    """Measure the features of the first training crops, augmented as in training."""
    device, generator = next(net.parameters()).device, torch.Generator().manual_seed(seed)
    net.eval()
    parts: list[Tensor] = []
    for item in range(min(STANDARDISED, len(draws))):
        x = network_input(window(torch.from_numpy(draws[item]["crop"])[None].to(device), *hu_window))
        parts.append(net.features(augment(x, generator, channels=True, **augmentation)).float())
    features = torch.cat(parts)
    net.centre.copy_(features.mean(0))
    net.spread.copy_(features.std(0, correction=0).clamp(min=LEAST_SPREAD))


@torch.no_grad()
def logits(
    net: nn.Module, crops: CropDataset, hu_window: tuple[float, float], batch: int, precision: str
) -> Tensor:
    """(crops, classes) float32 of the centred crops, not augmented."""
    device = next(net.parameters()).device
    net.eval()
    parts = []
    for items in CropLoader(crops, batch, shuffle=False, drop_last=False):
        x = network_input(window(items["crop"].to(device), *hu_window))
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            parts.append(net(x).float())
    return torch.cat(parts)


def measure_of(kind: str, share: Tensor | None) -> Measure:
    """The loss of (logits, targets (n, classes) 0/1); cases weigh by the `share` of their class, if given."""
    if kind == "multilabel":
        positive = None if share is None else (1 - share) / share.clamp(min=1e-6)
        return lambda said, targets: F.binary_cross_entropy_with_logits(said, targets, pos_weight=positive)
    weight = None if share is None else 1 / (len(share) * share)
    return lambda said, targets: F.cross_entropy(said, targets.argmax(1), weight=weight)


def probability(kind: str, logits: np.ndarray, learned: np.ndarray, real: np.ndarray) -> np.ndarray:
    """(n, classes) probabilities under the `real` class frequencies, from logits learned under others."""
    logits = logits.astype(float)
    if kind == "multilabel":
        return 1 / (1 + np.exp(-(logits + _log_odds(real) - _log_odds(learned))))
    logits = logits + np.log(np.maximum(real, 1e-6)) - np.log(np.maximum(learned, 1e-6))
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _log_odds(p: np.ndarray) -> np.ndarray:
    p = np.clip(p, 1e-6, 1 - 1e-6)
    return np.log(p / (1 - p))
