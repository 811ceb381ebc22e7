"""From presets, files and overrides to one validated `Config` (every knob: `settings.py`).

Layers, later ones winning:

1. the defaults of the models;
2. the settings that the `encoder.preset` and `method.preset` of the preset file stand for (`ENCODERS`,
   `METHODS`);
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
from pydantic import ValidationError

from smartlab.core.errors import UseError, one_of, problems_of, unknown
from smartlab.core.settings import Config

PRESET_FOLDER = Path(__file__).parents[1] / "presets"

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

# What the preset names stand for, as dotted settings. The papers' notes give the provenance.
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


def presets() -> list[str]:
    """Names that `load_config` takes."""
    return sorted(path.stem for path in PRESET_FOLDER.glob("*.yaml"))


def load_config(
    preset: str | Path | Mapping[str, Any] = "tiny", overrides: Mapping[str, Any] | None = None
) -> Config:
    """Resolve a preset name, YAML path or nested mapping, plus dotted overrides, into a `Config`.

    >>> cfg = load_config("tiny", {"mask.strategy": "random", "train.steps": 200})
    """
    name, content = _read(preset)
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
        return Config.model_validate(_nest(below | written | above | asked))
    except ValidationError as error:
        raise UseError("the configuration is not valid", path=name, found=_explain(error)) from None


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
) -> tuple[str, Mapping[str, Any]]:
    if isinstance(preset, Mapping):
        return "settings", preset
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
        own = {key: value for key, value in content.items() if key != "extends"}
        try:
            content = _nest(dict(flatten(_read(content["extends"], (*above, path))[1])) | dict(flatten(own)))
        except TypeError:
            raise UseError(
                "extends no preset",
                path=path,
                found=content["extends"],
                expected="the name or path of another",
            ) from None
    return str(preset), content


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
