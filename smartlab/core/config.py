"""The whole configuration: what must hold between its sections (`settings.py`), and how it is put together.

Layers, later ones winning:

1. the defaults of the models;
2. the settings that the `encoder.preset` and `method.preset` of the preset file stand for (`presets.py`);
3. the preset file (`presets/<name>.yaml`) or the user's YAML;
4. an `encoder.preset` or `method.preset` named in the overrides, in place of the file's own;
5. dotted overrides (`{"mask.ratio": 0.5}`, or `mask.ratio=0.5` on the command line).
"""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, model_validator

from smartlab.core.errors import UseError, one_of, problems_of, unknown
from smartlab.core.files import write_text
from smartlab.core.presets import ENCODERS, METHODS
from smartlab.core.settings import (
    DataConfig,
    DistillConfig,
    EncoderConfig,
    LossConfig,
    MaeConfig,
    MaskConfig,
    MethodConfig,
    Section,
    SemanticConfig,
    StudentConfig,
    TeacherConfig,
    TrainConfig,
)

PRESET_FOLDER = Path(__file__).parents[1] / "presets"


class Config(Section):
    """The whole configuration. Fields are reached by dotted keys: `mask.ratio`, `train.steps`."""

    seed: int = Field(0, ge=0)
    data: DataConfig = DataConfig()
    encoder: EncoderConfig = EncoderConfig()
    method: MethodConfig = MethodConfig()
    semantic: SemanticConfig = SemanticConfig()
    mask: MaskConfig = MaskConfig()
    student: StudentConfig = StudentConfig()
    teacher: TeacherConfig = TeacherConfig()
    distill: DistillConfig = DistillConfig()
    loss: LossConfig = LossConfig()
    mae: MaeConfig = MaeConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _check(self) -> Config:
        autoencodes, e = self.method.family == "multiscale_mae", self.encoder
        if (autoencodes and e.kind == "swin") or (self.flat and not autoencodes):
            wanted = "kind=vit" if autoencodes else "kind=swin, or encoder.layout=primus"
            names = (
                "vit-tiny, vit-base, primus-s" if autoencodes else "tiny, smit, smart, swinunetr, primus-s"
            )
            raise ValueError(
                f"method.preset={self.method.preset} needs encoder.{wanted}, found encoder.kind={e.kind}, "
                f"encoder.layout={e.layout}: set encoder.preset to one of {names}, or another method.preset"
            )
        if autoencodes and not self.flat and "encode" not in self.student.model_fields_set:
            self.student = StudentConfig(encode="sparse")
        if autoencodes:
            self._check_mae()
        if self.flat:
            if isinstance(self.data.spacing, tuple):
                raise ValueError(
                    f"data.spacing={list(self.data.spacing)}: pixels of mammograms have one size"
                )
            return self
        if self.data.view > self.data.region:
            raise ValueError(f"data.view={self.data.view} does not fit into data.region={self.data.region}")
        total = self.encoder.stride(4)
        if self.data.view % total:
            below = self.data.view // total * total
            way = "" if e.kind == "vit" else f" × 2^4 = {e.patch} × 16"
            raise ValueError(
                f"data.view={self.data.view} is not divisible by the encoder's total stride encoder.patch{way} = "
                f"{total} ({self.data.view} = {self.data.view // total} × {total} + "
                f"{self.data.view % total}); use {' or '.join(str(n) for n in (below, below + total) if n)}"
            )
        if not autoencodes:
            self._check_method()
        return self

    def _check_mae(self) -> None:
        m, patch, dims = self.mae, self.encoder.patch, self.encoder.dims
        for width in m.width:
            if width % (2 * dims):
                raise ValueError(
                    f"mae.width={width} must be divisible by {2 * dims} (sine and cosine of each axis)"
                )
        if m.input % patch:
            raise ValueError(f"mae.input={m.input} is not divisible by encoder.patch={patch}")
        for scale in m.scales:
            if self.data.view % (m.input * scale):
                raise ValueError(
                    f"data.view={self.data.view} cannot be made smaller to scale {scale} by whole pixels: it must be "
                    f"a multiple of mae.input × {scale} = {m.input * scale}"
                )
        units = (m.input // patch) ** dims
        if units - self.mask.ratio * units < 1:
            raise ValueError(
                f"mask.ratio={self.mask.ratio} leaves none of the {units} patches of the input visible"
            )
        if self.mask.strategy.startswith("attention"):
            raise ValueError(
                f"mask.strategy={self.mask.strategy} needs a teacher, which method.preset={self.method.preset} does "
                "not have: use random or block"
            )
        if self.student.encode == "sparse" and self.flat:
            raise ValueError(
                f"student.encode=sparse is for Swin and for scans: with method.preset={self.method.preset} masked patches are "
                "never encoded, leave it at dense"
            )
        if self.teacher.enabled or self.semantic.enabled:
            raise ValueError(
                f"method.preset={self.method.preset} has no teacher and no semantic attention: "
                "set teacher.enabled=false and semantic.enabled=false"
            )

    def _check_method(self) -> None:
        vit = self.encoder.kind == "vit"
        times = 1 if vit else 2**self.semantic.stage
        channels = self.encoder.embed_dim * times
        if self.semantic.enabled and channels % self.semantic.heads:
            raise ValueError(
                f"semantic tokens have encoder.embed_dim × {times} = {channels} "
                f"channels, which semantic.heads={self.semantic.heads} does not divide"
            )
        if vit and self.student.encode == "sparse":
            raise ValueError(
                f"student.encode=sparse of a ViT leaves hidden tokens out, which method.preset={self.method.preset} needs: "
                "leave it at dense, or set method.preset=mae"
            )
        looks = self.semantic.enabled or (vit and self.encoder.cls_token)
        if self.mask.strategy.startswith("attention") and not (looks and self.teacher.enabled):
            off = "teacher.enabled" if looks else "semantic.enabled"
            raise ValueError(
                f"mask.strategy={self.mask.strategy} needs the teacher's [CLS] attention, but {off}=false"
            )
        if self.mask.importance == "received" and self.semantic.enabled and self.semantic.kind == "class":
            raise ValueError(
                "mask.importance=received needs semantic.kind=full: with class attention only [CLS] attends"
            )
        behind = self.loss.patch and self.distill.patch_from == "semantic"
        if self.semantic.enabled and not (self.loss.image or self.loss.coarse or behind):
            raise ValueError(
                "nothing would train the semantic attention: set loss.image or loss.coarse, or loss.patch with "
                "distill.patch_from=semantic, or semantic.enabled=false"
            )
        distilled = self.loss.patch or self.loss.image or self.loss.global_image
        if not self.teacher.enabled and distilled:
            raise ValueError(
                "loss.patch, loss.image and loss.global_image need a teacher; set all to 0 or teacher.enabled=true"
            )
        if not (self.loss.amip or distilled):
            raise ValueError("every loss weight is 0: there is nothing to train on")
        if self.mask.ratio_min is not None and self.mask.ratio_min > self.mask.ratio:
            raise ValueError(
                f"mask.ratio_min={self.mask.ratio_min} must not exceed mask.ratio={self.mask.ratio}"
            )
        if self.teacher.momentum > self.teacher.momentum_end:
            raise ValueError(
                f"teacher.momentum={self.teacher.momentum} must not exceed teacher.momentum_end={self.teacher.momentum_end}"
            )

    @property
    def flat(self) -> bool:
        """Whether this is about images, and not scans."""
        return self.encoder.dims == 2

    @property
    def input(self) -> int:
        """Pixels per side of what a ViT sees of a view; masked autoencoding can make it smaller."""
        return self.mae.input if self.method.family == "multiscale_mae" else self.data.view

    @property
    def unit(self) -> int:
        """Voxels per side of a mask unit: the stride of the stage that semantic attention looks at."""
        return self.encoder.stride(self.semantic.stage) * (self.data.view // self.input)

    def save(self, path: str | Path) -> Path:
        """Write the resolved configuration (every value) as YAML."""
        path = Path(path)
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))
        return path


def presets() -> list[str]:
    """Names that `load_config` takes."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def load_config(
    preset: str | Path | Mapping[str, Any] = "tiny", overrides: Mapping[str, Any] | None = None
) -> Config:
    """Resolve a preset name, YAML path or nested mapping, plus dotted overrides, into a `Config`.

    >>> cfg = load_config("tiny", {"mask.strategy": "random", "train.steps": 200})
    """
    name, content, chosen = _read(preset)
    written, asked = _since_0_1(dict(flatten(content))), dict(flatten(overrides or {}))
    for key in written | asked:
        _check_key(key, name)
    below: dict[str, Any] = {}
    above: dict[str, Any] = {}
    for key, table in (("encoder.preset", ENCODERS), ("method.preset", METHODS)):
        default = "tiny" if table is ENCODERS else "dagman"
        choice = asked.get(key, written.get(key, default))
        one_of(f"{key} has no preset", choice, table)
        (above if asked.get(key, written.get(key)) != written.get(key) else below).update(table[choice])
    try:
        config = Config.model_validate(_nest(below | written | above | asked))
    except ValidationError as error:
        raise UseError("the configuration is not valid", path=name, found=_explain(error)) from None
    if "data.window" not in chosen | set(asked):  # a preset's window is for CT, nobody's choice for MR
        config.data.model_fields_set.discard("window")
    return config


def _since_0_1(written: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run of version 0.1, which had other defaults and named a stage by its stride."""
    if "semantic.stride" not in written:
        return written
    stride, patch = written.pop("semantic.stride"), written.get("encoder.patch", 2)
    written.pop("mask.unit", None)
    threshold = written.pop("mask.informativeness", 0.0)  # was absolute
    return {
        "semantic.stage": max(1, (stride // patch).bit_length() - 1),  # of an image's ViT it means nothing
        "mask.informativeness": 1.0 if threshold else 0.0,
        "mask.fill": "token",
        "mask.hint_from": "any",
        "teacher.guide": "noisy",
        "teacher.dropout_unit": "mask_unit",
        "distill.patch_from": "semantic",
        "loss.global_image": 0.0,
    } | written


def parse_overrides(words: list[str]) -> dict[str, Any]:
    """`["train.steps=200", "data.window=[-1000, 400]"]` -> dotted overrides; values are YAML."""
    settings: dict[str, Any] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key:
            raise UseError(
                "an override is written key=value", found=repr(word), expected="such as train.steps=200"
            )
        try:
            settings[key] = yaml.safe_load(value)
        except (ValueError, RecursionError, yaml.YAMLError):  # 2024-13-45 looks like a date and is none
            raise UseError(f"the value of {key} is not valid YAML", found=repr(value)) from None
    return settings


@functools.cache
def known_keys() -> dict[str, Any]:
    """Every dotted key with its default."""
    return dict(flatten(Config().model_dump()))


def _read(
    preset: str | Path | Mapping[str, Any], above: tuple[Path, ...] = ()
) -> tuple[str, Mapping[str, Any], set[str]]:
    """What it is called, its settings, and which of them no preset of ours wrote."""
    if isinstance(preset, Mapping):
        return "settings", preset, set(dict(flatten(preset)))
    path = Path(preset)
    if path in above:
        raise UseError("extends itself", path=path)
    if path.suffix not in (".yaml", ".yml"):
        path = PRESET_FOLDER / f"{preset}.yaml"
        if not path.is_file():
            hint = "or give the path of a .yaml file"
            raise unknown("no preset named", str(preset), presets(), fix=hint)
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise UseError("cannot be read as YAML", path=path, found=" ".join(str(error).split())) from None
    if not isinstance(content, Mapping):
        raise UseError("is not a mapping of settings", path=path, found=type(content).__name__)
    if "extends" in content:  # the settings of another preset, with these on top
        own = dict(flatten({key: value for key, value in content.items() if key != "extends"}))
        try:
            _, below, chosen = _read(content["extends"], (*above, path))
            content = _nest(dict(flatten(below)) | own)
        except TypeError:
            raise UseError(
                "extends no preset",
                path=path,
                found=content["extends"],
                expected="the name or path of another",
            ) from None
    else:
        own, chosen = dict(flatten(content)), set()
    return str(preset), content, set() if path.parent == PRESET_FOLDER else chosen | set(own)


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in settings.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _nest(settings: Mapping[str, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for key, value in settings.items():
        *sections, last = key.split(".")
        place = nested
        for section in sections:
            place = place.setdefault(section, {})
        place[last] = value
    return nested


def _check_key(key: str, name: str) -> None:
    known = known_keys()
    if key in known:
        return
    section = [k for k in known if k.split(".")[0] == key.split(".")[0]]
    here, near = (
        difflib.get_close_matches(key, section, 1, 0.8),
        difflib.get_close_matches(key, known, 1, 0.5),
    )
    by_last = [k for k in known if k.split(".")[-1] == key.split(".")[-1]]
    best = (here + by_last + near)[:1]
    if any(k.startswith(key + ".") for k in known):
        raise UseError(f"{key!r} is a section, not a setting", path=name, expected=f"keys such as {key}.…")
    hint = f"did you mean {best[0]!r}?" if best else "`smartlab pretrain --help` lists the settings"
    raise UseError(f"unknown setting {key!r}", path=name, fix=hint)


def _explain(error: ValidationError) -> str:
    """The first problem in plain words, with the dotted key it belongs to, and how many more."""
    problems = problems_of(error)
    first = problems[0]
    message = first.why if first.kind == "value_error" else f"{first.place}={first.value!r}: {first.why}"
    return message + (f" (and {len(problems) - 1} more)" if len(problems) > 1 else "")
