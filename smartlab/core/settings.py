"""Every knob of smartlab: the sections of the configuration, their defaults and what must hold within them.

Where a number comes from is marked: [paper] the DAGMaN paper, [abs] abstracts, [smit] published SMIT
code, [attmask] published AttMask code, [mhub] the group's published lung-tumour model, [ours]
chosen here. An [ours] value is never the papers'. What must hold between sections is in `config.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Swins = Literal["tiny", "smit", "smart", "swinunetr"]
ViTs = Literal["vit-tiny", "vit-small", "vit-base", "vit-large"]
Primuses = Literal["primus-tiny", "primus-s", "primus-b", "primus-m", "primus-l"]
EncoderPreset = Swins | ViTs | Primuses | Literal["custom"]
MethodPreset = Literal[
    "simmim", "smit", "smart", "dagman", "ibot", "mst", "attmask", "mae", "miram", "custom"
]
AttentionKind = Literal["softmax", "nystrom", "linformer", "performer"]
Strategy = Literal["random", "block", "attention_high", "attention_hint", "attention_low", "attention_sample"]
Count = Annotated[int, Field(ge=1)]
Length = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, allow_inf_nan=False)


class DataConfig(Section):
    """Which scans, and how views are drawn from them."""

    manifest: str = "phantom-ct"
    root: str | None = None  # folder of the raw images; None: the cache (phantoms are made there)
    store: str | None = None  # folder of the built store; None: beside the root
    workers: int = Field(2, ge=0)
    spacing: Length | tuple[Length, Length, Length] = 2.0  # mm, of all axes [smit], or along x, y and z
    modality: Literal["CT", "MR"] = "CT"  # of scans: as the manifest says
    channels: tuple[str, ...] = ()  # their names in order, where a scan has several: as the manifest says
    window: tuple[float, float] = (-175.0, 250.0)  # HU clipped and scaled to [0, 1] [smit]; lungs: -1000, 400
    region: int = Field(128, gt=0)  # voxels; two views are drawn from one region [smit]
    view: int = Field(96, gt=0)  # voxels per side of a view [smit]
    min_overlap: float = Field(0.25, ge=0, le=1)  # of a view's volume, shared by the two views [ours]
    flip: bool = True  # random mirror along each axis [ours]
    intensity: float = Field(0.1, ge=0, le=1)  # random scale and shift after windowing [ours]
    grey: Literal["voi", "percentile"] = "voi"  # mammograms: the file's window, or percentiles of the breast
    crop: Literal["lesion", "image", "random"] = "lesion"  # mammograms: what a view shows [abs: lesions]
    margin: float = Field(0.5, ge=0)  # mammograms: context on each side of a lesion, in its sizes [ours]
    phantom_cases: int | None = Field(None, ge=1)  # phantoms only: take the first n patients

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.window[0] >= self.window[1]:
            raise ValueError(f"data.window={list(self.window)}: the lower bound must be below the upper one")
        return self


class EncoderConfig(Section):
    """3D Swin transformer in the layout of MONAI's SwinUNETR, or vision transformer in that of MAE or Primus."""

    preset: EncoderPreset = "tiny"
    kind: Literal["swin", "vit"] = "swin"
    layout: Literal["mae", "primus"] = "mae"  # ViT: MAE's, of images, or nnU-Net's Primus, of scans
    in_channels: int = Field(1, ge=1)  # where it is not given, as many as the manifest has
    patch: int = Field(2, ge=1)  # voxels per token side before the first stage
    embed_dim: int = Field(12, ge=1)
    blocks: int = Field(4, ge=1)  # ViT: transformer blocks
    heads: int = Field(4, ge=1)  # ViT: of every block
    cls_token: bool = True  # Primus: its own [CLS], whose attention guides masks [ours]
    registers: int = Field(0, ge=0)  # Primus: tokens to attend to when a head looks for nothing
    layer_scale: float | None = None  # Primus: where learned scales of branches start; None: without
    inner_norm: bool = False  # Primus: a norm behind attention
    depths: tuple[Count, Count, Count, Count] = (1, 1, 2, 1)
    num_heads: tuple[Count, Count, Count, Count] = (1, 2, 4, 8)
    window_size: int = Field(4, ge=1)
    qkv_bias: bool = True
    mlp_ratio: float = Field(4.0, gt=0)
    drop_path: float = Field(0.0, ge=0, lt=1)
    checkpointing: bool = False  # recompute activations in backward: less memory, more time

    @model_validator(mode="after")
    def _check(self) -> EncoderConfig:
        if self.kind == "vit" and self.layout == "primus":
            if self.embed_dim % (6 * self.heads):
                raise ValueError(
                    f"encoder.embed_dim={self.embed_dim} must be divisible by 6 × encoder.heads = 6 × {self.heads} (pairs "
                    "of channels turned along three axes)"
                )
            return self
        off = self.cls_token and not (self.registers or self.layer_scale is not None or self.inner_norm)
        if not off:
            raise ValueError(
                "encoder.cls_token, encoder.registers, encoder.layer_scale and encoder.inner_norm are of a ViT with "
                f"encoder.layout=primus, found encoder.kind={self.kind}, encoder.layout={self.layout}: leave them out"
            )
        if self.kind == "vit":
            if self.embed_dim % self.heads or self.embed_dim % 4:
                raise ValueError(
                    f"encoder.embed_dim={self.embed_dim} must be divisible by encoder.heads={self.heads} and by 4 "
                    "(sine and cosine of rows and columns)"
                )
            return self
        for stage, heads in enumerate(self.num_heads):
            channels = self.embed_dim * 2**stage
            if channels % heads:
                raise ValueError(
                    f"stage {stage + 1} has encoder.embed_dim × 2^{stage} = {self.embed_dim} × {2**stage} = "
                    f"{channels} channels, which {heads} heads do not divide"
                )
        return self

    @property
    def dims(self) -> int:
        """2 of images, 3 of scans."""
        return 2 if self.kind == "vit" and self.layout == "mae" else 3

    def stride(self, stage: int) -> int:
        """Voxels per token side at the output of stage 0 (embedding) to 4; a ViT has one stride."""
        return self.patch if self.kind == "vit" else self.patch * 2**stage


class SemanticConfig(Section):
    """[CLS] attention over the tokens of one stage, a side branch; one token per mask unit."""

    enabled: bool = True
    # behind which it looks [paper]; the mask unit, and the tokens that AMPD matches, go with it [ours]
    stage: int = Field(3, ge=1, le=4)
    kind: Literal["full", "class"] = "full"  # all tokens attend [paper], or only [CLS] does (CaiT)
    blocks: int = Field(2, ge=1)  # [paper]
    heads: int = Field(4, ge=1)  # [ours]
    similarity: Literal["dot", "cosine"] = (
        "dot"  # cosine: learned scale per head, selective from the start [ours]
    )
    position: bool = True  # off: attention by content alone [ours]
    registers: int = Field(0, ge=0)  # tokens to attend to when a head looks for nothing [ours]


class MaskConfig(Section):
    """Which units are hidden from the student."""

    strategy: Strategy = "random"
    ratio: float = Field(0.7, gt=0, lt=1)  # [paper]
    ratio_min: float | None = Field(None, gt=0, lt=1)  # the ratio is drawn from here to `ratio` [attmask]
    fill: Literal["zero", "token"] = "zero"  # of hidden tokens: nothing [paper], or a learned one (SimMIM)
    hint: float = Field(0.1, ge=0, le=1)  # share of what is hidden that attention_hint reveals [paper]
    hint_from: Literal["top", "any"] = "top"  # among the ⌈hint·N⌉ most attended [paper], or anywhere
    hint_refill: bool = True  # hide others in place of hints, so that ⌈ratio·N⌉ stay hidden [ours]
    p_attention: float = Field(1.0, ge=0, le=1)  # share of samples masked by the strategy; AttMask 0.5
    otherwise: Literal["random", "unmasked"] = "random"  # the other samples; AttMask leaves them whole
    warmup_epochs: float = Field(0.0, ge=0)  # random masks first: a new teacher's attention means nothing
    # random masks until the running informativeness of attention, fast and slow, is this many times an
    # untrained network's; 0: never wait [ours]
    informativeness: float = Field(0.0, ge=0)
    importance: Literal["cls", "received"] = (
        "cls"  # the [CLS] row [paper], or attention received from all tokens [ours]
    )
    temperature: float = Field(1.0, gt=0)  # of attention_sample [ours]

    def drawing(self) -> dict[str, Any]:
        """What `make_mask` takes by keyword."""
        names = "hint hint_from hint_refill p_attention otherwise ratio_min temperature"
        return {name: getattr(self, name) for name in names.split()}

    @property
    def exact(self) -> bool:
        """Whether every sample hides ⌈ratio·N⌉ units."""
        whole = self.p_attention == 1 or self.otherwise == "random"
        return whole and self.ratio_min is None and (self.hint_refill or self.strategy != "attention_hint")


class StudentConfig(Section):
    """How the student, who sees what masks leave, is encoded.

    sparse: masked units are left out. By Swin until a unit is one token: windows then end at units, which is
    another function than the encoder is used with later. By a ViT of scans to the end, where a decoder fills
    them in (masked autoencoding, whose default it is); of images always.
    """

    encode: Literal["dense", "sparse"] = "dense"  # [ours]


class TeacherConfig(Section):
    """The exponential moving average of the student: it says what to hide, and, noisy, what to predict."""

    enabled: bool = True
    guide: Literal["clean", "noisy"] = "clean"  # whose attention guides masks: undamaged views' [paper]
    patch_dropout: float = Field(0.0, ge=0, lt=1)  # share of the input dropped for the targets; 0.7 [paper]
    dropout_unit: Literal["token", "mask_unit"] = "token"  # of patch tokens [paper], or of whole units
    noise_std: float = Field(0.0, ge=0)  # extra Gaussian noise on the windowed input [ours]
    # start; a cosine over all steps takes it to momentum_end [smit]
    momentum: float = Field(0.996, ge=0, le=1)
    momentum_end: float = Field(1.0, ge=0, le=1)
    temperature: float = Field(0.07, gt=0)  # [smit]
    temperature_start: float = Field(0.04, gt=0)
    temperature_epochs: float = Field(30, ge=0)  # [smit]


class DistillConfig(Section):
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
    patch_from: Literal["stage", "semantic"] = "stage"  # AMPD's tokens: before SA [paper], or behind it
    # by running mean and spread: image tokens before the heads, patch tokens as targets of regression. For
    # small batches [ours]
    standardise: bool = False


class LossConfig(Section):
    """L = amip·AMIP + patch·AMPD + image·AITD + global_image·GITD + coarse·(coarse view from [CLS] alone)."""

    amip: float = Field(1.0, ge=0)  # [paper]
    patch: float = Field(0.1, ge=0)  # [paper]
    image: float = Field(0.1, ge=0)  # [paper]
    global_image: float = Field(0.1, ge=0)  # [paper]
    coarse: float = Field(0.0, ge=0)  # auxiliary [ours]


class MaeConfig(Section):
    """Masked autoencoding of images at one scale (MAE) or several (MIRAM).

    Where a setting is a list, it holds one value for all scales or one per scale, in their order.
    """

    input: int = Field(64, ge=1)  # pixels per side that the encoder sees: the view, made smaller
    scales: tuple[Literal[1, 2, 4], ...] = (1, 2)  # sides of the targets, in inputs [abs: 1 and higher]
    attention: tuple[AttentionKind, ...] = ("softmax", "nystrom")  # of the decoders [abs]
    weights: tuple[float, ...] = (1.0,)  # of the losses [ours]
    depth: tuple[int, ...] = (2,)  # blocks of a decoder [ours]
    width: tuple[int, ...] = (48,)  # channels of a decoder [ours]
    heads: tuple[int, ...] = (4,)  # of a decoder [ours]
    normalise: bool = True  # targets by the mean and spread of their patch
    landmarks: int = Field(64, ge=1)  # nystrom [ours]
    iterations: int = Field(6, ge=1)  # nystrom: of the pseudo-inverse
    kernel: int = Field(33, ge=1)  # nystrom: tokens that the depth-wise convolution sees
    rank: int = Field(64, ge=1)  # linformer [ours]
    features: int = Field(128, ge=1)  # performer [ours]

    @field_validator("attention", "weights", "depth", "width", "heads", "scales", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """One value may stand without brackets."""
        return value if isinstance(value, list | tuple) else (value,)

    @model_validator(mode="after")
    def _check(self) -> MaeConfig:
        if not self.scales or list(self.scales) != sorted(set(self.scales)):
            raise ValueError(f"mae.scales={list(self.scales)}: expected different scales, ascending")
        for name in ("attention", "weights", "depth", "width", "heads"):
            count = len(getattr(self, name))
            if count not in (1, len(self.scales)):
                raise ValueError(
                    f"mae.{name} has {count} values for {len(self.scales)} scales: give one, or one per scale"
                )
        if min(*self.depth, *self.width, *self.heads, 1) < 1 or min(self.weights) < 0:
            raise ValueError("mae.depth, mae.width and mae.heads must be at least 1, mae.weights at least 0")
        if not any(self.weights):
            raise ValueError("every weight in mae.weights is 0: there is nothing to train on")
        for scale in self.decoders():
            if scale.width % scale.heads:
                raise ValueError(f"mae.width={scale.width} must be divisible by mae.heads={scale.heads}")
        if self.kernel % 2 == 0:
            raise ValueError(f"mae.kernel={self.kernel}: a centred convolution needs an odd number")
        return self

    def decoders(self) -> list[Decoding]:
        """The settings of each scale's decoder."""
        lists = (self.attention, self.weights, self.depth, self.width, self.heads)
        full = [values * len(self.scales) if len(values) == 1 else values for values in lists]
        return [Decoding(*values) for values in zip(self.scales, *full, strict=True)]


class Decoding(NamedTuple):
    """One scale of `MaeConfig`."""

    scale: int
    attention: AttentionKind
    weight: float
    depth: int
    width: int
    heads: int


class MethodConfig(Section):
    """A name for a set of settings, and the class that they are settings of."""

    preset: MethodPreset = "dagman"
    family: Literal["masked_distillation", "multiscale_mae"] = "masked_distillation"


class TrainConfig(Section):
    """The optimisation, and what is saved when."""

    steps: int = Field(300, ge=1)
    batch: int = Field(2, ge=1)  # scans per process and step; each gives two views
    accumulate: int = Field(1, ge=1)
    steps_per_epoch: int | None = Field(None, ge=1)  # None: one pass over the store
    lr: float = Field(1e-4, gt=0)  # [smit]
    lr_times: Literal["batch", "one"] = "batch"  # times the global batch [smit], or as it stands
    lr_end: float = Field(1e-6, ge=0)
    warmup: float = Field(0.1, ge=0, lt=1)  # share of the steps [paper]
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
    track: Literal["tensorboard", "wandb", "mlflow", "aim", "none"] = "tensorboard"  # beside metrics.csv
    max_bad_steps: int = Field(10, ge=1)  # non-finite losses in a row before the run stops
