"""Every knob of smartlab: the models of the configuration, their defaults and what must hold between them.

Where a number comes from is marked as in the papers' notes: [abs] abstracts, [smit] published SMIT
code, [attmask] published AttMask code, [mhub] the group's published lung-tumour model, [ours]
chosen here. An [ours] value is never the papers'. How a configuration is put together from presets,
files and overrides is in `config.py`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

EncoderPreset = Literal["tiny", "smit", "smart", "swinunetr", "custom"]
MethodPreset = Literal["simmim", "smit", "smart", "dagman", "custom"]
Strategy = Literal["random", "block", "attention_high", "attention_hint", "attention_low", "attention_sample"]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class DataConfig(_Section):
    """Which scans, and how views are drawn from them."""

    manifest: str = "phantom-ct"
    root: str | None = None  # folder of the raw images; None: the cache (phantoms are made there)
    store: str | None = None  # folder of the built store; None: beside the root
    workers: int = Field(2, ge=0)
    spacing: float = Field(2.0, gt=0)  # mm, isotropic [smit]
    window: tuple[float, float] = (-175.0, 250.0)  # HU clipped and scaled to [0, 1] [smit]; lungs: -1000, 400
    region: int = Field(128, gt=0)  # voxels; two views are drawn from one region [smit]
    view: int = Field(96, gt=0)  # voxels per side of a view [smit]
    min_overlap: float = Field(0.25, ge=0, le=1)  # of a view's volume, shared by the two views [ours]
    flip: bool = True  # random mirror along each axis [ours]
    intensity: float = Field(0.1, ge=0, le=1)  # random scale and shift after windowing [ours]
    phantom_cases: int | None = Field(None, ge=1)  # phantoms only: take the first n patients

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.view > self.region:
            raise ValueError(f"data.view={self.view} does not fit into data.region={self.region}")
        if self.window[0] >= self.window[1]:
            raise ValueError(f"data.window={list(self.window)}: the lower bound must be below the upper one")
        return self


class EncoderConfig(_Section):
    """3D Swin transformer in the layout of MONAI's SwinUNETR."""

    preset: EncoderPreset = "tiny"
    in_channels: int = Field(1, ge=1)
    patch: int = Field(2, ge=1)  # voxels per token side before the first stage
    embed_dim: int = Field(12, ge=1)
    depths: tuple[int, int, int, int] = (1, 1, 2, 1)
    num_heads: tuple[int, int, int, int] = (1, 2, 4, 8)
    window_size: int = Field(4, ge=1)
    qkv_bias: bool = True
    mlp_ratio: float = Field(4.0, gt=0)
    drop_path: float = Field(0.0, ge=0, lt=1)
    checkpointing: bool = False  # recompute activations in backward: less memory, more time

    @model_validator(mode="after")
    def _check(self) -> EncoderConfig:
        for stage, heads in enumerate(self.num_heads):
            channels = self.embed_dim * 2**stage
            if channels % heads:
                raise ValueError(
                    f"stage {stage + 1} has encoder.embed_dim × 2^{stage} = {self.embed_dim} × {2**stage} = "
                    f"{channels} channels, which {heads} heads do not divide"
                )
        return self

    def stride(self, stage: int) -> int:
        """Voxels per token side at the output of stage 0 (embedding) to 4."""
        return self.patch * 2**stage


class SemanticConfig(_Section):
    """[CLS] attention over the tokens of one stage, one token per mask unit."""

    enabled: bool = True
    kind: Literal["full", "class"] = "full"  # all tokens attend, or only [CLS] does (CaiT)
    stride: Literal[8, 16] = 16  # voxels per semantic token
    blocks: int = Field(2, ge=1)  # [ours]
    heads: int = Field(4, ge=1)  # [ours]
    similarity: Literal["dot", "cosine"] = (
        "dot"  # cosine: learned scale per head, selective from the start [ours]
    )
    position: bool = True  # off: attention by content alone [ours]
    registers: int = Field(0, ge=0)  # tokens to attend to when a head looks for nothing [ours]


class MaskConfig(_Section):
    """Which units are hidden from the student."""

    strategy: Strategy = "random"
    unit: Literal[8, 16] = 16  # voxels; always the semantic stride
    ratio: float = Field(0.7, gt=0, lt=1)  # [smit]
    p_attention: float = Field(1.0, ge=0, le=1)  # share of samples masked by attention [ours]; AttMask 0.5
    warmup_epochs: float = Field(0.0, ge=0)  # random masks first: a new teacher's attention means nothing
    informativeness: float = Field(
        0.01, ge=0, le=1
    )  # random masks until attention is this informative [ours]
    importance: Literal["cls", "received"] = (
        "cls"  # the [CLS] row, or attention received from all tokens [ours]
    )
    hint: float = Field(0.1, ge=0, le=1)  # share of the top units revealed by attention_hint [attmask]
    temperature: float = Field(1.0, gt=0)  # of attention_sample [ours]


class TeacherConfig(_Section):
    """The exponential moving average of the student that looks at the whole, noisy view."""

    enabled: bool = True
    patch_dropout: float = Field(
        0.0, ge=0, lt=1
    )  # share of the teacher's input patches dropped [abs: that it is]
    dropout_unit: Literal["token", "mask_unit"] = "mask_unit"
    noise_std: float = Field(0.0, ge=0)  # extra Gaussian noise on the windowed input [ours]
    momentum: float = Field(
        0.996, ge=0, le=1
    )  # start; a cosine over all steps takes it to momentum_end [smit]
    momentum_end: float = Field(1.0, ge=0, le=1)
    temperature: float = Field(0.07, gt=0)  # [smit]
    temperature_start: float = Field(0.04, gt=0)
    temperature_epochs: float = Field(30, ge=0)  # [smit]


class DistillConfig(_Section):
    """How student tokens are compared with teacher tokens."""

    kind: Literal["prototype", "regression"] = "prototype"
    assignment: Literal["centre", "sinkhorn"] = "centre"  # prototypes only
    prototypes: int = Field(8192, ge=2)  # K [smit]
    hidden: int = Field(2048, ge=1)  # [smit]
    bottleneck: int = Field(256, ge=1)  # [smit]
    share_heads: bool = False  # one head for patch and image tokens
    student_temperature: float = Field(0.1, gt=0)  # [smit]
    centre_momentum: float = Field(0.9, ge=0, lt=1)  # [smit], averaged over all ranks
    freeze_last_epochs: float = Field(1.0, ge=0)  # [smit]
    cross_view: bool = True  # [CLS] of one view against the other view's
    standardise: bool = (
        False  # image tokens by running mean and spread before the heads: small batches [ours]
    )


class LossConfig(_Section):
    """Weights of the terms: L = amip + patch·AMPD + image·ITD + coarse·(coarse view from [CLS] alone)."""

    amip: float = Field(1.0, ge=0)
    patch: float = Field(0.1, ge=0)  # λ1 [smit]
    image: float = Field(0.1, ge=0)  # λ2 [smit]
    coarse: float = Field(0.0, ge=0)  # auxiliary [ours]


class MethodConfig(_Section):
    """A name for a set of settings: SimMIM, SMIT, SMART or DAGMaN."""

    preset: MethodPreset = "dagman"


class TrainConfig(_Section):
    """The optimisation, and what is saved when."""

    steps: int = Field(300, ge=1)
    batch: int = Field(2, ge=1)  # scans per process and step; each gives two views
    accumulate: int = Field(1, ge=1)
    steps_per_epoch: int | None = Field(None, ge=1)  # None: one pass over the store
    lr: float = Field(1e-4, gt=0)  # times the global batch [smit]
    lr_end: float = Field(1e-6, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)  # share of the steps [ours]
    weight_decay: float = Field(0.04, ge=0)  # cosine to weight_decay_end [attmask]
    weight_decay_end: float = Field(0.4, ge=0)
    clip: float = Field(3.0, gt=0)  # gradient norm [attmask]
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False
    sharding: Literal["ddp", "fsdp"] = "ddp"
    checkpoint_every: int = Field(100, ge=1)
    keep_last: int = Field(2, ge=1)
    keep_every: int | None = Field(None, ge=1)
    log_every: int = Field(10, ge=1)
    picture_every: int = Field(100, ge=1)
    max_bad_steps: int = Field(10, ge=1)  # non-finite losses in a row before the run stops


class Config(_Section):
    """The whole configuration. Fields are reached by dotted keys: `mask.ratio`, `train.steps`."""

    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()
    encoder: EncoderConfig = EncoderConfig()
    method: MethodConfig = MethodConfig()
    semantic: SemanticConfig = SemanticConfig()
    mask: MaskConfig = MaskConfig()
    teacher: TeacherConfig = TeacherConfig()
    distill: DistillConfig = DistillConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        stage_strides = [self.encoder.stride(stage) for stage in range(5)]
        if self.mask.unit != self.semantic.stride:
            raise ValueError(
                f"mask.unit={self.mask.unit} but semantic.stride={self.semantic.stride}: there must be exactly one "
                f"semantic token per mask unit, so both must be {self.semantic.stride} or both {self.mask.unit}"
            )
        if self.semantic.stride not in stage_strides:
            raise ValueError(
                f"semantic.stride={self.semantic.stride} is none of the encoder's strides {stage_strides}"
            )
        total = stage_strides[-1]
        if self.data.view % total:
            below = self.data.view // total * total
            raise ValueError(
                f"data.view={self.data.view} is not divisible by the encoder's total stride encoder.patch × 2^4 = "
                f"{self.encoder.patch} × 16 = {total} ({self.data.view} = {self.data.view // total} × {total} + "
                f"{self.data.view % total}); use {' or '.join(str(n) for n in (below, below + total) if n)}"
            )
        self._check_method()
        return self

    def _check_method(self) -> None:
        channels = self.encoder.embed_dim * self.semantic.stride // self.encoder.patch
        if self.semantic.enabled and channels % self.semantic.heads:
            raise ValueError(
                f"semantic tokens have encoder.embed_dim × {self.semantic.stride // self.encoder.patch} = {channels} "
                f"channels, which semantic.heads={self.semantic.heads} does not divide"
            )
        if self.mask.strategy.startswith("attention") and not (
            self.semantic.enabled and self.teacher.enabled
        ):
            off = "teacher.enabled" if self.semantic.enabled else "semantic.enabled"
            raise ValueError(
                f"mask.strategy={self.mask.strategy} needs the teacher's [CLS] attention, but {off}=false"
            )
        if self.mask.importance == "received" and self.semantic.kind == "class":
            raise ValueError(
                "mask.importance=received needs semantic.kind=full: with class attention only [CLS] attends"
            )
        if self.semantic.enabled and not (self.loss.patch or self.loss.image or self.loss.coarse):
            raise ValueError(
                "nothing would train the semantic attention: set loss.patch, loss.image or loss.coarse, "
                "or semantic.enabled=false"
            )
        if not self.teacher.enabled and (self.loss.patch or self.loss.image):
            raise ValueError(
                "loss.patch and loss.image need a teacher; set both to 0 or teacher.enabled=true"
            )
        if not (self.loss.amip or self.loss.patch or self.loss.image):
            raise ValueError("every loss weight is 0: there is nothing to train on")
        if self.teacher.momentum > self.teacher.momentum_end:
            raise ValueError(
                f"teacher.momentum={self.teacher.momentum} must not exceed teacher.momentum_end={self.teacher.momentum_end}"
            )

    def save(self, path: str | Path) -> Path:
        """Write the resolved configuration (every value) as YAML."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False), encoding="utf-8")
        os.replace(temporary, path)
        return path
