"""Weights to and from the rest of the ecosystem, through one adapter.

Out: a `.pt` that MONAI's SwinUNETR loads (`{"state_dict": {"swinViT.…": …}}`, `weights_only=True`), or
safetensors with a model card. In: our run folders and exports, MONAI SwinUNETR checkpoints, MONAI's
SwinUNETR self-supervised weights, SMIT-style checkpoints, and MAE's vision transformers (`interop_vit.py`). Nothing is loaded by halves: what does not
match is refused with a table of what did and what did not.

Patch merging stacks the eight corners of a 2×2×2 cell in an order that is not in the weights: the same
keys and shapes, another function (MONAI issue 8284). `MERGE_ORDERS` names the orders; weights from
another order get the channel blocks of `norm` and `reduction` permuted. MONAI before 1.5 used two
corners twice: such weights compute something else and are refused.
"""

from __future__ import annotations

import itertools
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from smartlab.core.config import Config, load_config
from smartlab.core.errors import DataError, UseError, one_of
from smartlab.core.files import written
from smartlab.interop import hub
from smartlab.interop.vit import config_of_vit, convert_vit, is_vit, to_monai
from smartlab.models.build import make_encoder
from smartlab.models.encoder import AnyEncoder
from smartlab.models.swin import MERGE_ORDER
from smartlab.models.vit import ViTEncoder
from smartlab.training.checkpoint import finite, header_of, load_pickled, load_weights, save_weights
from smartlab.training.run import Run

Corner = tuple[int, int, int]
# what belongs to a Swin encoder in files, known here or not: what is not known is refused, not left out
ENCODERS = (
    "patch_embed.",
    *(f"layers{i}{c}." for i in (1, 2, 3, 4) for c in ("", "c")),
    "absolute_pos_embed",
    "pos_embed",
)
MERGE_ORDERS: dict[str, tuple[Corner, ...]] = {
    "monai": MERGE_ORDER,
    "mergingv2": tuple(itertools.product(range(2), range(2), range(2))),  # type: ignore[arg-type]
    # TransMorph (Chen et al., 2022) and networks built on it: two mixed corners swapped. SMIT is one of these by its
    # names; its merging could not be checked, so say the order that its code has.
    "transmorph": (*MERGE_ORDER[:5], MERGE_ORDER[6], MERGE_ORDER[5], MERGE_ORDER[7]),
    "duplicated": ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 0, 1), (1, 1, 1)),
}
_WRAPPERS = (
    "module.",
    "_orig_mod.",
    "student.",
    "model.",
    "encoder.",
    "backbone.",
    "swinViT.",
    "swin.",
    "transformer.",
)


_OLD = re.compile(r"\.fc[12]\.|^module\.|(^|\.)layers\.\d\.|rotation_head")  # SMIT, MONAI's SSL weights


def load_encoder(
    source: str | Path,
    role: Literal["teacher", "student"] = "teacher",
    *,
    merging: str | None = None,
    heads: int | None = None,
) -> AnyEncoder:
    """An encoder from a run folder, an exported file, any file described above, or the hub (hf:ORG/NAME).

    role:    which encoder of a run folder.
    merging: the patch-merging order of a foreign file, one of `MERGE_ORDERS`; no file tells it. "monai" by
             default, with a warning for names that come from elsewhere or from before MONAI 1.5.
    heads:   of a foreign vision transformer of unusual size; no file tells them either.

    >>> enc = sl.load_encoder("runs/a", role="teacher")
    """
    path = hub.download(str(source)) if str(source).startswith(hub.PREFIX) else Path(source)
    if path.is_dir():
        return Run(path).encoder(role)
    if not path.is_file():
        raise UseError("no such file or run folder", path=path)
    if path.suffix == ".safetensors" and "config" in header_of(path):
        weights, about = load_weights(path)
        encoder = _fresh(_config_in(about, path))
        _load_all(encoder, weights, path)
        return encoder.eval().requires_grad_(False)
    found = read_weights(path)
    if is_vit(found):
        found = convert_vit(found, path)
        image_encoder = _fresh(config_of_vit(found, path, heads))
        _load_all(image_encoder, found, path)
        return image_encoder.eval().requires_grad_(False)
    if merging is None and any(_OLD.search(key) for key in found):
        warnings.warn(
            f"{path}: the order of its patch merging is not in the file; taken as 'monai'. If it was trained with "
            f"another, say merging=… (one of {', '.join(MERGE_ORDERS)}): the features are wrong otherwise",
            stacklevel=2,
        )
    weights = convert(found, path, merging or "monai")
    encoder = _fresh(config_of(weights, path))
    _load_all(encoder.swin, weights, path)  # type: ignore[arg-type]
    return encoder.eval().requires_grad_(False)


def export(
    source: str | Path | AnyEncoder,
    to: Literal["monai", "safetensors", "hub"],
    out: str | Path,
    role: str = "teacher",
) -> Path | str:
    """Write an encoder for others: "monai" (.pt for its SwinUNETR or ViT), "safetensors" with a model card, or
    both of these last on the Hugging Face hub, private at first: `out` is ORG/NAME there, and so is what returns.

    >>> export("runs/a", "monai", "encoder.pt")
    >>> weights = torch.load("encoder.pt", weights_only=True)["state_dict"]
    >>> net.load_state_dict(weights, strict=False)  # net: MONAI's SwinUNETR of the same sizes
    """
    if to not in ("monai", "safetensors", "hub"):
        raise UseError(f"cannot export to {to!r}", expected="monai, safetensors or hub")
    given = isinstance(source, torch.nn.Module)
    run = Run(source) if not given and Path(source).is_dir() else None  # type: ignore[arg-type]
    encoder: Any = source if given else load_encoder(source, role)  # type: ignore[arg-type]
    card = _card(encoder, run, source, role)
    if to == "hub":
        card["config"] = json.dumps(hub.nameless(json.loads(card["config"])))
        return hub.publish(lambda file: save_weights(file, encoder.state_dict(), card), str(out))
    out = Path(out)
    with written(out, "the export") as temporary:
        if to == "safetensors":
            save_weights(temporary, encoder.state_dict(), card)
        elif isinstance(encoder, ViTEncoder):
            torch.save({"state_dict": to_monai(encoder)}, temporary)
        else:
            weights = {f"swinViT.{k}": v.detach().cpu().clone() for k, v in encoder.swin.state_dict().items()}
            torch.save({"state_dict": weights}, temporary)
    return out


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a foreign checkpoint; pickled code is never run."""
    content: Any = load_weights(path)[0] if path.suffix == ".safetensors" else load_pickled(path)
    for key in ("state_dict", "model_state_dict", "model", "student", "net"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping):
        raise DataError("holds no state dict", path=path, found=type(content).__name__)
    return {str(k): v for k, v in content.items() if isinstance(v, Tensor)}


def convert(weights: Mapping[str, Tensor], path: Path, merging: str = "monai") -> dict[str, Tensor]:
    """Foreign names and merging order -> those of our Swin. Heads and decoders are left behind."""
    one_of("no merging order", merging, MERGE_ORDERS)
    order = MERGE_ORDERS[merging]
    if len(set(order)) < 8:
        raise DataError(
            "was trained with a patch merging that uses two corners twice",
            path=path,
            fix="such weights compute another function and cannot be converted; use weights of MONAI 1.5 or newer",
        )
    named = {_rename(key): value for key, value in weights.items()}
    if not any(key.startswith("layers1.0.blocks.0.") for key in named):
        raise DataError(
            "holds no 3D Swin encoder or ViT that is known here",
            path=path,
            found=f"keys such as {', '.join(list(weights)[:3])}",
            expected="swinViT.layers1.0.blocks.0.… (MONAI), layers.0.blocks.0.… (SMIT) or MAE's vision transformer",
        )
    kept = {k: v for k, v in named.items() if k.startswith(ENCODERS)}
    blocks = [order.index(corner) for corner in MERGE_ORDER]
    for key, value in kept.items():
        if ".downsample.reduction." in key:  # (2C, 8C): the input channels come in eight blocks
            kept[key] = value.view(value.shape[0], 8, -1)[:, blocks].reshape(value.shape)
        elif ".downsample.norm." in key:
            kept[key] = value.view(8, -1)[blocks].reshape(value.shape)
    return kept


def config_of(weights: Mapping[str, Tensor], path: Path) -> Config:
    """The encoder configuration that these tensors have, read off their shapes."""
    try:
        embed = weights["patch_embed.proj.weight"]
        depths, heads = [], []
        for stage in range(1, 5):
            prefix = f"layers{stage}.0.blocks."
            depths.append(len({k.split(".")[3] for k in weights if k.startswith(prefix)}))
            heads.append(weights[f"{prefix}0.attn.relative_position_bias_table"].shape[1])
        span = round(weights["layers1.0.blocks.0.attn.relative_position_bias_table"].shape[0] ** (1 / 3))
    except KeyError as error:
        raise DataError(
            "lacks a tensor of the Swin encoder", path=path, found=f"no {error.args[0]}"
        ) from None
    return load_config(
        {
            "encoder.preset": "custom",
            "encoder.in_channels": embed.shape[1],
            "encoder.patch": embed.shape[2],
            "encoder.embed_dim": embed.shape[0],
            "encoder.depths": depths,
            "encoder.num_heads": heads,
            "encoder.window_size": (span + 1) // 2,
            "encoder.qkv_bias": "layers1.0.blocks.0.attn.qkv.bias" in weights,
            "method.preset": "simmim",  # no semantic attention comes with foreign weights
        }
    )


def _config_in(about: Mapping[str, str], path: Path) -> Config:
    try:
        return load_config(json.loads(about["config"]))
    except (ValueError, AttributeError, TypeError) as error:
        raise DataError(
            "carries no readable configuration", path=path, found=error, fix="export it again"
        ) from None


def _fresh(config: Config) -> AnyEncoder:
    with torch.random.fork_rng():
        return make_encoder(config)


def _rename(key: str) -> str:
    """One foreign name -> ours: wrappers off, stages and perceptron layers by our names."""
    while (wrapper := next((w for w in _WRAPPERS if key.startswith(w)), None)) is not None:
        key = key.removeprefix(wrapper)
    for stage in range(4):
        if key.startswith(f"layers.{stage}."):
            key = f"layers{stage + 1}.0." + key.removeprefix(f"layers.{stage}.")
    return key.replace(".mlp.fc1.", ".mlp.linear1.").replace(".mlp.fc2.", ".mlp.linear2.")


def _load_all(module: torch.nn.Module, weights: Mapping[str, Tensor], path: Path) -> None:
    """Every tensor, with its shape, or none."""
    wanted = module.state_dict()
    problems = [f"missing    {k} {tuple(v.shape)}" for k, v in wanted.items() if k not in weights]
    problems += [f"unknown    {k} {tuple(v.shape)}" for k, v in weights.items() if k not in wanted]
    problems += [
        f"shape      {k}: {tuple(weights[k].shape)} in the file, {tuple(v.shape)} here"
        for k, v in wanted.items()
        if k in weights and weights[k].shape != v.shape
    ]
    if problems:
        matched = len(wanted) - sum(p.startswith(("missing", "shape")) for p in problems)
        table = "\n  ".join(
            problems[:12] + ([f"… and {len(problems) - 12} more"] if len(problems) > 12 else [])
        )
        raise DataError(
            f"fits only in part: {matched} of {len(wanted)} tensors match\n  {table}\n", path=path
        )
    module.load_state_dict(finite(dict(weights), path))


def _card(encoder: AnyEncoder, run: Run | None, source: Any, role: str) -> dict[str, str]:
    """What the safetensors file says about itself."""
    card = {
        "format": "smartlab encoder",
        "role": role,
        "config": json.dumps(encoder.config.model_dump(mode="json")),
    }
    if run is not None:
        card["role"] = role if run.config.teacher.enabled else "student"
        card["step"] = str(run.step)
        card["data"] = str(run.facts.get("data", ""))
        history = run.history[run.history.step <= run.step]
        if len(history):  # the numbers of the exported step, not of a run that went on
            last = {k: v for k, v in history.iloc[-1].to_dict().items() if v == v}
            card["metrics"] = json.dumps(last)
    elif not isinstance(source, torch.nn.Module) and Path(source).suffix == ".safetensors":
        card = header_of(Path(source)) | {"format": card["format"], "config": card["config"]}
    return card
