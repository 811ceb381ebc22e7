"""The encoder that a configuration describes."""

from __future__ import annotations

from smartlab.core.config import Config
from smartlab.models.encoder import Encoder
from smartlab.models.vit import ViTEncoder


def make_encoder(config: Config) -> Encoder | ViTEncoder:
    """With fresh weights: a Swin transformer for scans, or a vision transformer for images or scans."""
    return ViTEncoder(config) if config.encoder.kind == "vit" else Encoder(config)
