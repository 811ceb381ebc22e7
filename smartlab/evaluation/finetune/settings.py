"""How to fine-tune: steps, learning rates, ways to start; and what is wrong with what was asked for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from smartlab.core.errors import UseError, misfit
from smartlab.core.settings import TrainConfig
from smartlab.models.encoder import AnyEncoder
from smartlab.training.requests import ranks

Mode = Literal["full", "frozen", "scratch"]
MODES: tuple[Mode, ...] = ("full", "frozen", "scratch")


class Settings(BaseModel):
    """How to fine-tune. Defaults suit a small network and tens of patients."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    steps: int = Field(300, ge=1)
    batch: int = Field(2, ge=1)  # per process
    accumulate: int = Field(1, ge=1)  # batches per step
    lr: float = Field(1e-3, gt=0)  # of the head; the encoder's layers by layer_decay
    lr_end: float = Field(1e-6, ge=0)
    warmup: float = Field(0.05, ge=0, lt=1)  # share of the steps
    layer_decay: float = Field(0.75, gt=0, le=1)  # learning rate of a layer over that of the next
    head_only: float = Field(0.1, ge=0, lt=1)  # share of the steps before the encoder is trained too
    weight_decay: float = Field(0.05, ge=0)
    clip: float = Field(1.0, gt=0)  # gradient norm
    validate_every: int = Field(50, ge=1)
    patience: int = Field(5, ge=1)  # looks at the validation score without a better one
    checkpoint_every: int = Field(50, ge=1)
    precision: Literal["fp32", "bf16"] = "fp32"
    device: str | None = None  # None: the GPU where there is one
    workers: int = Field(0, ge=0)

    @property
    def items(self) -> int:
        """What all steps of all processes read."""
        return self.steps * self.batch * self.accumulate * ranks()[1]

    @property
    def train(self) -> TrainConfig:
        """The same as the loop takes it; a loss that is no number ends a fine-tuning at once."""
        own = self.model_dump(include=TrainConfig.model_fields.keys() & Settings.model_fields.keys())
        return TrainConfig(**own | {"lr_times": "one", "keep_last": 2, "max_bad_steps": 1})


def make_settings(**given: Any) -> Settings:
    """Settings from keywords; what is wrong with them is said at once."""
    try:
        return Settings(**given)
    except ValidationError as error:
        expected = f"settings {', '.join(Settings.model_fields)}"
        raise misfit("fine-tuning setting ", error, expected=expected) from None


def check_modes(modes: Sequence[str], size: int, encoder: AnyEncoder) -> None:
    """Refuse unknown ways to start, and crops that the encoder cannot take."""
    if not modes or set(modes) - set(MODES) or len(set(modes)) < len(modes):
        raise UseError("unknown or repeated modes", found=list(modes), expected=f"some of {', '.join(MODES)}")
    stride = encoder.total
    if size % stride or size < stride:
        raise UseError(f"crops of {size} voxels", expected=f"a multiple of the encoder's stride {stride}")


def check_fractions(fractions: Sequence[float]) -> None:
    if not fractions or not all(0 < f <= 1 for f in fractions) or len(set(fractions)) < len(fractions):
        raise UseError(
            "fractions of the training patients", found=fractions, expected="each above 0, up to 1"
        )
